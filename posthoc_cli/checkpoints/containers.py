"""The kinds of files that checkpoints are, in one table.

To add one, write a reader, which returns what an opened file holds by the keys that lead to it: an
`Entry` (`snapshots/entry.py`) for each tensor, which says where its bytes lie in the file, and
a number or text for each value. Add a row to `CONTAINERS`; take its ending out of a row without a
reader, and its case out of `tests/checkpoints/test_owners.py`. `pickles.FileRange` and
`pickles.member_begin` find members of a zip.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.checkpoints.pickles import Keys, Programs, read_tensors
from posthoc_cli.errors import FileFormatError, UnsuitableError
from posthoc_cli.files import is_url
from posthoc_cli.snapshots.directory import PICKLES
from posthoc_cli.snapshots.opened_file import OpenedFile
from posthoc_cli.snapshots.output_mark import MARK, encode_mark, find_mark
from posthoc_cli.snapshots.tensorfile import SUFFIX, TensorFile, decode_file

Leaves = dict[Keys, Any]
"""What a file holds, by the keys that lead to it: an `Entry`, a number or a text; or a `Node` in
place of a tensor of a kind that cannot be read."""

INDEX_ENDING = ".index.json"


@dataclass(frozen=True)
class Container:
    """A kind of file; without a reader it belongs to another framework."""

    name: str
    endings: tuple[str, ...]
    read: Callable[[OpenedFile, Programs], Leaves] | None = None
    magic: tuple[bytes, ...] = ()  # first bytes, by which files with other endings are known


def _read_safetensors(file: OpenedFile, _: Programs) -> Leaves:
    return header_leaves(decode_file(file))


def header_leaves(header: TensorFile) -> Leaves:
    """Return what a safetensors file holds."""
    if header.kind == "snapshot":
        reason = "is a snapshot of this package, not a checkpoint"
        raise UnsuitableError(header.path, reason, "name its directory")
    leaves: Leaves = {(name,): text for name, text in header.metadata.items()}
    if header.checksum:
        leaves[MARK,] = encode_mark(header.content)
    for name, entry in header.entries.items():
        leaves[name,] = entry
    return leaves


def _read_pickle(file: OpenedFile, programs: Programs) -> Leaves:
    leaves: Leaves = read_tensors(file, programs)
    _, mark = find_mark(file)
    if mark:
        leaves[MARK,] = mark
    return leaves


_SMALL_MAPS = tuple(bytes([0x80 + size]) for size in range(1, 16))
"""How a map of msgpack with 1 to 15 keys begins."""

CONTAINERS = (
    Container("safetensors", (SUFFIX,), _read_safetensors),
    Container(
        "torch.save or pickle",
        (".pth.tar", *PICKLES),
        _read_pickle,
        (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    ),
    Container("Flax", (".msgpack",), magic=(*_SMALL_MAPS, b"\xde", b"\xdf")),
    Container("Paddle", (".pdparams", ".pdopt", ".pdmodel")),
    Container("TensorFlow or Keras", (".h5", ".hdf5", ".keras", ".tflite", ".index")),
    Container("llama.cpp", (".gguf",), magic=(b"GGUF",)),
    Container("ONNX", (".onnx",)),
    Container("NumPy", (".npy", ".npz")),
    Container("NeMo", (".nemo",)),
    Container("PhysicsNeMo", (".mdlus",)),
    Container("Orbax", ("manifest.ocdbt", "_CHECKPOINT_METADATA")),
    Container("an archive", (".gz", ".zip")),
)

SAFETENSORS = CONTAINERS[0]
_FIRST_BYTES = 9  # of a safetensors file: the length of its header, and how that begins

ENDINGS = tuple(ending for row in CONTAINERS if row.read for ending in row.endings)
"""How the names of files that are read end."""

_NO_TENSORS = re.compile(
    r"\.(?:json|jsonl|ya?ml|txt|log|md|py|sh|csv|toml|cfg|ini|lock|html|png|jpe?g|gif|svg|webp|mp4|"
    r"wav|flac|parquet|arrow|model|tiktoken)$|\.tfevents\.",
    re.IGNORECASE,
)
"""Names of files that are not opened to see what they are: a folder may hold thousands of images.
"""


def container_by_name(name: str) -> Container | None:
    """Find the kind of a file by the ending of its name."""
    for row in CONTAINERS:
        if name.endswith(row.endings):
            return row
    return None


def find_container(path: Path) -> Container | None:
    """Find the kind of a file by its first bytes, or by a name that belongs to another framework;
    None for a file of no known kind, such as a text."""
    named = container_by_name(path.name)
    if named is not None and named.read is None:
        return named
    if _NO_TENSORS.search(path.name):
        return None
    with OpenedFile(path) as file:
        return container_by_bytes(file)


def may_hold_tensors(path: Path) -> bool:
    """Return whether a file may be one of tensors: by its ending, or for other endings by its first
    bytes. In a store each would be a request, and endings decide."""
    if path.name.endswith(ENDINGS):
        return True
    if is_url(path):
        return False
    try:
        row = find_container(path)
    except FileFormatError:  # no file, or one that cannot be opened
        return False
    return row is not None and row.read is not None


def container_by_bytes(file: OpenedFile) -> Container | None:
    """Find the kind of an opened file by its first bytes; None for a file of no known kind."""
    begin = file.read_at(min(_FIRST_BYTES, file.size), 0)
    length = int.from_bytes(begin[:8], "little")
    if begin[8:] == b"{" and length <= file.size:
        return SAFETENSORS
    for row in CONTAINERS:
        if row.magic and begin.startswith(row.magic):
            return row
    return None


def read_leaves(file: OpenedFile, programs: Programs) -> Leaves:
    """Read what a file holds; raise UnsuitableError for a file of another framework. `programs` are
    those of pickles that were read before.

    A file whose first bytes are of no known kind is read as its name says, or as a pickle: the
    reader says what is wrong with it.
    """
    row = container_by_name(file.path.name)
    if row is None or row.read is not None:
        row = container_by_bytes(file) or row
    if row is None:
        return _read_pickle(file, programs)
    if row.read is None:
        raise foreign_error(file.path, row)
    return row.read(file, programs)


def foreign_error(path: Path, row: Container) -> UnsuitableError:
    """Make the error about a file of another framework."""
    reason = f"is of a kind that cannot be read ({row.name})"
    hint = "save the tensors as .safetensors, or with torch.save; unpack archives"
    return UnsuitableError(path, reason, hint)


def strip_ending(name: str) -> str:
    """Remove the ending of a name, but for `.ema`, which says that the file is an average."""
    for ending in (INDEX_ENDING, *ENDINGS):
        if ending != ".ema":
            name = name.removesuffix(ending)
    return name
