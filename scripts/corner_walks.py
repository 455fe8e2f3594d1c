"""Synthetic training runs for the corner cases: paths of weights that cost milliseconds, each with its own difficulty.

A **walk** has independent steps that are as large as its rate; a **descent** is noisy gradient descent on a quadratic
loss, from a distance: it drifts, then wanders about the optimum with noise that forgets fast in some directions and
slowly in others; **adam** is the same loss under Adam's update. `RATES` are schedules of the rate.

The same arguments give the same weights. Everything is computed in float64; only what a model would hold is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from trajectories import Trajectory

FloatArray = npt.NDArray[np.float64]
Rate = Callable[[FloatArray], FloatArray]
"""Learning rate, relative to the highest, at fractions of training in [0, 1)."""

SCALE = 0.1
"""Root mean square of the first weights."""

STRETCH = 0.25
"""Root mean square length of a walk at a constant rate over all of training, relative to the norm of the weights."""

# --- rates -----------------------------------------------------------------------------------------


def _cosine(fraction: FloatArray) -> FloatArray:
    return (1 + np.cos(np.pi * fraction)) / 2


RATES: dict[str, Rate] = {
    "constant": np.ones_like,
    "cosine": _cosine,
    "frozen": lambda fraction: np.where(fraction < 0.5, 1.0, 0.0),
    "restarts": lambda fraction: _cosine(4 * fraction % 1),
    "cuts": lambda fraction: np.where(fraction < 0.6, 1.0, np.where(fraction < 0.85, 0.1, 0.01)),
    "standstill": lambda fraction: np.where(fraction < 0.05, 1.0, 0.0),
}


def walk(
    rate: str | Rate, steps: int, parameters: int = 1000, seed: int = 0, stretch: float = STRETCH, label: str = ""
) -> Trajectory:
    """Return a walk of independent steps; at a constant rate its length is `stretch` times the norm."""
    random = np.random.default_rng(seed)
    place, path = SCALE * random.standard_normal(parameters), random.standard_normal((steps, parameters))
    path *= (SCALE * stretch / steps**0.5 * _rates(rate, steps))[:, None]
    return _trajectory(f"walk, {label or rate}{f', {seed}' * bool(seed)}", place + np.cumsum(path, axis=0))


def descent(rate: str, steps: int, parameters: int = 1000, seed: int = 0) -> Trajectory:
    """Return noisy gradient descent whose slowest directions take all of training and the fastest some steps.

    At a constant rate its noise comes to a twentieth of the weights in every direction.
    """
    random = np.random.default_rng(seed)
    curvatures = np.geomspace(2 / steps, 0.3, parameters)
    optimum = SCALE * random.standard_normal(parameters)
    weights = optimum + 0.5 * SCALE * random.standard_normal(parameters)
    path = 0.05 * SCALE * np.sqrt(2 * curvatures) * random.standard_normal((steps, parameters))
    for row, now in zip(path, _rates(rate, steps), strict=True):
        weights = weights - now * (curvatures * (weights - optimum) + row)
        row[:] = weights
    return _trajectory(f"descent, {rate}{f', {seed}' * bool(seed)}", path)


def adam(rate: str, steps: int, parameters: int = 1000, seed: int = 0) -> Trajectory:
    """Return the path of Adam (0.9, 0.999) on a quadratic loss, at a rate that reaches the optimum in `steps` steps."""
    random = np.random.default_rng(seed)
    curvatures = np.geomspace(0.1, 10, parameters) / SCALE
    optimum = SCALE * random.standard_normal(parameters)
    weights = optimum + SCALE * random.standard_normal(parameters)
    first, second, highest = np.zeros(parameters), np.zeros(parameters), SCALE / steps**0.5
    path = random.standard_normal((steps, parameters))
    for step, (row, now) in enumerate(zip(path, _rates(rate, steps), strict=True), 1):
        gradient = row + curvatures * (weights - optimum)
        first += 0.1 * (gradient - first)
        second += 1e-3 * (gradient * gradient - second)
        scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        weights = weights - now * highest / (1 - 0.9**step) * first / scale
        row[:] = weights
    return _trajectory(f"adam, {rate}", path)


def wandering(steps: int, parameters: int, seed: int, memory: float = 0.01) -> Trajectory:
    """Return an Ornstein-Uhlenbeck path, a tenth of the norm wide, whose memory is `memory` of training."""
    random = np.random.default_rng(seed)
    place, kept = SCALE * random.standard_normal(parameters), np.exp(-1 / (memory * steps))
    moves = np.sqrt(1 - kept**2) * random.standard_normal((steps, parameters))
    moves[0] = random.standard_normal(parameters)
    for before, row in pairwise(moves):
        row += kept * before
    return _trajectory("wandering", place + 0.1 * SCALE * moves)


def course(label: str, course_of: Rate, steps: int, parameters: int, seed: int, away: float = 1.0) -> Trajectory:
    """Return motion from one place in one direction, by `course_of` of the fraction of training, in norms.

    `away` is the size of the place itself: with 0 all of the weights follow the course.
    """
    place, direction = SCALE * np.random.default_rng(seed).standard_normal((2, parameters))
    path = away * place + course_of(np.arange(1, steps + 1) / steps)[:, None] * direction
    return _trajectory(label, path)


def wave(periods: float, amplitude: float) -> Rate:
    """Return a course with so many periods in training."""
    return lambda fraction: amplitude * np.sin(2 * np.pi * periods * fraction + 1)


# --- changes to a path -----------------------------------------------------------------------------


def reinitialised(run: Trajectory, after: int, seed: int = 0) -> Trajectory:
    """Return the path with the last tenth of the parameters reinitialised after step `after`; it continues from there.

    New weights are as large as the first ones were.
    """
    size = run.shapes[-1][0]
    weights = run.weights.astype(np.float64)
    fresh = SCALE * np.random.default_rng(seed).standard_normal(size)
    weights[after:, -size:] += fresh - weights[after - 1, -size:]
    return Trajectory(f"{run.name}, reinit at {after}", weights.astype(np.float32), run.shapes, run.times)


# --- helpers ---------------------------------------------------------------------------------------


def _rates(rate: str | Rate, steps: int) -> FloatArray:
    """Return the learning rate of every step."""
    return (RATES[rate] if isinstance(rate, str) else rate)(np.arange(steps) / steps)


def _trajectory(name: str, path: FloatArray) -> Trajectory:
    parameters = path.shape[1]
    return Trajectory(name, path.astype(np.float32), ((parameters - parameters // 10,), (parameters // 10,)))
