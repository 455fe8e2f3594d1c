"""Weights or averages that stand still within an interval, or swing about a minimum, are no fault
of the average."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from saved import store

from posthoc_cli import Run

STEPS = 2000
SIZE = 300


def walk(rate):
    """Return the weights after each step, [STEPS, SIZE], which move by this rate."""
    random = np.random.default_rng(0)
    moves = random.standard_normal((STEPS, SIZE))
    moves *= 0.02 * rate[:, None]
    start = random.standard_normal(SIZE)
    return start + np.cumsum(moves, axis=0)


def save(folder, path, steps, decay=0.99, every=1, reset=None):
    """Write the weights and their average, which every so many steps takes them in, and at `reset`
    is replaced by them."""
    written = set(steps)
    average = path[0]
    for step, weights in enumerate(path, 1):
        if step % every == 0:
            average = decay * average + (1 - decay) * weights
        if step == reset:
            average = weights
        if step in written:
            content = {
                "model": {"w": torch.tensor(weights)},
                "ema": {"w": torch.tensor(average)},
            }
            store(folder / f"step{step}.pt", content)
    return folder


LATE = [*range(75, 1776, 100), STEPS]
"""Of the last interval, 225 steps, the weights of `falling` hardly move in the second half."""


def falling():
    left = 1 - np.arange(1, STEPS + 1) / STEPS
    return walk(np.clip(left / 0.1, 0, 1))


def test_a_rate_that_falls_to_0_in_the_last_interval_is_no_restart(files):
    """Motion that is over early within an interval was taken for an average that began again."""
    save(files, falling(), LATE)
    (audit,) = Run(files).audit()
    assert audit.verdict == "found"
    assert audit.starts == ()
    assert audit.found == pytest.approx(0.99, abs=0.0005)


def test_a_restart_in_such_an_interval_is_still_one(files):
    save(files, falling(), LATE, reset=1935)
    (audit,) = Run(files).audit()
    assert audit.verdict == "began again"


def test_two_files_between_two_updates_have_one_average(files):
    steps = [*range(100, STEPS + 1, 100), 1722, 1725]
    path = walk(np.ones(STEPS))
    save(files, path, steps, decay=0.97, every=10)
    (audit,) = Run(files).audit()
    assert audit.verdict == "found"


KEPT_BEST = (74, 79, 80, 111, 138, 149, 151, 172, 352, 361, 668, 711, 1233, 1403, 1448, 1462, 1663)


def test_noise_about_a_minimum_refutes_no_true_decay_where_files_are_rarer_and_rarer(files):
    """It forgets in 30 steps, so that averages look the longer, the longer the intervals are."""
    random = np.random.default_rng(3)
    noise = 0.2 * random.standard_normal((KEPT_BEST[-1], SIZE))
    kept = np.exp(-1 / 30)
    for before, after in pairwise(noise):
        after *= np.sqrt(1 - kept**2)
        after += kept * before
    minimum = random.standard_normal(SIZE)
    save(files, minimum + noise, KEPT_BEST, decay=0.999)
    (audit,) = Run(files).audit(0.999)
    assert audit.verdict == "as claimed"
