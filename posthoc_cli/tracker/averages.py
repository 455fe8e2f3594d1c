"""The running averages: state, and the arithmetic of one update.

An average over millions of updates cannot be kept in float32 alone: a change of less than half its last digit is lost,
always in the same direction. So it is kept in two parts, a `total` in float64 and the mean of the `recent` values since
that was last added to, which has the share `mass` of the whole:

    average = total + mass (recent - total)

An update with share s of the new value v changes the recent mean only, which costs no more than one of a plain average:

    mass <- mass + s (1 - mass),    recent <- recent + (s / mass) (v - recent)

At every `WINDOW`th update the average becomes the new total, and the next mean begins with the next value. What each
value counts for in the end is the same as if all had been added to one number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from posthoc_cli.profiles import gamma_from_sigma_rel, new_value_share
from posthoc_cli.reconstruction import WINDOW
from posthoc_cli.tracker.layout import Block, BlockReader, FlatTensors, Group, Layout, on_host
from posthoc_cli.tracker.worker import ALONE, Crew


@dataclass(frozen=True)
class Standing:
    """All of running averages that is no tensor.

    Attributes:
        t, step: time and calls at the last update; 0 before the first.
        t_first: time of the first update; 0 before.
        max_interval: the longest time between two updates so far.
        updates: how many there were; None where that is not known.
        window: how many of them the recent means are of.
        masses: of the recent mean, a profile.
        inherited: expected squared norm of the error that each average has still from rounded snapshots which the run
            went on from.
    """

    t: float = 0.0
    step: int = 0
    t_first: float = 0.0
    max_interval: float = 0.0
    updates: int | None = 0
    window: int = 0
    masses: tuple[float, ...] = ()
    inherited: tuple[float, ...] = ()

    @classmethod
    def before(cls, profiles: int) -> Standing:
        """That before the first update."""
        return cls(masses=(0.0,) * profiles, inherited=(0.0,) * profiles)

    def after(self, shares: Sequence[float], t: float, step: int) -> Standing:
        """That after an update in which the new values have these shares."""
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
        """That of some of the profiles."""
        masses, inherited = (tuple(values[i] for i in indices) for values in (self.masses, self.inherited))
        return replace(self, masses=masses, inherited=inherited)

    def with_totals_of_all(self) -> Standing:
        """The same when the recent means have been added to the totals."""
        return replace(self, window=0, masses=(0.0,) * len(self.masses))


@dataclass(frozen=True, eq=False)
class Accumulators:
    """What averages are kept in: a total and a recent mean a profile, of the same tensors."""

    layout: Layout
    totals: tuple[FlatTensors, ...]
    recent: tuple[FlatTensors, ...]

    @classmethod
    def zeros(cls, layout: Layout, profiles: int) -> Accumulators:
        """Room, which the system has really given."""
        made = cls(
            layout,
            tuple(FlatTensors(layout, wide=True, exact=True) for _ in range(profiles)),
            tuple(FlatTensors(layout, wide=True) for _ in range(profiles)),
        )
        for tensors in made:
            tensors.zero_()
        return made

    def fits(self, others: Accumulators | None) -> bool:
        """Whether this is room on the host for others."""
        return others is not None and self.layout == on_host(others.layout) and len(self.totals) == len(others.totals)

    def __iter__(self) -> Iterator[FlatTensors]:
        yield from self.totals
        yield from self.recent

    def moved(self, layout: Layout, begun: Mapping[str, torch.Tensor]) -> Accumulators:
        """The same in another layout, by name; averages of what is in `begun` begin with these values."""
        made = Accumulators.zeros(layout, len(self.totals))
        for own, other in zip(made, self, strict=True):
            own.fill({**other.views, **begun})
        return made

    def copy_(self, other: Accumulators) -> None:
        """Take the numbers of others of the same tensors, lying in the same order."""
        for own, source in zip(self, other, strict=True):
            for flat, values in zip(own.flats, source.flats, strict=True):
                flat.copy_(values, non_blocking=True)


@dataclass
class RunningAverages:
    """Averages of the same tensors with several profiles. One thread at a time may work on them.

    Attributes:
        sigma_rels: the profiles.
        standing: all that is no tensor.
        accumulators: None before the first update.
        copies: name -> tensor as it was at the last update; never changed.
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
        return cls(tuple(sigma_rels), Standing.before(len(sigma_rels)))

    @property
    def exist(self) -> bool:
        """Whether there was an update yet."""
        return self.standing.t > 0

    @torch.no_grad()
    def update_(
        self, values: BlockReader, copies: Mapping[str, torch.Tensor], t: float, step: int, crew: Crew = ALONE
    ) -> None:
        """Take in the model's values as they are at time `t`: averages <- averages + (1 - beta) (values - averages).

        Arguments:
            values: the parameters'; where their layout is another than before, the averages follow it.
            copies: buffers and other tensors that are copied, by name; kept as they are given.
            t, step: time and number of the call.
            crew: threads to do it with; `values` has room for them.
        """
        kept = self._laid_out(values.layout)
        self._make_scratch(values.layout, crew)
        before = self.standing
        shares = [new_value_share(gamma, before.t, t) for gamma in self.gammas]
        after = before.after(shares, t, step)
        parts = [share / mass for share, mass in zip(shares, after.masses, strict=True)]
        closes = after.window >= WINDOW

        def work(block: Block, thread: int) -> None:
            own, where = values.values(block, thread), slice(block.begin, block.end)
            for total, recent, part, mass in zip(kept.totals, kept.recent, parts, after.masses, strict=True):
                mean = recent.flats[block.group][where]
                if before.window == 0:
                    mean.copy_(own)
                else:
                    torch.lerp(mean, own, part, out=mean)
                if closes:
                    self._add(values.layout[block.group], total.flats[block.group][where], mean, mass, thread)

        crew.each(work, values.blocks)
        self.copies = copies
        self.standing = after.with_totals_of_all() if closes else after

    @torch.no_grad()
    def followed(
        self, layout: Layout, begun: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor]
    ) -> RunningAverages:
        """The same averages of other tensors: those of what is in `begun` begin with these values."""
        moved = None if self.accumulators is None else self.accumulators.moved(layout, begun)
        return RunningAverages(self.sigma_rels, self.standing, moved, copies)

    @torch.no_grad()
    def read(self, room: Sequence[FlatTensors], crew: Crew = ALONE) -> None:
        """Write the averages as they are, rounded once, into buffers of the same tensors; nothing here changes."""
        kept = self.accumulators
        assert kept is not None, "called when there are some"
        self._make_scratch(kept.layout, crew)
        parts = zip(kept.totals, kept.recent, self.standing.masses, room, strict=True)

        def work(item: tuple[Group, float, torch.Tensor, torch.Tensor, torch.Tensor], thread: int) -> None:
            group, mass, totals, means, values = item
            exact = self._exact(group, means, thread) if mass > 0 else means
            average = torch.lerp(totals, exact, mass, out=exact) if mass > 0 else totals
            values.copy_(average, non_blocking=True)

        crew.each(
            work,
            (
                (group, mass, *block)
                for total, recent, mass, target in parts
                for group, *flats in zip(kept.layout, total.flats, recent.flats, target.flats, strict=True)
                for block in zip(*(torch.split(flat, group.exact_block) for flat in flats), strict=True)
            ),
        )

    @torch.no_grad()
    def copy_to(self, room: Accumulators) -> None:
        """Copy all that the averages are kept in."""
        assert self.accumulators is not None, "called when there are some"
        room.copy_(self.accumulators)

    def _add(self, group: Group, total: torch.Tensor, recent: torch.Tensor, mass: float, thread: int) -> None:
        """Make a part of the averages the new totals."""
        blocks = [torch.split(flat, group.exact_block) for flat in (total, recent)]
        for totals, means in zip(*blocks, strict=True):
            torch.lerp(totals, self._exact(group, means, thread), mass, out=totals)

    def _exact(self, group: Group, means: torch.Tensor, thread: int) -> torch.Tensor:
        """A block of recent means in the totals' dtype; valid until the same thread's next one."""
        return self._scratch[thread, group.device, group.exact][: means.numel()].copy_(means)

    def _make_scratch(self, layout: Layout, crew: Crew) -> None:
        """Before anything is changed: memory may be short."""
        for group in layout:
            for thread in range(crew.size):
                key = (thread, group.device, group.exact)
                if key not in self._scratch:
                    self._scratch[key] = torch.empty(group.exact_block, dtype=group.exact, device=group.device)

    def _laid_out(self, layout: Layout) -> Accumulators:
        """The averages in a layout; those that lie otherwise are moved, name by name."""
        kept = self.accumulators
        if kept is None:
            kept = Accumulators.zeros(layout, len(self.gammas))
        elif kept.layout != layout:
            kept = kept.moved(layout, {})
        self.accumulators = kept
        return kept
