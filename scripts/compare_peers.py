"""Compare this package and its PyPI peers on the same recorded training runs, by distance from the
true average.

    python scripts/compare_peers.py [--steps 10000]

Every library sees the same weights after every one of 10,000 steps, tracks sigma_rel 0.05 and 0.28,
stores a float32 snapshot of both every 500 steps, and makes averages of three lengths at the end,
through public interfaces; all other options have the library's defaults.

**The true average** is over *every* step, also for a library that updates at every tenth. It is
computed here from the definition, in float64, without any library. Distances are Euclidean over all
parameters, relative to the true average. "raw final weights" is no averaging; "every 10th step,
exactly" is the true average over steps 10, 20, ... only.

**What differs.** Both peers keep the share (1 - 1/t)**(gamma+1) of an average, which is right for
an interval of one step: at update_every=10 they track (gamma+1)/10 in place of gamma+1. At
update_every=1 small errors remain: both count t one step ahead, and `posthoc_ema` by default skips
the first 99 calls and counts t from there."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from following import distances, true_averages
from tables import FloatArray, markdown
from torch import Tensor
from torch.nn import Module
from trajectories import Replay, Trajectory, record

from posthoc_cli import PostHocEMA
from posthoc_cli.targets import as_target

RUNS = ("denoiser-adam", "classifier-sgd")
TARGETS = (0.05, 0.15, 0.28)
TRACKED = (0.05, 0.28)
STRIDES = (1, 10)
SNAPSHOTS = 20
"""Snapshots of each tracked profile."""


def main() -> None:
    """Record the runs, put every library through them and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="a multiple of 200 (10000)")
    steps = parser.parse_args().steps
    for name in RUNS:
        trajectory = record(name, steps)
        print(f"\n{name}: {steps:,} steps\n")
        titles = [f"{target:.2f}" for target in TARGETS]
        rows = [["", "update_every", *titles]]
        for label, stride, found in compare(trajectory):
            cells = [f"{one:.1e}" for one in found]
            rows.append([label, stride, *cells])
        print(markdown(rows), flush=True)


# --- the libraries
# ---------------------------------------------------------------------------------


class Library(NamedTuple):
    """A tracker: a callback for each step, and a function that gives the average of a sigma_rel at
    the end, in the order of the parameters."""

    update: Callable[[], object]
    average: Callable[[float], Iterable[Tensor]]


def ours(model: Module, folder: Path, stride: int, interval: int) -> Library:
    """Return this package, and its averages from the directory alone, as after training."""
    tracker = PostHocEMA.from_model(
        model,
        folder,
        sigma_rels=TRACKED,
        update_every=stride,
        checkpoint_every=interval,
        checkpoint_dtype=torch.float32,
    )

    def average(sigma_rel: float) -> Iterable[Tensor]:
        tracker.close()
        finished = PostHocEMA.from_path(folder)
        return finished.state_dict(sigma_rel=sigma_rel).values()

    return Library(partial(tracker.update_, model), average)


def ema_pytorch(
    model: Module,
    folder: Path,
    stride: int,
    interval: int,
    dtype: torch.dtype = torch.float32,
) -> Library:
    """Return `ema_pytorch.PostHocEMA`, which holds the model and returns a module."""
    from ema_pytorch import PostHocEMA as Tracker

    tracker = Tracker(
        model,
        sigma_rels=TRACKED,
        checkpoint_folder=str(folder),
        update_every=stride,
        checkpoint_every_num_steps=interval,
        checkpoint_dtype=dtype,
    )

    def average(sigma_rel: float) -> Iterable[Tensor]:
        averaged = tracker.synthesize_ema_model(sigma_rel=sigma_rel)
        return averaged.ema_model.parameters()

    return Library(tracker.update, average)


def posthoc_ema(
    model: Module,
    folder: Path,
    stride: int,
    interval: int,
    dtype: torch.dtype = torch.float32,
    **others: int,
) -> Library:
    """Return `posthoc_ema.PostHocEMA` of pytorch-posthoc-ema, which yields a state dict in a
    block."""
    from posthoc_ema import PostHocEMA as Tracker

    tracker = Tracker.from_model(
        model,
        folder,
        max_checkpoints=SNAPSHOTS,
        sigma_rels=TRACKED,
        update_every=stride,
        checkpoint_every=interval,
        checkpoint_dtype=dtype,
        **others,
    )

    def average(sigma_rel: float) -> Iterable[Tensor]:
        with tracker.state_dict(sigma_rel=sigma_rel) as state:
            return list(state.values())

    return Library(partial(tracker.update_, model), average)


@contextmanager
def without_noise() -> Iterator[None]:
    """Suppress a library's warnings and prints in the block."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


LIBRARIES = {"posthoc-cli": ours, "ema-pytorch": ema_pytorch, "pytorch-posthoc-ema": posthoc_ema}
"""By their names on PyPI."""


# --- the comparison
# --------------------------------------------------------------------------------


def compare(trajectory: Trajectory) -> Iterable[tuple[str, str, list[float]]]:
    """Measure all libraries on one trajectory: name, update_every, distance from the truth by
    target."""
    wanted = [as_target(target) for target in TARGETS]
    truth = true_averages(trajectory, wanted)
    raw = trajectory.weights[-1].astype(np.float64)
    yield "raw final weights", "", distances(raw, truth)
    for stride in STRIDES:
        if stride > 1:
            seen = true_averages(trajectory, wanted, stride)
            yield f"every {stride}th step, exactly", str(stride), distances(seen, truth)
        for package, start in LIBRARIES.items():
            averages = followed(start, trajectory, stride)
            label = f"{package} {importlib.metadata.version(package)}"
            yield label, str(stride), distances(averages, truth)


def followed(
    start: Callable[..., Library],
    trajectory: Trajectory,
    stride: int,
) -> FloatArray:
    """Return the averages that a library makes after a run: [targets, parameters]."""
    replay = Replay(trajectory)
    interval = trajectory.steps // SNAPSHOTS
    rows = []
    with tempfile.TemporaryDirectory() as folder, without_noise():
        library = start(replay, Path(folder), stride, interval)
        for index in range(trajectory.steps):
            replay.go_to(index)
            library.update()
        for target in TARGETS:
            averaged = library.average(target)
            rows.append(torch.cat([one.detach().flatten() for one in averaged]))
    return torch.stack(rows).double().numpy()


if __name__ == "__main__":
    main()
