"""How the corner cases are measured: a tracker's setup, a run through the hook, every average against the truth.

The truth is that of `fidelity_runs`: every update summed in float64 from the definition, by no code of the package.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fidelity_runs as runs
import numpy as np
import torch
from compare_peers import distances
from fidelity_runs import FloatArray
from trajectories import Replay, Trajectory

from posthoc_cli import PostHocEMA
from posthoc_cli.run import Weights
from posthoc_cli.targets import Target

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
    keep_state: bool = False

    def __str__(self) -> str:
        kept = "" if self.max_checkpoints is None else f", keeping {self.max_checkpoints}"
        listed = ", ".join(f"{sigma_rel:g}" for sigma_rel in self.tracked)
        state = ", with a state" * self.keep_state
        return f"{self.dtype}, ({listed}), every {self.update_every} and {self.checkpoint_every}{kept}{state}"

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
            keep_state=self.keep_state,
        )


@dataclass(frozen=True)
class Options:
    """What a case is given.

    Attributes:
        case: its name.
        root: a folder for its directories.
        long: whether it shall make its run of a million updates.
        cache: a folder for recorded runs.
    """

    case: str
    root: Path
    long: bool
    cache: Path | None

    def folder(self) -> Path:
        """A new one."""
        return Path(tempfile.mkdtemp(dir=self.root))


# --- measuring -------------------------------------------------------------------------------------


def cells_of(
    case: str, run: str, tracking: Tracking, wanted: Sequence[Target], found: FloatArray, titles: str = ""
) -> Iterator[Cell]:
    """Of what `compare` found."""
    for target, errors in zip(wanted, found.T, strict=True):
        yield Cell(case, run, str(tracking), titles + target.title, *map(float, errors))


def feed(
    run: Trajectory, tracking: Tracking, folder: Path, after_step: Callable[[PostHocEMA, int], None] | None = None
) -> None:
    """The whole run through the hook.

    Arguments:
        after_step: called with the tracker after every step, and the number of steps so far.
    """
    replay = Replay(run)
    own_clock = bool(np.any(run.times != np.arange(1, run.steps + 1)))
    with tracking.tracker(replay, folder) as tracker:
        for index in range(run.steps):
            if (index + 1) % tracking.update_every == 0:
                replay.go_to(index)
            tracker.update_(replay, t=float(run.times[index]) if own_clock else None)
            if after_step is not None:
                after_step(tracker, index + 1)


def compare(folder: Path, wanted: Sequence[Target], truth: FloatArray, profiles: int) -> FloatArray:
    """Error, paper, nearest and predicted of each target, see `Cell`: shape [4, targets]."""
    ours, predicted = runs.synthesized(folder, wanted, "minvar")
    paper, _ = runs.synthesized(folder, wanted, "paper")
    nearest = nearest_of(runs.stored(folder)[-profiles:], truth)
    return np.array([distances(ours, truth), distances(paper, truth), nearest, predicted])


def nearest_of(averages: FloatArray, truth: FloatArray) -> FloatArray:
    """The smallest distance of any of the averages, [n, parameters], from each row of the truth: [targets]."""
    return np.min([distances(average[None, :], truth) for average in averages], axis=0)


def live_average(tracker: PostHocEMA, model: Replay, sigma_rel: float) -> FloatArray:
    """A tracked average as the tracker holds it in memory: [parameters]. The model is as before afterwards."""
    with tracker.averaged(model, sigma_rel):
        return flat(dict(model.named_parameters()))


def predicted_by(weights: Weights) -> float:
    """What they say that their error is; nan where they do not."""
    return NAN if weights.predicted_error is None else weights.predicted_error


def flat(weights: Mapping[str, torch.Tensor]) -> FloatArray:
    """All elements of a `Replay`'s weights: [parameters]."""
    return np.asarray(torch.cat([weights[str(i)].detach().flatten().double() for i in range(len(weights))]).numpy())
