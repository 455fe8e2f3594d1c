"""Hard cases of the fidelity benchmark: runs, schedules and questions that are unusual, and all of them allowed; and an
independent set of ordinary and of pathological motion.

Each case makes small synthetic runs (`corner_walks`), or takes recorded ones, feeds them through the hook and compares
what comes with the truth (`corner_runs`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path

import corner_walks as walks
import fidelity_runs as runs
import numpy as np
import torch
from compare_peers import distances, gamma_of
from corner_runs import Cell, Options, Tracking, cells_of, compare, feed, flat, live_average, nearest_of, predicted_by
from fidelity_runs import FloatArray
from trajectories import Replay, Trajectory, record

from posthoc_cli import Between, Decay, PostHocEMA, Schedule, Window
from posthoc_cli.errors import InexactError
from posthoc_cli.planning import USEFUL_RANGE, evaluate, forecast, snapshots_to_drop
from posthoc_cli.planning.proposals import Task, relative_rounding
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import Prior
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.measurements import source_prior
from posthoc_cli.snapshots.pruning import plan_pruning
from posthoc_cli.targets import Target, as_target

USEFUL = (0.05, 0.07, 0.10, 0.15, 0.20, 0.25, 0.28)
"""sigma_rel of most cases' targets."""

TWO, CLOSE, ONE, THREE = (0.05, 0.28), (0.05, 0.10), (0.10,), (0.12, 0.2, 0.28)
"""What trackers track."""


@dataclass(frozen=True)
class Study:
    """A run, ways to track it, and what is asked for at its end."""

    run: Trajectory
    trackings: Sequence[Tracking]
    wanted: Sequence[Target]


def _studied(options: Options, study: Study) -> Iterator[Cell]:
    truths: dict[int, FloatArray] = {}
    for tracking in study.trackings:
        stride, folder = tracking.update_every, options.folder()
        if stride not in truths:
            truths[stride] = runs.true_averages(study.run, study.wanted, stride)
        feed(study.run, tracking, folder)
        found = compare(folder, study.wanted, truths[stride], len(tracking.tracked))
        yield from cells_of(options.case, study.run.name, tracking, study.wanted, found)


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
    """No step is made for a while in the middle, on a clock of its own: 1 a step, and 400 or 4,000 for the pause."""
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


# --- the independent set ---------------------------------------------------------------------------

_STEPS, _EVERY, _SIZE = 3840, 6, 400
"""Steps, steps between updates, and parameters. 20 and 64 snapshots are due every 192 and 60 steps."""


def _alike(made: Iterable[Trajectory]) -> Iterator[Study]:
    """Runs that are all tracked in the same ways; targets of every kind."""
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
    """Motion as of trainings: walks, Adam, SGD, a restart, a freeze, a jump, wandering about one place."""
    named = zip(walks.RATES, range(11, 15), strict=True)
    yield from _alike(walks.walk(rate, _STEPS, _SIZE, seed) for rate, seed in named)
    yield from _alike(
        [
            walks.reinitialised(walks.walk("constant", _STEPS, _SIZE, 15), 2207, 5),
            walks.adam("constant", _STEPS, _SIZE, 16),
            walks.adam("cosine", _STEPS, _SIZE, 17),
            walks.descent(walks.cuts, _STEPS, _SIZE, 18, "cuts"),
            walks.descent("constant", _STEPS, _SIZE, 19),
            walks.wandering(_STEPS, _SIZE, 20),
        ]
    )


def pathological() -> Iterator[Study]:
    """Motion that no walk and no noise resembles, in one direction only; and a standstill."""
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
    yield from _alike([decay, walks.walk(walks.early, _STEPS, _SIZE, 29, label="standstill")])


# --- live averages ---------------------------------------------------------------------------------


def live(options: Options) -> Iterator[Cell]:
    """Averages asked for while training, between snapshots."""
    wanted = _targets(*USEFUL)
    made = (*(walks.walk(rate, 4000) for rate in walks.RATES), walks.descent("cosine", 4000))
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
    model = Replay(run)
    tracked = np.array([live_average(tracker, model, sigma_rel) for sigma_rel in tracking.tracked])
    predicted = [predicted_by(weights) for weights in ours]
    found = np.array(
        [
            distances(np.array([flat(weights) for weights in ours]), truth),
            distances(np.array([flat(weights) for weights in paper]), truth),
            nearest_of(tracked, truth),
            predicted,
        ]
    )
    yield from cells_of(case, run.name, tracking, wanted, found, f"step {step}, ")


def until(run: Trajectory, step: int) -> Trajectory:
    """The run as it was after so many steps."""
    return Trajectory(run.name, run.weights[:step], run.shapes, run.times[:step])


# --- resumed and long runs -------------------------------------------------------------------------


def resumes(options: Options, keep_state: bool = False) -> Iterator[Cell]:
    """The tracker is closed at every snapshot, and the next one goes on from the directory."""
    wanted = _targets(*USEFUL)
    for times, every, kept in ((19, 100, None), (99, 20, 20)):
        for rate, dtype in product(("constant", "cosine"), ("float16", "bfloat16")):
            run = walks.walk(rate, (times + 1) * every)
            tracking = Tracking(TWO, dtype, every, max_checkpoints=kept, keep_state=keep_state)
            folder = options.folder()
            _feed_in_parts(run, tracking, folder)
            found = compare(folder, wanted, runs.true_averages(run, wanted, tracking.update_every), len(TWO))
            yield from cells_of(options.case, f"{run.name}, {times} resumes", tracking, wanted, found)


def _feed_in_parts(run: Trajectory, tracking: Tracking, folder: Path) -> None:
    replay = Replay(run)
    tracker = tracking.tracker(replay, folder)
    for index in range(run.steps):
        replay.go_to(index)
        tracker.update_(replay)
        if (index + 1) % tracking.checkpoint_every == 0:
            tracker.close()
            tracker = PostHocEMA.from_path(folder, replay)
    tracker.close()


def long_runs(options: Options) -> Iterator[Cell]:
    """An update at every one of many steps, at a rate that falls to 0."""
    paths = {"adam, cosine": walks.adam_blocks, "descent, cosine": walks.descent_blocks}
    # What is in memory does not depend on how snapshots are stored: one dtype will do for the slow ones.
    choices = [
        *product(paths, (10_000,), ("float32", "float16")),
        ("adam, cosine", 100_000, "float32"),
        ("descent, cosine", 100_000, "float16"),
    ]
    if options.long:
        choices.append(("adam, cosine", 1_000_000, "float16"))
    for name, steps, dtype in choices:
        tracking = Tracking(TWO, dtype, steps // 20, update_every=1, max_checkpoints=20)
        blocks = paths[name](walks.cosine, steps, _LONG_PARAMETERS, 0)
        yield from _long_cells(options, f"{name}, {steps:,} updates", blocks, steps, tracking)


_LONG_PARAMETERS = 300


def _long_cells(
    options: Options, label: str, blocks: Iterator[FloatArray], steps: int, tracking: Tracking
) -> Iterator[Cell]:
    """Of the averages in memory at the end, and of others made from the directory."""
    wanted, folder = _targets(0.05, 0.15, 0.28), options.folder()
    truth, step = np.zeros((len(wanted), _LONG_PARAMETERS)), 0
    model = Replay(Trajectory("", np.zeros((1, _LONG_PARAMETERS), np.float32), walks.shapes_of(_LONG_PARAMETERS)))
    with tracking.tracker(model, folder) as tracker:
        for block in blocks:
            seen = block.astype(np.float32)
            for row in torch.from_numpy(seen):
                model.take(row)
                tracker.update_(model)
            until = np.arange(step, step + len(seen) + 1) / steps
            counts = [np.diff(until ** (gamma_of(float(target.sigma_rel or 0)) + 1)) for target in wanted]
            truth += np.array(counts) @ seen.astype(np.float64)
            step += len(seen)
        for target, true in zip(wanted, truth, strict=True):
            if target.sigma_rel in tracking.tracked:
                error = float(distances(live_average(tracker, model, target.sigma_rel)[None], true[None])[0])
                predicted = predicted_by(tracker.state_dict(target))
                yield Cell(options.case, label, str(tracking), f"live {target.title}", error, predicted=predicted)
    found = compare(folder, wanted, truth, len(tracking.tracked))
    yield from cells_of(options.case, label, tracking, wanted, found)


# --- what plans promise ----------------------------------------------------------------------------


def plan_promise(options: Options) -> Iterator[Cell]:
    """The walk that a plan assumes, tracked as planned: what it predicts before training against what comes."""
    steps, dtype = 4000, "float32"
    for tracked, every, kept in ((TWO, 200, None), (THREE, 200, None), (TWO, 50, 10), (THREE, 50, 10)):
        schedule = Schedule(tracked, steps, every, kept, relative_rounding(dtype))
        proposal = evaluate(Task(steps, 1000, 10**9), schedule, dtype)
        places = slice(None, None, 8)
        wanted = _targets(*proposal.errors.sigma_rels[places])
        tracking = Tracking(tracked, dtype, every, proposal.update_every, kept)
        for seed in range(3):
            run, folder = walks.walk("constant", steps, seed=seed), options.folder()
            feed(run, tracking, folder)
            found = compare(folder, wanted, runs.true_averages(run, wanted, proposal.update_every), len(tracked))
            found[-1] = proposal.errors.predicted_error[places]
            yield from cells_of(options.case, run.name, tracking, wanted, found)


def pruning(options: Options) -> Iterator[Cell]:
    """As few of 40 snapshots as keep the predicted error within a bound: the worst one predicted, and the true one."""
    wanted = _targets(*np.geomspace(*USEFUL_RANGE, 12).clip(*USEFUL_RANGE))
    for place, run in enumerate(_prunable(options)):
        tracking = Tracking((TWO, CLOSE)[place // 2 % 2], "float16", run.steps // 40)
        truth, folder = runs.true_averages(run, wanted, tracking.update_every), options.folder()
        feed(run, tracking, folder)
        for bound in (0.003, 0.01, 0.03, 0.1):
            try:
                pruned = plan_pruning(read_directory(folder), max_error=bound)
            except InexactError:  # all 40 miss it
                continue
            left = options.folder()
            for snapshot in pruned.kept:
                shutil.copy(snapshot.path, left)
            error, paper, nearest, _ = compare(left, wanted, truth, len(tracking.tracked)).max(axis=1)
            title = f"bound {100 * bound:g} %, {len(pruned.kept)} left"
            yield Cell(options.case, run.name, str(tracking), title, error, paper, nearest, pruned.after.worst)


def _prunable(options: Options) -> Iterator[Trajectory]:
    """Twenty runs."""
    for rate in walks.RATES:
        for seed in range(2):
            yield walks.walk(rate, 2000, seed=seed)
            yield walks.descent(rate, 2000, seed=seed)
    for name in ("denoiser-adam", "denoiser-constant", "denoiser-wsd", "denoiser-cosine"):
        yield record(name, 2000, options.cache)


def keeping(options: Options) -> Iterator[Cell]:
    """What is kept when one snapshot after another is dropped, against the best choice of as many of them."""
    for rate in walks.RATES:
        run = walks.walk(rate, 2400)
        for tracked, snapshots, kept in ((ONE, 20, 3), (ONE, 12, 4), (TWO, 6, 3)):
            tracking, folder = Tracking(tracked, "float16", run.steps // snapshots), options.folder()
            feed(run, tracking, folder)
            there = read_directory(folder)
            profiles, prior = [snapshot.info.profile.pure for snapshot in there], source_prior(there)
            gone = set(snapshots_to_drop(profiles, prior, kept))
            left = [index for index in range(len(profiles)) if index not in gone]
            greedy, *others = (_worst(profiles, prior, chosen) for chosen in (left, *_choices(profiles, kept)))
            title = f"{kept} of {snapshots}"
            yield Cell(options.case, run.name, str(tracking), title, predicted=greedy, best=min(others))


def _worst(profiles: Sequence[PowerFunction], prior: Prior, chosen: Sequence[int]) -> float:
    """The worst error that is predicted over the useful range, of averages made of the chosen ones."""
    return forecast([profiles[index] for index in chosen], prior.of(chosen), USEFUL_RANGE, 11).worst


def _choices(profiles: Sequence[PowerFunction], kept: int) -> Iterator[list[int]]:
    """Every choice of so many of each profile that has the newest one."""
    of_profiles = []
    for gamma in {profile.gamma for profile in profiles}:
        own = [index for index, profile in enumerate(profiles) if profile.gamma == gamma]
        *others, newest = sorted(own, key=lambda index: profiles[index].t)
        of_profiles.append([(*chosen, newest) for chosen in combinations(others, kept - 1)])
    for parts in product(*of_profiles):
        yield sorted(index for part in parts for index in part)


# --- all of them -----------------------------------------------------------------------------------

STUDIES: dict[str, Callable[[], Iterator[Study]]] = {
    "few-left": few_left,
    "every-update": every_update,
    "pause": pause,
    "reinit": reinit,
    "alternating": alternating,
    "tiny": tiny,
    "ordinary": ordinary,
    "pathological": pathological,
}
OTHERS: dict[str, Callable[[Options], Iterator[Cell]]] = {
    "live": live,
    "resumes": resumes,
    "resumes-kept": partial(resumes, keep_state=True),
    "long": long_runs,
    "plan-promise": plan_promise,
    "pruning": pruning,
    "keeping": keeping,
}
CASES = (*STUDIES, *OTHERS)


def measure(name: str, long: bool = False, cache: Path | None = None) -> list[Cell]:
    """All cells of one case.

    Arguments:
        name: one of `CASES`.
        long: with a run of a million updates, where the case has one.
        cache: folder for recorded runs.
    """
    with runs.quiet(), tempfile.TemporaryDirectory() as root:
        options = Options(name, Path(root), long, cache)
        if name in OTHERS:
            return list(OTHERS[name](options))
        return [cell for study in STUDIES[name]() for cell in _studied(options, study)]
