"""An output as a folder of torch.distributed.checkpoint, which appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from posthoc_cli import files
from posthoc_cli.errors import OutputExistsError
from posthoc_cli.snapshots.format import TensorSpec
from posthoc_cli.snapshots.tensors import torch_dtype
from posthoc_cli.synthesis.engine import TensorTile, TileWriter
from posthoc_cli.synthesis.tiles import Tile

_METADATA = ".metadata"


class DistributedSink:
    """`torch.distributed.checkpoint.save` takes all tensors at once, so this layout holds the model in memory."""

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], overwrite: bool) -> None:
        if os.path.lexists(folder) and not (folder.is_dir() and not folder.is_symlink()):
            raise OutputExistsError(folder, "is no folder, which this layout needs", "choose another name")
        there = list(folder.iterdir()) if folder.is_dir() else []
        if there and not (overwrite and _is_checkpoint(there)):
            what = "holds a model already" if _is_checkpoint(there) else "holds something else"
            raise OutputExistsError(folder, what, "choose another folder, or overwrite=True to replace a model")
        self._folder, self._made = folder, files.temporary_path(folder.parent)
        self._specs = {spec.name: spec for spec in specs}
        self._tensors: dict[str, torch.Tensor] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Take a whole tensor."""
        self._tensors[name] = tensor.cpu()

    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TileWriter:
        """Take a tile of tensors, under all their names."""
        for name in tile.names:
            if name not in self._tensors:
                spec = self._specs[name]
                with torch.inference_mode(False):  # the caller may have set a mode, and a default device
                    tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="cpu")
                self._tensors |= dict.fromkeys(names[name], tensor)
        return TensorTile([self._tensors[name] for name in tile.names], tile)

    def commit(self) -> None:
        """Write it under a temporary name, and put it in place."""
        from torch.distributed.checkpoint.api import CheckpointException  # slow to import
        from torch.distributed.checkpoint.state_dict_saver import save

        with files.reported_as_write_error(self._folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is only one process
            try:
                save(self._tensors, checkpoint_id=str(self._made), no_dist=True)
            except CheckpointException as error:
                cause = next(iter(error.failures.values()))[0]
                raise cause if isinstance(cause, OSError) else error from error
            old = files.temporary_path(self._folder.parent)
            if self._folder.exists():
                files.system.rename(self._folder, old)
            files.system.rename(self._made, self._folder)
            files.system.fsync_directory(self._folder.parent)
            shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was not put in place."""
        shutil.rmtree(self._made, ignore_errors=True)


def _is_checkpoint(entries: Sequence[Path]) -> bool:
    names = {entry.name for entry in entries}
    return _METADATA in names and all(name == _METADATA or name.endswith(".distcp") for name in names)
