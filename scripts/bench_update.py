"""Measure what the hook costs training: an update, and memory.

    python scripts/bench_update.py [--device cpu] [--repeats 5] [--folds 7]

This package and both PyPI peers, where they are installed, track sigma_rel 0.05 and 0.28 of the
same model, update after every step through public interfaces, and take turns. All checks of this
package are on: names, shapes, dtypes, finiteness. A run is seven folds of updates long, and ends
when all work is done. A cell is the median over runs of an update's mean time.

In its first 10,000 updates a run changes two means at each. Later it changes one, and folds it into
both averages every 10 updates at t = 10,000, 20 at 20,000, 104 from 104,000 on. Each is measured
after 312 updates, since one mean serves from a fold on. `--device cuda` puts the models on the
accelerator; `posthoc_ema` keeps its averages on the CPU there."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import torch
from compare_peers import TRACKED, Library, ema_pytorch, posthoc_ema, without_noise
from tables import markdown
from torch.nn import Module, ParameterList

from posthoc_cli import PostHocEMA
from posthoc_cli.devices import list_devices, streams_of
from posthoc_cli.synthesis.engine import check_device
from posthoc_cli.tracker.folding import WINDOW

Shapes = Mapping[str, tuple[int, ...]]

WARM_UP = 3 * WINDOW  # updates before a measurement

NEVER = 10**9
"""A checkpoint interval that is never reached."""


def main() -> None:
    """Measure everything and print the tables."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--folds", type=int, default=7, help="length of a run, in folds")
    asked = parser.parse_args()
    logging.getLogger("posthoc_cli").setLevel(logging.ERROR)  # it warns that no weights change
    device = str(check_device(asked.device))
    print(f"{machine()}, {torch.get_num_threads()} threads\n")
    many = small_tensors(2000)
    large = large_tensors(50_000_000, 24)
    models = {
        "2,000 tensors of 64 x 64": partial(make_model, many, device),
        "50 M parameters in 24": partial(make_model, large, device),
        "the same in bfloat16": partial(make_model, large, device, torch.bfloat16),
    }
    columns = [updates(make, asked.repeats, asked.folds) for make in models.values()]
    rows = [["one update, ms", *models]]
    for label in columns[0]:
        cells = [f"{1000 * column[label]:.3g}" for column in columns]
        rows.append([label, *cells])
    print(markdown(rows))
    for place in ("model", "cpu"):
        held = memory(make_model(large, "cpu"), place)
        print(f'\nmemory with device="{place}": {held:.1f} bytes a parameter')


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of both benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="where models are or sums are made (cpu)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement")
    return parser


def machine() -> str:
    """Return what figures depend on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def times(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
) -> dict[str, float]:
    """Return the median seconds of runs in turns."""
    seconds = defaultdict[str, list[float]](list)
    for _ in range(repeats):
        for label, run in runs.items():
            os.sync()
            began = time.perf_counter()
            run()
            wait_for_device()
            seconds[label].append(time.perf_counter() - began)
    return {label: statistics.median(of_run) for label, of_run in seconds.items()}


def wait_for_device() -> None:
    """Wait for all work that was queued on the current device of each kind."""
    for kind in {torch.device(name).type for name in list_devices()}:
        if module := streams_of(torch.device(kind)):
            module.synchronize()


# --- models
# ----------------------------------------------------------------------------------------


def large_tensors(parameters: int, count: int = 20) -> Shapes:
    """Return a model of that many parameters in `count` equal matrices."""
    width = 1024
    rows = max(1, parameters // count // width)
    return {f"layers.{index}": (rows, width) for index in range(count)}


def small_tensors(count: int) -> Shapes:
    """Return a model of 64 x 64 matrices."""
    return {f"layers.{index}": (64, 64) for index in range(count)}


class Layers(Module):
    """A model with parameters of these shapes."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = ParameterList(torch.randn(shape) for shape in shapes.values())


def make_model(
    shapes: Shapes,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> Module:
    """Make a model with parameters of these shapes."""
    return Layers(shapes).to(device, dtype)


# --- updates
# ---------------------------------------------------------------------------------------


def updates(
    make: Callable[[], Module],
    repeats: int,
    folds: int,
) -> dict[str, float]:
    """Measure a column: the seconds of an update of every library."""
    calls = folds * WINDOW
    with tempfile.TemporaryDirectory() as name, without_noise():
        folder = Path(name)
        runs = {
            "ours, at its beginning": ours(make(), folder / "beginning", calls),
            "ours, at t = 20,000": ours(make(), folder / "later", calls, begin=2e4),
            "ours, at t = 1,000,000": ours(make(), folder / "late", calls, begin=1e6),
        }
        for peer, start in installed_peers().items():
            library = start(make(), folder / peer, 1, NEVER)
            library.update()  # makes the averages
            runs[f"`{peer}`"] = partial(repeat, library.update, calls)
        seconds = times(runs, repeats)
    return {label: of_run / calls for label, of_run in seconds.items()}


def repeat(update: Callable[[], object], calls: int) -> None:
    """Update so often."""
    for _ in range(calls):
        update()


def ours(
    model: Module,
    folder: Path,
    calls: int,
    begin: float = 0.0,
) -> Callable[[], object]:
    """Return a function that updates so often, from a given time on, and waits until all is
    done."""
    ema = PostHocEMA.from_model(model, folder, TRACKED, update_every=1, checkpoint_every=NEVER)
    clock = count(begin + 1)

    def update(count: int) -> None:
        for _ in range(count):
            ema.update_(model, t=next(clock))
        ema.flush()

    update(WARM_UP)
    return partial(update, calls)


def installed_peers() -> dict[str, Callable[..., Library]]:
    """Return the PyPI peers that can be imported."""
    peers = {
        "ema_pytorch": ema_pytorch,
        "posthoc_ema": partial(posthoc_ema, update_after_step=0),
    }
    return {name: start for name, start in peers.items() if is_installed(name)}


def is_installed(package: str) -> bool:
    """Return whether a package that is no requirement of this one can be imported."""
    return importlib.util.find_spec(package) is not None


# --- memory
# -----------------------------------------------------------------------------------------


def memory(model: Module, device: str) -> float:
    """Return the bytes a parameter that a tracker of float32 parameters holds after two float16
    snapshots."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with tracker(model, device, checkpoint_every=2) as ema:
        repeat(lambda: ema.update_(model), 4)
        ema.flush()
        held: int = ema.metrics()["bytes"]
    return held / parameters


@contextmanager
def tracker(model: Module, device: str, **settings: int) -> Iterator[PostHocEMA]:
    """Make a tracker that updates at every step; its snapshots exist within the block."""
    with (
        tempfile.TemporaryDirectory() as folder,
        PostHocEMA.from_model(
            model, folder, TRACKED, update_every=1, device=device, **settings
        ) as ema,
    ):
        yield ema


if __name__ == "__main__":
    main()
