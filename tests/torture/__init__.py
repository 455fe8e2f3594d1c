"""Experiments on the guarantees of snapshots and outputs; `make test` runs a share of each, `make torture` all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from posthoc_cli.errors import PostHocError


@dataclass
class Tally:
    """The number of faults, kills or hostile inputs that were tried, and a line for each failure."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)  # something durable was missing, changed or incomplete
    missed: list[str] = field(default_factory=list)  # a fault was not found, or not reported as one clear error
    executed: list[str] = field(default_factory=list)  # foreign code ran, or a file outside was touched

    @contextmanager
    def judged(self, what: str, named: str = "", refusable: bool = True) -> Iterator[None]:
        """Require that the block ends without an error or with one short error that contains `named`."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - any other error is a failure
            text = str(error)
            is_clear = named in text and text.isprintable() and len(text) <= 2_000
            if not (refusable and is_clear and isinstance(error, PostHocError)):
                self.missed.append(f"{what}: {type(error).__name__}: {text[:500]!a}; {named!r} was to be named")
