"""What verification says of a file, and of all that it looked at."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots.reader import Snapshot

WHOLE = "whole"
UNCHECKED = "unchecked"
DAMAGED = "damaged"
MISSING = "missing"
NONFINITE = "nonfinite"
MISMATCHED = "mismatched"
DUPLICATE = "duplicate"
CONFLICTING = "conflicting"
MISMEASURED = "mismeasured"
UNREADABLE = "unreadable"
UNSUPPORTED = "unsupported"

STATES: Mapping[str, str] = {
    WHOLE: "as it was written",
    UNCHECKED: "no checksums: only its structure was checked",
    DAMAGED: "not as it was written, or never a file of this format",
    MISSING: "named by an index, and not there",
    NONFINITE: "an average in it holds nan or infinity",
    MISMATCHED: "does not belong with most of the others: another run, other tensors, another time",
    DUPLICATE: "holds the same as another file, bit for bit",
    CONFLICTING: "holds the same profile at the same time as another file, and other values",
    MISMEASURED: "its values contradict what was measured when they were written",
    UNREADABLE: "the system refused to read it, so that nothing is known of it",
    UNSUPPORTED: "of a kind or version that this release does not know",
}
"""What may be said of a file."""

FINE = frozenset({WHOLE, UNCHECKED})

_BROKEN_FILE = (errno.EIO, errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""What opening or reading fails with where the file is to blame: a bad disk, a broken link, no regular file."""


@dataclass(frozen=True)
class FileReport:
    """What was found out about a file.

    Attributes:
        path: the file.
        unit: it, or the folder of the shards that it belongs to: what is good or bad as one.
        what: what it is, in a few words.
        kind: "snapshot", "output" or "state"; None for a file of none of them, or where it cannot be told.
        state: one of STATES.
        detail: why, in a few words; empty where there is nothing to say.
        nbytes: bytes that were read.
        run_id: of the run that it is of; None where it does not say.
        notes: what is strange about it and not wrong.
    """

    path: Path
    unit: Path
    what: str
    kind: str | None
    state: str = WHOLE
    detail: str = ""
    nbytes: int = 0
    run_id: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.state in FINE


@dataclass(frozen=True)
class Examined:
    """A unit that was read.

    Attributes:
        reports: of each of its files.
        snapshot: its header, where it is a snapshot and the header can be believed.
    """

    reports: tuple[FileReport, ...]
    snapshot: Snapshot | None = None

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong with any of its files."""
        return all(report.is_fine for report in self.reports)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file: one of STATES, and why."""

    state: str
    detail: str


@dataclass(frozen=True)
class Verification:
    """What was found in a path.

    Attributes:
        path: as it was given.
        is_directory: whether it is one.
        files: in the order of their names.
        problems: what is wrong and cannot be said of one file.
        notes: what is strange and not wrong, a line each.
        snapshots: those that are whole and belong together, by time, then sigma_rel; none that was superseded.
        lost: of those that are not, the ones of the same run whose headers can be believed.
        leftovers, superseded, quarantined: see `Contents`.
        seconds: how long it took.
    """

    path: Path
    is_directory: bool
    files: tuple[FileReport, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    lost: tuple[Snapshot, ...] = ()
    leftovers: tuple[Path, ...] = ()
    superseded: int = 0
    quarantined: int = 0
    seconds: float = 0.0
    broken: tuple[Path, ...] = field(init=False)
    """Units of which something is wrong."""

    def __post_init__(self) -> None:
        broken = dict.fromkeys(report.unit for report in self.files if not report.is_fine)
        object.__setattr__(self, "broken", tuple(broken))

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.broken or self.problems)

    @property
    def nbytes(self) -> int:
        """How much was read."""
        return sum(report.nbytes for report in self.files)

    def name(self, path: Path) -> str:
        """The name of a file in reports: relative to a directory that was verified."""
        return str(path.relative_to(self.path)) if self.is_directory else str(path)

    def to_dict(self) -> dict[str, Any]:
        """The report as data for JSON."""
        return {
            "kind": "directory" if self.is_directory else "file",
            "path": str(self.path),
            "files": [
                {"path": self.name(r.path), "what": r.what, "state": r.state, "detail": r.detail, "bytes": r.nbytes}
                for r in self.files
            ],
            "problems": list(self.problems),
            "notes": list(self.notes),
            "leftovers": [self.name(path) for path in self.leftovers],
            "superseded": self.superseded,
            "quarantined": self.quarantined,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }


def problem_of(error: FileFormatError, path: Path) -> Problem:
    """What an error of reading says about a file, without the file's name, which stands beside it."""
    cause = error.__cause__
    known = not isinstance(cause, OSError) or cause.errno in _BROKEN_FILE
    text = str(error)
    for prefix in (f"{path}: ", f"{str(path)!r}: "):
        text = text.removeprefix(prefix)
    return Problem(DAMAGED if known else UNREADABLE, text)
