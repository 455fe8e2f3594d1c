"""Whether work beside the training keeps up with it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 10.0
"""Seconds that training has waited before it is told so."""


class Pace:
    """How long jobs take and how often they come; says once when training has to wait for them.

    Arguments:
        what: takes the time.
        option: of the tracker, that says how often.
        fitting: the value of the option with which jobs would come less often by at least a factor.
    """

    def __init__(self, what: str, option: str, fitting: Callable[[float], int]) -> None:
        self._what, self._option, self._fitting = what, option, fitting
        self._done, self._seconds = 0, 0.0
        self._came, self._waited = 0, 0.0
        self._begin = time.monotonic()
        self._told = False

    @contextmanager
    def working(self) -> Iterator[None]:
        """A job is done within the block."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._done += 1
            self._seconds += time.monotonic() - started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A job has come, and waits within the block to be taken."""
        started = time.monotonic()
        yield
        self._came += 1
        self._waited += time.monotonic() - started

    def tell(self) -> None:
        """Warn where training has waited for long; called when nothing is left to do that a warning could stop."""
        training = time.monotonic() - self._begin - self._waited
        if self._told or self._waited < max(PATIENCE, 0.1 * training) or not self._done:
            return
        self._told = True
        takes, comes = self._seconds / self._done, training / self._came
        warnings.warn(
            f"{self._what} takes {takes:.3g} s, and training comes with the next after {comes:.3g} s: it has waited "
            f"{self._waited:.3g} s so far; {self._option}={self._fitting(takes / comes)} would fit",
            RuntimeWarning,
            stacklevel=5,
        )


def divisor(whole: int, least: float) -> int:
    """The smallest divisor of `whole` that is at least `least`; `whole` itself where none is."""
    return next((n for n in range(1, whole) if whole % n == 0 and n >= least), whole)
