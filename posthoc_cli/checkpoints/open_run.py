"""Open a directory, files or folders as the sources of a run, whatever wrote them.

The kind of each file is recognised by its name and content. Steps come from a checkpoint's content, else from its name;
never from the order or the age of files. What files do not say is in the manifest of an import.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from posthoc_cli import files
from posthoc_cli.checkpoints.formats import TABLE, check_used, kind_of, lacks_decay
from posthoc_cli.checkpoints.import_copies import is_copy, read_copy
from posthoc_cli.checkpoints.import_manifest import is_import, read_manifest
from posthoc_cli.checkpoints.read_model import ENDINGS, NOT_WEIGHTS, index_checkpoint, model_in
from posthoc_cli.checkpoints.read_step import named_step
from posthoc_cli.checkpoints.settings import UNSPECIFIED, Settings
from posthoc_cli.checkpoints.source import Checkpoint, beside_snapshots, checked_run, make_checkpoint
from posthoc_cli.errors import DirectoryError, FileFormatError, InvalidValueError, MismatchError
from posthoc_cli.profiles import Point
from posthoc_cli.profiles.other_libraries import OrdinaryEMA
from posthoc_cli.snapshots.directory import is_snapshot_name, read_directory
from posthoc_cli.snapshots.outputs import describe_tensors
from posthoc_cli.snapshots.sources import Source, by_time

log = logging.getLogger(__name__)

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def open_checkpoints(place: str | Path, settings: Settings = UNSPECIFIED, unclaimed: bool = False) -> list[Checkpoint]:
    """The checkpoints in a directory, or those that a glob names, by time. Reads headers, indexes and pickles only.

    Ordinary EMAs whose decay nobody says are left out with a warning. With `unclaimed` they are among them, to find
    which decay it is: theirs is 0, and their profiles are not to be used.

    Raises:
        DirectoryError: nothing is there that can be opened.
        FileFormatError, MismatchError: a file is damaged, or of another model than the others.
        InvalidValueError: what the files do not hold must be given.
    """
    path = files.expanded(place)
    if is_import(path):
        return checked_run(read_manifest(path).read())
    paths = _places(place)
    by_word = next((path.name for path in paths if named_step(path).by_word), "")
    passed_over: list[Path] = []
    made = [one for path in paths for one in _read(path, settings, by_word, unclaimed, passed_over)]
    if settings.ema_decay is not None and settings.kind is None and {one.kind for one in made} == {"checkpoints"}:
        return open_checkpoints(place, replace(settings, kind="ema"), unclaimed)  # all are averages, under any name
    if not made and passed_over:
        reason = "holds EMAs, and neither their decay nor weights beside them"
        raise InvalidValueError(place, reason, "give ema_decay to an import")
    if not made:
        raise DirectoryError(
            place, "holds no checkpoints", "name their folder, a file, or a glob such as 'out/step*.pt'"
        )
    check_used(settings, {one.kind for one in made} - {""})
    if settings.update_every is None and (every := _common_interval(made)):
        return open_checkpoints(place, replace(settings, update_every=every), unclaimed)
    if passed_over and not unclaimed:
        what = f"{len(passed_over):,} EMA{'s' * (len(passed_over) > 1)}, such as {passed_over[0].name}"
        log.warning(
            "%s: %s, left out of averages: their files do not say the decay; `ema import` finds it, or takes it",
            place,
            what,
        )
    return checked_run(made)


def _common_interval(made: Sequence[Checkpoint]) -> int | None:
    """The steps between updates that EMAs together have counted, where each alone shows another number.

    Raises:
        MismatchError: their counts and steps fit no such number.
    """
    averages = [(one.path, one.info.step, one.profile.settings) for one in by_time(made)
                if isinstance(one.profile, OrdinaryEMA)]  # fmt: skip
    if len({counted["every"] for *_, counted in averages}) < 2:
        return None
    pairs = [
        (f"{path} and {other}", later - step, after["updates"] - before["updates"])
        for (path, step, before), (other, later, after) in pairwise(averages)
        if after["updates"] > before["updates"]  # else it began again
    ]
    every = max(1, round(median(steps / updates for _, steps, updates in pairs))) if pairs else 1
    for both, steps, updates in pairs:
        if abs(steps - every * updates) > every:
            reason = f"have counted {updates:,} updates of their EMAs in the {steps:,} steps between them"
            hint = f"others count one in {every:,}; say update_every, and ema_restarts if the EMA began again"
            raise MismatchError(both, reason, hint)
    return every


_ANY_DECAY = 0.999
"""In place of one that is not known."""


def _read(path: Path, settings: Settings, by_word: str, unclaimed: bool, passed_over: list[Path]) -> list[Checkpoint]:
    """The sources in a file or folder; none in an output of this package, and in what is from before the training.

    One with an ordinary EMA of unknown decay is added to `passed_over`.
    """
    indexed = index_checkpoint(path)
    if indexed.values.get("ema.format") == "output":
        return []
    if is_copy(indexed.values):
        return [read_copy(path)]
    kind = kind_of(path, indexed, settings)
    step = TABLE[kind].step(path, indexed, settings, by_word)
    is_unknown = settings.ema_decay is None and lacks_decay(indexed, kind)
    if is_unknown:
        passed_over.append(path)
        settings = replace(settings, ema_decay=_ANY_DECAY) if unclaimed else settings
    made = TABLE[kind].read(path, indexed, step, settings) if step else []
    return [replace(one, info=replace(one.info, decay=0.0)) for one in made] if is_unknown else made


def describe_file(path: Path) -> dict[str, Any]:
    """Tensors and sizes of one checkpoint, without its time, for JSON; its kind is "checkpoint"."""
    one = make_checkpoint(path, index_checkpoint(path).model_tensors(), Point(1.0), 1)
    return {"kind": "checkpoint", "path": str(path), **describe_tensors(one), "bytes": one.header.file_bytes}


def disk_sources(directory: str | Path, also: str | Path | None = None, unclaimed: bool = False) -> list[Source]:
    """What a directory holds as sources: the snapshots of a tracker, else checkpoints.

    Arguments:
        directory: of a run, or of an import; or a file, or a glob that names the files or folders of checkpoints.
        also: where checkpoints of the same training are, to be combined with the snapshots.
        unclaimed: with ordinary EMAs of unknown decay, see `open_checkpoints`.

    Raises:
        DirectoryError, FileFormatError, MismatchError: as `read_directory`, and of checkpoints `open_checkpoints`.
        InvalidValueError: as `open_checkpoints`; or `also` is given, and there are no snapshots.
    """
    snapshots = []
    if not (is_glob(directory) or is_import(directory)):
        try:
            snapshots = read_directory(files.as_path(directory))
        except DirectoryError:
            if not holds_checkpoints(directory):
                raise
    if not snapshots:
        if also is not None:
            reason = f"are added to the snapshots of a tracker, and {directory} holds none"
            raise InvalidValueError("checkpoints", reason, value=also)
        return [*open_checkpoints(directory, unclaimed=unclaimed)]
    others = [] if also is None else beside_snapshots(snapshots, open_checkpoints(also))
    return by_time([*snapshots, *others])


def is_glob(place: str | Path) -> bool:
    """Whether a name is a pattern, and not the name of something that is there."""
    path = files.expanded(place)
    return glob.has_magic(str(path)) and not path.exists()


def holds_checkpoints(place: str | Path) -> bool:
    """Whether a directory, file or glob seems to name checkpoints, or is an import; no file is opened."""
    try:
        return is_import(place) or bool(_places(place))
    except DirectoryError:
        return False


def _places(place: str | Path) -> list[Path]:
    """The files and folders that may each be a checkpoint."""
    path = files.expanded(place)
    if is_glob(path):
        if files.is_url(path):
            from posthoc_cli.remote.store import matching

            found = matching(path)
        else:
            found = sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207 - of any path, also an absolute one
        if not found:
            raise DirectoryError(place, "no file or folder has such a name")
        for one in found:
            if any(map(is_snapshot_name, one.glob("*"))):
                raise DirectoryError(one, "holds snapshots of a tracker", "name this folder itself, not by a glob")
        return found
    if not path.is_dir():
        if not path.exists():
            raise DirectoryError(place, "no such file or directory")
        return [path]
    if (path / ".metadata").is_file():
        return [path]
    entries = sorted(entry for entry in files.system.list(path) if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir() and not is_snapshot_name(entry) and _holds_model(entry)]
    loose = [entry for entry in entries if entry.name.endswith(ENDINGS) and not _SHARD.search(entry.name)]
    loose = [entry for entry in loose if not entry.name.startswith(NOT_WEIGHTS)]
    # Beside files a folder without a number, such as "averages", is no checkpoint; beside folders a file is none.
    return folders if not loose or any(re.search(r"\d", folder.name) for folder in folders) else loose


def _holds_model(folder: Path) -> bool:
    try:
        return model_in(folder) is not None
    except FileFormatError:  # raised again when it is opened
        return True
