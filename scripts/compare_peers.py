"""This package and its PyPI peers on the same recorded training runs: how far from the true average?

    python scripts/compare_peers.py [--steps 10000] [--cache FOLDER] [--markdown]

Every library is shown the same weights after every one of 10,000 steps, tracks sigma_rel 0.05 and 0.28, stores
a float32 snapshot of both every 500 steps (20 each) and is asked for averages of five lengths at the end. All
through public interfaces; every option not named here has its library's default.

**The true average** is over *every* step, also where a library looks at every tenth only: a user who asks for
sigma_rel 0.15 means the average of what training went through, not of what the hook happened to see. It is
computed here from the definition, in float64, by no library's code: the weights after step k of T count
(k/T)**(gamma+1) - ((k-1)/T)**(gamma+1), with gamma the largest root of
(gamma+2)**2 (gamma+3) sigma_rel**2 = gamma+1. Distances are Euclidean over all parameters, relative to the true
average. Two rows help to judge the others: "raw final weights" is no averaging at all, and "every 10th step,
exactly" is the true average over steps 10, 20, ... only: what looking at every tenth step costs anyone.

**What differs, and why.** An update at time t keeps the share beta of the average. Exact for any stride is
beta = (t_prev/t)**(gamma+1), with t_prev the time of the update before. Both peers use
(1 - 1/t)**(gamma+1), the value for an interval of one step, whatever `update_every` is. At update_every=10
what they track therefore has (gamma+1)/10 where gamma+1 was asked for: instead of 0.05 an average about as long
as 0.25, instead of 0.28 one with half of its mass on the first 21 of 10,000 steps; yet the coefficients are
solved for the gammas that were asked for. Their own defaults are 10 (`posthoc_ema`) and 100 (`ema_pytorch`).
At update_every=1 their beta is right, and what remains is small:

- `ema_pytorch` counts t one step ahead, (t/(t+1))**(gamma+1) at step t: as if one more step had come first. (At
  other strides it also updates at calls 1, 11, 21, ..., so that a snapshot has last looked nine calls ago.)
- `posthoc_ema` has the same offset and, by default, passes over the first 99 calls (`update_after_step=100`) and
  counts t from there, while it names its snapshots, and solves for them, by the call. The row with
  `update_after_step=1` shows it without that.

Neither divides the coefficients by their sum, and `posthoc_ema` solves for them in float32. With these snapshots
neither shows: the sums are within 4e-5 of 1, and the column "method" below is rounding.

**Are the peers used as they should be?** For every row of theirs the script follows their updates in float64
(`PeerMethod`: how much each step's weights count in each snapshot), solves the paper's least squares in float64
and makes the averages from that. The column "method" is the largest distance, over the targets, between the
library's output and its own method computed so: their code does what is said above.

"track" is the time inside the library's update calls, the writing of snapshots included; "synth" is the median time
of one average. Ours opens the directory anew for each and verifies all checksums on the way.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from trajectories import PEER_RUNS, Replay, Trajectory, record

from posthoc_cli import PostHocEMA

FloatArray = npt.NDArray[np.float64]

TARGETS = (0.05, 0.10, 0.15, 0.20, 0.28)
TRACKED = (0.05, 0.28)
STRIDES = (1, 10)
SNAPSHOTS = 20
"""Snapshots of each tracked profile."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Record the runs, put every library through them and print a table for each."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    print(_setting(options.steps))
    for name in PEER_RUNS:
        trajectory = record(name, options.steps, options.cache)
        title = f"{name}: {options.steps:,} steps, {trajectory.weights.shape[1]:,} parameters"
        rows = compare(trajectory)
        print(f"\n{title}\n\n{markdown_table(rows) if options.markdown else text_table(rows)}", flush=True)
    print("\nmethod: largest distance of a peer's averages from its own method followed in float64")
    print(f"all of it: {time.perf_counter() - started:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Distance of each library's averages from the true ones.")
    parser.add_argument("--steps", type=_steps, default=10_000, help="training steps, a multiple of 200 (10000)")
    parser.add_argument("--cache", type=Path, help="folder to keep recorded runs in, and to take them from")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    return parser


def _steps(text: str) -> int:
    """20 snapshots must fall on multiples of every stride."""
    unit = SNAPSHOTS * max(STRIDES)
    steps = int(text)
    if steps < unit or steps % unit:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of {unit}")
    return steps


def _setting(steps: int) -> str:
    return (
        f"Relative L2 distance from the true average over every step, by target sigma_rel; "
        f"tracked {' and '.join(f'{s:.2f}' for s in TRACKED)},\nfloat32 snapshots every {steps // SNAPSHOTS} steps, "
        f"other options at each library's defaults; Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads."
    )


# --- the truth -------------------------------------------------------------------------------------


def gamma_of(sigma_rel: float) -> float:
    """The largest root of (gamma+2)**2 (gamma+3) sigma_rel**2 - (gamma+1)."""
    cubic = np.polynomial.Polynomial.fromroots([-2, -2, -3]) * sigma_rel**2 - np.polynomial.Polynomial([1, 1])
    return float(cubic.roots().real.max())


def true_weights(sigma_rel: float, steps: int, stride: int = 1) -> FloatArray:
    """How much the weights after each step count in the true average over every `stride`-th: [steps]."""
    seen = np.arange(stride, steps + 1, stride)
    counts = np.zeros(steps)
    counts[seen - 1] = np.diff((seen / steps) ** (gamma_of(sigma_rel) + 1), prepend=0.0)
    return counts


def averages(trajectory: Trajectory, counts: FloatArray) -> FloatArray:
    """Weighted sums over all steps in float64: counts [averages, steps] -> [averages, parameters]."""
    total = np.zeros((len(counts), trajectory.weights.shape[1]))
    for start in range(0, trajectory.steps, 1000):  # by parts: all of it in float64 takes half a gigabyte
        part = slice(start, start + 1000)
        total += counts[:, part] @ trajectory.weights[part].astype(np.float64)
    return total


def distances(values: FloatArray, truth: FloatArray) -> list[float]:
    """Relative L2 distance of each row, [averages, parameters], from the same row of `truth`."""
    return list(np.linalg.norm(values - truth, axis=1) / np.linalg.norm(truth, axis=1))


# --- the libraries ---------------------------------------------------------------------------------


class Library(Protocol):
    """A library during one run: it looks at the replay when `update` is called."""

    def update(self) -> None:
        """Tell it that the replay has made a step."""
        ...

    def average(self, sigma_rel: float) -> Iterable[torch.Tensor]:
        """The average at the end, from its snapshots, in the order of the parameters."""
        ...


class Ours:
    """This package."""

    def __init__(self, replay: Replay, folder: Path, stride: int, interval: int) -> None:
        self._replay = replay
        self._folder = folder
        self._ema = PostHocEMA.from_model(
            replay,
            folder,
            sigma_rels=TRACKED,
            update_every=stride,
            checkpoint_every=interval,
            checkpoint_dtype=torch.float32,
        )

    def update(self) -> None:
        """One call of the hook."""
        self._ema.update_(self._replay)

    def average(self, sigma_rel: float) -> Iterable[torch.Tensor]:
        """From the directory alone, as after training."""
        self._ema.close()
        return PostHocEMA.from_path(self._folder).state_dict(sigma_rel=sigma_rel).values()


class EmaPytorch:
    """`ema_pytorch.PostHocEMA`."""

    def __init__(self, replay: Replay, folder: Path, stride: int, interval: int) -> None:
        from ema_pytorch import PostHocEMA as Tracker

        self._ema = Tracker(
            replay,
            sigma_rels=TRACKED,
            update_every=stride,
            checkpoint_every_num_steps=interval,
            checkpoint_folder=str(folder),
            checkpoint_dtype=torch.float32,
        )

    def update(self) -> None:
        """It holds the model itself."""
        self._ema.update()

    def average(self, sigma_rel: float) -> Iterable[torch.Tensor]:
        """It gives a module."""
        return list(self._ema.synthesize_ema_model(sigma_rel=sigma_rel).ema_model.parameters())


class PosthocEma:
    """`posthoc_ema.PostHocEMA`, from pytorch-posthoc-ema."""

    def __init__(self, replay: Replay, folder: Path, stride: int, interval: int, **others: int) -> None:
        from posthoc_ema import PostHocEMA as Tracker

        self._replay = replay
        self._ema = Tracker.from_model(
            replay,
            folder,
            max_checkpoints=SNAPSHOTS,
            sigma_rels=TRACKED,
            update_every=stride,
            checkpoint_every=interval,
            checkpoint_dtype=torch.float32,
            **others,
        )

    def update(self) -> None:
        """One call of the hook."""
        self._ema.update_(self._replay)

    def average(self, sigma_rel: float) -> Iterable[torch.Tensor]:
        """It gives a state dict for a `with` block."""
        with self._ema.state_dict(sigma_rel=sigma_rel) as state:
            return list(state.values())


class PosthocEmaFromStart(PosthocEma):
    """The same without the pause at the start that is its default."""

    def __init__(self, replay: Replay, folder: Path, stride: int, interval: int) -> None:
        super().__init__(replay, folder, stride, interval, update_after_step=1)


@dataclass(frozen=True)
class Entry:
    """A library in the comparison.

    Attributes:
        label: its name in the table.
        package: its name on PyPI.
        start: makes one from (replay, folder, stride, snapshot interval).
        first_call: for a peer, the call of update from which on it counts.
    """

    label: str
    package: str
    start: Callable[[Replay, Path, int, int], Library]
    first_call: int | None = None

    def __str__(self) -> str:
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        name, comma, rest = self.label.partition(",")
        return f"{name} {version}{comma}{rest}"


ENTRIES = (
    Entry("posthoc_cli", "posthoc-cli", Ours),
    Entry("ema_pytorch", "ema-pytorch", EmaPytorch, first_call=1),
    Entry("posthoc_ema", "pytorch-posthoc-ema", PosthocEma, first_call=100),
    Entry("posthoc_ema, update_after_step=1", "pytorch-posthoc-ema", PosthocEmaFromStart, first_call=1),
)


# --- what the peers' method should give ------------------------------------------------------------


@dataclass(frozen=True)
class PeerMethod:
    """The method of both peers, followed in float64.

    Their clock n counts calls from `first_call` on. They update at n = 1, 1 + stride, ...: the first update takes
    the weights whole, the one at n keeps (n/(n+1))**(gamma+1) of the average. Snapshots are named by the call, and
    solved for as power functions at that time.
    """

    steps: int
    stride: int
    interval: int
    first_call: int

    def counts(self, sigma_rel: float) -> FloatArray:
        """How much the weights after each step count in the average that the peer gives: [steps]."""
        times = [t for t in range(self.interval, self.steps + 1, self.interval) if t >= self.first_call]
        gammas = [gamma_of(tracked) for tracked in TRACKED]
        recorded = np.concatenate([self._recorded(gamma, times) for gamma in gammas])
        gamma, t = np.repeat(gammas, len(times)), np.tile(np.array(times, dtype=np.float64), len(gammas))
        gram = _inner_product(gamma[:, None], t[:, None], gamma, t)
        wanted = _inner_product(gamma, t, np.array(gamma_of(sigma_rel)), np.array(float(self.steps)))
        return np.asarray(np.linalg.solve(gram, wanted) @ recorded)

    def _recorded(self, gamma: float, times: Sequence[int]) -> FloatArray:
        """What snapshots at `times` really hold: [snapshots, steps]."""
        held = np.zeros(self.steps)
        snapshots = []
        for call in range(self.first_call, self.steps + 1):
            n = call - self.first_call + 1
            if n == 1:
                held[call - 1] = 1.0
            elif n % self.stride == 1 % self.stride:
                beta = (n / (n + 1)) ** (gamma + 1)
                held[:call] *= beta
                held[call - 1] += 1 - beta
            if call in times:
                snapshots.append(held.copy())
        return np.array(snapshots)


def _inner_product(gamma: FloatArray, t: FloatArray, other_gamma: FloatArray, other_t: FloatArray) -> FloatArray:
    """The integral of the product of two power functions; arguments broadcast.

    Up to the earlier of the two times m it is that of x y s**(gamma + other) / (t**x other_t**y), where x, y stand for
    gamma + 1, other + 1.
    """
    x, y, m = gamma + 1, other_gamma + 1, np.minimum(t, other_t)
    return x * y / (x + y - 1) * (m / t) ** x * (m / other_t) ** y / m


# --- the comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table; what does not apply, or could not be done, is None.

    Attributes:
        label: who.
        stride: update_every.
        errors: relative distance from the truth, by target.
        off_method: largest relative distance from what a peer's method should give.
        tracking: seconds in update calls.
        synthesis: seconds for one average.
        failure: why there are no numbers.
    """

    label: str
    stride: int | None = None
    errors: Sequence[float] | None = None
    off_method: float | None = None
    tracking: float | None = None
    synthesis: float | None = None
    failure: str | None = None


def compare(trajectory: Trajectory) -> list[Row]:
    """Everything on one trajectory."""
    truth = averages(trajectory, np.array([true_weights(target, trajectory.steps) for target in TARGETS]))
    raw = np.broadcast_to(trajectory.weights[-1].astype(np.float64), truth.shape)
    rows = [Row("raw final weights", errors=distances(raw, truth))]
    for stride in STRIDES:
        if stride > 1:
            counts = np.array([true_weights(target, trajectory.steps, stride) for target in TARGETS])
            best = distances(averages(trajectory, counts), truth)
            rows.append(Row(f"every {stride}th step, exactly", stride, best))
        rows += [_row(entry, trajectory, stride, truth) for entry in ENTRIES]
    return rows


def _row(entry: Entry, trajectory: Trajectory, stride: int, truth: FloatArray) -> Row:
    try:
        with _contained(), tempfile.TemporaryDirectory() as folder:
            return _measure(entry, trajectory, stride, truth, Path(folder))
    except (Exception, SystemExit) as error:  # whatever a peer does, the others' numbers are still wanted
        if entry.first_call is None:
            raise
        return Row(str(entry), stride, failure=f"{type(error).__name__}: {error}".splitlines()[0])


@contextmanager
def _contained() -> Iterator[None]:
    """Keep a library's warnings and prints out of the table."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _measure(entry: Entry, trajectory: Trajectory, stride: int, truth: FloatArray, folder: Path) -> Row:
    interval = trajectory.steps // SNAPSHOTS
    replay = Replay(trajectory)
    library = entry.start(replay, folder, stride, interval)
    tracking = _track(library, replay, trajectory.steps)
    values, seconds = _synthesize(library)
    off_method = None
    if entry.first_call is not None:
        method = PeerMethod(trajectory.steps, stride, interval, entry.first_call)
        expected = averages(trajectory, np.array([method.counts(target) for target in TARGETS]))
        off_method = max(distances(values, expected))
    return Row(str(entry), stride, distances(values, truth), off_method, tracking, seconds)


def _track(library: Library, replay: Replay, steps: int) -> float:
    """Replay all steps; seconds in the library."""
    seconds = 0.0
    for index in range(steps):
        replay.go_to(index)
        started = time.perf_counter()
        library.update()
        seconds += time.perf_counter() - started
    return seconds


def _synthesize(library: Library) -> tuple[FloatArray, float]:
    """The averages of all targets, [targets, parameters], and the median seconds for one."""
    rows, seconds = [], []
    for target in TARGETS:
        started = time.perf_counter()
        tensors = library.average(target)
        seconds.append(time.perf_counter() - started)
        rows.append(torch.cat([tensor.detach().flatten() for tensor in tensors]).double().numpy())
    return np.array(rows), statistics.median(seconds)


# --- the table -------------------------------------------------------------------------------------

HEADER = ("", "update_every", *(f"{target:.2f}" for target in TARGETS), "method", "track s", "synth ms")


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns; the first to the left, numbers to the right."""
    lines = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(_aligned(line, widths, row) for line, row in zip(lines, [None, *rows], strict=True))


def _aligned(line: Sequence[str], widths: Sequence[int], row: Row | None) -> str:
    cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
    if row is not None and row.failure is not None:
        cells[2:] = [row.failure]
    return "  ".join(cells).rstrip()


def markdown_table(rows: Sequence[Row]) -> str:
    """The same for a README."""
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1))]
    for row in rows:
        cells = _cells(row)
        lines.append(cells if row.failure is None else (*cells[:2], row.failure.replace("|", "\\|"), *cells[3:]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    errors = [f"{error:.1e}" for error in row.errors] if row.errors is not None else [""] * len(TARGETS)
    return (
        row.label,
        "" if row.stride is None else str(row.stride),
        *errors,
        "" if row.off_method is None else f"{row.off_method:.0e}",
        "" if row.tracking is None else f"{row.tracking:.2f}",
        "" if row.synthesis is None else f"{1000 * row.synthesis:.0f}",
    )


if __name__ == "__main__":
    main()
