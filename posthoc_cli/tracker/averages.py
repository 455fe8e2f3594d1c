"""The running averages: state, the arithmetic of one update, and the memory that they are in.

An average over millions of updates cannot be kept in float32 alone: a change of less than half its last digit is lost,
always in the same direction. And two averages that each update reads and writes cost more time than the model itself.
So all profiles share one float32 `mean` of the values since they were last folded in (the window), and each has an
average up to then, `high` in float32 and `low`, what that rounds away, in bfloat16:

    average = high + low + m (mean - high - low),    m = 1 - (t_folded / t)^(gamma + 1)

An update changes the mean only, weighted as the profile of the largest gamma weights the window. A fold takes the
mean into each average with that one's own mass m, and is exact in the sum high + low:

    low <- low + m ((mean - high) - low),    high' = high + low,    low <- low - (high' - high)

A window ends after `WINDOW` updates, when the mean's own roundings would begin to count, or earlier, where time has
grown by a thousandth: the mean has the largest gamma's weights, those of another gamma' differ within a window of
relative length L by (gamma - gamma') L. Noise of variance w leaves ((gamma - gamma') L)^2 / 12 of its share in the
average, drift (gamma - gamma') L^2 / 12 of the path: 1.4e-6 of pure noise of 3 %. See `profiles.window_ends`; a profile
alone has its own weights, in windows of any length. The newest value goes into each profile's mean with its own share,
so that windows of one value or two are exact.

Relative L2 error against sums in float64, sigma_rel 0.05 / 0.28 (scripts/long_runs.py):

    updates, at the end           10,000             100,000            1,000,000          the largest at any time
    Adam, rate a cosine to 0      2.8e-8 / 1.1e-7    2.5e-8 / 1.4e-7    2.8e-8 / 2.8e-8    4.0e-8 / 4.5e-7
    random walk, the same         2.6e-8 / 9.3e-8    2.4e-8 / 7.5e-8    2.6e-8 / 2.7e-8    3.7e-8 / 2.1e-7
    noise of 3 %, the same        2.5e-8 / 4.4e-7    2.5e-8 / 2.2e-7    2.6e-8 / 3.4e-8    3.8e-8 / 1.3e-6
    pure noise of 3 %             2.6e-8 / 1.1e-6    2.6e-8 / 3.0e-7    2.6e-8 / 3.4e-8    3.7e-8 / 1.3e-6

Reading rounds to float32, which is 2.3e-8 of this.

Averages of float64 parameters are float64, and take in every value at once; their mean is for `sketcher` only.

Tensors of one device and dtype form a group and lie end to end in one flat buffer. A block is a range of such a buffer
that stays in the cache while it is worked on: thousands of small tensors cost no more calls than a few large ones.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.profiles import gamma_from_sigma_rel, new_value_share, window_ends
from posthoc_cli.snapshots.format import Path
from posthoc_cli.snapshots.reading import ElementRange
from posthoc_cli.tracker.worker import ALONE, Crew

HOST = torch.device("cpu")

CPU_BLOCK, DEVICE_BLOCK = 524_288, 2**24
"""Elements of a block on the CPU, which one thread works on, and on an accelerator, where starting a kernel costs more
than leaving the cache."""

FOLD_BLOCK, FOLD_DEVICE_BLOCK = 262_144, 2**22  # the same for folds, of which each has six buffers in the cache
_LIKE_FLOAT32 = (torch.float32, torch.float64, torch.bfloat16)  # whose sums of ordinary values stay finite


@dataclass(frozen=True)
class Standing:
    """All of running averages but tensors, at the last update.

    Attributes:
        t_first, max_interval: time of the first update, and the longest time between two so far.
        updates, window: their number, None where unknown, and that of those since the last fold.
        folded_t: time of the last fold.
        inherited: expected squared norms of the errors left from the rounded snapshots that it was resumed from.
    """

    t: float = 0.0
    step: int = 0
    t_first: float = 0.0
    max_interval: float = 0.0
    updates: int | None = 0
    window: int = 0
    folded_t: float = 0.0
    inherited: tuple[float, ...] = ()

    def after(self, shares: Sequence[float], t: float, step: int) -> Standing:
        """The standing after an update in which the new values have these shares."""
        return replace(
            self,
            t=t,
            step=step,
            t_first=self.t_first or t,
            max_interval=max(self.max_interval, t - self.t) if self.t else 0.0,
            updates=None if self.updates is None else self.updates + 1,
            window=self.window + 1,
            inherited=tuple(error * (1 - share) ** 2 for error, share in zip(self.inherited, shares, strict=True)),
        )

    def masses(self, gammas: Sequence[float]) -> list[float]:
        """The share that the values since the last fold have in each average."""
        return [new_value_share(gamma, self.folded_t, self.t) if self.window else 0.0 for gamma in gammas]


class Accumulators:
    """What averages of the same tensors are kept in: the mean of the last values, and two parts for each profile.

    `low` has float32 averages only.
    """

    def __init__(self, layout: Layout, profiles: int) -> None:
        self.layout = layout
        wide = [group.wide for group in layout]
        short = [None if dtype == torch.float64 else torch.bfloat16 for dtype in wide]
        self.mean = FlatTensors(layout, wide)
        self.high = tuple(FlatTensors(layout, wide) for _ in range(profiles))
        self.low = tuple(FlatTensors(layout, short) for _ in range(profiles))

    @property
    def parts(self) -> tuple[FlatTensors, ...]:
        """All buffers."""
        return (self.mean, *self.high, *self.low)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(flat.nbytes for part in self.parts for flat in part.flats)

    def fits(self, others: Accumulators | None) -> bool:
        """Whether this is room on the host for others."""
        return others is not None and self.layout == on_host(others.layout) and len(self.high) == len(others.high)

    def moved(self, layout: Layout) -> Accumulators:
        """The same in another layout, by name."""
        made = Accumulators(layout, len(self.high))
        for own, other in zip(made.parts, self.parts, strict=True):
            for name, view in own.views.items():
                view.copy_(other.views[name])
        return made


class PathRecorder(Protocol):
    """What has the path of the weights: `tracker.sketching.Sketcher`, see there."""

    @property
    def subset(self) -> object:
        """The elements that it takes."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""

    def take(self, block: Range, mean: torch.Tensor) -> None:
        """Take in a block of a window's mean."""

    def end_window(self, t: float) -> None:
        """All blocks of a window have been taken in."""

    def path(self, t: float | None = None) -> Path | None:
        """The path so far, with `t` as if a window ended then."""


@dataclass
class RunningAverages:
    """Averages of the same tensors with several profiles. One thread at a time may work on them.

    There are no accumulators before the first update. A copy is as its tensor was at the last, never changed in place.
    `sample` is of the model's values then, where known. In each fold, `sketcher` gets each block of the window's mean,
    as the first profile weights it, or of two values both: of weights that alternate the mean tells nothing.
    `known_path` is what it goes on from, or of a reading what it gave.
    """

    sigma_rels: tuple[float, ...]
    standing: Standing
    accumulators: Accumulators | None = None
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sample: Sample = ()
    sketcher: PathRecorder | None = None
    known_path: Path | None = None

    def __post_init__(self) -> None:
        self.gammas = tuple(gamma_from_sigma_rel(sigma_rel) for sigma_rel in self.sigma_rels)
        self._scratch: dict[tuple[int, torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def none_yet(cls, sigma_rels: Sequence[float]) -> RunningAverages:
        """Those before the first update."""
        return cls(tuple(sigma_rels), Standing(inherited=(0.0,) * len(sigma_rels)))

    @property
    def exist(self) -> bool:
        """Whether there was an update yet."""
        return self.standing.t > 0

    @torch.no_grad()
    def update_(
        self, values: BlockReader, copies: Mapping[str, torch.Tensor], t: float, step: int, crew: Crew = ALONE
    ) -> None:
        """Take in the model's values at time `t`: averages <- averages + (1 - beta) (values - averages).

        The averages move to the layout of `values` if it has changed; `copies` are kept as they are given.
        """
        kept = self.accumulators
        if kept is None:
            kept = Accumulators(values.layout, len(self.gammas))
        elif kept.layout != values.layout:
            kept = kept.moved(values.layout)
        self.accumulators = kept
        for group in values.layout:  # before anything is changed: memory may be short
            for thread in range(crew.size):
                self._scratch_of(group, thread, group.fold_block)
        before = self.standing
        shares = [new_value_share(gamma, before.t, t) for gamma in self.gammas]
        after = before.after(shares, t, step)
        masses = after.masses(self.gammas)
        factors = [share / mass for share, mass in zip(shares, masses, strict=True)]
        folds = window_ends(self.gammas, after.window, before.folded_t, t)

        def work(block: Block, thread: int) -> None:
            own, mean = values.values(block, thread), kept.mean.flats[block.group][block.where]
            if own.dtype == torch.float64:
                for high, share in zip(kept.high, shares, strict=True):
                    average = high.flats[block.group][block.where]
                    torch.lerp(average, own, share, out=average)
            if after.window > 1 and not folds:
                torch.lerp(mean, own, factors[0], out=mean)
            elif not folds:
                mean.copy_(own)
            else:
                for part in block.cut(values.layout[block.group].fold_block):
                    newest = own[part.begin - block.begin : part.end - block.begin]
                    self._fold(kept, part, newest, after.window, factors, masses, thread)

        if folds and self.sketcher is not None and after.window == 2:
            self._sketch_mean(self.sketcher, crew)
            self.sketcher.end_window(before.t)
        crew.each(work, values.blocks)
        if folds and self.sketcher is not None:
            self.sketcher.end_window(t)
        self.copies = copies
        self.standing = replace(after, window=0, folded_t=t) if folds else after

    def _fold(
        self,
        kept: Accumulators,
        block: Range,
        newest: torch.Tensor,
        window: int,
        shares: Sequence[float],
        masses: Sequence[float],
        thread: int,
    ) -> None:
        """Take in a block of the mean, in which the newest of `window` values has these shares."""
        at, where = block.group, block.where
        scratch, mean = self._scratch_of(kept.layout[at], thread, newest.numel()), kept.mean.flats[at][where]
        for profile, (share, mass) in enumerate(zip(shares, masses, strict=True)):
            low, rest = scratch
            taken = newest if window == 1 else torch.lerp(mean, newest, share, out=rest)
            if profile == 0 and self.sketcher is not None:
                self.sketcher.take(block, newest if window == 2 else taken)
            if taken.dtype == torch.float64:
                return  # these averages have it already
            high = kept.high[profile].flats[at][where]
            stored = kept.low[profile].flats[at][where]
            torch.sub(taken, high, out=rest)
            torch.lerp(low.copy_(stored), rest, mass, out=low)
            rest.copy_(high)
            high.add_(low)
            stored.copy_(low.add_(rest.sub_(high)))

    @torch.no_grad()
    def values(self, block: Range, profile: int, thread: int = 0) -> torch.Tensor:
        """A block of an average, flat: rounded once to float32, or float64 for such parameters.

        In memory of this thread, which may be written to; valid until its next call.
        """
        kept, at, where = self.accumulators, block.group, block.where
        assert kept is not None
        found, rest = self._scratch_of(kept.layout[at], thread, block.end - block.begin)
        high = kept.high[profile].flats[at][where]
        if high.dtype == torch.float64:
            return found.copy_(high)
        found.copy_(kept.low[profile].flats[at][where])
        if self.standing.window:
            torch.sub(kept.mean.flats[at][where], high, out=rest)
            torch.lerp(found, rest, self.standing.masses(self.gammas)[profile], out=found)
        return found.add_(high)

    @torch.no_grad()
    def read(self, index: int, ranges: Sequence[ElementRange], crew: Crew = ALONE) -> list[torch.Tensor]:
        """Ranges of the average of that index, rounded once, on the host."""
        kept = self.accumulators
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
            values = torch.split(self.values(block, index, thread), [room.numel() for room in rooms])
            torch._foreach_copy_(rooms, [*values])

        crew.each(work, items)
        return made

    @torch.no_grad()
    def path(self, crew: Crew = ALONE, exact: bool = False) -> Path | None:
        """The path of the weights up to the last update, values since the last fold as one window unless `exact`."""
        kept, sketcher, standing = self.accumulators, self.sketcher, self.standing
        if kept is None or sketcher is None:
            return None
        is_open = standing.window > 0 and not exact
        if is_open:
            self._sketch_mean(sketcher, crew)
        return sketcher.path(standing.t if is_open else None)

    def _sketch_mean(self, sketcher: PathRecorder, crew: Crew) -> None:
        """Have the mean of the open window taken in."""
        kept = self.accumulators
        assert kept is not None

        def work(block: Range, _: int) -> None:
            sketcher.take(block, kept.mean.flats[block.group][block.where])

        crew.each(work, blocks_of(kept.layout))

    def copy_to(self, room: Accumulators) -> None:
        """Copy all that the averages are kept in; `room` fits them."""
        kept = self.accumulators
        assert kept is not None
        for own, source in zip(room.parts, kept.parts, strict=True):
            for flat, values in zip(own.flats, source.flats, strict=True):
                flat.copy_(values, non_blocking=True)

    def _scratch_of(self, group: Group, thread: int, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two blocks of so many elements of this thread's own, in the averages' dtype."""
        key = (thread, group.device, group.wide)
        if key not in self._scratch or self._scratch[key][0].numel() < elements:
            size = max(elements, group.fold_block)
            with torch.inference_mode(False):  # else later calls could not write to it
                one, other = (torch.empty(size, dtype=group.wide, device=group.device) for _ in range(2))
            self._scratch[key] = one, other
        one, other = self._scratch[key]
        return one[:elements], other[:elements]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this holds."""
        held = sum(one.nbytes for one in (self.accumulators, self.sketcher) if one is not None)
        scratch = (tensor.nbytes for pair in self._scratch.values() for tensor in pair)
        return held + sum(scratch) + sum(copy.nbytes for copy in self.copies.values())


# --- memory: layouts, flat buffers, blocks ---


Sample = tuple[tuple[list[int], torch.Tensor], ...]
"""Elements of tensors: a few at a time, with the places that they have among all."""


class Sampler:
    """Reads elements of tensors, given by row-major index, as often as wanted. Holds views of the tensors."""

    def __init__(self, elements: Iterable[tuple[torch.Tensor, int]]) -> None:
        found: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[torch.Tensor]]] = {}
        for number, (whole, index) in enumerate(elements):
            tensor = whole.detach()
            one = tensor[tuple(int(at) for at in np.unravel_index(index, tuple(tensor.shape)))].reshape(1)
            numbers, views = found.setdefault((tensor.device, tensor.dtype), ([], []))
            numbers.append(number)
            views.append(one)
        self._found = [*found.values()]

    @torch.no_grad()
    def take(self) -> Sample:
        """A copy of them as they are now, on their devices."""
        return tuple((numbers, torch.cat(views)) for numbers, views in self._found)


def on_host_in_order(sample: Sample) -> npt.NDArray[np.float32]:
    """The values of a sample; waits until they are there."""
    values = np.empty(sum(len(numbers) for numbers, _ in sample), np.float32)
    for numbers, taken in sample:
        values[numbers] = taken.float().cpu().numpy()
    return values


@dataclass(frozen=True)
class Group:
    """Tensors of one device and dtype, end to end; `bounds` are their ends in elements, beginning with 0."""

    device: torch.device
    dtype: torch.dtype
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of averages: at a decay of 0.9999 one in half precision never moves."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def fold_block(self) -> int:
        """Elements of a block of a fold."""
        return FOLD_BLOCK if self.device.type == "cpu" else FOLD_DEVICE_BLOCK

    def views(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor's name and its place in a flat buffer."""
        for name, shape, (begin, end) in zip(self.names, self.shapes, pairwise(self.bounds), strict=True):
            yield name, flat[begin:end].view(shape)


Layout = tuple[Group, ...]


def lay_out(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Group tensors by device and dtype."""
    return group_tensors({name: (tensor.device, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})


def group_tensors(tensors: Mapping[str, tuple[torch.device, torch.dtype, tuple[int, ...]]]) -> Layout:
    """The same for tensors that are known by device, dtype and shape."""
    groups: dict[tuple[torch.device, torch.dtype], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, (device, dtype, shape) in tensors.items():
        groups[device, dtype][name] = shape
    return tuple(
        Group(*key, tuple(own), tuple(own.values()), (0, *accumulate(math.prod(shape) for shape in own.values())))
        for key, own in groups.items()
    )


def on_host(layout: Layout) -> Layout:
    """The same groups in the host's memory; those of several devices stay apart."""
    return tuple(replace(group, device=HOST) for group in layout)


class FlatTensors:
    """One flat buffer of zeros a group, in these dtypes, and the tensors in it by name.

    A group without dtype has no elements and no views.
    """

    def __init__(self, layout: Layout, dtypes: Iterable[torch.dtype | None]) -> None:
        self.flats = []
        self.views: dict[str, torch.Tensor] = {}
        for group, dtype in zip(layout, dtypes, strict=True):
            elements = 0 if dtype is None else group.bounds[-1]
            flat = torch.empty(elements, dtype=dtype, device=group.device)
            flat.zero_()  # so that the system allocates the memory now, and not at the first write
            self.flats.append(flat)
            if dtype is not None:
                self.views.update(group.views(flat))


@dataclass(frozen=True)
class Range:
    """A range of a group's flat buffer."""

    group: int
    begin: int
    end: int

    @property
    def where(self) -> slice:
        """The same as an index."""
        return slice(self.begin, self.end)

    def cut(self, size: int) -> Iterator[Range]:
        """Parts of it of at most `size` elements."""
        for begin in range(self.begin, self.end, size):
            yield Range(self.group, begin, min(begin + size, self.end))


def blocks_of(layout: Layout) -> list[Range]:
    """All of a layout's buffers, in blocks for folds and for reading averages."""
    whole = [Range(index, 0, group.bounds[-1]) for index, group in enumerate(layout)]
    return [part for one in whole for part in one.cut(layout[one.group].fold_block)]


@dataclass(frozen=True)
class Block(Range):
    """A range, and the tensors (whole or split) whose values belong there."""

    tensors: tuple[torch.Tensor, ...]

    def total(self, scratch: torch.Tensor) -> torch.Tensor:
        """The sum of the values, in which no nan and no infinity can hide; large finite values may overflow it."""
        first, *others = self.tensors
        return (first if not others and first.dtype in _LIKE_FLOAT32 else self.values(scratch)).sum()

    def values(self, scratch: torch.Tensor) -> torch.Tensor:
        """The values, flat, in the scratch's dtype; they may stand in `scratch`."""
        (first, *others), room = self.tensors, scratch[: self.end - self.begin]
        if others:
            return torch.cat(self.tensors, out=room)
        if first.dim() == 1 and first.dtype == scratch.dtype:
            return first
        room.view(first.shape).copy_(first)
        return room


class BlockReader:
    """Tensors of a layout, block by block, for so many threads at a time. Holds views of the tensors, and no copy.

    `tensors` are for each group those that hold its values, in order, on the group's device.
    """

    def __init__(self, layout: Layout, tensors: Sequence[Sequence[torch.Tensor]], threads: int = 1) -> None:
        self.layout = layout
        self.blocks = [
            Block(index, *block)
            for index, (group, own) in enumerate(zip(layout, tensors, strict=True))
            for block in _cut(own, CPU_BLOCK if group.device.type == "cpu" else DEVICE_BLOCK)
        ]
        longest = [max((b.end - b.begin for b in self.blocks if b.group == i), default=0) for i in range(len(layout))]
        self._scratch = [
            [torch.empty(size, dtype=g.wide, device=g.device) for g, size in zip(layout, longest, strict=True)]
            for _ in range(threads)
        ]

    @classmethod
    def of_tensors(cls, layout: Layout, tensors: Mapping[str, torch.Tensor], threads: int = 1) -> BlockReader:
        """A reader of tensors by name."""
        return cls(layout, [[tensors[name].detach() for name in group.names] for group in layout], threads)

    @property
    def nbytes(self) -> int:
        """Bytes of memory for values on their way."""
        return sum(room.nbytes for own in self._scratch for room in own)

    def values(self, block: Block, thread: int = 0) -> torch.Tensor:
        """A block's values, in the averages' dtype; valid until the same thread's next call."""
        return block.values(self._scratch[thread][block.group])

    def surely_finite(self, crew: Crew = ALONE) -> bool:
        """Whether no value is nan or infinite; may be false for large finite values. Waits once a group."""
        totals: dict[int, list[torch.Tensor]] = {block.group: [] for block in self.blocks}

        def add(block: Block, thread: int) -> None:
            totals[block.group].append(block.total(self._scratch[thread][block.group]))

        crew.each(add, self.blocks)
        return all(bool(torch.stack(own).isfinite().all()) for own in totals.values())


def _cut(tensors: Sequence[torch.Tensor], size: int) -> Iterator[tuple[int, int, tuple[torch.Tensor, ...]]]:
    """Blocks of at most `size` elements: begin, end, tensors. A tensor that cannot be flattened is a block alone."""
    begin = end = 0
    block: list[torch.Tensor] = []
    for tensor in tensors:
        flat = tensor.is_contiguous()
        for part in torch.split(tensor.view(-1), size) if flat else [tensor]:
            if not part.numel():
                continue
            if block and (not flat or block[-1].dim() != 1 or end - begin + part.numel() > size):
                yield begin, end, tuple(block)
                begin, block = end, []
            block.append(part)
            end += part.numel()
    if block:
        yield begin, end, tuple(block)
