"""The kinds of files that checkpoints are, in one table.

To add one, write a reader, which returns what an opened file holds by the keys that lead to it: an
`Entry` (`snapshots/tensorfile.py`) for each tensor, which says where its bytes lie in the file, and
a number or text for each value. Add a row to `CONTAINERS`; take its ending out of a row without a
reader, and its case out of `tests/checkpoints/test_owners.py`. `pickles.FileRange` and
`pickles.member_begin` find members of a zip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.checkpoints.pickles import Keys, read_tensors
from posthoc_cli.errors import UnsuitableError
from posthoc_cli.snapshots.directory import PICKLES
from posthoc_cli.snapshots.tensorfile import SUFFIX, OpenedFile, decode_file

Leaves = dict[Keys, Any]
"""What a file holds, by the keys that lead to it: an `Entry`, a number or a text; or a `Node` in
place of a tensor of a kind that cannot be read."""

INDEX_ENDING = ".index.json"
KIND = "ema.format"  # name of a value: what this package wrote a file as


@dataclass(frozen=True)
class Container:
    """A kind of file; without a reader it belongs to another framework."""

    name: str
    endings: tuple[str, ...]
    read: Callable[[OpenedFile], Leaves] | None = None
    magic: tuple[bytes, ...] = ()  # first bytes, by which files with other endings are known


def _read_safetensors(file: OpenedFile) -> Leaves:
    header = decode_file(file)
    if header.kind == "snapshot":
        reason = "is a snapshot of this package, not a checkpoint"
        raise UnsuitableError(file.path, reason, "name its directory")
    leaves: Leaves = {(name,): text for name, text in header.metadata.items()}
    if header.kind is not None:
        leaves[KIND,] = header.kind
    for name, entry in header.entries.items():
        leaves[name,] = entry
    return leaves


_SMALL_MAPS = tuple(bytes([0x80 + size]) for size in range(1, 16))
"""How a map of msgpack with 1 to 15 keys begins."""

CONTAINERS = (
    Container("safetensors", (SUFFIX,), _read_safetensors),
    Container(
        "torch.save or pickle",
        (".pth.tar", *PICKLES),
        read_tensors,
        (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    ),
    Container("Flax", (".msgpack",), magic=(*_SMALL_MAPS, b"\xde", b"\xdf")),
    Container("Paddle", (".pdparams", ".pdopt", ".pdmodel")),
    Container("TensorFlow or Keras", (".h5", ".hdf5", ".keras", ".tflite", ".index")),
    Container("llama.cpp", (".gguf",), magic=(b"GGUF",)),
    Container("ONNX", (".onnx",)),
    Container("NumPy", (".npy", ".npz")),
    Container("NeMo", (".nemo",)),
    Container("an archive", (".gz", ".zip")),
)

ENDINGS = tuple(ending for row in CONTAINERS if row.read for ending in row.endings)
"""How the names of files that are read end."""

_LONGEST_MAGIC = max(len(magic) for row in CONTAINERS for magic in row.magic)


def container_by_name(name: str) -> Container | None:
    """Find the kind of a file by the ending of its name."""
    for row in CONTAINERS:
        if name.endswith(row.endings):
            return row
    return None


def find_container(path: Path) -> Container | None:
    """Find the kind of a file by its name, or else by its first bytes."""
    known = container_by_name(path.name)
    if known is not None:
        return known
    with OpenedFile(path) as file:
        begin = file.read_at(min(_LONGEST_MAGIC, file.size), 0)
    for row in CONTAINERS:
        if row.magic and begin.startswith(row.magic):
            return row
    return None


def read_leaves(file: OpenedFile) -> Leaves:
    """Read what a file holds; raise UnsuitableError for a file of another framework.

    A file of an unknown kind is read as a pickle, whose reader says what is wrong with it.
    """
    row = container_by_name(file.path.name)
    if row is None:
        return read_tensors(file)
    if row.read is None:
        raise foreign_error(file.path, row)
    return row.read(file)


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
