"""Open a directory, files or folders of any program as the sources of a run.

The kind of each file is recognised by its name and content. Steps come from a checkpoint's content,
else from its name; never from the order or the age of files. The manifest of an import holds the
settings that files do not.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from posthoc_cli import files
from posthoc_cli.checkpoints.index import (
    DCP_METADATA,
    SHARD,
    holds_model,
    index_checkpoint,
    may_be_weights,
)
from posthoc_cli.checkpoints.layouts import EMA_TAKES, TABLE, named_decay, read_checkpoint
from posthoc_cli.checkpoints.manifest import read_manifest
from posthoc_cli.checkpoints.settings import UNSPECIFIED, ImportSettings
from posthoc_cli.checkpoints.source import Checkpoint, make_checkpoint
from posthoc_cli.checkpoints.steps import named_step
from posthoc_cli.errors import DirectoryError, InvalidValueError, MismatchError
from posthoc_cli.profiles import OrdinaryEMA, Point
from posthoc_cli.snapshots.directory import PICKLES, is_import, is_snapshot_name, read_directory
from posthoc_cli.snapshots.outputs import describe_tensors
from posthoc_cli.snapshots.sources import Source, by_time, model_difference

log = logging.getLogger(__name__)

_COMPARED = 1024  # elements of a tensor that are compared to recognise a duplicate


def open_checkpoints(place: str | Path, unclaimed: bool = False) -> list[Checkpoint]:
    """Return the checkpoints in a directory, of a glob or of an import, by time. Read only headers
    and indexes.

    Ordinary EMAs of unknown decay are left out with a warning. With `unclaimed` they are included,
    so that an audit can find their decay.
    """
    path = files.expanded(place)
    if is_import(path):
        manifest = read_manifest(path)
        for file in manifest.files:
            manifest.check_file(file)
        read: list[Checkpoint] = []
        for file, kind, step in manifest.checkpoints:
            read += read_checkpoint(
                index_checkpoint(file), replace(manifest.settings, kind=kind), step
            )
        return checked_run(read)
    found = read_place(place, UNSPECIFIED)
    left_out = [] if unclaimed else [one for one in found if not one.is_known]
    if len(left_out) == len(found):
        reason = "holds EMAs, and neither their decay nor weights next to them"
        raise InvalidValueError(place, reason, "give ema_decay to an import")
    if left_out:
        what = f"{len(left_out):,} EMA{'s' * (len(left_out) > 1)}, such as {left_out[0].path.name}"
        reason = (
            "left out of averages: their files do not say the decay; `ema import` finds "
            "it, or takes `ema_decay`"
        )
        log.warning("%s: %s, %s", place, what, reason)
    return checked_run([one for one in found if unclaimed or one.is_known])


def read_place(place: str | Path, settings: ImportSettings) -> list[Checkpoint]:
    """Return all checkpoints at a place, without outputs of this package, with the profiles that
    are known."""
    paths = _candidates(place)
    decays = {path: decay for path in paths if (decay := named_decay(path)) is not None}
    if len({*decays.values()}) > 1:  # guided-diffusion's averages
        if settings.ema_decay not in decays.values():
            choices = " or ".join(f"{decay:g}" for decay in sorted({*decays.values()}))
            raise InvalidValueError(
                "ema_decay", f"must be given: the files are of several averages, {choices}"
            )
        paths = [
            path for path in paths if decays.get(path, settings.ema_decay) == settings.ema_decay
        ]
    indexes = [
        one for one in map(index_checkpoint, paths) if one.values.get("ema.format") != "output"
    ]
    by_word = next((one.path.name for one in indexes if named_step(one.path).by_word), "")
    found = [
        one for indexed in indexes for one in read_checkpoint(indexed, settings, by_word=by_word)
    ]
    if not found:
        hint = "name their folder, a file, or a glob such as 'out/step*.pt'"
        raise DirectoryError(place, "holds no checkpoints", hint)
    kinds = sorted({one.kind for one in found})
    known = {"kind", "prefix", "include", "exclude"}.union(*(TABLE[kind][1] for kind in kinds))
    for name in settings.given:
        if name not in known:
            hint = (
                "averages that no name tells are said by kind 'ema', or by `average`"
                if name in EMA_TAKES
                else ""
            )
            raise InvalidValueError(name, f"says nothing about {' and '.join(kinds)}", hint)
    return found


def disk_sources(directory: str | Path, unclaimed: bool = False) -> list[Source]:
    """Return the sources in the directory of a run or of an import, or those that a file or a glob
    names.

    They are snapshots of a tracker, or checkpoints; for `unclaimed` see `open_checkpoints`. Raise
    DirectoryError if there are none, FileFormatError or MismatchError if a file is damaged or of
    another model, InvalidValueError if an import must be given a setting.
    """
    if not (is_glob(directory) or is_import(directory)):
        try:
            return [*read_directory(files.as_path(directory))]
        except DirectoryError:
            if not holds_checkpoints(directory):
                raise
    return [*open_checkpoints(directory, unclaimed=unclaimed)]


def is_glob(place: str | Path) -> bool:
    """Return whether a name is a pattern, and no file or directory has this name."""
    path = files.expanded(place)
    return glob.has_magic(str(path)) and not path.exists()


def holds_checkpoints(place: str | Path) -> bool:
    """Return whether a directory, file or glob seems to name checkpoints or an import, without
    opening a file."""
    try:
        return is_import(place) or bool(_candidates(place))
    except DirectoryError:
        return False


def _candidates(place: str | Path) -> list[Path]:
    """Return the files and folders that may each be a checkpoint."""
    path = files.expanded(place)
    matches = [path]
    if is_glob(path):
        if files.is_url(path):
            from posthoc_cli.remote.store import matching

            matches = matching(path)
        else:
            matches = sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207 - Path.glob takes no absolute patterns
    if not matches or (matches == [path] and not path.exists()):
        raise DirectoryError(place, "no file or folder has such a name")
    if matches != [path] or not path.is_dir() or (path / DCP_METADATA).is_file():
        return matches
    entries = sorted(entry for entry in files.system.list(path) if not entry.name.startswith("."))
    folders = [
        entry
        for entry in entries
        if entry.is_dir() and not is_snapshot_name(entry) and holds_model(entry)
    ]
    loose = [
        entry for entry in entries if may_be_weights(entry.name) and not SHARD.search(entry.name)
    ]
    # Next to files, a folder without a number, such as "averages", is no checkpoint; next to
    # folders, no file is one.
    return (
        folders if not loose or any(re.search(r"\d", folder.name) for folder in folders) else loose
    )


# --- several checkpoints as one run


def checked_run(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return checkpoints by time, as one run: with a common run id, and distinct names.

    Of duplicates, such as a file `last` or `best` next to numbered files, take the first by name.
    An average that has not begun is a copy of the weights, and is left out next to them. A
    MismatchError names the first two that are of different models, or of one time with different
    values.
    """
    ordered, kept = _with_names(by_time(checkpoints)), dict[tuple[float, str], Checkpoint]()
    for other in ordered:
        one, twin = ordered[0], kept.setdefault((other.t, other.holds), other)
        difference = model_difference(one, other)
        if not difference and twin is not other and _are_unequal(twin, other):
            one, difference = twin, f"are both of step {twin.t:,.12g}"
        if difference:
            hint = (
                "name the files of one run by a glob, or import with `include`, `exclude` or "
                "`prefix`"
            )
            raise MismatchError(f"{one.path} and {other.path}", difference, hint)
    weights = {one.t for one in kept.values() if isinstance(one.profile, Point)}
    ordered = [one for one in kept.values() if one.t not in weights or not is_copy(one)]
    names = [(name, entry.shape) for name, entry in sorted(ordered[0].entries.items())]
    run_id = xxhash.xxh3_128_hexdigest(repr((names, ordered[0].identity)).encode())
    return [replace(one, run_id=run_id) for one in ordered]


def is_copy(one: Checkpoint) -> bool:
    """Return whether an ordinary EMA had not begun, so that it is a copy of the weights."""
    return isinstance(one.profile, OrdinaryEMA) and one.profile.times[0] == one.profile.t


def _are_unequal(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two checkpoints of a model differ in the first elements of a tensor."""
    with one, other:
        ranges = [(name, 0, min(one.entries[name].size, _COMPARED)) for name in one.averages]
        return not all(
            np.array_equal(one.values(*each), other.values(*each), equal_nan=True)
            for each in ranges
        )


def _with_names(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints with distinct names, from the folder of all on, for coefficients and
    reports."""
    counts = Counter(one.path for one in checkpoints)
    shared = len(Path(os.path.commonpath([str(path.parent) for path in counts])).parts)
    named = []
    for one in checkpoints:
        is_second = counts[one.path] > 1 and not isinstance(one.profile, Point)
        named.append(
            replace(one, name="/".join(one.path.parts[shared:]) + " (average)" * is_second)
        )
    return named


# --- for JSON


def describe_checkpoints(place: Path) -> dict[str, Any]:
    """Return times, tensors and sizes from the indexes of files alone, for JSON.

    The kind is "checkpoint" for a file whose step is not known.
    """
    try:
        checkpoints = open_checkpoints(place)
    except InvalidValueError:
        if place.suffix not in PICKLES or not place.is_file():
            raise
        one = make_checkpoint(place, index_checkpoint(place).model_tensors(), Point(1.0), 1)
        return {
            "kind": "checkpoint",
            "path": str(place),
            **describe_tensors(one),
            "bytes": one.file_bytes,
        }
    newest, of_import = checkpoints[-1], {}
    if is_import(place):
        found = read_manifest(place)
        of_import = {
            "refers_to": str(found.origin),
            "files": len(found.files),
            "settings": found.settings.given,
        }
    return {
        "kind": "checkpoints",
        "path": str(place),
        "run": newest.run_id,
        **{key: getattr(newest, key) for key in ("t_unit", "t", "step")},
        **describe_tensors(newest),
        "bytes": sum(one.file_bytes for one in checkpoints),
        "checkpoints": [
            {
                "file": one.name,
                "t": one.t,
                "holds": one.holds,
                "bytes": one.file_bytes,
                "identity": one.identity,
            }
            for one in checkpoints
        ],
        **of_import,
    }
