"""How many threads libraries beneath take: on a busy machine small operations should not wait for a pool of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from threadpoolctl import ThreadpoolController


def take_one_openmp_thread() -> None:
    """Have all that the calling thread asks OpenMP for done in itself, from now on; other threads are as before."""
    _openmp().limit(limits=1)


@lru_cache
def _openmp() -> ThreadpoolController:
    """Looks for libraries, which takes 10 ms: what uses OpenMP must have been imported."""
    return ThreadpoolController().select(user_api="openmp")


@lru_cache
def _openblas() -> ThreadpoolController:
    """NumPy's and SciPy's own, which must have been imported. MKL is left alone: it is torch's as well."""
    return ThreadpoolController().select(internal_api="openblas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """NumPy's and SciPy's linear algebra in one thread within the block: for many small problems.

    It is a setting of the process: other threads' linear algebra takes one thread meanwhile, too. The thread that comes
    first makes and undoes it.
    """
    with _openblas().limit(limits=1):
        yield
