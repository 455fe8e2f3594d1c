"""Outputs, one class a layout. Each has a temporary name until it is published.

`write` takes the tiles of one target, in any order and thread. After the last one `complete` does
what may fail, and `publish` gives the output its name.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from posthoc_cli import files
from posthoc_cli.snapshots.outputs import INDEX_NAME
from posthoc_cli.snapshots.tensorfile import Entry, TensorFileWriter
from posthoc_cli.synthesis.engine import InMemory, Tile
from posthoc_cli.synthesis.plan import Combination, nbytes

FOLDERS = {
    "sharded": re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(INDEX_NAME)}"),
    "dcp": re.compile(r"\.metadata|.*\.distcp"),
}
"""The layouts that are folders, each with a pattern of the names of its files: `overwrite` replaces
a folder that holds no others."""


class FileOutput(Protocol):
    """An output on disk."""

    def write(self, tile: Tile, values: torch.Tensor) -> None: ...

    def complete(self) -> None: ...

    def publish(self) -> None: ...


class SafetensorsFile:
    """One safetensors file with checksums."""

    def __init__(self, writer: TensorFileWriter) -> None:
        self._writer = writer

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        for name, data, begin in tile.pieces(values):
            self._writer.write(name, data, begin)

    def complete(self) -> None:
        pass

    def publish(self) -> None:
        self._writer.commit()


class Shards:
    """A folder of safetensors files with their index; in a job, this rank's share of the files."""

    def __init__(
        self,
        writers: Sequence[TensorFileWriter],
        index: bytes,
        folder: files.PendingFolder | None,
    ) -> None:
        self._files = writers
        self._index = index
        self._folder = folder  # in the first rank
        self._writers = dict[str, TensorFileWriter]()
        for writer in writers:
            self._writers |= dict.fromkeys(writer.entries, writer)

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        for name, data, begin in tile.pieces(values):
            if name in self._writers:
                self._writers[name].write(name, data, begin)

    def complete(self) -> None:
        for file in self._files:
            file.commit()
        if self._folder and self._index:
            files.write_atomically(self._folder.temporary / INDEX_NAME, self._index)

    def publish(self) -> None:
        assert self._folder is not None, "the first rank publishes"
        self._folder.publish()


def cut_shards(
    entries: Mapping[str, Entry],
    size: int,
    ranks: int,
) -> tuple[dict[str, list[str]], bytes]:
    """Return the tensors of each shard, and the index of several; there is one for each rank at
    least.

    Shards are cut as the Hugging Face libraries do; a single one has the name of a model in one
    file.
    """
    total = nbytes(entries)
    split = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=min(size, max(1, -(-total // ranks))),
    )
    if not split.is_sharded:
        return split.filename_to_tensors, b""
    index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return split.filename_to_tensors, text.encode()


class Collected(InMemory):
    """Tensors that are collected in memory, since their library writes them in one call."""

    def __init__(self, parts: Sequence[Combination]) -> None:
        super().__init__(torch.device("cpu"))
        self._parts = parts
        for plan in parts:
            self.make_room(plan, plan.tensors)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors under all names."""
        state = dict[str, torch.Tensor]()
        for plan in self._parts:
            for names in plan.names.values():
                state |= dict.fromkeys(names, self.tensors[names[0]])
        return state


class PickledFile(Collected):
    """A .pt file, which torch.load(weights_only=True) takes."""

    def __init__(self, parts: Sequence[Combination], file: files.PendingFile) -> None:
        super().__init__(parts)
        self._file = file
        self._end = 0

    def complete(self) -> None:
        stream = SimpleNamespace(write=self._append, flush=lambda: None)
        try:
            torch.save(self.state, stream)
        # torch's own, which replaces that of `write`, and a KeyboardInterrupt
        except RuntimeError as error:
            raise error.__context__ or error from None

    def _append(self, data: Any) -> int:
        self._file.write_at(data, self._end)
        size = memoryview(data).nbytes
        self._end += size
        return size

    def publish(self) -> None:
        self._file.publish()


class DistributedFolder(Collected):
    """A folder of torch.distributed.checkpoint."""

    def __init__(self, parts: Sequence[Combination], folder: files.PendingFolder) -> None:
        super().__init__(parts)
        self._folder = folder

    def complete(self) -> None:
        from torch.distributed.checkpoint.api import CheckpointException  # slow to import
        from torch.distributed.checkpoint.state_dict_saver import save

        place = str(self._folder.temporary)
        with files.reported_as_write_error(self._folder.path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is only one process
            try:
                save(self.state, checkpoint_id=place, no_dist=True)
            except CheckpointException as error:
                (failure, _), *_ = error.failures.values()
                # torch's own replaces that of a write
                raise failure.__context__ or failure from error

    def publish(self) -> None:
        self._folder.publish()
