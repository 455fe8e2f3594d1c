"""What the hook costs training: an update beside those of others, the stall of a checkpoint, the share of a step.

    python scripts/bench_update.py [--device cpu] [--repeats 5] [--folder FOLDER] [--quick]
    python scripts/bench_update.py --busy [--repeats 5]

All runs keep two averages. Ours and both PyPI peers track sigma_rel 0.05 and 0.28; the others know one classical
average at a time and are run twice. Everyone has a copy of the same model and is asked for an update after every step,
through public interfaces, with torch's own number of threads. Ours does all its checks: names, shapes, dtypes and
finiteness. Runs that are compared take turns, each in a quiet moment, and what was contended decides nothing; see
`quiet_timing`. A run is some 200 updates, one after the other, multiples of 32 with all that belongs to them, and ends
when all of it is done: times are medians of its means, with the range, and the longest single update. The last table is
that of the guide.

**A whole run** of ours is an estimate: the mean over 64 updates in the middle of each of 16 equal parts of 100,000
steps. Averages take in the mean of two updates at the beginning, and of up to 32 later.

**The bytes once** is a plain pass over what no update of float32 averages can do without: the parameters are read
(`torch.linalg.vector_norm` over a flat copy of them) and both averages are read and written (`mul_` in place of two
flat tensors). **Plain float32 lerp** is the arithmetic of float32 averages that each update changes in place, in the
same blocks and with the same check for nan. Such averages stop moving in long runs: see `tracker/averages.py`.

**bfloat16 parameters.** Ours keeps float32 averages. Most others keep theirs in the parameters' dtype: half the
bytes, and at a decay of 0.9999 such an average hardly moves; some can be told to use float32.

**A checkpoint** stalls training for the time that the call at which snapshots are due takes beyond a usual update;
the call after it may have to wait, too. "Durable" is from the beginning of the first call until all is written and
fsynced, also beyond a usual update.

**The share of a step** is the median, over turns, of what a run of training with the hook takes more than one
without, at update_every=10. Updates lie in the middle between the ends of a run, so that what the hook makes a later
step wait for is counted.

**A busy machine** (`--busy`, nothing else then): 1,000 small layers with biases and the large model, ours beside both
peers, as the machine is and beside twice as many busy processes as it has cores, as data loaders are. Everyone else's
threads wait for each other there; nothing is waited for to be quiet.

With `--device cuda` the models are on the accelerator. `posthoc_ema` keeps its averages on the CPU there.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from quiet_timing import Report, Seconds, busy_machine, load_text, take_turns
from synthesis_cases import TRACKED, Layers, Shapes, large_tensors, small_layers, small_tensors, write_plainly
from update_cases import (
    NEVER,
    Contender,
    Training,
    TransformerSize,
    Updates,
    contenders,
    our_label,
    our_places,
    our_updates,
    settle,
    start_tracker,
    wait_for_device,
)

from posthoc_cli.profiles.tracked import WINDOW
from posthoc_cli.synthesis.engine import check_device

PACKAGES = ("ema-pytorch", "pytorch-posthoc-ema", "diffusers")
STEPS_BETWEEN_UPDATES = 10
CALLS_BETWEEN_CHECKPOINTS = 4
WHOLE_RUN, PARTS, UPDATES_OF_A_PART = 100_000, 16, 2 * WINDOW

SMALL_TRANSFORMER = TransformerSize(width=256, layers=4, batch=16, tokens=64, steps=20)  # 3 M, for two cores
LARGE_TRANSFORMER = TransformerSize(width=768, layers=14, batch=16, tokens=512, steps=100)  # 99 M parameters
TINY_TRANSFORMER = TransformerSize(width=16, layers=1, batch=2, tokens=4, steps=10)


@dataclass(frozen=True)
class Sizes:
    """What is measured: tensors, parameters, updates of a run, training, and how often."""

    small: int = 2_000
    parameters: int = 50_000_000
    updates: int = 7 * WINDOW
    parts: int = PARTS
    repeats: int = 5
    least_checkpoints: int = 5
    layers: int = 1_000
    processes: int | None = None  # busy ones; None for twice as many as there are cores
    transformer: TransformerSize = SMALL_TRANSFORMER
    accelerated: TransformerSize = LARGE_TRANSFORMER


QUICK = Sizes(20, 50_000, WINDOW, 1, 1, 1, 10, 1, TINY_TRANSFORMER, TINY_TRANSFORMER)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print the tables and the goals."""
    options = _parser().parse_args(arguments)
    sizes = QUICK if options.quick else Sizes(repeats=options.repeats)
    device = _device(options.device)
    print(_setting(device))
    if device == "cpu":
        print("accelerators: not run; --device cuda prints the same tables there, and what the hook takes of memory")
    report = Report(sizes.repeats)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.busy:
            measure_beside_others(report, folder, sizes, device)
        else:
            measure_alone(report, folder, sizes, device)
    print("\nGoals:")
    print("\n".join(report.goals))


def measure_alone(report: Report, folder: Path, sizes: Sizes, device: str) -> None:
    """Everything on a quiet machine."""
    many, large = small_tensors(sizes.small), large_tensors(sizes.parameters, 24)
    columns = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shapes, what in ((many, "of 64 x 64"), (large, f"of {sizes.parameters / 1e6:.3g} M parameters")):
            title = f"{len(shapes):,} tensors {what}, {_short(dtype)}"
            found = compare_updates(report, folder, shapes, title, dtype, device, sizes.updates)
            judge_updates(report, title, found, shapes is many, dtype)
            columns[title] = {who.label: who_times for who, who_times in found} | {
                f"ours, a whole run of {WHOLE_RUN:,} steps, update_every={every}": whole_run(
                    folder, shapes, dtype, device, every, sizes.parts
                )
                for every in (1, STEPS_BETWEEN_UPDATES)
            }
    for where in our_places(device):
        measure_checkpoint(report, folder, large, device, where, sizes.least_checkpoints)
    size = sizes.transformer if device == "cpu" else sizes.accelerated
    measure_training(report, folder, size, device)
    if device != "cpu":
        measure_memory(report, folder, size, device)
    print(f"\n| mean, and the longest single one | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * len(columns)}")
    for label in dict.fromkeys(label for column in columns.values() for label in column):
        cells = (str(column.get(label, "")) for column in columns.values())
        print(f"| {label} | {' | '.join(cells)} |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What the hook costs training, beside what others' hooks cost.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the models are")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement; checkpoints at least 5")
    parser.add_argument("--folder", type=Path, help="for snapshots of up to 5 GB; by default the system's own")
    parser.add_argument("--busy", action="store_true", help="only updates, on a quiet machine and on a busy one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    return parser


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        print("cuda: torch finds none on this machine; the models are on the CPU")
        return "cpu"
    return str(check_device(wanted))


def _setting(device: str) -> str:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    where = device if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"models on {where}; {', '.join(versions)}"
    )


# --- updates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """An update's mean seconds in each run, and the longest single one of all."""

    runs: Seconds
    worst: float

    def __str__(self) -> str:
        return f"{_rounded(self.runs.median)} ({_rounded(self.worst)}) ms"


Found = list[tuple[Contender, Times]]


def measure_beside_others(report: Report, folder: Path, sizes: Sizes, device: str) -> None:
    """An update of ours beside both peers', quiet and busy."""
    cases: list[tuple[str, Shapes, float]] = [
        (f"{sizes.layers:,} layers of 64 x 64 with biases", small_layers(sizes.layers), 0.42),
        (f"{sizes.parameters / 1e6:.3g} M parameters in 24", large_tensors(sizes.parameters, 24), 1.0),
    ]
    field = [who for who in contenders(torch.float32, device) if who.role in ("ours", "PyPI peer")]
    for busy in (False, True):
        with busy_machine(sizes.processes) if busy else nullcontext():
            for model, shapes, quiet_limit in cases:
                title = f"{model}, {'busy' if busy else 'quiet'}"
                print(f"\n{load_text()}", end="")
                found = compare_updates(report, folder, shapes, title, torch.float32, device, WINDOW, field, busy)
                _judge(
                    report, f"{title}: in times of the faster peer", _ours(found), found, 0.4 if busy else quiet_limit
                )


def judge_updates(report: Report, title: str, found: Found, is_many: bool, dtype: torch.dtype) -> None:
    """The goals for ours beside the faster peer."""
    if is_many:
        _judge(report, f"{title}: in times of the faster peer", _ours(found), found, 0.42)
        return
    limit = 1.0 if dtype == torch.float32 else 1.3
    _judge(report, f"{title}, late in a run: in times of the faster peer", _ours(found), found, limit)
    _judge(report, f"{title}, at the beginning: in times of the faster peer", _ours(found, True), found, 1.4)


def _judge(report: Report, what: str, ours: Seconds, found: Found, limit: float) -> None:
    peers = [times.runs for who, times in found if who.role == "PyPI peer"]
    best = min(runs.median for runs in peers)
    report.goal(what, ours.median / best, limit, [ours, *peers])


def _ours(found: Found, begins: bool = False) -> Seconds:
    """Ours with its averages where most others have theirs, beside the parameters: late in a run or as it begins."""
    ours = [times.runs for who, times in found if who.role == "ours"]
    return ours[len(ours) // 2 - 1] if begins else ours[-1]


def compare_updates(
    report: Report, folder: Path, shapes: Shapes, title: str, dtype: torch.dtype, device: str, calls: int,
    field: Sequence[Contender] | None = None, busy: bool = False,
) -> Found:  # fmt: skip
    """A table: one update of everyone in the field, or of all, who is installed."""
    parameters = _parameters(shapes)
    print(f"\nOne update of two averages: {title} ({parameters:,} parameters) on {device}")
    begun: list[tuple[Contender, Updates]] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for index, who in enumerate(contenders(dtype, device) if field is None else field):
            if not who.installed:
                print(f"  {who.label:<36}not installed")
                continue
            updates = who.start(Layers(shapes).to(device, dtype), Path(name) / str(index))
            _timed_calls(updates, 2)  # makes the averages
            begun.append((who, updates))
        single: list[list[float]] = [[] for _ in begun]
        runs = [
            lambda updates=updates, own=own: own.extend(_timed_calls(updates, calls))
            for (_, updates), own in zip(begun, single, strict=True)
        ]
        times = take_turns([*runs], report.repeats, busy=busy)
        for _, updates in begun:
            updates.close()
    found = []
    for (who, _), run, own in zip(begun, times, single, strict=True):
        each = Seconds(tuple(seconds / calls for seconds in run.runs), run.contended)
        average = who.average_dtype or dtype
        nbytes = parameters * (dtype.itemsize + 2 * len(TRACKED) * average.itemsize)
        rate = f"{nbytes / 1e6:8.1f} MB {nbytes / each.median / 1e9:7.2f} GB/s, at worst {1000 * max(own):.2f} ms"
        print(f"  {who.label:<36}{_short(average):<9}{_milliseconds(each)}  {rate}{each.mark}", flush=True)
        found.append((who, Times(each, max(own))))
    del begun, updates, times, runs
    gc.collect()
    return found


def whole_run(folder: Path, shapes: Shapes, dtype: torch.dtype, device: str, every: int, parts: int) -> Times:
    """An update of ours over a whole run with snapshots left out, of the middle of each of its parts."""
    count = WHOLE_RUN // every

    def clock() -> Iterator[float]:
        for part in range(parts):
            first = int((part + 0.5) * count / parts)
            yield from (float(every * (first + k)) for k in range(UPDATES_OF_A_PART + 1))

    with tempfile.TemporaryDirectory(dir=folder) as name:
        model = Layers(shapes).to(device, dtype)
        updates = our_updates(model, Path(name) / "run", our_places(device)[-1], clock())
        # The first update of a part comes after a leap of time.
        found = [second for _ in range(parts) for second in _timed_calls(updates, UPDATES_OF_A_PART + 1)[1:]]
        updates.close()
    return Times(Seconds((statistics.fmean(found),), 0), max(found))


def _timed_calls(updates: Updates, calls: int) -> list[float]:
    """The seconds of each of so many updates; returns when all is done, which the last one is charged for."""
    times = [time.perf_counter()]
    for _ in range(calls):
        updates.update()
        times.append(time.perf_counter())
    updates.settle()
    times[-1] = time.perf_counter()
    return [end - begin for begin, end in pairwise(times)]


def _parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounded(seconds: float) -> str:
    return f"{1000 * seconds:.{0 if seconds > 0.0095 else 1}f}"


def _milliseconds(seconds: Seconds) -> str:
    low, middle, high = (f"{1000 * x:.2f}" for x in (min(seconds.runs), seconds.median, max(seconds.runs)))
    return f"{middle:>9} ms  {f'({low} to {high})':<22}"


# --- a checkpoint ----------------------------------------------------------------------------------


def measure_checkpoint(
    report: Report, folder: Path, shapes: Shapes, device: str, where: str | None, least: int
) -> None:
    """How long snapshots of two profiles keep training from going on, and how long they take to be durable."""
    parameters = _parameters(shapes)
    label = f"checkpoint of {parameters / 1e6:.3g} M parameters, {our_label(where)}"
    print(f"\nA {label}: 2 float16 snapshots, {4 * parameters / 1e6:.0f} MB, on {device}")
    found: list[list[float]] = [[], [], [], []]
    usual, due, both, durable = found
    with tempfile.TemporaryDirectory(dir=folder) as name:
        model = Layers(shapes).to(device)
        tracker = start_tracker(model, Path(name) / "run", where, 1, CALLS_BETWEEN_CHECKPOINTS)

        def call() -> float:
            started = time.perf_counter()
            tracker.update_(model)
            return time.perf_counter() - started

        def complete(times: list[float], calls: int) -> None:
            """Some usual updates, the one at which snapshots are due, and what comes at once."""
            while tracker.step % CALLS_BETWEEN_CHECKPOINTS < CALLS_BETWEEN_CHECKPOINTS - 1:
                usual.append(call())
                settle(tracker, device)
            started = time.perf_counter()
            times.append(sum(call() for _ in range(calls)))
            settle(tracker, device)
            if calls == 1:
                durable.append(time.perf_counter() - started)

        complete(due, 1)  # the first call makes the averages, the first checkpoint has none to measure a distance from
        for times in found:
            times.clear()
        copy = [Path(name) / "plain"]
        runs: list[Callable[[], object]] = [
            partial(complete, due, 1), partial(complete, both, 2), lambda: write_plainly(copy, 4 * parameters),
        ]  # fmt: skip
        # What is still being written would be a neighbour.
        waited, went_on, plain = take_turns(runs, max(report.repeats, least), before=os.sync)
        tracker.close()
    update = statistics.median(usual)
    stall, until_durable = _beyond(update, due, waited), _beyond(update, durable, waited)
    stall_of_two = _beyond(2 * update, both, went_on)
    for what, seconds in (
        ("a usual update", Seconds(tuple(usual), waited.contended)),
        ("the call at which it is due, beyond that", stall),
        ("this call and the next one, beyond two", stall_of_two),
        ("until it is durable, beyond one", until_durable),
        ("writing and fsyncing as many bytes, plainly", plain),
    ):
        print(f"  {what:<45}{_milliseconds(seconds)}{seconds.mark}", flush=True)
    for what, seconds in (("stall", stall), ("stall of that call and the next", stall_of_two)):
        share = 100 * seconds.median / until_durable.median
        report.goal(f"{label}: {what} in % of the time to durable", share, 10, [seconds, until_durable])


def _beyond(usual: float, found: Sequence[float], timed: Seconds) -> Seconds:
    return Seconds(tuple(seconds - usual for seconds in found), timed.contended)


# --- training --------------------------------------------------------------------------------------


def measure_training(report: Report, folder: Path, size: TransformerSize, device: str) -> None:
    """Training steps of a transformer, with and without the hook."""
    plain = Training(size, device)
    variants: dict[str, Callable[[int], None]] = {"without the hook": plain.steps}
    trackers = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for where in our_places(device):
            for way in ("attach", "update_"):
                training = Training(size, device)
                run = Path(name) / str(len(trackers))
                tracker = start_tracker(training.model, run, where, STEPS_BETWEEN_UPDATES, NEVER)
                trackers.append(tracker)
                if way == "attach":
                    tracker.attach(training.optimizer)
                    train = training.steps
                else:
                    train = partial(training.steps, after_each=partial(tracker.update_, training.model))
                variants[f"{our_label(where)}, {way}"] = train

        def finish() -> None:
            for tracker in trackers:
                settle(tracker, device)

        for train in variants.values():
            train(STEPS_BETWEEN_UPDATES + STEPS_BETWEEN_UPDATES // 2)
        times = take_turns([partial(train, size.steps) for train in variants.values()], report.repeats, finish)
        finish()
        for tracker in trackers:
            tracker.close()
    print(
        f"\nA step of a transformer of {plain.parameters:,} parameters on {device}, "
        f"update_every={STEPS_BETWEEN_UPDATES}"
    )
    _print_shares(report, list(variants), times, size.steps, device)


def _print_shares(report: Report, labels: Sequence[str], times: Sequence[Seconds], steps: int, device: str) -> None:
    without = times[0]
    for label, run in zip(labels, times, strict=True):
        each = Seconds(tuple(seconds / steps for seconds in run.runs), run.contended)
        share = 100 * statistics.median(
            with_hook / plain - 1 for with_hook, plain in zip(run.runs, without.runs, strict=True)
        )
        shown = "" if run is without else f"  {share:+.2f} %"
        print(f"  {label:<45}{_milliseconds(each)}{shown}{each.mark}", flush=True)
        if run is not without and device != "cpu" and "'model'" not in label:
            report.goal(f"{label}: % of a step", share, 1, [run, without])


def measure_memory(report: Report, folder: Path, size: TransformerSize, device: str) -> None:
    """What the hook takes of an accelerator's memory beyond the model, at its peak, a checkpoint included."""
    print(f"\nMost memory on {device} beyond the model, in staging buffers of all parameters")
    for where in our_places(device):
        gc.collect()  # what is freed meanwhile would be missed
        with tempfile.TemporaryDirectory(dir=folder) as name:
            extra, buffer = _extra_memory(Path(name), Training(size, device).model, device, where)
        print(f"  {our_label(where):<36}{extra / 1e6:9.1f} MB, {extra / buffer:.2f} buffers", flush=True)
        if where != "model":
            report.goal(f"{our_label(where)}: memory in staging buffers", extra / buffer, 1.01, [])


def _extra_memory(folder: Path, model: torch.nn.Module, device: str, where: str | None) -> tuple[int, int]:
    """Bytes at the peak beyond the model, and of its parameters."""
    wait_for_device(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with start_tracker(model, folder, where, 1, CALLS_BETWEEN_CHECKPOINTS) as tracker:
        for _ in range(2 * CALLS_BETWEEN_CHECKPOINTS):
            tracker.update_(model)
        settle(tracker, device)
        extra = torch.cuda.max_memory_allocated(device) - before
    return extra, sum(parameter.nbytes for parameter in model.parameters())


if __name__ == "__main__":
    main()
