"""Experiments on the guarantees of snapshots and outputs: what each of them counts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from posthoc_cli.errors import PostHocError

LONGEST = 180
"""Seconds that one try on a tiny directory may take on a busy machine."""


class HungError(BaseException):
    """Something has taken too long. Not an Exception: nobody may swallow it."""


@dataclass
class Tally:
    """How many faults, damages, kills or hostile inputs were tried, and a line for each that went wrong."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    """Something durable was gone, changed or half there."""
    missed: list[str] = field(default_factory=list)
    """Something wrong was not found, or was reported as something else than one clear error of this package."""
    executed: list[str] = field(default_factory=list)
    """Foreign code ran, or a file outside the named places was touched."""

    @property
    def failures(self) -> list[str]:
        """All lines."""
        return self.lost + self.missed + self.executed

    @contextmanager
    def judged(self, what: str, named: str = "") -> Iterator[None]:
        """The block ends in time, with nothing but an error of this package: one short line that names `named`."""
        before = signal.signal(signal.SIGALRM, _hang_up)
        signal.alarm(LONGEST)
        wrong = ""
        try:
            yield
        except PostHocError as error:
            text = str(error)
            if named not in text or not text.isprintable() or len(text) > 2_000:
                wrong = f"{text[:300]!r}, where {named!r} was to be named"
        except (Exception, HungError) as error:  # noqa: BLE001 - whatever it is, it is no error of the package
            wrong = f"{type(error).__name__}: {str(error)[:500]}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        if wrong:
            self.missed.append(f"{what}: {wrong}"[:4_000])


def _hang_up(*_: object) -> None:
    raise HungError(f"took more than {LONGEST} s")
