"""The layouts by name, and the sinks that write them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, OutputExistsError
from posthoc_cli.export.parts import FilePart, MemoryPart, TilePart
from posthoc_cli.export.sharded import ShardedSink, holds_model, holds_snapshot
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.tensors import tensor_bytes, torch_dtype
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.tiles import Tile

LAYOUTS = ("safetensors", "sharded", "pt")
DEFAULT_SHARD_SIZE = "5GB"
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Sink(Protocol):
    """Takes the tensors of one target. A context manager: what was not committed leaves nothing behind."""

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor."""
        ...

    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TilePart:
        """Begin to take a tile, of tensors that go by `names`; any number of tiles may be open in any threads."""
        ...

    def commit(self) -> None:
        """Make the output appear."""
        ...

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def layout_of(path: Path, layout: str | None) -> str:
    """The layout asked for, or the one that the output's name says: .pt, .safetensors, or a folder of shards."""
    if layout is not None:
        if layout not in LAYOUTS:
            raise InvalidValueError("format", f"must be one of {', '.join(LAYOUTS)}", value=f"{layout!r}")
        return layout
    if path.suffix == fmt.SUFFIX:
        return "safetensors"
    if path.suffix in (".pt", ".pth", ".bin"):
        return "pt"
    if path.suffix == "" or path.is_dir():
        return "sharded"
    raise InvalidValueError(path, "name a .safetensors or .pt file, or a folder for shards, or say --format")


def parse_size(size: str) -> int:
    """Bytes from "5GB", "300MB", "1.5TB" (powers of 1000) or a plain number.

    Raises:
        InvalidValueError: anything else, or nothing above 0.
    """
    text = size.strip().upper()
    unit = next((u for u in _SIZE_UNITS if text.endswith(u)), "")
    try:
        value = float(text.removesuffix(unit)) * _SIZE_UNITS.get(unit, 1)
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**63:
        raise InvalidValueError(
            "max_shard_size", "must be a number of bytes above 0, with or without KB, MB, GB or TB", value=f"{size!r}"
        )
    return int(value)


def output_exists(path: Path, layout: str) -> bool:
    """Whether an output is there already."""
    if layout == "sharded":
        return holds_model(path)
    return os.path.lexists(path)


def make_sink(
    layout: str,
    path: Path,
    specs: Sequence[fmt.TensorSpec],
    metadata: Mapping[str, str],
    overwrite: bool = False,
    max_shard_size: int | None = None,
) -> Sink:
    """A sink that writes `specs` in a layout.

    Arguments:
        layout: "safetensors", "sharded" (`path` is a folder) or "pt".
        path: the output.
        specs: every tensor that will be written.
        metadata: strings for the header; a .pt file has no place for them.
        overwrite: replace what is there.
        max_shard_size: bytes a shard, for "sharded".

    Raises:
        OutputExistsError, WriteError.
    """
    if not path.parent.is_dir():
        raise InvalidValueError(path, "its folder does not exist")
    if overwrite and holds_snapshot(path):
        raise OutputExistsError(path, "is a snapshot of a run and is not replaced", "choose another name")
    if layout == "pt":
        return _TorchSink(path, specs, overwrite)
    if layout == "sharded":
        return ShardedSink(path, specs, metadata, overwrite, max_shard_size or parse_size(DEFAULT_SHARD_SIZE))
    return _FileSink(TensorFileWriter(path, specs, metadata, overwrite))


class _FileSink:
    """One safetensors file."""

    def __init__(self, writer: TensorFileWriter) -> None:
        self._writer = writer

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._writer.write(name, tensor_bytes(tensor))

    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TilePart:
        return FilePart(lambda _: self._writer, tile, names)

    def commit(self) -> None:
        self._writer.commit()

    def __enter__(self) -> _FileSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.discard()


class _TorchSink:
    """A .pt state dict. torch.save takes it whole, so that this one layout holds the model in memory."""

    def __init__(self, path: Path, specs: Sequence[fmt.TensorSpec], overwrite: bool) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._specs = {spec.name: spec for spec in specs}
        self._file = files.PendingFile(path, overwrite)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor.cpu()

    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TilePart:
        for piece in tile.pieces:
            if piece.name not in self._tensors:
                spec = self._specs[piece.name]
                with torch.inference_mode(False):  # whatever the caller's mode and default device
                    tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="cpu")
                self._tensors |= dict.fromkeys(names[piece.name], tensor)
        return MemoryPart(self._tensors, tile)

    def commit(self) -> None:
        stream = _Stream(self._file)
        try:
            with io.BufferedWriter(stream) as buffered:
                torch.save(self._tensors, buffered)
        except RuntimeError as error:
            # torch's archive writer hides what its stream raised, and a Ctrl-C, behind an error of its own.
            cause = stream.error or _interruption(error)
            if cause is None:
                raise
            raise cause from error
        self._file.publish()

    def __enter__(self) -> _TorchSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.discard()


def _interruption(error: BaseException) -> BaseException | None:
    """The Ctrl-C or end of the process during which an error was raised, if any."""
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
