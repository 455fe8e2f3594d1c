"""How fast a synthesis is, beside a plain loop over the same bytes and beside the peers; and how much memory it takes.

    python scripts/bench_synthesis.py [--device cpu] [--repeats 5] [--folder FOLDER] [--quick] [--checkpoints]

Snapshots are 20 in float16 of made-up models, half of them for each of two profiles; targets are float32. Times are
medians, with the range, of repeated runs in one process; "warm" means from the page cache, "cold" after the system was
asked to forget the files. All runs of ours verify every checksum. "dropped" is a caller who takes each tensor and
forgets it; "nowhere" is the engine alone, without a place for its results; "to a file" includes fsync. The peers read
checkpoints of their own, of as many parameters and the same dtype, through their public interfaces, with torch's own
number of threads. Other programs' checkpoints hold the same bytes as the snapshots that they are compared with;
`--checkpoints` measures these alone. What is compared is run in turns, each in a quiet moment; see `quiet_timing`.

The roofline is the plain loop: one thread that reads every byte into one buffer and does nothing with it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from quiet_timing import Report
from synthesis_cases import (
    CHECKPOINTS,
    Shapes,
    drop_from_cache,
    ema_pytorch_synthesis,
    large_tensors,
    peak_memory,
    posthoc_ema_synthesis,
    read_plainly,
    small_tensors,
    write_checkpoints,
    write_plainly,
    write_snapshots,
    write_sparse_snapshots,
)

from posthoc_cli.checkpoints.opening import disk_sources
from posthoc_cli.export.layouts import OutputOptions, write_synthesis
from posthoc_cli.run import Run
from posthoc_cli.sweep import Axis
from posthoc_cli.sweep.networks import Network
from posthoc_cli.synthesis.engine import Options, TileWriter, parse_device, synthesize, synthesize_into
from posthoc_cli.synthesis.plan import Plan, plan_synthesis

MANY = [round(0.03 + 0.008 * index, 3) for index in range(31)]


@dataclass(frozen=True)
class Sizes:
    """What is measured: parameters of models, tensors, and how often."""

    models: tuple[int, ...] = (48_000_000, 100_000_000)
    many_model: int = 48_000_000
    small: int = 2_000
    memory: tuple[int, ...] = (10_000_000, 1_000_000_000)
    repeats: int = 5


QUICK = Sizes((400_000,), 400_000, 60, (1_000_000, 4_000_000), 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print the tables and the goals."""
    options = _parser().parse_args(arguments)
    sizes = QUICK if options.quick else Sizes(repeats=options.repeats)
    device = parse_device(options.device)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, sums on {device}")
    if device == "cpu":
        print("accelerators: not run; --device cuda prints the same tables there")
    report = Report(sizes.repeats)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if not options.checkpoints:
            for parameters in sizes.models:
                measure_model(report, folder, parameters, device)
            measure_many(report, folder, sizes.many_model, device)
            measure_small(report, folder, sizes.small, device)
            measure_memory(report, folder, sizes.memory)
        measure_checkpoints(report, folder, sizes.many_model, device)
    print("\nGoals:")
    print("\n".join(report.goals))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="How fast a synthesis is, and how much memory it takes.")
    parser.add_argument("--device", default="cpu", help="where the sums are made: cpu, cuda, mps")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement")
    parser.add_argument("--folder", type=Path, help="for files of up to 15 GB; by default the system's own")
    parser.add_argument("--checkpoints", action="store_true", help="other programs' checkpoints only")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    return parser


# --- one target ------------------------------------------------------------------------------------


def measure_model(report: Report, folder: Path, parameters: int, device: str) -> None:
    """One target of a model, ours and the peers', warm and cold."""
    shapes = large_tensors(parameters)
    run, out = folder / "run", folder / "out.safetensors"
    write_snapshots(run, shapes)
    plan = planned(run, [0.15])
    nbytes = plan.read_bytes
    print(f"\n{len(plan.sources)} float16 snapshots of {parameters:,} parameters, {nbytes / 1e9:.2f} GB; one target")
    buffer = bytearray(4 * 2**20)
    plain, one, _, dropped = report.times(
        {
            "plain readinto loop, one thread, warm": lambda: read_plainly(run, buffer),
            "engine, one thread, nowhere": lambda: exhaust(nowhere(plan, device, 1)),
            "engine, all cores, nowhere": lambda: exhaust(nowhere(plan, device)),
            "all cores, dropped": lambda: exhaust(synthesize(plan, Options(device))),
        },
        nbytes,
    )
    report.time(
        "all cores, to a file", lambda: write_synthesis(plan, [out], OutputOptions(device, overwrite=True)), nbytes
    )
    size = out.stat().st_size
    report.time("writing and fsyncing as many bytes, plainly", lambda: write_plainly([out], size), size)
    forget = lambda: drop_from_cache(run)  # noqa: E731
    report.time("plain readinto loop, cold", lambda: read_plainly(run, buffer), nbytes, forget)
    report.time("all cores, dropped, cold", lambda: exhaust(synthesize(plan, Options(device))), nbytes, forget)
    print(f"  share of the read limit: {100 * plain.median / dropped.median:.0f} % on all cores, ", end="")
    print(f"{100 * plain.median / one.median:.0f} % on one")
    label = f"{parameters // 1_000_000} M: "
    report.goal(f"{label}time on all cores, in plain loops", dropped.median / plain.median, 3, [dropped, plain])
    out.unlink()
    _measure_peers(report, folder, shapes, label, lambda: dict(synthesize(plan, Options(device))))
    shutil.rmtree(run)


def _measure_peers(report: Report, folder: Path, shapes: Shapes, label: str, ours: Callable[[], object]) -> None:
    for name, prepare in (("posthoc_ema", posthoc_ema_synthesis), ("ema_pytorch", ema_pytorch_synthesis)):
        with tempfile.TemporaryDirectory(dir=folder) as checkpoints:
            peer = prepare(Path(checkpoints), shapes)
            os.sync()  # what is still being written would be a neighbour
            mine, found = report.times({"ours, kept (state_dict)": ours, f"{name}, 20 checkpoints of its own": peer})
        ratio = found.median / mine.median
        report.goal(f"{label}times faster than {name}", ratio, 10, [mine, found], at_least=True)


# --- many targets, small tensors, memory -----------------------------------------------------------


def measure_many(report: Report, folder: Path, parameters: int, device: str) -> None:
    """31 targets: dropped, and to disk."""
    run = folder / "run"
    write_snapshots(run, large_tensors(parameters))
    one, many = planned(run, [0.15]), planned(run, MANY)
    outputs = [folder / f"{target}.safetensors" for target in MANY]
    print(f"\n{len(MANY)} targets of {parameters:,} parameters")
    single, _, dropped = report.times(
        {
            "one target, dropped": lambda: exhaust(synthesize(one, Options(device))),
            "31 targets, nowhere": lambda: exhaust(nowhere(many, device)),
            "31 targets, dropped": lambda: exhaust(synthesize(many, Options(device))),
        }
    )
    report.goal("31 targets dropped, in times of one", dropped.median / single.median, 4, [dropped, single])
    nbytes = sum(spec.nbytes for spec in one.specs())

    def clear() -> None:
        for path in outputs:
            path.unlink(missing_ok=True)
        os.sync()  # what is still being written would be a neighbour

    file, plain, files = report.times(
        {
            "one target, to a file": lambda: write_synthesis(one, outputs[:1], OutputOptions(device)),
            "writing and fsyncing 31 files, plainly": lambda: write_plainly(outputs, nbytes),
            "31 targets, to files": lambda: write_synthesis(many, outputs, OutputOptions(device)),
        },
        before=clear,
    )
    ratio = files.median / (file.median + plain.median)
    report.goal("31 targets to disk, in (one + plain writing)", ratio, 1.3, [files, file, plain])
    clear()
    measure_round(report, folder, one, clear)
    shutil.rmtree(run)


def measure_round(report: Report, folder: Path, one: Plan, clear: Callable[[], None]) -> None:
    """12 candidates of a sweep, as it makes them in one pass."""
    scratch, plain = folder / "round", [folder / f"{width}.safetensors" for width in MANY[:12]]
    network = Network(Run(folder / "run"), Axis.of_values("sigma_rel", MANY[:12]), one, {})

    def begin() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        clear()

    single, writing, all_of_them = report.times(
        {
            "one candidate": lambda: network.make(scratch, [0.15]),
            "writing and fsyncing 12 files, plainly": lambda: write_plainly(plain, one.nbytes),
            "12 candidates": lambda: network.make(scratch, MANY[:12]),
        },
        before=begin,
    )
    ratio = (all_of_them.median - writing.median) / single.median
    report.goal("12 candidates without writing, in times of one", ratio, 1.5, [single, writing, all_of_them])
    shutil.rmtree(scratch)
    clear()


def measure_small(report: Report, folder: Path, count: int, device: str) -> None:
    """Many small tensors against the same bytes in 20 large ones."""
    print(f"\n{count:,} tensors of 64 x 64 against the same bytes in 20; dropped")
    runs: dict[str, Callable[[], object]] = {}
    for label, shapes in (("small", small_tensors(count)), ("large", large_tensors(count * 64 * 64))):
        write_snapshots(folder / label, shapes)
        plan = planned(folder / label, [0.15])
        runs[f"{label} tensors"] = lambda p=plan: exhaust(synthesize(p, Options(device)))
    small, large = report.times(runs, plan.read_bytes)
    report.goal("small tensors, in times of large ones", small.median / large.median, 1.5, [small, large])
    for label in ("small", "large"):
        shutil.rmtree(folder / label)


def measure_memory(report: Report, folder: Path, models: Sequence[int]) -> None:
    """Peak resident memory for models of very different sizes, from files that are all holes."""
    print("\nPeak resident memory (ru_maxrss) above that of a process that imports torch; one target to a file")
    peaks = []
    for parameters in models:
        run, out = folder / "run", folder / "out.safetensors"
        write_sparse_snapshots(run, parameters, tensors=20, snapshots=4)
        peaks.append(peak_memory(run, out) / 1e6)
        print(f"  {parameters:>13,} parameters, 4 snapshots: {peaks[-1]:6.1f} MB", flush=True)
        shutil.rmtree(run)
        out.unlink()
    report.goal("MB above import torch, the larger model", peaks[-1], 300, [])
    report.goal("MB between the models", abs(peaks[-1] - peaks[0]), 30, [])


def measure_checkpoints(report: Report, folder: Path, parameters: int, device: str) -> None:
    """Checkpoints of other programs against snapshots of the same bytes: matrices, and some small tensors."""
    run, other = folder / "run", folder / "checkpoints"
    shapes = {**large_tensors(parameters), **{f"norms.{index}": (1024,) for index in range(parameters // 200_000)}}
    write_snapshots(run, shapes)
    own = planned(run, [0.15])
    print(f"\n20 checkpoints of {parameters:,} parameters in {len(shapes)} tensors; one target, dropped")
    for layout in CHECKPOINTS:
        write_checkpoints(other, layout, shapes)
        os.sync()  # what is still being written would be a neighbour
        plan = planned(other, [0.15])
        runs = {
            name: lambda p=p: exhaust(synthesize(p, Options(device)))
            for name, p in (("snapshots", own), (layout, plan))
        }
        ours, theirs = report.times(runs, own.read_bytes)
        report.goal(f"{layout}, in times of snapshots", theirs.median / ours.median, 1.5, [theirs, ours])
        shutil.rmtree(other)
    shutil.rmtree(run)


def planned(run: Path, targets: Sequence[float]) -> Plan:
    """A plan for targets of a directory."""
    return plan_synthesis(disk_sources(run), targets, dtype="float32")


def nowhere(plan: Plan, device: str, workers: int | None = None) -> Iterable[object]:
    """The engine alone."""
    nowhere = SimpleNamespace(open_tile=lambda _: TileWriter())
    return synthesize_into(plan, [nowhere] * len(plan.targets), Options(device, workers))


def exhaust(items: Iterable[object]) -> None:
    """Take everything and forget it."""
    for _ in items:
        pass


if __name__ == "__main__":
    main()
