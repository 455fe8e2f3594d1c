"""Compare this package and its PyPI peers on the same recorded training runs, by distance from the
true average.

    python scripts/compare_peers.py [--steps 10000] [--cache FOLDER]

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from trajectories import PEER_RUNS, Replay, Trajectory, record

from posthoc_cli import PostHocEMA
from posthoc_cli.targets import Decay, Target, Window, as_target

FloatArray = npt.NDArray[np.float64]

TARGETS = (0.05, 0.15, 0.28)
TRACKED = (0.05, 0.28)
STRIDES = (1, 10)
SNAPSHOTS = 20
"""Snapshots of each tracked profile."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Record the runs, put every library through them and print a table for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=10_000, help="training steps, a multiple of 200 (10000)"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder to keep recorded runs in, and to take them from"
    )
    asked = parser.parse_args(arguments)
    for name in PEER_RUNS:
        trajectory = record(name, asked.steps, asked.cache)
        print(f"\n{name}: {asked.steps:,} steps, {trajectory.weights.shape[1]:,} parameters\n")
        rows = [("", "update_every", *(f"{target:.2f}" for target in TARGETS))]
        rows += [
            (label, stride, *(f"{one:.1e}" for one in found))
            for label, stride, found in compare(trajectory)
        ]
        print(markdown(rows), flush=True)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column aligned left, the others right."""
    header, *rows = lines
    return "\n".join(
        f"| {' | '.join(line)} |"
        for line in (header, ("---", *["---:"] * (len(header) - 1)), *rows)
    )


# --- the truth
# -------------------------------------------------------------------------------------


def gamma_of(sigma_rel: float) -> float:
    """Return the largest root of (gamma+2)**2 (gamma+3) sigma_rel**2 - (gamma+1)."""
    cubic = np.polynomial.Polynomial.fromroots(
        [-2, -2, -3]
    ) * sigma_rel**2 - np.polynomial.Polynomial([1, 1])
    return float(cubic.roots().real.max())


def true_averages(run: Trajectory, wanted: Sequence[Target], stride: int = 1) -> FloatArray:
    """Return the averages over every `stride`-th step's weights: shape [targets, parameters].

    The mass that a profile has on (t_{k-1}, t_k] sits on the weights at update k, and what it has
    before the first update on that one's.
    """
    seen = np.arange(stride, run.steps + 1, stride)
    counts = np.zeros((len(wanted), run.steps))
    for row, target in zip(counts, wanted, strict=True):
        row[seen - 1] = np.diff(mass_until(target, seen, run), prepend=0.0)
    return averages(run, counts)


def mass_until(target: Target, seen: npt.NDArray[np.int64], run: Trajectory) -> FloatArray:
    """Return a profile's mass, at the end of the run, on the steps up to each of `seen`, by its
    definition.

    A width, a decay and a stretch of time are on the run's clock; a beta and a window are in steps,
    whatever time each took. A classical average begins as a copy of the first weights there are.
    """
    now = run.times[seen - 1]
    end = run.times[-1]
    if target.beta is not None:
        return np.asarray(target.beta ** (run.steps - seen).astype(np.float64))
    if isinstance(target, Window):
        return np.clip((seen - (run.steps - target.steps)) / target.steps, 0.0, 1.0)
    if isinstance(target, Decay) and not isinstance(target.over, tuple):
        x = np.clip((now / end - 1 + target.over) / target.over, 0.0, 1.0)
        if target.shape in ("linear", "1-sqrt"):
            return x if target.shape == "linear" else np.sqrt(x)
    if target.sigma_rel is None:
        raise ValueError(f"{target.title}: no definition of it here")
    return np.asarray((now / end) ** (gamma_of(target.sigma_rel) + 1))


def averages(trajectory: Trajectory, counts: FloatArray) -> FloatArray:
    """Return weighted sums over all steps in float64: weights [averages, steps] -> [averages,
    parameters]."""
    total = np.zeros((len(counts), trajectory.weights.shape[1]))
    # by parts: all of it in float64 takes half a gigabyte
    for start in range(0, trajectory.steps, 1000):
        part = slice(start, start + 1000)
        total += counts[:, part] @ trajectory.weights[part].astype(np.float64)
    return total


def distances(values: FloatArray, truth: FloatArray) -> list[float]:
    """Return the relative L2 distance of each row, [averages, parameters], from the same row of
    `truth`."""
    return list(np.linalg.norm(values - truth, axis=1) / np.linalg.norm(truth, axis=1))


# --- the libraries
# ---------------------------------------------------------------------------------

Average = Callable[[float], Iterable[torch.Tensor]]
"""Gives the average of a sigma_rel at the end, in the order of the parameters."""


def ours(
    model: torch.nn.Module,
    folder: Path,
    stride: int,
    interval: int,
) -> tuple[Callable[[], object], Average]:
    """Return a callback for each step of this package, and its averages from the directory alone,
    as after training."""
    options = {
        "update_every": stride,
        "checkpoint_every": interval,
        "checkpoint_dtype": torch.float32,
    }
    tracker = PostHocEMA.from_model(model, folder, sigma_rels=TRACKED, **options)

    def average(sigma_rel: float) -> Iterable[torch.Tensor]:
        tracker.close()
        return PostHocEMA.from_path(folder).state_dict(sigma_rel=sigma_rel).values()

    return lambda: tracker.update_(model), average


def ema_pytorch(
    model: torch.nn.Module,
    folder: Path,
    stride: int,
    interval: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Callable[[], object], Average]:
    """Return the same for `ema_pytorch.PostHocEMA`, which holds the model and returns a module."""
    from ema_pytorch import PostHocEMA as Tracker

    options = {
        "update_every": stride,
        "checkpoint_every_num_steps": interval,
        "checkpoint_dtype": dtype,
    }
    tracker = Tracker(model, sigma_rels=TRACKED, checkpoint_folder=str(folder), **options)
    return tracker.update, lambda sigma_rel: tracker.synthesize_ema_model(
        sigma_rel=sigma_rel
    ).ema_model.parameters()


def posthoc_ema(
    model: torch.nn.Module,
    folder: Path,
    stride: int,
    interval: int,
    dtype: torch.dtype = torch.float32,
    **others: int,
) -> tuple[Callable[[], object], Average]:
    """Return the same for `posthoc_ema.PostHocEMA` of pytorch-posthoc-ema, which yields a state
    dict in a block."""
    from posthoc_ema import PostHocEMA as Tracker

    options = {
        "update_every": stride,
        "checkpoint_every": interval,
        "checkpoint_dtype": dtype,
        **others,
    }
    tracker = Tracker.from_model(
        model, folder, max_checkpoints=SNAPSHOTS, sigma_rels=TRACKED, **options
    )

    def average(sigma_rel: float) -> Iterable[torch.Tensor]:
        with tracker.state_dict(sigma_rel=sigma_rel) as state:
            return list(state.values())

    return lambda: tracker.update_(model), average


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
    raw = np.broadcast_to(trajectory.weights[-1].astype(np.float64), truth.shape)
    yield "raw final weights", "", distances(raw, truth)
    for stride in STRIDES:
        if stride > 1:
            seen = true_averages(trajectory, wanted, stride)
            yield f"every {stride}th step, exactly", str(stride), distances(seen, truth)
        for package, start in LIBRARIES.items():
            replay = Replay(trajectory)
            with tempfile.TemporaryDirectory() as folder, without_noise():
                update, average = start(replay, Path(folder), stride, trajectory.steps // SNAPSHOTS)
                for index in range(trajectory.steps):
                    replay.go_to(index)
                    update()
                flat = [
                    torch.cat([one.detach().flatten() for one in average(target)])
                    for target in TARGETS
                ]
            found = distances(torch.stack(flat).double().numpy(), truth)
            yield f"{package} {importlib.metadata.version(package)}", str(stride), found


if __name__ == "__main__":
    main()
