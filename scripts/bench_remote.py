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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
    parser.add_argument("--quick", action="store_true", help="a small run, served by this process")
    options = parser.parse_args(arguments)
    targets = [float(width) for width in options.sigma_rel.split(",")]
    print(
        "| requests | MB | synthesis | obstore alone | rate | processor time | memory above torch |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    if options.quick:
        with served() as url:
            measure(Run(url), targets)
    else:
        for _ in range(options.rounds):
            measure(Run(options.run), targets)


Request = tuple[str, int, int]
"""A URL, and the range of its bytes."""


def measure(run: Run, targets: list[float]) -> None:
    """Print the times of a synthesis and then of obstore alone."""
    parts = run.plan(targets).passes()
    tiles = cut_tiles(parts, len(targets), CPU)
    outputs = [Discarded()] * len(targets)

    def synthesize() -> None:
        for _ in make_tiles(parts, tiles, outputs, CPU):
            pass

    with noted_requests() as requests, watched_memory() as peak:
        ours, own = timed(synthesize)
    threads = REQUESTS if len(targets) == 1 else 4 * REQUESTS
    alone, theirs = timed(lambda: fetch(requests, threads))
    megabytes = sum(end - begin for _, begin, end in requests) / 1e6
    cells = (
        f"{len(requests):,}",
        f"{megabytes:,.0f}",
        f"{ours:.2f} s",
        f"{alone:.2f} s",
        f"{alone / ours:.2f}",
        f"{own:.2f} s, {theirs:.2f} s",
        f"{(max(peak) - IMPORTED) / 1e6:.0f} MB",
    )
    print(f"| {' | '.join(cells)} |", flush=True)


@contextmanager
def noted_requests() -> Iterator[list[Request]]:
    """Yield the requests that a block makes."""
    requests = list[Request]()
    get = store.get

    def noted(url: str, begin: int, end: int, tag: str = "") -> Any:
        requests.append((url, begin, end))
        return get(url, begin, end, tag)

    store.get = noted
    yield requests
    store.get = get


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Yield the resident bytes that a thread reads every 5 ms in a block."""
    sizes = [resident()]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            sizes.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield sizes
    ended.set()
    watcher.join()


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds and processor time of a call."""
    began = time.perf_counter()
    used = time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - used


def fetch(requests: Sequence[Request], threads: int) -> None:
    """Make the same requests by obstore alone."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda request: store.get(*request), requests):
            pass


def served() -> Any:
    """Return a context that serves a small run from this process, and yields its URL."""
    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root / "tests/remote"))
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
