"""Corner cases of the fidelity benchmark: runs, schedules and questions that are unusual, and all of them allowed.

Each case makes small synthetic runs (`corner_walks`), feeds them through the hook, makes averages from the directory as
after training, and compares them with the truth of `fidelity_runs`: every update summed in float64 from the
definition, by no code of the package.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import corner_walks as walks
import fidelity_runs as runs
import numpy as np
import torch
from compare_peers import distances
from corner_walks import FloatArray
from trajectories import Replay, Trajectory

from posthoc_cli import Between, PostHocEMA
from posthoc_cli.targets import Target, as_target

USEFUL = (0.05, 0.07, 0.10, 0.15, 0.20, 0.25, 0.28)
"""sigma_rel of most cases' targets."""

TWO, CLOSE, ONE = (0.05, 0.28), (0.05, 0.10), (0.10,)
"""What trackers track."""

NAN = math.nan


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
        best: predicted for the best choice of snapshots there is; `predicted` then is of those that were kept.
    """

    case: str
    run: str
    setup: str
    target: str
    error: float = NAN
    paper: float = NAN
    nearest: float = NAN
    predicted: float = NAN
    best: float = NAN


@dataclass(frozen=True)
class Tracking:
    """How a tracker is set up."""

    tracked: tuple[float, ...]
    dtype: str
    checkpoint_every: int
    update_every: int = 10
    max_checkpoints: int | None = None

    def __str__(self) -> str:
        kept = "" if self.max_checkpoints is None else f", keeping {self.max_checkpoints}"
        listed = ", ".join(f"{sigma_rel:g}" for sigma_rel in self.tracked)
        return f"{self.dtype}, ({listed}), every {self.update_every} and {self.checkpoint_every}{kept}"

    def tracker(self, model: torch.nn.Module, folder: Path) -> PostHocEMA:
        """One of a new run."""
        return PostHocEMA.from_model(
            model,
            folder,
            sigma_rels=self.tracked,
            update_every=self.update_every,
            checkpoint_every=self.checkpoint_every,
            max_checkpoints=self.max_checkpoints,
            checkpoint_dtype=self.dtype,
        )


@dataclass(frozen=True)
class Study:
    """A run, ways to track it, and what is asked for at its end."""

    run: Trajectory
    trackings: Sequence[Tracking]
    wanted: Sequence[Target]


# --- measuring -------------------------------------------------------------------------------------


def measure(name: str, long: bool = False, cache: Path | None = None) -> list[Cell]:
    """All cells of one case.

    Arguments:
        name: one of `CASES`.
        long: with a million updates, where the case has such runs.
        cache: folder for recorded runs.
    """
    with runs.quiet(), tempfile.TemporaryDirectory() as root:
        if name in STUDIES:
            return [cell for study in STUDIES[name]() for cell in _studied(name, study, Path(root))]
        return list(OTHERS[name](Options(name, Path(root), long, cache)))


@dataclass(frozen=True)
class Options:
    """What a case that is no list of studies is given."""

    case: str
    root: Path
    long: bool
    cache: Path | None

    def folder(self) -> Path:
        """A new one."""
        return Path(tempfile.mkdtemp(dir=self.root))


def _studied(case: str, study: Study, root: Path) -> Iterator[Cell]:
    truths: dict[int, FloatArray] = {}
    for tracking in study.trackings:
        stride = tracking.update_every
        if stride not in truths:
            truths[stride] = runs.true_averages(study.run, study.wanted, stride)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            feed(study.run, tracking, Path(folder))
            found = compare(Path(folder), study.wanted, truths[stride], len(tracking.tracked))
        yield from _cells(case, study.run.name, tracking, study.wanted, found)


def _cells(
    case: str, run: str, tracking: Tracking, wanted: Sequence[Target], found: FloatArray, titles: str = ""
) -> Iterator[Cell]:
    """Of what `compare` found."""
    for target, errors in zip(wanted, found.T, strict=True):
        yield Cell(case, run, str(tracking), titles + target.title, *map(float, errors))


def feed(
    run: Trajectory, tracking: Tracking, folder: Path, ahead: Callable[[PostHocEMA, int], None] | None = None
) -> None:
    """The whole run through the hook.

    Arguments:
        ahead: called with the tracker after every step, and the number of steps so far.
    """
    replay = Replay(run)
    own_clock = bool(np.any(run.times != np.arange(1, run.steps + 1)))
    with tracking.tracker(replay, folder) as tracker:
        for index in range(run.steps):
            if (index + 1) % tracking.update_every == 0:
                replay.go_to(index)
            tracker.update_(replay, t=float(run.times[index]) if own_clock else None)
            if ahead is not None:
                ahead(tracker, index + 1)


def compare(folder: Path, wanted: Sequence[Target], truth: FloatArray, profiles: int) -> FloatArray:
    """Error, paper, nearest and predicted of each target, see `Cell`: shape [4, targets]."""
    ours, predicted = runs.synthesized(folder, wanted, "minvar")
    paper, _ = runs.synthesized(folder, wanted, "paper")
    nearest = _nearest(runs.stored(folder)[-profiles:], truth)
    return np.array([distances(ours, truth), distances(paper, truth), nearest, predicted])


def _nearest(averages: FloatArray, truth: FloatArray) -> FloatArray:
    """The smallest distance of any of the averages, [n, parameters], from each row of the truth: [targets]."""
    return np.min([distances(average[None, :], truth) for average in averages], axis=0)


def _targets(*sigma_rels: float) -> list[Target]:
    return [as_target(sigma_rel) for sigma_rel in sigma_rels]


# --- cases of one kind: a run, its trackers, targets at its end ------------------------------------


def few_left() -> Iterator[Study]:
    """One to five snapshots of a profile are kept."""
    choices = [
        *((tracked, "float16", kept) for tracked in (TWO, ONE) for kept in (1, 2, 3, 5)),
        *((tracked, "float32", kept) for tracked in (TWO, ONE) for kept in (1, 2)),
        *((CLOSE, "float16", kept) for kept in (1, 3)),
    ]
    trackings = [Tracking(tracked, dtype, 200, max_checkpoints=kept) for tracked, dtype, kept in choices]
    for rate in walks.RATES:
        yield Study(walks.walk(rate, 4000), trackings, _targets(*USEFUL))


def every_update() -> Iterator[Study]:
    """A snapshot at every update, or at every second one."""
    trackings = [Tracking(TWO, dtype, every) for dtype in ("float32", "float16") for every in (10, 20)]
    made = [
        *(walks.walk(rate, 600) for rate in ("constant", "cosine", "frozen")),
        walks.descent("constant", 600),
        walks.descent("cosine", 600),
    ]
    for run in made:
        yield Study(run, [*trackings, Tracking(ONE, "float16", 10)], _targets(*USEFUL))
    yield Study(walks.walk("cosine", 2000), trackings, _targets(*USEFUL))


def pause() -> Iterator[Study]:
    """The clock is in seconds, and no step is made for as long as half of the training takes."""
    trackings = [Tracking(tracked, dtype, 200) for tracked in (TWO, ONE) for dtype in ("float32", "float16")]
    for make, rate, seconds in product((walks.walk, walks.descent), ("constant", "cosine"), (400, 4000)):
        yield Study(walks.paused(make(rate, 4000), 2000, seconds), trackings, _targets(*USEFUL))


def reinit() -> Iterator[Study]:
    """A layer is drawn anew just after a snapshot; averages over all of training, and of what came right after."""
    trackings = [Tracking(tracked, dtype, 200) for tracked in (ONE, TWO) for dtype in ("float32", "float16")]
    places = (("constant", 0.05, 2000), ("constant", 0.25, 3200), ("cosine", 0.05, 2000), ("cosine", 0.25, 3200))
    for rate, stretch, after in places:
        run = walks.reinitialised(walks.walk(rate, 4000, stretch=stretch, label=f"{rate}, {stretch:g} long"), after)
        later = [Between(after, after + steps) for steps in (100, 200, 400, 800)]
        yield Study(run, trackings, [*_targets(*USEFUL), *later])


def subnormal() -> Iterator[Study]:
    """Weights that float32 holds with few digits, or whose squares it does not hold."""
    trackings = [
        Tracking(tracked, dtype, 100) for tracked in (TWO, ONE) for dtype in ("float32", "float16", "bfloat16")
    ]
    for rate, scale in product(("constant", "cosine"), (1e-41, 1e-40, 1e-39, 1e-30)):
        yield Study(walks.scaled(walks.walk(rate, 2000), scale / walks.SCALE), trackings, _targets(*USEFUL))


def alternating() -> Iterator[Study]:
    """The rate changes a thousandfold every quarter or eighth of training; targets up to the uniform average."""
    trackings = [Tracking(tracked, dtype, 200) for tracked in (TWO, CLOSE, ONE) for dtype in ("float32", "float16")]
    for blocks, slow_first in product((4, 8), (False, True)):
        label = f"{blocks} blocks{', slow first' * slow_first}"
        run = walks.walk(walks.alternating(blocks, slow_first), 4000, label=label)
        yield Study(run, trackings, _targets(*USEFUL, 0.285, 0.2886))


def tiny() -> Iterator[Study]:
    """Five snapshots of 10 to 25 updates."""
    for every, rate, seed in product((2, 3, 4, 5), ("constant", "cosine"), range(4)):
        trackings = [
            Tracking(tracked, dtype, every, update_every=1)
            for tracked in (TWO, ONE)
            for dtype in ("float32", "float16")
        ]
        yield Study(walks.walk(rate, 5 * every, seed=seed), trackings, _targets(*USEFUL))


# --- live averages ---------------------------------------------------------------------------------


def live(options: Options) -> Iterator[Cell]:
    """Averages asked for while training, between snapshots."""
    wanted = _targets(*USEFUL)
    made = (walks.walk("constant", 4000), walks.walk("cosine", 4000), walks.descent("cosine", 4000))
    for run, dtype in product(made, ("float16", "float32")):
        tracking = Tracking(TWO, dtype, 200)
        cells: list[Cell] = []
        feed(run, tracking, options.folder(), partial(_ask_at_times, cells, options.case, run, tracking, wanted))
        yield from cells


def _ask_at_times(
    cells: list[Cell],
    case: str,
    run: Trajectory,
    tracking: Tracking,
    wanted: Sequence[Target],
    tracker: PostHocEMA,
    step: int,
) -> None:
    """Soon after a snapshot, half-way, and just before the next one."""
    if step >= 800 and step % 1000 in (10, 110, 390):
        cells.extend(_asked(case, tracker, run, tracking, step, wanted))


def _asked(
    case: str, tracker: PostHocEMA, run: Trajectory, tracking: Tracking, step: int, wanted: Sequence[Target]
) -> Iterator[Cell]:
    """What the tracker says at a step, against the truth up to it."""
    truth = runs.true_averages(until(run, step), wanted, tracking.update_every)
    ours = [tracker.state_dict(target) for target in wanted]
    paper = [tracker.state_dict(target, method="paper") for target in wanted]
    tracked = np.array([_flat(_live(tracker, run, sigma_rel)) for sigma_rel in tracking.tracked])
    predicted = [NAN if weights.predicted_error is None else weights.predicted_error for weights in ours]
    found = np.array(
        [
            distances(np.array([_flat(weights) for weights in ours]), truth),
            distances(np.array([_flat(weights) for weights in paper]), truth),
            _nearest(tracked, truth),
            predicted,
        ]
    )
    yield from _cells(case, run.name, tracking, wanted, found, f"step {step}, ")


def _live(tracker: PostHocEMA, run: Trajectory, sigma_rel: float) -> dict[str, torch.Tensor]:
    """The average that the tracker holds in memory."""
    model = Replay(run)
    with tracker.averaged(model, sigma_rel):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _flat(weights: dict[str, torch.Tensor]) -> FloatArray:
    return np.asarray(torch.cat([weights[str(i)].flatten().double() for i in range(len(weights))]).numpy())


def until(run: Trajectory, step: int) -> Trajectory:
    """The run as it was after so many steps."""
    return Trajectory(run.name, run.weights[:step], run.shapes, run.times[:step])


STUDIES: dict[str, Callable[[], Iterator[Study]]] = {
    "few-left": few_left,
    "every-update": every_update,
    "pause": pause,
    "reinit": reinit,
    "subnormal": subnormal,
    "alternating": alternating,
    "tiny": tiny,
}
OTHERS: dict[str, Callable[[Options], Iterator[Cell]]] = {"live": live}
CASES = (*STUDIES, *OTHERS)
