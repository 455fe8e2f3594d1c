"""Experiments on the guarantees of snapshots and outputs; `make test` runs a share of each, `make torture` all."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from posthoc_cli.errors import PostHocError

LONGEST = 180
"""The time limit, in seconds, for one try on a tiny directory on a busy machine."""


class HungError(BaseException):
    """A try has taken too long. It is not an Exception, so that no handler swallows it."""


@dataclass
class Tally:
    """The number of faults, kills or hostile inputs that were tried, and a line for each failure."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    """Something durable was missing, changed or incomplete."""
    missed: list[str] = field(default_factory=list)
    """A fault was not found, or was not reported as one clear error of this package."""
    executed: list[str] = field(default_factory=list)
    """Foreign code ran, or a file outside the given paths was touched."""

    @property
    def failures(self) -> list[str]:
        """The lines of all failures."""
        return self.lost + self.missed + self.executed

    @contextmanager
    def judged(self, what: str, named: str = "") -> Iterator[None]:
        """Require that the block ends in time, without an error or with one short error that contains `named`."""

        def hang_up(*_: object) -> None:
            raise HungError(f"took more than {LONGEST} s")

        before = signal.signal(signal.SIGALRM, hang_up)
        signal.alarm(LONGEST)
        try:
            yield
        except PostHocError as error:
            text = str(error)
            if named not in text or not text.isprintable() or len(text) > 2_000:
                self.missed.append(f"{what}: {text[:300]!r}, where {named!r} was to be named")
        except (Exception, HungError) as error:  # noqa: BLE001 - any other error is a failure
            self.missed.append(f"{what}: {type(error).__name__}: {str(error)[:500]}")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
