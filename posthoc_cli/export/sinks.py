"""Sinks: one safetensors file, shards with an index, a .pt state dict. Each appears complete or not at all."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import groupby, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import FileFormatError, InvalidValueError, OutputExistsError
from posthoc_cli.snapshots.format import TensorSpec
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.outputs import INDEX_NAME, SINGLE_NAME, encode_index, read_index
from posthoc_cli.snapshots.reader import read_header
from posthoc_cli.snapshots.tensors import tensor_bytes, torch_dtype
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.engine import Options, TensorTile, TileWriter
from posthoc_cli.synthesis.tiles import Tile

MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""Names of the files of a model in a folder."""


class Sink(ABC):
    """Takes the tensors of one target. A context manager: without `commit` nothing is left behind."""

    @abstractmethod
    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor."""

    @abstractmethod
    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TileWriter:
        """Begin a tile; several may be open, in any threads. `names` has every name of each tensor, its own first."""

    @abstractmethod
    def commit(self) -> None:
        """Make the output appear."""

    @abstractmethod
    def discard(self) -> None:
        """Remove what was written; nothing happens after `commit`."""

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def make_sink(
    layout: str, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str], options: Options
) -> Sink:
    """A sink for one output.

    Arguments:
        layout: "safetensors", "sharded" (`path` is a folder) or "pt".
        path: the output.
        specs: every tensor that will be written.
        metadata: strings for the header; a .pt file has no place for them.
        options: `overwrite` and `max_shard_size`.

    Raises:
        OutputExistsError, WriteError.
    """
    if not path.parent.is_dir():
        raise InvalidValueError(path, "its folder does not exist")
    if options.overwrite:
        check_no_snapshot(path)
    if layout == "pt":
        return _TorchSink(path, specs, options.overwrite)
    if layout == "sharded":
        return _ShardedSink(path, specs, metadata, options)
    return _FileSink(TensorFileWriter(path, specs, metadata, options.overwrite))


def check_no_snapshot(path: Path) -> None:
    """Check that neither a file, nor what a new model in that folder would replace, is a snapshot.

    Raises:
        OutputExistsError: it is, and nothing can make it again.
    """
    found = [path]
    if path.is_dir():
        found = [file for file in files.system.list(path) if MODEL_FILE.fullmatch(file.name)]
        with suppress(FileFormatError):
            found += [path / name for name in read_index(path / INDEX_NAME)]
    for file in found:
        with suppress(FileFormatError):
            if file.is_file() and file_kind(read_header(file)) == "snapshot":
                raise OutputExistsError(path, "is a snapshot of a run and is not replaced", "choose another name")


def holds_model(folder: Path) -> bool:
    """Whether there is a model in a folder, in shards or in one file."""
    return any((folder / name).exists() for name in (INDEX_NAME, SINGLE_NAME))


def check_no_model(folder: Path) -> None:
    """Check that a folder holds no model.

    Raises:
        OutputExistsError: it does.
    """
    if holds_model(folder):
        hint = "choose another folder, or overwrite=True to replace it"
        raise OutputExistsError(folder, "holds a model already", hint)


# --- safetensors -------------------------------------------------------------------------------------


class _SafetensorsSink(Sink):
    """Writes into safetensors files; `_writer_of` gives the file of a tensor."""

    @abstractmethod
    def _writer_of(self, name: str) -> TensorFileWriter: ...

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._writer_of(name).write(name, tensor_bytes(tensor))

    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TileWriter:
        return _FileTile(self._writer_of, tile, names)


class _FileTile:
    """Writes a tile to files, under all names of its tensors."""

    def __init__(
        self, writer_of: Callable[[str], TensorFileWriter], tile: Tile, names: Mapping[str, Sequence[str]]
    ) -> None:
        self._writer_of, self._tile, self._names = writer_of, tile, names
        self._size = ITEM_BYTES[tile.dtype]
        piece = tile.pieces[0]
        begin, end = piece.begin * self._size, piece.end * self._size
        batch = len(tile.pieces) > 1
        self._ranges = [] if batch else [writer_of(name).write_range(name, begin, end) for name in names[piece.name]]

    def write(self, begin: int, values: torch.Tensor) -> None:  # noqa: ARG002
        view = tensor_bytes(values)
        for part in self._ranges:
            part.write(view)
        if not self._ranges:
            self._write_batch(view)

    def close(self) -> None:
        for part in self._ranges:
            part.close()

    def _write_batch(self, view: memoryview) -> None:
        """Write small tensors: neighbours in one file together, then each under its further names."""
        bounds = [bound * self._size for bound in self._tile.bounds]
        begin = 0
        for writer, run in groupby(self._tile.names, self._writer_of):
            names = list(run)
            end = begin + len(names)
            writer.write_many(names, view[bounds[begin] : bounds[end]])
            begin = end
        for name, (start, stop) in zip(self._tile.names, pairwise(bounds), strict=True):
            for alias in self._names[name][1:]:
                self._writer_of(alias).write(alias, view[start:stop])


class _FileSink(_SafetensorsSink):
    """One safetensors file."""

    def __init__(self, writer: TensorFileWriter) -> None:
        self._writer = writer

    def _writer_of(self, name: str) -> TensorFileWriter:  # noqa: ARG002
        return self._writer

    def commit(self) -> None:
        self._writer.commit()

    def discard(self) -> None:
        self._writer.discard()


class _ShardedSink(_SafetensorsSink):
    """Shards and an index in a folder, as the Hugging Face libraries lay them out.

    The index comes last: without it no reader takes the folder for a model. A model that fits one shard is one file
    without an index. Replacing a model leaves no file of the old one, since those libraries take whichever layout they
    look for first; if replacing fails, the old model stays complete.
    """

    def __init__(
        self, folder: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str], options: Options
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(folder, "is a file; shards need a folder")
        if not options.overwrite:
            check_no_model(folder)
        for path in _model_files(folder):
            if path.is_dir() and not path.is_symlink():
                raise OutputExistsError(path, "is a directory, which no model replaces", "choose another folder")
        self._folder, self._overwrite = folder, options.overwrite
        by_name = {spec.name: spec for spec in specs}
        self._split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda spec: spec.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=options.max_shard_size,
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
                    TensorFileWriter(folder / file, [by_name[name] for name in names], metadata, options.overwrite)
                )
                for file, names in self._split.filename_to_tensors.items()
            }
        except BaseException:
            self.discard()
            raise

    def _writer_of(self, name: str) -> TensorFileWriter:
        return self._writers[self._split.tensor_to_filename[name]]

    def commit(self) -> None:
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

    def discard(self) -> None:
        self._stack.close()
        if self._committed:
            return
        for path in self._published:
            files.unlink_if_there(path)
        self._old.restore()
        files.remove_directories(self._made)


def _model_files(folder: Path) -> list[Path]:
    """The files of a folder that have names of a model's files, sorted."""
    if not folder.is_dir():
        return []
    found = files.system.list(folder)
    return sorted(path for path in found if path.name == INDEX_NAME or MODEL_FILE.fullmatch(path.name))


class _OldModel:
    """The files of the model in a folder, kept under temporary names until a new one is complete."""

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
                files.unlink_if_there(second)  # still there if both were names of one file

    def forget(self) -> None:
        """Remove the second names."""
        files.discard(self._kept.values())
        self._kept.clear()


# --- .pt ---------------------------------------------------------------------------------------------


class _TorchSink(Sink):
    """A .pt state dict. torch.save takes all of it at once, so this layout holds the model in memory."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec], overwrite: bool) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._specs = {spec.name: spec for spec in specs}
        self._file = files.PendingFile(path, overwrite)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor.cpu()

    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TileWriter:
        for name in tile.names:
            if name not in self._tensors:
                spec = self._specs[name]
                with torch.inference_mode(False):  # the caller may have set a mode, and a default device
                    tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="cpu")
                self._tensors |= dict.fromkeys(names[name], tensor)
        return TensorTile([self._tensors[name] for name in tile.names], tile)

    def commit(self) -> None:
        stream = _Stream(self._file)
        try:
            with io.BufferedWriter(stream) as buffered:
                torch.save(self._tensors, buffered)
        except RuntimeError as error:
            # torch's archive writer replaces the stream's error, and a Ctrl-C, by an error of its own.
            cause = stream.error or _interruption(error)
            if cause is None:
                raise
            raise cause from error
        self._file.publish()

    def discard(self) -> None:
        self._file.discard()


def _interruption(error: BaseException) -> BaseException | None:
    """The Ctrl-C or exit during which an error was raised, if any."""
    before = error.__context__
    while isinstance(before, Exception):
        before = before.__context__
    return before


class _Stream(io.RawIOBase):
    """A pending file as the stream that torch.save writes to; keeps the error that a write ended with."""

    def __init__(self, file: files.PendingFile) -> None:
        self.error: BaseException | None = None
        self._file = file
        self._offset = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write_at(view, self._offset)
        except BaseException as error:  # Ctrl-C, too
            self.error = error
            raise
        self._offset += len(view)
        return len(view)
