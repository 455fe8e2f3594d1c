"""Measure what the hook costs training: an update, a call that takes snapshots, and memory.

    python scripts/bench_update.py [--device cpu] [--repeats 5] [--folds 7] [--quick]

This package and both PyPI peers, where they are installed, track sigma_rel 0.05 and 0.28 of the
same model, update after every step through public interfaces, and take turns. All checks of this
package are on: names, shapes, dtypes, finiteness. A run is seven folds of 256 updates long, and
ends when all work is done. A cell is the median over runs of an update's mean time, and in
parentheses of the processor time of all threads, which other programs on the machine change less.

**Ours, late in a run** is at t = 10^6, where an update changes one mean; until t = 104,000, at one
update a step, it changes two. `--device cuda` puts the models on the accelerator; `posthoc_ema`
keeps its averages on the CPU there."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from compare_peers import ema_pytorch, posthoc_ema, without_noise

from posthoc_cli import PostHocEMA
from posthoc_cli.profiles import WINDOW
from posthoc_cli.synthesis.engine import check_device

TRACKED = (0.05, 0.28)
Shapes = Mapping[str, tuple[int, ...]]

NEVER = 10**9
"""A checkpoint interval that is never reached."""

Begun = tuple[Callable[[], object], Callable[[], object]]
"""An update, and a function that waits until all updates are complete."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="where the models are: cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement")
    parser.add_argument("--folds", type=int, default=7, help="length of a run, in folds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    asked = parser.parse_args(arguments)
    logging.getLogger("posthoc_cli").setLevel(logging.ERROR)  # it warns that no weights change
    device = str(check_device(asked.device))
    repeats, scale = (1, 100) if asked.quick else (asked.repeats, 1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    many = small_tensors(2000 // scale)
    large = large_tensors(50_000_000 // scale, 24)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = {
            f"{len(many):,} tensors of 64 x 64": updates(
                many, torch.float32, device, folder / "many", repeats, asked.folds
            ),
            f"{50 / scale:g} M parameters in 24": updates(
                large, torch.float32, device, folder / "large", repeats, asked.folds
            ),
            "the same in bfloat16": updates(
                large, torch.bfloat16, device, folder / "half", repeats, asked.folds
            ),
        }
        print(f"\n| one update, ms | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
        for label in dict.fromkeys(label for column in columns.values() for label in column):
            print(
                f"| {label} | {' | '.join(column.get(label, '') for column in columns.values())} |"
            )
        snapshots(large, device, folder / "snapshots", repeats)
        memory(large, folder / "memory")


def times(
    runs: dict[str, Callable[[], object]],
    repeats: int,
    each: int = 1,
) -> dict[str, tuple[list[float], list[float]]]:
    """Return seconds and processor seconds of runs in turns, divided by `each`."""
    found: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in runs}
    for _ in range(repeats):
        for label, run in runs.items():
            os.sync()
            seconds = time.perf_counter()
            processor = time.process_time()
            run()
            found[label][0].append((time.perf_counter() - seconds) / each)
            found[label][1].append((time.process_time() - processor) / each)
    return found


def cell(seconds: list[float], processor: list[float]) -> str:
    """Return medians in milliseconds."""
    return " ".join(
        form.format(f"{1000 * statistics.median(one):.3g}")
        for form, one in (("{}", seconds), ("({})", processor))
    )


def done(device: str) -> None:
    """Wait until an accelerator has done its queued work."""
    if device != "cpu":
        torch.cuda.synchronize(device)


# --- models
# ----------------------------------------------------------------------------------------


def large_tensors(parameters: int, count: int = 20) -> dict[str, tuple[int, ...]]:
    """Make a model of that many parameters in at least `count` equal matrices."""
    width = 1024
    rows = max(1, parameters // count // width)
    return {f"layers.{index}.weight": (rows, width) for index in range(count)}


def small_tensors(count: int) -> dict[str, tuple[int, ...]]:
    """Make a model of 64 x 64 matrices."""
    return {f"layers.{index}.weight": (64, 64) for index in range(count)}


class Layers(torch.nn.Module):
    """A model with parameters of these shapes."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.randn(shape) for shape in shapes.values())


# --- updates
# ---------------------------------------------------------------------------------------


def updates(
    shapes: Shapes,
    dtype: torch.dtype,
    device: str,
    folder: Path,
    repeats: int,
    folds: int,
) -> dict[str, str]:
    """Measure a column: an update of every library."""
    field: dict[str, Callable[[torch.nn.Module, Path], Begun]] = {
        "ours, late in a run": partial(ours, begin=1e6),
        "ours, at its beginning": ours,
    }
    if is_installed("ema_pytorch"):
        field["`ema_pytorch`"] = partial(peer, ema_pytorch)
    if is_installed("posthoc_ema"):
        field["`posthoc_ema`"] = partial(peer, posthoc_ema, update_after_step=0)
    calls = folds * WINDOW
    runs = dict[str, Callable[[], object]]()
    for index, (label, begin) in enumerate(field.items()):
        with without_noise():
            update, settle = begin(Layers(shapes).to(device, dtype), folder / str(index))

        def run(
            update: Callable[[], object] = update,
            settle: Callable[[], object] = settle,
        ) -> None:
            for _ in range(calls):
                update()
            settle()
            done(device)

        update()  # makes the averages
        runs[label] = run
    return {label: cell(*found) for label, found in times(runs, repeats, calls).items()}


def is_installed(package: str) -> bool:
    """Return whether a package that is no requirement of this one can be imported."""
    return importlib.util.find_spec(package) is not None


def tracked(model: torch.nn.Module, folder: Path, **options: Any) -> PostHocEMA:
    """Make a tracker of two profiles with float16 snapshots and all its checks."""
    return PostHocEMA.from_model(model, folder, sigma_rels=TRACKED, **options)


def ours(model: torch.nn.Module, folder: Path, begin: float = 0.0) -> Begun:
    """Return an update of this package from a given time on."""
    ema = tracked(model, folder, update_every=1, checkpoint_every=NEVER)
    clock = count(begin + 1)
    return lambda: ema.update_(model, t=next(clock)), ema.flush


def peer(start: Callable[..., Any], model: torch.nn.Module, folder: Path, **options: int) -> Begun:
    """Return an update of a PyPI peer, whose averages have the parameters' dtype."""
    update, _ = start(model, folder, 1, NEVER, **options)
    return update, lambda: None


# --- snapshots and memory ------------------------------------------------------------------------


def snapshots(shapes: Shapes, device: str, folder: Path, repeats: int) -> None:
    """Measure the call at which two snapshots are due: until it returns, and until the snapshots
    are durable."""
    model = Layers(shapes).to(device)
    usual = list[float]()
    due = list[float]()
    durable = list[float]()
    with tracked(model, folder, update_every=1, checkpoint_every=4) as ema:
        for call in range(1, 4 * (repeats + 1) + 1):
            began = time.perf_counter()
            ema.update_(model)
            (usual if call % 4 else due).append(time.perf_counter() - began)
            ema.flush()
            done(device)
            durable += [] if call % 4 else [time.perf_counter() - began]
    middle = [f"{1000 * statistics.median(seconds):.3g} ms" for seconds in (usual, due, durable)]
    print(
        (
            "\na usual call: {}; one at which two snapshots are due: {}; until they are durable: {}"
        ).format(*middle)
    )


def memory(shapes: Shapes, folder: Path) -> None:
    """Print the bytes a parameter that a tracker of float32 parameters holds after two float16
    snapshots."""
    model = Layers(shapes)
    for device in ("model", "cpu"):
        with PostHocEMA.from_model(
            model, folder / device, update_every=1, checkpoint_every=2, device=device
        ) as ema:
            for _ in range(4):
                ema.update_(model)
            ema.flush()
            held = ema.metrics()["bytes"] / sum(
                parameter.numel() for parameter in model.parameters()
            )
        print(f'\nmemory with device="{device}": {held:.1f} bytes a parameter')


if __name__ == "__main__":
    main()
