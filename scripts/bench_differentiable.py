"""Memory and time of `DifferentiableEMA` against the number of updates, in its four modes.

    python scripts/bench_differentiable.py [--updates 128] [--repeats 5] [--figure FILE.png] [--quick]

A network is trained so that the running mean of its 8 outputs on digits comes near a target: every step draws a batch,
takes the mean of the outputs into the average, calls `backward` on the average's distance from the target, and makes a
step of SGD, which changes the weights in place. The modes differ in what of the past the gradient reaches.

- **memory**: the most bytes of tensors alive at any operation of an update, beyond the network and the data. Counted
  exactly: every tensor that an operation makes is followed until its memory is free, those that only a graph holds
  too. The same at every call, on every machine.
- **time**: of the whole step, the least of repeated runs, since a neighbour on the machine can only add to it; the
  modes take turns. Measured apart from memory.

"exact" is how far the gradient is from that of the whole graph, in the same run of weights: relative L2 distance,
median over the updates of the second half. What "truncated" and "window" leave out is no error of theirs but the
past, which they do not follow.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trained_networks import SIDE, digits

from posthoc_cli.averages import DifferentiableEMA
from posthoc_cli.plots import COLOURS, STYLES

FloatArray = npt.NDArray[np.float64]

OUTPUTS = 8
DECAY = 0.95
RATE = 0.02


@dataclass(frozen=True)
class Mode:
    """One line of the picture."""

    label: str
    mode: str
    window: int | None = None

    def make(self) -> DifferentiableEMA:
        """An average of the network's outputs in this mode."""
        return DifferentiableEMA(OUTPUTS, DECAY, self.mode, self.window)


@dataclass(frozen=True)
class Found:
    """What was measured of a mode, after each update: bytes, seconds, distance from the whole graph's gradient."""

    mode: Mode
    memory: FloatArray
    seconds: FloatArray
    distance: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the modes, print the table, draw the picture."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.updates, options.repeats = min(options.updates, 24), 1
    window = max(2, options.updates // 8)
    modes = [
        Mode("truncated", "truncated"),
        Mode(f"window of {window}", "window", window),
        Mode("carried", "carried"),
        Mode("full graph", "full"),
    ]
    size = (32, 32) if options.quick else (128, 256)
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, one of them used; torch {torch.__version__}; "
        f"batch {size[0]}, hidden width {size[1]}, {OUTPUTS} outputs, decay {DECAY}"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mode 'full' holds", RuntimeWarning)
        found = measure(modes, options.updates, options.repeats, size)
    print(f"\n{table(found)}")
    if options.figure is not None:
        draw(found).savefig(options.figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Memory and time of the modes of DifferentiableEMA.")
    parser.add_argument("--updates", type=_updates, default=128, help="steps of training (128)")
    parser.add_argument("--repeats", type=int, default=5, help="runs that times are the least of (5)")
    parser.add_argument("--figure", type=Path, help="file for the picture")
    parser.add_argument("--quick", action="store_true", help="a tiny network: does everything run?")
    return parser


def _updates(text: str) -> int:
    updates = int(text)
    if updates < 8:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 8")
    return updates


# --- what is trained -------------------------------------------------------------------------------


class Training:
    """A network, the data, and one step after the other."""

    def __init__(self, mode: Mode, size: tuple[int, int]) -> None:
        self.batch, width = size
        self.ema = mode.make()
        self.random = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = nn.Sequential(
                *(nn.Linear(SIDE * SIDE, width), nn.Tanh()),
                *(nn.Linear(width, width), nn.Tanh()),
                nn.Linear(width, OUTPUTS),
            )
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=RATE)
        self.images, _ = digits()
        self.target = torch.linspace(-1, 1, OUTPUTS)

    def value(self) -> torch.Tensor:
        """The mean output on a new batch: [OUTPUTS]."""
        chosen = torch.randint(len(self.images), (self.batch,), generator=self.random)
        with self.ema.recording():
            mean: torch.Tensor = self.network(self.images[chosen]).mean(dim=0)
        return mean

    def average(self, value: torch.Tensor) -> torch.Tensor:
        """Take a value in."""
        if self.ema.mode == "carried":
            return self.ema(value, leaves=self.network.parameters())  # type: ignore[no-any-return]
        return self.ema(value)  # type: ignore[no-any-return]

    def step(self) -> None:
        """A whole step; nothing of it is held afterwards but what the average holds."""
        average = self.average(self.value())
        loss = (average - self.target).square().sum()
        self.optimizer.zero_grad()
        loss.backward(retain_graph=self.ema.mode in ("window", "full"))  # type: ignore[no-untyped-call]
        self.optimizer.step()


# --- measuring -------------------------------------------------------------------------------------


def measure(modes: Sequence[Mode], updates: int, repeats: int, size: tuple[int, int]) -> list[Found]:
    """All modes; times in turns."""
    seconds: list[list[FloatArray]] = [[] for _ in modes]
    for mode in modes:
        _seconds(Training(mode, size), 8)  # what is slow only the first time
    for _ in range(repeats):
        for index, mode in enumerate(modes):
            seconds[index].append(_seconds(Training(mode, size), updates))
    distances = _distances(modes, updates, size)
    return [
        Found(mode, _memory(Training(mode, size), updates), np.min(seconds[index], axis=0), distances[index])
        for index, mode in enumerate(modes)
    ]


def _seconds(training: Training, updates: int) -> FloatArray:
    times = [time.perf_counter()]
    for _ in range(updates):
        training.step()
        times.append(time.perf_counter())
    return np.diff(times)


def _memory(training: Training, updates: int) -> FloatArray:
    """The most bytes alive during each update."""
    found = []
    with LiveBytes() as live:
        for _ in range(updates):
            live.peak = 0
            training.step()
            found.append(live.peak)
    return np.array(found, dtype=np.float64)


class LiveBytes(TorchDispatchMode):
    """Follows the memory of every tensor that an operation makes within the block, until it is free.

    Attributes:
        peak: the most bytes alive after an operation since it was last set to 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then count."""
        before = {_address(tensor) for tensor in tree_leaves((arguments, keywords)) if isinstance(tensor, torch.Tensor)}
        made = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            # What an operation was given and gives back (views, changes in place) is not new.
            if isinstance(tensor, torch.Tensor) and _address(tensor) not in before:
                reference, nbytes = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
                self._alive[reference.cdata] = reference, nbytes
                self._at_most += nbytes
        if self._at_most > self.peak:  # only then what has become free since matters
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self._at_most = sum(nbytes for _, nbytes in self._alive.values())
            self.peak = max(self.peak, self._at_most)
        return made


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _distances(modes: Sequence[Mode], updates: int, size: tuple[int, int]) -> list[float]:
    """How far each mode's gradient is from the last one's, while all see the weights that the last one makes."""
    trainings = [Training(mode, size) for mode in modes]
    whole = trainings[-1]
    found: list[list[float]] = [[] for _ in modes]
    for _ in range(updates):
        gradients = [_gradient(training) for training in trainings]
        for index, gradient in enumerate(gradients):
            found[index].append(float((gradient - gradients[-1]).norm() / gradients[-1].norm()))
        whole.optimizer.step()
        for training in trainings[:-1]:
            training.network.load_state_dict(whole.network.state_dict())
    return [statistics.median(distances[updates // 2 :]) for distances in found]


def _gradient(training: Training) -> torch.Tensor:
    average = training.average(training.value())
    training.optimizer.zero_grad()
    (average - training.target).square().sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in training.network.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


# --- the table and the picture ---------------------------------------------------------------------


def table(found: Sequence[Found]) -> str:
    """Memory and time after some of the updates, and how exact the gradient is."""
    updates = found[0].memory.size
    shown = sorted({1, updates // 8, updates // 4, updates // 2, updates})
    header = "".join(f"{f'update {t}':>13}" for t in shown)
    lines = [f"{'memory (MB)':<16}{header}"]
    lines += [_line(entry.mode.label, [f"{entry.memory[t - 1] / 1e6:.2f}" for t in shown]) for entry in found]
    lines.append(f"\n{'time (ms)':<16}{header}")
    lines += [_line(entry.mode.label, [f"{1e3 * _smooth(entry.seconds)[t - 1]:.2f}" for t in shown]) for entry in found]
    lines.append("\ngradient: distance from the whole graph's")
    lines += [_line(entry.mode.label, [f"{entry.distance:.1e}"]) for entry in found]
    return "\n".join(lines)


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:<16}" + "".join(f"{cell:>13}" for cell in cells)


def _smooth(seconds: FloatArray) -> FloatArray:
    """The median of each update and its four neighbours: a step that something else interrupted is no news."""
    padded = np.pad(seconds, 2, mode="edge")
    smooth: FloatArray = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
    return smooth


def draw(found: Sequence[Found]) -> Figure:
    """Memory and time of an update, each against the number of updates."""
    figure = Figure(figsize=(8, 3.9), dpi=150, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    _panel(left, found, lambda entry: entry.memory / 1e6, "memory of one update (MB)")
    _panel(right, found, lambda entry: 1e3 * _smooth(entry.seconds), "time of one update (ms)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(found), fontsize=9, frameon=False)
    return figure


def _panel(axes: Axes, found: Sequence[Found], values: Callable[[Found], FloatArray], label: str) -> None:
    updates = np.arange(1, found[0].memory.size + 1)
    for index, entry in enumerate(found):
        colour, style = COLOURS[index], STYLES[index]
        axes.plot(updates, values(entry), color=colour, linestyle=style, linewidth=2.0, label=entry.mode.label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(1, updates[-1])
    axes.set_xlabel("number of updates")
    axes.set_ylabel(label)
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
