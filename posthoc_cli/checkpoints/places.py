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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import islice
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
from posthoc_cli.checkpoints.content import OFFSETS, Content, Reader
from posthoc_cli.checkpoints.folders import (
    AVERAGE_WORD,
    DCP_METADATA,
    MODEL_FILES,
    PART,
    SHARD,
    Distributed,
    Layout,
    OneFile,
    Parts,
    Refused,
    Sets,
    Shards,
    is_state,
    missing_parts,
)
from posthoc_cli.checkpoints.names import find_times, has_time, make_glob
from posthoc_cli.checkpoints.source import are_near, first_values_of
from posthoc_cli.checkpoints.trackers import TrackerState, note_trackers
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    UnsuitableError,
    VanishedError,
    list_first,
)
from posthoc_cli.profiles import FloatArray
from posthoc_cli.snapshots.directory import MANIFEST, SUPERSEDED, is_import, is_snapshot_name
from posthoc_cli.snapshots.opened_file import named_on_error
from posthoc_cli.snapshots.tensorfile import KeptOpen

_STATE_FOLDER = re.compile(r"[-_]states?$|^states?$")
_PARTITION = re.compile(
    r"^zero_pp_rank_|^layer_\d+(?:-model|_expert)_|^mp_rank_\d*[1-9]|_pp-rank-.*_tp-rank-"
    r"|_world_size_(?!1_)\d+_rank_|^consolidated\.\d*[1-9]\."
)
"""In names of the partitions of ZeRO-3, of DeepSpeed's pipelines and experts, of Megatron, of
nanotron, of verl, and of Llama."""
_RANK = re.compile(r"(?:(?<![a-z])rank[_-]?|-shard)0*(?P<rank>[01])(?![0-9])")
"""In names of what two processes write, also fairseq's: partitions, or the whole model."""
_OF_MANY = re.compile(rf"[0-9]+[-_]of[-_]0*(?:[2-9]|[1-9][0-9]+)(?![0-9])|{_RANK.pattern}")
_WORD_OF_PART = re.compile(r"(?<![a-z])(?:shard|part|rank)[-_]?$", re.IGNORECASE)
_WORD_OF_TIME = re.compile(r"(?:step|iter|ep(?:och)?)[a-z]*[=_.-]*$", re.IGNORECASE)
_NUMBER_OF_FOLDER = re.compile(
    r"^[0-9]{3,}[-_.=]+|(?<=[^-_.=0-9])[-_.=]*(?<![0-9]\.)[0-9]+(?!\.?[0-9])"
)
"""In names of parts: what may be the time of their folder; `2_Dense` and `ema_0.99` are names."""
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

    def __init__(
        self, name: str | Path, look: files.Look | None = None, kept: KeptOpen | None = None
    ) -> None:
        """`kept` keeps files open that are read several times; without it they are closed."""
        self.name = name
        self._look = look or files.Look()
        self.notes = list[str]()
        self.runs = list[Path]()  # folders of snapshots
        self._reader = Reader(kept or KeptOpen(most=0))
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
        folders = (path, path.parent, layout.path.parent)
        aside = next((self._set_aside[each] for each in folders if each in self._set_aside), [])
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
        layout = self._find_layout(path)
        self._note_parts([] if layout is None else [layout])
        return layout

    def _find_layout(self, path: Path) -> Layout | None:
        if not path.is_dir():
            return self._layout_of_file(path)
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
        matches = set[Path]()
        for pattern in files.expand_braces(path):
            named = self._look.match(pattern)
            if not named:
                missing = "" if pattern == path else f" {pattern.name}"
                raise DirectoryError(self.name, f"no file or folder matches{missing}")
            matches.update(named)
        found: Layouts = {}
        for match in sorted(matches, key=lambda each: (_is_link(each), each)):
            if match.is_dir():
                found |= self._find(match, _LEVELS)
                own = found.get(match)
                if isinstance(own, OneFile | Refused) and own.path.parent == match:
                    found[own.path] = found.pop(match)
            elif match == path or not is_snapshot_name(match):
                layout = self._layout_of_file(match)
                found[layout.path] = layout
        self._note_parts(found.values())
        if self._is_cut:
            note = f"holds more than {_MOST_ENTRIES:,} files; some folders in it were not looked "
            self._note(f"{note}at: name the folder of the checkpoints")
        return dict(sorted(found.items()))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _note_parts(self, layouts: Iterable[Layout]) -> None:
        """Note that some are joined of parts that nothing counts."""
        for layout in layouts:
            if isinstance(layout, Sets):
                self._note_parts(layout.members.values())
            elif isinstance(layout, Parts) and not layout.are_counted:
                note = "parts of a model are joined as their headers say, which do not count them: "
                self._note(f"{note}make sure that none is missing")

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
        return {folder: self._set_own_aside(folder, own)} | below

    def _find_files(self, folder: Path, entries: Sequence[Path]) -> Layouts:
        """Find the files that are each a checkpoint or a part of one; those that an index names
        belong to it."""
        members: Layouts = {}
        parts = dict[str, list[Path]]()
        has_index = any(entry.name.endswith(INDEX_ENDING) for entry in entries)
        for entry in entries:
            if is_snapshot_name(entry):
                self.runs.append(folder)
            elif has_index and SHARD.search(entry.name):
                continue
            elif entry.name.endswith(INDEX_ENDING):
                members[entry] = Shards(entry)
            elif may_hold_tensors(entry):
                if model := _name_of_model(entry.name):
                    parts.setdefault(model, []).append(entry)
                else:
                    members[entry] = _layout_of_one(entry)
        for paths in parts.values():
            members |= self._join_parts(paths)
        return members

    def _layout_of_file(self, path: Path) -> Layout:
        """Find what a file that is named alone belongs to."""
        if path.name.endswith(INDEX_ENDING):
            return Shards(path)
        model = _name_of_model(path.name)
        if model is None or not path.is_file():
            members = {each: _layout_of_one(each) for each in (path, *_list_other_rank(path))}
            if self._are_partitions(members):
                return Refused(path, _partitions_error(path))
            return members[path]
        beside = [each for each in sorted(files.system.list(path.parent)) if each.is_file()]
        if SHARD.search(path.name) and any(each.name.endswith(INDEX_ENDING) for each in beside):
            reason = f"is a shard of a model, whose index (*{INDEX_ENDING}) says what belongs to it"
            return Refused(path, UnsuitableError(path, reason, "name the folder of the index"))
        members = self._join_parts([each for each in beside if _name_of_model(each.name) == model])
        if self._are_partitions(members):
            return Refused(path, _partitions_error(path))
        return members.get(path) or next(iter(members.values()))

    def _join_parts(self, paths: Sequence[Path]) -> Layouts:
        """Find what files are whose names count the parts of one model: its parts if their headers
        say so, or if all are there and no two hold the same tensor; else each for itself."""
        first = paths[0]
        each = {path: _layout_of_one(path) for path in paths}
        refused = [layout for layout in each.values() if isinstance(layout, Refused)]
        if refused:
            return {first: refused[0]}
        missing = missing_parts(path.name for path in paths)
        names = list[str]()
        try:
            contents = [self._reader.read_file(path) for path in paths]
        except VanishedError:
            raise
        except FileFormatError:  # raised again when the model is read
            return {first: Parts(first, tuple(paths), are_counted=True)}
        for content in contents:
            names += content.tensors
        are_counted = not any(OFFSETS in content.values for content in contents)
        if are_counted:
            if len(set(names)) < len(names) and SHARD.search(first.name):
                return {first: Refused(first, _partitions_error(first))}
            is_whole = len(paths) == 1 and not missing
            is_unsure = missing and not _is_called_part(first.name)
            if is_whole or is_unsure or len(set(names)) < len(names):
                return each
        marks = [content.mark for content in contents if content.mark is not None]
        if any(not mark.copied and not mark.was_moved for mark in marks):
            reason = f"is a shard of an output of `ema`, and its index (*{INDEX_ENDING}) is missing"
            return {first: Refused(first, UnsuitableError(first, reason, "write it again"))}
        if missing:
            return {first: Refused(first, _missing_error(first, missing))}
        return {first: Parts(first, tuple(paths), are_counted)}

    # --- one folder

    def _join(self, folder: Path, members: Layouts) -> Layout | None:
        """Find what a folder with such members is; None if they are checkpoints of several times,
        or if there are none."""
        if self._are_partitions(members):
            return Refused(folder, _partitions_error(folder))
        if refused := self._leave_out_parts(folder, members):
            return refused
        if not members or self._are_several_times(folder, members):
            return None
        # of two formats safetensors, which come last
        by_stem = {strip_ending(entry.name): layout for entry, layout in members.items()}
        usual = [stem for stem in MODEL_FILES if stem in by_stem]
        for stem in usual[1:]:  # the same model in another format
            del by_stem[stem]
        if len(by_stem) == 1:
            return by_stem.popitem()[1]
        return Sets(folder, _without_time(folder, by_stem))

    def _set_own_aside(self, folder: Path, layout: Layout) -> Layout:
        """Return what a folder is without what this package wrote beside a model: states of
        trackers alone, and outputs. It stays as it is if it is a copy of a checkpoint, or has no
        more than these."""
        if not isinstance(layout, Sets):
            return layout
        trackers = dict[str, Sequence[TrackerState]]()
        outputs = dict[str, Path]()
        for stem, member in layout.members.items():
            content = self._read(member)
            if content is None:
                continue
            if content.mark is not None and content.mark.copied:
                return layout
            if content.mark is not None and content.mark.kind == "output":
                outputs[stem] = member.path
            elif content.trackers and not content.tensors:
                trackers[stem] = content.trackers
        own = {*trackers, *outputs}
        kept = {stem: member for stem, member in layout.members.items() if stem not in own}
        if not kept:
            return layout
        self.outputs += outputs.values()
        aside = self._set_aside[folder] = []
        for stem, states in trackers.items():
            aside += [state.below(stem) for state in states]
        for stem in kept:
            inner = self._set_aside.pop(folder / stem, [])
            aside += inner if len(kept) == 1 else [state.below(stem) for state in inner]
        return kept.popitem()[1] if len(kept) == 1 else Sets(folder, kept)

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
        rank may write them: shards do not. Of fairseq's one alone shows it by flat tensors."""
        if any(_PARTITION.search(entry.name) for entry in members):
            return True
        by_name = dict[str, list[Layout]]()
        for entry, layout in members.items():
            number = _OF_MANY.search(entry.name)
            if number is None or AVERAGE_WORD.search(entry.name):
                continue
            if _WORD_OF_TIME.search(entry.name[: number.start()]):  # epoch-01-of-20
                continue
            names = self._signature(layout)
            if number[0].startswith("-shard") and all(len(shape) < 2 for _, shape in names):
                return True
            others = by_name.setdefault(entry.name.replace(number[0], ""), [])
            for other in others:
                shared = dict(names).keys() & dict(self._signature(other)).keys()
                if shared and not self._have_equal_values(layout, other):
                    return True
            others.append(layout)
        return False

    def _leave_out_parts(self, folder: Path, members: Layouts) -> Refused | None:
        """Leave out the parts of a model that lies whole beside them, as in `consolidated`; refuse
        the folder if the two differ."""
        for parts in [entry for entry in members if isinstance(members[entry], Parts)]:
            ours = dict(self._signature(members[parts]))
            for whole, layout in members.items():
                if not _may_be_whole(whole, parts, members):
                    continue
                theirs = dict(self._signature(layout))
                if ours.keys().isdisjoint(theirs):
                    continue
                if ours != theirs or not self._have_equal_values(members[parts], layout):
                    reason = f"holds the parts of a model, and another one in {whole.name}"
                    hint = "move one of them away, or name one"
                    return Refused(folder, UnsuitableError(folder, reason, hint))
                self._note(f"{parts.name} is left out: {whole.name} is the same model, whole")
                del members[parts]
                break
        return None

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

    def _have_equal_values(self, one: Layout, other: Layout) -> bool:
        ours, theirs = self._first_values(one, other)
        return np.array_equal(ours, theirs)

    def _first_values(self, *layouts: Layout) -> list[FloatArray]:
        contents = [self._reader.read(layout, {}) for layout in layouts]
        return [first_values_of(content, content.tensors) for content in contents]


def _list_other_rank(path: Path) -> list[Path]:
    """List the file of rank 1 beside one of rank 0, or the other way round, if there is one."""
    found = _RANK.search(path.name)
    if found is None:
        return []
    start, end = found.span("rank")
    other = path.with_name(f"{path.name[:start]}{1 - int(found['rank'])}{path.name[end:]}")
    return [other] if other.is_file() else []


def _layout_of_one(path: Path) -> Layout:
    """Find what a file is that is no part of a model."""
    if not files.is_url(path) and path.is_symlink() and not path.exists():
        return Refused(path, UnsuitableError(path, "is a link to a file that is missing"))
    if _PARTITION.search(path.name):
        return Refused(path, _partitions_error(path))
    return OneFile(path)


def _name_of_model(name: str) -> str | None:
    """Return the name of a part without its number; None if a name counts no parts."""
    match = PART.search(name)
    if match is None or _WORD_OF_TIME.search(name[: match.start()]):  # epoch-01-of-20
        return None
    return f"{name[: match.start()]}*{match['total']}{name[match.end() :]}"


def _is_called_part(name: str) -> bool:
    """Return whether a name says that a file is a part, and not one of several folds or seeds."""
    match = PART.search(name)
    return match is not None and bool(
        SHARD.search(name) or _WORD_OF_PART.search(name[: match.start()])
    )


def _missing_error(path: Path, missing: Sequence[int]) -> UnsuitableError:
    listed = list_first(map(str, missing))
    reason = f"is a part of a model, by its name; those that are missing have the numbers {listed}"
    hint = f"put them, or the index (*{INDEX_ENDING}), beside it; rename a file that is the whole"
    return UnsuitableError(path, reason, hint)


def _may_be_whole(whole: Path, parts: Path, members: Layouts) -> bool:
    """Return whether a member may hold the model of parts: it is no average, of no other time, and
    one of the two lies in the folder itself, where two folders would be two models."""
    if not isinstance(members[whole], OneFile | Shards) or AVERAGE_WORD.search(whole.name):
        return False
    if any(has_time(strip_ending(entry.name)) for entry in (whole, parts)):
        return False
    return members[whole].path == whole or members[parts].path == parts


def _may_be_listed(folder: Path) -> bool:
    """Return whether a folder can be read, and is not one of states, set aside by a tracker, or the
    store of a hub's cache, into which the files of its revisions are links."""
    if _STATE_FOLDER.search(folder.name) or folder.name == SUPERSEDED:
        return False
    if folder.name == "blobs" and (folder.parent / "snapshots").is_dir():
        return False
    return files.is_url(folder) or os.access(folder, os.R_OK | os.X_OK)


def _is_link(path: Path) -> bool:
    return not files.is_url(path) and path.is_symlink()


def _has_equals(signatures: Iterable[_Signature]) -> bool:
    """Return whether two that hold tensors hold the same."""
    known = [signature for signature in signatures if signature]
    return len(set(known)) < len(known)


def _partitions_error(path: Path) -> UnsuitableError:
    hint = "convert it with the program's own script, such as DeepSpeed's zero_to_fp32.py, or let "
    hint += "it save the whole model, as Composer does with state_dict_type: full"
    return UnsuitableError(path, "holds partitions of the model", hint)


def _is_time_within(folder: Path, stem: str) -> bool:
    """Return whether a name is a time, and does not repeat the time of its folder, as in
    `checkpoint-500/global_step500`."""
    return has_time(stem) and find_times(stem)[0].text.lstrip("0") not in folder.name


def _without_time(folder: Path, members: Mapping[str, Layout]) -> dict[str, Layout]:
    """Return the parts of a checkpoint by their names without the number of its folder, as in
    `run--1000_chkpt/action_head--1000_checkpoint.pt`. Numbers that tell parts apart stay."""
    own = {int(digits) for digits in re.findall("[0-9]+", folder.name)}
    alike = Counter(map(make_glob, members))
    by_name = {}
    for stem, layout in members.items():
        name = stem
        for number in _NUMBER_OF_FOLDER.finditer(stem):
            if alike[make_glob(stem)] == 1 and int(number[0].strip("-_.=")) in own:
                name = name.replace(number[0], "", 1)
        by_name[name] = layout
    return by_name if len(by_name) == len(members) else dict(members)


def holds_checkpoints(name: str | Path) -> bool:
    """Return whether a directory, file or glob names checkpoints or an import."""
    try:
        return is_import(name) or bool(Place(name).candidates)
    except DirectoryError:  # also from a glob
        return files.is_glob(name)


def _list_numbered(folder: Path, is_numbered: bool, levels: int = _LEVELS) -> Iterator[Path]:
    """Yield the files in a folder with a number in their paths from it on, the outer ones first."""
    folders = []
    for entry in sorted(files.system.list(folder)):
        if entry.is_dir():
            folders.append(entry)
        elif is_numbered or re.search("[0-9]", entry.name):
            yield entry
    for inner in folders if levels else []:
        has_number = is_numbered or re.search("[0-9]", inner.name) is not None
        yield from _list_numbered(inner, has_number, levels - 1)


def check_foreign(place: Place) -> None:
    """Raise the error about a file of another framework if one of the first files at a place is."""
    with suppress(OSError):
        folder = files.expand_user(place.name)
        for entry in islice(_list_numbered(folder, False), _MOST_FOREIGN):
            row = find_container(entry)
            if row is not None and row.read is None:
                raise foreign_error(entry, row)


def explain_nothing(place: Place) -> None:
    """Raise the error that says why nothing at a place is a checkpoint."""
    folder = files.expand_user(place.name)
    for run in place.runs:
        if run != folder:
            raise DirectoryError(place.name, "holds no checkpoints", f"did you mean {run}?")
    check_foreign(place)
    hint = "name their folder, a file, or a glob such as 'out/step*.pt'"
    if place.is_deeper:
        reason = (
            f"holds no checkpoints in {_LEVELS} levels of folders; those below were not looked at"
        )
        raise DirectoryError(place.name, reason, hint)
    raise NothingHereError(place.name, "holds no checkpoints", hint)
