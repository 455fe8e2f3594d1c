"""Models on disk: a safetensors file, shards that an index names, or a folder of either; and folders of several."""

from __future__ import annotations

import re
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import DirectoryError, FileFormatError, MismatchError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.index import INDEX_NAME, read_index
from posthoc_cli.snapshots.metadata import file_kind
from posthoc_cli.snapshots.outputs import OutputInfo, output_difference, same_coefficients
from posthoc_cli.snapshots.reader import read_header

INDEX_SUFFIX = ".safetensors.index.json"
SINGLE_NAME = "model.safetensors"
"""A model that fits one shard."""

_PART = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")


def model_files(path: Path) -> dict[Path, list[str] | None]:
    """The files of the model at a path, and the tensors that an index says are in each; None where there is none.

    Raises:
        FileFormatError: the index is damaged.
    """
    index = index_of(path)
    if index is not None:
        return {index.parent / name: names for name, names in read_index(index).items()}
    return {path / SINGLE_NAME if path.is_dir() else path: None}


def index_of(path: Path) -> Path | None:
    """The index of a model in shards: the path itself, or in the folder that it is; None for other models."""
    if not path.is_dir():
        return path if path.name.endswith(INDEX_SUFFIX) else None
    own = path / INDEX_NAME
    return own if own.exists() else min(path.glob(f"*{INDEX_SUFFIX}"), default=None)


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds one model: shards with an index, or the one file of a small one."""
    return path.is_dir() and (index_of(path) is not None or (path / SINGLE_NAME).exists())


def models_at(path: Path) -> list[Path]:
    """The models that a path names: itself, or where it is a folder of several, those, by name.

    Raises:
        DirectoryError: a folder without a model, with parts of one, or with the snapshots of a run.
    """
    if not path.is_dir() or is_model_folder(path):
        return [path]
    entries = sorted(entry for entry in files.system.list(path) if not entry.name.startswith("."))
    parts = [match for entry in entries if (match := _PART.fullmatch(entry.name))]
    if parts:
        raise DirectoryError(
            path,
            f"{len(parts)} of the {int(parts[0][1])} parts of a model are there, and no index",
            "make all with `ema synthesize --shard`, then run it with --finish",
        )
    found = [entry for entry in entries if entry.suffix == fmt.SUFFIX or is_model_folder(entry)]
    if not found:
        raise DirectoryError(
            path,
            "holds no snapshots, outputs or models",
            "name a .safetensors file, an index of shards, or a folder of these",
        )
    if any(map(_is_snapshot, found)):
        raise DirectoryError(
            path, "holds the snapshots of a run", f"name one of them, or make an average with `ema synthesize {path}`"
        )
    return found


def _is_snapshot(path: Path) -> bool:
    try:
        return any(file_kind(read_header(file)) == "snapshot" for file in model_files(path))
    except FileFormatError:  # is told when it is opened
        return False


def check_indexed(path: Path, header: fmt.FileHeader, names: list[str] | None) -> None:
    """Check that a shard holds the tensors that the index says.

    Raises:
        FileFormatError: naming the shard and the tensor.
    """
    missing = set(names or ()) - header.tensors.keys()
    if missing:
        raise FileFormatError(path, f"tensor {shown(min(missing))} is not in it, as the index says")


def check_alike(first: Path, info: OutputInfo | None, other: Path, found: OutputInfo | None) -> None:
    """Check that two shards are of one model, by what they say of the whole of it.

    Raises:
        MismatchError: naming both.
    """
    if info is None or found is None:
        difference = None if info is found else "only one of them is of a synthesis"
    else:
        difference = output_difference(found, info)
        if difference is None and not same_coefficients(found, info):
            difference = "its coefficients are others"
    if difference is not None:
        raise MismatchError(f"{first} and {other} are not of one model", difference)
