"""Checkpoints of two trainings in one folder are told by the distances between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc_cli import Run

ELEMENTS = 500


def walk(seed: int, steps: int = 100, rate: float = 0.02) -> np.ndarray:
    """Return the weights of a training after each step, [steps, elements], of norm about 1 each."""
    random = np.random.default_rng(seed)
    motion = rate * random.standard_normal((steps, ELEMENTS))
    motion[0] += random.standard_normal(ELEMENTS)
    return motion.cumsum(axis=0)


FIRST = walk(1)
SECOND = walk(2)
LARGER = walk(3, rate=0.06)[:50]
FAST = np.vstack([FIRST[:50], FIRST[49] + LARGER - LARGER[0]])
"""As after a restart with a larger learning rate."""
EVEN = range(5, 100, 5)
UNEVEN = (1, 2, 3, 50, 51, 52, 98, 99)


NUMBERS = np.arange(100)[:, None]
IN_TURNS = np.where(NUMBERS % 10, FIRST, SECOND)
ONE_AFTER_ANOTHER = np.where(NUMBERS < 50, FIRST, SECOND)
ABANDONED = FIRST[30] + SECOND - SECOND[30]
"""Goes on from step 30 of the first training."""
ANOTHER_FINE_TUNING = np.where(NUMBERS < 50, FIRST, FIRST[5] + SECOND - SECOND[50])
"""Both began with the weights of step 5."""
RESUMED = np.where((NUMBERS == 45) | (NUMBERS == 55), ABANDONED, FIRST)
SAVED_TWICE = FIRST[np.arange(100) // 10 * 10]
STRAY = np.where(NUMBERS == 55, ABANDONED, FIRST)


def count_warnings(
    folder: Path,
    path: np.ndarray,
    steps: Sequence[int],
    caplog: pytest.LogCaptureFixture,
) -> int:
    for step in steps:
        state = {"w": torch.from_numpy(path[step]).float()}
        torch.save(state, folder / f"step{step}.pt")
    Run(folder).plan(0.1)
    return caplog.text.count("name the files of one training by a glob")


@pytest.mark.parametrize("path", [IN_TURNS, ONE_AFTER_ANOTHER, ANOTHER_FINE_TUNING, RESUMED, STRAY])
def test_files_of_two_trainings_are_warned_of(
    path: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert count_warnings(tmp_path, path, EVEN, caplog) == 1


def test_a_file_of_an_abandoned_branch_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    count_warnings(tmp_path, STRAY, EVEN, caplog)
    assert "step50.pt and step60.pt are closer to each other than to step55.pt" in caplog.text


@pytest.mark.parametrize(
    ("path", "steps"),
    [
        (FIRST, EVEN),
        (10 * FAST, UNEVEN),
        (FIRST - FIRST[0], UNEVEN),
        (0 * FIRST + 1, EVEN),
        (SAVED_TWICE, EVEN),
    ],
)
def test_files_of_one_training_are_not(
    path: np.ndarray,
    steps: Sequence[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also with other intervals, from a beginning at zero, with a larger learning rate after a
    restart, at rest, and with weights that were saved twice."""
    assert count_warnings(tmp_path, path, steps, caplog) == 0
