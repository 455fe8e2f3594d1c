"""Two sets of the same tensors in a checkpoint, of which no word says which is the average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import walks
from truth import distance
from walks import Tensors, saves

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import InvalidValueError


def write(folder: Path, **sets: list[Tensors]) -> Path:
    """Write a file an epoch, with a set of tensors under each key."""
    folder.mkdir()
    for epoch in range(1, len(saves()) + 1):
        content = {key: tensors[epoch - 1] for key, tensors in sets.items()}
        content["epoch"] = epoch
        torch.save(content, folder / f"model_{epoch}.pt")
    return folder


WEIGHTS = [one.weights for one in saves()]
AVERAGES = [one.average for one in saves()]
STILL = [WEIGHTS[0] for _ in WEIGHTS]


@pytest.mark.parametrize("key", ["final_state_dict", "non_ema_state_dict"])
def test_the_set_that_moves_less_is_the_average(key, files, run, caplog):
    """As in RoseTTAFold2, whose `model_state_dict` is the average."""
    write(files, model_state_dict=AVERAGES, **{key: WEIGHTS})
    settings = {
        "ema_decay": 0.95,
        "ema_warmup": "none",
        "steps_per_epoch": walks.EVERY,
    }
    found = import_checkpoints(files, run, **settings)
    assert "the average is model_state_dict, which moves less" in caplog.text
    assert found.counts == {"EMA of decay 0.95": 10, "weights": 10}
    made = Run(run).average(0.1)
    error = distance(made, walks.true_average(0.1))
    assert error < 2 * made.predicted_error < 0.02


@pytest.mark.parametrize(
    "sets",
    [
        {"model": WEIGHTS, "state": WEIGHTS},
        {"model": WEIGHTS, "reference": STILL},
        {"model": WEIGHTS, "best_model": AVERAGES},
    ],
)
def test_a_copy_or_a_set_that_never_moves_is_no_average(files, sets):
    sources = Run(write(files, **sets)).sources
    assert import_checkpoints(files, None, dry_run=True).counts == {"weights": 10}
    with sources[-1] as newest:
        found = newest.values("head.weight", 0, 4)
    expected = WEIGHTS[-1]["head.weight"].flatten()
    assert found.tolist() == expected[:4].tolist()


def negated(weights: Tensors) -> Tensors:
    return {name: -value for name, value in weights.items()}


def test_two_models_that_move_alike_are_asked_about(tmp_path, files):
    other = [negated(weights) for weights in WEIGHTS]
    write(files, model=WEIGHTS, twin=other)
    with pytest.raises(InvalidValueError, match="neither follows the other: twin or model"):
        _ = Run(files).sources
    import_checkpoints(files, tmp_path / "run", kind="checkpoints")
