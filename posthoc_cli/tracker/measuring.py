"""What is measured of averages and of the weights' path, by one subset of the elements.

Norms, rounding errors and distances, see `reconstruction.Measurements`, are sums over the subset in float64, scaled to
all: exact for small models. They agree with each other whatever is drawn, as they are those of a network of these
elements. With n elements of about one size a sum is right within (2 / n)^(1/2), 0.2 % for half a million, and less
where few elements dominate.

The path of the weights is projected to a few numbers at every fold, see `reconstruction.Sketch`: each element of the
subset is multiplied by a random sign and the root of how many it stands for, and added to one of the numbers, which is
drawn for its place in a row. It is linear, and depends on the places of elements alone: not on threads, tiles or
devices. Of statistics there is no path.
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
from posthoc_cli.profiles import FloatArray, new_value_share, sketched_window_ends
from posthoc_cli.reconstruction import Distance, Measurements, Sketch
from posthoc_cli.snapshots.chunks import Chunk
from posthoc_cli.snapshots.directory import StoredSnapshot, read_snapshot
from posthoc_cli.snapshots.format import Path, SnapshotInfo
from posthoc_cli.snapshots.reading import ElementRange, TensorReader, open_file
from posthoc_cli.snapshots.tensor_file import tensor_from_bytes
from posthoc_cli.tracker.layout import Elements, Layout, Tile, Values, joined, ranges_of, tiles_of

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
        tiles = zip(tiles_of(self.layout), self.of_tiles, ranges_of(self.layout), strict=True)
        for tile, (number, _, index), ranges in tiles:
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
    distances: list[list[Distance]] = [[] for _ in infos]

    def measure(t: float, sigma_rel: float, others: Values, rounding: float = 0.0) -> None:
        for own, found in zip(averages, distances, strict=True):
            if own is not others:
                found.append(Distance(t, sigma_rel, subset.squared(own, others), rounding))

    for info, own in zip(infos, averages, strict=True):
        measure(info.t, info.sigma_rel, own)
    for snapshot in earlier:
        # Readers add the parts'. Of a complete snapshot the first part tells it alone.
        part, known = infos[0].part, snapshot.info.measurements
        counts = snapshot.info.part == part or part is None or part[0] == 1
        values = _of_earlier(snapshot, subset, infos[0].chunks)
        if values is not None and known is not None:
            measure(snapshot.t, snapshot.sigma_rel, values, known.rounding if counts else 0.0)
    made: list[Measurements | None] = []
    for index, (own, found) in enumerate(zip(averages, distances, strict=True)):
        norm, away = subset.squared(own), math.nan if network is None else subset.squared(own, network)
        rounding = 0.0 if stored is None else subset.squared(own, stored[index])
        # The square of a difference may be too large where those of the values are not.
        kept = tuple(one for one in found if math.isfinite(one.squared))
        one = Measurements(norm, rounding, kept, away if math.isfinite(away) else None)
        made.append(one if math.isfinite(norm) else None)
    return made


def _of_earlier(snapshot: StoredSnapshot, subset: Subset, chunks: Mapping[str, Chunk]) -> Values | None:
    """Values of the subset in a snapshot; None where that cannot be read, with a warning."""
    shapes = {n: shape for bucket in subset.layout for n, shape in zip(bucket.names, bucket.shapes, strict=True)}
    boxes = {name: chunk.box(shapes[name]) for name, chunk in chunks.items() if name in shapes}
    try:
        if snapshot.info.part is not None or not (boxes or snapshot.path.is_dir()):
            file: TensorReader = open_file(snapshot.path)
            checksum = file.header.metadata.get("ema.checksum")
        else:
            found = read_snapshot(snapshot.path)
            file, checksum = found.open(boxes or None), found.header.metadata["ema.checksum"]
        with file:
            if checksum != snapshot.checksum:
                raise FileFormatError(snapshot.path, "was replaced by another one")
            return subset.read(_ranges_in(file))
    except PostHocError as error:
        log.warning("%s; new snapshots are written without their distance to it", error)
        return None


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


# --- the path of the weights

NUMBERS = 64
"""D of a projection: squared lengths are right within 1 +- sqrt(2 / D), 0.18."""

ROW = 1021
"""Places in a row, which are added up first: a prime, so that a column of a matrix is not in one place."""

MOST_WINDOWS = 1024
"""Windows of a sketch; where there are more, each two become one."""

_PENDING = 64
"""Windows whose numbers may still be on an accelerator: to fetch them, one waits for it."""


class Sketcher:
    """Projects the weights' means over windows; from any of a crew's threads, one window at a time."""

    def __init__(self, subset: Subset, part: int = 0) -> None:
        """Begin a path of a model, or of the part of this number, whose signs are independent."""
        self.subset = subset
        names = [(bucket.names, bucket.shapes, str(bucket.wide)) for bucket in subset.layout]
        told = repr((part, names, [*subset.sizes], subset.edges.tolist()))
        self._projection = xxhash.xxh3_64_intdigest(told.encode()) >> 1
        self._sketch: Sketch | None = None
        self._values = subset.room()
        factors = np.repeat(np.sqrt(subset.scales), np.diff(subset.edges)) * _signs(int(subset.edges[-1]), part)
        drawn = torch.split(torch.from_numpy(factors), subset.counts)
        self._factors = [own.to(room) for own, room in zip(drawn, self._values, strict=True)]
        self._pending: list[tuple[float, float, bool, list[torch.Tensor]]] = []
        self._begin = self._t = 0.0  # of the open window, and of the last value in it
        self._open: FloatArray | None = None  # its mean up to what is pending

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(own.nbytes for own in (*self._values, *self._factors))

    def goes_on(self, path: Path) -> bool:
        """Go on from a path, if it is of the same projection; a last window of no folds is open."""
        is_own = path.projection == self._projection
        if is_own:
            self._sketch, self._open = _ended(path.sketch)
            self._begin, self._t = float(self._sketch.edges[-1]), float(path.sketch.edges[-1])
        return is_own

    def take(self, tile: Tile, values: torch.Tensor) -> None:
        """Take in a tile of a window's mean, or of a value."""
        self.subset.take(tile, values, self._values)

    def end_window(self, t: float) -> None:
        """All tiles of a window's mean have been taken in, whose last update was at time `t`."""
        self._add(t, 1.0, True)

    def end_value(self, gammas: Sequence[float], t: float, is_last: bool) -> None:
        """All tiles of the values at time `t` have been taken in, with which a window may end; the last one does."""
        begin, before = self._begin, self._t
        share = new_value_share(gammas[0], before, t) / new_value_share(gammas[0], begin, t)
        self._add(t, share, is_last or sketched_window_ends(gammas, begin, before, t))

    def path(self, t: float | None = None) -> Path | None:
        """The path so far, where a window is open with a last one of no folds, see `closed`.

        With `t` as if a window ended then, of which all tiles have been taken in.
        """
        self._fetch()
        found = self._sketch
        if t is not None:
            found = _appended(found, t, _numbers(self._projected()))
        elif self._open is not None and found is not None:
            found = _with_window(found, self._t, self._open, 0.0)
        return None if found is None else Path(self._projection, found)

    def _add(self, t: float, share: float, ends: bool) -> None:
        self._t, self._begin = t, t if ends else self._begin
        self._pending.append((t, share, ends, self._projected()))
        if len(self._pending) >= _PENDING:
            self._fetch()

    def _fetch(self) -> None:
        for t, share, ends, sums in self._pending:
            found = _numbers(sums)
            if self._open is not None:
                found = _rounded(self._open + share * (found - self._open))
            self._open = None if ends else found
            if ends:
                self._sketch = _appended(self._sketch, t, found)
        self._pending.clear()

    def _projected(self) -> list[torch.Tensor]:
        """The sums at each place of a row, of each bucket: float64; float32 on Apple's GPUs, which have none."""
        found = []
        for values, factors in zip(self._values, self._factors, strict=True):
            made, rows = values * factors, len(values) // ROW * ROW
            exact = torch.float32 if values.device.type == "mps" else torch.float64
            total = made[:rows].view(rows // ROW, ROW).sum(dim=0, dtype=exact)
            total[: len(made) - rows] += made[rows:]
            found.append(total)
        return found


def closed(path: Path) -> Path:
    """The path as if a window that is open ended now."""
    sketch, is_open = _ended(path.sketch)
    return path if is_open is None else path._replace(sketch=_appended(sketch, path.sketch.edges[-1], is_open))


def _ended(sketch: Sketch) -> tuple[Sketch, FloatArray | None]:
    """The windows that have ended, and the mean of the open one."""
    if sketch.folds[-1] >= 1:
        return sketch, None
    return Sketch(sketch.edges[:-1], sketch.folds[:-1], sketch.means[:-1], sketch.spread[:-1]), sketch.means[-1:]


def _numbers(sums: list[torch.Tensor]) -> FloatArray:
    """The numbers of what is projected: shape [1, D]."""
    row = sum((own.cpu().numpy().astype(np.float64) for own in sums), np.zeros(ROW))
    return _rounded(np.bincount(_NUMBER, row, NUMBERS)[None].astype(np.float64))


def _rounded(numbers: FloatArray) -> FloatArray:
    """As states hold them."""
    with np.errstate(over="ignore", invalid="ignore"):  # of weights near the largest numbers: none is written then
        return numbers.astype(np.float32).astype(np.float64)


def _with_window(sketch: Sketch, t: float, mean: FloatArray, folds: float) -> Sketch:
    """A path with one more window."""
    return Sketch(
        np.append(sketch.edges, t), np.append(sketch.folds, folds),
        np.vstack((sketch.means, mean)), np.append(sketch.spread, 0.0),
    )  # fmt: skip


def _appended(sketch: Sketch | None, t: float, mean: FloatArray) -> Sketch:
    """A path with one more fold, in a window of its own, or in the last one until this has as many as the others."""
    with np.errstate(over="ignore", invalid="ignore"):
        if sketch is None:
            return Sketch(np.array([t, t]), np.ones(1), mean, np.zeros(1))
        made = _with_window(sketch, t, mean, 1.0)
        if sketch.folds[-1] < sketch.folds.max():
            return _halved(made, len(sketch.folds) - 1)
        return made if len(made.folds) <= MOST_WINDOWS else _halved(made)


def _halved(sketch: Sketch, begin: int = 0) -> Sketch:
    """Each two windows as one, from the one of this index on; an odd last one stays."""
    end = begin + (len(sketch.folds) - begin) // 2 * 2
    values = sketch.folds, sketch.means, sketch.spread
    first, second = ([one[start:end:2] for one in values] for start in (begin, begin + 1))
    folds, apart = first[0] + second[0], second[1] - first[1]
    share = second[0] / folds
    spread = first[2] + share * (second[2] - first[2]) + share * (1 - share) * np.sum(apart**2, axis=1)
    means = (first[1] + share[:, None] * apart).astype(np.float32).astype(np.float64)
    edges = (sketch.edges[:begin], sketch.edges[begin : end + 1 : 2], sketch.edges[end + 1 :])
    joined = [np.concatenate((a[:begin], b, a[end:])) for a, b in zip(values, (folds, means, spread), strict=True)]
    return Sketch(np.concatenate(edges), *joined)


_NUMBER = (mixed(np.arange(ROW, dtype=np.uint64)) % np.uint64(NUMBERS)).astype(np.int64)
"""To which of the numbers each place of a row belongs."""


def _signs(count: int, part: int) -> Values:
    """Signs that never change, of a part's own."""
    numbers = np.arange(count, dtype=np.uint64) + (np.uint64(part) << np.uint64(40))
    return np.asarray(np.where(mixed(~numbers) >> np.uint64(63), np.float32(1), np.float32(-1)))
