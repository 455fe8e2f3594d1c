"""Measure the cost of the modes of `DifferentiableEMA`, for the guide `averages`.

    python scripts/bench_averages.py [--repeats 5] [--quick]

A network of two hidden layers is trained so that the running mean of its 8 outputs on digits approaches a target: every
step averages the mean of a batch and calls `backward` on the average's distance from the target.
**Memory** is the largest size of all tensors after any operation of the last of 128 updates, without network and data.
**Time** is the least time of repeated runs of a step, the median of the last five. **Distance** is that of the gradient
from the gradient of the complete graph at the same weights, the median over the second half of training.
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
    """A network, its data, and its training steps."""

    def __init__(self, mode: str, window: int | None, size: tuple[int, int]) -> None:
        self.batch, width = size
        self.ema, self.random = DifferentiableEMA(OUTPUTS, 0.95, mode, window), torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        hidden = (nn.Linear(SIDE * SIDE, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.network = nn.Sequential(*hidden, nn.Linear(width, OUTPUTS))
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.02)
        self.images, _ = digits()

    def differentiate(self) -> None:
        """Average the mean output of a new batch; call `backward` on the average's distance from the target."""
        chosen = torch.randint(len(self.images), (self.batch,), generator=self.random)
        with self.ema.recording():
            value = self.network(self.images[chosen]).mean(dim=0)
        leaves = {"leaves": self.network.parameters()} if self.ema.mode == "carried" else {}
        loss = (self.ema(value, **leaves) - torch.linspace(-1, 1, OUTPUTS)).square().sum()
        self.optimizer.zero_grad()
        loss.backward(retain_graph=self.ema.mode in ("window", "full"))

    def gradient(self) -> torch.Tensor:
        """Return the gradient of all parameters as one vector."""
        return torch.cat([parameter.grad.flatten() for parameter in self.network.parameters()])  # type: ignore[union-attr]

    def step(self) -> None:
        """Make a training step."""
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
    """Return each mode's distance from the last mode's gradient; all modes see the weights of the last one's run."""
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
    """Records the memory of every tensor that an operation allocates within the block, until it is freed.

    Attributes:
        peak: the most bytes alive after an operation since it was last set to 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operation, then count its tensors."""
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
