"""Hard cases of the fidelity benchmark: unusual runs, schedules and targets; ordinary and pathological motion.

Each case makes synthetic runs (`corner_walks`), or takes recorded ones, feeds them through the hook and compares the
averages with the truth (`fidelity_runs`).
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import corner_walks as walks
import numpy as np
import torch
from compare_peers import distances, true_averages
from fidelity_runs import FloatArray, Tracking, compare, follow, quiet, stored, track
from trajectories import Replay, Trajectory, record

from posthoc_cli import Between, Decay, PostHocEMA, Window
from posthoc_cli.errors import InexactError
from posthoc_cli.planning import USEFUL_RANGE, Schedule, evaluate, relative_rounding
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.prune import plan_pruning
from posthoc_cli.targets import Target, as_target

USEFUL = (0.05, 0.07, 0.10, 0.15, 0.20, 0.25, 0.28)
"""sigma_rel of most cases' targets."""

TWO, CLOSE, ONE, THREE = (0.05, 0.28), (0.05, 0.10), (0.10,), (0.12, 0.2, 0.28)
"""Tracked widths."""

BOTH = ("float32", "float16")
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
        yield from _cells(study.run, tracking, study.wanted, _compare(folder, study.wanted, truth, tracking))


def _compare(folder: Path, wanted: Sequence[Target], truth: FloatArray, tracking: Tracking) -> FloatArray:
    """Return error, paper, nearest and predicted of each target, see `Cell`: shape [4, targets]."""
    error, paper, predicted = compare(folder, wanted, truth)
    return np.array([error, paper, _nearest(stored(folder)[-len(tracking.sigma_rels) :], truth), predicted])


def _nearest(averages: FloatArray, truth: FloatArray) -> FloatArray:
    """Return the distance of the nearest average from each row of the truth, [targets, parameters]: [targets]."""
    return np.min([distances(average[None, :], truth) for average in averages], axis=0)


def _cells(
    run: Trajectory, tracking: Tracking, wanted: Sequence[Target], found: FloatArray, titles: str = ""
) -> Iterator[Cell]:
    for target, errors in zip(wanted, found.T, strict=True):
        yield Cell("", run.name, str(tracking), titles + target.title, *map(float, errors))


def _targets(*sigma_rels: float) -> list[Target]:
    return [as_target(sigma_rel) for sigma_rel in sigma_rels]


# --- cases of one kind: a run, its trackers, targets at its end ------------------------------------


def few_left() -> Iterator[Study]:
    """Keep one to five snapshots of a profile."""
    choices = [
        *((tracked, "float16", kept) for tracked in (TWO, ONE) for kept in (1, 2, 3, 5)),
        *((tracked, "float32", kept) for tracked in (TWO, ONE) for kept in (1, 2)),
        *((CLOSE, "float16", kept) for kept in (1, 3)),
    ]
    trackings = [Tracking(tracked, dtype, 200, max_checkpoints=kept) for tracked, dtype, kept in choices]
    for rate in RATES:
        yield Study(walks.walk(rate, 4000), trackings, _targets(*USEFUL))


def every_update() -> Iterator[Study]:
    """Write a snapshot at every update, or at every second one."""
    trackings = [Tracking(TWO, dtype, every) for dtype in BOTH for every in (10, 20)]
    made = [
        *(walks.walk(rate, 600) for rate in ("constant", "cosine", "frozen")),
        walks.descent("constant", 600),
        walks.descent("cosine", 600),
    ]
    for run in made:
        yield Study(run, [*trackings, Tracking(ONE, "float16", 10)], _targets(*USEFUL))
    yield Study(walks.walk("cosine", 2000), trackings, _targets(*USEFUL))


def pause() -> Iterator[Study]:
    """Make no step for a while in the middle, on a clock of 1 a step and 400 or 4,000 for the pause."""
    trackings = [Tracking(tracked, dtype, 200) for tracked in (TWO, ONE) for dtype in BOTH]
    for make, rate, seconds in product((walks.walk, walks.descent), ("constant", "cosine"), (400, 4000)):
        yield Study(walks.paused(make(rate, 4000), 2000, seconds), trackings, _targets(*USEFUL))


def reinit() -> Iterator[Study]:
    """Reinitialise a layer after a snapshot; ask for averages over all of training, and over the time just after."""
    trackings = [Tracking(tracked, dtype, 200) for tracked in (ONE, TWO) for dtype in BOTH]
    places = (("constant", 0.05, 2000), ("constant", 0.25, 3200), ("cosine", 0.05, 2000), ("cosine", 0.25, 3200))
    for rate, stretch, after in places:
        run = walks.reinitialised(walks.walk(rate, 4000, stretch=stretch, label=f"{rate}, {stretch:g} long"), after)
        later = [Between(after, after + steps) for steps in (100, 200, 400, 800)]
        yield Study(run, trackings, [*_targets(*USEFUL), *later])


def alternating() -> Iterator[Study]:
    """Change the rate a thousandfold every quarter or eighth of training; targets up to the uniform average."""
    trackings = [Tracking(tracked, dtype, 200) for tracked in (TWO, CLOSE, ONE) for dtype in BOTH]
    for blocks, slow_first in product((4, 8), (False, True)):
        label = f"{blocks} blocks{', slow first' * slow_first}"
        run = walks.walk(walks.alternating(blocks, slow_first), 4000, label=label)
        yield Study(run, trackings, _targets(*USEFUL, 0.285, 0.2886))


def tiny() -> Iterator[Study]:
    """Write five snapshots in 10 to 25 updates."""
    for every, rate, seed in product((2, 3, 4, 5), ("constant", "cosine"), range(4)):
        trackings = [Tracking(tracked, dtype, every, update_every=1) for tracked in (TWO, ONE) for dtype in BOTH]
        yield Study(walks.walk(rate, 5 * every, seed=seed), trackings, _targets(*USEFUL))


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


# --- live averages ---------------------------------------------------------------------------------


def live(root: Path) -> Iterator[Cell]:
    """Ask for averages while training: soon after a snapshot, half-way to the next, and just before it."""
    wanted = _targets(*USEFUL)
    made = (*(walks.walk(rate, 4000) for rate in RATES), walks.descent("cosine", 4000))
    for run, dtype in product(made, ("float16", "float32")):
        tracking, replay = Tracking(TWO, dtype, 200), Replay(run)
        tracker = tracking.tracker(replay, Path(tempfile.mkdtemp(dir=root)))
        for step in follow(run, replay, [tracker], tracking.update_every):
            if step >= 800 and step % 1000 in (10, 110, 390):
                so_far = Trajectory(run.name, run.weights[:step], run.shapes, run.times[:step])
                found = _asked(tracker, replay, tracking, wanted, true_averages(so_far, wanted, tracking.update_every))
                yield from _cells(run, tracking, wanted, found, f"step {step}, ")


def _asked(
    tracker: PostHocEMA, model: Replay, tracking: Tracking, wanted: Sequence[Target], truth: FloatArray
) -> FloatArray:
    """Return the same as `_compare` of the tracker's current answer, relative to the averages in memory."""
    ours = [tracker.state_dict(target) for target in wanted]
    paper = [tracker.state_dict(target, method="paper") for target in wanted]
    tracked = []
    for sigma_rel in tracking.sigma_rels:
        with tracker.model(model, sigma_rel):
            tracked.append(_flat(dict(model.named_parameters())))
    error, published = (distances(np.array([_flat(weights) for weights in made]), truth) for made in (ours, paper))
    stated = (weights.predicted_error for weights in ours)
    predicted = [math.nan if error is None else error for error in stated]
    return np.array([error, published, _nearest(np.array(tracked), truth), predicted])


def _flat(weights: Mapping[str, torch.Tensor]) -> FloatArray:
    """Return all elements of a `Replay`'s weights: [parameters]."""
    return np.asarray(torch.cat([weights[str(i)].detach().flatten().double() for i in range(len(weights))]).numpy())


# --- resumed runs, plans and pruning ---------------------------------------------------------------


def resumes(root: Path, exactly: bool = False) -> Iterator[Cell]:
    """Close the tracker at every snapshot, and continue from the directory with a new one."""
    wanted = _targets(*USEFUL)
    for times, every, kept in ((19, 100, None), (99, 20, 20)):
        for rate, dtype in product(("constant", "cosine"), ("float16", "bfloat16")):
            run = walks.walk(rate, (times + 1) * every)
            tracking = Tracking(TWO, dtype, every, max_checkpoints=kept)
            replay, folder = Replay(run), Path(tempfile.mkdtemp(dir=root))
            trackers = [tracking.tracker(replay, folder)]
            for step in follow(run, replay, trackers, tracking.update_every):
                if step % every == 0:
                    state = trackers[0].state_dict()
                    trackers[0].close()
                    trackers[0] = PostHocEMA.from_path(folder, replay)
                    if exactly:
                        trackers[0].load_state_dict(state)
            found = _compare(folder, wanted, true_averages(run, wanted, tracking.update_every), tracking)
            yield from _cells(replace(run, name=f"{run.name}, {times} resumes"), tracking, wanted, found)


def plan_promise(root: Path) -> Iterator[Cell]:
    """Track the walk that `ema plan` assumes, as planned: compare the predicted error with the true one."""
    steps, dtype, places = 4000, "float32", slice(None, None, 8)
    for tracked, every, kept in ((TWO, 200, None), (THREE, 200, None), (TWO, 50, 10), (THREE, 50, 10)):
        schedule = Schedule(tracked, steps, every, kept, relative_rounding(dtype))
        proposal = evaluate("", schedule, dtype, 1000)
        tracking = Tracking(tracked, dtype, every, proposal.update_every, kept)
        promised = proposal.errors.predicted_error[places]
        for seed in range(3):
            study = Study(
                walks.walk("constant", steps, seed=seed), [tracking], _targets(*proposal.errors.sigma_rels[places])
            )
            cells = zip(studied(study, root), promised, strict=True)
            yield from (replace(cell, predicted=float(predicted)) for cell, predicted in cells)


def pruning(root: Path, cache: Path | None) -> Iterator[Cell]:
    """Keep as few of 40 snapshots as an error bound allows: compare the worst predicted error with the true one."""
    wanted = _targets(*np.geomspace(*USEFUL_RANGE, 12).clip(*USEFUL_RANGE))
    for place, run in enumerate(_prunable(cache)):
        tracking = Tracking((TWO, CLOSE)[place // 2 % 2], "float16", run.steps // 40)
        truth, (folder,) = true_averages(run, wanted, tracking.update_every), track(run, [tracking], root)
        for bound in (0.003, 0.01, 0.03, 0.1):
            try:
                pruned = plan_pruning(read_directory(folder), max_error=bound)
            except InexactError:  # all 40 miss it
                continue
            left = Path(tempfile.mkdtemp(dir=root))
            for snapshot in pruned.kept:
                shutil.copy(snapshot.path, left)
            error, paper, nearest, _ = _compare(left, wanted, truth, tracking).max(axis=1).tolist()
            title = f"bound {100 * bound:g} %, {len(pruned.kept)} left"
            yield Cell("", run.name, str(tracking), title, error, paper, nearest, pruned.after.worst)


def _prunable(cache: Path | None) -> Iterator[Trajectory]:
    """Return twenty runs."""
    for rate in RATES:
        for seed in range(2):
            yield walks.walk(rate, 2000, seed=seed)
            yield walks.descent(rate, 2000, seed=seed)
    for name in ("denoiser-adam", "denoiser-constant", "denoiser-wsd", "denoiser-cosine"):
        yield record(name, 2000, cache)


# --- all of them -----------------------------------------------------------------------------------

STUDIES: dict[str, Callable[[], Iterable[Study]]] = {
    "few-left": few_left,
    "every-update": every_update,
    "pause": pause,
    "reinit": reinit,
    "alternating": alternating,
    "tiny": tiny,
    "ordinary": ordinary,
    "pathological": pathological,
}
CASES = (*STUDIES, "live", "resumes", "resumes-exactly", "plan-promise", "pruning")


def measure(name: str, cache: Path | None = None) -> list[Cell]:
    """Measure all cells of one of `CASES`; keep recorded runs in the folder `cache`."""
    others: dict[str, Callable[[Path], Iterator[Cell]]] = {
        "live": live,
        "resumes": resumes,
        "resumes-exactly": partial(resumes, exactly=True),
        "plan-promise": plan_promise,
        "pruning": partial(pruning, cache=cache),
    }
    with quiet(), tempfile.TemporaryDirectory() as root:
        if name in others:
            cells = others[name](Path(root))
        else:
            cells = (cell for study in STUDIES[name]() for cell in studied(study, Path(root)))
        return [replace(cell, case=name) for cell in cells]
