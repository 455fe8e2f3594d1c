"""What the hook costs training: an update beside those of others, the stall of a checkpoint, the share of a step.

    python scripts/bench_update.py [--device cpu] [--repeats 5] [--folder FOLDER] [--quick]
    python scripts/bench_update.py --busy [--repeats 5]

All runs keep two averages. Ours and both PyPI peers track sigma_rel 0.05 and 0.28; the others know one classical
average at a time and are run twice. Everyone has a copy of the same model and is asked for an update after every step,
through public interfaces, with torch's own number of threads. Ours does all its checks: names, shapes, dtypes and
finiteness. Runs that are compared take turns, each in a quiet moment, and what was contended decides nothing; see
`quiet_timing`. Times are medians, with the range, of one update: each run is as many updates, one after the other, as
last half a second. Where a call only begins an update, a run ends when all of it is done.

**The bytes once** is a plain pass over what no update of float32 averages can do without: the parameters are read
(`torch.linalg.vector_norm` over a flat copy of them) and both averages are read and written (`mul_` in place of two
flat tensors). An update needs the parameters beside each average, so that this is a limit, not another way. GB/s counts
the same bytes for everyone, in the dtype of their averages: parameters once, averages twice.

**Plain float32 lerp** is the arithmetic of float32 averages that each update changes in place, in the same blocks and
with the same check for nan. Such averages stop moving in long runs: see `tracker/averages.py`. There ours updates one
mean for all profiles, which goes into the averages at each 32nd update: so all runs are of multiples of 32 updates, and
"at worst" is the longest single one. At the beginning of a run it does at each. The rows with t = 1,000,000 are
of a long run; goals are for them where nothing else is said.

**bfloat16 parameters.** Ours keeps float32 averages. Most others keep theirs in the parameters' dtype: half the
bytes, and at a decay of 0.9999 such an average hardly moves. Where "best of all" is asked for, only those count that
average in float32; some others can be told to.

**A checkpoint** stalls training for the time that the call at which snapshots are due takes beyond a usual update;
the call after it may have to wait, too. "Durable" is from the beginning of the first call until all is written and
fsynced, also beyond a usual update. While writing is synchronous, the two are the same.

**The share of a step** is the median, over turns, of what a run of training with the hook takes more than one
without, at update_every=10. Updates lie in the middle between the ends of a run, so that what the hook makes a later
step wait for is counted; what a worker has left to do when a run ends is not: it is waited for before the next run.

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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
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
    settle,
    start_tracker,
    wait_for_device,
)

from posthoc_cli.profiles.tracked import WINDOW
from posthoc_cli.synthesis.engine import parse_device

PACKAGES = ("ema-pytorch", "pytorch-posthoc-ema", "diffusers")
STEPS_BETWEEN_UPDATES = 10
CALLS_BETWEEN_CHECKPOINTS = 4

SMALL_TRANSFORMER = TransformerSize(width=256, layers=4, batch=16, tokens=64, steps=20)
"""3 M parameters: what two cores can train."""

LARGE_TRANSFORMER = TransformerSize(width=768, layers=14, batch=16, tokens=512, steps=100)
"""99 M parameters."""

TINY_TRANSFORMER = TransformerSize(width=16, layers=1, batch=2, tokens=4, steps=10)


@dataclass(frozen=True)
class Sizes:
    """What is measured: tensors, parameters, training, and how often."""

    small: int = 2_000
    parameters: int = 50_000_000
    seconds: float = 0.5
    repeats: int = 5
    least_checkpoints: int = 5
    layers: int = 1_000
    processes: int | None = None
    """Busy ones; None for twice as many as there are cores."""
    transformer: TransformerSize = SMALL_TRANSFORMER
    accelerated: TransformerSize = LARGE_TRANSFORMER


QUICK = Sizes(20, 50_000, 0.0, 1, 1, 10, 1, TINY_TRANSFORMER, TINY_TRANSFORMER)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print the tables and the goals."""
    options = _parser().parse_args(arguments)
    sizes = QUICK if options.quick else Sizes(repeats=options.repeats)
    device = _device(options.device)
    print(_setting(device))
    if device == "cpu":
        print(
            "accelerators: not run; --device cuda prints the same tables there, and what the hook takes of its memory"
        )
    report = Report(sizes.repeats)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.busy:
            measure_beside_others(report, folder, sizes, device)
            print("\nGoals:")
            print("\n".join(report.goals))
            return
        many, large = small_tensors(sizes.small), large_tensors(sizes.parameters, 24)
        for dtype in (torch.float32, torch.bfloat16):
            measure_many(report, folder, many, dtype, device, sizes.seconds)
            measure_large(report, folder, large, dtype, device, sizes.seconds)
        for where in our_places(device):
            measure_checkpoint(report, folder, large, device, where, sizes.least_checkpoints)
        size = sizes.transformer if device == "cpu" else sizes.accelerated
        measure_training(report, folder, size, device)
        if device != "cpu":
            measure_memory(report, folder, size, device)
    print("\nGoals:")
    print("\n".join(report.goals))


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
    return parse_device(wanted)


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


# --- on a busy machine -----------------------------------------------------------------------------


def measure_beside_others(report: Report, folder: Path, sizes: Sizes, device: str) -> None:
    """An update of ours beside both peers', quiet and busy."""
    cases: list[tuple[str, Shapes, float, float]] = [
        (f"{sizes.layers:,} layers of 64 x 64 with biases", small_layers(sizes.layers), 0.4, 0.5),
        (f"{sizes.parameters / 1e6:.3g} M parameters in 24", large_tensors(sizes.parameters, 24), 1.0, 1.3),
    ]
    dtype = torch.float32
    field = [who for who in contenders(dtype, device) if who.role in ("ours", "PyPI peer")]
    for busy in (False, True):
        with busy_machine(sizes.processes) if busy else nullcontext():
            for what, shapes, quiet_limit, busy_limit in cases:
                title = f"{what}, {'busy' if busy else 'quiet'}"
                print(f"\n{load_text()}", end="")
                found = compare_updates(
                    report, folder, shapes, title, torch.float32, device, sizes.seconds, field, busy
                )
                _, best = _fastest([(who, times) for who, times in found if who.role == "PyPI peer"])
                ours, limit = _ours_beside(found), busy_limit if busy else quiet_limit
                rests_on = [times for _, times in found]
                report.goal(f"{title}: in times of the faster peer", ours.median / best.median, limit, rests_on)


# --- one update ------------------------------------------------------------------------------------


def measure_many(report: Report, folder: Path, shapes: Shapes, dtype: torch.dtype, device: str, seconds: float) -> None:
    """Many small tensors: ours beside both peers."""
    title = f"{len(shapes):,} tensors of 64 x 64, {_short(dtype)}"
    found = compare_updates(report, folder, shapes, title, dtype, device, seconds)
    peers = [(who, times) for who, times in found if who.role == "PyPI peer"]
    _, best = _fastest(peers)
    ours = _ours_beside(found)
    rests_on = [ours, *(times for _, times in peers)]
    report.goal(f"{title}: in times of the faster peer", ours.median / best.median, 0.42, rests_on)


def measure_large(
    report: Report, folder: Path, shapes: Shapes, dtype: torch.dtype, device: str, seconds: float
) -> None:
    """Few large tensors: ours beside everyone, and beside the bytes once."""
    title = f"{_parameters(shapes) / 1e6:.3g} M parameters in {len(shapes)}, {_short(dtype)}"
    found = compare_updates(report, folder, shapes, title, dtype, device, seconds)
    ours = _ours_beside(found)
    others = [
        (who, times)
        for who, times in found
        if who.role in ("PyPI peer", "other") and (who.average_dtype or dtype) == torch.float32
    ]
    who, best = _fastest(others)
    rests_on = [ours, *(times for _, times in others)]
    report.goal(f"{title}: in times of the best of all ({who.label})", ours.median / best.median, 1, rests_on)
    begun = _ours_beside(found, begins=True)
    rests_on = [begun, *(times for _, times in others)]
    report.goal(f"{title}, at the beginning: in times of the best of all", begun.median / best.median, 1.4, rests_on)
    (lerp,) = (times for who, times in found if who.role == "lerp")
    report.goal(f"{title}: in times of plain float32 averages", ours.median / lerp.median, 1.3, [ours, lerp])
    (plain,) = (times for who, times in found if who.role == "plain")
    report.goal(f"{title}: in times of the bytes once", ours.median / plain.median, 1.3, [ours, plain])


def compare_updates(
    report: Report,
    folder: Path,
    shapes: Shapes,
    title: str,
    dtype: torch.dtype,
    device: str,
    seconds: float,
    field: Sequence[Contender] | None = None,
    busy: bool = False,
) -> list[tuple[Contender, Seconds]]:
    """A table: one update of everyone in the field, or of all, who is installed."""
    parameters = _parameters(shapes)
    print(f"\nOne update of two averages: {title} ({parameters:,} parameters) on {device}")
    begun: list[tuple[Contender, Updates, int]] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for index, who in enumerate(contenders(dtype, device) if field is None else field):
            if not who.installed:
                print(f"  {who.label:<36}not installed")
                continue
            updates = who.start(Layers(shapes).to(device, dtype), Path(name) / str(index))
            begun.append((who, updates, _calls_that_last(updates, seconds)))
        single: list[list[float]] = [[] for _ in begun]
        runs = [_repeated(updates, calls, own) for (_, updates, calls), own in zip(begun, single, strict=True)]
        times = take_turns(runs, report.repeats, busy=busy)
        for _, updates, _ in begun:
            updates.close()
    found = []
    for (who, _, calls), run, own in zip(begun, times, single, strict=True):
        each = Seconds(tuple(seconds / calls for seconds in run.runs), run.contended)
        average = who.average_dtype or dtype
        nbytes = parameters * (dtype.itemsize + 2 * len(TRACKED) * average.itemsize)
        rate = f"{nbytes / 1e6:8.1f} MB {nbytes / each.median / 1e9:7.2f} GB/s, at worst {1000 * max(own):.2f} ms"
        print(f"  {who.label:<36}{_short(average):<9}{_milliseconds(each)}  {rate}{each.mark}", flush=True)
        found.append((who, each))
    del begun, updates, times, runs
    gc.collect()
    return found


def _calls_that_last(updates: Updates, seconds: float) -> int:
    updates.update()  # makes the averages
    _repeated(updates, 1)()
    started = time.perf_counter()
    _repeated(updates, 1)()
    calls = max(1, min(1000, math.ceil(seconds / (time.perf_counter() - started))))
    return math.ceil(calls / WINDOW) * WINDOW


def _repeated(updates: Updates, calls: int, single: list[float] | None = None) -> Callable[[], None]:
    """So many updates; adds the seconds of each call to `single`."""

    def run() -> None:
        for _ in range(calls):
            started = time.perf_counter()
            updates.update()
            if single is not None:
                single.append(time.perf_counter() - started)
        updates.settle()

    return run


def _ours_beside(found: list[tuple[Contender, Seconds]], begins: bool = False) -> Seconds:
    """Ours with its averages where most others have theirs, beside the parameters: late in a run or as it begins."""
    ours = [times for who, times in found if who.role == "ours"]
    return ours[len(ours) // 2 - 1] if begins else ours[-1]


def _fastest(found: list[tuple[Contender, Seconds]]) -> tuple[Contender, Seconds]:
    return min(found, key=lambda pair: pair[1].median)


def _parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _milliseconds(seconds: Seconds) -> str:
    low, middle, high = (f"{1000 * x:.2f}" for x in (min(seconds.runs), seconds.median, max(seconds.runs)))
    return f"{middle:>9} ms  {f'({low} to {high})':<22}"


# --- a checkpoint ----------------------------------------------------------------------------------


class CheckpointRounds:
    """Rounds of some usual updates and one at which snapshots are due; keeps the seconds of each call.

    A round in which training goes on calls once more at once, and then waits.
    """

    def __init__(self, model: torch.nn.Module, folder: Path, device: str, where: str | None) -> None:
        self._tracker = start_tracker(model, folder, where, 1, CALLS_BETWEEN_CHECKPOINTS)
        self._model, self._device = model, device
        self.clear()

    def clear(self) -> None:
        """Forget the times."""
        self.usual: list[float] = []
        self.due: list[float] = []
        self.due_before_next: list[float] = []
        self.next: list[float] = []
        self.durable: list[float] = []

    def wait(self) -> None:
        """Complete one round."""
        self._usual(until=CALLS_BETWEEN_CHECKPOINTS - 1)
        started = time.perf_counter()
        self.due.append(self._call())
        settle(self._tracker, self._device)
        self.durable.append(time.perf_counter() - started)

    def go_on(self) -> None:
        """Complete one round in which training goes on."""
        self._usual(until=CALLS_BETWEEN_CHECKPOINTS - 1)
        self.due_before_next.append(self._call())
        self.next.append(self._call())
        settle(self._tracker, self._device)

    def close(self) -> None:
        """No more rounds."""
        self._tracker.close()

    def _usual(self, until: int) -> None:
        while self._tracker.step % CALLS_BETWEEN_CHECKPOINTS < until:
            self.usual.append(self._call())
            settle(self._tracker, self._device)

    def _call(self) -> float:
        started = time.perf_counter()
        self._tracker.update_(self._model)
        return time.perf_counter() - started


def measure_checkpoint(
    report: Report, folder: Path, shapes: Shapes, device: str, where: str | None, least: int
) -> None:
    """How long snapshots of two profiles keep training from going on, and how long they take to be durable."""
    parameters = _parameters(shapes)
    label = f"checkpoint of {parameters / 1e6:.3g} M parameters, {our_label(where)}"
    print(f"\nA {label}: 2 float16 snapshots, {4 * parameters / 1e6:.0f} MB, on {device}")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        rounds = CheckpointRounds(Layers(shapes).to(device), Path(name) / "run", device, where)
        rounds.wait()  # the first call makes the averages, the first checkpoint has none to measure a distance from
        rounds.clear()
        copy = [Path(name) / "plain"]
        runs: list[Callable[[], object]] = [rounds.wait, rounds.go_on, lambda: write_plainly(copy, 4 * parameters)]
        # What is still being written would be a neighbour.
        waited, went_on, plain = take_turns(runs, max(report.repeats, least), before=os.sync)
        rounds.close()
    usual = statistics.median(rounds.usual)
    stall = _beyond(usual, rounds.due, waited)
    both = [due + after - usual for due, after in zip(rounds.due_before_next, rounds.next, strict=True)]
    stall_of_two = _beyond(usual, both, went_on)
    durable = _beyond(usual, rounds.durable, waited)
    for what, seconds in (
        ("a usual update", Seconds(tuple(rounds.usual), waited.contended)),
        ("the call at which it is due, beyond that", stall),
        ("this call and the next one, beyond that", stall_of_two),
        ("until it is durable, beyond that", durable),
        ("writing and fsyncing as many bytes, plainly", plain),
    ):
        print(f"  {what:<45}{_milliseconds(seconds)}{seconds.mark}", flush=True)
    for what, seconds in (("stall", stall), ("stall of that call and the next", stall_of_two)):
        share = 100 * seconds.median / durable.median
        report.goal(f"{label}: {what} in % of the time to durable", share, 10, [seconds, durable])


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
