"""What lies at a place: the files and folders that may each be a checkpoint.

A file is a candidate if its first bytes begin a file of tensors. A folder is one checkpoint if its
entries are the parts of one time, and else a place with several. Names say the times of entries if
a word does; where none does, the tensors of two entries decide: checkpoints of two times hold the
same names and shapes, and values near each other, as two layers of a model do not.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
    make_glob,
)
from posthoc_cli.checkpoints.source import are_near, first_values_of
from posthoc_cli.errors import DirectoryError, FileFormatError, UnsuitableError, VanishedError
from posthoc_cli.profiles import FloatArray
from posthoc_cli.snapshots.directory import SUPERSEDED, is_import, is_snapshot_name
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
_TIME = re.compile(
    r"(?:step|iter|epoch|(?<![a-z])ep)[a-z]*[=_.-]*([0-9]+)"
    r"|^(?:checkpoint|ckpt)[=_.-]*([0-9]+)|^([0-9]+)$",
    re.IGNORECASE,
)
_DEEP = 5  # levels below a folder whose name is a time: fairseq2 has a file four folders down
_LEVELS = 3  # of folders below a place that hold checkpoints of several times
_MOST_FOREIGN = 100  # files whose kinds are looked at where nothing is a checkpoint
_MOST_ENTRIES = 20_000  # at a place: listing a whole disk would take minutes


@dataclass(frozen=True, eq=False)
class Candidate:
    """A file or folder that may be a checkpoint, and what it consists of."""

    path: Path
    layout: Layout


class NothingHereError(DirectoryError):
    """There is nothing at a place that may be a checkpoint."""


class Place:
    """A folder, a file or a glob, and the checkpoints there, each opened once."""

    def __init__(self, name: str | Path) -> None:
        self.name = name
        self.notes = list[str]()
        self.runs = list[Path]()  # folders of snapshots
        self._reader = Reader()
        self._left = _MOST_ENTRIES
        self._is_cut = False
        self._listed = set[str]()  # folders, also by links

    def open(self, candidate: Candidate) -> Content:
        """Read the content of a candidate; raise FileFormatError if it cannot be read."""
        return self._reader.open(candidate.path, candidate.layout)

    # --- the candidates

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The files and folders that may each be a checkpoint."""
        path = files.expand_user(self.name)
        matches = _list_matches(path)
        if not matches:
            raise DirectoryError(self.name, "no file or folder matches")
        found = dict[Path, Candidate]()
        for match in matches:
            if match != path and is_snapshot_name(match):
                continue
            layout = None if match.is_dir() else self.layout_at(match)
            if layout is not None:
                found[match] = Candidate(match, layout)
                continue
            for candidate in self._candidates_in(match, 0 if files.is_url(path) else _LEVELS):
                found[candidate.path] = candidate
        if self._is_cut:
            note = f"holds more than {_MOST_ENTRIES:,} files; some folders in it were not looked "
            self.notes.append(f"{note}at: name the folder of the checkpoints")
        return [*found.values()]

    def _candidates_in(self, folder: Path, levels: int) -> list[Candidate]:
        """List the checkpoints in a folder and in the folders in it, or the folder if it is one
        itself."""
        real = str(folder) if files.is_url(folder) else os.path.realpath(folder)
        if real in self._listed:
            return []
        self._listed.add(real)
        members, others = self._list(folder)
        below = list[Candidate]()
        for other in others if levels else ():
            if not (other.name == SUPERSEDED or is_import(other)):
                below += self._candidates_in(other, levels - 1)
        own = self._find_layout(folder, members)
        if own is None or (below and not isinstance(own, Refused)):
            return [*(Candidate(entry, layout) for entry, layout in members.items()), *below]
        is_file = isinstance(own, OneFile | Refused) and own.path.parent == folder
        return [Candidate(own.path if is_file else folder, own), *below]

    def layout_at(self, path: Path) -> Layout | None:
        """Find what a file or folder consists of; None for a folder that is not one checkpoint."""
        if path.is_dir():
            return self._find_layout(path, self._list(path)[0])
        if _PARTITION.search(path.name):
            return Refused(path, _partitions_error(path))
        return _refuse_shards([path]) or _layout_of_file(path)

    def open_at(self, path: Path) -> Content:
        """Open the checkpoint that a path names: of a folder with the checkpoints of a training the
        model beside them."""
        layout = self.layout_at(path) or self._final_model_in(path)
        if layout is None:
            reason = "holds no weights: no safetensors, .bin or .pt file, and no .metadata"
            raise UnsuitableError(path, reason)
        return self._reader.open(path, layout)

    def _final_model_in(self, folder: Path) -> Layout | None:
        members, _ = self._list(folder)
        for stem in MODEL_FILES:
            for entry, layout in members.items():
                if strip_ending(entry.name) == stem:
                    return layout
        return None

    # --- one folder

    def _list(self, folder: Path) -> tuple[dict[Path, Layout], list[Path]]:
        """List the entries of a folder that are each a checkpoint or a part of one, perhaps deeper
        below a name that says a time, and the other folders in it."""
        is_numbered = _TIME.search(folder.name) is not None
        return self._list_below(folder, _DEEP if is_numbered else 2, is_numbered)

    def _list_below(
        self,
        folder: Path,
        levels: int,
        is_numbered: bool,
    ) -> tuple[dict[Path, Layout], list[Path]]:
        with named_on_error(folder, "read"):
            entries = sorted(files.system.list(folder))
        self._left -= len(entries)
        by_name = {entry.name: entry for entry in entries}
        shards = [entry for entry in entries if SHARD.search(entry.name)]
        has_index = any(name.endswith(INDEX_ENDING) for name in by_name)
        if DCP_METADATA in by_name:
            return {folder: Distributed(by_name[DCP_METADATA])}, []
        members: dict[Path, Layout] = {}
        others = list[Path]()
        for name, entry in by_name.items():
            if name.startswith(".") or is_state(name):
                continue
            if is_snapshot_name(entry):
                self.runs.append(folder)
                continue
            if entry.is_dir():
                self._is_cut |= self._left < 0
                if _STATE_FOLDER.search(name) or self._left < 0:
                    continue
                layout = self._layout_below(entry, levels - 1, is_numbered)
                if layout is not None:
                    members[entry] = layout
                else:
                    others.append(entry)
            elif entry not in shards and (name.endswith(INDEX_ENDING) or may_hold_tensors(entry)):
                members[entry] = _layout_of_file(entry)
        if shards and not has_index:
            members[shards[0]] = _refuse_shards(shards) or OneFile(shards[0])
        return members, others

    def _layout_below(self, folder: Path, levels: int, is_numbered: bool) -> Layout | None:
        if not is_numbered and re.search("[0-9]", folder.name):
            levels = _DEEP
            is_numbered = True
        is_open = files.is_url(folder) or os.access(folder, os.R_OK | os.X_OK)
        if levels < 1 or not is_open:
            return None
        members, _ = self._list_below(folder, levels, is_numbered)
        return self._find_layout(folder, members)

    def _find_layout(self, folder: Path, members: Mapping[Path, Layout]) -> Layout | None:
        """Find what a folder with such members is; None if they are checkpoints of several times,
        or if there are none."""
        if self._are_partitions(members):
            return Refused(folder, _partitions_error(folder))
        if not members or self._are_several_times(folder, members):
            return None
        by_stem: dict[str, Layout] = {}
        for entry, layout in members.items():
            by_stem[strip_ending(entry.name)] = (
                layout  # of two formats safetensors, which come last
            )
        usual = [stem for stem in MODEL_FILES if stem in by_stem]
        for stem in usual[1:]:  # the same model in another format
            del by_stem[stem]
        if len(by_stem) == 1:
            return by_stem.popitem()[1]
        return Sets(folder, by_stem)

    def _are_partitions(self, members: Mapping[Path, Layout]) -> bool:
        """Return whether a name says that files are partitions of a model, or files of a number
        "of" several, or of two ranks, hold tensors of the same names, as shards do not."""
        if any(_PARTITION.search(entry.name) for entry in members):
            return True
        by_name = dict[str, list[Layout]]()
        for entry, layout in members.items():
            number = _OF_MANY.search(entry.name)
            time = _TIME.search(entry.name)
            is_time = number and time and time.start(1) == number.start()  # epoch-01-of-20
            if number is None or is_time or AVERAGE_WORD.search(entry.name):
                continue
            others = by_name.setdefault(entry.name.replace(number[0], ""), [])
            if any(self._are_partitions_of_one(layout, other) for other in others):
                return True
            others.append(layout)
        return False

    def _are_partitions_of_one(self, one: Layout, other: Layout) -> bool:
        """Return whether two files hold tensors of the same names, but not equal ones, as each rank
        may write them."""
        names = [{name for name, _ in self._signature(layout)} for layout in (one, other)]
        values = self._first_values(one, other)
        return bool(names[0] & names[1]) and not np.array_equal(values[0], values[1])

    def _are_several_times(self, folder: Path, members: Mapping[Path, Layout]) -> bool:
        """Return whether entries are checkpoints of several times, and not the parts of one."""
        stems = dict[str, Layout]()
        for entry, layout in members.items():
            if entry != folder:
                stems[strip_ending(entry.name)] = layout
        has_usual = not stems.keys().isdisjoint(MODEL_FILES)
        timed = [stem for stem in stems if _is_time_within(folder, stem)]
        if len(set(map(make_glob, timed))) < len(timed) or (timed and not has_usual):
            return True
        says_time = _TIME.search(strip_ending(folder.name)) is not None
        by_glob = dict[str, list[Layout]]()
        for stem, layout in stems.items():
            by_glob.setdefault(make_glob(stem), []).append(layout)
        for layouts in by_glob.values():
            first, *others = layouts
            for other in others:
                if self._are_alike(first, other):
                    return not says_time or self._are_near(first, other)
        if says_time or has_usual:
            return False
        weights = [layouts[0] for glob, layouts in by_glob.items() if not AVERAGE_WORD.search(glob)]
        return _has_equals(map(self._signature, weights))

    def _signature(self, layout: Layout) -> frozenset[tuple[str, tuple[int, ...]]]:
        """Find the names and shapes of the tensors of a layout, without the state of an optimizer;
        none if it cannot be read."""
        try:
            content = self._reader.read(layout, {})
        except VanishedError:
            raise
        except FileFormatError:
            return frozenset()
        named = content.tensors.items()
        return frozenset(
            (name, tensor.shape) for name, tensor in named if not content.is_of_optimizer(name)
        )

    def _are_alike(self, one: Layout, other: Layout) -> bool:
        return _has_equals([self._signature(one), self._signature(other)])

    def _are_near(self, one: Layout, other: Layout) -> bool:
        return are_near(*self._first_values(one, other))

    def _first_values(self, *layouts: Layout) -> list[FloatArray]:
        contents = [self._reader.read(layout, {}) for layout in layouts]
        return [first_values_of(content, content.tensors) for content in contents]


def _layout_of_file(path: Path) -> Layout:
    if path.name.endswith(INDEX_ENDING):
        return Shards(path)
    if not files.is_url(path) and path.is_symlink() and not path.exists():
        return Refused(path, UnsuitableError(path, "is a link to a file that is missing"))
    return OneFile(path)


def _refuse_shards(files: Sequence[Path]) -> Refused | None:
    """Refuse files that are shards of a model; None for one file, or a shard that is all of it."""
    path = files[0]
    if not SHARD.search(path.name) or "-of-00001." in path.name:
        return None
    reason = f"is a shard of a model, whose index (*{INDEX_ENDING}) says what belongs together"
    hint = "name the folder of the index; without one, save the model again in one file"
    return Refused(path, UnsuitableError(path, reason, hint))


def _has_equals(signatures: Iterable[frozenset[tuple[str, tuple[int, ...]]]]) -> bool:
    """Return whether two that hold tensors hold the same."""
    known = [signature for signature in signatures if signature]
    return len(set(known)) < len(known)


def _partitions_error(path: Path) -> UnsuitableError:
    hint = "convert it with the program's own script, such as DeepSpeed's zero_to_fp32.py"
    return UnsuitableError(path, "holds partitions of the model", hint)


def _is_time_within(folder: Path, stem: str) -> bool:
    """Return whether a name is a time, and does not repeat the time of its folder, as in
    `checkpoint-500/global_step500`."""
    match = _TIME.search(stem)
    if match is None:
        return False
    return match[match.lastindex or 0].lstrip("0") not in folder.name


def _list_matches(pattern: Path) -> list[Path]:
    """List the files and folders that a glob or a path names."""
    if not files.is_glob(pattern):
        return [pattern] if pattern.exists() else []
    if files.is_url(pattern):
        return [*pattern.parent.glob(pattern.name)]
    # Path.glob takes no absolute patterns
    return sorted(map(Path, glob.glob(str(pattern), recursive=True)))  # noqa: PTH207


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
    raise NothingHereError(place.name, "holds no checkpoints", hint)
