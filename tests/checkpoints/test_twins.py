"""Two sets of the same tensors in a checkpoint, of which no word says which is the average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import walks
from walks import Tensors, saves

from posthoc_cli import Run, export_file, import_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError


def write(folder: Path, **sets: list[Tensors]) -> Path:
    """Write a file an epoch, with a set of tensors under each key."""
    folder.mkdir()
    for index, saved in enumerate(saves()):
        content = {key: tensors[index] for key, tensors in sets.items()}
        torch.save(content | {"epoch": saved.epoch}, folder / f"model_{saved.epoch}.pt")
    return folder


WEIGHTS = [one.weights for one in saves()]
AVERAGES = [one.average for one in saves()]
STILL = [WEIGHTS[0] for _ in WEIGHTS]


def test_the_set_that_moves_less_is_the_average(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in RoseTTAFold2, whose `model_state_dict` is the average."""
    folder = write(tmp_path / "files", model_state_dict=AVERAGES, final_state_dict=WEIGHTS)
    settings = {"ema_decay": 0.95, "ema_warmup": "none", "steps_per_epoch": walks.EVERY}
    found = import_checkpoints(folder, tmp_path / "run", **settings)
    assert "the average is model_state_dict, which moves less" in caplog.text
    assert found.counts == {"EMA of decay 0.95": 10, "weights": 10}
    made = Run(tmp_path / "run").average(0.1)
    assert walks.distance(made, walks.true_average(0.1)) < 2 * (made.predicted_error or 0) < 0.02
    with pytest.raises(FileFormatError, match="nothing tells which is the average"):
        export_file(folder / "model_5.pt", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "sets",
    [
        {"model": WEIGHTS, "state": WEIGHTS},
        {"model": WEIGHTS, "reference": STILL},
        {"model": WEIGHTS, "best_model": AVERAGES},
    ],
)
def test_a_copy_or_a_set_that_never_moves_is_no_average(
    tmp_path: Path,
    sets: dict[str, list[Tensors]],
) -> None:
    run = Run(write(tmp_path / "files", **sets))
    assert {source.holds for source in run.sources} == {"weights"}
    newest = run.sources[-1]
    with newest:
        name = "head.weight"
        values = newest.values(name, 0, 4)
    assert values.tolist() == WEIGHTS[-1][name].flatten()[:4].tolist()


def negated(weights: Tensors) -> Tensors:
    return {name: -value for name, value in weights.items()}


def test_two_models_that_move_alike_are_asked_about(tmp_path: Path) -> None:
    other = list(map(negated, WEIGHTS))
    run = Run(write(tmp_path / "files", model=WEIGHTS, twin=other))
    with pytest.raises(InvalidValueError, match="neither follows the other: twin or model"):
        print(run.sources)
    import_checkpoints(tmp_path / "files", tmp_path / "run", kind="checkpoints")
