"""One recorded run, tracked in every way of the fidelity benchmark, and every average measured against the truth.

The truth is computed here from the definitions, in float64 and by no code of the package, over exactly the updates
that the tracker made: the mass that a profile has on (t_{k-1}, t_k] sits on the weights at update k, and what it has
before the first update on that one's. What is measured comes through the package's public interface: the hook writes
snapshots, averages are made from the directory alone, as after training.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from compare_peers import averages, distances, gamma_of
from safetensors.torch import load_file
from trajectories import HELD_OUT, NAMES, RECIPES, Replay, Trajectory, record

from posthoc_cli import PostHocEMA, disk_sources, plan_synthesis, synthesize
from posthoc_cli.targets import Beta, Between, Decay, Target, Window, as_target

FloatArray = npt.NDArray[np.float64]

SIGMA_RELS = (0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25, 0.28)
TRACKED = ((0.05, 0.10), (0.05, 0.28), (0.10,))
SNAPSHOTS = (8, 20, 64)
"""Snapshot times, evenly spaced in steps."""

DTYPES = ("float32", "float16", "bfloat16")
STRIDE = 10
"""update_every of the runs that are tracked with gaps."""

STEPS = 9_600


@dataclass(frozen=True)
class Job:
    """A recorded run and how often its tracker looks."""

    name: str
    stride: int = 1

    @property
    def label(self) -> str:
        """For tables and for `--runs`."""
        return self.name if self.stride == 1 else f"{self.name}-every-{self.stride}"

    @property
    def held_out(self) -> bool:
        """Whether no constant of a method was chosen by this run."""
        return self.name in HELD_OUT


JOBS = (*(Job(name) for name in NAMES), Job("denoiser-adam", STRIDE), Job("cnn-batch-norm", STRIDE))
"""All of the benchmark; of the two with gaps one is held out."""


@dataclass(frozen=True)
class Setup:
    """How a tracker is set up: its profiles, snapshot times, and what it stores them as."""

    tracked: tuple[float, ...]
    snapshots: int
    dtype: str


@dataclass(frozen=True)
class Cell:
    """One average of one directory. Errors are Euclidean distances from the truth, relative to its norm.

    Attributes:
        run: the job's label.
        held_out: whether no constant was chosen by it.
        tracked, snapshots, dtype: of the `Setup`.
        target: in words.
        sigma_rel: of the target, None for any other profile.
        error: of the default method.
        paper: of the published one.
        predicted: what the default method said its error would be.
        floor: of the truth itself when it is rounded once to the storage dtype.
        oracle: of the best combination with sum 1 of these snapshots, found by knowing the truth: no method beats it.
    """

    run: str
    held_out: bool
    tracked: tuple[float, ...]
    snapshots: int
    dtype: str
    target: str
    sigma_rel: float | None
    error: float
    paper: float
    predicted: float
    floor: float
    oracle: float


def measure(job: Job, steps: int = STEPS, cache: Path | None = None) -> list[Cell]:
    """All cells of one run."""
    run = record(job.name, steps, cache)
    wanted = targets(steps)
    truth = true_averages(run, wanted, job.stride)
    setups = [Setup(*choice) for choice in product(TRACKED, SNAPSHOTS, DTYPES)]
    with tempfile.TemporaryDirectory() as root, quiet():
        folders = track(run, job.stride, setups, Path(root))
        return [
            Cell(
                job.label, job.held_out, setup.tracked, setup.snapshots, setup.dtype,
                target.title, target.sigma_rel, *map(float, errors),
            )
            for setup, folder in zip(setups, folders, strict=True)
            for target, errors in zip(wanted, compare(folder, wanted, truth, setup.dtype).T, strict=True)
        ]  # fmt: skip


def curves(job: Job, setup: Setup, sigma_rels: FloatArray, steps: int, cache: Path | None) -> FloatArray:
    """Error, paper, predicted, floor and oracle, [5, sigma_rels], of one run and setup."""
    run = record(job.name, steps, cache)
    wanted = [as_target(sigma_rel) for sigma_rel in sigma_rels]
    with tempfile.TemporaryDirectory() as root, quiet():
        (folder,) = track(run, job.stride, [setup], Path(root))
        return compare(folder, wanted, true_averages(run, wanted, job.stride), setup.dtype)


def targets(steps: int) -> list[Target]:
    """What is asked for. At 9,600 steps the classical averages are 1,000 and 2,000 steps old, the window has 2,000."""
    betas = [Beta(round(1 - age / steps, 9)) for age in (9.6, 4.8)]
    return [*map(as_target, SIGMA_RELS), *betas, Window(5 * steps // 24)]


# --- the truth -------------------------------------------------------------------------------------


def true_averages(run: Trajectory, wanted: Sequence[Target], stride: int) -> FloatArray:
    """The averages over every `stride`-th step's weights: shape [targets, parameters]."""
    seen = np.arange(stride, run.steps + 1, stride)
    counts = np.zeros((len(wanted), run.steps))
    for row, target in zip(counts, wanted, strict=True):
        row[seen - 1] = np.diff(mass_until(target, seen, run), prepend=0.0)
    return averages(run, counts)


def mass_until(target: Target, seen: npt.NDArray[np.int64], run: Trajectory) -> FloatArray:
    """How much a profile at the end of the run has on the steps up to each of `seen`, from its definition.

    A width and a stretch of time are on the run's clock; a decay and a window are in steps, whatever time each took.
    A classical average begins as a copy of the first weights there are.
    """
    if isinstance(target, Beta):
        return np.asarray(target.beta ** (run.steps - seen).astype(np.float64))
    if isinstance(target, Window):
        return np.clip((seen - (run.steps - target.steps)) / target.steps, 0.0, 1.0)
    if isinstance(target, Between):
        return np.clip((run.times[seen - 1] - target.start) / (target.end - target.start), 0.0, 1.0)
    if isinstance(target, Decay) and target.shape == "1-sqrt" and not isinstance(target.over, tuple):
        x = (run.times[seen - 1] / run.times[-1] - 1 + target.over) / target.over
        return np.sqrt(np.clip(x, 0.0, 1.0))
    if target.sigma_rel is None:
        raise ValueError(f"{target.title}: no definition of it here")
    return np.asarray((run.times[seen - 1] / run.times[-1]) ** (gamma_of(target.sigma_rel) + 1))


# --- tracking --------------------------------------------------------------------------------------


def track(run: Trajectory, stride: int, setups: Sequence[Setup], root: Path) -> list[Path]:
    """The run with a tracker for each setup looking on; the folders of their snapshots.

    Where the run's optimizer starts anew, its trackers do: they are closed, and others go on from their states.
    """
    recipe = RECIPES[run.name]
    replay = Replay(run)
    folders = [root / str(index) for index in range(len(setups))]
    trackers = [_tracker(run, replay, stride, *both) for both in zip(setups, folders, strict=True)]
    restart = None if recipe.restart is None else math.ceil(recipe.restart * run.steps)
    for index in range(run.steps):
        if index == restart:
            states = [_closed(tracker) for tracker in trackers]
            trackers = [_tracker(run, replay, stride, *both) for both in zip(setups, folders, strict=True)]
            for tracker, state in zip(trackers, states, strict=True):
                tracker.load_state_dict(state)
        if (index + 1) % stride == 0:
            replay.go_to(index)
        for tracker in trackers:
            tracker.update_(replay, t=None if recipe.t_unit == "steps" else float(run.times[index]))
    for tracker in trackers:
        tracker.close()
    return folders


def _tracker(run: Trajectory, replay: Replay, stride: int, setup: Setup, folder: Path) -> PostHocEMA:
    return PostHocEMA.from_model(
        replay,
        folder,
        sigma_rels=setup.tracked,
        update_every=stride,
        checkpoint_every=run.steps // setup.snapshots,
        max_checkpoints=None,
        checkpoint_dtype=setup.dtype,
        t_unit=RECIPES[run.name].t_unit,
    )


def _closed(tracker: PostHocEMA) -> dict[str, Any]:
    state = tracker.state_dict()
    tracker.close()
    return state


# --- measuring -------------------------------------------------------------------------------------


def compare(folder: Path, wanted: Sequence[Target], truth: FloatArray, dtype: str) -> FloatArray:
    """Error, paper, predicted, floor and oracle of each target, see `Cell`: shape [5, targets]."""
    ours, predicted = synthesized(folder, wanted, "minvar")
    paper, _ = synthesized(folder, wanted, "paper")
    rounded = torch.from_numpy(truth).to(getattr(torch, dtype)).double().numpy()
    best = _oracle(stored(folder), truth)
    floor, oracle = distances(rounded, truth), distances(best, truth)
    return np.array([distances(ours, truth), distances(paper, truth), predicted, floor, oracle])


def synthesized(folder: Path, wanted: Sequence[Target], method: str) -> tuple[FloatArray, list[float]]:
    """The averages, [targets, parameters], and their predicted errors."""
    plan = plan_synthesis(disk_sources(folder), wanted, method=method)
    tensors = dict(synthesize(plan))
    ordered = [tensors[str(index)] for index in range(len(tensors))]
    rows = [torch.cat([values[i].flatten() for values in ordered]).double().numpy() for i in range(len(wanted))]
    predicted = [plan.predicted_error(i) for i in range(len(wanted))]
    return np.array(rows), [math.nan if error is None else error for error in predicted]


def stored(folder: Path) -> FloatArray:
    """All snapshots as they are on disk: shape [snapshots, parameters]."""
    rows = []
    for file in sorted(folder.glob("0*.safetensors")):
        tensors = load_file(file)
        rows.append(torch.cat([tensors[str(i)].flatten().double() for i in range(len(tensors))]).numpy())
    return np.array(rows)


def _oracle(stored: FloatArray, truth: FloatArray) -> FloatArray:
    """The nearest combinations with sum 1 of the stored rows: shape [targets, parameters]."""
    last = stored[-1]
    others = (stored[:-1] - last).T
    coefficients, *_ = np.linalg.lstsq(others, (truth - last).T, rcond=None)
    return np.asarray(last + (others @ coefficients).T)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of poor targets: they are the point here."""
    logger = logging.getLogger("posthoc_cli")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
