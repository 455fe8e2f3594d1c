"""Shards and an index in a folder, and the model that they may replace."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import groupby, pairwise
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, OutputExistsError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.models import INDEX_NAME, SINGLE_NAME, encode_index, read_index
from posthoc_cli.snapshots.reader import read_header
from posthoc_cli.snapshots.tensors import tensor_bytes
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.engine import TensorPlacement
from posthoc_cli.synthesis.tiles import Tile


class TilePart(Protocol):
    """One tile of one target on its way out; one thread uses it."""

    def write(self, begin: int, values: torch.Tensor) -> None:
        """Take the elements of the tile from `begin` on, which follow those before."""
        ...

    def close(self) -> None:
        """The tile is complete."""
        ...


class FilePart:
    """A tile that is written under all names of its tensors.

    Arguments:
        writer_of: the file that a name is in.
        tile: the tile.
        names: every name that a tensor goes by, its own first.
    """

    def __init__(
        self, writer_of: Callable[[str], TensorFileWriter], tile: Tile, names: Mapping[str, Sequence[str]]
    ) -> None:
        self._writer_of, self._tile, self._names = writer_of, tile, names
        self._size = fmt.ITEM_BYTES[tile.dtype]
        piece = tile.pieces[0]
        begin, end = piece.begin * self._size, piece.end * self._size
        whole = len(tile.pieces) > 1
        self._ranges = [] if whole else [writer_of(name).write_range(name, begin, end) for name in names[piece.name]]

    def write(self, begin: int, values: torch.Tensor) -> None:  # noqa: ARG002
        """See `TilePart`."""
        view = tensor_bytes(values)
        for part in self._ranges:
            part.write(view)
        if not self._ranges:
            self._write_whole(view)

    def close(self) -> None:
        """See `TilePart`."""
        for part in self._ranges:
            part.close()

    def _write_whole(self, view: memoryview) -> None:
        """Small tensors: runs of neighbours in one file at once, then each under its further names."""
        bounds = [bound * self._size for bound in self._tile.bounds]
        begin = 0
        for writer, run in groupby((piece.name for piece in self._tile.pieces), self._writer_of):
            names = list(run)
            end = begin + len(names)
            writer.write_many(names, view[bounds[begin] : bounds[end]])
            begin = end
        for piece, (start, stop) in zip(self._tile.pieces, pairwise(bounds), strict=True):
            for alias in self._names[piece.name][1:]:
                self._writer_of(alias).write(alias, view[start:stop])


class MemoryPart:
    """A tile that is put into tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], tile: Tile) -> None:
        self._placement = TensorPlacement({piece.name: [tensors[piece.name]] for piece in tile.pieces}, tile)

    def write(self, begin: int, values: torch.Tensor) -> None:
        """See `TilePart`."""
        self._placement.place(0, begin, values)

    def close(self) -> None:
        """See `TilePart`."""


# --- Shards and an index in a folder, and the model that they may replace --------------------------


SHARD_PATTERN = "model{suffix}.safetensors"
MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""What the files of a model in a folder are called."""


def holds_model(folder: Path) -> bool:
    """Whether there is a model in a folder, in shards or in one file."""
    return any((folder / name).exists() for name in (INDEX_NAME, SINGLE_NAME))


def holds_snapshot(path: Path) -> bool:
    """Whether a file, or one that a new model in that folder would replace, holds what nothing can make again."""
    if not path.is_dir():
        return _is_snapshot(path)
    files_of_model = {file for file in files.system.list(path) if MODEL_FILE.fullmatch(file.name)}
    with suppress(FileFormatError):
        files_of_model |= {path / name for name in read_index(path / INDEX_NAME)}
    return any(map(_is_snapshot, files_of_model))


def _is_snapshot(path: Path) -> bool:
    try:
        return path.is_file() and file_kind(read_header(path)) == "snapshot"
    except FileFormatError:
        return False


def _model_files(folder: Path) -> list[Path]:
    """What a folder has under the names of a model's files, sorted."""
    if not folder.is_dir():
        return []
    found = files.system.list(folder)
    return sorted(path for path in found if path.name == INDEX_NAME or MODEL_FILE.fullmatch(path.name))


class ShardedSink:
    """Shards and an index in a folder, as the Hugging Face libraries lay them out.

    The index comes last: without it no reader takes the folder for a model. A model that fits one shard is
    one file without an index, as there. A model that is replaced leaves no file behind, since those libraries
    take whichever layout they look for first; it stays, whole, where its replacement fails.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[fmt.TensorSpec],
        metadata: Mapping[str, str],
        overwrite: bool,
        limit: int,
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(folder, "is a file; shards need a folder")
        if not overwrite and holds_model(folder):
            raise OutputExistsError(
                folder, "holds a model already", "choose another folder, or overwrite=True to replace it"
            )
        for path in _model_files(folder):
            if path.is_dir() and not path.is_symlink():
                raise OutputExistsError(path, "is a directory, which no model replaces", "choose another folder")
        self._folder = folder
        self._overwrite = overwrite
        by_name = {spec.name: spec for spec in specs}
        self._split = split_state_dict_into_shards_factory(
            by_name, get_storage_size=lambda s: s.nbytes, filename_pattern=SHARD_PATTERN, max_shard_size=limit
        )
        self._old = _OldModel(folder)
        with files.reported_as_write_error(folder):
            self._made = files.make_directory(folder)
        self._stack = ExitStack()
        self._published: list[Path] = []
        self._committed = False
        try:
            self._writers = {
                file: self._stack.enter_context(
                    TensorFileWriter(folder / file, [by_name[name] for name in names], metadata, overwrite)
                )
                for file, names in self._split.filename_to_tensors.items()
            }
        except BaseException:
            self._clean_up()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its shard."""
        self._writers[self._split.tensor_to_filename[name]].write(name, tensor_bytes(tensor))

    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TilePart:
        """Begin to write a tile; see `layouts.Sink`."""
        return FilePart(lambda name: self._writers[self._split.tensor_to_filename[name]], tile, names)

    def commit(self) -> None:
        """Publish the shards, then the index; a model that was there goes when the new one is whole."""
        if self._overwrite:
            self._old.keep()
        for file, writer in self._writers.items():
            writer.commit()
            self._published.append(self._folder / file)
        if self._split.is_sharded:
            text = encode_index(self._split.tensor_to_filename, self._split.metadata["total_size"])
            files.write_whole(self._folder / INDEX_NAME, text, self._overwrite)
            self._published.append(self._folder / INDEX_NAME)
        self._old.remove_all_but(self._published)
        self._committed = True
        self._old.forget()

    def _clean_up(self) -> None:
        self._stack.close()
        if self._committed:
            return
        for path in self._published:
            files.unlink_if_there(path)
        self._old.restore()
        files.remove_directories(self._made)

    def __enter__(self) -> ShardedSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()


class _OldModel:
    """The files of the model that a folder holds, kept under temporary names until a new one is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[Path, Path] = {}

    def keep(self) -> None:
        """Give every file a second name. The index loses its first: it must not lead to shards of two models."""
        with files.reported_as_write_error(self._folder):
            for path in _model_files(self._folder):
                self._kept[path] = files.temporary_path(self._folder)
                self._rename_or_link(path)

    def _rename_or_link(self, path: Path) -> None:
        if path.name != INDEX_NAME:
            try:
                return files.system.link(path, self._kept[path])
            except OSError as error:
                if error.errno not in files.NO_HARD_LINKS:
                    raise
        return files.system.rename(path, self._kept[path])

    def remove_all_but(self, new: Sequence[Path]) -> None:
        """Remove the files that no new one has replaced."""
        with files.reported_as_write_error(self._folder):
            for path in self._kept.keys() - set(new):
                files.unlink_if_there(path)
            files.system.fsync_directory(self._folder)

    def restore(self) -> None:
        """Give every file its own name back."""
        for path, second in self._kept.items():
            if second.exists():
                files.system.rename(second, path)
                files.unlink_if_there(second)  # still there where both were names of one file

    def forget(self) -> None:
        """Remove the second names."""
        files.discard(self._kept.values())
        self._kept.clear()
