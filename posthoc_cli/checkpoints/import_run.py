"""The import: a run of other programs' files, with the settings that these files do not hold."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.checkpoints.manifest import check_target, write_manifest
from posthoc_cli.checkpoints.open_run import find
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.errors import DirectoryError, InvalidValueError, argument, at_most_one
from posthoc_cli.snapshots.directory import inspect_directory, is_import
from posthoc_cli.snapshots.sources import Sources
from posthoc_cli.snapshots.tensorfile import KeptOpen

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class ImportReport:
    """The run that an import has made."""

    sources: Sources
    out: Path | None  # the folder of the run; None for none
    written: bool  # whether the import has written it, which may have existed already

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} x {what}" for what, count in self.counts.items())
        return f"ImportReport({str(self.out)!r}: {counts})"

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [source for source in self.sources if isinstance(source, Checkpoint)]

    @property
    def numbers(self) -> str:
        """What the numbers of files are taken for."""
        return self.sources.numbers

    @property
    def checks(self) -> tuple[str, ...]:
        """Lines about the decay."""
        return self.sources.findings[1:]

    @property
    def counts(self) -> Counter[str]:
        """How many checkpoints hold what, in words."""
        return Counter(checkpoint.holds for checkpoint in self.checkpoints)

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {"path": str(checkpoint.path), "t": checkpoint.t, "holds": checkpoint.holds}
            for checkpoint in self.checkpoints
        ]
        return {
            "run": self.sources.run_id,
            "out": None if self.out is None else str(self.out),
            "written": self.written,
            "numbers": self.numbers,
            "checks": list(self.checks),
            "checkpoints": rows,
        }


def import_checkpoints(
    directory: str | Path,
    out: str | Path | None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    **settings: Any,
) -> ImportReport:
    """Make a run of other programs' checkpoints or averages, which every command and `Run` opens.

    The run is a small index of the checkpoints; nothing is copied.
    The same import into the same folder does nothing, or takes in what has changed at `directory`.

    Arguments:
        directory: a folder, a file, or a glob that names files or folders.
        out: folder of the run; None only in a dry run.
        overwrite: replace an import of something else, or with other settings.
        dry_run: read and check only, also whether `out` may be written.
        settings: fields of `settings.ImportSettings`, such as `sigma_rels=(0.05, 0.28)`.

    Raises:
        InvalidValueError: a setting is missing, or does not fit the files. DirectoryError,
        FileFormatError, MismatchError: there are no checkpoints, or they are not of one run.
        OutputExistsError: `out` exists, and holds something else. WriteError: the system refused.
    """
    at_most_one(overwrite=overwrite, dry_run=dry_run)
    given = ImportSettings(**settings)
    origin = files.check_path("directory", directory)
    target = None
    if out is not None:
        target = files.local_path("out", out)
    elif not dry_run:
        raise InvalidValueError("out", f"is required (except with {argument('dry_run')})")
    with KeptOpen() as kept:
        is_run = origin.is_dir() and inspect_directory(origin, kept=kept).snapshots
        if is_run or is_import(origin):
            reason = "is a run already, and needs no import"
            raise DirectoryError(origin, reason, "name the files of the other program")
        sources = find(origin, given.given, kept=kept)
    for notice in sources.notices:
        log.info("%s: %s", directory, notice)
    for note in sources.notes:
        log.warning("%s: %s", directory, note)
    report = ImportReport(sources, target, written=False)
    if target is None:
        return report
    files.check_parent(target)
    found = ImportSettings(**sources.settings)
    if dry_run:
        check_target(target, origin, found, overwrite)
        return report
    written = write_manifest(target, origin, found, report.checkpoints, overwrite)
    return replace(report, written=written)
