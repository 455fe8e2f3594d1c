"""Averages made from files of weights alone, where rates fall to 0 and where weights alternate.

The truth is summed here over every step, in float64.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import FloatArray, exact_weights

from posthoc_cli import Run

SIZE = 300
STEPS = 2000
SHORT = 0.01

LEFT = np.linspace(1, 0, STEPS + 1)
RATES = {
    "linear": LEFT,
    "cosine": (1 - np.cos(np.pi * LEFT)) / 2,
    "constant": np.ones(STEPS + 1),
    "to a tenth": 0.1 + 0.9 * LEFT,
    "a cut": np.where(LEFT > 1 / 12, 1.0, 0.1),
}


def walk(rate: FloatArray, size: float = 0.005) -> FloatArray:
    """Return the weights after steps 0 to `STEPS`."""
    random = np.random.default_rng(0)
    moves = random.standard_normal((STEPS + 1, SIZE))
    sizes = size * rate
    start = random.standard_normal(SIZE)
    return start + np.cumsum(sizes[:, None] * moves, axis=0)


def save_weights(folder: Path, path: FloatArray, steps: Iterable[int]) -> Run:
    for step in steps:
        weights = {"w": torch.from_numpy(path[step]).float()}
        torch.save({"step": step, "model": weights}, folder / f"{step}.pt")
    return Run(folder)


def evenly(count: int) -> list[int]:
    return [STEPS * number // count for number in range(1, count + 1)]


def truth(path: FloatArray, width: float) -> FloatArray:
    """Return the average over all steps: step k has the profile's mass between k - 1 and k."""
    return exact_weights(width, range(1, STEPS + 1)) @ path[1:]


def errors(run: Run, path: FloatArray, width: float) -> tuple[float, float]:
    """Return the distance of an average from the truth, and the predicted one."""
    exact = truth(path, width)
    average = run.average(width, dtype="float64")
    error = np.linalg.norm(average["w"].numpy() - exact)
    assert average.predicted_error is not None
    return float(error), float(average.predicted_error * np.linalg.norm(exact))


def error_of_nearest_tail(path: FloatArray, steps: list[int], width: float) -> float:
    """Return the error of the coefficients of sum 1 whose tail is nearest to the target's: the best
    ones for a constant walk."""
    masses = exact_weights(width, range(1, STEPS + 1))
    wanted = np.cumsum(masses[::-1])[::-1]
    is_later = np.less.outer(np.arange(STEPS), steps).astype(float)
    last = is_later[:, -1:]
    others = is_later[:, :-1] - last
    goal = wanted - last[:, 0]
    found, *_ = np.linalg.lstsq(others, goal, rcond=None)
    coefficients = np.append(found, 1 - found.sum())
    nearest = coefficients @ path[steps]
    return float(np.linalg.norm(nearest - masses @ path[1:]))


@pytest.mark.parametrize("rate", ["linear", "cosine"])
def test_a_walk_that_falls_to_the_end_falls_in_the_last_interval_too(
    rate: str,
    tmp_path: Path,
) -> None:
    """With a constant walk in it, the error of a short average was that of the nearest tail."""
    path = walk(RATES[rate])
    steps = evenly(5)
    run = save_weights(tmp_path, path, steps)
    error, predicted = errors(run, path, SHORT)
    assert error < 0.7 * error_of_nearest_tail(path, steps, SHORT)
    assert error < 2 * predicted


@pytest.mark.parametrize("rate", ["constant", "to a tenth", "a cut"])
def test_a_walk_that_does_not_fall_to_zero_costs_no_more(rate: str, tmp_path: Path) -> None:
    path = walk(RATES[rate])
    steps = evenly(12)
    run = save_weights(tmp_path, path, steps)
    for width in (SHORT, 0.1):
        error, predicted = errors(run, path, width)
        assert error < 1.06 * error_of_nearest_tail(path, steps, width)
        assert predicted / 3 < error < 2 * predicted


def square(period: int) -> FloatArray:
    return np.where(np.arange(STEPS + 1) % period < period / 2, 1.0, -1.0)


@pytest.mark.parametrize("period", [2, 4])
def test_weights_that_alternate_are_noisy_in_every_segment(period: int, tmp_path: Path) -> None:
    """Files at random steps show no noise where some happen to have the same phase."""
    random = np.random.default_rng(2)
    direction = 0.1 * random.standard_normal(SIZE)
    path = walk(RATES["constant"])
    path += np.outer(square(period), direction)
    ratios = list[float]()
    for layout in range(4):
        folder = tmp_path / str(layout)
        folder.mkdir()
        chosen = random.choice(np.arange(40, STEPS), 11, replace=False)
        steps = sorted(chosen.tolist())
        run = save_weights(folder, path, [*steps, STEPS])
        for width in (0.03, 0.1):
            error, predicted = errors(run, path, width)
            ratios.append(error / predicted)
    assert np.median(ratios) < 2.5
