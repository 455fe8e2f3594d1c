"""Measurements of averages and of the weights' path, on a subset of the elements.

Norms and rounding errors, see `reconstruction.Measurements`, are sums over the subset in float64,
scaled to all elements: exact for small models, and for n elements of about one size within (2 /
n)^(1/2), 0.4 % for 131,072.

The path of the weights is projected to a few numbers at every fold, see `reconstruction.Sketch`:
each element of the subset is multiplied by a random sign and the square root of the number of
elements that it represents, and added to one of the numbers, drawn by its column. The projection
depends on the positions of elements alone, not on tiles or devices.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction import Measurements, Sketch
from posthoc_cli.snapshots.source import PathSketch
from posthoc_cli.tracker.folding import new_value_share, sketched_window_ends
from posthoc_cli.tracker.memory import BucketTile, Elements, Layout

MEASURED_ELEMENTS = 2**17  # of a large model, about

Values = npt.NDArray[Any]
Hashes = npt.NDArray[np.uint64]


def join_buckets(buffers: Sequence[Tensor]) -> Values:
    """Join the values of all buckets, on the host: shape [elements]."""
    arrays = [np.empty(0, np.float32)]
    for buffer in buffers:
        arrays.append(buffer.cpu().numpy())
    return np.concatenate(arrays)


class Subset(Elements):
    """The measured elements: all elements of a small model, and about `MEASURED_ELEMENTS` of a
    larger one.

    One of every k neighbouring elements is drawn, the same in every run. Small tensors get a
    smaller k, up to an even share of the subset: few elements, such as gains of normalization, may
    be as large as many others, or move as far.
    """

    def __init__(self, layout: Layout, measured: Collection[str]) -> None:
        self.sizes = _count_elements(layout, measured)  # of the tensors with elements
        total = sum(self.sizes.values())
        largest_stride = -(-total // MEASURED_ELEMENTS)
        tensors = max(1, len(self.sizes))
        even_share = max(1, MEASURED_ELEMENTS // tensors)
        counts = list[int]()
        positions = list[Values]()
        for bucket in layout:
            in_bucket = [np.empty(0, np.int64)]
            for name in filter(self.sizes.get, bucket.places):
                size = self.sizes[name]
                stride = min(largest_stride, size // even_share)
                indices = _draw(name, size, stride)
                counts.append(len(indices))
                place = bucket.places[name]
                in_bucket.append(place.positions(indices))
            positions.append(np.concatenate(in_bucket))
        super().__init__(layout, positions)
        # of each tensor's elements in the subset
        edges = [0, *accumulate(counts)]
        self.edges = np.array(edges, np.int64)
        # the number of elements that each one in the subset represents
        sizes = [*self.sizes.values()]
        self.scales = np.array(sizes, float) / np.array(counts, float)

    def sums(
        self,
        values: Values,
        others: Values | None = None,
    ) -> FloatArray:
        """Compute the squared norm of each tensor, or its squared distance from `others`: shape
        [tensors]."""
        begins = self.edges[:-1]
        with np.errstate(over="ignore", invalid="ignore"):
            if others is not None:
                values = values - others
            squares = np.square(values, dtype=np.float64)
            sums = np.add.reduceat(squares, begins)
            return np.asarray(self.scales * sums)


def _count_elements(
    layout: Layout,
    names: Collection[str],
) -> dict[str, int]:
    """Count the elements of these tensors, without the empty ones."""
    sizes = {}
    for bucket in layout:
        for name, place in bucket.places.items():
            size = place.end - place.begin
            if size and name in names:
                sizes[name] = size
    return sizes


def make_measurements(
    squares: FloatArray,
    rounding: FloatArray | float = 0.0,
) -> Measurements | None:
    """Make the measurements of an average from the squared norms and rounding errors of its
    tensors; None if the norm is not finite."""
    norm = float(squares.sum())
    if not math.isfinite(norm):
        return None
    return Measurements(norm, float(np.sum(rounding)))


def _hash(numbers: Hashes) -> Hashes:
    """Hash each number (splitmix64) to a pseudo-random one, the same in every run."""
    with np.errstate(over="ignore"):
        numbers = numbers * np.uint64(0x9E3779B97F4A7C15)
        numbers ^= numbers >> np.uint64(30)
        numbers *= np.uint64(0xBF58476D1CE4E5B9)
        numbers ^= numbers >> np.uint64(27)
        numbers *= np.uint64(0x94D049BB133111EB)
        numbers ^= numbers >> np.uint64(31)
    return numbers


def _draw(name: str, size: int, stride: int) -> Values:
    """Draw one of every `stride` neighbouring elements of a tensor; return their row-major
    indices."""
    if stride <= 1:
        return np.arange(size, dtype=np.int64)
    indices = np.arange(0, size, stride, dtype=np.int64)
    encoded = name.encode(errors="replace")
    seed = np.uint64(xxhash.xxh3_64_intdigest(encoded))
    hashes = _hash(indices.view(np.uint64) + seed)
    offsets = hashes % np.uint64(stride)
    indices += offsets.view(np.int64)
    return np.asarray(indices[indices < size])


# --- the path of the weights

NUMBERS = 64  # D, of a projection: the relative error of squared lengths is about sqrt(2 / D), 0.18
# columns that elements are summed into first: a prime, so that a column of a matrix is spread over
# all
ROW = 1021
_COLUMNS = np.arange(ROW, dtype=np.uint64)
# the index of the number that each column is added to: shape [ROW]
_NUMBER = (_hash(_COLUMNS) % np.uint64(NUMBERS)).astype(np.int64)

MOST_WINDOWS = 1024  # of a sketch; beyond it each two are merged
_MOST_LEFT = 768  # windows, where some are too uneven: merging 256 or more keeps it rare
_MOST_UNEVEN = 4.0
"""Ratio of the lengths of two windows' folds up to which they are merged.

A mean counts each fold alike, while a profile's mass goes by time, and a sketch takes it for even
within a window. A leap of the clock by 40,000 of 2,000 intervals that was merged with the one
before made errors 10 times as large; up to 256 intervals none changed by 2 %, so that any ratio
from 4 to 256 does."""

# windows whose numbers may still be on an accelerator: fetching them waits for the device
_PENDING = 64


class FoldWindow(NamedTuple):
    """Some folds, the last one at time `t`, none in an open window: see
    `reconstruction.Sketch`. The mean has the shape [D]."""

    t: float
    folds: float
    mean: FloatArray
    spread: float = 0.0

    def merge(self, later: FoldWindow) -> FoldWindow:
        folds = self.folds + later.folds
        share = later.folds / folds
        change = later.mean - self.mean
        squared_distance = float(change @ change)
        mean = _round(self.mean + share * change)
        spread = self.spread + share * (later.spread - self.spread)
        spread += share * (1 - share) * squared_distance
        return FoldWindow(later.t, folds, mean, spread)


def _append(windows: list[FoldWindow], window: FoldWindow) -> None:
    """Append a fold: in a new window, or in the last one while another has more and its folds are
    about as long."""
    if not windows:
        windows.append(window)
        return
    last = windows[-1]
    begin = windows[-2].t if len(windows) > 1 else 0.0
    is_partial = any(each.folds > last.folds for each in windows)
    with np.errstate(over="ignore", invalid="ignore"):
        if is_partial and _are_alike(begin, last, window, _MOST_UNEVEN):
            windows[-1] = last.merge(window)
            return
        windows.append(window)
        if len(windows) > MOST_WINDOWS:
            windows[:] = _halve(windows)


def _halve(windows: list[FoldWindow]) -> list[FoldWindow]:
    """Merge each two windows that are alike, with more and more uneven ones until few are left."""
    most_uneven = _MOST_UNEVEN
    merged = _merge(windows, most_uneven)
    while len(merged) > _MOST_LEFT:
        most_uneven *= _MOST_UNEVEN
        merged = _merge(windows, most_uneven)
    return merged


def _merge(
    windows: list[FoldWindow],
    most_uneven: float,
) -> list[FoldWindow]:
    merged = windows[:1]
    begin = 0.0  # of the last window in `merged`
    is_pair = False
    for window in windows[1:]:
        last = merged[-1]
        if not is_pair and _are_alike(begin, last, window, most_uneven):
            merged[-1] = last.merge(window)
            is_pair = True
            continue
        merged.append(window)
        begin = last.t
        is_pair = False
    return merged


def _are_alike(
    begin: float,
    first: FoldWindow,
    second: FoldWindow,
    most_uneven: float,
) -> bool:
    """Return whether the folds of two windows, the first from `begin` on, are about as long."""
    length = (first.t - begin) / first.folds
    next_length = (second.t - first.t) / second.folds
    longer = max(length, next_length)
    return longer / most_uneven <= min(length, next_length)


def _make_windows(path: PathSketch) -> list[FoldWindow]:
    sketch = path.sketch
    ends = sketch.edges[1:].tolist()
    folds = sketch.folds.tolist()
    spread = sketch.spread.tolist()
    windows = map(FoldWindow, ends, folds, sketch.means, spread)
    return [*windows]


def _path(
    projection: int,
    first_t: float,
    windows: Sequence[FoldWindow],
) -> PathSketch:
    ends, folds, means, spread = zip(*windows, strict=True)
    edges = np.array([first_t, *ends])
    sketch = Sketch(edges, np.array(folds), np.stack(means), np.array(spread))
    return PathSketch(projection, sketch)


def _identify(subset: Subset, part: int) -> int:
    """Compute a number that identifies the projection of a model, or of a part of it."""
    dtypes = []
    shapes = []
    for bucket in subset.layout:
        dtypes.append((str(bucket.wide), len(bucket.places)))
        for place in bucket.places.values():
            shapes.append(place.shape)
    names = [*subset.sizes]
    edges = subset.edges.tolist()
    identity = repr((part, shapes, dtypes, names, edges))
    digest = xxhash.xxh3_64_intdigest(identity.encode())
    return digest >> 1


def _signed_roots(subset: Subset, part: int) -> Values:
    """Compute the factor of each element: the root of the number of elements that it represents,
    with a random sign, the same in every run, and another one for each part."""
    counts = np.diff(subset.edges)
    roots = np.repeat(np.sqrt(subset.scales), counts)
    first = np.uint64(part) << np.uint64(40)
    numbers = np.arange(subset.edges[-1], dtype=np.uint64)
    hashes = _hash(~(numbers + first))
    is_positive = hashes >> np.uint64(63)
    signs = np.where(is_positive, np.float32(1), np.float32(-1))
    return np.asarray(roots * signs)


class _Projection(NamedTuple):
    """A projection that may still be on an accelerator: of the values at time `t`, or of a mean."""

    t: float
    share: float  # in the mean of the open window
    ends: bool  # the open window
    sums: list[Tensor]


class Sketcher:
    """Projects the weights' means over windows, one window at a time; any thread of a pool may take
    in tiles."""

    def __init__(self, subset: Subset, part: int = 0) -> None:
        """Begin the path of a model, or of the part of this number; the signs of parts are
        independent."""
        self.subset = subset
        self._projection = _identify(subset, part)
        self._values = subset.buffers()
        self._views = subset.views(self._values)
        self._factors = list[Tensor]()  # of the elements, by bucket
        factors = torch.from_numpy(_signed_roots(subset, part))
        begin = 0
        for buffer in self._values:
            end = begin + len(buffer)
            self._factors.append(factors[begin:end].to(buffer))
            begin = end
        self._pending = list[_Projection]()
        self._begin = 0.0  # the time at which the open window begins
        self._t = 0.0  # the time of the last value in it
        self._first_t: float | None = None
        self._windows: list[FoldWindow] = []  # that have ended
        self._open: FloatArray | None = None  # the open window's mean, without pending values

    @property
    def nbytes(self) -> int:
        tensors = self._values + self._factors
        return sum(tensor.nbytes for tensor in tensors)

    def resume(self, path: PathSketch) -> bool:
        """Continue a path, and return True, if it is a path of the same projection."""
        if path.projection != self._projection:
            return False
        windows = _make_windows(path)
        first_t = float(path.sketch.edges[0])
        self._t = windows[-1].t
        if not windows[-1].folds:
            self._open = windows.pop().mean
        self._begin = first_t
        if windows:
            self._begin = windows[-1].t
        self._first_t = first_t
        self._windows = windows
        return True

    def take(self, tile: BucketTile, values: Tensor) -> None:
        self.subset.take(tile, values, self._views)

    def end_value(
        self,
        gammas: Sequence[float],
        t: float,
        is_last: bool,
    ) -> None:
        """Add the values at time `t`, whose tiles have been taken in, to a window, and end it if
        due or `is_last`."""
        own_mass = new_value_share(gammas[0], self._t, t)
        mass = new_value_share(gammas[0], self._begin, t)
        ends = is_last or sketched_window_ends(gammas, self._begin, self._t, t)
        self.end(t, own_mass / mass, ends)

    def end(
        self,
        t: float,
        share: float,
        ends: bool,
    ) -> None:
        """Add what was taken in to the open window, with a share in its mean, and end it or not."""
        self._t = t
        if ends:
            self._begin = t
        sums = self._project()
        self._pending.append(_Projection(t, share, ends, sums))
        if len(self._pending) >= _PENDING:
            self._fetch()

    def path(self, t: float | None = None) -> PathSketch | None:
        """Return the path so far. An open window is its last one, of no folds, or is closed by the
        tiles taken in at `t`."""
        self._fetch()
        windows = [*self._windows]
        if t is not None:
            mean = _numbers(self._project())
            _append(windows, FoldWindow(t, 1.0, mean))
        elif self._open is not None and windows:
            windows.append(FoldWindow(self._t, 0.0, self._open))
        if not windows:
            return None
        first_t = self._first_t
        if first_t is None:
            first_t = windows[0].t
        return _path(self._projection, first_t, windows)

    def _fetch(self) -> None:
        for pending in self._pending:
            mean = _numbers(pending.sums)
            if self._open is not None:
                change = mean - self._open
                mean = _round(self._open + pending.share * change)
            if not pending.ends:
                self._open = mean
                continue
            self._open = None
            if self._first_t is None:
                self._first_t = pending.t
            _append(self._windows, FoldWindow(pending.t, 1.0, mean))
        self._pending.clear()

    def _project(self) -> list[Tensor]:
        """Sum each column, for each bucket: in float64, or in float32 on Apple's GPUs, which lack
        float64."""
        sums = []
        for values, factors in zip(self._values, self._factors, strict=True):
            signed = values * factors
            end = len(values) - len(values) % ROW  # of the complete rows
            rest = signed[end:]
            exact = torch.float64
            if values.device.type == "mps":
                exact = torch.float32
            table = signed[:end].view(-1, ROW)
            total = table.sum(dim=0, dtype=exact)
            total[: len(rest)] += rest
            sums.append(total)
        return sums


def close_window(path: PathSketch) -> PathSketch:
    """Close the open window of a path at its last value."""
    windows = _make_windows(path)
    if windows[-1].folds:
        return path
    last = windows.pop()
    _append(windows, last._replace(folds=1.0))
    first_t = float(path.sketch.edges[0])
    return _path(path.projection, first_t, windows)


def _numbers(sums: list[Tensor]) -> FloatArray:
    """Compute the numbers of a projection from the sums of columns: shape [D]."""
    row = np.zeros(ROW)
    for of_bucket in sums:
        row += of_bucket.cpu().numpy()
    numbers = np.bincount(_NUMBER, row, NUMBERS)
    return _round(numbers.astype(np.float64))


def _round(numbers: FloatArray) -> FloatArray:
    """Round numbers to float32, as states hold them."""
    with np.errstate(over="ignore", invalid="ignore"):  # numbers that overflow are never written
        rounded = numbers.astype(np.float32)
    return rounded.astype(np.float64)
