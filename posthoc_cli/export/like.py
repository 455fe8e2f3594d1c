"""A copy of a checkpoint, or of a model folder, with other values for some of its tensors, and
every other byte as it is: which tensors are replaced, under which names, which files beside them
are copied, and how.

A file is copied in blocks, except for the bytes of the tensors to replace, which are then written
in tiles, in any order. Nothing is unpickled. A tensor that is stored in another order (a
transposed one, or `channels_last`) is collected in memory and written when it is complete. Links
that lead out of a folder are not followed: an output may be uploaded.

The CRC-32 of a member of an archive of `torch.save` follows its content: it is in its entry in the
central directory, at the end of the archive, and either in the descriptor after its content, if
bit 3 of its flags is set, or in the local header before it. A file is one archive, or several end
to end (torch.distributed.checkpoint). torch's `.data/serialization_id`, a hash of all of them, says
which save a file is of, and stays.
"""

from __future__ import annotations

import io
import os
import re
import struct
import threading
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli import files
from posthoc_cli.checkpoints.containers import INDEX_ENDING, SAFETENSORS, container_by_bytes
from posthoc_cli.checkpoints.content import OFFSETS
from posthoc_cli.checkpoints.folders import DCP_METADATA
from posthoc_cli.checkpoints.layouts import Stored
from posthoc_cli.checkpoints.pickles import FileRange, is_archive, member_begin
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.dtypes import DTYPES, EPS, ITEM_BYTES, WORDS
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    argument,
    count_noun,
    quote,
)
from posthoc_cli.snapshots.boxes import Box
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.snapshots.opened_file import OpenedFile, read_small_file
from posthoc_cli.snapshots.output_mark import find_mark, mark_archive, mark_header, mark_pickle
from posthoc_cli.snapshots.outputs import model_files, weights_at
from posthoc_cli.snapshots.source import Source, StoredTensors
from posthoc_cli.snapshots.tensorfile import MAX_HEADER_BYTES, SUFFIX, TensorFile, read_file
from posthoc_cli.synthesis.base import check_shape, fit_prefixes, rename
from posthoc_cli.synthesis.plan import Combination

P = TypeVar("P", bound=Combination)

_BLOCK = 4 << 20  # bytes copied at a time: enough that calls cost nothing next to the copying

_MODEL = re.compile(
    r"(?:(?:pytorch|tf|flax|diffusion|adapter|rust)_)*(?:model|consolidated)(?:[-.][-.\w]*)?"
    r"\.(?:safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ckpt|index\.json)"
)
"""The names of weights in a model folder. Next to averaged weights the files in other formats are
out of date."""

_OTHER_FOLDERS = re.compile(
    r"(?:checkpoint|ckpt|epoch|step)[-_]?\d+|runs|logs|wandb", re.IGNORECASE
)
"""The names of folders in the output of a training that are not part of its model: other
checkpoints (a Trainer keeps many) and logs."""


@dataclass(frozen=True)
class Like:
    """A checkpoint, and the set of its tensors that an output replaces."""

    path: Path  # the file, or the folder
    place: Path  # of the model: the path itself, or the component of a pipeline
    source: Checkpoint  # the set
    chunks: Mapping[str, list[NamedChunk]]  # of the set, by stored name
    word: str  # what it is: "average" or "weights"
    has_tracker: bool  # whether it holds the state of a tracker, which is copied

    @classmethod
    def find(
        cls,
        like: Path | str,
        tensors: Iterable[str],
        raw: bool = False,
        average: str | None = None,
        weights: str | None = None,
    ) -> Like:
        """Find the average of a checkpoint, or its weights if it has none or if they are asked for;
        in a pipeline, the average of the only component that has these tensors. The last
        arguments are as in `Stored`.

        Raises InvalidValueError if nothing is there, for something in a folder that is neither a
        file nor a link to a file in it, or for a file of this package; and FileFormatError.
        """
        path = files.local_path("like", like)
        if path.name.endswith(INDEX_ENDING):
            path = path.parent
        if not path.exists():
            raise InvalidValueError("like", "no such file or folder", value=path)
        place = _component(path, set(tensors))
        stored = Stored(place, raw, average, weights)
        source = None if stored.is_raw else stored.average
        chunks = {} if source is None else _own_chunks(source, stored)
        word = "average" if chunks else "weights"
        if source is None or not chunks:
            source = stored.weights
            chunks = index_chunks(source)
        found = cls(path, place, source, chunks, word, stored.has_tracker)
        found._check_files()
        return found

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def dtype(self) -> str | None:
        """The torch name of the dtype of all floating-point tensors; None if they have several
        dtypes."""
        dtypes = {self.source.entries[name].dtype for name in self.chunks}
        floats = dtypes & EPS.keys()
        if len(floats) != 1:
            return None
        word = DTYPES[floats.pop()].torch_name
        return word if word in WORDS else None

    # --- files

    @cached_property
    def files(self) -> dict[Path, TensorFile]:
        """The files of the model; with tensors, but for the metadata of distributed checkpoints."""
        found = {file.path: file for file in self.source.files}
        for folder in {path.parent for path in found}:
            metadata = folder / DCP_METADATA
            if metadata in self.source.opened:
                found[metadata] = self.source.opened[metadata]
        return found

    @cached_property
    def other_files(self) -> tuple[list[Path], list[str]]:
        """The files of a folder that are copied unchanged, and the names of the others."""
        copied = []
        not_copied = []
        folders = []
        if self.is_folder:
            folders.append(self.path)
        while folders:
            for entry in sorted(folders.pop().iterdir()):
                if self._stays_behind(entry):
                    not_copied.append(str(entry.relative_to(self.path)))
                elif files.is_real_folder(entry):
                    if not entry.name.startswith("."):
                        folders.append(entry)
                elif entry not in self.files:
                    copied.append(entry)
        return copied, not_copied

    def _stays_behind(self, entry: Path) -> bool:
        if files.is_real_folder(entry):
            if entry == self.place or entry in self.place.parents:
                return False
            return _OTHER_FOLDERS.fullmatch(entry.name) is not None
        folders = {path.parent for path in self.files}
        if entry.parent not in folders or entry in self.files:
            return False
        return self._is_stale(entry.name)

    def _is_stale(self, name: str) -> bool:
        """Return whether a file holds the model's weights, too, in another format."""
        names = [path.name for path in self.files if _MODEL.fullmatch(path.name)]
        if not names or not _MODEL.fullmatch(name):
            return False
        indices = [Path(each).suffix + INDEX_ENDING for each in names]
        return not name.endswith(tuple(indices))

    def _check_files(self) -> None:
        for path in self.files:
            if not path.is_relative_to(self.path):
                reason = f"the tensors to replace are in {path}: name that file"
                if len(self.files) > 1:
                    reason = f"is a part of a model: name its folder, {path.parent}"
                raise InvalidValueError("like", reason, value=self.path)
            if path.suffix == SUFFIX and read_file(path).kind is not None:
                reason = f"{path.name} was written by this package, with checksums"
                hint = "name a file that the training or its library wrote"
                raise InvalidValueError("like", reason, hint, value=self.path)
        others, _ = self.other_files
        for path in (*others, *self.files):
            if self.is_folder and not _is_own(path, self.path):
                name = path.relative_to(self.path)
                reason = f"{name} is not a file of this folder, or leads out of it"
                hint = "remove it, or put a copy of the file in its place"
                raise InvalidValueError("like", reason, hint, value=self.path)
        for path in others:
            if path.suffix == SUFFIX and self._is_part(path):
                model = next(iter(self.files))
                if model.parent != self.path:
                    model = model.parent
                reason = f"holds the model twice: {path.name} is a part of it, beside {model.name}"
                raise InvalidValueError("like", reason, f"name {model}", value=self.path)

    def _is_part(self, path: Path) -> bool:
        """Return whether a file holds chunks of tensors that are replaced elsewhere."""
        with suppress(FileFormatError):
            file = read_file(path)
            return OFFSETS in file.metadata and not self.chunks.keys().isdisjoint(file.entries)
        return False

    # --- tensors

    def fit(self, plan: P) -> tuple[P, Replacement]:
        """Match the tensors of a plan with the checkpoint's; return a plan of them, and what an
        output has in place of the checkpoint's.

        Raises MismatchError for a tensor that has another shape in the checkpoint or is not in it,
        two tensors that are one in it, or quantized weights.
        """
        # a model of another program does not say which tensors are averages
        floats = [name for name, tensor in plan.tensors.items() if tensor.dtype in EPS]
        averages = plan.newest.averaged or floats
        stored = self._stored_names(plan.names, averages)
        self._check_quantized([stored[name] for name in averages])
        replaced = self._find_places(plan, stored)
        entries = {}
        tensors = {}
        dtypes = {}
        for name, tensor in replaced.items():
            dtypes[name] = tensor.entry.dtype
            tensors[plan.names[name][0]] = tensor
            for chunk in tensor.chunks:
                entries[chunk.name] = tensor.entry
        own = self.chunks.keys()
        replacement = Replacement(
            self,
            entries,
            tensors,
            kept=[name for name in own if name not in entries],
            shared=[name for name in averages if own.isdisjoint(stored[name])],
        )
        plan = replace(plan, dtypes=dtypes, subset=frozenset(replaced))
        return plan, replacement

    def _stored_names(
        self,
        names: Mapping[str, Sequence[str]],
        averages: Collection[str],
    ) -> dict[str, set[str]]:
        """Find the names under which the checkpoint stores tensors; it may have none of them."""
        of_averages = [names[name] for name in averages]
        old, new = self._find_prefixes(of_averages)
        stored = {}
        for name, aliases in names.items():
            renamed = rename(aliases, old, new)
            stored[name] = {self.source.aliases.get(alias, alias) for alias in renamed}
        return stored

    def _check_quantized(self, averages: Iterable[set[str]]) -> None:
        config = self.place / "config.json"
        is_quantized = False
        if config.is_file():
            content = read_small_file(config, MAX_HEADER_BYTES)
            is_quantized = b'"quantization_config"' in content
        known = self.source.entries
        dtypes = {known[name].dtype for name in set().union(*averages) & known.keys()}
        if is_quantized or not dtypes <= EPS.keys():
            reason = "its weights are quantized, as its quantization_config or their dtype says"
            hint = "name a folder to which the trained model itself was saved"
            raise MismatchError(self.place, reason, hint)

    def _find_places(
        self,
        plan: Combination,
        stored: Mapping[str, set[str]],
    ) -> dict[str, Replaced]:
        """Find the places of tensors, given their names in the checkpoint."""
        replaced = dict[str, Replaced]()
        owners = dict[str, str]()
        for name, names in stored.items():
            dtype = plan.output_dtype(name)
            for own_name in sorted(names & self.chunks.keys()):
                owner = owners.setdefault(own_name, name)
                if owner != name:
                    self._check_equal(plan, owner, name)
                    continue
                entry = self.source.entries[own_name]
                path = self.chunks[own_name][0].path
                check_shape(path, own_name, entry.shape, plan.box(name).shape)
                are_numbers = entry.dtype in EPS and dtype in EPS
                if not are_numbers and entry.dtype != dtype:
                    continue
                other, chunks = replaced.setdefault(name, Replaced(entry, []))
                if other != entry:
                    reason = f"tensor {quote(name)} is {other.dtype} and {entry.dtype} in it"
                    raise MismatchError(self.place, reason)
                chunks += self.chunks[own_name]
        return replaced

    def _check_equal(
        self,
        plan: Combination,
        first: str,
        other: str,
    ) -> None:
        """Raise a MismatchError unless two tensors have the same values; they may then be tied."""
        for source in plan.sources:
            values = source.tensor(first)
            if not torch.equal(values, source.tensor(other)):
                reason = f"tensors {quote(first)} and {quote(other)} are one tensor in it"
                raise MismatchError(self.place, reason, "they would get different values")

    def _find_prefixes(
        self,
        averages: Sequence[Sequence[str]],
    ) -> tuple[str, str]:
        """Find the name prefixes of the run and of the checkpoint."""
        known = self.source.entries.keys() | self.source.aliases.keys()
        absent = sorted(names[0] for names in averages if known.isdisjoint(names))
        if not absent:
            return "", ""
        fitting = []
        for old, new in fit_prefixes(averages, known):
            if all(rename(names, old, new) & known for names in averages):
                fitting.append((old, new))
        if len(fitting) > 1:
            reason = f"the names of the run fit under {fitting[0][1]} and {fitting[1][1]}"
            hint = f"name one of them with {argument('average')}"
            raise MismatchError(self.place, reason, hint)
        if fitting:
            return fitting[0]
        reason = f"lacks {count_noun(len(absent), 'tensor')} of the run, such as {absent[0]!r}"
        hint = (
            "name a file or folder to which the trained model itself was saved; if transformers "
            "renames the tensors on disk, as in mixtures of experts, load the averages into the "
            "model (load_into) and save it with save_pretrained"
        )
        raise MismatchError(self.place, f"{reason}; it has tensors such as {min(known)!r}", hint)


def _component(path: Path, tensors: set[str]) -> Path:
    """Find the component of a pipeline that has these tensors, if it is the only one; else return
    the path itself."""
    if not path.is_dir() or weights_at(path) is not None:
        return path
    components = []
    for entry in sorted(path.iterdir()):
        weights = weights_at(entry) if entry.is_dir() else None
        if weights is not None:
            held = set[str]()
            for file in model_files(weights):
                held.update(read_file(file).entries)
            if tensors <= held:  # an adapter beside other parts of the model has some of them
                components.append(entry)
    return components[0] if len(components) == 1 else path


def _own_chunks(
    average: Source,
    stored: Stored,
) -> dict[str, list[NamedChunk]]:
    """Find the chunks of an average that are not also the weights', which complete it."""
    places = set[tuple[Path, Entry]]()
    with suppress(FileFormatError):  # which of its tensors are the weights is unclear
        places = {chunks[0].place for chunks in index_chunks(stored.weights).values()}
    own = index_chunks(average)
    return {name: own[name] for name in own if own[name][0].place not in places}


def _is_own(path: Path, folder: Path) -> bool:
    """Return whether a path in a folder is a file of the folder, or a link to one.

    In the cache of the Hugging Face Hub, files are links to the blobs of their repository:
    snapshots/<revision>/<name> -> ../../blobs/<hash>.
    """
    real = Path(os.path.realpath(path))
    root = Path(os.path.realpath(folder))
    if not real.is_file():
        return False
    if real.is_relative_to(root):
        return True
    for parent in root.parents:
        if parent.name == "snapshots":
            return real.parent == parent.parent / "blobs"
    return False


# --- tensors in files


class NamedChunk(NamedTuple):
    """A box of a tensor in a file, by its name there."""

    path: Path
    name: str
    entry: Entry
    box: Box

    @property
    def place(self) -> tuple[Path, Entry]:
        return self.path, self.entry

    @property
    def begin(self) -> int:
        return self.entry.begin

    @property
    def end(self) -> int:
        """The place in the file after the last byte."""
        return self.begin + self.entry.reach * ITEM_BYTES[self.entry.dtype]


class Replaced(NamedTuple):
    """The dtype and shape of a tensor of a checkpoint, and its chunks."""

    entry: Entry
    chunks: list[NamedChunk]


def index_chunks(source: StoredTensors) -> dict[str, list[NamedChunk]]:
    """List the chunks of the tensors of a checkpoint, by their stored names."""
    chunks = dict[str, list[NamedChunk]]()
    for file in source.files:
        for name, entry in file.entries.items():
            box = file.boxes.get(name) or Box.full(entry.shape)
            chunk = NamedChunk(file.path, name, entry, box)
            chunks.setdefault(name, []).append(chunk)
    return chunks


@dataclass(frozen=True)
class Replacement:
    """What an output that is a copy of a checkpoint has instead."""

    like: Like
    entries: Mapping[str, Entry]  # the replaced tensors, by their names in the checkpoint
    tensors: Mapping[str, Replaced]  # by their names in the output of a synthesis
    kept: Sequence[str]  # tensors of the replaced set that the run does not have
    shared: Sequence[str]  # averages that have no place of their own: it is the weights', too

    @property
    def nbytes(self) -> int:
        others, _ = self.like.other_files
        return sum(path.stat().st_size for path in (*self.like.files, *others))

    def to_dict(self) -> dict[str, Any]:
        _, not_copied = self.like.other_files
        return {
            "path": str(self.like.path),
            "replaced": self.like.word,
            "kept": self.kept,
            "shared": self.shared,
            "not_copied": not_copied,
            "has_tracker": self.like.has_tracker,
        }


# --- a file


class CopiedFile:
    """A copy of a file in a pending one, except for the bytes of the chunks: each is to be written
    once. It gets a mark, if that is not empty.

    Raises FileFormatError if the file was changed since its index was read, and MismatchError if
    chunks overlap.
    """

    def __init__(
        self,
        like: TensorFile,
        chunks: Iterable[NamedChunk],
        out: files.PendingFile,
        mark: str = "",
    ) -> None:
        filled = [chunk for chunk in chunks if chunk.entry.size]
        self._chunks = sorted(filled, key=lambda chunk: chunk.begin)
        self._members = set[ArchiveMember]()
        # of each chunk in another order: its bytes in row-major order, and how many are missing
        self._collected = dict[NamedChunk, tuple[npt.NDArray[np.uint8], int]]()
        self._lock = threading.Lock()
        self._file = out
        self._shift = 0  # from places in the file to places in the copy
        _check_apart(self._chunks)
        with like.opened() as source:
            header = self._mark_header(source, mark) if mark else 0
            end, _ = find_mark(source)  # a copy of a copy has one mark
            for first, last in self._gaps(header, end if mark else source.size):
                for at in range(first, last, _BLOCK):
                    block = source.read_at(min(_BLOCK, last - at), at)
                    out.write_at(block, at + self._shift)
            if is_archive(source):
                places = [chunk.begin for chunk in self._chunks]
                self._members = members_at(source, places)
            if mark and is_archive(source):
                mark_archive(out, end, mark, end - _comment_begin(source))
            elif mark and not header:
                mark_pickle(out, end, mark)

    def _mark_header(self, source: OpenedFile, mark: str) -> int:
        """Write the header of a safetensors file with a mark; return the length of its own one, 0
        for another file."""
        if container_by_bytes(source) is not SAFETENSORS:
            return 0
        length, header = mark_header(source, mark)
        self._file.write_at(header, 0)
        self._shift = len(header) - length
        return length

    def _gaps(self, begin: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges to copy, with the ranges of tensors stored in another order among
        them."""
        for chunk in self._chunks:
            if not chunk.entry.strides:
                yield begin, chunk.begin
                begin = chunk.end
        yield begin, size

    def write(
        self,
        chunk: NamedChunk,
        data: memoryview,
        begin: int,
    ) -> None:
        """Write bytes of a chunk in row-major order, from byte `begin` on."""
        if not chunk.entry.strides:
            self._file.write_at(data, chunk.begin + begin + self._shift)
            return
        with self._lock:  # the bytes between the chunk's are read and written back
            if chunk not in self._collected:
                size = chunk.entry.nbytes
                self._collected[chunk] = np.empty(size, np.uint8), size
            collected, left = self._collected.pop(chunk)
            collected[begin : begin + len(data)] = data
            if left > len(data):
                self._collected[chunk] = collected, left - len(data)
                return
            stored = np.empty(chunk.end - chunk.begin, np.uint8)
            self._file.read_into(stored.data, chunk.begin)
            view = chunk.entry.view(stored)
            view[...] = collected.view(view.dtype).reshape(view.shape)
            self._file.write_at(stored.data, chunk.begin)

    def complete(self) -> None:
        """Set the checksums of changed members of an archive."""
        room = memoryview(bytearray(_BLOCK))
        for begin, end, places in self._members:
            checksum = 0
            for at in range(begin, end, _BLOCK):
                view = room[: end - at]
                self._file.read_into(view, at)
                checksum = zlib.crc32(view, checksum)
            for place in places:
                self._file.write_at(checksum.to_bytes(4, "little"), place)

    def publish(self) -> None:
        self._file.publish()


def _check_apart(chunks: Sequence[NamedChunk]) -> None:
    """Raise a MismatchError if two elements have bytes in common; the chunks of a file are by their
    places."""
    reaching = list[NamedChunk]()  # some of whose bytes may be in common
    end = 0
    for chunk in chunks:
        if chunk.begin >= end:
            _check_cluster(reaching)
            reaching = []
        reaching.append(chunk)
        end = max(end, chunk.end)
    _check_cluster(reaching)


def _check_cluster(chunks: Sequence[NamedChunk]) -> None:
    if not any(chunk.entry.strides for chunk in chunks) and len(chunks) < 2:
        return
    begin = chunks[0].begin
    end = max(chunk.end for chunk in chunks)
    used = np.zeros(end - begin, np.uint8)
    for chunk in chunks:
        view = chunk.entry.view(used[chunk.begin - begin :])
        view[...] = np.iinfo(view.dtype).max
    total = sum(chunk.entry.nbytes for chunk in chunks)
    if np.count_nonzero(used) < total:
        names = " and ".join(quote(chunk.name) for chunk in chunks[:2])
        reason = f"elements of {names} have bytes in common, as after `expand`"
        raise MismatchError(chunks[0].path, reason, "they would get different values")


# --- archives

_LOCAL_CRC = 14
_DESCRIPTOR_CRC = 4
_ENTRY_CRC = 16
_ENTRY_SIZES = 28  # of the name, the extra field and the comment that follow an entry
_ENTRY_BYTES = 46
_HAS_DESCRIPTOR = 8


class ArchiveMember(NamedTuple):
    """The content of a member, and the places of its CRC-32."""

    begin: int
    end: int
    checksums: tuple[int, int]


def members_at(
    file: OpenedFile,
    places: Iterable[int],
) -> set[ArchiveMember]:
    """Find the members that hold the bytes at these places of a file of archives."""
    left = sorted(places)
    members = set()
    end = file.size
    try:
        while left:
            stream = io.BufferedReader(FileRange(file, 0, end))
            entries = _entries(file, zipfile.ZipFile(stream))
            headers = sorted(entries)
            end = headers[0]
            while left and left[-1] >= end:
                position = left.pop()
                header = headers[bisect_right(headers, position) - 1]
                members.add(_member(file, *entries[header], position))
    except (zipfile.BadZipFile, ValueError, LookupError, struct.error) as error:
        reason = "its tensors cannot be replaced in place: not an archive as torch.save writes it"
        raise FileFormatError(file.path, reason) from error
    return members


def _comment_begin(file: OpenedFile) -> int:
    """Find where the comment of an archive begins, at its end or before."""
    archive = zipfile.ZipFile(io.BufferedReader(FileRange(file, 0, file.size)))
    return file.size - len(archive.comment)


def _entries(
    file: OpenedFile,
    archive: zipfile.ZipFile,
) -> dict[int, tuple[zipfile.ZipInfo, int]]:
    """Find members, and the places of their entries, by the places of their local headers."""
    entries = {}
    at = archive.start_dir
    for info in archive.infolist():
        entries[info.header_offset] = info, at
        sizes = file.read_at(6, at + _ENTRY_SIZES)
        at += _ENTRY_BYTES + sum(struct.unpack("<3H", sizes))
    return entries


def _member(
    file: OpenedFile,
    info: zipfile.ZipInfo,
    entry: int,
    position: int,
) -> ArchiveMember:
    begin = member_begin(file, info)
    end = begin + info.file_size
    checksum = info.header_offset + _LOCAL_CRC
    if info.flag_bits & _HAS_DESCRIPTOR:
        checksum = end + _DESCRIPTOR_CRC
    if not begin <= position < end:
        raise ValueError("a tensor is outside the members")
    return ArchiveMember(begin, end, (checksum, entry + _ENTRY_CRC))
