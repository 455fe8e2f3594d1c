"""How many threads libraries beneath take: on a busy machine small operations should not wait for a pool of them."""

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


def take_one_openmp_thread() -> None:
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
                self._limiter = _openblas().limit(limits=1)

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._limiter is not None:
                self._limiter.restore_original_limits()


_limit = _Limit()


@lru_cache
def _openblas() -> ThreadpoolController:
    """NumPy's and SciPy's own, which must have been imported. MKL is left alone: it is torch's as well."""
    return ThreadpoolController().select(internal_api="openblas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """NumPy's and SciPy's linear algebra in one thread within the block: for many small problems.

    It is a setting of the process: other threads' linear algebra takes one thread meanwhile, too.
    """
    _limit.begin()
    try:
        yield
    finally:
        _limit.end()
