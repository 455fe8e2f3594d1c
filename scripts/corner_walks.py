"""Synthetic training runs for the corner cases: paths of weights that cost milliseconds, each with its own difficulty.

A **walk** has independent steps that are as large as its rate; a **descent** is noisy gradient descent on a quadratic
loss, from a distance: it drifts, then wanders about the optimum with noise that forgets fast in some directions and
slowly in others; **adam** is the same loss under Adam's update. `RATES` are schedules of the rate.

The same arguments give the same weights. Everything is computed in float64; only what a model would hold is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

_BLOCK = 1000
"""Steps computed at a time."""


# --- rates -----------------------------------------------------------------------------------------


def constant(fraction: FloatArray) -> FloatArray:
    """The highest rate throughout."""
    return np.ones_like(fraction)


def cosine(fraction: FloatArray) -> FloatArray:
    """Half a cosine wave down to 0."""
    return (1 + np.cos(np.pi * fraction)) / 2


def frozen(fraction: FloatArray) -> FloatArray:
    """Nothing moves in the second half."""
    return np.where(fraction < 0.5, 1.0, 0.0)


def restarts(fraction: FloatArray) -> FloatArray:
    """Four cosine waves, one after another."""
    return cosine(4 * fraction % 1)


def cuts(fraction: FloatArray) -> FloatArray:
    """A tenth after 60 % of training, a hundredth after 85 %."""
    return np.where(fraction < 0.6, 1.0, np.where(fraction < 0.85, 0.1, 0.01))


def early(fraction: FloatArray) -> FloatArray:
    """Nothing moves after the first twentieth."""
    return np.where(fraction < 0.05, 1.0, 0.0)


def alternating(blocks: int, slow_first: bool = False) -> Rate:
    """Blocks of training whose rates are 1 and a thousandth in turn."""
    return lambda fraction: np.where((fraction * blocks).astype(int) % 2 == slow_first, 1.0, 1e-3)


RATES: dict[str, Rate] = {"constant": constant, "cosine": cosine, "frozen": frozen, "restarts": restarts}


# --- paths -----------------------------------------------------------------------------------------


def walk(
    rate: str | Rate, steps: int, parameters: int = 1000, seed: int = 0, stretch: float = STRETCH, label: str = ""
) -> Trajectory:
    """Independent steps; at a constant rate `stretch` long in all, relative to the norm."""
    name = f"walk, {label or rate}{_numbered(seed)}"
    return _trajectory(name, _walk(_rate(rate), steps, parameters, seed, stretch))


def descent(rate: str | Rate, steps: int, parameters: int = 1000, seed: int = 0, label: str = "") -> Trajectory:
    """Noisy gradient descent on a quadratic loss."""
    name = f"descent, {label or rate}{_numbered(seed)}"
    return _trajectory(name, _descent(_rate(rate), steps, parameters, seed))


def adam(rate: str, steps: int, parameters: int = 1000, seed: int = 0) -> Trajectory:
    """Adam, momenta 0.9 and 0.999, on a quadratic loss, at a rate that reaches the optimum in `steps` steps."""
    return _trajectory(f"adam, {rate}", _adam(_rate(rate), steps, parameters, seed))


def _walk(rate: Rate, steps: int, parameters: int, seed: int, stretch: float) -> Iterator[FloatArray]:
    """The weights after every step, in blocks: [steps of the block, parameters] each."""
    random = np.random.default_rng(seed)
    weights = SCALE * random.standard_normal(parameters)
    for rates in _rates(rate, steps):
        moves = random.standard_normal((rates.size, parameters)) * (SCALE * stretch / steps**0.5 * rates)[:, None]
        path = weights + np.cumsum(moves, axis=0)
        weights = path[-1]
        yield path


def _descent(rate: Rate, steps: int, parameters: int, seed: int) -> Iterator[FloatArray]:
    """The same of a descent, whose slowest directions take all of training and whose fastest ones some steps.

    At a constant rate its noise comes to a twentieth of the weights in every direction.
    """
    random = np.random.default_rng(seed)
    curvatures = np.geomspace(2 / steps, 0.3, parameters)
    noise = 0.05 * SCALE * np.sqrt(2 * curvatures)
    optimum = SCALE * random.standard_normal(parameters)
    weights = optimum + 0.5 * SCALE * random.standard_normal(parameters)
    for rates in _rates(rate, steps):
        path = noise * random.standard_normal((rates.size, parameters))
        for row, now in zip(path, rates, strict=True):
            weights = weights - now * (curvatures * (weights - optimum) + row)
            row[:] = weights
        yield path


def _adam(rate: Rate, steps: int, parameters: int, seed: int) -> Iterator[FloatArray]:
    random = np.random.default_rng(seed)
    curvatures = np.geomspace(0.1, 10, parameters) / SCALE
    optimum = SCALE * random.standard_normal(parameters)
    weights = optimum + SCALE * random.standard_normal(parameters)
    first, second, highest, step = np.zeros(parameters), np.zeros(parameters), SCALE / steps**0.5, 0
    for rates in _rates(rate, steps):
        path = random.standard_normal((rates.size, parameters))
        for row, now in zip(path, rates, strict=True):
            step += 1
            gradient = row + curvatures * (weights - optimum)
            first += 0.1 * (gradient - first)
            second += 1e-3 * (gradient * gradient - second)
            scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
            weights = weights - now * highest / (1 - 0.9**step) * first / scale
            row[:] = weights
        yield path


def wandering(steps: int, parameters: int, seed: int, memory: float = 0.01) -> Trajectory:
    """About one place, a tenth of the norm away, forgetting within `memory` of training (Ornstein-Uhlenbeck)."""
    random = np.random.default_rng(seed)
    place, kept = SCALE * random.standard_normal(parameters), np.exp(-1 / (memory * steps))
    moves = np.sqrt(1 - kept**2) * random.standard_normal((steps, parameters))
    moves[0] = random.standard_normal(parameters)
    for before, row in pairwise(moves):
        row += kept * before
    return _trajectory("wandering", iter([place + 0.1 * SCALE * moves]))


def course(label: str, course_of: Rate, steps: int, parameters: int, seed: int, away: float = 1.0) -> Trajectory:
    """From one place, in one direction, as far as `course_of` says at each fraction of training, in norms.

    `away` is the size of the place itself: with 0 all of the weights follow the course.
    """
    place, direction = SCALE * np.random.default_rng(seed).standard_normal((2, parameters))
    path = away * place + course_of(np.arange(1, steps + 1) / steps)[:, None] * direction
    return _trajectory(label, iter([path]))


def wave(periods: float, amplitude: float) -> Rate:
    """A course of so many periods in training."""
    return lambda fraction: amplitude * np.sin(2 * np.pi * periods * fraction + 1)


# --- changes to a path -----------------------------------------------------------------------------


def paused(run: Trajectory, after: int, pause: float) -> Trajectory:
    """The same steps, on a clock that runs on by `pause` between step `after` and the next."""
    times = run.times + pause * (np.arange(run.steps) >= after)
    return Trajectory(f"{run.name}, pause {pause:g}", run.weights, run.shapes, times)


def reinitialised(run: Trajectory, after: int, seed: int = 0) -> Trajectory:
    """The same path, with the last tenth of the parameters drawn anew right after step `after`; it goes on from there.

    New weights are as large as the first ones were.
    """
    size = run.shapes[-1][0]
    weights = run.weights.astype(np.float64)
    fresh = SCALE * np.random.default_rng(seed).standard_normal(size)
    weights[after:, -size:] += fresh - weights[after - 1, -size:]
    return Trajectory(f"{run.name}, reinit at {after}", weights.astype(np.float32), run.shapes, run.times)


# --- helpers ---------------------------------------------------------------------------------------


def _numbered(seed: int) -> str:
    return f", {seed}" if seed else ""


def _rate(rate: str | Rate) -> Rate:
    return RATES[rate] if isinstance(rate, str) else rate


def _rates(rate: Rate, steps: int) -> Iterator[FloatArray]:
    """Of every step, in blocks."""
    for start in range(0, steps, _BLOCK):
        yield rate(np.arange(start, min(start + _BLOCK, steps)) / steps)


def _trajectory(name: str, blocks: Iterator[FloatArray]) -> Trajectory:
    weights = np.concatenate([block.astype(np.float32) for block in blocks])
    parameters = weights.shape[1]
    return Trajectory(name, weights, ((parameters - parameters // 10,), (parameters // 10,)))
