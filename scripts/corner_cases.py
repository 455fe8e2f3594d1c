"""Hard cases of the fidelity benchmark: ordinary and pathological motion.

Each case makes synthetic runs, feeds them through the hook and compares the averages with the truth
(`fidelity_runs`). A **walk** has independent steps that are as large as its rate; a **descent** is
noisy gradient descent on a quadratic loss, from a distance: it drifts, then wanders about the
optimum with noise that forgets fast in some directions and slowly in others; **adam** is the same
loss under Adam's update. `RATES` are schedules of the rate. Everything is computed in float64; only
what a model would hold is float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from compare_peers import distances, true_averages
from fidelity_runs import FloatArray, Tracking, compare, quiet, stored, track
from trajectories import Trajectory

from posthoc_cli import Decay, Window
from posthoc_cli.targets import Target, as_target

TWO = (0.05, 0.28)
CLOSE = (0.05, 0.10)
ONE = (0.10,)
"""Tracked widths."""

# --- synthetic runs
# --------------------------------------------------------------------------------

Rate = Callable[[FloatArray], FloatArray]
"""Learning rate, relative to the highest, at fractions of training in [0, 1)."""

SCALE = 0.1
"""Root mean square of the first weights."""


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


def walk(rate: str, steps: int, parameters: int, seed: int) -> Trajectory:
    """Return a walk of independent steps; at a constant rate its length is a quarter of the
    norm."""
    random = np.random.default_rng(seed)
    place = SCALE * random.standard_normal(parameters)
    moves = random.standard_normal((steps, parameters))
    sizes = SCALE / 4 / steps**0.5 * _rates(rate, steps)
    moves *= sizes[:, None]
    path = place + np.cumsum(moves, axis=0)
    return _trajectory(f"walk, {rate}, {seed}", path)


def descent(rate: str, steps: int, parameters: int, seed: int) -> Trajectory:
    """Return noisy gradient descent whose slowest directions take all of training and the fastest
    some steps.

    At a constant rate its noise comes to a twentieth of the weights in every direction.
    """
    random = np.random.default_rng(seed)
    curvatures = np.geomspace(2 / steps, 0.3, parameters)
    optimum = SCALE * random.standard_normal(parameters)
    distance = random.standard_normal(parameters)
    weights = optimum + 0.5 * SCALE * distance
    widths = 0.05 * SCALE * np.sqrt(2 * curvatures)
    noise = widths * random.standard_normal((steps, parameters))
    path = []
    for error, now in zip(noise, _rates(rate, steps), strict=True):
        gradient = curvatures * (weights - optimum)
        weights = weights - now * (gradient + error)
        path.append(weights)
    return _trajectory(f"descent, {rate}, {seed}", np.array(path))


def adam(rate: str, steps: int, parameters: int, seed: int) -> Trajectory:
    """Return the path of Adam (0.9, 0.999) on a quadratic loss, at a rate that reaches the optimum
    in `steps` steps."""
    random = np.random.default_rng(seed)
    curvatures = np.geomspace(0.1, 10, parameters) / SCALE
    optimum = SCALE * random.standard_normal(parameters)
    weights = optimum + SCALE * random.standard_normal(parameters)
    first = np.zeros(parameters)
    second = np.zeros(parameters)
    rates = _rates(rate, steps) * (SCALE / steps**0.5)
    noise = random.standard_normal((steps, parameters))
    path = []
    for step in range(1, steps + 1):
        slope = curvatures * (weights - optimum)
        gradient = noise[step - 1] + slope
        first += 0.1 * (gradient - first)
        second += 1e-3 * (gradient * gradient - second)
        mean_square = second / (1 - 0.999**step)
        scale = np.sqrt(mean_square) + 1e-8
        now = rates[step - 1] / (1 - 0.9**step)
        weights = weights - now * first / scale
        path.append(weights)
    return _trajectory(f"adam, {rate}", np.array(path))


def wandering(steps: int, parameters: int, seed: int, memory: float = 0.01) -> Trajectory:
    """Return an Ornstein-Uhlenbeck path, a tenth of the norm wide, whose memory is `memory` of
    training."""
    random = np.random.default_rng(seed)
    place = SCALE * random.standard_normal(parameters)
    kept = np.exp(-1 / (memory * steps))
    width = np.sqrt(1 - kept**2)
    away = width * random.standard_normal((steps, parameters))
    away[0] = random.standard_normal(parameters)
    for before, now in pairwise(away):
        now += kept * before
    return _trajectory("wandering", place + 0.1 * SCALE * away)


def course(
    label: str,
    course_of: Rate,
    steps: int,
    parameters: int,
    seed: int,
    away: float = 1.0,
) -> Trajectory:
    """Return motion from one place in one direction, by `course_of` of the fraction of training, in
    norms.

    `away` is the size of the place itself: with 0 all of the weights follow the course.
    """
    random = np.random.default_rng(seed)
    place, direction = SCALE * random.standard_normal((2, parameters))
    fraction = np.arange(1, steps + 1) / steps
    moved = np.outer(course_of(fraction), direction)
    return _trajectory(label, away * place + moved)


def wave(periods: float, amplitude: float) -> Rate:
    """Return a course with so many periods in training."""

    def course_of(fraction: FloatArray) -> FloatArray:
        angle = 2 * np.pi * periods * fraction + 1
        return amplitude * np.sin(angle)

    return course_of


def reinitialised(run: Trajectory, after: int, seed: int = 0) -> Trajectory:
    """Return the path with the last tenth of the parameters reinitialised after step `after`; it
    continues from there.

    New weights are as large as the first ones were.
    """
    size = run.shapes[-1][0]
    weights = run.weights.astype(np.float64)
    random = np.random.default_rng(seed)
    fresh = SCALE * random.standard_normal(size)
    last = weights[after - 1, -size:]
    weights[after:, -size:] += fresh - last
    name = f"{run.name}, reinit at {after}"
    return Trajectory(name, weights.astype(np.float32), run.shapes, run.times)


def _rates(rate: str, steps: int) -> FloatArray:
    """Return the learning rate of every step."""
    return RATES[rate](np.arange(steps) / steps)


def _trajectory(name: str, path: FloatArray) -> Trajectory:
    parameters = path.shape[1]
    small = parameters // 10
    shapes = ((parameters - small,), (small,))
    return Trajectory(name, path.astype(np.float32), shapes)


# --- what is measured
# -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One average. Errors are Euclidean distances from the truth, relative to its norm; nan where
    there is none.

    Attributes:
        case: its name in `CASES`.
        run, setup, target: in words.
        error: of the default method.
        paper: of the published method.
        nearest: the smallest one among the tracked averages as they are stored at the newest time.
        predicted: what the default method, or a plan, said that the error would be; nan where it
            did not say.
    """

    case: str
    run: str
    setup: str
    target: str
    error: float
    paper: float
    nearest: float
    predicted: float


@dataclass(frozen=True)
class Study:
    """A run, how it is tracked, and the targets at its end."""

    run: Trajectory
    trackings: Sequence[Tracking]
    wanted: Sequence[Target]


def studied(study: Study, root: Path) -> Iterator[Cell]:
    """Measure all cells of a study."""
    truth = true_averages(study.run, study.wanted, study.trackings[0].update_every)
    folders = track(study.run, study.trackings, root)
    for tracking, folder in zip(study.trackings, folders, strict=True):
        error, paper, predicted = compare(folder, study.wanted, truth)
        newest = stored(folder)[-len(tracking.sigma_rels) :]
        nearest = _nearest(newest, truth)
        rows = np.array([error, paper, nearest, predicted])
        for target, errors in zip(study.wanted, rows.T.tolist(), strict=True):
            yield Cell("", study.run.name, str(tracking), target.title, *errors)


def _nearest(averages: FloatArray, truth: FloatArray) -> FloatArray:
    """Return the distance of the nearest average from each row of the truth, [targets, parameters]:
    [targets]."""
    of_each = [distances(average[None, :], truth) for average in averages]
    return np.min(of_each, axis=0)


# --- the independent set
# ---------------------------------------------------------------------------

_STEPS = 3840
_EVERY = 6
_SIZE = 400
"""Steps, steps between updates, and parameters. 20 and 64 snapshots are due every 192 and 60 steps.
"""


def _alike(made: Iterable[Trajectory]) -> Iterator[Study]:
    """Return runs that are all tracked in the same ways, with targets of every kind."""
    kept = {1: (192, 1), 2: (192, 2), 3: (192, 3), 5: (192, 5), 20: (192, None), 64: (60, None)}
    choices = [
        *product((TWO,), ("float32", "float16", "bfloat16"), kept),
        *product((ONE,), ("float16",), kept),
        *product((ONE,), ("float32",), (1, 3, 20)),
        *product((CLOSE,), ("float32",), (2, 20)),
    ]
    trackings = []
    for tracked, dtype, count in choices:
        interval, most = kept[count]
        trackings.append(Tracking(tracked, dtype, interval, _EVERY, most))
    widths = (0.02, 0.05, 0.07, 0.10, 0.15, 0.20, 0.28, 0.2886)
    others = [Window(800), Decay("linear", 0.5), Decay("1-sqrt", 0.2)]
    wanted = [*map(as_target, widths), *others]
    return (Study(run, trackings, wanted) for run in made)


def ordinary() -> Iterator[Study]:
    """Return runs that move as trainings do: walks, Adam, SGD, a restart, a freeze, a jump, motion
    about one place."""
    named = zip(("constant", "cosine", "frozen", "restarts"), range(11, 15), strict=True)
    yield from _alike(walk(rate, _STEPS, _SIZE, seed) for rate, seed in named)
    yield from _alike(
        [
            reinitialised(walk("constant", _STEPS, _SIZE, 15), 2207, 5),
            adam("constant", _STEPS, _SIZE, 16),
            adam("cosine", _STEPS, _SIZE, 17),
            descent("cuts", _STEPS, _SIZE, 18),
            descent("constant", _STEPS, _SIZE, 19),
            wandering(_STEPS, _SIZE, 20),
        ]
    )


def pathological() -> Iterator[Study]:
    """Return runs that move unlike a walk with noise: in one direction only, or not at all."""
    courses = {
        "slow wave": wave(2.5, 0.5),
        "fast wave": wave(_STEPS / 47, 0.5),
        "wave in step with 20": wave(20, 1.0),
        "small wave in step with 20": wave(20, 0.1),
        "wave in step with 64": wave(64, 0.3),
        "two updates a wave": wave(_STEPS / (2 * _EVERY), 0.3),
        "drift": lambda fraction: 0.5 * fraction,
    }
    for seed, (label, motion) in enumerate(courses.items(), 21):
        yield from _alike([course(label, motion, _STEPS, _SIZE, seed)])

    def decaying(fraction: FloatArray) -> FloatArray:
        return np.exp(-6 * fraction)

    decay = course("decay to zero", decaying, _STEPS, _SIZE, 28, away=0.0)
    yield from _alike([decay, walk("standstill", _STEPS, _SIZE, 29)])


CASES: dict[str, Callable[[], Iterable[Study]]] = {
    "ordinary": ordinary,
    "pathological": pathological,
}


def measure(name: str) -> list[Cell]:
    """Measure all cells of one of `CASES`."""
    cells = []
    with quiet(), tempfile.TemporaryDirectory() as root:
        for study in CASES[name]():
            cells += studied(study, Path(root))
    return [replace(cell, case=name) for cell in cells]
