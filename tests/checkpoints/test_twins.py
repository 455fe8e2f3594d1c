"""Two sets of the same tensors in a checkpoint, of which no word says which is the average."""

from __future__ import annotations

from pathlib import Path

import pytest
import walks
from saved import assert_equal, check_error, read, store, values_of
from walks import Tensors, saves

from posthoc_cli import import_checkpoints
from posthoc_cli.errors import InvalidValueError


def write(folder: Path, **sets: list[Tensors]) -> Path:
    """Write a file an epoch, with a set of tensors under each key."""
    for epoch, tensors in enumerate(zip(*sets.values(), strict=True), 1):
        content = dict(zip(sets, tensors, strict=True))
        store(folder / f"model_{epoch}.pt", content | {"epoch": epoch})
    return folder


WEIGHTS = [one.weights for one in saves()]
AVERAGES = [one.average for one in saves()]
STILL = [WEIGHTS[0] for _ in WEIGHTS]


@pytest.mark.parametrize("key", ["final_state_dict", "non_ema_state_dict"])
def test_the_set_that_moves_less_is_the_average(key, files, run, caplog):
    """As in RoseTTAFold2, whose `model_state_dict` is the average."""
    write(files, model_state_dict=AVERAGES, **{key: WEIGHTS})
    settings = {"ema_warmup": "none", "steps_per_epoch": walks.EVERY}
    found = import_checkpoints(files, run, ema_decay=0.95, **settings)
    assert "the average is model_state_dict, which moves less" in caplog.text
    assert found.counts == {"EMA of decay 0.95": 10, "weights": 10}
    check_error(run)


@pytest.mark.parametrize(
    "sets",
    [
        {"model": WEIGHTS, "state": WEIGHTS},
        {"model": WEIGHTS, "reference": STILL},
        {"model": WEIGHTS, "best_model": AVERAGES},
    ],
)
def test_a_copy_or_a_set_that_never_moves_is_no_average(files, sets):
    found = read(write(files, **sets))
    assert found.counts == {"weights": 10}
    assert_equal(values_of(found.checkpoints[-1]), WEIGHTS[-1])


def negated(weights: Tensors) -> Tensors:
    return {name: -value for name, value in weights.items()}


def test_two_models_that_move_alike_are_asked_about(files):
    write(files, model=WEIGHTS, twin=[*map(negated, WEIGHTS)])
    with pytest.raises(InvalidValueError, match="neither follows the other: twin or model"):
        read(files)
    assert read(files, kind="checkpoints").counts == {"weights": 10}
