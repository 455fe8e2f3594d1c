"""Threads that make tiles, each with rooms of its own, a few tiles at a time and in order."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from posthoc_cli.synthesis.making import Maker, Placement, Stopped, caller_event
from posthoc_cli.synthesis.tiles import Tile

MAX_WORKERS = 16
"""Threads at most: beyond, the memory bus is full, and Python's own lock is in the way."""


def worker_count(wanted: int | None = None) -> int:
    """Threads to work with: as many as this process has cores, up to MAX_WORKERS."""
    if wanted is not None:
        return max(1, wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def make_tiles(
    tiles: Iterable[Tile],
    open_placement: Callable[[Tile], Placement],
    new_maker: Callable[[], Maker],
    workers: int,
    device: torch.device,
) -> Generator[Tile, None, None]:
    """Make tiles with `workers` threads; yields each when it and all before it are made.

    No more than two tiles a worker are under way. Whatever ends the iteration, an error in a thread, Ctrl-C or a
    caller that goes away, stops every thread within a chunk before anything else happens.

    Arguments:
        tiles: the work.
        open_placement: where the results of a tile go; called here, in order.
        new_maker: called once a thread, in it.
        workers: threads.
        device: where the makers work; they wait for what the caller's stream there does up to the opening of a tile.
    """
    own, stop = threading.local(), threading.Event()
    threads = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(1)  # for this thread: the tiles themselves are what runs side by side

    def work(tile: Tile, placement: Placement, opened: Any) -> Tile:
        with torch.inference_mode(False), torch.no_grad():
            try:
                if not hasattr(own, "maker"):
                    own.maker = new_maker()
                own.maker.make(tile, placement, stop, opened)
            except BaseException:
                stop.set()
                raise
        return tile

    waiting: deque[Future[Tile]] = deque()
    with ThreadPoolExecutor(workers, "ema-synthesis", begin) as pool:
        try:
            for tile in tiles:
                waiting.append(pool.submit(work, tile, open_placement(tile), caller_event(device)))
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except Stopped:
            raise _first_error(waiting) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)  # also what threads that begin later will take


def _first_error(waiting: Iterable[Future[Tile]]) -> BaseException:
    """What made the others stop."""
    for future in waiting:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, Stopped):
            return error
    return RuntimeError("a synthesis was stopped without a reason")
