"""What averages are made from: snapshots on disk, of one file or several parts, and any other stored averages.

A snapshot of several parts reads as if it were one file. What is known of several sources together is here, too: their
order, their clock, and the prior of a reconstruction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from posthoc_cli.dtypes import DTYPES
from posthoc_cli.errors import MismatchError
from posthoc_cli.profiles import Clock, Point, PowerFunction, StoredProfile
from posthoc_cli.reconstruction import ASSUMED, Motion, Prior, measured_prior, thinned_subset
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.chunks import Box, copy_range, row_major
from posthoc_cli.snapshots.measurements import with_sampled_measurements
from posthoc_cli.snapshots.tensor_file import RangeReader, TensorFile, decode_values

if TYPE_CHECKING:
    import torch

_SKIPPED = 256 * 1024
"""Bytes that are read at a time for their checksum alone."""

_Info = TypeVar("_Info")


class Source(Protocol):
    """A stored average: a snapshot or a checkpoint on disk, or a current average in memory."""

    @property
    def name(self) -> str:
        """The file's name, or a description of an average in memory."""

    @property
    def info(self) -> fmt.SnapshotInfo:
        """The snapshot's header, or what it would be."""

    @property
    def profile(self) -> StoredProfile:
        """What its averages are of: a power function, one checkpoint (`Point`), or known times (`Discrete`)."""

    @property
    def stored(self) -> Mapping[str, fmt.TensorEntry | fmt.TensorSpec]:
        """Dtype, shape and bytes of each stored tensor."""

    def open(self) -> AbstractContextManager[OpenSnapshot | Mapping[str, torch.Tensor]]:
        """Open it for reading, by any number of threads.

        Tensors in memory are on the host, or hold their values already: threads do not wait for the caller's stream.
        """


@dataclass(frozen=True)
class Part:
    """A file of a snapshot of several, with the box of each of its tensors."""

    path: Path
    header: fmt.FileHeader
    boxes: Mapping[str, Box]

    def open(self) -> TensorFile:
        """Open it; it must be the file whose header was read."""
        return TensorFile(self.path, self.header)


@dataclass(frozen=True)
class Stored(Generic[_Info]):
    """A file, its header, and what it says about itself; or a folder of `parts`, as if they were one file."""

    path: Path
    header: fmt.FileHeader
    info: _Info
    parts: tuple[Part, ...] = ()

    def open(self, boxes: Mapping[str, Box] | None = None) -> OpenSnapshot:
        """Open it, or boxes of some tensors as if these were all; its files must be those whose headers were read."""
        return PartedFile(self, boxes) if self.parts or boxes is not None else TensorFile(self.path, self.header)


@dataclass(frozen=True)
class FileSource(Stored[fmt.SnapshotInfo]):
    """A snapshot on disk, or another program's checkpoint."""

    @property
    def name(self) -> str:
        """The file's or folder's name."""
        return self.path.name

    @property
    def profile(self) -> StoredProfile:
        """What its averages are of."""
        return self.info.profile.pure

    @property
    def stored(self) -> Mapping[str, fmt.TensorEntry]:
        """Dtype, shape and place of each stored tensor."""
        return self.header.tensors

    def cells(self, name: str) -> int:
        """The number of chunks that rows of a tensor go through; 0 where it is in one file."""
        boxes = [part.boxes[name] for part in self.parts if name in part.boxes and part.boxes[name].size]
        return len(boxes) // max(1, len({box.offset[:1] for box in boxes}))


class Snapshot(FileSource):
    """A snapshot on disk."""

    @property
    def profile(self) -> PowerFunction:
        """The power function that it holds."""
        return self.info.profile.pure


# --- several sources


_Source = TypeVar("_Source", bound=Source)


def by_time(items: Sequence[_Source]) -> list[_Source]:
    """By time, then sigma_rel, checkpoints last."""
    return sorted(items, key=_order)


def chosen_up_to(items: Sequence[_Source], t: float) -> tuple[list[_Source], list[_Source]]:
    """Snapshots to combine for time `t`, at or before it; and a choice of the later ones, for the motion.

    Both by time, then sigma_rel; of very many a limited number, see `thinned_subset`.
    """
    ordered = by_time(items)
    usable, later = [o for o in ordered if o.info.t <= t], [o for o in ordered if o.info.t > t]
    return _chosen(usable), _chosen(later)


def _chosen(items: Sequence[_Source]) -> list[_Source]:
    return [items[index] for index in thinned_subset([item.profile for item in items])]


def _order(source: Source) -> tuple[float, float, bool]:
    return source.info.t, source.info.sigma_rel, isinstance(source.profile, Point)


def run_clock(infos: Sequence[fmt.SnapshotInfo]) -> Clock:
    """The run's steps over its time, from all its snapshots' clocks; a MismatchError if two contradict each other."""
    pairs = sorted({pair for info in infos for pair in info.clock_pairs})
    for (step, t), (next_step, next_t) in pairwise(pairs):
        if step == next_step or t >= next_t:
            raise MismatchError(
                "the snapshots are not of one training",
                f"by their clocks step {step} was at t = {t:,.12g}, and step {next_step} at t = {next_t:,.12g}",
            )
    return Clock([step for step, _ in pairs], [t for _, t in pairs])


def source_prior(sources: Sequence[Source]) -> Prior:
    """The motion of the network and the rounding of each source, in their order.

    If the header of a file has no measurements, those of all files are estimated from a sample of their tensors.
    """
    on_disk = [source for source in sources if isinstance(source, FileSource)]
    ordered = [*on_disk, *(source for source in sources if not isinstance(source, FileSource))]
    infos = [source.info for source in ordered]
    if sampled := any(source.info.measurements is None for source in on_disk):
        infos[: len(on_disk)] = with_sampled_measurements(on_disk)
    last = max((info.t for info in infos), default=0.0)  # what an earlier one shows of the path ends too soon
    text = next((info.sketch for info in infos if info.t == last and info.sketch), "")
    sketch = fmt.decode_path(text).sketch if text else None
    prior = measured_prior([info.average(source.profile) for info, source in zip(infos, ordered, strict=True)], sketch)
    place = {id(source): index for index, source in enumerate(ordered)}
    return (prior.sampled() if sampled else prior).of([place[id(source)] for source in sources])


@dataclass(frozen=True)
class EarlierRun:
    """An earlier run scaled to another length, relative to its norm: the motion, None if too little is known.

    `rounding` is the root mean square error of its stored averages by dtype, relative to their norm.
    """

    motion: Motion | None
    rounding: dict[str, float]


def scaled_run(snapshots: Sequence[FileSource], steps: float) -> EarlierRun:
    """The snapshots of one run, scaled to a run of `steps`. Reads a sample if headers lack measurements."""
    snapshots, _ = chosen_up_to(snapshots, max(snapshot.info.t for snapshot in snapshots))
    prior = source_prior(snapshots)
    times = np.array([snapshot.info.t for snapshot in snapshots])
    norm = float(prior.norm[times == times.max()].mean())
    known = prior.source != ASSUMED and norm > 0
    motion = prior.stretched(steps, float(times.max()), norm) if known else None
    found = defaultdict(list)
    for snapshot, rounding, squared in zip(snapshots, prior.rounding, prior.norm, strict=True):
        stored = {snapshot.stored[name].dtype for name in snapshot.info.averages}
        if prior.source != ASSUMED and len(stored) == 1 and rounding > 0 and squared > 0:
            found[DTYPES[stored.pop()].torch_name].append(float(rounding / squared))
    return EarlierRun(motion, {name: sqrt(float(np.mean(values))) for name, values in found.items()})


def counted(sources: Sequence[Source], count: int | None = None, there: int | None = None) -> str:
    """How many of which kind: "1 snapshot", "43 snapshots and checkpoints", or by numbers, "20 of 80 checkpoints"."""
    count = len(sources) if count is None else count
    there = count if there is None else there
    kinds = sorted({kind_of(source) for source in sources}, reverse=True)
    number = f"{count:,}" if count == there else f"{count:,} of {there:,}"
    return f"{number} {' and '.join(f'{kind}s' if there != 1 else kind for kind in kinds)}"


def kind_of(source: Source) -> str:
    """What it is called: "snapshot" or "checkpoint"."""
    return "checkpoint" if isinstance(source, FileSource) and not isinstance(source, Snapshot) else "snapshot"


# --- snapshots of several parts


class PartedFile:
    """A snapshot of several parts opened for its tensors, as a TensorFile is: each reads as if it were in one file.

    With `boxes` its tensors are these boxes of the snapshot's; parts that hold none of them stay closed.
    """

    def __init__(self, snapshot: Stored[Any], boxes: Mapping[str, Box] | None = None) -> None:
        self.path, self.header, self.info = snapshot.path, snapshot.header, snapshot.info
        stored = snapshot.header.tensors
        self._boxes = {name: Box.whole(entry.shape) for name, entry in stored.items()} if boxes is None else boxes
        if boxes is not None:
            cut = [fmt.TensorSpec(name, stored[name].dtype, box.shape) for name, box in boxes.items()]
            self.header = replace(snapshot.header, tensors=fmt.lay_out(cut))
        self._is_cut = boxes is not None
        whole = Part(snapshot.path, snapshot.header, {name: Box.whole(entry.shape) for name, entry in stored.items()})
        self._files: list[tuple[TensorFile, Mapping[str, Box]]] = []
        self._chunks: dict[str, list[tuple[TensorFile, Box]]] = {name: [] for name in self._boxes}
        with ExitStack() as stack:
            for part in snapshot.parts or (whole,):
                held = {n: box for n, box in part.boxes.items() if n in self._boxes and box.size}
                if self._is_cut:
                    held = {name: box for name, box in held.items() if box.meet(self._boxes[name]).size}
                if self._is_cut and not held:
                    continue
                file = stack.enter_context(part.open())
                self._files.append((file, held))
                for name, box in held.items():
                    self._chunks[name].append((file, box))
            self._opened = stack.pop_all()

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a complete tensor, verified: shape [nbytes]."""
        data = np.empty(self.header.tensors[name].nbytes, dtype=np.uint8)
        reader = self.read_range(name, 0, data.size)
        for begin in range(0, data.size, fmt.BLOCK_BYTES):  # keeps memory little above the size of the result
            reader.read_into(data[begin : begin + fmt.BLOCK_BYTES].data)
        return data

    def read_range(self, name: str, begin: int, end: int) -> BoxReader | RangeReader:
        """The bytes `begin` to `end` of a complete tensor, read in order; each block of a part is verified."""
        if (whole := self._file_with(name)) is not None:
            return whole.read_range(name, begin, end)
        return BoxReader(self._boxes[name], begin, end, self.header.tensors[name].dtype, self._chunks[name], name)

    def _file_with(self, name: str) -> TensorFile | None:
        """The file that holds all of a tensor, as it is read here; None if there is none."""
        if len(self._chunks[name]) != 1:
            return None
        file, box = self._chunks[name][0]
        alike = box == self._boxes[name] and file.header.tensors[name].dtype == self.header.tensors[name].dtype
        return file if alike else None

    def read_small(self, names: Sequence[str], parts: Sequence[memoryview], _: memoryview | None = None) -> None:
        """Fill `parts` with tensors of at most one block each, verified."""
        if self._is_cut:
            for name, part in zip(names, parts, strict=True):
                self.read_range(name, 0, len(part)).read_into(part)
            return
        targets = dict(zip(names, parts, strict=True))
        for file, boxes in self._files:
            stored = file.header.tensors
            own = [name for name in names if name in boxes]
            if not own:
                continue
            # A tensor that is whole in the file goes to its place, a chunk first to room of its own.
            kinds = {n: (stored[n].dtype, stored[n].shape) for n in own}
            chunks = [n for n in own if kinds[n] != (self.header.tensors[n].dtype, self.header.tensors[n].shape)]
            edges = [0, *accumulate(stored[name].nbytes for name in chunks)]
            room = np.empty(edges[-1], np.uint8).data
            rooms = {name: room[begin:end] for name, (begin, end) in zip(chunks, pairwise(edges), strict=True)}
            file.read_small(own, [rooms.get(name, targets[name]) for name in own], room if chunks == own else None)
            for name, data in rooms.items():
                self._place(targets[name], name, boxes[name], stored[name].dtype, data)

    def _place(self, target: memoryview, name: str, box: Box, dtype: str, data: memoryview) -> None:
        """Copy the elements of a chunk to their places in a complete tensor."""
        entry = self.header.tensors[name]
        values, item = _as_stored(np.frombuffer(data, np.uint8), dtype, entry.dtype), DTYPES[entry.dtype].nbytes
        whole = Box.whole(entry.shape)
        first, last = whole.span(box)
        if last - first == box.size:
            target[first * item : last * item] = values.data
        else:
            kind, steps = _items(entry.dtype), [item * step for step in row_major(entry.shape)]
            elements = as_strided(np.frombuffer(target, kind)[first:last], box.shape, steps)
            elements[...] = values.view(kind).reshape(box.shape)

    def read_unverified(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """The bytes `begin` to `end` of a complete tensor, without checksums, for estimates only."""
        if (whole := self._file_with(name)) is not None:
            return whole.read_unverified(name, begin, end)
        entry = self.header.tensors[name]
        item = DTYPES[entry.dtype].nbytes
        data = np.empty(end - begin, dtype=np.uint8)
        chunks = [(box, _Unverified(file, name, entry.dtype).read) for file, box in self._chunks[name]]
        copy_range(data.view(_items(entry.dtype)), self._boxes[name], begin // item, chunks)
        return data

    def close(self) -> None:
        """Close all parts."""
        self._opened.close()

    def __enter__(self) -> PartedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


OpenSnapshot = TensorFile | PartedFile
"""A snapshot opened for its tensors: a context manager; any number of threads may read at once."""


class BoxReader:
    """Elements of a box of one tensor, of the bytes `begin` to `end` in it, read in order from chunks that hold it.

    What is read of a part is verified in the same pass, from the block that it begins in to the end of its last one.
    """

    def __init__(
        self, box: Box, begin: int, end: int, dtype: str, chunks: Sequence[tuple[TensorFile, Box]], name: str
    ) -> None:
        self._box, self._position, self._end = box, begin, end
        self._type, self._item = _items(dtype), DTYPES[dtype].nbytes
        self._chunks = [(held, _Verified(file, name, dtype)) for file, held in chunks if held.meet(box).size]

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the bytes that come next, of complete elements."""
        if view:
            chunks = [(held, stored.read) for held, stored in self._chunks]
            copy_range(np.frombuffer(view, self._type), self._box, self._position // self._item, chunks)
        self._position += len(view)
        if self._position == self._end:
            for _, stored in self._chunks:
                stored.finish()


class _Unverified:
    """Stored elements of a chunk, as a dtype that holds them exactly."""

    def __init__(self, file: TensorFile, name: str, dtype: str) -> None:
        self._file, self._name, self._dtype = file, name, dtype
        self._entry = file.header.tensors[name]
        self._item = DTYPES[self._entry.dtype].nbytes

    def read(self, begin: int, end: int) -> npt.NDArray[Any]:
        """See `chunks.ForwardReader`."""
        data = self._bytes(begin * self._item, end * self._item)
        return _as_stored(data, self._entry.dtype, self._dtype).view(_items(self._dtype))

    def _bytes(self, begin: int, end: int) -> npt.NDArray[np.uint8]:
        return self._file.read_unverified(self._name, begin, end)


class _Verified(_Unverified):
    """The same, verified: bytes on the way to those that are wanted, within their block, are read for its checksum."""

    def __init__(self, file: TensorFile, name: str, dtype: str) -> None:
        super().__init__(file, name, dtype)
        self._position, self._range = -1, RangeReader(file, name, 0, self._entry.nbytes)

    def finish(self) -> None:
        """Read the last block to its end."""
        if self._position > 0 and self._position % fmt.BLOCK_BYTES:
            self._skip_to(min(self._entry.nbytes, -(-self._position // fmt.BLOCK_BYTES) * fmt.BLOCK_BYTES))

    def _bytes(self, begin: int, end: int) -> npt.NDArray[np.uint8]:
        first = begin - begin % fmt.BLOCK_BYTES
        if self._position < first:
            self.finish()
            self._range, self._position = RangeReader(self._file, self._name, first, self._entry.nbytes), first
        self._skip_to(begin)
        data = np.empty(end - begin, dtype=np.uint8)
        self._range.read_into(data.data)
        self._position = end
        return data

    def _skip_to(self, end: int) -> None:
        while self._position < end:
            size = min(end - self._position, _SKIPPED)
            self._range.read_into(memoryview(bytearray(size)))
            self._position += size


def _as_stored(data: npt.NDArray[np.uint8], dtype: str, wanted: str) -> npt.NDArray[np.uint8]:
    """The bytes of the same values in a dtype that holds them exactly."""
    if dtype == wanted:
        return data
    # A part with values too large or too small for the run's dtype has a wider one than the others.
    return decode_values(data, dtype).astype(np.dtype(DTYPES[wanted].torch_name)).view(np.uint8)


def _items(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype for copying elements bit by bit."""
    return np.dtype(f"u{DTYPES[dtype].nbytes}")
