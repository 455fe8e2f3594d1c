"""A run through the hook, and averages of its snapshots against the truth.

The truth is computed from the definitions, in float64 and by no code of the package, over exactly
the updates that the tracker made. What is measured comes through the package's public interface:
the hook writes snapshots, averages are made from the directory alone, as after training.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from numpy.polynomial import Polynomial
from safetensors.torch import load_file
from torch import Tensor
from trajectories import Replay, Trajectory

from posthoc_cli import Decay, PostHocEMA, Window, disk_sources, plan_synthesis, synthesize
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Target

FloatArray = npt.NDArray[np.float64]


# --- the truth
# -------------------------------------------------------------------------------------


def gamma_of(sigma_rel: float) -> float:
    """Return the largest root of (gamma+2)**2 (gamma+3) sigma_rel**2 - (gamma+1)."""
    left = Polynomial.fromroots([-2, -2, -3]) * sigma_rel**2
    cubic = left - Polynomial([1, 1])
    return float(cubic.roots().real.max())


def true_averages(run: Trajectory, wanted: Sequence[Target], stride: int = 1) -> FloatArray:
    """Return the averages over every `stride`-th step's weights: shape [targets, parameters].

    The mass that a profile has on (t_{k-1}, t_k] sits on the weights at update k, and what it has
    before the first update on that one's.
    """
    seen = np.arange(stride, run.steps + 1, stride)
    counts = np.zeros((len(wanted), run.steps))
    for row, target in zip(counts, wanted, strict=True):
        until = mass_until(target, seen, run)
        row[seen - 1] = np.diff(until, prepend=0.0)
    return averages(run, counts)


def mass_until(target: Target, seen: npt.NDArray[np.int64], run: Trajectory) -> FloatArray:
    """Return a profile's mass, at the end of the run, on the steps up to each of `seen`, by its
    definition.

    A width, a decay and a stretch of time are on the run's clock; a beta and a window are in steps,
    whatever time each took. A classical average begins as a copy of the first weights there are.
    """
    now = run.times[seen - 1]
    passed = now / run.times[-1]
    if target.beta is not None:
        later = run.steps - seen
        return np.power(target.beta, later.astype(np.float64))
    if isinstance(target, Window):
        begin = run.steps - target.steps
        inside = seen - begin
        return np.clip(inside / target.steps, 0.0, 1.0)
    if isinstance(target, Decay):
        assert isinstance(target.over, float)
        inside = passed - 1 + target.over
        fallen = np.clip(inside / target.over, 0.0, 1.0)
        if target.shape == "1-sqrt":
            fallen = np.sqrt(fallen)
        return fallen
    assert target.sigma_rel is not None
    gamma = gamma_of(target.sigma_rel)
    return np.power(passed, gamma + 1)


def averages(trajectory: Trajectory, counts: FloatArray) -> FloatArray:
    """Return weighted sums over all steps in float64: weights [averages, steps] -> [averages,
    parameters]."""
    _, parameters = trajectory.weights.shape
    total = np.zeros((len(counts), parameters))
    # by parts: all of it in float64 takes half a gigabyte
    for start in range(0, trajectory.steps, 1000):
        part = slice(start, start + 1000)
        weights = trajectory.weights[part].astype(np.float64)
        total += counts[:, part] @ weights
    return total


def distances(values: FloatArray, truth: FloatArray) -> list[float]:
    """Return the relative L2 distance of each row, [averages, parameters], from the same row of
    `truth`."""
    apart = np.linalg.norm(values - truth, axis=1)
    size = np.linalg.norm(truth, axis=1)
    relative: FloatArray = apart / size
    return relative.tolist()


def least_squares(tails: FloatArray, wanted: FloatArray) -> FloatArray:
    """Return coefficients with sum 1 for tails of stored averages, [stored, steps], that are
    nearest to wanted ones, [targets, steps]: [targets, stored]."""
    last = tails[-1]
    others = tails[:-1] - last
    left = wanted - last
    found, *_ = np.linalg.lstsq(others.T, left.T, rcond=1e-12)
    rest = 1 - found.sum(axis=0)
    return np.vstack([found, rest]).T


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

    def tracker(self, model: Replay, folder: Path, t_unit: str) -> PostHocEMA:
        """Make a tracker of a new run."""
        settings = asdict(self)
        return PostHocEMA.from_model(model, folder, t_unit=t_unit, **settings)


@contextmanager
def track(run: Trajectory, trackings: Sequence[Tracking]) -> Iterator[list[Path]]:
    """Follow the run with trackers that update at the same steps; the block has the folders of
    their snapshots."""
    with quiet(), tempfile.TemporaryDirectory() as root:
        yield follow(run, trackings, root)


def follow(run: Trajectory, trackings: Sequence[Tracking], root: str) -> list[Path]:
    """Make the snapshots.

    Where the run's optimizer starts anew, the trackers do: they are closed, and others go on from
    their states.
    """
    replay = Replay(run)
    stride = trackings[0].update_every
    trackers = {}
    for tracking in trackings:
        folder = Path(tempfile.mkdtemp(dir=root))
        trackers[folder] = tracking.tracker(replay, folder, run.t_unit)
    for step, time in enumerate(run.times.tolist(), 1):
        t = None if run.t_unit == "steps" else time
        if step % stride == 0:
            replay.go_to(step - 1)
        for tracker in trackers.values():
            tracker.update_(replay, t=t)
        if step == run.restart:
            for folder, tracker in trackers.items():
                trackers[folder] = continued(tracker, folder, replay)
    for tracker in trackers.values():
        tracker.close()
    return [*trackers]


def continued(tracker: PostHocEMA, folder: Path, replay: Replay) -> PostHocEMA:
    """Close a tracker, and return another that goes on from its state."""
    state = tracker.state_dict()
    tracker.close()
    following = PostHocEMA.from_path(folder, replay)
    following.load_state_dict(state)
    return following


# --- measuring
# -------------------------------------------------------------------------------------


def compare(folder: Path, wanted: Sequence[Target], truth: FloatArray) -> FloatArray:
    """Return each target's error by the default method and by the published one, and the predicted
    error.

    Errors are Euclidean distances from the truth, relative to its norm: shape [3, targets].
    """
    sources = disk_sources(folder)
    plan = plan_synthesis(sources, wanted, method="minvar")
    published = plan_synthesis(sources, wanted, method="paper")
    ours = distances(made(plan), truth)
    others = distances(made(published), truth)
    predicted = [plan.predicted_error(index) for index in range(len(wanted))]
    return np.array([ours, others, predicted], dtype=np.float64)


def made(plan: Plan) -> FloatArray:
    """Return the averages of a plan: [targets, parameters]."""
    tensors = dict(synthesize(plan))
    rows = []
    for index in range(len(plan.targets)):
        row = {name: values[index] for name, values in tensors.items()}
        rows.append(flat(row))
    return np.array(rows)


def stored(folder: Path) -> FloatArray:
    """Return all snapshots as stored: shape [snapshots, parameters]."""
    files = sorted(folder.glob("0*.safetensors"))
    return np.array([flat(load_file(file)) for file in files])


def flat(tensors: Mapping[str, Tensor]) -> FloatArray:
    """Return the parameters of a `Replay` in the recorded order, shape [parameters]."""
    names = sorted(tensors, key=int)
    ordered = [tensors[name].flatten() for name in names]
    return torch.cat(ordered).double().numpy()


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
