"""Measurements of averages and of the weights' path, on a subset of the elements.

Norms and rounding errors, see `reconstruction.Measurements`, are sums over the subset in float64,
scaled to all elements: exact for small models, and for n elements of about one size within (2 /
n)^(1/2), 0.2 % for half a million.

The path of the weights is projected to a few numbers at every fold, see `reconstruction.Sketch`:
each element of the subset is multiplied by a random sign and the square root of the number of
elements that it represents, and added to one of the numbers, drawn by its column. The projection
depends on the positions of elements alone, not on tiles or devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from posthoc_cli.profiles import FloatArray, new_value_share, sketched_window_ends
from posthoc_cli.reconstruction import Measurements, Sketch
from posthoc_cli.snapshots.path import PathSketch
from posthoc_cli.tracker.memory import Elements, Layout, Tile

MEASURED_ELEMENTS = 2**19  # of a large model, about

Values = npt.NDArray[Any]


def joined(buffers: Sequence[torch.Tensor]) -> Values:
    """Return the values of all buckets, on the host: shape [elements]."""
    return np.concatenate([np.empty(0, np.float32), *(buffer.cpu().numpy() for buffer in buffers)])


class Subset(Elements):
    """The measured elements: all elements of a small model, and about `MEASURED_ELEMENTS` of a
    larger one.

    One of every k neighbouring elements is drawn, the same in every run. Small tensors get a
    smaller k, up to an even share of the subset: few elements, such as gains of normalization, may
    be as large as many others, or move as far.
    """

    def __init__(self, layout: Layout, measured: Iterable[str]) -> None:
        wanted = frozenset(measured)
        self.sizes = dict[str, int]()  # of the tensors with elements
        for bucket in layout:
            for name, place in bucket.places.items():
                if name in wanted and place.begin < place.end:
                    self.sizes[name] = place.end - place.begin
        most = -(-sum(self.sizes.values()) // MEASURED_ELEMENTS)
        share = max(1, MEASURED_ELEMENTS // max(1, len(self.sizes)))
        counts = list[int]()
        positions = list[Values]()
        for bucket in layout:
            of_bucket = [np.empty(0, np.int64)]
            for name, place in bucket.places.items():
                if name not in self.sizes:
                    continue
                size = self.sizes[name]
                indices = _draw(name, size, min(most, size // share))
                counts.append(len(indices))
                of_bucket.append(place.positions(indices))
            positions.append(np.concatenate(of_bucket))
        super().__init__(layout, positions)
        # of each tensor's elements in the subset
        self.edges = np.array([0, *accumulate(counts)], np.int64)
        self.scales = np.array([*self.sizes.values()], np.float64) / np.array(counts, np.float64)

    def sums(self, values: Values, others: Values | None = None) -> FloatArray:
        """Return the squared norm of each tensor, or its squared distance from `others`: shape
        [tensors]."""
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.square(values if others is None else values - others, dtype=np.float64)
            return np.asarray(self.scales * np.add.reduceat(squares, self.edges[:-1]))


def measured_as(squares: FloatArray, rounding: FloatArray | float = 0.0) -> Measurements | None:
    """Return the measurements of an average with these squared norms and rounding errors of its
    tensors; None if the norm is not finite."""
    norm = float(squares.sum())
    return Measurements(norm, float(np.sum(rounding))) if math.isfinite(norm) else None


def _hashed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return pseudo-random numbers, a hash of each number (splitmix64), which is the same in every
    run."""
    with np.errstate(over="ignore"):
        numbers = numbers * np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(numbers ^ (numbers >> np.uint64(31)))


def _draw(name: str, size: int, stride: int) -> Values:
    """Draw one of every `stride` neighbouring elements of a tensor; return their row-major
    indices."""
    indices = np.arange(0, size, max(1, stride), dtype=np.int64)
    if stride > 1:
        seed = np.uint64(xxhash.xxh3_64_intdigest(name.encode(errors="replace")))
        indices += (_hashed(indices.view(np.uint64) + seed) % np.uint64(stride)).view(np.int64)
    return np.asarray(indices[indices < size])


# --- the path of the weights

NUMBERS = 64  # D, of a projection: the relative error of squared lengths is about sqrt(2 / D), 0.18
# columns that elements are summed into first: a prime, so that a column of a matrix is spread over
# all
ROW = 1021
# The index of the number that each column is added to: shape [ROW].
_NUMBER = (_hashed(np.arange(ROW, dtype=np.uint64)) % np.uint64(NUMBERS)).astype(np.int64)

MOST_WINDOWS = 1024  # of a sketch; beyond it each two are merged
# windows whose numbers may still be on an accelerator: fetching them waits for the device
_PENDING = 64


class Window(NamedTuple):
    """Some folds, the last one at time `t`, none in an open window: see `reconstruction.Sketch`.
    The mean has the shape [D]."""

    t: float
    folds: float
    mean: FloatArray
    spread: float = 0.0

    def merged(self, later: Window) -> Window:
        folds = self.folds + later.folds
        share = later.folds / folds
        apart = later.mean - self.mean
        mean = _rounded(self.mean + share * apart)
        spread = self.spread + share * (later.spread - self.spread)
        return Window(later.t, folds, mean, spread + share * (1 - share) * float(apart @ apart))


def _append(windows: list[Window], window: Window) -> None:
    """Append a fold: in a new window, or in the last one while it has fewer than the others."""
    windows.append(window)
    with np.errstate(over="ignore", invalid="ignore"):
        if len(windows) > 1 and windows[-2].folds < windows[0].folds:
            windows[-2:] = [windows[-2].merged(window)]
        elif len(windows) > MOST_WINDOWS:
            pairs = zip(windows[::2], windows[1::2], strict=False)
            merged = [first.merged(second) for first, second in pairs]
            windows[:] = merged + windows[2 * len(merged) :]


def _windows_of(sketch: Sketch) -> list[Window]:
    values = zip(sketch.edges[1:], sketch.folds, sketch.means, sketch.spread, strict=True)
    return [Window(float(t), float(folds), mean, float(s)) for t, folds, mean, s in values]


def _sketch_of(first_t: float, windows: Sequence[Window]) -> Sketch:
    t, folds, means, spread = zip(*windows, strict=True)
    return Sketch(np.array([first_t, *t]), np.array(folds), np.stack(means), np.array(spread))


def _identity_of(subset: Subset, part: int) -> int:
    """Return a number that identifies the projection of a model, or of a part of it."""
    dtypes = []
    shapes = []
    for bucket in subset.layout:
        dtypes.append((str(bucket.wide), len(bucket.places)))
        shapes += [place.shape for place in bucket.places.values()]
    identity = repr((part, shapes, dtypes, [*subset.sizes], subset.edges.tolist()))
    return xxhash.xxh3_64_intdigest(identity.encode()) >> 1


def _signed_roots(subset: Subset, part: int) -> Values:
    """Return the factor of each element: a root of the number that it represents, with a random
    sign, the same in every run, and another one for each part."""
    roots = np.repeat(np.sqrt(subset.scales), np.diff(subset.edges))
    first = np.uint64(part) << np.uint64(40)
    numbers = np.arange(subset.edges[-1], dtype=np.uint64) + first
    is_positive = _hashed(~numbers) >> np.uint64(63)
    signs = np.where(is_positive, np.float32(1), np.float32(-1))
    return np.asarray(roots * signs)


class Sketcher:
    """Projects the weights' means over windows, one window at a time; any thread of a pool may take
    in tiles."""

    def __init__(self, subset: Subset, part: int = 0) -> None:
        """Begin the path of a model, or of the part of this number; the signs of parts are
        independent."""
        self.subset = subset
        self._projection = _identity_of(subset, part)
        self._values = subset.buffers()
        factors = torch.from_numpy(_signed_roots(subset, part))
        split = torch.split(factors, [*map(len, self._values)])
        pairs = zip(split, self._values, strict=True)
        self._factors = [factor.to(buffer) for factor, buffer in pairs]
        self._pending: list[tuple[float, float, bool, list[torch.Tensor]]] = []
        self._begin = self._t = 0.0  # times of the open window's begin and of the last value in it
        self._first_t: float | None = None
        self._windows: list[Window] = []  # that have ended
        self._open: FloatArray | None = None  # the open window's mean, without pending values

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._values, *self._factors))

    def resume(self, path: PathSketch) -> bool:
        """Continue a path, and return True, if it is of the same projection."""
        if path.projection != self._projection:
            return False
        self._first_t = float(path.sketch.edges[0])
        self._windows = _windows_of(path.sketch)
        self._t = self._windows[-1].t
        if not self._windows[-1].folds:
            self._open = self._windows.pop().mean
        self._begin = self._windows[-1].t if self._windows else self._first_t
        return True

    def take(self, tile: Tile, values: torch.Tensor) -> None:
        self.subset.take(tile, values, self._values)

    def end_value(self, gammas: Sequence[float], t: float, is_last: bool) -> None:
        """Add the values at time `t`, whose tiles have been taken in, to a window, and end it if
        due or `is_last`."""
        begin = self._begin
        before = self._t
        share = new_value_share(gammas[0], before, t) / new_value_share(gammas[0], begin, t)
        self.end_window(t, share, is_last or sketched_window_ends(gammas, begin, before, t))

    def end_window(self, t: float, share: float = 1.0, ends: bool = True) -> None:
        """End a window at time `t`, all tiles of whose mean, or of a value with a share in it, have
        been taken in."""
        self._t = t
        self._begin = t if ends else self._begin
        self._pending.append((t, share, ends, self._project()))
        if len(self._pending) >= _PENDING:
            self._fetch()

    def path(self, t: float | None = None) -> PathSketch | None:
        """Return the path so far, an open window as a last one of no folds, or closed by the tiles
        taken in at `t`."""
        self._fetch()
        windows = [*self._windows]
        if t is not None:
            _append(windows, Window(t, 1.0, _numbers(self._project())))
        elif self._open is not None and windows:
            windows.append(Window(self._t, 0.0, self._open))
        if not windows:
            return None
        first_t = windows[0].t if self._first_t is None else self._first_t
        return PathSketch(self._projection, _sketch_of(first_t, windows))

    def _fetch(self) -> None:
        for t, share, ends, sums in self._pending:
            mean = _numbers(sums)
            if self._open is not None:
                mean = _rounded(self._open + share * (mean - self._open))
            self._open = None if ends else mean
            if ends:
                self._first_t = t if self._first_t is None else self._first_t
                _append(self._windows, Window(t, 1.0, mean))
        self._pending.clear()

    def _project(self) -> list[torch.Tensor]:
        """Return the sum of each column, for each bucket: float64, or float32 on Apple's GPUs,
        which lack float64."""
        sums = []
        for values, factors in zip(self._values, self._factors, strict=True):
            signed = values * factors
            full = len(values) // ROW * ROW
            exact = torch.float32 if values.device.type == "mps" else torch.float64
            total = signed[:full].view(full // ROW, ROW).sum(dim=0, dtype=exact)
            total[: len(signed) - full] += signed[full:]
            sums.append(total)
        return sums


def closed(path: PathSketch) -> PathSketch:
    """Return the path with an open window closed at its last value."""
    windows = _windows_of(path.sketch)
    if windows[-1].folds:
        return path
    _append(windows, windows.pop()._replace(folds=1.0))
    return path._replace(sketch=_sketch_of(float(path.sketch.edges[0]), windows))


def _numbers(sums: list[torch.Tensor]) -> FloatArray:
    """Return the numbers of a projection from the sums of columns: shape [D]."""
    row = sum((bucket.cpu().numpy().astype(np.float64) for bucket in sums), np.zeros(ROW))
    return _rounded(np.bincount(_NUMBER, row, NUMBERS).astype(np.float64))


def _rounded(numbers: FloatArray) -> FloatArray:
    """Round numbers to float32, as states hold them."""
    with np.errstate(over="ignore", invalid="ignore"):  # numbers that overflow are never written
        return numbers.astype(np.float32).astype(np.float64)
