"""A run through the hook, and averages of its snapshots against the truth; and the recorded runs,
measured so.

The truth is that of `compare_peers`: computed from the definitions, in float64 and by no code of
the package, over exactly the updates that the tracker made. What is measured comes through the
package's public interface: the hook writes snapshots, averages are made from the directory alone,
as after training.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from compare_peers import distances, true_averages
from safetensors.torch import load_file
from trajectories import HELD_OUT, NAMES, Replay, Trajectory, record

from posthoc_cli import PostHocEMA, disk_sources, plan_synthesis, synthesize
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Beta, Target, Window, as_target

FloatArray = npt.NDArray[np.float64]


# --- tracking
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tracking:
    """How a tracker is set up."""

    sigma_rels: tuple[float, ...]
    checkpoint_dtype: str
    checkpoint_every: int
    update_every: int = 10
    max_checkpoints: int | None = None

    def __str__(self) -> str:
        kept = "" if self.max_checkpoints is None else f", keeping {self.max_checkpoints}"
        listed = ", ".join(f"{sigma_rel:g}" for sigma_rel in self.sigma_rels)
        return (
            f"{self.checkpoint_dtype}, ({listed}), every {self.update_every} and "
            f"{self.checkpoint_every}{kept}"
        )

    def tracker(self, model: torch.nn.Module, folder: Path, t_unit: str = "steps") -> PostHocEMA:
        """Make a tracker of a new run."""
        return PostHocEMA.from_model(model, folder, t_unit=t_unit, **asdict(self))


def track(run: Trajectory, trackings: Sequence[Tracking], root: Path) -> list[Path]:
    """Follow the run with trackers that update at the same steps; return the folders of their
    snapshots.

    Where the run's optimizer starts anew, the trackers do: they are closed, and others go on from
    their states.
    """
    replay = Replay(run)
    stride = trackings[0].update_every
    folders = [Path(tempfile.mkdtemp(dir=root)) for _ in trackings]
    trackers = [
        one.tracker(replay, folder, run.t_unit)
        for one, folder in zip(trackings, folders, strict=True)
    ]
    own_clock = bool(np.any(run.times != np.arange(1, run.steps + 1)))
    for index in range(run.steps):
        if (index + 1) % stride == 0:
            replay.go_to(index)
        for tracker in trackers:
            tracker.update_(replay, t=float(run.times[index]) if own_clock else None)
        for place, folder in enumerate(folders) if index + 1 == run.restart else ():
            state = trackers[place].state_dict()
            trackers[place].close()
            trackers[place] = PostHocEMA.from_path(folder, replay)
            trackers[place].load_state_dict(state)
    for tracker in trackers:
        tracker.close()
    return folders


# --- measuring
# -------------------------------------------------------------------------------------


def compare(folder: Path, wanted: Sequence[Target], truth: FloatArray) -> FloatArray:
    """Return each target's error by the default method and by the published one, and the predicted
    error.

    Errors are Euclidean distances from the truth, relative to its norm: shape [3, targets].
    """
    sources = disk_sources(folder)
    ours, predicted = made(plan_synthesis(sources, wanted, method="minvar"))
    paper, _ = made(plan_synthesis(sources, wanted, method="paper"))
    return np.array([distances(ours, truth), distances(paper, truth), predicted])


def made(plan: Plan) -> tuple[FloatArray, list[float]]:
    """Return the averages of a plan, [targets, parameters], and their predicted errors; nan where
    there is none."""
    tensors = dict(synthesize(plan))
    ordered = [tensors[str(index)] for index in range(len(tensors))]
    count = len(plan.targets)
    rows = [
        torch.cat([values[i].flatten() for values in ordered]).double().numpy()
        for i in range(count)
    ]
    predicted = [plan.predicted_error(i) for i in range(count)]
    return np.array(rows), [math.nan if error is None else error for error in predicted]


def stored(folder: Path) -> FloatArray:
    """Return all snapshots as stored: shape [snapshots, parameters]."""
    rows = []
    for file in sorted(folder.glob("0*.safetensors")):
        tensors = load_file(file)
        rows.append(
            torch.cat([tensors[str(i)].flatten().double() for i in range(len(tensors))]).numpy()
        )
    return np.array(rows)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings about inexact targets in the block: here they are intended."""
    logger = logging.getLogger("posthoc_cli")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- the recorded runs
# -----------------------------------------------------------------------------

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
    """A recorded run and the update interval of its tracker."""

    name: str
    stride: int = 1

    @property
    def label(self) -> str:
        """The name in tables and for `--only`."""
        return self.name if self.stride == 1 else f"{self.name}-every-{self.stride}"


JOBS = (*(Job(name) for name in NAMES), Job("denoiser-adam", STRIDE), Job("cnn-batch-norm", STRIDE))
"""All jobs of the benchmark; one of the two with gaps is held out."""


@dataclass(frozen=True)
class Cell:
    """One average of one directory. Errors are Euclidean distances from the truth, relative to its
    norm.

    Attributes:
        run: the job's label.
        held_out: whether no constant of a method was chosen by it.
        tracked, snapshots, dtype: how the tracker was set up.
        target: in words.
        sigma_rel: of the target, None for any other profile.
        error: of the default method.
        paper: of the published one.
        predicted: what the default method said its error would be.
        floor: of the truth itself when it is rounded once to the storage dtype.
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


def measure(job: Job, steps: int = STEPS, cache: Path | None = None) -> list[Cell]:
    """Measure all cells of one run."""
    # At 9,600 steps the classical averages are 1,000 and 2,000 steps old, the window has 2,000.
    betas = [Beta(round(1 - age / steps, 9)) for age in (9.6, 4.8)]
    wanted = [*map(as_target, SIGMA_RELS), *betas, Window(5 * steps // 24)]
    setups = list(product(TRACKED, SNAPSHOTS, DTYPES))
    return [
        Cell(
            job.label,
            job.name in HELD_OUT,
            *setup,
            target.title,
            target.sigma_rel,
            *map(float, errors),
        )
        for setup, found in zip(
            setups, measure_setups(job, setups, wanted, steps, cache), strict=True
        )
        for target, errors in zip(wanted, found.T, strict=True)
    ]


def measure_setups(
    job: Job,
    setups: Sequence[tuple[tuple[float, ...], int, str]],
    wanted: Sequence[Target],
    steps: int,
    cache: Path | None,
) -> list[FloatArray]:
    """Return error, paper, predicted and floor of each target, see `Cell`: [4, targets] for each
    setup."""
    run = record(job.name, steps, cache)
    truth = true_averages(run, wanted, job.stride)
    found = []
    with tempfile.TemporaryDirectory() as root, quiet():
        trackings = [
            Tracking(tracked, dtype, steps // count, job.stride) for tracked, count, dtype in setups
        ]
        for tracking, folder in zip(trackings, track(run, trackings, Path(root)), strict=True):
            rounded = (
                torch.from_numpy(truth)
                .to(getattr(torch, tracking.checkpoint_dtype))
                .double()
                .numpy()
            )
            found.append(np.vstack([compare(folder, wanted, truth), distances(rounded, truth)]))
    return found
