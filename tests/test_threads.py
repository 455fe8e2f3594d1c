"""Linear algebra uses one BLAS thread for small problems, and the thread count is restored afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import scipy.linalg  # noqa: F401  # which loads an OpenBLAS other than NumPy's
from threadpoolctl import ThreadpoolController

from posthoc_cli.planning import proposals, propose, schedule, snapshots_to_drop
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import assumed_prior, one_blas_thread


def blas_threads() -> set[int]:
    """Numbers of threads of NumPy's and SciPy's OpenBLAS; other packages' libraries are ignored."""
    libraries = ThreadpoolController().info()
    return {library["num_threads"] for library in libraries if "scipy_openblas" in library["filepath"]}


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    with ThreadpoolController().limit(limits=3, user_api="blas"):
        if blas_threads() != {3}:
            pytest.skip("needs an OpenBLAS with threads")
        yield


def test_blas_has_one_thread_in_a_block_and_as_many_as_before_afterwards() -> None:
    """Also if blocks overlap, in one thread or in two."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with one_blas_thread():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with pytest.raises(ZeroDivisionError), one_blas_thread():
        thread.start()
        inside.wait(60)
        with one_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {1}
        raise ZeroDivisionError
    leave.set()
    thread.join()
    assert blas_threads() == {3}


def test_planning_and_thinning_use_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    for module, name in ((schedule, "losses_of"), (proposals, "forecast")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: (seen.append(blas_threads()), real(*a, **k))[1])
    propose(100, 10)
    snapshots = [PowerFunction.from_sigma_rel(0.1, float(t)) for t in range(1, 6)]
    assert snapshots_to_drop(snapshots, assumed_prior(snapshots, 1e-4), 4)
    assert len(seen) > 2
    assert all(threads == {1} for threads in seen)
    assert blas_threads() == {3}
