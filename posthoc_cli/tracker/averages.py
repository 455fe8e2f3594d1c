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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from posthoc_cli.profiles import gamma_from_sigma_rel, new_value_share
from posthoc_cli.reconstruction import WINDOW
from posthoc_cli.tracker.buffers import Block, BlockReader, FlatTensors, Group, Layout, on_host
from posthoc_cli.tracker.worker import ALONE, Crew


@dataclass(frozen=True)
class Standing:
    """All of running averages but tensors.

    Attributes:
        t, step: time and call of the last update; 0 before the first.
        t_first: time of the first update; 0 before.
        max_interval: the longest time between two updates so far.
        updates: their number; None where unknown.
        window: number of updates in the recent means.
        masses: of the recent means, one a profile.
        inherited: expected squared norm of the error that each average still has from the rounded snapshots that it was
            resumed from.
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

    def of_profiles(self, indices: Sequence[int]) -> Standing:
        """The same for some of the profiles."""
        masses, inherited = (tuple(values[i] for i in indices) for values in (self.masses, self.inherited))
        return replace(self, masses=masses, inherited=inherited)

    def with_new_totals(self) -> Standing:
        """The same after the recent means were added to the totals."""
        return replace(self, window=0, masses=(0.0,) * len(self.masses))


@dataclass(frozen=True, eq=False)
class Accumulators:
    """What averages are kept in: a total and a recent mean of the same tensors for each profile."""

    layout: Layout
    totals: tuple[FlatTensors, ...]
    recent: tuple[FlatTensors, ...]

    @classmethod
    def zeros(cls, layout: Layout, profiles: int) -> Accumulators:
        """Zeros, in memory that the system has allocated."""
        exact, wide = [group.exact for group in layout], [group.wide for group in layout]
        return cls(
            layout,
            tuple(FlatTensors(layout, exact).zero_() for _ in range(profiles)),
            tuple(FlatTensors(layout, wide).zero_() for _ in range(profiles)),
        )

    @classmethod
    def on_host(cls, others: Accumulators) -> Accumulators:
        """Room for others on the host."""
        return cls.zeros(on_host(others.layout), len(others.totals))

    def __iter__(self) -> Iterator[FlatTensors]:
        yield from self.totals
        yield from self.recent

    def fits(self, others: Accumulators | None) -> bool:
        """Whether this is room on the host for others."""
        return others is not None and self.layout == on_host(others.layout) and len(self.totals) == len(others.totals)

    def moved(self, layout: Layout, begun: Mapping[str, torch.Tensor]) -> Accumulators:
        """The same in another layout, by name; averages of the tensors in `begun` start with these values."""
        made = Accumulators.zeros(layout, len(self.totals))
        for own, other in zip(made, self, strict=True):
            for name, view in own.views.items():
                view.copy_(begun[name] if name in begun else other.views[name])
        return made

    def read(self, averages: RunningAverages, _: Crew = ALONE) -> None:
        """Copy all that averages are kept in; this fits them."""
        assert averages.accumulators is not None
        for own, source in zip(self, averages.accumulators, strict=True):
            for flat, values in zip(own.flats, source.flats, strict=True):
                flat.copy_(values, non_blocking=True)


class Rounded:
    """Averages rounded once, on the host, one set of tensors a profile, in memory that the system has allocated."""

    def __init__(self, layout: Layout, profiles: int, pinned: bool = False) -> None:
        self.layout = layout
        wide = [group.wide for group in layout]
        self.profiles = tuple(FlatTensors(layout, wide, pinned).zero_() for _ in range(profiles))

    @classmethod
    def on_host(cls, kept: Accumulators) -> Rounded:
        """Room for averages on the host."""
        return cls(on_host(kept.layout), len(kept.totals))

    def fits(self, kept: Accumulators | None) -> bool:
        """Whether this is room for averages."""
        return kept is not None and self.layout == on_host(kept.layout) and len(self.profiles) == len(kept.totals)

    def read(self, averages: RunningAverages, crew: Crew = ALONE) -> None:
        """Take averages as they are; this fits them."""
        averages.read(self.profiles, crew)


@dataclass
class RunningAverages:
    """Averages of the same tensors with several profiles. One thread at a time may work on them.

    Attributes:
        sigma_rels: the profiles.
        standing: all but tensors.
        accumulators: None before the first update.
        copies: name -> tensor as it was at the last update; never changed in place.
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

        Arguments:
            values: the parameters'; the averages move to their layout if it has changed.
            copies: buffers and other tensors that are copied, by name; kept as they are given.
            t, step: time and number of the call.
            crew: threads to use; `values` has room for them.
        """
        kept = self._in_layout(values.layout)
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
        self.standing = after.with_new_totals() if closes else after

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
        profiles = zip(kept.totals, kept.recent, self.standing.masses, room, strict=True)

        def work(item: tuple[Group, float, torch.Tensor, torch.Tensor, torch.Tensor], thread: int) -> None:
            group, mass, totals, means, values = item
            exact = self._exact(group, means, thread) if mass > 0 else means
            average = torch.lerp(totals, exact, mass, out=exact) if mass > 0 else totals
            values.copy_(average, non_blocking=True)

        crew.each(
            work,
            (
                (group, mass, *block)
                for total, recent, mass, own in profiles
                for group, *flats in zip(kept.layout, total.flats, recent.flats, own.flats, strict=True)
                for block in zip(*(torch.split(flat, group.exact_block) for flat in flats), strict=True)
            ),
        )

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

    def _in_layout(self, layout: Layout) -> Accumulators:
        kept = self.accumulators
        if kept is None:
            kept = Accumulators.zeros(layout, len(self.gammas))
        elif kept.layout != layout:
            kept = kept.moved(layout, {})
        self.accumulators = kept
        return kept
