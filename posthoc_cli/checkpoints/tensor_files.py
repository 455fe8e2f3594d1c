"""Files of tensors that other programs wrote: safetensors, or what `torch.save` and `pickle.dump` make.

A file is indexed once, and its tensors are then read from where they are. Such files have no checksums of blocks: what
tells that a file is still the one that was indexed is its size, the places of its tensors, and a sample of its content.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from numpy.lib.stride_tricks import as_strided

from posthoc_cli import files
from posthoc_cli.checkpoints.archives import FoundTensor, View, read_archive
from posthoc_cli.checkpoints.pickles import Node, PickleError, Readable
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.chunks import Box, row_major
from posthoc_cli.snapshots.directory import PICKLES
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.reader import Part, TensorFile, named_on_error, open_regular, read_header

ENDINGS = (fmt.SUFFIX, *PICKLES)

_SAMPLES, _SAMPLE = 16, 4096
_MOST_VALUES = 1_000_000
_DEEPEST = 100


class OpenedFile:
    """A regular file, open for reading at any place; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor = path, open_regular(path)
        self.size = os.fstat(self._descriptor).st_size

    def read_at(self, count: int, offset: int) -> bytes:
        """The bytes at an offset; fewer at the end of the file."""
        with named_on_error(self.path, "read"):
            return files.read_at(self._descriptor, count, offset)

    def __enter__(self) -> OpenedFile:
        return self

    def __exit__(self, *_: object) -> None:
        files.system.close(self._descriptor)


@dataclass(frozen=True)
class IndexedFile:
    """What a file holds.

    Attributes:
        content: tensors (`FoundTensor`), numbers, texts, and nodes in place of tensors that are not read, by the keys
            that lead to each.
        metadata: of a safetensors file; else empty.
        identity: 16 hexadecimal digits, of its size and a sample of its content.
    """

    path: Path
    size: int
    content: Mapping[tuple[str, ...], Any]
    metadata: Mapping[str, str]
    identity: str


def index_file(path: Path, any_kind: bool = True) -> IndexedFile:
    """Find the tensors of a file. A FileFormatError names it and says what is wrong.

    Without `any_kind` snapshots and states of this package are errors.
    """
    if path.suffix == fmt.SUFFIX:
        header = read_header(path)
        if file_kind(header) in ("snapshot", "state") and not any_kind:
            raise FileFormatError(path, f"is a {file_kind(header)} of this package, no checkpoint")
        found: dict[tuple[str, ...], Any] = {
            (name,): FoundTensor(entry.dtype, entry.shape, row_major(entry.shape), begin, begin + entry.nbytes)
            for name, entry in header.tensors.items()
            for begin in [header.payload_start + entry.begin]
        }
        with OpenedFile(path) as file:
            return IndexedFile(path, file.size, found, header.metadata, sampled_identity(file, file.size))
    with OpenedFile(path) as file:
        content = read_range(file, 0, file.size)
        try:
            found = leaves(content)
        except PickleError as error:
            raise FileFormatError(path, f"cannot be read as tensors: {error}") from error
        return IndexedFile(path, file.size, found, {}, sampled_identity(file, file.size))


def read_range(file: OpenedFile, begin: int, end: int) -> Any:
    """The object of a pickle or archive in a range of a file, with its tensors; a FileFormatError names the file."""
    try:
        return _located(read_archive(file, begin, end))
    except PickleError as error:
        raise FileFormatError(file.path, f"cannot be read as tensors: {error}") from error
    except RecursionError as error:
        raise FileFormatError(file.path, "cannot be read as tensors: a damaged pickle, nested too deeply") from error


def _located(value: Any) -> Any:
    """The same object with tensors in place of views; containers that it holds several times stay one."""
    known: dict[int, tuple[Any, Any]] = {}  # by the id of an object, which is held so that it stays its own

    def visit(one: Any, depth: int) -> Any:
        if isinstance(one, View):
            return one.found()
        if not isinstance(one, dict | list | tuple | Node):
            return one
        if id(one) in known:
            return known[id(one)][1]
        if depth > _DEEPEST or len(known) > _MOST_VALUES:
            raise PickleError("nested too deeply, or with too many values")
        if isinstance(one, tuple):
            made = tuple(visit(item, depth + 1) for item in one)
            known[id(one)] = one, made
            return made
        known[id(one)] = one, one
        if isinstance(one, Node):
            one.arguments = visit(one.arguments, depth + 1)
            one.state, one.items, one.values = (visit(part, depth + 1) for part in (one.state, one.items, one.values))
        elif isinstance(one, list):
            one[:] = [visit(item, depth + 1) for item in one]
        else:
            for key in one:
                one[key] = visit(one[key], depth + 1)
        return one

    return visit(value, 0)


def leaves(value: Any) -> dict[tuple[str, ...], Any]:
    """The tensors, numbers and texts within dicts, by the keys that lead to each.

    A tensor of a kind that is not read (sparse, quantized, spread over processes) stays a node. The names of modules
    within a pickled module are one key, joined by dots, as in a state dict.
    """
    found: dict[tuple[str, ...], Any] = {}
    left: list[tuple[tuple[str, ...], Any, int, bool]] = [((), value, 0, False)]
    for _ in range(_MOST_VALUES):
        if not left:
            return found
        path, one, depth, within = left.pop()
        is_module = False
        if isinstance(one, Node) and one.name.startswith("torch._utils._rebuild"):
            found[path] = one
        elif isinstance(one, Node):
            held = _module_tensors(one)
            is_module, one = held is not None, held or one.items
        if isinstance(one, dict) and depth < _DEEPEST:
            for key in reversed(one):
                if isinstance(key, str | int):
                    inner = (*path[:-1], f"{path[-1]}.{key}") if is_module and within else (*path, str(key))
                    left.append((inner, one[key], depth + 1, is_module))
        elif isinstance(one, FoundTensor | int | float | str):
            found[path] = one
    raise PickleError("holds too many values")


def _module_tensors(node: Node) -> dict[Any, Any] | None:
    """The parameters, buffers and inner modules of a pickled torch module; None of something else.

    Its attributes are its state, or are among what it is made of, also one level further down under `state`.
    """
    for value in (node.state, *node.arguments):
        found = value.items if isinstance(value, Node) else value
        for state in (found, found.get("state")) if isinstance(found, dict) else ():
            if isinstance(state, dict) and {"_parameters", "_buffers", "_modules"} <= state.keys():
                own = [state[key] for key in ("_parameters", "_buffers", "_modules")]
                held = {key: value for part in own if isinstance(part, dict) for key, value in part.items()}
                unsaved = state.get("_non_persistent_buffers_set")
                return {key: held[key] for key in held if not (isinstance(unsaved, list) and key in unsaved)}
    return None


def sampled_identity(file: Readable, size: int) -> str:
    """16 hexadecimal digits of a file's size and of pieces of its content, from the first to the last."""
    digest = xxhash.xxh3_64(size.to_bytes(8, "little"))
    last = max(0, size - _SAMPLE)
    for index in range(_SAMPLES):
        digest.update(file.read_at(_SAMPLE, last * index // (_SAMPLES - 1)))
    return digest.hexdigest()


# --- reading tensors


@dataclass(frozen=True)
class ForeignPart(Part):
    """A file of a checkpoint; `strided` are the tensors whose elements are not stored in their order."""

    identity: str = ""
    strided: Mapping[str, FoundTensor] = field(default_factory=dict)

    def open(self) -> ForeignFile:
        """Open it; a FileFormatError if it is not the file that was indexed."""
        return ForeignFile(self)


class ForeignFile(TensorFile):
    """A file of a checkpoint opened for its tensors."""

    def __init__(self, part: ForeignPart) -> None:
        self.path, self.header, self._strided = part.path, part.header, part.strided
        self._descriptor, self._checksums = open_regular(part.path), {}
        self._cached: tuple[str, npt.NDArray[np.uint8]] | None = None
        self._lock = threading.Lock()
        try:
            self._opened = self._state()
            if sampled_identity(self, self._opened[0]) != part.identity:
                raise FileFormatError(part.path, "was replaced while it was being used", "run again")
        except BaseException:
            files.system.close(self._descriptor)
            raise

    def read_at(self, count: int, offset: int) -> bytes:
        """The bytes at an offset; fewer at the end of the file."""
        with named_on_error(self.path, "read"):
            return files.read_at(self._descriptor, count, offset)

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def read_range(self, name: str, begin: int, end: int) -> PlainRange:  # type: ignore[override]  # noqa: ARG002
        """The bytes `begin` to `end` of a tensor, read in order."""
        return PlainRange(self, name, begin)

    def fill(self, name: str, view: memoryview, begin: int) -> None:
        """Fill `view` from byte `begin` of a tensor on, across the tensors that follow."""
        if name in self._strided:
            view[:] = self._gathered(name)[begin : begin + len(view)].data
        else:
            super().fill(name, view, begin)

    def _gathered(self, name: str) -> npt.NDArray[np.uint8]:
        """All bytes of a tensor whose elements are not stored in their order; the last one is kept."""
        with self._lock:
            if self._cached is None or self._cached[0] != name:
                found = self._strided[name]
                item = ITEM_BYTES[found.dtype]
                span = np.empty((found.end - found.begin) // item, dtype=f"u{item}")
                self._fill_from(name, span.view(np.uint8).data, found.begin)
                made = as_strided(span, found.shape, [item * step for step in found.strides])
                self._cached = name, np.ascontiguousarray(made).reshape(-1).view(np.uint8)
            return self._cached[1]

    def __exit__(self, *exception: object) -> None:
        """Close the file; a FileFormatError if it was written to meanwhile."""
        changed = self._state() != self._opened
        super().__exit__(*exception)
        if changed and exception[0] is None:
            raise FileFormatError(self.path, "was changed while it was being read", "run again")


class PlainRange:
    """The bytes of one tensor from `begin` on, read in order, in parts of any size."""

    def __init__(self, file: TensorFile, name: str, begin: int) -> None:
        self._file, self._name, self._position = file, name, begin

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the bytes that come next."""
        self._file.fill(self._name, view, self._position)
        self._position += len(view)


def make_part(path: Path, identity: str, tensors: Mapping[str, FoundTensor], boxes: Mapping[str, Box]) -> ForeignPart:
    """Those tensors of a file, under their names in the model, with the box of each."""
    entries: dict[str, fmt.TensorEntry] = {}
    strided: dict[str, FoundTensor] = {}
    apart = 1 << 62  # so that a tensor that must be gathered is nobody's neighbour
    for name, found in tensors.items():
        if found.is_contiguous:
            entries[name] = fmt.TensorEntry(found.dtype, found.shape, found.begin, found.nbytes)
        else:
            entries[name] = fmt.TensorEntry(found.dtype, found.shape, apart, found.nbytes)
            strided[name], apart = found, apart + found.nbytes + 1
    header = fmt.FileHeader({"ema.checksum": identity}, entries, 0)
    return ForeignPart(path, header, dict(boxes), identity, strided)


def names_in(names: Sequence[str]) -> str:
    """A few names for a message."""
    return ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
