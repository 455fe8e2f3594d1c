"""Measure the requests, speed and memory of a synthesis from an object store.

    python scripts/bench_remote.py s3://bucket/run [--rounds 5] [--sigma-rel 0.15]
    python scripts/bench_remote.py --quick

In turns: a synthesis whose results are discarded, and the same requests by obstore alone from as
many threads. The environment names the store; --quick serves a small run from this process. Memory
is the largest resident size minus that after `import torch`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.remote import store
from posthoc_cli.synthesis.engine import REQUESTS, cut_tiles, make_tiles

PAGE = os.sysconf("SC_PAGE_SIZE")
CPU = torch.device("cpu")


def resident() -> int:
    """Return this process's resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


IMPORTED = resident()


class Discarded:
    """An output that discards its tiles."""

    def write(self, tile: Any, values: Any) -> None: ...


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sigma-rel", default="0.15", help="several with commas")
    parser.add_argument(
        "--quick", action="store_true", help="measure a small run on a server in this process"
    )
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        url = stack.enter_context(served()) if options.quick else options.run
        measure(
            Run(url),
            [float(width) for width in options.sigma_rel.split(",")],
            1 if options.quick else options.rounds,
        )


def measure(run: Run, targets: list[float], rounds: int) -> None:
    """Print the times of a synthesis and of obstore alone, in turns."""
    plan = run.plan(targets)
    parts = plan.passes()
    tiles = cut_tiles(parts, len(targets), CPU)
    requests = list[tuple[str, int, int]]()
    peak = [0]
    get = store.get
    ended = threading.Event()
    outputs = [Discarded()] * len(targets)

    def counted(url: str, begin: int, end: int, tag: str = "") -> Any:
        requests.append((url, begin, end))
        return get(url, begin, end, tag)

    def watch() -> None:
        while not ended.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    print(
        "| requests | MB | synthesis | obstore alone | rate | processor time | memory above torch |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    try:
        for _ in range(rounds):
            requests.clear()
            peak[0], store.get = 0, counted
            ours, own = timed(lambda: [None for _ in make_tiles(parts, tiles, outputs, CPU)])
            memory = peak[0] - IMPORTED
            store.get = get
            alone, theirs = timed(
                lambda: fetch(requests, REQUESTS * (1 if len(targets) == 1 else 4))
            )
            times = (
                f"{ours:.2f} s | {alone:.2f} s | {alone / ours:.2f} | {own:.2f} s, {theirs:.2f} s"
            )
            megabytes = sum(end - begin for _, begin, end in requests) / 1e6
            print(
                f"| {len(requests):,} | {megabytes:,.0f} | {times} | {memory / 1e6:.0f} MB |",
                flush=True,
            )
    finally:
        store.get = get
        ended.set()
        watcher.join()


def timed(call: Any) -> tuple[float, float]:
    """Return the seconds and processor time of a call."""
    began = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def fetch(requests: Sequence[tuple[str, int, int]], threads: int) -> None:
    """Make the same requests by obstore alone."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda request: len(store.get(*request)[0]), requests))


def served() -> Any:
    """Return a context that serves a small run from this process, and yields its URL."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/remote"))
    from servers import serving_as_s3

    folder = Path(tempfile.mkdtemp()) / "bucket"
    folder.mkdir()
    model = torch.nn.Linear(700, 700)
    with PostHocEMA.from_model(model, folder / "run", update_every=1, checkpoint_every=10) as ema:
        for _ in range(30):
            ema.update_(model)
    return serving_as_s3(folder.parent)


if __name__ == "__main__":
    main()
