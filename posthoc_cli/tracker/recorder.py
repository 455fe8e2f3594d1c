"""The directory side of a tracker: the lock, whose run it is, writing snapshots, thinning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from posthoc_cli import files
from posthoc_cli.errors import DirectoryError, MismatchError
from posthoc_cli.snapshots.format import SnapshotInfo, TensorSpec, snapshot_metadata
from posthoc_cli.snapshots.lock import DirectoryLock
from posthoc_cli.snapshots.store import read_directory, set_aside_later, snapshot_path, thin
from posthoc_cli.snapshots.tensors import stored_name, tensor_bytes, torch_dtype
from posthoc_cli.snapshots.writer import TensorFileWriter

log = logging.getLogger(__name__)


class Recorder:
    """The one writer of a directory, from the moment it is made until `close`.

    Raises:
        LockedError: another writer holds the directory.
        WriteError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with files.reported_as_write_error(directory):
            files.make_directory(directory)
        self._lock = DirectoryLock(directory)

    def check_run(self, run_id: str) -> None:
        """Raise a MismatchError where the directory holds snapshots of another run."""
        found = self._run_here()
        if found not in (None, run_id):
            raise MismatchError(
                f"{self.directory}: holds snapshots of run {str(found)[:8]}, this tracker is run {run_id[:8]}: "
                "continue that run with PostHocEMA.from_path, or take another directory"
            )

    def _run_here(self) -> str | None:
        try:
            return read_directory(self.directory)[0].info.run_id
        except DirectoryError:
            return None

    def set_aside_later(self, t: float) -> None:
        """Set snapshots later than `t` aside: training went back to before them."""
        if self._run_here() is None:
            return
        for path in set_aside_later(self.directory, t):
            log.warning("training goes on from t = %g: %s is later and was set aside", t, path)

    def write(
        self, info: SnapshotInfo, averages: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor]
    ) -> None:
        """Write one snapshot, durably."""
        storage = {name: storage_dtype(average, info, name) for name, average in averages.items()}
        storage |= {name: copy.dtype for name, copy in copies.items()}
        tensors = {**averages, **copies}
        specs = [
            TensorSpec(name, stored_name(dtype, name), tuple(tensors[name].shape)) for name, dtype in storage.items()
        ]
        path = snapshot_path(self.directory, info.t, info.sigma_rel)
        with TensorFileWriter(path, specs, snapshot_metadata(info)) as writer:
            for name, dtype in storage.items():
                writer.write(name, tensor_bytes(tensors[name].to(dtype)))
            writer.commit()
        log.info("wrote %s", path)

    def thin(self, max_checkpoints: int | None) -> None:
        """Leave `max_checkpoints` snapshots a profile."""
        with files.reported_as_write_error(self.directory):
            thin(self.directory, max_checkpoints)

    def close(self) -> None:
        """Let another writer in."""
        self._lock.release()


def storage_dtype(average: torch.Tensor, info: SnapshotInfo, name: str) -> torch.dtype:
    """The dtype to store an average in: the wanted one, or wider where a value is too large for it."""
    wanted = info.schedule.checkpoint_dtype or info.tensors[name].dtype
    for dtype in (torch_dtype(wanted), torch.float32):
        if bool(torch.isfinite(average.to(dtype)).all()):
            return dtype
    return average.dtype
