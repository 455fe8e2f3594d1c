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

from posthoc_cli.checkpoints.read_pickle import FoundTensor, Node, read_pickled
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.chunks import Box, row_major
from posthoc_cli.snapshots.directory import PICKLES
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.reading import Part
from posthoc_cli.snapshots.tensor_file import OpenedFile, read_header

ENDINGS = (fmt.SUFFIX, *PICKLES, ".pth.tar")

PARAMETERS = "shadow_params"
"""Under which averages are a list, in the order of the model's parameters."""
_SAMPLES, _SAMPLE = 16, 4096
_MOST_VALUES = 1_000_000
_DEEPEST = 100
_APART = 1 << 62
"""Where the places of tensors begin that must be gathered: nobody's neighbours."""


@dataclass(frozen=True)
class IndexedFile:
    """What a file holds.

    Attributes:
        content: tensors (`FoundTensor`), numbers, texts, and nodes in place of tensors that are not read, by the keys
            that lead to each.
        metadata: of a safetensors file; else empty.
        identity: 16 hexadecimal digits, of its size and a sample of its content.
    """

    content: Mapping[tuple[str, ...], Any]
    metadata: Mapping[str, str]
    identity: str


def index_file(path: Path) -> IndexedFile:
    """Find the tensors of a file that is no snapshot or state. A FileFormatError names it and says what is wrong."""
    if path.suffix == fmt.SUFFIX:
        header = read_header(path)
        if file_kind(header) in ("snapshot", "state"):
            raise FileFormatError(path, f"is a {file_kind(header)} of this package, no checkpoint")
        found: dict[tuple[str, ...], Any] = {
            (name,): FoundTensor(entry.dtype, entry.shape, row_major(entry.shape), begin, begin + entry.nbytes)
            for name, entry in header.tensors.items()
            for begin in [header.payload_start + entry.begin]
        }
        with OpenedFile(path) as file:
            return IndexedFile(found, header.metadata, sampled_identity(file))
    with OpenedFile(path) as file:
        return IndexedFile(_leaves(path, read_pickled(file, 0, file.size)), {}, sampled_identity(file))


def _leaves(path: Path, value: Any) -> dict[tuple[str, ...], Any]:
    """The tensors, numbers and texts within dicts, and those of averages in lists, by the keys that lead to each.

    A tensor of a kind that is not read (sparse, quantized, spread over processes) stays a node. The names of modules
    within a pickled module are one key, joined by dots, as in a state dict.
    """
    found: dict[tuple[str, ...], Any] = {}
    left: list[tuple[tuple[str, ...], Any, int, bool]] = [((), value, 0, False)]
    count = 0
    while left:
        keys, one, depth, within = left.pop()
        if isinstance(one, list) and keys[-1:] == (PARAMETERS,):
            one = dict(enumerate(one))
        if not isinstance(one, dict) or (isinstance(one, Node) and one.name.startswith("torch._utils._rebuild")):
            if isinstance(one, Node | FoundTensor | int | float | str):
                found[keys] = one
        elif depth < _DEEPEST:
            module = _module_tensors(one) if isinstance(one, Node) else None
            is_module, held = module is not None, module or one
            count += len(held)
            if count > _MOST_VALUES:
                raise FileFormatError(path, f"cannot be read as tensors: holds more than {_MOST_VALUES:,} values")
            for key in reversed(held):
                if isinstance(key, str | int):
                    name = (*keys[:-1], f"{keys[-1]}.{key}") if is_module and within else (*keys, str(key))
                    left.append((name, held[key], depth + 1, is_module))
    return found


def _module_tensors(node: Node) -> dict[Any, Any] | None:
    """The parameters, buffers and inner modules of a pickled torch module; None of something else.

    Its attributes are its state, or are among what it is made of, also one level further down under `state`.
    """
    for value in (node.state, *node.arguments):
        for state in (value, value.get("state")) if isinstance(value, dict) else ():
            if isinstance(state, dict) and {"_parameters", "_buffers", "_modules"} <= state.keys():
                own = [state[key] for key in ("_parameters", "_buffers", "_modules")]
                held = {key: value for part in own if isinstance(part, dict) for key, value in part.items()}
                unsaved = state.get("_non_persistent_buffers_set")
                names = {key for key in unsaved if isinstance(key, str)} if isinstance(unsaved, list) else set()
                return {key: held[key] for key in held if key not in names}
    return None


def sampled_identity(file: OpenedFile) -> str:
    """16 hexadecimal digits of a file's size and of pieces of its content, from the first to the last."""
    digest = xxhash.xxh3_64(file.size.to_bytes(8, "little"))
    last = max(0, file.size - _SAMPLE)
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


class ForeignFile(OpenedFile):
    """A file of a checkpoint opened for its tensors; of those in `strided` the bytes are where `make_part` says."""

    def __init__(self, part: ForeignPart) -> None:
        super().__init__(part.path)
        self._strided = {part.header.tensors[name].begin: found for name, found in part.strided.items()}
        self._cached: tuple[int, npt.NDArray[np.uint8]] | None = None
        self._lock = threading.Lock()
        try:
            self._opened = self._state()
            if sampled_identity(self) != part.identity:
                raise FileFormatError(part.path, "was replaced while it was being used", "run again")
        except BaseException:
            self.close()
            raise

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` with the bytes from an offset on; returns how many, fewer only at the end of the file."""
        if offset < _APART:
            return super().read_into(view, offset)
        start = max(begin for begin in self._strided if begin <= offset)
        view[:] = self._gathered(start)[offset - start : offset - start + len(view)].data
        return len(view)

    def _gathered(self, start: int) -> npt.NDArray[np.uint8]:
        """All bytes of a tensor whose elements are not stored in their order; the last one is kept."""
        with self._lock:
            if self._cached is None or self._cached[0] != start:
                found = self._strided[start]
                item = ITEM_BYTES[found.dtype]
                span = np.empty((found.end - found.begin) // item, dtype=f"u{item}")
                super().read_into(span.view(np.uint8).data, found.begin)
                made = as_strided(span, found.shape, [item * step for step in found.strides])
                self._cached = start, np.ascontiguousarray(made).reshape(-1).view(np.uint8)
            return self._cached[1]

    def __exit__(self, *exception: object) -> None:
        """Close the file; a FileFormatError if it was written to meanwhile."""
        changed = self._state() != self._opened
        super().__exit__(*exception)
        if changed and exception[0] is None:
            raise FileFormatError(self.path, "was changed while it was being read", "run again")


def make_part(path: Path, identity: str, tensors: Mapping[str, FoundTensor], boxes: Mapping[str, Box]) -> ForeignPart:
    """Those tensors of a file, under their names in the model, with the box of each."""
    entries: dict[str, fmt.TensorEntry] = {}
    strided: dict[str, FoundTensor] = {}
    apart = _APART
    for name, found in tensors.items():
        if found.is_contiguous:
            entries[name] = fmt.TensorEntry(found.dtype, found.shape, found.begin, found.nbytes)
        else:
            entries[name] = fmt.TensorEntry(found.dtype, found.shape, apart, found.nbytes)
            strided[name], apart = found, apart + found.nbytes + 1
    return ForeignPart(path, fmt.FileHeader({}, entries, 0), dict(boxes), identity, strided)


def names_in(names: Sequence[str]) -> str:
    """A few names for a message."""
    return ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
