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
from posthoc_cli.reconstruction.measurements import Distance, Measurements
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
    """A distance from snapshot `i` to `j`; that of the stored copies differs from it by `rounding` at most."""

    i: int
    j: int
    distance: Distance
    rounding: float


@dataclass(frozen=True)
class _Group:
    """The measurements taken at one time, by snapshot, and their distances to each other and to earlier snapshots."""

    own: dict[int, Measurements]
    pairs: list[_Pair]

    @property
    def files(self) -> list[int]:
        return sorted({*self.own, *(pair.j for pair in self.pairs)})


def deep_bytes(snapshots: Sequence[Snapshot]) -> int:
    """The number of bytes that `compare_measurements` reads."""
    read = (snapshots[index] for group in _groups(snapshots) for index in group.files)
    return sum(snapshot.header.tensors[name].nbytes for snapshot in read for name in snapshot.info.averages)


def compare_measurements(
    snapshots: Sequence[Snapshot], progress: Progress = lambda _: None
) -> tuple[dict[Path, str], list[str]]:
    """Find values that differ from what was measured.

    Returns the snapshots with another norm, each with the reason, and a line for each pair of other snapshots with
    another distance: either of the two may be wrong. `progress` gets numbers of bytes that were read.
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
            if wrong := _differs(squared, own.norm, sqrt(own.rounding), off, off):
                norms[snapshots[i].path] = f"its norm is {wrong}"
        for pair, squared in zip(group.pairs, squares[len(group.own) :], strict=True):
            if wrong := _differs(squared, pair.distance.squared, pair.rounding, off, _DIFFERENCE + off):
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
    for t, group in groupby(by_time, lambda index: snapshots[index].info.t):
        own: dict[int, Measurements] = {}
        pairs: list[_Pair] = []
        for i in group:
            if (measured := snapshots[i].info.measurements) is None:
                continue
            own[i] = measured
            for distance in measured.distances:
                j = places.get((distance.t, distance.sigma_rel))
                if j is None or snapshots[j].info.segment != snapshots[i].info.segment:
                    continue
                roundings = [measured] if distance.t < t else [measured, snapshots[j].info.measurements]
                known = [sqrt(measurements.rounding) for measurements in roundings if measurements is not None]
                if len(known) == len(roundings):  # else the distance says nothing about the stored copies
                    pairs.append(_Pair(i, j, distance, sum(known)))
        if own:
            yield _Group(own, pairs)


def _squares(group: _Group, snapshots: Sequence[Snapshot], progress: Progress) -> tuple[list[float], int]:
    """Squared norms of the group's snapshots, then its squared distances, and the number of elements summed."""
    totals, count = np.zeros(len(group.own) + len(group.pairs)), 0
    with ExitStack() as stack, worker_threads() as pool:
        read = {i: stack.enter_context(TensorFile(snapshots[i].path, snapshots[i].header)) for i in group.files}

        def sums(tile: tuple[str, int, int]) -> tuple[FloatArray, int, int]:
            loaded = {index: _read(file, *tile) for index, file in read.items()}
            with np.errstate(over="ignore"):  # the difference of finite values may be infinite
                vectors = [loaded[i][0] for i in group.own]
                vectors += [loaded[pair.i][0] - loaded[pair.j][0] for pair in group.pairs]
                squares = np.array([np.einsum("i,i->", vector, vector) for vector in vectors])
            return squares, tile[2] - tile[1], sum(nbytes for _, nbytes in loaded.values())

        for partial, elements, nbytes in in_order(pool, sums, _tiles(snapshots[min(group.own)])):
            totals += partial
            count += elements
            progress(nbytes)
    return totals.tolist(), count


def _tiles(snapshot: Snapshot) -> Iterator[tuple[str, int, int]]:
    """Element ranges of all averages."""
    for name in snapshot.info.averages:
        entry = snapshot.header.tensors[name]
        count = entry.nbytes // fmt.ITEM_BYTES[entry.dtype]
        yield from ((name, begin, min(begin + TILE, count)) for begin in range(0, count, TILE))


def _read(file: TensorFile, name: str, begin: int, end: int) -> tuple[FloatArray, int]:
    dtype = file.header.tensors[name].dtype
    item = fmt.ITEM_BYTES[dtype]
    data = file.read_unverified(name, begin * item, end * item)  # verified before
    return decode_values(data, dtype), data.nbytes
