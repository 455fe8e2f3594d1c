"""Snapshots in several files: a directory with an index, read as one.

Each shard is a snapshot file of its own tensors (see `format`), and says the same as the others about the run, the
profile and the time; what it measured are sums over its own tensors, so that those of the whole are their sums. The
index says which tensor is in which shard; with it a snapshot is there, without it it is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, VanishedError, shown
from posthoc_cli.reconstruction.measurements import Distance, Measurements
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.models import INDEX_NAME, decode_index, read_index
from posthoc_cli.snapshots.reader import RangeReader, Snapshot, TensorFile, read_header


@dataclass(frozen=True)
class ShardedSnapshot(Snapshot):
    """A snapshot in several files. `path` is the directory, `header` tells of all shards together.

    Attributes:
        shards: each file with its header, by name.
    """

    shards: tuple[Snapshot, ...]


class TensorReader(Protocol):
    """The tensors of a snapshot, in one file or in several, read by any number of threads; see `TensorFile`."""

    @property
    def header(self) -> fmt.FileHeader:
        """What is where."""
        ...

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, verified."""
        ...

    def read_range(self, name: str, begin: int, end: int) -> RangeReader:
        """Some blocks of a tensor, to be read in order and verified."""
        ...

    def fill(self, name: str, view: memoryview, begin: int) -> None:
        """Fill `view` from a tensor, and those that follow it by their places in `header`, unverified."""
        ...

    def verify(self, names: Sequence[str], parts: Sequence[memoryview]) -> None:
        """Check all bytes of small tensors."""
        ...

    def read_unverified(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """Some bytes of a tensor, for estimates."""
        ...

    def close(self) -> None:
        """Close what was opened."""
        ...

    def __enter__(self) -> TensorReader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def is_sharded(path: Path) -> bool:
    """Whether a path leads to a directory with an index."""
    try:
        return (path / INDEX_NAME).is_file()
    except OSError:  # no permission, or a name too long to have one
        return False


def open_path(path: Path) -> TensorReader:
    """Open the snapshot at a path for its tensors, whatever it is now.

    Raises:
        FileFormatError: it is damaged.
    """
    snapshot = read_sharded(path) if is_sharded(path) else None
    return TensorFile(path) if snapshot is None else ShardedTensors(snapshot)


def open_tensors(snapshot: Snapshot) -> TensorReader:
    """Open a snapshot for its tensors; it must still be the one that was read.

    Raises:
        FileFormatError: it is not, or is damaged.
    """
    if isinstance(snapshot, ShardedSnapshot):
        return ShardedTensors(snapshot)
    return TensorFile(snapshot.path, snapshot.header)


class ShardedTensors:
    """The files of a sharded snapshot, opened together."""

    def __init__(self, snapshot: ShardedSnapshot) -> None:
        self.header = snapshot.header
        self._stack = ExitStack()
        self._files: dict[str, TensorFile] = {}
        with ExitStack() as stack:
            for shard in snapshot.shards:
                try:
                    file = stack.enter_context(TensorFile(shard.path, shard.header))
                except VanishedError as error:
                    raise _missing(shard.path, error) from error
                self._files |= dict.fromkeys(shard.header.tensors, file)
            self._stack = stack.pop_all()

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """See `TensorFile.read`."""
        return self._files[name].read(name)

    def read_range(self, name: str, begin: int, end: int) -> RangeReader:
        """See `TensorFile.read_range`."""
        return self._files[name].read_range(name, begin, end)

    def fill(self, name: str, view: memoryview, begin: int) -> None:
        """See `TensorFile.fill`: tensors that follow each other in `header` do so in one file."""
        self._files[name].fill(name, view, begin)

    def verify(self, names: Sequence[str], parts: Sequence[memoryview]) -> None:
        """See `TensorFile.verify`."""
        pairs = zip(names, parts, strict=True)
        for file, group in groupby(pairs, lambda pair: self._files[pair[0]]):
            own = list(group)
            file.verify([name for name, _ in own], [part for _, part in own])

    def read_unverified(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """See `TensorFile.read_unverified`."""
        return self._files[name].read_unverified(name, begin, end)

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def __enter__(self) -> ShardedTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- from a directory ------------------------------------------------------------------------------


def read_sharded(directory: Path) -> ShardedSnapshot | None:
    """The snapshot in a directory with an index; None where its shards are no snapshots. Reads headers only.

    A model that somebody makes or keeps beside the snapshots need not be whole.

    Raises:
        FileFormatError: the index or a shard is damaged, or they contradict each other.
    """
    index = directory / INDEX_NAME
    found = decode_index(index)
    names = found.shards
    headers, problems = _read_headers(directory, names)
    if not names:
        raise FileFormatError(index, "names no shard")
    if headers and not any(file_kind(header) == "snapshot" for header in headers.values()):
        return None
    if problems:
        raise problems[0]
    shards = [
        Snapshot(directory / name, header, decode_snapshot(directory / name, header))
        for name, header in headers.items()
    ]
    for shard in shards:
        _check_names(index, shard, names[shard.path.name])
    for other in shards[1:]:
        _check_same(shards[0], other)
    _check_total(index, found.total_size, shards)
    return ShardedSnapshot(directory, _joined_header(shards), _joined_info(shards), tuple(shards))


def _read_headers(directory: Path, names: Iterable[str]) -> tuple[dict[str, fmt.FileHeader], list[FileFormatError]]:
    """The headers that can be read, and why others cannot."""
    headers: dict[str, fmt.FileHeader] = {}
    problems: list[FileFormatError] = []
    for name in names:
        try:
            headers[name] = read_header(directory / name)
        except VanishedError as error:
            problems.append(_missing(directory / name, error))
        except FileFormatError as error:
            problems.append(error)
    return headers, problems


def _missing(shard: Path, error: VanishedError) -> FileFormatError:
    """What to say of a shard that is not there: damage, unless the whole snapshot has gone, whose index goes first."""
    index = shard.parent / INDEX_NAME
    return error if files.is_gone(index) else FileFormatError(shard, f"is missing; {INDEX_NAME} names it")


def _check_names(index: Path, shard: Snapshot, names: Sequence[str]) -> None:
    """Check that a shard holds what the index says, and nothing else."""
    missing, further = set(names) - shard.header.tensors.keys(), shard.header.tensors.keys() - set(names)
    if missing:
        raise FileFormatError(shard.path, f"tensor {shown(min(missing))} is not in it, as {index.name} says")
    if further:
        raise FileFormatError(shard.path, f"tensor {shown(min(further))} is in it, and not in {index.name}")


def _check_total(index: Path, total: int | None, shards: Sequence[Snapshot]) -> None:
    """Check the size that an index says, if any: no reader uses it, but a wrong one is damage."""
    found = sum(entry.nbytes for shard in shards for entry in shard.header.tensors.values())
    if total not in (None, found):
        raise FileFormatError(index, f"total_size is {shown(total)}; the tensors of its shards have {found:,} bytes")


def _check_same(first: Snapshot, other: Snapshot) -> None:
    """Check that two shards are of one snapshot."""
    own = ("tensors", "aliases", "measurements", "motion")
    for name in fmt.SnapshotInfo.__dataclass_fields__:
        values = [getattr(shard.info, name) for shard in (first, other)]
        if name not in own and values[0] != values[1]:
            raise FileFormatError(
                f"{first.path} and {other.path} are not of one snapshot",
                f"their {name} are {str(values[0])[:60]} and {str(values[1])[:60]}",
            )


def _joined_header(shards: Sequence[Snapshot]) -> fmt.FileHeader:
    """All shards as one file, with gaps between them: what follows each other here does so in one file."""
    tensors: dict[str, fmt.TensorEntry] = {}
    base = 0
    for shard in shards:
        for name, entry in shard.header.tensors.items():
            tensors[name] = replace(entry, begin=base + entry.begin)
        base += sum(entry.nbytes for entry in shard.header.tensors.values()) + 1
    metadata = {**shards[0].header.metadata, "ema.checksum": _joined_checksum(shards)}
    return fmt.FileHeader(metadata, tensors, sum(shard.header.payload_start for shard in shards))


def _joined_checksum(shards: Sequence[Snapshot]) -> str:
    """Tells apart what two sharded snapshots hold, as a file's header does by its own checksum."""
    return xxhash.xxh3_64_hexdigest("".join(shard.header.metadata["ema.checksum"] for shard in shards).encode())


def _joined_info(shards: Sequence[Snapshot]) -> fmt.SnapshotInfo:
    directory = shards[0].path.parent
    tensors = {name: tensor for shard in shards for name, tensor in shard.info.tensors.items()}
    aliases: dict[str, str] = {}
    for alias, name in (item for shard in shards for item in shard.info.aliases.items()):
        if alias in tensors:
            raise FileFormatError(directory, f"{shown(alias)} is a tensor and a further name of {shown(name)}")
        if aliases.setdefault(alias, name) != name:
            raise FileFormatError(
                directory, f"{shown(alias)} is a further name of {shown(aliases[alias])} and of {shown(name)}"
            )
    joined = _joined_measurements([shard.info.measurements for shard in shards if _holds_averages(shard.info)])
    return replace(shards[0].info, tensors=tensors, aliases=aliases, measurements=joined, motion=None)


def _holds_averages(info: fmt.SnapshotInfo) -> bool:
    """Whether anything of a shard was measured: copies are not."""
    return any(tensor.role == "average" for tensor in info.tensors.values())


def _joined_measurements(measured: Sequence[Measurements | None]) -> Measurements | None:
    """The sums over all shards; None where a shard has none, or has others than the first."""
    known = [one for one in measured if one is not None]
    if not known or len(known) < len(measured) or len({frozenset(_partners(one)) for one in known}) > 1:
        return None
    return reduce(_sum, known)


def _partners(measured: Measurements) -> dict[tuple[float, float], Distance]:
    return {(distance.t, distance.sigma_rel): distance for distance in measured.distances}


def _sum(one: Measurements, other: Measurements) -> Measurements:
    """Sums over the elements of both, which measured the distances to the same partners."""
    further = _partners(other)
    distances = tuple(
        replace(distance, squared=distance.squared + twin.squared, rounding=distance.rounding + twin.rounding)
        for partner, distance in _partners(one).items()
        for twin in (further[partner],)
    )
    weights = None if one.weights is None or other.weights is None else one.weights + other.weights
    return Measurements(one.norm + other.norm, one.rounding + other.rounding, distances, weights)


# --- away with it ----------------------------------------------------------------------------------


def remove_snapshot(snapshot: Path) -> None:
    """Delete a snapshot: a file, or a directory with an index. One that has gone by another hand is no error.

    A directory first loses its name, in one step, so that an interruption leaves no half snapshot but a temporary.
    Only the index and its shards are deleted: where there is more, the directory gets its name back and keeps that.

    Raises:
        WriteError: the system refused.
        FileFormatError: the index cannot be read; nothing was deleted.
    """
    with files.reported_as_write_error(snapshot, "removed"), suppress(FileNotFoundError):
        if snapshot.is_symlink() or not snapshot.is_dir():
            files.system.unlink(snapshot)
        else:
            _remove_shards(snapshot)


def _remove_shards(snapshot: Path) -> None:
    names = list(read_index(snapshot / INDEX_NAME))
    aside = files.temporary_path(snapshot.parent)
    files.system.rename(snapshot, aside)
    for name in (INDEX_NAME, *names):
        files.unlink_if_there(aside / name)
    try:
        files.system.remove_directory(aside)
    except OSError:
        files.system.rename(aside, snapshot)  # now no snapshot, but what somebody keeps there
