"""How long jobs report their progress: each opens a bar, and advances it in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Takes a job, such as "verifying", and its bytes in all; the context gives a function of the bytes just done."""


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:  # noqa: ARG001
    """A progress bar that shows nothing."""
    yield lambda _: None
