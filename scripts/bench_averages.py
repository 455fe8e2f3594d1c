"""What the modes of `DifferentiableEMA` cost, for the guide `averages`.

    python scripts/bench_averages.py [--repeats 5] [--quick]

A network of two hidden layers is trained so that the running mean of its 8 outputs on digits comes near a target: every
step takes the mean of a batch into the average and calls `backward` on the average's distance from the target.
**Memory** is the most bytes of tensors alive at any operation of the last of 128 updates, beyond network and data,
counted by following every tensor that an operation makes; **time** the least of repeated runs of that whole step, the
median of the last five. **Distance** is that of the gradient to the whole graph's in the same run of weights, median
over the second half; what "truncated" and "window" leave out is no error of theirs, but the past.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trained_networks import SIDE, digits

from posthoc_cli.averages import DifferentiableEMA

OUTPUTS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| mode | memory, MB | time, ms | distance |\n| --- | ---: | ---: | ---: |")
    compare_modes(*((24, 1, (32, 32)) if asked.quick else (128, asked.repeats, (128, 256))))


class Training:
    """A network, the data, and one step after the other."""

    def __init__(self, mode: str, window: int | None, size: tuple[int, int]) -> None:
        self.batch, width = size
        self.ema, self.random = DifferentiableEMA(OUTPUTS, 0.95, mode, window), torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        hidden = (nn.Linear(SIDE * SIDE, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.network = nn.Sequential(*hidden, nn.Linear(width, OUTPUTS))
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.02)
        self.images, _ = digits()

    def differentiate(self) -> None:
        """Take the mean output on a new batch into the average, and call `backward` on the average's distance."""
        chosen = torch.randint(len(self.images), (self.batch,), generator=self.random)
        with self.ema.recording():
            value = self.network(self.images[chosen]).mean(dim=0)
        leaves = {"leaves": self.network.parameters()} if self.ema.mode == "carried" else {}
        loss = (self.ema(value, **leaves) - torch.linspace(-1, 1, OUTPUTS)).square().sum()
        self.optimizer.zero_grad()
        loss.backward(retain_graph=self.ema.mode in ("window", "full"))

    def gradient(self) -> torch.Tensor:
        """All of it."""
        return torch.cat([parameter.grad.flatten() for parameter in self.network.parameters()])  # type: ignore[union-attr]

    def step(self) -> None:
        """A whole step."""
        self.differentiate()
        self.optimizer.step()


def compare_modes(updates: int, repeats: int, size: tuple[int, int]) -> None:
    """Print a row for each mode."""
    window = max(2, updates // 8)
    modes = [("truncated", None), ("window", window), ("carried", None), ("full", None)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mode 'full' holds", RuntimeWarning)
        seconds = [[_seconds(Training(*mode, size), updates) for mode in modes] for _ in range(repeats)]
        distances = _distances([Training(*mode, size) for mode in modes], updates)
        for index, (mode, length) in enumerate(modes):
            training = Training(mode, length, size)
            with LiveBytes() as live:
                for _ in range(updates):
                    live.peak = 0
                    training.step()
            least = 1e3 * min(turn[index] for turn in seconds)
            name = mode if length is None else f"{mode} of {length}"
            print(f"| {name} | {live.peak / 1e6:.1f} | {least:.2f} | {distances[index]:.1e} |", flush=True)


def _seconds(training: Training, updates: int) -> float:
    times = []
    for _ in range(updates):
        started = time.perf_counter()
        training.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times[-5:])


def _distances(trainings: Sequence[Training], updates: int) -> list[float]:
    """How far each mode's gradient is from the last one's, while all see the weights that the last one makes."""
    whole, found = trainings[-1], list[list[float]]()
    for _ in range(updates):
        for training in trainings:
            training.network.load_state_dict(whole.network.state_dict())
            training.differentiate()
        truth = whole.gradient()
        found.append([float((one.gradient() - truth).norm() / truth.norm()) for one in trainings])
        whole.optimizer.step()
    return [statistics.median(distances) for distances in zip(*found[updates // 2 :], strict=True)]


class LiveBytes(TorchDispatchMode):
    """Follows the memory of every tensor that an operation makes within the block, until it is free.

    Attributes:
        peak: the most bytes alive after an operation since it was last set to 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operation, then count."""
        before = {_address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            # What an operation was given and gives back (views, changes in place) is not new.
            if isinstance(tensor, torch.Tensor) and _address(tensor) not in before:
                reference = StorageWeakRef(tensor.untyped_storage())
                self._alive[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        if sum(nbytes for _, nbytes in self._alive.values()) > self.peak:  # only then what became free matters
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return made


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


if __name__ == "__main__":
    main()
