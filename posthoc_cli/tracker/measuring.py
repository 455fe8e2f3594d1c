"""What is measured of averages: norms, rounding errors and distances, see `reconstruction.Measurements`.

All are sums over one subset of the elements, in float64, scaled to all: exact for small models. They agree with each
other whatever is drawn, as they are those of a network of these elements. With n elements of about one size a sum is
right within (2 / n)^(1/2), 0.2 % for half a million, and less where few elements dominate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import FileFormatError, PostHocError
from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction import Distance, Measurements
from posthoc_cli.snapshots.chunks import Box, Chunk
from posthoc_cli.snapshots.directory import StoredSnapshot, read_snapshot
from posthoc_cli.snapshots.format import SnapshotInfo
from posthoc_cli.snapshots.reading import ElementRange, TensorReader, open_file
from posthoc_cli.snapshots.tensor_file import tensor_from_bytes
from posthoc_cli.tracker.layout import Elements, Layout, Values, joined, tiles_of

log = logging.getLogger(__name__)

MEASURED_ELEMENTS = 2**19
"""Elements that are measured of a large model, about."""

_ADDED_UP = 2**17  # elements whose squares are added up at a time


class Subset(Elements):
    """The elements that are measured: all of a small model's, and of a larger one about `MEASURED_ELEMENTS`.

    One is drawn of each so many neighbours, always the same; of small tensors more, up to an even share of all: few
    elements, such as the gains of normalization, may be as large as many others, or move as far.

    Attributes:
        sizes: elements of each tensor, by name; none of empty ones.
        edges: where each one's begin among all that are drawn, and their number.
        scales: the elements of each / those that are drawn.
    """

    def __init__(self, layout: Layout, measured: Iterable[str]) -> None:
        wanted = frozenset(measured)
        spans = [
            [(name, begin, end) for name, (begin, end) in bucket.places.items() if name in wanted and begin < end]
            for bucket in layout
        ]
        self.sizes = {name: end - begin for own in spans for name, begin, end in own}
        most, share = -(-sum(self.sizes.values()) // MEASURED_ELEMENTS), MEASURED_ELEMENTS // max(1, len(self.sizes))
        drawn = [
            [begin + _drawn(name, end - begin, min(most, (end - begin) // max(1, share))) for name, begin, end in own]
            for own in spans
        ]
        super().__init__(layout, [np.concatenate([np.empty(0, np.int64), *own]) for own in drawn])
        counts = [len(one) for own in drawn for one in own]
        self.edges = np.array([0, *accumulate(counts)], np.int64)
        self.scales = np.array([*self.sizes.values()], np.float64) / np.array(counts, np.float64)

    def read(self, read: Callable[[Sequence[ElementRange]], Sequence[torch.Tensor]]) -> Values:
        """Their values in tensors of which `read` gives ranges; each is read from its beginning to its end."""
        room = [torch.zeros(count, dtype=b.wide) for count, b in zip(self.counts, self.layout, strict=True)]
        cut = (own for bucket in self.layout for own in bucket.cut(bucket.edges()))
        for tile, (number, _, index), ranges in zip(tiles_of(self.layout), self.of_tiles, cut, strict=True):
            own, places = room[tile.bucket], index.cpu().long()
            wanted = [one for one in ranges if one.name in self.sizes]
            for (name, begin, end), values in zip(wanted, read(wanted), strict=True):
                first = self.layout[tile.bucket].places[name][0] + begin - tile.begin
                at, last = torch.searchsorted(places, torch.tensor((first, first + end - begin))).tolist()
                own[number + at : number + last] = values.to(own.dtype)[places[at:last] - first]
        return joined(room)

    def sums(self, values: Values, others: Values | None = None) -> FloatArray:
        """The squared norm of each tensor, or its squared distance from others: shape [tensors]."""
        found, begin = np.zeros(len(self.sizes)), 0
        with np.errstate(over="ignore", invalid="ignore"):
            while begin < len(found):  # some tensors at a time: there is no memory for the squares of all
                end = max(begin + 1, int(np.searchsorted(self.edges[:-1], self.edges[begin] + _ADDED_UP)))
                first, last = self.edges[[begin, end]]
                own = values[first:last] if others is None else values[first:last] - others[first:last]
                found[begin:end] = np.add.reduceat(np.square(own, dtype=np.float64), self.edges[begin:end] - first)
                begin = end
            return np.asarray(self.scales * found)

    def squared(self, values: Values, others: Values | None = None) -> float:
        """The same of all tensors together."""
        return float(self.sums(values, others).sum())


def mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Numbers that look drawn by chance, and never change: a mixing of 64 bits (splitmix64)."""
    with np.errstate(over="ignore"):
        numbers = numbers * np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(numbers ^ (numbers >> np.uint64(31)))


def _drawn(name: str, size: int, among: int) -> Values:
    """One of each so many elements of a tensor: row-major indices."""
    firsts = np.arange(0, size, max(1, among), dtype=np.int64)
    if among > 1:
        seed = np.uint64(xxhash.xxh3_64_intdigest(name.encode(errors="replace")))
        firsts += (mixed(firsts.view(np.uint64) + seed) % np.uint64(among)).view(np.int64)
    return np.asarray(firsts[firsts < size])


def measurements(
    infos: Sequence[SnapshotInfo], subset: Subset, averages: Sequence[Values], earlier: Sequence[StoredSnapshot],
    stored: Sequence[Values] | None = None, network: Values | None = None,
) -> list[Measurements | None]:  # fmt: skip
    """Of averages of one time, one a profile; None where a value is not finite, or its square.

    Arguments:
        averages: values of the subset.
        earlier: snapshots whose distances are wanted. They are read from disk and verified; one that is gone or damaged
            is left out, with a warning.
        stored: the values as they are stored; None where they are not.
        network: those of the network then, where known.
    """
    away_from = [math.nan if network is None else subset.squared(own, network) for own in averages]
    found: list[list[Distance]] = [
        [
            Distance(other.t, other.sigma_rel, subset.squared(own, its), 0.0)
            for other, its in zip(infos, averages, strict=True)
            if other is not info
        ]
        for info, own in zip(infos, averages, strict=True)
    ]
    for snapshot in earlier:
        # Readers add the parts'. Of a complete snapshot the first part tells it alone.
        part, known = infos[0].part, snapshot.info.measurements
        counts = snapshot.info.part == part or part is None or part[0] == 1
        values = _of_earlier(snapshot, subset, infos[0].chunks)
        if values is not None and known is not None:
            rounding = known.rounding if counts else 0.0
            for own, distances in zip(averages, found, strict=True):
                distances.append(Distance(snapshot.t, snapshot.sigma_rel, subset.squared(own, values), rounding))
    norms = [subset.squared(own) for own in averages]
    roundings = [0.0] * len(infos) if stored is None else [*map(subset.squared, averages, stored)]
    return [
        Measurements(
            norm, rounding,
            # The square of a difference may be too large where those of the values are not.
            tuple(one for one in distances if math.isfinite(one.squared)), away if math.isfinite(away) else None,
        )
        if math.isfinite(norm)
        else None
        for norm, rounding, distances, away in zip(norms, roundings, found, away_from, strict=True)
    ]  # fmt: skip


def _of_earlier(snapshot: StoredSnapshot, subset: Subset, chunks: Mapping[str, Chunk]) -> Values | None:
    """Values of the subset in a snapshot; None where that cannot be read, with a warning."""
    shapes = {n: shape for bucket in subset.layout for n, shape in zip(bucket.names, bucket.shapes, strict=True)}
    boxes = {name: chunk.box(shapes[name]) for name, chunk in chunks.items() if name in shapes}
    try:
        with _opened(snapshot, boxes) as file:
            return subset.read(_ranges_in(file))
    except PostHocError as error:
        log.warning("%s; new snapshots are written without their distance to it", error)
        return None


def _opened(snapshot: StoredSnapshot, boxes: Mapping[str, Box]) -> TensorReader:
    if snapshot.info.part is not None or not (boxes or snapshot.path.is_dir()):
        file: TensorReader = open_file(snapshot.path)
        checksum = file.header.metadata.get("ema.checksum")
    else:
        found = read_snapshot(snapshot.path)
        file, checksum = found.open(boxes or None), found.header.metadata["ema.checksum"]
    if checksum != snapshot.checksum:
        file.close()
        raise FileFormatError(snapshot.path, "was replaced by another one")
    return file


def _ranges_in(file: TensorReader) -> Callable[[Sequence[ElementRange]], list[torch.Tensor]]:
    """Gives ranges of a file's tensors, flat and verified, of each in order from its beginning."""
    readers: dict[str, Any] = {}

    def read(ranges: Sequence[ElementRange]) -> list[torch.Tensor]:
        found = []
        for name, begin, end in ranges:
            entry = file.header.tensors[name]
            if begin == 0:
                readers[name] = file.read_range(name, 0, entry.nbytes)
            data = np.empty((end - begin) * ITEM_BYTES[entry.dtype], np.uint8)
            readers[name].read_into(data.data)
            found.append(tensor_from_bytes(data, entry.dtype, (end - begin,)))
        return found

    return read
