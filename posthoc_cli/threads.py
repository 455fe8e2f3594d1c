"""How many threads the libraries beneath take: small operations that wait for a pool of threads are slow on a busy machine.

No setting of torch is touched: it would be taken over by threads that begin later, and be seen by the training.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from threadpoolctl import ThreadpoolController, threadpool_limits

MAX_THREADS = 16
"""Threads of ours at most: beyond, the memory bus is full, and Python's own lock is in the way."""


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def take_one_thread() -> None:
    """Have all that the calling thread asks OpenMP for done in itself, from now on; other threads are as before."""
    _openmp().limit(limits=1)


@lru_cache
def _openmp() -> ThreadpoolController:
    """Looks for libraries, which takes 10 ms: what uses OpenMP must have been imported."""
    return ThreadpoolController().select(user_api="openmp")


class _Limit:
    """OpenBLAS in one thread while anybody wants it: the first limits it, and the last one lifts the limit."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come while its thread has it
        self._users = 0
        self._limiter: threadpool_limits | None = None

    def begin(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                # MKL is left alone, where it is torch's as well.
                self._limiter = ThreadpoolController().select(internal_api="openblas").limit(limits=1)

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._limiter is not None:
                self._limiter.restore_original_limits()


_limit = _Limit()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """NumPy's and SciPy's linear algebra in one thread within the block: for many small problems."""
    _limit.begin()
    try:
        yield
    finally:
        _limit.end()
