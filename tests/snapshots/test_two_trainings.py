"""Checkpoints of two trainings in one folder are told by the distances between them."""

import numpy as np
import pytest
import torch

from posthoc_cli import Run

ELEMENTS = 500


def walk(seed):
    """Return the weights of a training after each step, [100, elements], of norm about 1 each."""
    random = np.random.default_rng(seed)
    motion = 0.02 * random.standard_normal((100, ELEMENTS))
    motion[0] += random.standard_normal(ELEMENTS)
    return motion.cumsum(axis=0)


FIRST = walk(1)
SECOND = walk(2)


EVEN = range(5, 100, 5)
UNEVEN = (1, 2, 3, 50, 51, 52, 98, 99)
NUMBERS = np.arange(100)[:, None]
FINE_TUNING = FIRST[5] + SECOND - SECOND[50]
"""Begins with the weights of step 5 of the first one."""
SAVED_TWICE = FIRST[np.arange(100) // 10 * 10]
STRAY = np.where(NUMBERS == 55, FIRST[30] + SECOND - SECOND[30], FIRST)
"""With a file of a branch that began at step 30."""


def average(folder, path, steps):
    """Save the weights at some steps of a path, and make an average of them."""
    for step in steps:
        state = {"w": torch.from_numpy(path[step]).float()}
        torch.save(state, folder / f"step{step}.pt")
    Run(folder).average(0.1)


@pytest.mark.parametrize(
    "path",
    [
        np.where(NUMBERS % 10, FIRST, SECOND),
        np.where(NUMBERS < 50, FIRST, SECOND),
        np.where(NUMBERS < 50, FIRST, FINE_TUNING),
        np.stack([walk(seed)[-1] for seed in range(100)]),
    ],
    ids=["in turns", "one after another", "another fine-tuning", "seeds"],
)
def test_files_of_two_trainings_are_warned_of(path, tmp_path, caplog):
    average(tmp_path, path, EVEN)
    assert caplog.text.count("files of one training") == 1


def test_a_file_of_an_abandoned_branch_is_named(tmp_path, caplog):
    average(tmp_path, STRAY, EVEN)
    assert "step50.pt and step60.pt are closer to each other than to step55.pt" in caplog.text


@pytest.mark.parametrize(
    ("path", "steps"),
    [
        (FIRST, EVEN),
        (FIRST - FIRST[0], UNEVEN),
        (0 * FIRST + 1, EVEN),
        (SAVED_TWICE, EVEN),
    ],
)
def test_files_of_one_training_are_not(path, steps, tmp_path, caplog):
    """Also with other intervals, from a beginning at zero, at rest, and with weights that were
    saved twice."""
    average(tmp_path, path, steps)
    assert "files of one training" not in caplog.text
