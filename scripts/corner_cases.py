"""Hard cases of the fidelity benchmark: ordinary and pathological motion.

Each case makes synthetic runs, feeds them through the hook and compares the averages with the truth
(`following`). A **walk** has independent steps that are as large as its rate; a **descent** is
noisy gradient descent on a quadratic loss, from a distance: it drifts, then wanders about the
optimum with noise that forgets fast in some directions and slowly in others; **adam** is the same
loss under Adam's update. `RATES` are schedules of the rate. Everything is computed in float64; only
what a model would hold is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from following import FloatArray, Tracking, compare, distances, stored, track, true_averages
from numpy.random import default_rng
from trajectories import Trajectory, step_clock

from posthoc_cli import Decay, Window
from posthoc_cli.targets import Target, as_target

STEPS = 3840
EVERY = 6
SIZE = 400
"""Steps, steps between updates, and parameters."""

# --- synthetic runs
# --------------------------------------------------------------------------------

Rate = Callable[[FloatArray], FloatArray]
"""Learning rate, relative to the highest, at fractions of training in [0, 1)."""

SCALE = 0.1
"""Root mean square of the first weights."""


def _cosine(fraction: FloatArray) -> FloatArray:
    return (1 + np.cos(np.pi * fraction)) / 2


def _cuts(fraction: FloatArray) -> FloatArray:
    return np.select([fraction < 0.6, fraction < 0.85], [1.0, 0.1], 0.01)


RATES: dict[str, Rate] = {
    "constant": np.ones_like,
    "cosine": _cosine,
    "frozen": lambda fraction: np.where(fraction < 0.5, 1.0, 0.0),
    "restarts": lambda fraction: _cosine(4 * fraction % 1),
    "cuts": _cuts,
    "standstill": lambda fraction: np.where(fraction < 0.05, 1.0, 0.0),
}


def walk(rate: str, seed: int) -> Trajectory:
    """Return a walk of independent steps; at a constant rate its length is a quarter of the
    norm."""
    random = default_rng(seed)
    place = SCALE * random.standard_normal(SIZE)
    moves = random.standard_normal((STEPS, SIZE))
    sizes = SCALE / 4 / STEPS**0.5 * _rates(rate)
    moves *= sizes[:, None]
    path = place + np.cumsum(moves, axis=0)
    return _trajectory(f"walk, {rate}, {seed}", path)


def descent(rate: str, seed: int) -> Trajectory:
    """Return noisy gradient descent whose slowest directions take all of training and the fastest
    some steps.

    At a constant rate its noise comes to a twentieth of the weights in every direction.
    """
    random = default_rng(seed)
    curvatures = np.geomspace(2 / STEPS, 0.3, SIZE)
    optimum = SCALE * random.standard_normal(SIZE)
    distance = random.standard_normal(SIZE)
    weights = optimum + 0.5 * SCALE * distance
    widths = 0.05 * SCALE * np.sqrt(2 * curvatures)
    noise = widths * random.standard_normal((STEPS, SIZE))
    path = []
    for error, now in zip(noise, _rates(rate), strict=True):
        gradient = curvatures * (weights - optimum)
        weights = weights - now * (gradient + error)
        path.append(weights)
    return _trajectory(f"descent, {rate}, {seed}", np.array(path))


def adam(rate: str, seed: int) -> Trajectory:
    """Return the path of Adam (0.9, 0.999) on a quadratic loss, at a rate that reaches the optimum
    at the end of training."""
    random = default_rng(seed)
    curvatures = np.geomspace(0.1, 10, SIZE) / SCALE
    optimum = SCALE * random.standard_normal(SIZE)
    weights = optimum + SCALE * random.standard_normal(SIZE)
    first = np.zeros(SIZE)
    second = np.zeros(SIZE)
    rates = _rates(rate) * (SCALE / STEPS**0.5)
    noise = random.standard_normal((STEPS, SIZE))
    path = []
    for step in range(1, STEPS + 1):
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


def wandering(seed: int) -> Trajectory:
    """Return an Ornstein-Uhlenbeck path, a tenth of the norm wide, whose memory is a hundredth of
    training."""
    random = default_rng(seed)
    place = SCALE * random.standard_normal(SIZE)
    memory = 0.01 * STEPS
    kept = np.exp(-1 / memory)
    width = np.sqrt(1 - kept**2)
    away = width * random.standard_normal((STEPS, SIZE))
    away[0] = random.standard_normal(SIZE)
    for before, now in pairwise(away):
        now += kept * before
    return _trajectory("wandering", place + 0.1 * SCALE * away)


def course(label: str, course_of: Rate, seed: int, away: float = 1.0) -> Trajectory:
    """Return motion from one place in one direction, by `course_of` of the fraction of training, in
    norms.

    `away` is the size of the place itself: with 0 all of the weights follow the course.
    """
    random = default_rng(seed)
    place, direction = SCALE * random.standard_normal((2, SIZE))
    fraction = step_clock(STEPS) / STEPS
    moved = np.outer(course_of(fraction), direction)
    return _trajectory(label, away * place + moved)


def wave(periods: float, amplitude: float) -> Rate:
    """Return a course with so many periods in training."""

    def course_of(fraction: FloatArray) -> FloatArray:
        angle = 2 * np.pi * periods * fraction + 1
        return amplitude * np.sin(angle)

    return course_of


def reinitialised(seed: int) -> Trajectory:
    """Return a walk with the last tenth of the parameters reinitialised after step 2,207; it
    continues from there.

    New weights are as large as the first ones were.
    """
    after = 2207
    run = walk("constant", seed)
    weights = run.weights.astype(np.float64)
    fresh = SCALE * default_rng(5).standard_normal(SIZE // 10)
    changed = weights[:, -fresh.size :]
    changed[after:] += fresh - changed[after - 1]
    return _trajectory(f"{run.name}, reinit at {after}", weights)


def _rates(rate: str) -> FloatArray:
    """Return the learning rate of every step."""
    fractions = np.arange(STEPS) / STEPS
    return RATES[rate](fractions)


def _trajectory(name: str, path: FloatArray) -> Trajectory:
    small = SIZE // 10
    shapes = ((SIZE - small,), (small,))
    return Trajectory(name, path.astype(np.float32), shapes, step_clock(STEPS))


# --- the independent set
# ---------------------------------------------------------------------------


def ordinary() -> Iterator[Trajectory]:
    """Return runs that move as trainings do: walks, Adam, SGD, a restart, a freeze, a jump, motion
    about one place."""
    yield walk("constant", 11)
    yield walk("cosine", 12)
    yield walk("frozen", 13)
    yield walk("restarts", 14)
    yield reinitialised(15)
    yield adam("constant", 16)
    yield adam("cosine", 17)
    yield descent("cuts", 18)
    yield descent("constant", 19)
    yield wandering(20)


def pathological() -> Iterator[Trajectory]:
    """Return runs that move unlike a walk with noise: in one direction only, or not at all."""
    yield course("slow wave", wave(2.5, 0.5), 21)
    yield course("fast wave", wave(STEPS / 47, 0.5), 22)
    yield course("wave in step with 20", wave(20, 1.0), 23)
    yield course("small wave in step with 20", wave(20, 0.1), 24)
    yield course("wave in step with 64", wave(64, 0.3), 25)
    yield course("two updates a wave", wave(STEPS / (2 * EVERY), 0.3), 26)
    yield course("drift", lambda fraction: 0.5 * fraction, 27)
    yield course("decay to zero", lambda fraction: np.exp(-6 * fraction), 28, away=0.0)
    yield walk("standstill", 29)


CASES = {"ordinary": ordinary, "pathological": pathological}


# --- what is measured
# -------------------------------------------------------------------------------

TWO = (0.05, 0.28)
CLOSE = (0.05, 0.10)
ONE = (0.10,)
"""Tracked widths."""

TIMES = (1, 2, 3, 5, 20, 64)
"""Numbers of snapshot times: the last ones of 20, or 64 in all."""

SETUPS = (
    (TWO, "float32", TIMES),
    (TWO, "float16", TIMES),
    (TWO, "bfloat16", TIMES),
    (ONE, "float16", TIMES),
    (ONE, "float32", (1, 3, 20)),
    (CLOSE, "float32", (2, 20)),
)
"""Tracked widths, dtype of the snapshots, numbers of their times."""

WIDTHS = (0.02, 0.05, 0.07, 0.10, 0.15, 0.20, 0.28, 0.2886)
TARGETS: tuple[Target, ...] = (
    *map(as_target, WIDTHS),
    Window(800),
    Decay("linear", 0.5),
    Decay("1-sqrt", 0.2),
)


@dataclass(frozen=True)
class Cell:
    """One average. Errors are Euclidean distances from the truth, relative to its norm.

    Attributes:
        case: its name in `CASES`.
        run: in words.
        error: of the default method.
        published: of the published method.
        nearest: the smallest one among the tracked averages as they are stored at the newest time.
        predicted: what the default method said that the error would be; nan where it did not say.
    """

    case: str
    run: str
    error: float
    published: float
    nearest: float
    predicted: float


def measure(case: str) -> list[Cell]:
    """Measure all cells of one of `CASES`."""
    cells = []
    for run in CASES[case]():
        errors = measure_run(run, trackings())
        cells += [Cell(case, run.name, *of_target) for of_target in errors.T.tolist()]
    return cells


def trackings() -> list[Tracking]:
    """Return how each run is tracked."""
    made = []
    for tracked, dtype, counts in SETUPS:
        for count in counts:
            interval = STEPS // max(20, count)
            most = count if count < 20 else None
            made.append(Tracking(tracked, dtype, interval, EVERY, most))
    return made


def measure_run(run: Trajectory, trackings: list[Tracking]) -> FloatArray:
    """Return the errors of all averages, in the order of `Cell`: [4, averages]."""
    truth = true_averages(run, TARGETS, EVERY)
    found = []
    with track(run, trackings) as folders:
        for tracking, folder in zip(trackings, folders, strict=True):
            error, published, predicted = compare(folder, TARGETS, truth)
            newest = stored(folder)[-len(tracking.sigma_rels) :]
            of_each = [distances(average, truth) for average in newest]
            nearest = np.min(of_each, axis=0)
            found.append([error, published, nearest, predicted])
    return np.hstack(found)
