"""The import: a run of other programs' files, with the settings that these files do not hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.checkpoints.manifest import check_target, write_manifest
from posthoc_cli.checkpoints.open_run import FoundRun, find_run
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.errors import DirectoryError, InvalidValueError, argument, at_most_one
from posthoc_cli.snapshots.directory import inspect_directory, is_import


def import_checkpoints(
    directory: str | Path,
    out: str | Path | None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    **settings: Any,
) -> FoundRun:
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
    if is_import(origin) or (origin.is_dir() and inspect_directory(origin).snapshots):
        reason = "is a run already, and needs no import"
        raise DirectoryError(origin, reason, "name the files of the other program")
    found = find_run(origin, given)
    written = False
    if target is not None:
        files.check_parent(target)
        if dry_run:
            check_target(target, origin, found.settings, overwrite)
        else:
            written = write_manifest(target, origin, found.settings, found.checkpoints, overwrite)
    return replace(found, out=target, written=written)
