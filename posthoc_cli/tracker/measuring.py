"""What is measured of averages, and the averages as they are stored.

Measurements are norms, rounding errors and distances, see `reconstruction.Measurements`. `stage` rounds averages
to their storage dtype, block by block, while they stand still, and sums norms and rounding errors in the same pass.
Distances are taken later, beside the training, from what is stored now and then: nothing else is kept of the averages.
With s what is stored of the average a, r = a - s, and e an earlier snapshot:

    |a - e|^2 = |s - e|^2 + 2 <r, s - e> + |r|^2

and likewise between the averages of one time, with the difference of two r. r and the network's values are kept of all
elements of a small model, and of about `SAMPLED` of a larger one, evenly spaced, from which the products and the
distance to the network are estimated. The standard error of a product is its factors' norms / SAMPLED^(1/2), or less,
where no few elements dominate: of a distance as small as the rounding 0.2 %, of ten times the rounding 0.02 %.

Differences of float32 values are taken in float32, their squares and sums in float64, in an order that depends on the
tensors only.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.dtypes import ITEM_BYTES, torch_dtype
from posthoc_cli.errors import FileFormatError, PostHocError
from posthoc_cli.reconstruction import Distance, Measurements
from posthoc_cli.snapshots.chunks import Box
from posthoc_cli.snapshots.directory import StoredSnapshot, read_snapshot
from posthoc_cli.snapshots.format import SnapshotInfo
from posthoc_cli.snapshots.reading import ElementRange, TensorReader, open_file
from posthoc_cli.snapshots.tensor_file import tensor_from_bytes
from posthoc_cli.tracker.averages import HOST, Group, Layout, Range, RunningAverages, on_host
from posthoc_cli.tracker.model_tensors import TrackedModel
from posthoc_cli.tracker.staging import HostTensors, chunk_bounds, elements, nonfinite_part
from posthoc_cli.tracker.worker import ALONE, Crew

log = logging.getLogger(__name__)

SAMPLED = 2**20
"""Elements whose rounding error is kept, at least; twice as many at most."""

CHUNK = 131_072
"""Elements that are compared with earlier snapshots at a time: a chunk stays in the cache."""

Read = Callable[[int, Sequence[ElementRange]], list[torch.Tensor]]
"""Gives ranges of the average of an index, flat."""


# --- what is stored


@dataclass(frozen=True)
class Piece:
    """Elements of tensors that are stored alike, end to end: a block of the averages, and where it goes in a copy.

    Attributes:
        block: in the averages.
        room, chunk, begin: group, chunk and first element of the copy.
        kept, there: places of the elements whose rounding is kept, and where among those of the group.
        tensors, sizes: numbers of the tensors, and elements of each.
        ranges: the same by name.
        sampled: numbers in the sample, and places in the piece, of the elements of a snapshot's sample that are here.
    """

    block: Range
    room: int
    chunk: int
    begin: int
    kept: slice | torch.Tensor
    there: slice
    tensors: tuple[int, ...]
    sizes: tuple[int, ...]
    ranges: tuple[ElementRange, ...]
    sampled: tuple[list[int], list[int]]


class StorageLayout:
    """How averages of a layout are stored, and the pieces that they are measured in.

    For each of its groups there is one of weights, in the storage dtype, and then for each one of running statistics,
    which are neither rounded nor measured.

    Attributes:
        rooms: the groups of a copy.
        weights: the number of elements of the measured tensors, by name.
    """

    def __init__(self, layout: Layout, tracked: TrackedModel, dtype: str | None) -> None:
        self.layout, self.tracked = layout, tracked
        self.names = [name for group in layout for name in group.names]
        self.shapes = {name: shape for group in layout for name, shape in zip(group.names, group.shapes, strict=True)}
        self.weights = {
            name: math.prod(shape) for name, shape in self.shapes.items() if tracked.tensors[name].role == "average"
        }
        hosts = on_host(layout)
        weights = [_some_of(group, self.weights, torch_dtype(dtype) if dtype else group.dtype) for group in hosts]
        others = self.shapes.keys() - self.weights.keys()
        self.rooms: Layout = (*weights, *(_some_of(group, others, group.wide) for group in hosts))
        self.places = {
            name: (room, begin)
            for room, group in enumerate(self.rooms)
            for name, begin in zip(group.names, group.bounds, strict=False)
        }
        self._strides = self._sampling()
        self.pieces = [*self._cut()]

    def dtype(self, name: str) -> torch.dtype:
        """That a tensor is to be stored in."""
        return self.rooms[self.places[name][0]].dtype

    def is_rounded(self, room: int) -> bool:
        """Whether a group loses digits when it is stored."""
        own, wide = self.rooms[room].dtype, self.layout[room % len(self.layout)].wide
        return torch.promote_types(own, wide) != own if own.itemsize > 1 else True

    def sample(self) -> list[torch.Tensor]:
        """Room for the values of the elements that are kept, one a group of weights."""
        counts = [0] * len(self.layout)
        for name in self.weights:
            counts[self.places[name][0]] += self._kept(name)
        return [torch.zeros(count, dtype=group.wide) for count, group in zip(counts, self.layout, strict=True)]

    def scale(self, name: str) -> float:
        """All elements of a tensor / those that are kept."""
        return self.weights[name] / self._kept(name)

    def sampled(self, one: ElementRange) -> tuple[slice, slice]:
        """Of a range of a tensor, which elements are kept, and where among those of its group."""
        stride, offset = self._strides[one.name]
        first = -one.begin % stride
        begin, count = offset + (one.begin + first) // stride, len(range(one.begin + first, one.end, stride))
        return slice(first, one.end - one.begin, stride), slice(begin, begin + count)

    def _kept(self, name: str) -> int:
        return -(-self.weights[name] // self._strides[name][0])

    def _sampling(self) -> dict[str, tuple[int, int]]:
        """From one element that is kept to the next, and those of the group before, by tensor.

        Elements are kept evenly over all, or a tensor's even share of `SAMPLED` where that is more of it: few elements
        of small tensors, such as the gains of normalization, may be as large as many others.
        """
        stride, share = max(1, sum(self.weights.values()) // SAMPLED), max(1, SAMPLED // max(1, len(self.weights)))
        before, found = [0] * len(self.layout), {}
        for name in (name for group in self.rooms for name in group.names if name in self.weights):
            own = max(1, min(stride, self.weights[name] // share))
            room = self.places[name][0]
            found[name] = own, before[room]
            before[room] += -(-self.weights[name] // own)
        return found

    def _kept_of(self, ranges: Sequence[ElementRange], sizes: Sequence[int]) -> tuple[slice | torch.Tensor, slice]:
        """Places of the elements that are kept of ranges that lie end to end, and where among those of the group."""
        found = [self.sampled(one) for one in ranges]
        there = slice(found[0][1].start, found[-1][1].stop)
        if len(found) == 1:
            return found[0][0], there
        starts = accumulate(sizes, initial=0)
        own = [torch.arange(o.start, o.stop, o.step) + at for (o, _), at in zip(found, starts, strict=False)]
        return torch.cat(own), there

    def _cut(self) -> Iterator[Piece]:
        bounds = [chunk_bounds(group.bounds[-1], group.dtype.itemsize) for group in self.rooms]
        numbers = {name: number for number, name in enumerate(self.names)}
        sample: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, (name, index) in enumerate(self.tracked.sampled):
            sample[name].append((number, index))

        def piece(group: int, begin: int, ranges: Sequence[ElementRange]) -> Piece:
            room, offset = self.places[ranges[0].name]
            offset += ranges[0].begin
            chunk = bisect_right(bounds[room], offset) - 1
            sizes = tuple(one.end - one.begin for one in ranges)
            here = [
                (number, at + index - one.begin)
                for one, at in zip(ranges, accumulate(sizes, initial=0), strict=False)
                for number, index in sample.get(one.name, ())
                if one.begin <= index < one.end
            ]
            kept, there = self._kept_of(ranges, sizes) if room < len(self.layout) else (slice(0), slice(0))
            return Piece(
                Range(group, begin, begin + sum(sizes)), room, chunk, offset - bounds[room][chunk], kept, there,
                tuple(numbers[one.name] for one in ranges), sizes, tuple(ranges),
                ([number for number, _ in here], [at for _, at in here]),
            )  # fmt: skip

        for index, group in enumerate(self.layout):
            first, kind, ranges = 0, (-1, -1), list[ElementRange]()
            for name, (begin, end) in zip(group.names, pairwise(group.bounds), strict=True):
                room, offset = self.places[name]
                at = begin
                while at < end:
                    chunk = bisect_right(bounds[room], offset + at - begin) - 1
                    last = min(end, at + group.fold_block, begin + bounds[room][chunk + 1] - offset)
                    if ranges and (kind != (room, chunk) or last - first > group.fold_block):
                        yield piece(index, first, ranges)
                        ranges = []
                    if not ranges:
                        first, kind = at, (room, chunk)
                    ranges.append(ElementRange(name, at - begin, last - begin))
                    at = last
            if ranges:
                yield piece(index, first, ranges)


def _some_of(group: Group, names: Mapping[str, object] | set[str], dtype: torch.dtype) -> Group:
    """Some tensors of a group, in another dtype."""
    own = {n: shape for n, shape in zip(group.names, group.shapes, strict=True) if n in names}
    bounds = (0, *accumulate(math.prod(shape) for shape in own.values()))
    return Group(group.device, dtype, tuple(own), tuple(own.values()), bounds)


@dataclass(frozen=True, eq=False)
class StagedAverages:
    """The averages of one update as they are stored, and sums of exact values; one of each a profile.

    Attributes:
        copies: the values; those of tensors that their dtype cannot hold are in `wider`.
        norms, roundings: squared norms of the averages and of their rounding errors.
        residues: rounding errors of the elements that are kept of each group of weights.
        network: the network's values of these elements, where known.
        samples: values of the elements of a snapshot's sample.
    """

    layout: StorageLayout
    copies: Sequence[HostTensors]
    wider: Sequence[dict[str, torch.Tensor]]
    norms: list[float]
    roundings: list[float]
    residues: Sequence[Sequence[torch.Tensor]]
    network: Sequence[torch.Tensor] | None
    samples: Sequence[npt.NDArray[np.float32]]

    def parts(self, index: int, name: str) -> list[torch.Tensor]:
        """A tensor as it is stored, in flat parts."""
        wider = self.wider[index]
        return [wider[name].view(-1)] if name in wider else self.copies[index].parts[name]

    def tensors(self, index: int) -> dict[str, list[torch.Tensor]]:
        """All of them, in the model's order."""
        return {name: self.parts(index, name) for name in self.layout.names}

    def nonfinite_name(self, index: int) -> str | None:
        """The first tensor that holds a nan or an infinity."""
        return nonfinite_part(self.tensors(index))

    def read(self, index: int, ranges: Sequence[ElementRange]) -> list[torch.Tensor]:
        """Ranges of it as they are stored."""
        return [elements(self.parts(index, one.name), one.begin, one.end) for one in ranges]

    def kept(self, ranges: Sequence[ElementRange], values: torch.Tensor) -> Iterator[tuple[str, slice, torch.Tensor]]:
        """Of values of ranges that lie end to end, those of elements that are kept: name, places, values."""
        for one, part in zip(ranges, torch.split(values, [one.end - one.begin for one in ranges]), strict=True):
            own, kept = self.layout.sampled(one)
            if kept.start < kept.stop:
                yield one.name, kept, part[own]

    def product(self, index: int, ranges: Sequence[ElementRange], values: torch.Tensor) -> float:
        """Estimated sum of the products of an average's rounding errors and of values of ranges."""
        return sum(
            self.layout.scale(name) * _dot(self.residues[index][self.layout.places[name][0]][kept], found)
            for name, kept, found in self.kept(ranges, values)
        )

    def correlation(self, index: int, other: int) -> float:
        """Estimated sum of the products of two averages' rounding errors."""
        total = 0.0
        for name, count in self.layout.weights.items():
            room, (_, kept) = self.layout.places[name][0], self.layout.sampled(ElementRange(name, 0, count))
            if count:
                product = _dot(self.residues[index][room][kept], self.residues[other][room][kept])
                total += self.layout.scale(name) * product
        return total

    def away(self, index: int, ranges: Sequence[ElementRange], stored: torch.Tensor) -> float:
        """Estimated squared distance of ranges, as they are `stored` and before, to the network's values."""
        if self.network is None:
            return 0.0
        total = 0.0
        for name, kept, found in self.kept(ranges, stored):
            room = self.layout.places[name][0]
            difference = found + self.residues[index][room][kept] - self.network[room][kept]
            total += self.layout.scale(name) * _dot(difference, difference)
        return total


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.dot(one.double(), other.double()))


class Scratch:
    """Vectors of threads, used again: what is allocated for every block is neither in the cache nor given back."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[object, ...], torch.Tensor] = {}

    def room(self, count: int, dtype: torch.dtype, device: torch.device, *key: object) -> torch.Tensor:
        """One of these; each key has one at a time."""
        own = (dtype, device, *key)
        if own not in self._rooms or self._rooms[own].numel() < count:
            self._rooms[own] = torch.empty(count, dtype=dtype, device=device)
        return self._rooms[own][:count]

    def like(self, values: torch.Tensor, *key: object) -> torch.Tensor:
        """One like a vector."""
        return self.room(values.numel(), values.dtype, values.device, *key)

    def joined(self, parts: Sequence[torch.Tensor], *key: object) -> torch.Tensor:
        """Vectors of one dtype end to end."""
        if len(parts) == 1:
            return parts[0]
        count = sum(part.numel() for part in parts)
        return torch.cat([*parts], out=self.room(count, parts[0].dtype, parts[0].device, *key))

    def norms(self, values: torch.Tensor, sizes: Sequence[int], *key: object) -> list[torch.Tensor]:
        """The norm of each of the vectors of these sizes that lie end to end, float64."""
        wide = values
        if values.dtype != torch.float64:
            wide = self.room(values.numel(), torch.float64, values.device, "float64", *key).copy_(values)
        return [*torch._foreach_norm(torch.split(wide, [*sizes]), 2)]

    def squared(self, values: torch.Tensor) -> float:
        """The squared norm."""
        return float(self.norms(values, (values.numel(),))[0]) ** 2


@torch.no_grad()
def stage(
    layout: StorageLayout, averages: RunningAverages, copies: Sequence[HostTensors],
    network: Mapping[str, Sequence[torch.Tensor]] | None = None, crew: Crew = ALONE,
) -> StagedAverages:  # fmt: skip
    """The averages as they are now, in `copies`, which may be pinned and not there before their stream is done.

    Arguments:
        network: the model's values then, each in parts that lie end to end, on the averages' devices.
        crew: who does it; the results do not depend on their number.
    """
    profiles = range(len(averages.sigma_rels))
    residues, kept_network = [layout.sample() for _ in profiles], layout.sample()
    sums: list[torch.Tensor | None] = [None] * len(layout.pieces)
    samples: list[list[torch.Tensor]] = [[] for _ in layout.pieces]
    scratch = Scratch()

    def work(number: int, thread: int) -> None:
        piece = layout.pieces[number]
        size, is_weights, rounds = sum(piece.sizes), piece.room < len(layout.layout), layout.is_rounded(piece.room)
        kept, there = piece.kept, piece.there
        if network is not None and is_weights:
            found = [elements(network[one.name], one.begin, one.end) for one in piece.ranges]
            kept_network[piece.room][there].copy_(scratch.joined(found, thread, "network")[kept])
        norms: list[torch.Tensor] = []
        for index in profiles:
            exact = _with_float64(averages.values(piece.block, index, thread))
            place = copies[index].chunks[piece.room][piece.chunk][piece.begin : piece.begin + size]
            if exact.device.type == "cpu":
                narrow = place.copy_(exact)
            else:
                narrow = exact.to(place.dtype)
                place.copy_(narrow, non_blocking=True)
            if not is_weights:
                continue
            norms += scratch.norms(exact, piece.sizes, thread)
            if rounds:
                spare = scratch.like(exact, thread, "error")
                error = torch.sub(exact, spare.copy_(narrow), out=spare)
                norms += scratch.norms(error, piece.sizes, thread)
                residues[index][piece.room][there].copy_(error[kept])
            if piece.sampled[1]:
                samples[number].append(exact[torch.tensor(piece.sampled[1], device=exact.device)])
        sums[number] = torch.stack(norms).square() if norms else None

    crew.each(work, range(len(layout.pieces)))
    norms = np.zeros((len(profiles), len(layout.names)))
    errors = np.zeros_like(norms)
    for piece, own_sums in zip(layout.pieces, sums, strict=True):
        if own_sums is not None:
            kinds = [norms, errors] if layout.is_rounded(piece.room) else [norms]
            squares = own_sums.cpu().numpy().reshape(len(profiles), len(kinds), -1)
            for kind, its in zip(kinds, squares.swapaxes(0, 1), strict=True):
                kind[:, piece.tensors] += its
    values = [np.zeros(len(layout.tracked.sampled), np.float32) for _ in profiles]
    for piece, taken in zip(layout.pieces, samples, strict=True):
        for array, one in zip(values, taken, strict=False):
            array[piece.sampled[0]] = one.float().cpu().numpy()
    wider: list[dict[str, torch.Tensor]] = [{} for _ in profiles]
    for index, number in product(profiles, range(len(layout.names))):
        name = layout.names[number]
        if name in layout.weights and not _is_held(norms[index, number], errors[index, number], layout.dtype(name)):
            wider[index][name], errors[index, number] = _wider(layout, averages, residues[index], index, name)
    known = None if network is None else kept_network
    sums_of = norms.sum(1).tolist(), errors.sum(1).tolist()
    return StagedAverages(layout, copies, wider, *sums_of, residues, known, values)


def _is_held(norm: float, rounding: float, dtype: torch.dtype) -> bool:
    """Whether a dtype holds a tensor with these sums.

    Rounding to nearest costs at most half a unit in the last place, eps / 2 relative; more where a value becomes
    infinite, or all are about as small as the subnormal numbers.
    """
    return math.isfinite(rounding) and rounding <= (torch.finfo(dtype).eps / 2) ** 2 * norm


def _wider(
    layout: StorageLayout, averages: RunningAverages, residues: Sequence[torch.Tensor], index: int, name: str
) -> tuple[torch.Tensor, float]:
    """A tensor of an average in float32 where that holds it, else in float64; and the squared rounding of that."""
    room = layout.places[name][0]
    group, count = layout.layout[room], layout.weights[name]
    begin = group.bounds[group.names.index(name)]
    exact = torch.empty(layout.shapes[name], dtype=group.wide)
    for first in range(0, count, group.fold_block):
        last = min(first + group.fold_block, count)
        exact.view(-1)[first:last] = averages.values(Range(room, begin + first, begin + last), index)
    stored = exact.float()
    rounding = squared(exact - stored)
    if stored.dtype == exact.dtype or not _is_held(squared(exact), rounding, stored.dtype):
        stored, rounding = exact, 0.0
    own, kept = layout.sampled(ElementRange(name, 0, count))
    residues[room][kept] = (exact - stored).view(-1)[own]
    return stored, rounding


@torch.no_grad()
def read_ranges(
    averages: RunningAverages, index: int, ranges: Sequence[ElementRange], crew: Crew = ALONE
) -> list[torch.Tensor]:
    """Ranges of the average of that index, rounded once, on the host."""
    kept = averages.accumulators
    assert kept is not None
    places = {
        name: (number, begin)
        for number, group in enumerate(kept.layout)
        for name, begin in zip(group.names, group.bounds, strict=False)
    }
    made = []
    items: list[tuple[Range, list[torch.Tensor]]] = []
    for one in ranges:
        number, begin = places[one.name]
        group = kept.layout[number]
        made.append(torch.empty(one.end - one.begin, dtype=group.wide))
        at = begin + one.begin
        for room in torch.split(made[-1], group.fold_block) if made[-1].numel() else ():
            last, rooms = items[-1] if items else (Range(-1, 0, 0), [])
            if (last.group, last.end) == (number, at) and at + room.numel() - last.begin <= group.fold_block:
                items[-1] = Range(number, last.begin, at + room.numel()), [*rooms, room]
            else:
                items.append((Range(number, at, at + room.numel()), [room]))
            at += room.numel()

    def work(item: tuple[Range, list[torch.Tensor]], thread: int) -> None:
        block, rooms = item
        values = torch.split(averages.values(block, index, thread), [room.numel() for room in rooms])
        torch._foreach_copy_(rooms, [*values])

    crew.each(work, items)
    return made


def squared(values: torch.Tensor) -> float:
    """The squared norm, float64."""
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return float(norm) ** 2


def squared_norms(averages: RunningAverages, layout: StorageLayout) -> dict[float, float]:
    """The squared norm of each average, as it would be in a snapshot, by its sigma_rel."""
    own = [piece.block for piece in layout.pieces if piece.room < len(layout.layout)]
    return {
        sigma_rel: sum(squared(averages.values(block, index)) for block in own)
        for index, sigma_rel in enumerate(averages.sigma_rels)
    }


def _with_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The same on a device that has float64: not on Apple's GPUs."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


# --- measurements


def measurements(
    infos: Sequence[SnapshotInfo], staged: StagedAverages, earlier: Sequence[StoredSnapshot]
) -> list[Measurements | None]:
    """Of averages that are to be stored; None where a value is not finite, or the squares are too large for float64.

    The `earlier` snapshots are read from disk and verified, chunk by chunk; one that is gone or damaged is left out,
    with a warning.
    """
    apart: dict[tuple[int, int], float] = defaultdict(float)
    between: dict[tuple[int, int], float] = defaultdict(float)
    networks = [0.0] * len(infos)
    scratch, roundings = Scratch(), staged.roundings
    with _EarlierFiles(earlier, _boxes(infos[0], staged.layout.shapes)) as files:
        for ranges in chunks_of(staged.layout.weights):
            others = files.read(ranges, scratch)
            own = [_joined(staged.read(index, ranges), scratch, "own", index) for index in range(len(infos))]
            for index, stored in enumerate(own):
                networks[index] += staged.away(index, ranges, stored)
                for j, other in others.items():
                    difference = torch.sub(stored, other, out=scratch.like(stored, "difference"))
                    apart[index, j] += scratch.squared(difference) + 2 * staged.product(index, ranges, difference)
                for j in range(index):
                    difference = torch.sub(stored, own[j], out=scratch.like(stored, "difference"))
                    products = staged.product(index, ranges, difference) - staged.product(j, ranges, difference)
                    between[j, index] += scratch.squared(difference) + 2 * products
        found = files.readable()
    # An estimated product may be a little too small where two have hardly moved apart.
    for index, j in apart:
        apart[index, j] = max(apart[index, j] + roundings[index], 0.0)
    for j, index in between:
        errors = roundings[index] + roundings[j] - 2 * staged.correlation(index, j)
        between[j, index] = max(between[j, index] + errors, 0.0)
    return [
        _measurements(
            infos, index, staged.norms[index], roundings[index], between, apart, found,
            None if staged.network is None else networks[index],
        )
        for index in range(len(infos))
    ]  # fmt: skip


def live_measurements(
    infos: Sequence[SnapshotInfo], read: Read, shapes: Mapping[str, tuple[int, ...]], earlier: Sequence[StoredSnapshot]
) -> list[Measurements | None]:
    """The same of averages of tensors of these shapes that are not stored, which `read` gives."""
    norms = [0.0] * len(infos)
    between: dict[tuple[int, int], float] = defaultdict(float)
    apart: dict[tuple[int, int], float] = defaultdict(float)
    scratch = Scratch()

    def squared_distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return scratch.squared(torch.sub(one, other, out=scratch.like(one, "difference")))

    with _EarlierFiles(earlier, _boxes(infos[0], shapes)) as files:
        for ranges in chunks_of({name: math.prod(shape) for name, shape in shapes.items()}):
            others = files.read(ranges, scratch)
            own = [_joined(read(index, ranges), scratch, "own", index) for index in range(len(infos))]
            for index, values in enumerate(own):
                norms[index] += scratch.squared(values)
                for j, other in others.items():
                    apart[index, j] += squared_distance(values, other)
                for j in range(index):
                    between[j, index] += squared_distance(values, own[j])
        found = files.readable()
    return [_measurements(infos, index, norms[index], 0.0, between, apart, found, None) for index in range(len(infos))]


def _joined(parts: Sequence[torch.Tensor], scratch: Scratch, *key: object) -> torch.Tensor:
    """Vectors end to end in float32, or in float64 where one needs that."""
    count = sum(part.numel() for part in parts)
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    made = scratch.room(count, wide, HOST, *key)
    for room, part in zip(torch.split(made, [part.numel() for part in parts]), parts, strict=True):
        room.copy_(part)
    return made


def _measurements(
    infos: Sequence[SnapshotInfo], index: int, norm: float, rounding: float,
    between: Mapping[tuple[int, int], float], apart: Mapping[tuple[int, int], float],
    earlier: Mapping[int, StoredSnapshot], network: float | None,
) -> Measurements | None:  # fmt: skip
    """The measurements of the average of that index, from its sums over all tensors."""
    if not math.isfinite(norm):
        return None
    found = [
        (info.t, info.sigma_rel, between.get((min(index, j), max(index, j)), 0.0), 0.0)
        for j, info in enumerate(infos)
        if j != index
    ]
    part = infos[index].part
    for j, snapshot in earlier.items():
        if snapshot.info.measurements is not None:
            # Readers add the parts'. Of a complete snapshot the first part tells it alone.
            counts = snapshot.info.part == part or part is None or part[0] == 1
            its_rounding = snapshot.info.measurements.rounding if counts else 0.0
            found.append((snapshot.t, snapshot.sigma_rel, apart.get((index, j), 0.0), its_rounding))
    # The difference of two large numbers may overflow where neither does.
    finite = tuple(Distance(*distance) for distance in found if math.isfinite(distance[2]))
    return Measurements(norm, rounding, finite, network if network is not None and math.isfinite(network) else None)


def chunks_of(counts: Mapping[str, int]) -> Iterator[list[ElementRange]]:
    """Ranges of tensors of these numbers of elements, about `CHUNK` at a time: several tensors, or a part of one."""
    ranges: list[ElementRange] = []
    size = 0
    for name, count in counts.items():
        for begin in range(0, count, CHUNK):
            end = min(begin + CHUNK, count)
            if size + end - begin > CHUNK:
                yield ranges
                ranges, size = [], 0
            ranges.append(ElementRange(name, begin, end))
            size += end - begin
    if ranges:
        yield ranges


def _boxes(info: SnapshotInfo, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Box]:
    """What is here of tensors of which others have parts."""
    return {name: chunk.box(shapes[name]) for name, chunk in info.chunks.items() if name in shapes}


class _EarlierFiles(ExitStack):
    """Snapshots that are read beside the averages, or `boxes` of their tensors, if any.

    One that cannot be read is left out, with a warning.
    """

    def __init__(self, snapshots: Sequence[StoredSnapshot], boxes: Mapping[str, Box]) -> None:
        super().__init__()
        self._snapshots, self._boxes = snapshots, boxes
        self._files: dict[int, TensorReader] = {}
        self._readers: dict[int, Any] = {}

    def __enter__(self) -> _EarlierFiles:
        for index, snapshot in enumerate(self._snapshots):
            with self._left_out_on_error(index):
                self._files[index] = file = self._opened(snapshot)
                self.callback(file.close)
        return self

    def _opened(self, snapshot: StoredSnapshot) -> TensorReader:
        if snapshot.info.part is not None or not (self._boxes or snapshot.path.is_dir()):
            file: TensorReader = open_file(snapshot.path)
            checksum = file.header.metadata.get("ema.checksum")
        else:
            found = read_snapshot(snapshot.path)
            file, checksum = found.open(self._boxes or None), found.header.metadata["ema.checksum"]
        if checksum != snapshot.checksum:
            file.close()
            raise FileFormatError(snapshot.path, "was replaced by another one")
        return file

    def readable(self) -> dict[int, StoredSnapshot]:
        """Those that have been read without an error so far, by index."""
        return {index: self._snapshots[index] for index in self._files}

    def read(self, ranges: Sequence[ElementRange], scratch: Scratch) -> dict[int, torch.Tensor]:
        """Ranges of each that is readable, end to end, by index; those of one tensor in order, from its beginning.

        A block is verified when its last bytes are read: what was read of a damaged one must not be used then.
        """
        found = {}
        for index, file in list(self._files.items()):
            with self._left_out_on_error(index):
                found[index] = _joined([self._read(index, file, one) for one in ranges], scratch, "file", index)
        return found

    def _read(self, index: int, file: TensorReader, one: ElementRange) -> torch.Tensor:
        entry = file.header.tensors[one.name]
        if one.begin == 0:
            self._readers[index] = file.read_range(one.name, 0, entry.nbytes)
        count = one.end - one.begin
        data = np.empty(count * ITEM_BYTES[entry.dtype], np.uint8)
        self._readers[index].read_into(data.data)
        return tensor_from_bytes(data, entry.dtype, (count,))

    @contextmanager
    def _left_out_on_error(self, index: int) -> Iterator[None]:
        try:
            yield
        except PostHocError as error:
            log.warning("%s; new snapshots are written without their distance to it", error)
            self._files.pop(index, None)
