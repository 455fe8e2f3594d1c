"""Test and measure the package on one CUDA device, within 8 minutes.

    python scripts/gpu.py

It runs the tests marked `cuda`, measures the table below, and runs `bench_update.py` and
`bench_synthesis.py` with `--device cuda`; the table is printed last. It needs no network, and only
the package's own requirements: what else is missing is named, and left out.

The table: **stream** is the time that a call's work takes of the training's stream, measured by
events on a stream that is busy when the call is made, so that the time in which the host queues
work does not count. **Host** is the time until the call returns, on an idle stream. A call that
waits for the device has in "stream" also what the host does meanwhile. Medians of repeated calls,
each after all earlier work is done."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench_synthesis import exhaust, planned, write_snapshots  # noqa: E402
from bench_update import (  # noqa: E402
    NEVER,
    TRACKED,
    Layers,
    Shapes,
    is_installed,
    large_tensors,
    machine,
    small_tensors,
    tracker,
    wait_for_device,
)
from compare_peers import ema_pytorch, without_noise  # noqa: E402

from posthoc_cli import PostHocEMA, synthesize  # noqa: E402
from posthoc_cli.devices import streams_of  # noqa: E402

LIMIT = 450.0
"""Seconds in all, of the 480 that a card is lent for; a row that has begun is finished."""
PART_LIMIT = 110.0
"""Seconds for the tests, and for each benchmark; the table takes the rest."""
BUSY_CYCLES = 40_000_000
"""Of a GPU's clock, some 20 ms: longer than the host needs to queue an update of 2,000 tensors."""
OPTIONAL = ("pytest", "pytest_timeout", "pytest_randomly", "hypothesis", "ema_pytorch",
            "posthoc_ema")  # fmt: skip


@dataclass
class Row:
    """A line of the table: microseconds of the training's stream, None on the CPU, and of the
    host."""

    label: str
    stream: float | None
    host: float

    def __str__(self) -> str:
        stream = "" if self.stream is None else f"{self.stream:,.0f}"
        return f"| {self.label} | {stream} | {self.host:,.0f} |"


def main() -> None:
    """Run everything on the CUDA device, and print the table."""
    if not torch.cuda.is_available():
        sys.exit("gpu: no CUDA device is here, so nothing was run")
    end = time.monotonic() + LIMIT
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, {machine()}")
    for name in OPTIONAL:
        if not is_installed(name):
            print(f"{name} is not installed: what needs it is left out")
    is_passed = run_tests()
    rows = []
    for row in measure(device, 124_000_000, 2000, repeats=20, until=end - 2 * PART_LIMIT):
        print(row, flush=True)
        rows.append(row)
    for script in ("bench_update.py", "bench_synthesis.py"):
        run_benchmark(script, str(device))
    print(table(rows))
    sys.exit(0 if is_passed else 1)


def table(rows: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    head = "| microseconds | training's stream | host |\n| --- | ---: | ---: |"
    return "\n".join(["", head, *map(str, rows)])


# --- other programs


def run_tests() -> bool:
    """Run the tests marked `cuda`, and return whether none has failed."""
    if not is_installed("pytest"):
        print("the tests were not run")
        return True
    return run_program(cuda_tests()) == 0


def cuda_tests() -> list[str]:
    """Return the command for the tests marked `cuda`.

    Files without such tests are not collected, since they may need what is not installed. Options
    of the project's own that need a plug-in are left out, and another torch may have warnings of
    its own.
    """
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(path) for path in tests if "mark.cuda" in path.read_text()]
    plugins = [f"-pno:{name}" for name in ("randomly", "timeout", "xdist", "cov", "cacheprovider")]
    options = ["-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default"]
    return ["-m", "pytest", "-q", "-m", "cuda", *plugins, *options, *files]


def run_benchmark(script: str, device: str) -> None:
    """Run a benchmark once."""
    print(f"\n{script} --device {device}", flush=True)
    options = ["--device", device, "--repeats", "1"]
    if script == "bench_update.py":
        options += ["--folds", "1"]
    run_program([str(ROOT / "scripts" / script), *options])


def run_program(arguments: Sequence[str]) -> int | None:
    """Run Python with the package of this tree; return its exit code, or None if it took too
    long."""
    others = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{others}"}
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=PART_LIMIT).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {PART_LIMIT:.0f} s", flush=True)
        return None


# --- the table


def measure(
    device: torch.device,
    parameters: int,
    tensors: int,
    repeats: int,
    until: float,
) -> Iterator[Row]:
    """Measure the rows of the table, as far as there is time until `until` of the monotonic
    clock."""
    large = large_tensors(parameters, 150)
    models = {
        f"{parameters / 1e6:g} M parameters in 150 tensors": large,
        f"{tensors:,} tensors of 64 x 64": small_tensors(tensors),
    }
    for name, shapes in models.items():
        for place in ("model", "cpu"):
            if not is_late(until):
                yield from our_rows(name, shapes, device, place, repeats)
        if is_installed("ema_pytorch") and not is_late(until):
            yield Row(f"{name}: update of `ema_pytorch`", *peer_update(shapes, device, repeats))
    for place in dict.fromkeys(("cpu", str(device))):
        if not is_late(until):
            seconds = synthesis_seconds(large, place, max(1, repeats // 5))
            yield Row(f"one average of 20 snapshots, made on {place}", None, 1e6 * seconds)


def is_late(until: float) -> bool:
    """Return whether the time for measurements is over."""
    return time.monotonic() > until


def our_rows(
    name: str,
    shapes: Shapes,
    device: torch.device,
    place: str,
    repeats: int,
) -> Iterator[Row]:
    """Measure an update, one at which two snapshots are due, and averaged weights swapped in and
    out."""
    where = f'{name}, device="{place}"'
    few = max(1, repeats // 5)
    model = Layers(shapes).to(device)
    with tracker(model, place, checkpoint_every=NEVER) as ema:
        update = timed(lambda: ema.update_(model), ema.flush, device, repeats)
        yield Row(f"{where}: update", *update)
        entered, left = swap_seconds(ema, model, few)
        yield Row(f"{where}: averages swapped in", None, 1e6 * entered)
        yield Row(f"{where}: raw weights back", None, 1e6 * left)
    with tracker(model, place, checkpoint_every=1, max_checkpoints=2) as ema:
        due = timed(lambda: ema.update_(model), ema.flush, device, few)
        yield Row(f"{where}: update with two snapshots due", *due)


def peer_update(
    shapes: Shapes,
    device: torch.device,
    repeats: int,
) -> tuple[float | None, float]:
    """Measure an update of `ema_pytorch`, whose averages are on the model's device."""
    with tempfile.TemporaryDirectory() as folder, without_noise():
        library = ema_pytorch(Layers(shapes).to(device), Path(folder), 1, NEVER)
        return timed(library.update, lambda: None, device, repeats)


def timed(
    call: Callable[[], object],
    settle: Callable[[], object],
    device: torch.device,
    repeats: int,
) -> tuple[float | None, float]:
    """Return the medians, in microseconds, of the stream's time, None on the CPU, and the
    host's."""
    for _ in range(3):  # the first calls allocate
        call()
        settle()
    streams = list[float]()
    hosts = list[float]()
    for _ in range(repeats):
        finish(settle)
        began = time.perf_counter()
        call()
        hosts.append(1e6 * (time.perf_counter() - began))
        if streams_of(device):
            finish(settle)
            streams.append(stream_microseconds(call, device))
    finish(settle)
    stream = statistics.median(streams) if streams else None
    return stream, statistics.median(hosts)


def stream_microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Return how long a call's work takes of the current stream, which is kept busy while the work
    is queued."""
    module = streams_of(device)
    before = module.Event(enable_timing=True)
    after = module.Event(enable_timing=True)
    module._sleep(BUSY_CYCLES)
    before.record()
    call()
    after.record()
    wait_for_device()
    return 1e3 * before.elapsed_time(after)


def finish(settle: Callable[[], object]) -> None:
    """Wait for all work of the tracker and of the device."""
    settle()
    wait_for_device()


def swap_seconds(
    ema: PostHocEMA,
    model: torch.nn.Module,
    repeats: int,
) -> tuple[float, float]:
    """Return the seconds until a block of a tracked average begins, and until it has ended."""
    entering = list[float]()
    leaving = list[float]()
    for _ in range(repeats):
        finish(ema.flush)
        began = time.perf_counter()
        with ema.model(model, TRACKED[0]):
            finish(ema.flush)
            inside = time.perf_counter()
        finish(ema.flush)
        entering.append(inside - began)
        leaving.append(time.perf_counter() - inside)
    return statistics.median(entering), statistics.median(leaving)


def synthesis_seconds(shapes: Shapes, device: str, repeats: int) -> float:
    """Return the seconds that one average of 20 float16 snapshots takes, each tensor dropped."""
    seconds = list[float]()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_snapshots(run, shapes)
        plan = planned(run, [0.15])
        for _ in range(repeats + 1):  # the first one warms up
            began = time.perf_counter()
            exhaust(synthesize(plan, device))
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
