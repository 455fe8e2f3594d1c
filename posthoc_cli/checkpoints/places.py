"""What lies at a place: the files and folders that may each be a checkpoint.

A file is a candidate if its first bytes begin a file of tensors. A folder is one checkpoint if its
entries are the parts of one time, and else a place with several, three levels deep. Names say the
times of entries if a word does; where none does, the tensors of two entries decide: checkpoints of
two times hold the same names and shapes, and values near each other, as two layers of a model do
not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from posthoc_cli import files
from posthoc_cli.checkpoints.containers import (
    INDEX_ENDING,
    find_container,
    foreign_error,
    may_hold_tensors,
    strip_ending,
)
from posthoc_cli.checkpoints.content import Content, Reader
from posthoc_cli.checkpoints.folders import (
    AVERAGE_WORD,
    DCP_METADATA,
    MODEL_FILES,
    SHARD,
    Distributed,
    Layout,
    OneFile,
    Refused,
    Sets,
    Shards,
    is_state,
)
from posthoc_cli.checkpoints.names import find_times, has_time, make_glob
from posthoc_cli.checkpoints.source import are_near, first_values_of
from posthoc_cli.checkpoints.trackers import TrackerState, note_trackers
from posthoc_cli.errors import DirectoryError, FileFormatError, UnsuitableError, VanishedError
from posthoc_cli.profiles import FloatArray
from posthoc_cli.snapshots.directory import MANIFEST, SUPERSEDED, is_import, is_snapshot_name
from posthoc_cli.snapshots.opened_file import named_on_error

_STATE_FOLDER = re.compile(r"[-_]states?$|^states?$")
_PARTITION = re.compile(
    r"^zero_pp_rank_|^layer_\d+(?:-model|_expert)_|^mp_rank_\d*[1-9]|_pp-rank-.*_tp-rank-"
    r"|_world_size_(?!1_)\d+_rank_|^consolidated\.\d*[1-9]\."
)
"""In names of the partitions of ZeRO-3, of DeepSpeed's pipelines and experts, of Megatron, of
nanotron, of verl, and of Llama."""
_OF_MANY = re.compile(
    r"[0-9]+-of-0*(?:[2-9]|[1-9][0-9]+)(?![0-9])|(?<![a-z])rank[_-]?0*[01](?![0-9])"
)
_WORD_OF_TIME = re.compile(r"(?:step|iter|ep(?:och)?)[a-z]*[=_.-]*$", re.IGNORECASE)
_LEVELS = 3  # of folders below a place; one that is alone in its folder does not count
_MOST_FOREIGN = 100  # files whose kinds are looked at where nothing is a checkpoint
_MOST_ENTRIES = 20_000  # at a place: listing a whole disk would take minutes

Layouts = dict[Path, Layout]
_Signature = frozenset[tuple[str, tuple[int, ...]]]
"""The names and shapes of the tensors of a model."""


class NothingHereError(DirectoryError):
    """There is nothing at a place that may be a checkpoint."""


class Place:
    """A folder, a file or a glob, and the checkpoints there, each opened once."""

    def __init__(self, name: str | Path, look: files.Look | None = None) -> None:
        self.name = name
        self._look = look or files.Look()
        self.notes = list[str]()
        self.runs = list[Path]()  # folders of snapshots
        self._reader = Reader()
        self.states = list[Path]()  # folders with a time that hold the state of a training alone
        self.outputs = list[Path]()  # of this package, beside a model
        self.trackers = list[TrackerState]()  # of what was opened
        self._has_opened = False
        self._set_aside = dict[Path, list[TrackerState]]()  # of files beside models, by folder
        self.is_deeper = False  # whether there are folders below `_LEVELS`
        self._left = _MOST_ENTRIES
        self._is_cut = False
        self._listed = set[str]()  # folders, also by links

    def open(self, path: Path) -> Content:
        """Read the content of a candidate; raise FileFormatError if it cannot be read."""
        return self._open(path, self.candidates[path])

    def open_at(self, path: Path) -> Content:
        """Open the checkpoint that a path names: of a folder with the checkpoints of a training the
        model beside them."""
        layout = self.layout_at(path)
        if layout is None:
            reason = "holds no weights: no safetensors, .bin or .pt file, and no .metadata"
            raise UnsuitableError(path, reason)
        return self._open(path, layout)

    def _open(self, path: Path, layout: Layout) -> Content:
        content = self._reader.open(path, layout)
        aside = self._set_aside.get(path) or self._set_aside.get(path.parent, [])
        content = replace(content, trackers=(*content.trackers, *aside))
        self.trackers += content.trackers
        self._has_opened = True
        return content

    @property
    def tracker_notes(self) -> list[str]:
        """The runs whose trackers have the states in what was opened, and the runs beside it, a
        line each; none if nothing was."""
        return note_trackers(self.name, self.trackers, self.runs if self._has_opened else ())

    def layout_at(self, path: Path) -> Layout | None:
        """Find what a file or folder consists of, or else the model beside the checkpoints in a
        folder; None if there is none."""
        if not path.is_dir():
            return _layout_of_file(path)
        found = self._find(path, _LEVELS)
        if path in found:
            return found[path]
        by_stem = {strip_ending(each.name): found[each] for each in found if each.parent == path}
        return next((by_stem[stem] for stem in MODEL_FILES if stem in by_stem), None)

    # --- the candidates

    @cached_property
    def candidates(self) -> Layouts:
        """The files and folders that may each be a checkpoint, and what they consist of."""
        path = files.expand_user(self.name)
        matches = self._look.match(path)
        if not matches:
            raise DirectoryError(self.name, "no file or folder matches")
        found: Layouts = {}
        for match in sorted(matches, key=_is_link):
            if match.is_dir():
                found |= self._find(match, _LEVELS)
                own = found.get(match)
                if isinstance(own, OneFile | Refused) and own.path.parent == match:
                    found[own.path] = found.pop(match)
            elif match == path or not is_snapshot_name(match):
                found[match] = _layout_of_file(match)
        if self._is_cut:
            note = f"holds more than {_MOST_ENTRIES:,} files; some folders in it were not looked "
            self.notes.append(f"{note}at: name the folder of the checkpoints")
        return dict(sorted(found.items()))

    def _find(self, folder: Path, levels: int) -> Layouts:
        """Find the checkpoints in a folder and so many levels of folders in it, or the folder if it
        is one itself."""
        real = str(folder) if files.is_url(folder) else os.path.realpath(folder)
        if real in self._listed:
            return {}
        self._listed.add(real)
        with named_on_error(folder, "read"):
            entries = self._look.list_folder(folder)
        self._left -= len(entries)
        by_name = {entry.name: entry for entry in entries if not is_state(entry.name)}
        if DCP_METADATA in by_name:
            return {folder: Distributed(by_name[DCP_METADATA])}
        if MANIFEST in by_name:
            return {}
        visible = [entry for name, entry in by_name.items() if not name.startswith(".")]
        folders = {entry for entry in visible if entry.is_dir()}
        members = self._find_files(folder, [entry for entry in visible if entry not in folders])
        below: Layouts = {}
        inner = [entry for entry in visible if entry in folders and _may_be_listed(entry)]
        if len(inner) > 1:
            levels -= 1
        for entry in sorted(inner, key=_is_link):
            self._is_cut = self._is_cut or self._left < 0
            self.is_deeper = self.is_deeper or levels < 0
            if levels < 0 or self._left < 0:
                break
            below |= self._find(entry, levels)
            if entry in below:
                members[entry] = below.pop(entry)
        if len(by_name) < len(entries) and not by_name and has_time(folder.name):
            self.states.append(folder)
        members = dict(sorted(members.items()))
        own = self._join(folder, members)
        if own is None or (below and not isinstance(own, Refused)):
            return members | below
        return {folder: own} | below

    def _find_files(self, folder: Path, entries: Sequence[Path]) -> Layouts:
        """Find the files that are each a checkpoint or a part of one; of shards without an index
        the first one stands for all."""
        members: Layouts = {}
        has_whole = any(entry.name.endswith(INDEX_ENDING) for entry in entries)
        for entry in entries:
            is_shard = SHARD.search(entry.name) is not None
            if is_snapshot_name(entry):
                self.runs.append(folder)
            elif is_shard and has_whole:
                continue
            elif entry.name.endswith(INDEX_ENDING) or may_hold_tensors(entry):
                members[entry] = _layout_of_file(entry)
                has_whole = has_whole or is_shard
        return members

    # --- one folder

    def _join(self, folder: Path, members: Layouts) -> Layout | None:
        """Find what a folder with such members is; None if they are checkpoints of several times,
        or if there are none."""
        if self._are_partitions(members):
            return Refused(folder, _partitions_error(folder))
        if not members or self._are_several_times(folder, members):
            return None
        # of two formats safetensors, which come last
        by_stem = {strip_ending(entry.name): layout for entry, layout in members.items()}
        usual = [stem for stem in MODEL_FILES if stem in by_stem]
        for stem in usual[1:]:  # the same model in another format
            del by_stem[stem]
        by_stem = self._set_own_aside(folder, by_stem)
        return by_stem.popitem()[1] if len(by_stem) == 1 else Sets(folder, by_stem)

    def _set_own_aside(self, folder: Path, by_stem: dict[str, Layout]) -> dict[str, Layout]:
        """Return the members of a folder without what this package wrote beside them: states of
        trackers alone, and outputs. All of them if there are no others, or if the folder is a copy
        of a checkpoint."""
        trackers = dict[str, Sequence[TrackerState]]()
        outputs = dict[str, Path]()
        if len(by_stem) > 1:
            for stem, layout in by_stem.items():
                content = self._read(layout)
                if content is None:
                    continue
                if content.mark is not None and content.mark.copied:
                    return by_stem
                if content.mark is not None and content.mark.kind == "output":
                    outputs[stem] = layout.path
                elif content.trackers and not content.tensors:
                    trackers[stem] = content.trackers
        own = {*trackers, *outputs}
        if len(own) == len(by_stem):
            return by_stem
        self.outputs += outputs.values()
        kept = {stem: layout for stem, layout in by_stem.items() if stem not in own}
        aside = self._set_aside[folder] = []
        for stem, states in trackers.items():
            aside += [state.below(stem) for state in states]
        for stem in kept:
            inner = self._set_aside.pop(folder / stem, [])
            aside += inner if len(kept) == 1 else [state.below(stem) for state in inner]
        return kept

    def _read(self, layout: Layout) -> Content | None:
        """Read what a layout holds; None if it cannot be read."""
        try:
            return self._reader.read(layout, {})
        except VanishedError:
            raise
        except FileFormatError:
            return None

    def _are_partitions(self, members: Layouts) -> bool:
        """Return whether a name says that files are partitions of a model, or files of a number
        "of" several, or of two ranks, hold tensors of the same names that are not equal, as each
        rank may write them: shards do not."""
        if any(_PARTITION.search(entry.name) for entry in members):
            return True
        by_name = dict[str, list[Layout]]()
        for entry, layout in members.items():
            number = _OF_MANY.search(entry.name)
            if number is None or AVERAGE_WORD.search(entry.name):
                continue
            if _WORD_OF_TIME.search(entry.name[: number.start()]):  # epoch-01-of-20
                continue
            others = by_name.setdefault(entry.name.replace(number[0], ""), [])
            for other in others:
                names = {name for name, _ in self._signature(layout)}
                shared = names & {name for name, _ in self._signature(other)}
                if not shared:
                    continue
                ours, theirs = self._first_values(layout, other)
                if not np.array_equal(ours, theirs):
                    return True
            others.append(layout)
        return False

    def _are_several_times(self, folder: Path, members: Layouts) -> bool:
        """Return whether entries are checkpoints of several times, and not the parts of one."""
        stems = {strip_ending(entry.name): layout for entry, layout in members.items()}
        has_usual = not stems.keys().isdisjoint(MODEL_FILES)
        timed = [stem for stem in stems if _is_time_within(folder, stem)]
        if len(set(map(make_glob, timed))) < len(timed) or (timed and not has_usual):
            return True
        says_time = has_time(strip_ending(folder.name))
        first = dict[str, Layout]()  # by the glob of its name
        for stem, layout in stems.items():
            other = first.setdefault(make_glob(stem), layout)
            if other is not layout and _has_equals(map(self._signature, (other, layout))):
                return not says_time or are_near(*self._first_values(other, layout))
        if says_time or has_usual:
            return False
        weights = [layout for glob, layout in first.items() if not AVERAGE_WORD.search(glob)]
        return _has_equals(map(self._signature, weights))

    def _signature(self, layout: Layout) -> _Signature:
        """Find the names and shapes of the tensors of a layout, without the state of an optimizer;
        none if it cannot be read."""
        content = self._read(layout)
        if content is None:
            return frozenset()
        named = content.tensors.items()
        return frozenset(
            (name, tensor.shape) for name, tensor in named if not content.is_of_optimizer(name)
        )

    def _first_values(self, *layouts: Layout) -> list[FloatArray]:
        contents = [self._reader.read(layout, {}) for layout in layouts]
        return [first_values_of(content, content.tensors) for content in contents]


def _layout_of_file(path: Path) -> Layout:
    if path.name.endswith(INDEX_ENDING):
        return Shards(path)
    if not files.is_url(path) and path.is_symlink() and not path.exists():
        return Refused(path, UnsuitableError(path, "is a link to a file that is missing"))
    if _PARTITION.search(path.name):
        return Refused(path, _partitions_error(path))
    if SHARD.search(path.name) and "-of-00001." not in path.name:
        reason = f"is a shard of a model, whose index (*{INDEX_ENDING}) says what belongs together"
        hint = "name the folder of the index; without one, save the model again in one file"
        return Refused(path, UnsuitableError(path, reason, hint))
    return OneFile(path)


def _may_be_listed(folder: Path) -> bool:
    """Return whether a folder can be read, and is not one of states, or set aside by a tracker."""
    if _STATE_FOLDER.search(folder.name) or folder.name == SUPERSEDED:
        return False
    return files.is_url(folder) or os.access(folder, os.R_OK | os.X_OK)


def _is_link(path: Path) -> bool:
    return not files.is_url(path) and path.is_symlink()


def _has_equals(signatures: Iterable[_Signature]) -> bool:
    """Return whether two that hold tensors hold the same."""
    known = [signature for signature in signatures if signature]
    return len(set(known)) < len(known)


def _partitions_error(path: Path) -> UnsuitableError:
    hint = "convert it with the program's own script, such as DeepSpeed's zero_to_fp32.py"
    return UnsuitableError(path, "holds partitions of the model", hint)


def _is_time_within(folder: Path, stem: str) -> bool:
    """Return whether a name is a time, and does not repeat the time of its folder, as in
    `checkpoint-500/global_step500`."""
    return has_time(stem) and find_times(stem)[0].text.lstrip("0") not in folder.name


def holds_checkpoints(name: str | Path) -> bool:
    """Return whether a directory, file or glob names checkpoints or an import."""
    try:
        return is_import(name) or bool(Place(name).candidates)
    except DirectoryError:  # also from a glob
        return files.is_glob(name)


def explain_nothing(place: Place) -> None:
    """Raise the error that says why nothing at a place is a checkpoint."""
    folder = files.expand_user(place.name)
    for run in place.runs:
        if run != folder:
            raise DirectoryError(place.name, "holds no checkpoints", f"did you mean {run}?")
    with suppress(OSError):
        numbered = [each for each in files.system.list(folder) if re.search("[0-9]", each.name)]
        for entry in sorted(numbered)[:_MOST_FOREIGN]:
            row = None if entry.is_dir() else find_container(entry)
            if row is not None and row.read is None:
                raise foreign_error(entry, row)
    hint = "name their folder, a file, or a glob such as 'out/step*.pt'"
    if place.is_deeper:
        reason = (
            f"holds no checkpoints in {_LEVELS} levels of folders; those below were not looked at"
        )
        raise DirectoryError(place.name, reason, hint)
    raise NothingHereError(place.name, "holds no checkpoints", hint)
