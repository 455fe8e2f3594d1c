"""Measurements against values: what a snapshot says of its average must fit what is stored.

The exact average is gone, but it cannot be far from the stored copy: by the triangle inequality, with ||.|| over all
averages, R the rounding that the header names, N the squared norm and D the squared distance to another average,

    | ||stored|| - sqrt(N) |                    <=  sqrt(R)
    | ||stored_i - stored_j|| - sqrt(D_ij) |    <=  sqrt(R_i) + sqrt(R_j)    j of the same time, measured exact to exact
    | ||stored_i - stored_j|| - sqrt(D_ij) |    <=  sqrt(R_i)                j earlier, measured to the stored copy

up to the arithmetic of both sides. A sum of n squares in float64, in whatever order, is wrong by at most n units of
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
from posthoc_cli.snapshots.payload import in_order, worker_threads
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.reports import MISMEASURED, Problem
from posthoc_cli.snapshots.sharded import TensorReader, open_tensors

TILE = 2**14
"""Elements of a tensor that a thread holds at a time, of each file of one time and its partners. Few, so that they stay
in the cache, and that the allocator does not give memory back to the system after each: that was six times slower."""

_DIFFERENCE = 2.0**-23
"""Relative error of a distance, or a rounding, from differences in float32; twice what was derived."""


@dataclass(frozen=True)
class _Pair:
    """A distance that the header of snapshot `i` names, to the snapshot `j` that is there.

    `rounding` is how far the distance of the stored copies may be from it.
    """

    i: int
    j: int
    distance: Distance
    rounding: float


@dataclass(frozen=True)
class _Wrong:
    """A measurement that the values contradict: a distance of two snapshots, or the norm of one (twice the same)."""

    snapshots: tuple[Path, Path]
    detail: str


def deep_bytes(snapshots: Sequence[Snapshot]) -> int:
    """What `contradictions` reads."""
    return sum(_averaged_bytes(snapshots[index]) for group in _groups(snapshots) for index in group.files)


def contradictions(
    snapshots: Sequence[Snapshot], progress: Callable[[int], object] = lambda _: None
) -> dict[Path, Problem]:
    """Snapshots whose values are not those that were measured, by path.

    Of two whose distance is another than measured, the one is named of which more is wrong.

    Arguments:
        snapshots: whole ones that belong together, no two of one profile and time.
        progress: told the bytes that were read.

    Raises:
        FileFormatError: a file was replaced, or became shorter.
    """
    wrong: list[_Wrong] = []
    for group in _groups(snapshots):
        try:
            wrong += _wrong_in(group, snapshots, progress)
        except VanishedError:
            continue  # thinned away meanwhile
    return {path: Problem(MISMEASURED, detail) for path, detail in _blamed(wrong).items()}


# --- what to compare -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """The snapshots of one time, and what they are compared with.

    Attributes:
        own: what was measured at that time, by index.
        pairs: the distances among that.
    """

    own: dict[int, Measurements]
    pairs: tuple[_Pair, ...]

    @property
    def files(self) -> list[int]:
        """Indices of all that are read."""
        return sorted({*self.own, *(pair.j for pair in self.pairs)})


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
    """None where the distance tells nothing about the stored copies."""
    first, other = snapshots[i].info, snapshots[j].info
    roundings = [first.measurements] if other.t < first.t else [first.measurements, other.measurements]
    known = [sqrt(measurements.rounding) for measurements in roundings if measurements is not None]
    if len(known) < len(roundings) or first.segment != other.segment:
        return None
    return _Pair(i, j, distance, sum(known))


def _averages(snapshot: Snapshot) -> list[str]:
    return [name for name, tensor in snapshot.info.tensors.items() if tensor.role == "average"]


def _averaged_bytes(snapshot: Snapshot) -> int:
    return sum(snapshot.header.tensors[name].nbytes for name in _averages(snapshot))


# --- comparing -------------------------------------------------------------------------------------


def _wrong_in(group: _Group, snapshots: Sequence[Snapshot], progress: Callable[[int], object]) -> Iterator[_Wrong]:
    """What is wrong in a group. The norm of each snapshot is compared, and each distance that one names."""
    squares, count = _squares(group, snapshots, progress)
    off = (count + 16) * 2.0**-53
    for (i, own), squared in zip(group.own.items(), squares, strict=False):
        stored, said = sqrt(squared), sqrt(own.norm)
        allowed = sqrt(own.rounding) * (1 + _DIFFERENCE + off) + off * (stored + said)
        if not abs(stored - said) <= allowed < inf:
            path = snapshots[i].path
            yield _Wrong((path, path), f"its norm is {stored:.9g}, and {said:.9g} as measured")
    for pair, squared in zip(group.pairs, squares[len(group.own) :], strict=True):
        first, other = snapshots[pair.i], snapshots[pair.j]
        stored, said = sqrt(squared), sqrt(pair.distance.squared)
        allowed = pair.rounding * (1 + _DIFFERENCE + off) + (_DIFFERENCE + off) * (stored + said)
        if not abs(stored - said) <= allowed < inf:
            names = f"{first.path.name} and {other.path.name}"
            yield _Wrong(
                (first.path, other.path), f"the distance of {names} is {stored:.9g}, and {said:.9g} as measured"
            )


def _squares(
    group: _Group, snapshots: Sequence[Snapshot], progress: Callable[[int], object]
) -> tuple[list[float], int]:
    """Squared norms of the group's snapshots, then its squared distances, and the number of elements summed."""
    first = snapshots[min(group.own)]
    totals, count = np.zeros(len(group.own) + len(group.pairs)), 0
    with ExitStack() as stack:
        files = {index: stack.enter_context(open_tensors(snapshots[index])) for index in group.files}

        def sums(tile: tuple[str, int, int]) -> tuple[FloatArray, int, int]:
            read = {index: _values(file, *tile) for index, file in files.items()}
            values = {index: value for index, (value, _) in read.items()}
            return _tile_sums(group, values), tile[2] - tile[1], sum(nbytes for _, nbytes in read.values())

        with worker_threads() as pool:
            for partial, elements, nbytes in in_order(pool, sums, _tiles(first)):
                totals += partial
                count += elements
                progress(nbytes)
    return totals.tolist(), count


def _tile_sums(group: _Group, values: dict[int, FloatArray]) -> FloatArray:
    with np.errstate(over="ignore"):  # the difference of finite values may be infinite: nothing that was measured
        vectors = [values[i] for i in group.own] + [values[pair.i] - values[pair.j] for pair in group.pairs]
        return np.array([np.einsum("i,i->", vector, vector) for vector in vectors])


def _tiles(snapshot: Snapshot) -> Iterator[tuple[str, int, int]]:
    """Element ranges of all averages."""
    for name in _averages(snapshot):
        entry = snapshot.header.tensors[name]
        count = entry.nbytes // fmt.ITEM_BYTES[entry.dtype]
        for begin in range(0, count, TILE):
            yield name, begin, min(begin + TILE, count)


def _values(file: TensorReader, name: str, begin: int, end: int) -> tuple[FloatArray, int]:
    dtype = file.header.tensors[name].dtype
    item = fmt.ITEM_BYTES[dtype]
    data = file.read_unverified(name, begin * item, end * item)  # verified a moment ago
    return decode_values(data, dtype), data.nbytes


# --- who is to blame -------------------------------------------------------------------------------


def _blamed(wrong: Sequence[_Wrong]) -> dict[Path, str]:
    """Snapshots that account for all that is wrong, as few as a simple rule finds, each with the first thing.

    Who has a wrong norm is to blame for the distances as well. Of the others it is whoever has the most wrong
    distances left, the later one where two have as many: its header makes the claim.
    """
    blamed = {one.snapshots[0]: one.detail for one in reversed(wrong) if len(set(one.snapshots)) == 1}
    left = [one for one in wrong if not set(one.snapshots) & blamed.keys()]
    while left:
        counts: dict[Path, int] = {}
        for one in left:
            for path in one.snapshots:
                counts[path] = counts.get(path, 0) + 1
        guilty = max(counts, key=lambda path: counts[path])
        blamed[guilty] = next(one.detail for one in left if guilty in one.snapshots)
        left = [one for one in left if guilty not in one.snapshots]
    return blamed
