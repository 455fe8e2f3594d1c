"""Limit the threads of numerical libraries: on a busy machine small operations should not wait for a pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from threadpoolctl import ThreadpoolController


def take_one_openmp_thread() -> None:
    """Limit OpenMP to one thread for the calling thread, from now on."""
    _openmp().limit(limits=1)


@lru_cache
def _openmp() -> ThreadpoolController:
    """The libraries with OpenMP, which must have been imported; looking for them takes 10 ms."""
    return ThreadpoolController().select(user_api="openmp")


@lru_cache
def _openblas() -> ThreadpoolController:
    """NumPy's and SciPy's libraries, which must have been imported. Not MKL, which torch uses, too."""
    return ThreadpoolController().select(internal_api="openblas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit NumPy's and SciPy's linear algebra to one thread within the block: for many small problems.

    It is a setting of the process, and so limits other threads, too. A command sets OPENBLAS_NUM_THREADS instead, which
    holds for all its solves; that is read when NumPy is first imported, and not a library's to set.
    """
    with _openblas().limit(limits=1):
        yield
