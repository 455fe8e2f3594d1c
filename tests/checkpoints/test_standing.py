"""Weights or averages that stand still within an interval, leap, or swing about a minimum, are no
fault of the average; what updates at every few steps would change."""

import numpy as np
import pytest
import torch
from checking import refused
from predictions import assert_predicted, noise, normal, walk
from saved import store
from trained import by, ema, paste, write

from posthoc_cli import Run, import_checkpoints

STEPS = 2000
SIZE = 300


def steady():
    return walk(np.full(STEPS, 0.02), SIZE)


LATE = [*range(75, 1776, 100), STEPS]
"""Of the last interval, 225 steps, the weights of `falling` hardly move in the second half."""


def falling():
    left = 1 - np.arange(1, STEPS + 1) / STEPS
    return walk(0.02 * np.clip(left / 0.1, 0, 1), SIZE)


def test_a_rate_that_falls_to_0_in_the_last_interval_is_no_restart(files):
    """Motion that is over early within an interval was taken for an average that began again."""
    write(files, falling(), ema(0.99), steps=LATE)
    (audit,) = Run(files).audit()
    assert not audit.is_bad
    assert audit.length == pytest.approx(100, rel=2 * audit.uncertainty)


def test_a_restart_in_such_an_interval_is_still_one(files):
    reset = by(lambda n: 0.0 if n == 1935 else 0.99)
    write(files, falling(), reset, steps=LATE)
    (audit,) = Run(files).audit()
    assert audit.verdict == "set back"


def test_two_files_between_two_updates_have_one_average(files):
    steps = [*range(100, STEPS + 1, 100), 1722, 1725]
    write(files, steady(), by(lambda n: 1.0 if n % 10 else 0.97), steps=steps)
    (audit,) = Run(files).audit()
    assert not audit.is_bad


KEPT_BEST = (74, 79, 80, 111, 138, 149, 151, 172, 352, 361, 668, 711, 1233, 1403, 1448, 1462, 1663)


def test_noise_about_a_minimum_refutes_no_true_decay_where_files_are_rarer_and_rarer(files):
    """It forgets in 30 steps, so that averages look the longer, the longer the intervals are."""
    path = normal(SIZE) + 0.2 * noise(KEPT_BEST[-1], 30, SIZE, seed=3)
    write(files, path, ema(0.999), steps=KEPT_BEST)
    (audit,) = Run(files).audit(0.999)
    assert audit.verdict == "as claimed"


def stored(folder, path, decay, parts=(), every=1):
    """Write the weights and their float32 average, which adds as `mul_(d).add_(w, alpha=1 - d)`, as
    one tensor or, of the first so many elements each, several; return the folder."""
    average = torch.tensor(path[0], dtype=torch.float32)
    for step, weights in enumerate(path, 1):
        now = torch.tensor(weights, dtype=torch.float32)
        if step % every == 0:
            average.mul_(decay).add_(now, alpha=1 - decay)
        if step % 100 == 0:
            content = {}
            for key, vector in (("model", now), ("ema", average)):
                pieces = torch.tensor_split(vector, list(parts))
                content[key] = {str(number): piece.clone() for number, piece in enumerate(pieces)}
            store(folder / f"step{step}.pt", content)
    return folder


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_an_average_of_layers_that_are_frozen_at_first_is_taken(share, files, run):
    """What rounding moves in an average of weights that stand still is no motion of its own."""
    path = steady()
    first = round(share * STEPS)
    path[:first, :100] = path[0, :100]
    path[first:, :100] += path[0, :100] - path[first, :100]
    stored(files, path, 0.99, parts=(100,))
    assert import_checkpoints(files, run).checks[0].endswith("; taken as 0.99")
    assert "as claimed" in import_checkpoints(files, run, ema_decay=0.99, overwrite=True).checks[0]


def test_a_layer_that_is_large_for_a_step_is_no_other_average(files, run):
    path = steady()
    path[999, :100] *= 30
    stored(files, path, 0.99, parts=(100, 200))
    assert "as claimed" in import_checkpoints(files, run, ema_decay=0.99).checks[0]


def test_an_average_that_is_updated_at_every_tenth_step_is_not_taken_for_one_of_every_step(
    files, run
):
    """Of decay 0.999 it would be 9 steps younger."""
    path = steady()
    stored(files, path, 0.99, every=10)
    with refused("ema_decay", "--ema-decay found ") as asked:
        import_checkpoints(files, run)
    paste(asked.value, run)
    assert_predicted(run, path, targets=(0.1, 0.2), low=0.1, names=["0"])
