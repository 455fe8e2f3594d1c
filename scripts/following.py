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
from tables import FloatArray
from torch import Tensor
from trajectories import Replay, Trajectory

from posthoc_cli import Decay, PostHocEMA, Request, Window, disk_sources, plan_synthesis, synthesize
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Target

# --- the truth
# -------------------------------------------------------------------------------------


def gamma_of(sigma_rel: float) -> float:
    """Return the largest root of (gamma+2)**2 (gamma+3) sigma_rel**2 - (gamma+1)."""
    left = Polynomial.fromroots([-2, -2, -3]) * sigma_rel**2
    cubic = left - Polynomial([1, 1])
    return float(cubic.roots().real.max())


def true_averages(
    run: Trajectory,
    wanted: Sequence[Target],
    stride: int = 1,
) -> FloatArray:
    """Return the averages over every `stride`-th step's weights, in float64: [targets,
    parameters]."""
    counts = shares(wanted, run.steps, stride)
    _, parameters = run.weights.shape
    total = np.zeros((len(wanted), parameters))
    # by parts: all of it in float64 takes half a gigabyte
    for start in range(0, run.steps, 1000):
        part = slice(start, start + 1000)
        weights = run.weights[part].astype(np.float64)
        total += counts[:, part] @ weights
    return total


def shares(
    wanted: Sequence[Target],
    steps: int,
    stride: int = 1,
) -> FloatArray:
    """Return how much each step counts in an average of a run, of which every `stride`-th step is
    seen: [targets, steps].

    The mass that a profile has on (t_{k-1}, t_k] sits on the weights at update k, and what it has
    before the first update on that one's.
    """
    seen = np.arange(stride, steps + 1, stride)
    counts = np.zeros((len(wanted), steps))
    for row, target in zip(counts, wanted, strict=True):
        until = mass_until(target, seen, steps)
        row[seen - 1] = np.diff(until, prepend=0.0)
    return counts


def mass_until(
    target: Target,
    seen: npt.NDArray[np.int64],
    steps: int,
) -> FloatArray:
    """Return a profile's mass, at the end of the run, on the steps up to each of `seen`, by its
    definition.

    A classical average begins as a copy of the first weights there are.
    """
    passed = seen / steps
    if target.beta is not None:
        later = steps - seen
        return np.power(target.beta, later.astype(np.float64))
    if isinstance(target, Window):
        begin = steps - target.steps
        inside = seen - begin
        return np.clip(inside / target.steps, 0.0, 1.0)
    if isinstance(target, Decay):
        inside = passed - 1 + target.over
        fallen = np.clip(inside / target.over, 0.0, 1.0)
        if target.shape == "1-sqrt":
            fallen = np.sqrt(fallen)
        return fallen
    assert target.sigma_rel is not None
    gamma = gamma_of(target.sigma_rel)
    return np.power(passed, gamma + 1)


def distances(values: FloatArray, truth: FloatArray) -> list[float]:
    """Return the relative L2 distance of each row, [averages, parameters], from the same row of
    `truth`."""
    apart = np.linalg.norm(values - truth, axis=1)
    size = np.linalg.norm(truth, axis=1)
    relative: FloatArray = apart / size
    return relative.tolist()


def least_squares(tails: FloatArray, wanted: FloatArray) -> FloatArray:
    """Return the coefficients of stored averages whose tails are nearest to those of wanted ones:
    [targets, stored], each row of sum 1.

    Arguments:
        tails: the mass of each stored average after step 0, 1, ...: [stored, steps].
        wanted: how much each step counts in the wanted ones: [targets, steps].
    """
    until = np.cumsum(wanted, axis=1)
    wanted_tails = 1 - until + wanted
    last = tails[-1]
    others = tails[:-1] - last
    left = wanted_tails - last
    found, *_ = np.linalg.lstsq(others.T, left.T, rcond=1e-12)
    rest = 1 - found.sum(axis=0)
    return np.vstack([found, rest]).T


# --- tracking
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tracking:
    """Arguments of the hook."""

    sigma_rels: tuple[float, ...]
    checkpoint_dtype: str
    checkpoint_every: int
    update_every: int = 1
    max_checkpoints: int | None = None


@contextmanager
def track(
    run: Trajectory,
    trackings: Sequence[Tracking],
) -> Iterator[list[Path]]:
    """Follow the run with trackers; the block has the folders of their snapshots."""
    with quiet(), tempfile.TemporaryDirectory() as root:
        replay = Replay(run)
        folders = []
        trackers = []
        for number, tracking in enumerate(trackings):
            folder = Path(root) / str(number)
            folders.append(folder)
            trackers.append(PostHocEMA.from_model(replay, folder, **asdict(tracking)))
        for index in range(run.steps):
            replay.go_to(index)
            for tracker in trackers:
                tracker.update_(replay)
        for tracker in trackers:
            tracker.close()
        yield folders


# --- measuring
# -------------------------------------------------------------------------------------


def measure(
    run: Trajectory,
    trackings: Sequence[Tracking],
    wanted: Sequence[Target],
) -> FloatArray:
    """Track a run in several ways, at the same steps, and return the errors of all averages: [4,
    averages].

    They are distances from the truth, relative to its norm: of the default method; of the published
    one; the smallest one among the tracked averages as they are stored at the newest time; and what
    the default method said that its error would be, nan where it did not say.
    """
    truth = true_averages(run, wanted, trackings[0].update_every)
    errors = []
    with track(run, trackings) as folders:
        for tracking, folder in zip(trackings, folders, strict=True):
            sources = disk_sources(folder)
            ours = plan_synthesis(sources, Request(wanted, method="minvar"))
            published = plan_synthesis(sources, Request(wanted, method="paper"))
            count = len(tracking.sigma_rels)
            files = sorted(folder.glob("0*.safetensors"))
            newest = [distances(flat(load_file(file)), truth) for file in files[-count:]]
            of_each = [
                distances(made(ours), truth),
                distances(made(published), truth),
                np.min(newest, axis=0),
                [ours.predicted_error(index) for index in range(len(wanted))],
            ]
            errors.append(np.array(of_each, dtype=np.float64))
    return np.hstack(errors)


def made(plan: Plan) -> FloatArray:
    """Return the averages of a plan: [targets, parameters]."""
    tensors = dict(synthesize(plan))
    rows = []
    for index in range(len(plan.targets)):
        row = {name: values[index] for name, values in tensors.items()}
        rows.append(flat(row))
    return np.array(rows)


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
