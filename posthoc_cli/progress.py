"""The interface by which long jobs report progress: a job opens a bar and advances it in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A function of a job's name, such as "verifying", and its total bytes; its context yields `advance(nbytes)`."""


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:  # noqa: ARG001
    """Return a progress bar that shows nothing."""
    yield lambda _: None
