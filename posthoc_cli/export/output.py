"""One output on disk, a class for each layout.

Each has a temporary name until it is published. `write` takes the tiles of one target, in any order
and thread. After the last one `complete` does what may fail, and `publish` gives the output its
name.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from posthoc_cli import files
from posthoc_cli.checkpoints.folders import DCP_METADATA
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.export.like import CopiedFile, NamedChunk, Replacement
from posthoc_cli.snapshots.boxes import Box, boxes_of_range
from posthoc_cli.snapshots.entry import Entry, items
from posthoc_cli.snapshots.output_mark import encode_mark, mark_archive
from posthoc_cli.snapshots.outputs import INDEX_NAME
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.engine import InMemory
from posthoc_cli.synthesis.plan import Combination, nbytes
from posthoc_cli.synthesis.tiles import Output, Tile

CPU = torch.device("cpu")
SHARD_NAMES = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(INDEX_NAME)}")
"""The names of files in a folder of shards: `overwrite` replaces a folder that holds no others."""


class Pending(Protocol):
    """A file or folder that has a temporary name until it is published."""

    def publish(self) -> object: ...


class FileOutput(Output):
    """An output on disk: a file, or a folder with files in it, which are complete before the folder
    is."""

    def __init__(
        self,
        published: Pending | None,
        inside: Iterable[Pending] = (),
    ) -> None:
        self._published = published  # None of a folder that another process publishes
        self._inside = inside

    def complete(self) -> None:
        for file in self._inside:
            file.publish()

    def publish(self) -> None:
        if self._published is not None:
            self._published.publish()


class TensorFiles(FileOutput):
    """Safetensors files with checksums: one file, or the files of a folder; in a job, this rank's
    share."""

    def __init__(
        self,
        writers: Sequence[TensorFileWriter],
        published: Pending | None,
        inside: Iterable[Pending] = (),
    ) -> None:
        super().__init__(published, inside)
        self._writers = dict[str, TensorFileWriter]()
        for writer in writers:
            self._writers |= dict.fromkeys(writer.entries, writer)

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        for name, data, begin in tile.pieces(values):
            if name in self._writers:
                self._writers[name].write(name, [data], begin)


def cut_shards(
    entries: Mapping[str, Entry],
    size: int,
    ranks: int,
) -> tuple[dict[str, list[str]], bytes]:
    """Divide tensors into shards; return the tensors of each by its file name, and the index of
    several, empty for one.

    Shards are filled in the order of the tensors, up to `size` or an equal share of the ranks; a
    larger tensor has a shard of its own. The names are as Hugging Face libraries expect them.
    """
    total = nbytes(entries)
    limit = min(size, max(1, -(-total // ranks)))
    groups: list[list[str]] = [[]]
    room = limit
    for name, entry in entries.items():
        if entry.nbytes > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= entry.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}, b""
    shards = {}
    file_names: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards[file_name] = names
        file_names |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": file_names}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return shards, text.encode()


class PickledFile(FileOutput):
    """A .pt file, which torch.load(weights_only=True) takes. Its tensors are collected in memory,
    since torch writes them in one call."""

    def __init__(self, plan: Combination, mark: str, file: files.PendingFile) -> None:
        super().__init__(file)
        self._plan = plan
        self._mark = mark
        self._file = file
        self._end = 0
        self._collected = InMemory(plan, CPU)
        self._collected.allocate(plan.tensors)

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        self._collected.write(tile, values)

    def complete(self) -> None:
        state = dict[str, torch.Tensor]()
        for name, aliases in self._plan.names.items():
            state |= dict.fromkeys(aliases, self._collected.tensors[name])
        stream = SimpleNamespace(write=self._append, flush=lambda: None)
        try:
            torch.save(state, stream)
        # torch's own error, which replaces the error of `write`, and a KeyboardInterrupt
        except RuntimeError as error:
            raise error.__context__ or error from None
        mark_archive(self._file, self._end, self._mark)

    def _append(self, data: Any) -> int:
        self._file.write_at(data, self._end)
        self._end += len(data)
        return len(data)


class Copy(FileOutput):
    """A copy of a file, or of a folder, with the mark of an output with this header."""

    def __init__(
        self,
        stack: ExitStack,
        replacement: Replacement,
        header: Mapping[str, Any],
        path: Path,
        overwrite: bool,
        folder: files.PendingFolder | None,
    ) -> None:
        self._tensors = replacement.tensors
        self._files = dict[Path, CopiedFile]()
        chunks = defaultdict[Path, list[NamedChunk]](list)
        for replaced in replacement.tensors.values():
            for chunk in replaced.chunks:
                chunks[chunk.path].append(chunk)
        like = replacement.like

        def place(copied: Path) -> Path:
            if folder is None:
                return path
            inside = folder.temporary / copied.relative_to(like.path)
            files.make_directory(inside.parent)
            return inside

        def mark(copied: Path) -> str:
            metadata = copied.with_name(DCP_METADATA)
            if metadata in like.files and metadata != copied:
                return ""  # the metadata have it for all files
            name = "" if folder is None else copied.relative_to(like.path).as_posix()
            return encode_mark(header, name)

        for copied, file in like.files.items():
            pending = stack.enter_context(files.PendingFile(place(copied), overwrite))
            self._files[copied] = CopiedFile(file, chunks[copied], pending, mark(copied))
        others, _ = like.other_files
        for other in others:
            with files.raise_write_errors(other, "copied"):
                shutil.copyfile(other, place(other))
        copies = [*self._files.values()]
        super().__init__(folder or copies[0], copies if folder else ())

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        for name, data, begin in tile.pieces(values):
            if name in self._tensors:
                self._put(*self._tensors[name], data, begin)

    def _put(
        self,
        entry: Entry,
        chunks: Iterable[NamedChunk],
        data: memoryview,
        begin: int,
    ) -> None:
        """Write bytes of a tensor, from byte `begin` on, to its chunks."""
        full = Box.full(entry.shape)
        item = ITEM_BYTES[entry.dtype]
        first = begin // item
        values = np.frombuffer(data, items(entry.dtype))
        for chunk in chunks:
            file = self._files[chunk.path]
            if chunk.box == full:
                file.write(chunk, data, begin)
                continue
            for piece in boxes_of_range(full, first, first + values.size):
                part = chunk.box.intersection(piece)
                if part.size:
                    content = full.view(values, part, first).tobytes()
                    at, _ = chunk.box.span(part)  # in a row: `piece` has all of its last axes
                    file.write(chunk, memoryview(content), at * item)

    def complete(self) -> None:
        for file in self._files.values():
            file.complete()
        super().complete()
