"""Where averages come from: snapshots on disk, or anything else that can be read like one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from posthoc_cli.reconstruction import Prior
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.format import SnapshotInfo
from posthoc_cli.snapshots.measurements import snapshot_prior
from posthoc_cli.snapshots.reader import Snapshot, TensorFile

if TYPE_CHECKING:
    from posthoc_cli.synthesis.reading import TileReader
    from posthoc_cli.synthesis.tiles import Tile


class OpenSource(AbstractContextManager["OpenSource"], Protocol):
    """A source while its tensors are read, by any number of threads."""

    def open_tile(self, tile: Tile) -> TileReader:
        """Start reading the tile."""
        ...


class Source(Protocol):
    """A stored average: a snapshot on disk, or a live average in memory."""

    @property
    def name(self) -> str:
        """The file's name, or a word for an average in memory."""
        ...

    @property
    def info(self) -> SnapshotInfo:
        """What the average says about itself."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of its tensors."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Dtypes that its tensors are stored in, by their safetensors names."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that reading all of it takes."""
        ...

    def open(self) -> OpenSource:
        """Start reading."""
        ...


@dataclass(frozen=True)
class DiskSource:
    """A snapshot on disk, in one file or several, as a source."""

    snapshot: Snapshot

    @property
    def name(self) -> str:
        """The name of the file, or of the directory."""
        return self.snapshot.path.name

    @property
    def info(self) -> SnapshotInfo:
        """What the snapshot says about itself."""
        return self.snapshot.info

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of its tensors."""
        return {name: entry.shape for name, entry in self.snapshot.header.tensors.items()}

    @cached_property
    def dtypes(self) -> Mapping[str, str]:
        """Dtypes that its tensors are stored in."""
        return {name: entry.dtype for name, entry in self.snapshot.header.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of its payload."""
        return sum(entry.nbytes for entry in self.snapshot.header.tensors.values())

    def open(self) -> _OpenFile:
        """Open the file; it must still be the one that was planned with."""
        return _OpenFile(self.snapshot)


class _OpenFile:
    def __init__(self, snapshot: Snapshot) -> None:
        self._file = TensorFile(snapshot.path, snapshot.header)

    def open_tile(self, tile: Tile) -> TileReader:
        """Start reading the tile."""
        from posthoc_cli.synthesis.reading import open_file_tile

        return open_file_tile(self._file, tile)

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def disk_sources(directory: str | Path) -> list[Source]:
    """The snapshots of a directory as sources; raises what `read_directory` raises."""
    return [DiskSource(snapshot) for snapshot in read_directory(Path(directory))]


def source_prior(sources: Sequence[Source]) -> Prior:
    """What the sources tell of how the network moved and how they are stored, in their order.

    Where headers of files have no measurements, those of all files are estimated from a sample.
    """
    on_disk = [source for source in sources if isinstance(source, DiskSource)]
    in_memory = [source for source in sources if not isinstance(source, DiskSource)]
    prior = snapshot_prior([source.snapshot for source in on_disk], [source.info for source in in_memory])
    place = {id(source): index for index, source in enumerate([*on_disk, *in_memory])}
    return prior.of([place[id(source)] for source in sources])


def distinct_dtypes(sources: Sequence[Source]) -> list[tuple[Mapping[str, str], int]]:
    """What the sources' tensors are stored in, and how many sources alike: those of a run are, as a rule."""
    found: list[tuple[Mapping[str, str], int]] = []
    for source in sources:
        index = next((index for index, (other, _) in enumerate(found) if source.dtypes == other), len(found))
        found[index : index + 1] = [(source.dtypes, found[index][1] + 1 if index < len(found) else 1)]
    return found
