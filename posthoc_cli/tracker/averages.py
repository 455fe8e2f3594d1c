"""The running averages: state, and the arithmetic of one update.

An average over millions of updates cannot be kept in float32 alone: a change of less than half its last digit is lost,
always in the same direction. So it is kept in two terms, a `total` in float64 and the mean of the `recent` values since
the total was last changed, which has the share `mass` of the average:

    average = total + mass (recent - total)

An update with share s of the new value v changes the recent mean only, at the cost of a plain average:

    mass <- mass + s (1 - mass),    recent <- recent + (s / mass) (v - recent)

At every `WINDOW`th update the average becomes the new total, and the next mean begins with the next value. Each value
ends with the weight that a plain average would give it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from posthoc_cli.profiles import gamma_from_sigma_rel, new_value_share
from posthoc_cli.reconstruction import WINDOW
from posthoc_cli.tracker.buffers import Block, BlockReader, FlatTensors, Group, Layout, on_host
from posthoc_cli.tracker.worker import ALONE, Crew


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
    """What averages are kept in: a total and a recent mean of the same tensors for each profile.

    Not `exact`, it is memory for averages that are rounded once: these are in `recent`, and there are no totals.
    """

    def __init__(self, layout: Layout, profiles: int, exact: bool = True, pinned: bool = False) -> None:
        self.layout = layout
        wide, totals = [group.wide for group in layout], [group.exact for group in layout]
        # Zeros, in memory that the system has allocated.
        self.totals = tuple(FlatTensors(layout, totals).zero_() for _ in range(profiles if exact else 0))
        self.recent = tuple(FlatTensors(layout, wide, pinned).zero_() for _ in range(profiles))

    def fits(self, others: Accumulators | None) -> bool:
        """Whether this is room on the host for others."""
        return others is not None and self.layout == on_host(others.layout) and len(self.recent) == len(others.recent)

    def moved(self, layout: Layout, begun: Mapping[str, torch.Tensor]) -> Accumulators:
        """The same in another layout, by name; averages of the tensors in `begun` start with these values."""
        made = Accumulators(layout, len(self.recent))
        for own, other in zip((*made.totals, *made.recent), (*self.totals, *self.recent), strict=True):
            for name, view in own.views.items():
                view.copy_(begun[name] if name in begun else other.views[name])
        return made


@dataclass
class RunningAverages:
    """Averages of the same tensors with several profiles. One thread at a time may work on them.

    There are no accumulators before the first update. A copy is as its tensor was at the last, never changed in place.
    """

    sigma_rels: tuple[float, ...]
    standing: Standing
    accumulators: Accumulators | None = None
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)

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
            kept = kept.moved(values.layout, {})
        self.accumulators = kept
        self._make_scratch(values.layout, crew)
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
                    self._add(values.layout[block.group], total.flats[block.group][where], mean, mass, thread)

        crew.each(work, values.blocks)
        self.copies = copies
        self.standing = replace(after, window=0, masses=(0.0,) * len(factors)) if closes else after

    @torch.no_grad()
    def changed(
        self, layout: Layout, begun: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor]
    ) -> RunningAverages:
        """The averages of a changed model: unchanged tensors keep theirs, those in `begun` start with these values."""
        moved = None if self.accumulators is None else self.accumulators.moved(layout, begun)
        return RunningAverages(self.sigma_rels, self.standing, moved, copies)

    @torch.no_grad()
    def read(self, room: Sequence[FlatTensors], crew: Crew = ALONE) -> None:
        """Write the averages, rounded once, into buffers of the same layout, one a profile."""
        kept = self.accumulators
        assert kept is not None
        self._make_scratch(kept.layout, crew)

        def work(item: tuple[Group, float, torch.Tensor, torch.Tensor, torch.Tensor], thread: int) -> None:
            group, mass, totals, means, values = item
            exact = self._exact(group, means, thread) if mass > 0 else means
            average = torch.lerp(totals, exact, mass, out=exact) if mass > 0 else totals
            values.copy_(average, non_blocking=True)

        crew.each(
            work,
            (
                (group, mass, *block)
                for total, recent, mass, own in zip(kept.totals, kept.recent, self.standing.masses, room, strict=True)
                for group, *flats in zip(kept.layout, total.flats, recent.flats, own.flats, strict=True)
                for block in zip(*(torch.split(flat, group.exact_block) for flat in flats), strict=True)
            ),
        )

    def copy_to(self, room: Accumulators) -> None:
        """Copy all that the averages are kept in; `room` fits them."""
        kept = self.accumulators
        assert kept is not None
        for own, source in zip((*room.totals, *room.recent), (*kept.totals, *kept.recent), strict=True):
            for flat, values in zip(own.flats, source.flats, strict=True):
                flat.copy_(values, non_blocking=True)

    def _add(self, group: Group, total: torch.Tensor, recent: torch.Tensor, mass: float, thread: int) -> None:
        """Make a range of the averages the new totals."""
        blocks = [torch.split(flat, group.exact_block) for flat in (total, recent)]
        for totals, means in zip(*blocks, strict=True):
            torch.lerp(totals, self._exact(group, means, thread), mass, out=totals)

    def _exact(self, group: Group, means: torch.Tensor, thread: int) -> torch.Tensor:
        """A block of recent means in the totals' dtype; valid until the same thread's next call."""
        return self._scratch[thread, group.device, group.exact][: means.numel()].copy_(means)

    def _make_scratch(self, layout: Layout, crew: Crew) -> None:
        """Called before anything is changed: memory may be short."""
        for group in layout:
            for thread in range(crew.size):
                key = (thread, group.device, group.exact)
                if key not in self._scratch:
                    self._scratch[key] = torch.empty(group.exact_block, dtype=group.exact, device=group.device)
