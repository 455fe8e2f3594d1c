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
from itertools import pairwise

import numpy as np
from following import Tracking, measure
from numpy.random import default_rng
from tables import FloatArray
from tasks import half_wave
from trajectories import Trajectory, cuts

from posthoc_cli import Decay, Window
from posthoc_cli.targets import Target, as_target

STEPS = 3840
EVERY = 6
SIZE = 400
"""Steps, steps between updates, and parameters."""

# --- synthetic runs
# --------------------------------------------------------------------------------

SCALE = 0.1
"""Root mean square of the first weights."""


RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": half_wave,
    "frozen": lambda fraction: float(fraction < 0.5),
    "restarts": lambda fraction: half_wave(4 * fraction % 1),
    "cuts": cuts,
    "standstill": lambda fraction: float(fraction < 0.05),
}
"""Learning rate, relative to the highest, at fractions of training in [0, 1)."""


def walk(rate: str, seed: int) -> Trajectory:
    """Return a walk of independent steps; at a constant rate its length is a quarter of the
    norm."""
    random = default_rng(seed)
    place = SCALE * random.standard_normal(SIZE)
    moves = random.standard_normal((STEPS, SIZE))
    sizes = SCALE / 4 / STEPS**0.5 * _rates(rate)
    moves *= sizes[:, None]
    path = place + np.cumsum(moves, axis=0)
    return _trajectory(path)


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
    return _trajectory(np.array(path))


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
    return _trajectory(np.array(path))


def wandering(seed: int) -> Trajectory:
    """Return an Ornstein-Uhlenbeck path, a tenth of the norm wide, whose memory is a hundredth of
    training."""
    random = default_rng(seed)
    place = SCALE * random.standard_normal(SIZE)
    away = random.standard_normal((STEPS, SIZE))
    away[0] = random.standard_normal(SIZE)
    remember(away, 0.01 * STEPS)
    return _trajectory(place + 0.1 * SCALE * away)


def remember(noise: FloatArray, memory: float) -> None:
    """Make independent noise, [steps, parameters], noise of the same variance that forgets in so
    many steps."""
    kept = np.exp(-1 / memory)
    noise[1:] *= np.sqrt(1 - kept**2)
    for before, now in pairwise(noise):
        now += kept * before


Course = Callable[[FloatArray], FloatArray]


def course(course_of: Course, seed: int, away: float = 1.0) -> Trajectory:
    """Return motion from one place in one direction, by `course_of` of the fractions of training
    after each step, in norms.

    `away` is the size of the place itself: with 0 all of the weights follow the course.
    """
    random = default_rng(seed)
    place, direction = SCALE * random.standard_normal((2, SIZE))
    fraction = np.arange(1, STEPS + 1) / STEPS
    moved = np.outer(course_of(fraction), direction)
    return _trajectory(away * place + moved)


def wave(periods: float, amplitude: float) -> Course:
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
    weights = walk("constant", seed).weights.astype(np.float64)
    fresh = SCALE * default_rng(5).standard_normal(SIZE // 10)
    changed = weights[:, -fresh.size :]
    changed[after:] += fresh - changed[after - 1]
    return _trajectory(weights)


def _rates(rate: str) -> FloatArray:
    """Return the learning rate of every step."""
    rate_of = RATES[rate]
    return np.array([rate_of(step / STEPS) for step in range(STEPS)])


def _trajectory(path: FloatArray) -> Trajectory:
    small = SIZE // 10
    shapes = [(SIZE - small,), (small,)]
    return Trajectory(path.astype(np.float32), shapes)


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
    yield course(wave(2.5, 0.5), 21)
    yield course(wave(STEPS / 47, 0.5), 22)
    # in step with 20 snapshots, and with 64
    yield course(wave(20, 1.0), 23)
    yield course(wave(20, 0.1), 24)
    yield course(wave(64, 0.3), 25)
    # two updates a wave
    yield course(wave(STEPS / (2 * EVERY), 0.3), 26)
    # a drift, and a decay to zero
    yield course(lambda fraction: 0.5 * fraction, 27)
    yield course(lambda fraction: np.exp(-6 * fraction), 28, away=0.0)
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


def measure_case(case: str) -> FloatArray:
    """Return the errors of all averages of one of `CASES`: [4, averages]."""
    trackings = []
    for tracked, dtype, counts in SETUPS:
        for count in counts:
            interval = STEPS // max(20, count)
            most = count if count < 20 else None
            trackings.append(Tracking(tracked, dtype, interval, EVERY, most))
    errors = [measure(run, trackings, TARGETS) for run in CASES[case]()]
    return np.hstack(errors)
