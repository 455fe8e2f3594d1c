"""Hard cases of the fidelity benchmark: ordinary and pathological motion.

Each case makes synthetic runs (`corner_walks`), feeds them through the hook and compares the
averages with the truth (`fidelity_runs`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import corner_walks as walks
import numpy as np
from compare_peers import distances, true_averages
from fidelity_runs import FloatArray, Tracking, compare, quiet, stored, track
from trajectories import Trajectory

from posthoc_cli import Between, Decay, Window
from posthoc_cli.targets import Target, as_target

TWO, CLOSE, ONE = (0.05, 0.28), (0.05, 0.10), (0.10,)
"""Tracked widths."""

RATES = ("constant", "cosine", "frozen", "restarts")


@dataclass(frozen=True)
class Cell:
    """One average. Errors are Euclidean distances from the truth, relative to its norm; nan where there is none.

    Attributes:
        case: its name in `CASES`.
        run, setup, target: in words.
        error: of the default method.
        paper: of the published method.
        nearest: the smallest one among the tracked averages as they are stored at the newest time.
        predicted: what the default method, or a plan, said that the error would be; nan where it did not say.
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
    for tracking, folder in zip(study.trackings, track(study.run, study.trackings, root), strict=True):
        error, paper, predicted = compare(folder, study.wanted, truth)
        nearest = _nearest(stored(folder)[-len(tracking.sigma_rels) :], truth)
        rows = np.array([error, paper, nearest, predicted]).T.tolist()
        for target, errors in zip(study.wanted, rows, strict=True):
            yield Cell("", study.run.name, str(tracking), target.title, *errors)


def _nearest(averages: FloatArray, truth: FloatArray) -> FloatArray:
    """Return the distance of the nearest average from each row of the truth, [targets, parameters]: [targets]."""
    return np.min([distances(average[None, :], truth) for average in averages], axis=0)


def _targets(*sigma_rels: float) -> list[Target]:
    return [as_target(sigma_rel) for sigma_rel in sigma_rels]


# --- the independent set ---------------------------------------------------------------------------

_STEPS, _EVERY, _SIZE = 3840, 6, 400
"""Steps, steps between updates, and parameters. 20 and 64 snapshots are due every 192 and 60 steps."""


def _alike(made: Iterable[Trajectory]) -> Iterator[Study]:
    """Return runs that are all tracked in the same ways, with targets of every kind."""
    kept = {1: (192, 1), 2: (192, 2), 3: (192, 3), 5: (192, 5), 20: (192, None), 64: (60, None)}
    choices = [
        *product((TWO,), ("float32", "float16", "bfloat16"), kept),
        *product((ONE,), ("float16",), kept), *product((ONE,), ("float32",), (1, 3, 20)),
        *product((CLOSE,), ("float32",), (2, 20)),
    ]  # fmt: skip
    trackings = [Tracking(tracked, dtype, kept[n][0], _EVERY, kept[n][1]) for tracked, dtype, n in choices]
    others = [Window(800), Between(960, 1920), Decay("1-sqrt", 0.2)]
    wanted = [*_targets(0.02, 0.05, 0.07, 0.10, 0.15, 0.20, 0.28, 0.2886), *others]
    return (Study(run, trackings, wanted) for run in made)


def ordinary() -> Iterator[Study]:
    """Return runs that move as trainings do: walks, Adam, SGD, a restart, a freeze, a jump, motion about one place."""
    named = zip(RATES, range(11, 15), strict=True)
    yield from _alike(walks.walk(rate, _STEPS, _SIZE, seed) for rate, seed in named)
    yield from _alike(
        [
            walks.reinitialised(walks.walk("constant", _STEPS, _SIZE, 15), 2207, 5),
            walks.adam("constant", _STEPS, _SIZE, 16),
            walks.adam("cosine", _STEPS, _SIZE, 17),
            walks.descent("cuts", _STEPS, _SIZE, 18),
            walks.descent("constant", _STEPS, _SIZE, 19),
            walks.wandering(_STEPS, _SIZE, 20),
        ]
    )


def pathological() -> Iterator[Study]:
    """Return runs that move unlike a walk with noise: in one direction only, or not at all."""
    courses = {
        "slow wave": walks.wave(2.5, 0.5),
        "fast wave": walks.wave(_STEPS / 47, 0.5),
        "wave in step with 20": walks.wave(20, 1.0),
        "small wave in step with 20": walks.wave(20, 0.1),
        "wave in step with 64": walks.wave(64, 0.3),
        "two updates a wave": walks.wave(_STEPS / (2 * _EVERY), 0.3),
        "drift": lambda fraction: 0.5 * fraction,
    }
    for seed, (label, course) in enumerate(courses.items(), 21):
        yield from _alike([walks.course(label, course, _STEPS, _SIZE, seed)])
    decay = walks.course("decay to zero", lambda fraction: np.exp(-6 * fraction), _STEPS, _SIZE, 28, away=0.0)
    yield from _alike([decay, walks.walk("standstill", _STEPS, _SIZE, 29)])


CASES: dict[str, Callable[[], Iterable[Study]]] = {"ordinary": ordinary, "pathological": pathological}


def measure(name: str) -> list[Cell]:
    """Measure all cells of one of `CASES`."""
    with quiet(), tempfile.TemporaryDirectory() as root:
        cells = (cell for study in CASES[name]() for cell in studied(study, Path(root)))
        return [replace(cell, case=name) for cell in cells]
