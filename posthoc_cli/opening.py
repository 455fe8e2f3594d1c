"""The one road from a place to the sources of a run: snapshots of a tracker, or files of other
programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from posthoc_cli import files
from posthoc_cli.checkpoints.places import NothingHereError
from posthoc_cli.errors import DirectoryError
from posthoc_cli.snapshots.directory import is_import, read_directory
from posthoc_cli.snapshots.sources import Sources
from posthoc_cli.snapshots.tensorfile import KeptOpen


def disk_sources(directory: str | Path) -> Sources:
    """Read the sources in the directory of a run or of an import, or in the files that a path or a
    glob names, as `Run.sources` does."""
    return open_sources(directory)


def open_sources(
    place: str | Path,
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    settle: bool = True,
) -> Sources:
    """Read the sources in the directory of a run or of an import, or in the files that a path or a
    glob names: snapshots of a tracker, or checkpoints as an import would take them.

    Arguments:
        settings: of an import, for files of other programs.
        settle: find the decays of averages; else no values are read, and averages of unknown decay
            have a placeholder as profile.

    Raises DirectoryError if there are none, FileFormatError or MismatchError if a file is damaged
    or of another model, InvalidValueError if an import must be given a setting.
    """
    path = files.expand_user(place)
    look = files.Look()
    read = partial(open_sources, path, settings, settle=settle)
    no_snapshots = None
    with KeptOpen() as kept:
        if not (files.is_glob(path) or is_import(path)):
            try:
                return Sources(path, tuple(read_directory(path, look, kept)), read, look)
            except DirectoryError as error:
                no_snapshots = error
        from posthoc_cli.checkpoints.open_run import find

        try:
            return replace(find(path, settings, settle, look, kept), read=read)
        except NothingHereError as error:
            raise no_snapshots or error from None
