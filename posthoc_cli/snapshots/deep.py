"""Compare what headers measured with the values that are stored.

The exact average is gone, but it cannot be far from the stored copy: by the triangle inequality, with ||.|| over all
averages, R the rounding that the header names, N the squared norm and D the squared distance to another average,

    | ||stored|| - sqrt(N) |                    <=  sqrt(R)
    | ||stored_i - stored_j|| - sqrt(D_ij) |    <=  sqrt(R_i) + sqrt(R_j)    j of the same time, measured exact to exact
    | ||stored_i - stored_j|| - sqrt(D_ij) |    <=  sqrt(R_i)                j earlier, measured to the stored copy

up to the arithmetic of both sides. A sum of n squares in float64, in any order, is wrong by at most n units of
2^-53, relatively; the tracker took differences of float32 values in float32, each wrong by at most 2^-24 of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from math import inf, sqrt
from pathlib import Path

import numpy as np

from posthoc_cli.errors import VanishedError
from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction import Distance, Measurements
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.measurements import decode_values
from posthoc_cli.snapshots.reader import Snapshot, TensorFile, in_order, worker_threads

TILE = 2**14
"""Elements of a tensor that a thread holds at a time, of each file of one time and its partners. Few, so that they stay
in the cache, and that the allocator does not return memory to the system after each: that was six times slower."""

_DIFFERENCE = 2.0**-23
"""Relative error of a distance, or a rounding, from differences in float32; twice what was derived."""

Progress = Callable[[int], object]


@dataclass(frozen=True)
class _Pair:
    """A distance that the header of snapshot `i` names, to snapshot `j`.

    `rounding` is how far the distance of the stored copies may be from it.
    """

    i: int
    j: int
    distance: Distance
    rounding: float


@dataclass(frozen=True)
class _Group:
    """The measurements taken at one time.

    Attributes:
        own: those of the snapshots of that time, by index.
        pairs: their distances to each other and to earlier snapshots.
    """

    own: dict[int, Measurements]
    pairs: tuple[_Pair, ...]

    @property
    def files(self) -> list[int]:
        """Indices of all snapshots that are read."""
        return sorted({*self.own, *(pair.j for pair in self.pairs)})


def deep_bytes(snapshots: Sequence[Snapshot]) -> int:
    """The number of bytes that `compare_measurements` reads."""
    return sum(
        snapshots[index].header.tensors[name].nbytes
        for group in _groups(snapshots)
        for index in group.files
        for name in _averages(snapshots[index])
    )


def compare_measurements(
    snapshots: Sequence[Snapshot], progress: Progress = lambda _: None
) -> tuple[dict[Path, str], list[str]]:
    """Find values that differ from what was measured.

    Arguments:
        snapshots: verified ones that belong together.
        progress: called with numbers of bytes that were read.

    Returns:
        The snapshots with another norm than measured, each with the reason; and a line for each pair of other
        snapshots with another distance than measured: either of the two may be wrong.

    Raises:
        FileFormatError: a file was replaced, or became shorter.
    """
    norms: dict[Path, str] = {}
    distances: list[tuple[set[Path], str]] = []
    for group in _groups(snapshots):
        try:
            squares, count = _squares(group, snapshots, progress)
        except VanishedError:
            continue  # thinned away meanwhile
        off = (count + 16) * 2.0**-53
        for (i, own), squared in zip(group.own.items(), squares, strict=False):
            wrong = _differs(squared, own.norm, sqrt(own.rounding), off, off)
            if wrong is not None:
                norms[snapshots[i].path] = f"its norm is {wrong}"
        for pair, squared in zip(group.pairs, squares[len(group.own) :], strict=True):
            wrong = _differs(squared, pair.distance.squared, pair.rounding, off, _DIFFERENCE + off)
            if wrong is not None:
                first, other = snapshots[pair.i].path, snapshots[pair.j].path
                distances.append(({first, other}, f"the distance of {first.name} and {other.name} is {wrong}"))
    return norms, [line for paths, line in distances if not paths & norms.keys()]


def _differs(squared: float, measured: float, rounding: float, off: float, relative: float) -> str | None:
    """A stored and a measured length in words, if they differ by more than rounding and arithmetic allow."""
    stored, known = sqrt(squared), sqrt(measured)
    allowed = rounding * (1 + _DIFFERENCE + off) + relative * (stored + known)
    return None if abs(stored - known) <= allowed < inf else f"{stored:.9g}, and {known:.9g} as measured"


def _groups(snapshots: Sequence[Snapshot]) -> Iterator[_Group]:
    places = {(s.info.t, s.info.sigma_rel): index for index, s in enumerate(snapshots)}
    by_time = sorted(range(len(snapshots)), key=lambda index: snapshots[index].info.t)
    for _, group in groupby(by_time, lambda index: snapshots[index].info.t):
        measured = {index: snapshots[index].info.measurements for index in group}
        own = {index: measurements for index, measurements in measured.items() if measurements is not None}
        pairs = [
            _pair(i, j, distance, snapshots)
            for i, measurements in own.items()
            for distance in measurements.distances
            if (j := places.get((distance.t, distance.sigma_rel))) is not None
        ]
        if own:
            yield _Group(own, tuple(pair for pair in pairs if pair is not None))


def _pair(i: int, j: int, distance: Distance, snapshots: Sequence[Snapshot]) -> _Pair | None:
    """None if the distance says nothing about the stored copies."""
    first, other = snapshots[i].info, snapshots[j].info
    roundings = [first.measurements] if other.t < first.t else [first.measurements, other.measurements]
    known = [sqrt(measurements.rounding) for measurements in roundings if measurements is not None]
    if len(known) < len(roundings) or first.segment != other.segment:
        return None
    return _Pair(i, j, distance, sum(known))


def _averages(snapshot: Snapshot) -> list[str]:
    return [name for name, tensor in snapshot.info.tensors.items() if tensor.role == "average"]


def _squares(group: _Group, snapshots: Sequence[Snapshot], progress: Progress) -> tuple[list[float], int]:
    """Squared norms of the group's snapshots, then its squared distances, and the number of elements summed."""
    first = snapshots[min(group.own)]
    totals, count = np.zeros(len(group.own) + len(group.pairs)), 0
    with ExitStack() as stack:
        files = {
            index: stack.enter_context(TensorFile(snapshots[index].path, snapshots[index].header))
            for index in group.files
        }

        def sums(tile: tuple[str, int, int]) -> tuple[FloatArray, int, int]:
            read = {index: _read(file, *tile) for index, file in files.items()}
            values = {index: value for index, (value, _) in read.items()}
            return _tile_sums(group, values), tile[2] - tile[1], sum(nbytes for _, nbytes in read.values())

        with worker_threads() as pool:
            for partial, elements, nbytes in in_order(pool, sums, _tiles(first)):
                totals += partial
                count += elements
                progress(nbytes)
    return totals.tolist(), count


def _tile_sums(group: _Group, values: dict[int, FloatArray]) -> FloatArray:
    with np.errstate(over="ignore"):  # the difference of finite values may be infinite
        vectors = [values[i] for i in group.own] + [values[pair.i] - values[pair.j] for pair in group.pairs]
        return np.array([np.einsum("i,i->", vector, vector) for vector in vectors])


def _tiles(snapshot: Snapshot) -> Iterator[tuple[str, int, int]]:
    """Element ranges of all averages."""
    for name in _averages(snapshot):
        entry = snapshot.header.tensors[name]
        count = entry.nbytes // fmt.ITEM_BYTES[entry.dtype]
        for begin in range(0, count, TILE):
            yield name, begin, min(begin + TILE, count)


def _read(file: TensorFile, name: str, begin: int, end: int) -> tuple[FloatArray, int]:
    dtype = file.header.tensors[name].dtype
    item = fmt.ITEM_BYTES[dtype]
    data = file.read_unverified(name, begin * item, end * item)  # verified before
    return decode_values(data, dtype), data.nbytes
