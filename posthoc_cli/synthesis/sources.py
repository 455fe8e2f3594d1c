"""Stored averages that a synthesis reads: snapshots and checkpoints on disk, or averages in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from posthoc_cli.checkpoints.checkpoint import beside_snapshots
from posthoc_cli.checkpoints.opening import NOTHING_SAID, Origin, holds_checkpoints, is_glob, open_checkpoints
from posthoc_cli.errors import DirectoryError, InvalidValueError
from posthoc_cli.profiles import StoredProfile
from posthoc_cli.reconstruction import Prior
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.format import SnapshotInfo, TensorEntry, TensorSpec
from posthoc_cli.snapshots.measurements import FileSource, snapshot_prior
from posthoc_cli.snapshots.reader import OpenSnapshot

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """A stored average: a snapshot or a checkpoint on disk, or a live average in memory."""

    @property
    def name(self) -> str:
        """The file's name, or a description of an average in memory."""

    @property
    def info(self) -> SnapshotInfo:
        """The snapshot's header, or what it would be."""

    @property
    def profile(self) -> StoredProfile:
        """What its averages are of: a power function, one checkpoint (`Point`), or known times (`Discrete`)."""

    @property
    def stored(self) -> Mapping[str, TensorEntry | TensorSpec]:
        """Dtype, shape and bytes of each stored tensor."""

    def open(self) -> AbstractContextManager[OpenSnapshot | Mapping[str, torch.Tensor]]:
        """Open it for reading, by any number of threads.

        Tensors in memory are on the host, or hold their values already: threads do not wait for the caller's stream.
        """


def disk_sources(directory: str | Path, origin: Origin = NOTHING_SAID, also: str | Path | None = None) -> list[Source]:
    """What a directory holds as sources: the snapshots of a tracker, else checkpoints.

    Arguments:
        directory: of a run; or a file, or a glob that names the files or folders of checkpoints.
        origin: what checkpoints do not say themselves.
        also: where checkpoints of the same training are, to be combined with the snapshots.

    Raises:
        DirectoryError, FileFormatError, MismatchError: as `read_directory`, and of checkpoints `open_checkpoints`.
    """
    path = Path(directory)
    if origin.kind not in (None, "snapshots") or is_glob(directory):
        return [*open_checkpoints(directory, origin)]
    try:
        snapshots = read_directory(path)
    except DirectoryError as error:
        if origin.kind is not None or not holds_checkpoints(directory):
            raise error
        if also is not None:
            raise InvalidValueError("checkpoints", "are added to the snapshots of a tracker", error.reason) from error
        return [*open_checkpoints(directory, origin)]
    others = [] if also is None else beside_snapshots(snapshots, open_checkpoints(also, origin))
    return sorted([*snapshots, *others], key=lambda one: (one.info.t, one.info.sigma_rel)) if others else [*snapshots]


def source_prior(sources: Sequence[Source]) -> Prior:
    """The motion of the network and the rounding of each source, in their order.

    If the header of a file has no measurements, those of all files are estimated from a sample of their tensors.
    """
    on_disk = [source for source in sources if isinstance(source, FileSource)]
    in_memory = [source for source in sources if not isinstance(source, FileSource)]
    prior = snapshot_prior(on_disk, [source.info for source in in_memory])
    place = {id(source): index for index, source in enumerate([*on_disk, *in_memory])}
    return prior.of([place[id(source)] for source in sources])
