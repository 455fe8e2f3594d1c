"""The running averages: state, the arithmetic of one update, and the memory that they are in.

An average over millions of updates cannot be kept in float32 alone: a change of less than half its last digit is lost,
always in the same direction. So it is kept in two terms, a `total` in float64 and the mean of the `recent` values since
the total was last changed, which has the share `mass` of the average:

    average = total + mass (recent - total)

An update with share s of the new value v changes the recent mean only, at the cost of a plain average:

    mass <- mass + s (1 - mass),    recent <- recent + (s / mass) (v - recent)

At every `WINDOW`th update the average becomes the new total, and the next mean begins with the next value. Each value
ends with the weight that a plain average would give it.

Tensors of one device and dtype form a group and lie end to end in one flat buffer. A block is a range of such a buffer
that stays in the cache while every profile takes it in: the model is read from memory once for all profiles, and
thousands of small tensors cost no more calls than a few large ones.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.profiles import gamma_from_sigma_rel, new_value_share
from posthoc_cli.reconstruction import WINDOW
from posthoc_cli.tracker.worker import ALONE, Crew

HOST = torch.device("cpu")

CPU_BLOCK, DEVICE_BLOCK = 524_288, 2**24
"""Elements of a block on the CPU, which one thread works on, and on an accelerator, where starting a kernel costs more
than leaving the cache."""

EXACT_BLOCK, EXACT_DEVICE_BLOCK = 131_072, 2**22  # the same for float64 arithmetic, which needs scratch memory
_LIKE_FLOAT32 = (torch.float32, torch.float64, torch.bfloat16)  # whose sums of ordinary values stay finite


@dataclass(frozen=True)
class Standing:
    """All of running averages but tensors, at the last update.

    Attributes:
        t_first, max_interval: time of the first update, and the longest time between two so far.
        updates, window: their number, None where unknown, and that of those in the recent means.
        masses: of the recent means, one a profile.
        inherited: expected squared norms of the errors left from the rounded snapshots that it was resumed from.
    """

    t: float = 0.0
    step: int = 0
    t_first: float = 0.0
    max_interval: float = 0.0
    updates: int | None = 0
    window: int = 0
    masses: tuple[float, ...] = ()
    inherited: tuple[float, ...] = ()

    def after(self, shares: Sequence[float], t: float, step: int) -> Standing:
        """The standing after an update in which the new values have these shares."""
        return Standing(
            t=t,
            step=step,
            t_first=self.t_first or t,
            max_interval=max(self.max_interval, t - self.t) if self.t else 0.0,
            updates=None if self.updates is None else self.updates + 1,
            window=self.window + 1,
            masses=tuple(mass + share * (1 - mass) for mass, share in zip(self.masses, shares, strict=True)),
            inherited=tuple(error * (1 - share) ** 2 for error, share in zip(self.inherited, shares, strict=True)),
        )


class Accumulators:
    """What averages are kept in: a total and a recent mean of the same tensors for each profile."""

    def __init__(self, layout: Layout, profiles: int) -> None:
        self.layout = layout
        wide, totals = [group.wide for group in layout], [group.exact for group in layout]
        self.totals = tuple(FlatTensors(layout, totals) for _ in range(profiles))
        self.recent = tuple(FlatTensors(layout, wide) for _ in range(profiles))

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(flat.nbytes for own in (*self.totals, *self.recent) for flat in own.flats)

    def fits(self, others: Accumulators | None) -> bool:
        """Whether this is room on the host for others."""
        return others is not None and self.layout == on_host(others.layout) and len(self.recent) == len(others.recent)

    def moved(self, layout: Layout) -> Accumulators:
        """The same in another layout, by name."""
        made = Accumulators(layout, len(self.recent))
        for own, other in zip((*made.totals, *made.recent), (*self.totals, *self.recent), strict=True):
            for name, view in own.views.items():
                view.copy_(other.views[name])
        return made


@dataclass
class RunningAverages:
    """Averages of the same tensors with several profiles. One thread at a time may work on them.

    There are no accumulators before the first update. A copy is as its tensor was at the last, never changed in place.
    `sample` is of the model's values then, where known.
    """

    sigma_rels: tuple[float, ...]
    standing: Standing
    accumulators: Accumulators | None = None
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sample: Sample = ()

    def __post_init__(self) -> None:
        self.gammas = tuple(gamma_from_sigma_rel(sigma_rel) for sigma_rel in self.sigma_rels)
        self._scratch: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}

    @classmethod
    def none_yet(cls, sigma_rels: Sequence[float]) -> RunningAverages:
        """Those before the first update."""
        zeros = (0.0,) * len(sigma_rels)
        return cls(tuple(sigma_rels), Standing(masses=zeros, inherited=zeros))

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
        self._make_scratch(values.layout, crew.size)
        before = self.standing
        shares = [new_value_share(gamma, before.t, t) for gamma in self.gammas]
        after = before.after(shares, t, step)
        factors = [share / mass for share, mass in zip(shares, after.masses, strict=True)]
        closes = after.window >= WINDOW

        def work(block: Block, thread: int) -> None:
            own, where = values.values(block, thread), slice(block.begin, block.end)
            for total, recent, factor, mass in zip(kept.totals, kept.recent, factors, after.masses, strict=True):
                mean = recent.flats[block.group][where]
                if before.window == 0:
                    mean.copy_(own)
                else:
                    torch.lerp(mean, own, factor, out=mean)
                if closes:
                    group, sums = values.layout[block.group], total.flats[block.group][where]
                    parts = (torch.split(flat, group.exact_block) for flat in (sums, mean))
                    for part, its_mean in zip(*parts, strict=True):  # the averages become the new totals
                        torch.lerp(part, self._exact(group, its_mean, thread), mass, out=part)

        crew.each(work, values.blocks)
        self.copies = copies
        self.standing = replace(after, window=0, masses=(0.0,) * len(factors)) if closes else after

    @torch.no_grad()
    def values(self, block: Block, profile: int, thread: int = 0) -> torch.Tensor:
        """The average of a block, rounded once, in scratch of that thread: valid until its next call.

        The block has at most `exact_block` elements; of threads of one number, one may call at a time.
        """
        kept, mass = self.accumulators, self.standing.masses[profile]
        assert kept is not None
        group, where = kept.layout[block.group], slice(block.begin, block.end)
        self._make_scratch((group,), thread + 1)
        total, means = (own[profile].flats[block.group][where] for own in (kept.totals, kept.recent))
        if mass > 0:
            exact = self._exact(group, means, thread)
            total = torch.lerp(total, exact, mass, out=exact)
        if total.dtype == group.wide:
            return total
        return self._scratch[thread, group.device, group.wide][: total.numel()].copy_(total)

    def copy_to(self, room: Accumulators) -> None:
        """Copy all that the averages are kept in; `room` fits them."""
        kept = self.accumulators
        assert kept is not None
        for own, source in zip((*room.totals, *room.recent), (*kept.totals, *kept.recent), strict=True):
            for flat, values in zip(own.flats, source.flats, strict=True):
                flat.copy_(values, non_blocking=True)

    def _exact(self, group: Group, means: torch.Tensor, thread: int) -> torch.Tensor:
        """A block of recent means in the totals' dtype; valid until the same thread's next call."""
        return self._scratch[thread, group.device, group.exact][: means.numel()].copy_(means)

    def _make_scratch(self, layout: Layout, threads: int) -> None:
        """Called before anything is changed: memory may be short."""
        for group in layout:
            for thread in range(threads):
                for dtype in (group.exact, group.wide):
                    if (key := (thread, group.device, dtype)) not in self._scratch:
                        self._scratch[key] = torch.empty(group.exact_block, dtype=dtype, device=group.device)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this holds."""
        kept = 0 if self.accumulators is None else self.accumulators.nbytes
        return kept + sum(tensor.nbytes for tensor in (*self._scratch.values(), *self.copies.values()))


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
        """The dtype of recent means: at a decay of 0.9999 a half-precision average never moves."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def exact(self) -> torch.dtype:
        """The dtype of totals: float64, except on Apple's GPUs, which have none."""
        return self.wide if self.device.type == "mps" else torch.float64

    @property
    def exact_block(self) -> int:
        """Elements of a block of float64 arithmetic."""
        return EXACT_BLOCK if self.device.type == "cpu" else EXACT_DEVICE_BLOCK

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
    """One flat buffer of zeros a group, in these dtypes, and the tensors in it by name."""

    def __init__(self, layout: Layout, dtypes: Iterable[torch.dtype]) -> None:
        self.flats = [
            torch.empty(group.bounds[-1], dtype=dtype, device=group.device)
            for group, dtype in zip(layout, dtypes, strict=True)
        ]
        for flat in self.flats:
            flat.zero_()  # so that the system allocates the memory now, and not at the first write
        self.views = {
            name: view for group, flat in zip(layout, self.flats, strict=True) for name, view in group.views(flat)
        }


@dataclass(frozen=True)
class Block:
    """A range of a flat buffer, and the tensors (whole or split) whose values belong there."""

    group: int
    begin: int
    end: int
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
