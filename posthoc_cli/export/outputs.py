"""What takes the tensors of a new file: safetensors, a .pt file, or a folder of
torch.distributed.checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Container
from types import SimpleNamespace
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.snapshots.tensorfile import TensorFileWriter, tensor_bytes
from posthoc_cli.synthesis.engine import InMemory, Tile


class FileOutput:
    """Files that tensors are written to as they come, in tiles or complete.

    After the last one `complete` does what may fail, and `publish` gives the files their names.
    """

    def prepare(self, tile: Tile) -> None:
        """Do nothing: the files have room."""

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        view = tensor_bytes(values)
        item = ITEM_BYTES[tile.dtype]
        for name, begin, end in tile.spans:
            data = view[begin * item : end * item]
            for alias in tile.plan.names[name]:
                self.put(alias, data, tile.begin * item)

    def write_tensor(self, name: str, tensor: torch.Tensor) -> None:
        self.put(name, tensor_bytes(tensor), 0)

    def put(self, name: str, data: memoryview, begin: int) -> None:
        """Write bytes of a tensor, from byte `begin` on, if the output has one of this name."""
        raise NotImplementedError


class SafetensorsOutput(FileOutput):
    """A safetensors file with checksums."""

    def __init__(self, writer: TensorFileWriter, names: Container[str]) -> None:
        self._writer = writer
        self._names = names

    def put(self, name: str, data: memoryview, begin: int) -> None:
        if name in self._names:
            self._writer.write(name, data, begin)

    def complete(self) -> None:
        pass

    def publish(self) -> None:
        self._writer.commit()


class CollectedOutput(InMemory):
    """Tensors that are collected in memory, since their library writes them in one call."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._aliases = dict[str, str]()

    def prepare(self, tile: Tile) -> None:
        super().prepare(tile)
        for name in tile.names:
            self._aliases |= dict.fromkeys(tile.plan.names[name], name)

    def write_tensor(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor

    def all_tensors(self) -> dict[str, Any]:
        """Return the tensors under all names."""
        tensors = dict(self.tensors)
        for alias, name in self._aliases.items():
            tensors[alias] = self.tensors[name]
        return tensors

    def publish(self) -> None:
        pass


class PickledOutput(CollectedOutput):
    """A .pt file, which torch.load(weights_only=True) takes."""

    def __init__(self, file: files.PendingFile) -> None:
        super().__init__()
        self._file = file
        self._end = 0

    def complete(self) -> None:
        stream = SimpleNamespace(write=self._append, flush=lambda: None)
        try:
            torch.save(self.all_tensors(), stream)
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


class DistributedOutput(CollectedOutput):
    """The files of torch.distributed.checkpoint in a new folder."""

    def __init__(self, folder: files.PendingFolder) -> None:
        super().__init__()
        self._folder = folder

    def complete(self) -> None:
        from torch.distributed.checkpoint.api import CheckpointException  # slow to import
        from torch.distributed.checkpoint.state_dict_saver import save

        place = str(self._folder.temporary)
        with files.reported_as_write_error(self._folder.path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is only one process
            try:
                save(self.all_tensors(), checkpoint_id=place, no_dist=True)
            except CheckpointException as error:
                first, *_ = error.failures.values()
                raise first[0] from error
