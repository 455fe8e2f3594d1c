"""The running averages: state, and the arithmetic of one update.

An average over millions of updates cannot be kept in float32 alone: a change of less than half its last digit is lost,
always in the same direction. So the values since averages were last changed (the window) are kept as float32 means, and
each profile has an average up to then, `high` in float32. A fold takes a mean into each, with that one's own mass:

    average = high + m (mean - high),    m = 1 - (t_folded / t)^(gamma + 1)

**Early** in a run there are two means: `mean`, weighted as the profile of the largest gamma weights the window, and
`second`, as that of the smallest. An update is one linear interpolation of each, which is what other hooks do. For two
profiles windows are exact, and end after `WINDOW` updates, when the means' own roundings would begin to count. A third
one takes a mean on the line between both, by gamma, which is right to second order: then windows end earlier, see
`profiles.window_ends`. A fold must not lose small steps always in the same direction, either. So before the sum is
rounded, a share u of the last digit is added, |u| < 1/2, where there is a step at all:

    high' = fl(high + m (mean - high) + u ulp(high))

with multiples of the golden ratio, modulo 1, by the number of the fold: the same for all elements, and so whatever the
threads, parts and devices. They even out, and each fold leaves one rounding.

**Later** these roundings would add up: n folds leave (n / (2 gamma + 3))^(1/2) of them. So when `WINDOW` updates take
less than a thousandth of training, in which all profiles may share one `mean`, the memory of `second` goes to `low`,
what rounding takes away, in bfloat16. An update changes one mean only, and a fold is exact in the sum high + low:

    low <- low + m ((mean - high) - low),    high' = high + low,    low <- low - (high' - high)

The weights of another gamma' differ from the mean's within a window of relative length L by (gamma - gamma') L. Noise
of variance w leaves ((gamma - gamma') L)^2 / 12 of its share in the average, drift (gamma - gamma') L^2 / 12 of the
path. The newest value goes into each profile's mean with its own share, so that windows of one value or two are exact.

Relative L2 error against sums in float64, sigma_rel 0.05 / 0.28 (scripts/long_runs.py):

                                  at 1,000,000 updates  the largest until then
    Adam, rate a cosine to 0      2.8e-8 / 2.8e-8       1.4e-7 / 4.9e-7
    random walk, the same         2.6e-8 / 2.7e-8       1.4e-7 / 4.1e-7
    noise of 3 %, the same        2.6e-8 / 3.1e-8       1.4e-7 / 4.6e-7
    pure noise of 3 %             2.6e-8 / 3.4e-8       1.4e-7 / 4.6e-7
    drift on sines                1.2e-7 / 5.2e-8       4.1e-7 / 3.9e-7

The largest are where low parts begin. Reading rounds to float32, which is 2.3e-8 of this.

Averages of float64 parameters are float64, and take in every value at once; their mean is for `sketcher` only.

On the CPU an update reads the model once. A tile whose norm is finite, and at most twice that at the last update, is
taken in at once, while it is in the cache. The others wait until all values are known to be finite. If one is not, a
share f is taken out again, which is an interpolation by f / (f - 1): means of values up to A are as before to 50 u A
at most, with u = 2^-24. All values are checked before where that would be more (f above `MOST_UNDONE`), at a fold,
after a refused update, so that this does not add up, and on accelerators, where one would wait for each tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from operator import itemgetter

import torch

from posthoc_cli.profiles import gamma_from_sigma_rel, is_late, new_value_share, window_ends
from posthoc_cli.snapshots.format import Path
from posthoc_cli.snapshots.reading import ElementRange
from posthoc_cli.tracker.layout import Elements, FlatTensors, Layout, Tile, TileReader, tiles_of, zeros
from posthoc_cli.tracker.measuring import Sketcher, closed
from posthoc_cli.tracker.worker import ALONE, Crew

EXPONENT = 0x7F80_0000
"""The bits of a float32 that are its exponent: alone, the power of two at or below its size."""

MOST_UNDONE = 3 / 4
"""The largest share of a new value in a mean that is taken out again: roundings grow by 1 / (1 - share)."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, are spread the most evenly, however many there are."""

Wanted = Sequence[tuple[Elements, Sequence[torch.Tensor]]]
"""Elements of the values that are wanted, and rooms for them."""


@dataclass(frozen=True)
class Standing:
    """All of running averages but tensors, at the last update.

    Attributes:
        t_first, max_interval: time of the first update, and the longest time between two so far.
        updates, window: their number, None where unknown, and that of those since the last fold.
        folded_t: time of the last fold.
        folds: number of folds early in the run, None later.
        inherited: expected squared norms of the errors left from the rounded snapshots that it was resumed from.
    """

    t: float = 0.0
    step: int = 0
    t_first: float = 0.0
    max_interval: float = 0.0
    updates: int | None = 0
    window: int = 0
    folded_t: float = 0.0
    folds: int | None = 0
    inherited: tuple[float, ...] = ()

    def after(self, shares: Sequence[float], t: float, step: int) -> Standing:
        """The standing after an update without fold in which the new values have these shares."""
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

    @property
    def early(self) -> bool:
        """Whether there are no low parts yet."""
        return self.folds is not None

    def masses(self, gammas: Sequence[float]) -> list[float]:
        """The share that the values since the last fold have in each average."""
        return [new_value_share(gamma, self.folded_t, self.t) if self.window else 0.0 for gamma in gammas]


class AverageTensors:
    """What averages of the same tensors are kept in: the mean of the last values; `high` and `low` of each profile.

    Early in a run the memory of two profiles' `low` holds the `second` mean. Both have float32 averages only.
    """

    def __init__(self, layout: Layout, profiles: int) -> None:
        self.layout = layout

        def wide() -> FlatTensors:
            return FlatTensors(layout, [zeros(own.bounds[-1:], own.wide, own.device) for own in layout])

        self.mean, self.high = wide(), tuple(wide() for _ in range(profiles))
        self._rests = [
            None if own.wide == torch.float64 else zeros((profiles, own.bounds[-1]), torch.bfloat16, own.device)
            for own in layout
        ]
        self.low = tuple(self._of_rests(itemgetter(index)) for index in range(profiles))
        self.second = self._of_rests(_as_second) if profiles > 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(flat.nbytes for own in (self.mean, *self.high, *self.low) for flat in own.flats)

    @property
    def bits(self) -> tuple[FlatTensors, ...]:
        """The bits of each profile's `low`."""
        return tuple(self._of_rests(partial(_bits, index=index)) for index in range(len(self.low)))

    def clear_rests(self) -> None:
        """Begin `low` with zeros, in place of `second`."""
        for rest in self._rests:
            if rest is not None:
                rest.zero_()

    def means(self, early: bool) -> tuple[FlatTensors, ...]:
        """The means that there are."""
        return (self.mean, self.second) if early and self.second is not None else (self.mean,)

    def moved(self, layout: Layout, early: bool) -> AverageTensors:
        """The same in another layout, by name."""
        made = AverageTensors(layout, len(self.high))
        pairs = [*zip(made.means(early) + made.high, self.means(early) + self.high, strict=True)]
        if not early:
            pairs += zip(made.low, self.low, strict=True)
        for own, other in pairs:
            for name, view in own.views.items():
                view.copy_(other.views[name])
        return made

    def copy_to(self, room: AverageTensors, early: bool) -> None:
        """Copy all of it, to the same layout on the host, as states have it.

        Each profile must be there without the others. So of two means, the one in the state has the upper bits of both,
        and `low` of the first profile and the last the lower bits of its own.
        """
        second = self.second if early else None
        pairs = [*zip((room.mean, *room.high), (self.mean, *self.high), strict=True)]
        if second is None:
            pairs += zip(room.low, self.low, strict=True)
        for own, source in pairs:
            for flat, values in zip(own.flats, source.flats, strict=True):
                flat.copy_(values, non_blocking=True)
        for at, rest in enumerate(room._rests):
            if second is not None and rest is not None:
                upper, first, last = (_halves(own.flats[at]) for own in (room.mean, self.mean, second))
                upper[:, 0].copy_(first[:, 1], non_blocking=True)
                upper[:, 1].copy_(last[:, 1], non_blocking=True)
                rest[1:-1].zero_()
                _bits(rest, 0).copy_(first[:, 0], non_blocking=True)
                _bits(rest, -1).copy_(last[:, 0], non_blocking=True)

    def unpack_(self) -> None:
        """Restore both means, in place of what a state has."""
        for at, rest in enumerate(self._rests):
            if self.second is not None and rest is not None:
                lower = [_bits(rest, index).clone() for index in (0, -1)]
                first, last = (_halves(own.flats[at]) for own in (self.mean, self.second))
                last[:, 1] = first[:, 1]
                first[:, 1] = first[:, 0]
                first[:, 0], last[:, 0] = lower

    def _of_rests(self, part: Callable[[torch.Tensor], torch.Tensor]) -> FlatTensors:
        return FlatTensors(self.layout, [None if rest is None else part(rest) for rest in self._rests])


def _as_second(rest: torch.Tensor) -> torch.Tensor:
    return rest[:2].flatten().view(torch.float32)


def _bits(rest: torch.Tensor, index: int) -> torch.Tensor:
    return rest[index].view(torch.int16)


def _halves(flat: torch.Tensor) -> torch.Tensor:
    """The lower and the upper bits of each float32: shape [elements, 2]."""
    return flat.view(torch.int16).view(len(flat), 2)


@dataclass
class RunningAverages:
    """Averages of the same tensors with several profiles. One thread at a time may work on them.

    There are no tensors before the first update. A copy is as its tensor was at the last, never changed in place.
    `sample` are values of the model at that time, where known: elements of a snapshot's sample, a bucket each. The
    `sketcher` gets each tile of every value early in a run, and later of each window's mean, as the first profile
    weights it. `known_path` is what it goes on from, or of a reading what it gave.
    """

    sigma_rels: tuple[float, ...]
    standing: Standing
    tensors: AverageTensors | None = None
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sample: Sequence[torch.Tensor] | None = None
    sketcher: Sketcher | None = None
    known_path: Path | None = None

    def __post_init__(self) -> None:
        self.gammas = tuple(gamma_from_sigma_rel(sigma_rel) for sigma_rel in self.sigma_rels)
        most, least = self.gammas[0], self.gammas[-1]
        self._places = [(most - gamma) / (most - least) if gamma < most else 0.0 for gamma in self.gammas]
        self._limits: list[float] = []  # norms of tiles up to which they are taken in at once; none: check all before
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
        self, values: TileReader, copies: Mapping[str, torch.Tensor], t: float, step: int, crew: Crew = ALONE,
        wanted: Wanted = (), sketcher: Sketcher | None = None,
    ) -> str | None:  # fmt: skip
        """Take in the model's values at time `t`: averages <- averages + (1 - beta) (values - averages).

        The averages move to the layout of `values` if it has changed; `copies` are kept as they are given. The `wanted`
        elements of the values are put into their rooms, and the `sketcher` gets what it is for from here on. Returns
        the first tensor that holds a nan or an infinity, if one does: then nothing is taken in.
        """
        new, norms, limits = _Update(self, values, wanted, t, step), list[float](), self._limits
        self._limits = []  # after an update that is refused, or fails, the next one is checked before
        moves = self.tensors is None or self.tensors.layout != values.layout
        checks_before = new.folds or moves or not limits or new.largest_share > MOST_UNDONE
        if checks_before:
            norms = values.norms(crew)
            bad = [tile for tile, norm in zip(values.tiles, norms, strict=True) if not math.isfinite(norm)]
            if (name := values.nonfinite_name(bad)) is not None:
                return name
        self._make_room(values.layout, crew.size)
        self.sketcher, self.known_path = sketcher, None
        new.begin()
        if checks_before:
            crew.each(new.take, values.tiles)
        else:
            norms, others = new.take_up_to(limits, crew)
            if (name := values.nonfinite_name(others)) is not None:
                crew.each(new.undo, {*values.tiles}.difference(others))
                return name
            crew.each(new.take, others)
        self.copies, self.standing = copies, new.end()
        if all(bucket.device.type == "cpu" for bucket in values.layout):
            self._limits = [min(2 * norm, torch.finfo(torch.float32).max) for norm in norms]
        return None

    def _make_room(self, layout: Layout, threads: int) -> None:
        """Memory for averages of a layout, and for threads: before anything is changed, since it may be short."""
        kept = self.tensors
        if kept is None:
            self.tensors = AverageTensors(layout, len(self.gammas))
        elif kept.layout != layout:
            self.tensors = kept.moved(layout, self.standing.early)
        for at in range(len(layout)):
            for thread in range(threads):
                self._scratch_of(Tile(0, at, 0, 0), thread)

    def _mean(self, tile: Tile, profile: int, room: torch.Tensor) -> torch.Tensor:
        """A tile of the mean as a profile takes it in; one that is between two others is put in the room."""
        kept, at, where, place = self.tensors, tile.bucket, tile.where, self._places[profile]
        assert kept is not None
        mean = kept.mean.flats[at][where]
        if not self.standing.early or kept.second is None or place == 0 or mean.dtype == torch.float64:
            return mean
        second = kept.second.flats[at][where]
        return second if place == 1 else torch.lerp(mean, second, place, out=room)

    @torch.no_grad()
    def of(self, sigma_rels: Sequence[float]) -> RunningAverages:
        """Those of some of the profiles."""
        kept, standing = self.tensors, self.standing
        assert kept is not None
        made = AverageTensors(kept.layout, len(sigma_rels))
        chosen = [self.sigma_rels.index(sigma_rel) for sigma_rel in sigma_rels]
        sources = [*zip(made.high, [kept.high[index] for index in chosen], strict=True)]
        if not standing.early:
            sources += zip(made.low, [kept.low[index] for index in chosen], strict=True)
        means = [*zip(made.means(standing.early), (chosen[0], chosen[-1]), strict=False)]
        for tile in tiles_of(kept.layout):
            at, where = tile.bucket, tile.where
            for room, source in sources:
                room.flats[at][where] = source.flats[at][where]
            for room, index in means:
                own = room.flats[at][where]
                own.copy_(self._mean(tile, index, self._scratch_of(tile, 0)[0])[: len(own)])
        standing = replace(standing, inherited=tuple(standing.inherited[index] for index in chosen))
        return RunningAverages(tuple(sigma_rels), standing, made, self.copies, known_path=self.known_path)

    @torch.no_grad()
    def values(self, tile: Tile, profile: int, thread: int = 0) -> torch.Tensor:
        """A tile of an average, flat: rounded once to float32, or float64 for such parameters.

        In memory of this thread, which may be written to; valid until its next call.
        """
        kept, at, where = self.tensors, tile.bucket, tile.where
        assert kept is not None
        found, rest = self._scratch_of(tile, thread)
        high = kept.high[profile].flats[at][where]
        if high.dtype == torch.float64:
            return found.copy_(high)
        window, mass = self.standing.window, self.standing.masses(self.gammas)[profile]
        if self.standing.early:
            return torch.lerp(high, self._mean(tile, profile, rest), mass, out=found) if window else found.copy_(high)
        found.copy_(kept.low[profile].flats[at][where])
        if window:
            torch.sub(kept.mean.flats[at][where], high, out=rest)
            torch.lerp(found, rest, mass, out=found)
        return found.add_(high)

    @torch.no_grad()
    def read(self, index: int, ranges: Sequence[ElementRange], crew: Crew = ALONE) -> list[torch.Tensor]:
        """Ranges of the average of that index, rounded once, on the host; neighbours share memory."""
        kept = self.tensors
        assert kept is not None
        buckets = {name: at for at, bucket in enumerate(kept.layout) for name in bucket.names}
        runs: list[tuple[int, list[int]]] = []  # a bucket, and where ranges end in it that follow each other
        for name, begin, end in ranges:
            at = buckets[name]
            first = kept.layout[at].places[name][0]
            if not runs or runs[-1][0] != at or runs[-1][1][-1] != first + begin:
                runs.append((at, [first + begin]))
            runs[-1][1].append(first + end)
        made: list[torch.Tensor] = []
        items: list[tuple[Tile, torch.Tensor]] = []
        for at, ends in runs:
            bucket, first = kept.layout[at], ends[0]
            room = torch.empty(ends[-1] - first, dtype=bucket.wide)
            made += torch.split(room, [end - begin for begin, end in pairwise(ends)])
            for begin in range(first, ends[-1], bucket.tile):
                end = min(begin + bucket.tile, ends[-1])
                items.append((Tile(0, at, begin, end), room[begin - first : end - first]))
        crew.each(lambda item, thread: item[1].copy_(self.values(item[0], index, thread)), items)
        return made

    @torch.no_grad()
    def path(self, crew: Crew = ALONE, exact: bool = False) -> Path | None:
        """The path of the weights up to the last update, the open window as if it ended then, unless `exact`."""
        kept, sketcher, standing = self.tensors, self.sketcher, self.standing
        if kept is None or sketcher is None:
            return self.known_path if exact or self.known_path is None else closed(self.known_path)
        is_open = standing.window > 0 and not exact and not standing.early
        if is_open:
            flats = kept.mean.flats
            crew.each(lambda tile, _: sketcher.take(tile, flats[tile.bucket][tile.where]), tiles_of(kept.layout))
        found = sketcher.path(standing.t if is_open else None)
        return found if exact or found is None else closed(found)

    def _scratch_of(self, tile: Tile, thread: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two rooms for a tile, of this thread's own, in the averages' dtype."""
        assert self.tensors is not None
        bucket = self.tensors.layout[tile.bucket]
        key = (thread, bucket.device, bucket.wide)
        if key not in self._scratch:
            with torch.inference_mode(False):  # else later calls could not write to it
                one, other = (torch.empty(bucket.tile, dtype=bucket.wide, device=bucket.device) for _ in range(2))
            self._scratch[key] = one, other
        one, other = self._scratch[key]
        return one[: tile.end - tile.begin], other[: tile.end - tile.begin]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this holds."""
        held = sum(one.nbytes for one in (self.tensors, self.sketcher) if one is not None)
        scratch = (tensor.nbytes for pair in self._scratch.values() for tensor in pair)
        return held + sum(scratch) + sum(copy.nbytes for copy in self.copies.values())


class _Update:
    """One update: the shares of the new values, and what is done with each tile of them, by any of a crew's threads.

    Attributes:
        folds: whether a window ends, so that averages take in its means.
        largest_share: the largest one of the values in what they are added to.
    """

    def __init__(self, averages: RunningAverages, values: TileReader, wanted: Wanted, t: float, step: int) -> None:
        self._averages, self._values, self._wanted = averages, values, wanted
        self._before, gammas = (before := averages.standing), averages.gammas
        self._shares = [new_value_share(gamma, before.t, t) for gamma in gammas]
        self._after = before.after(self._shares, t, step)
        self._masses = self._after.masses(gammas)  # of the window in each average, and the value's share in that
        self._factors = [share / mass for share, mass in zip(self._shares, self._masses, strict=True)]
        self.folds = window_ends(gammas, self._after.window, before.folded_t, t, before.early)
        self.largest_share = max(self._factors if before.window else self._shares)

    def begin(self) -> None:
        """Prepare the tiles' work, when the averages have room for the values."""
        assert self._averages.tensors is not None
        self._kept, early = self._averages.tensors, self._before.early
        last = (self._factors[0], self._factors[-1]) if self._before.window else (1.0, 1.0)
        self._means = [] if self.folds else [*zip(self._kept.means(early), last, strict=False)]
        self._doubles = [*zip(self._kept.high, self._shares, strict=True), *([] if early else self._means)]

    def take(self, tile: Tile, thread: int) -> None:
        """Take in a tile."""
        self._take(tile, self._values.values(tile, thread), thread)

    def take_up_to(self, limits: Sequence[float], crew: Crew) -> tuple[list[float], list[Tile]]:
        """Take in the tiles whose norms are within limits, each while it is in the cache; all norms, and the others."""
        values, norms, others = self._values, [0.0] * len(limits), list[Tile]()

        def work(tile: Tile, thread: int) -> None:
            flat = values.flat(tile, thread)
            norms[tile.number] = norm = float(torch.linalg.vector_norm(flat))
            if norm <= limits[tile.number]:
                self._take(tile, values.wide(flat, tile, thread), thread)
            else:
                others.append(tile)

        crew.each(work, values.tiles)
        return norms, others

    def undo(self, tile: Tile, thread: int) -> None:
        """Take a tile out again."""
        self._interpolate(tile, self._values.values(tile, thread), back=True)

    def end(self) -> Standing:
        """The standing when all tiles are taken in; after the fold of a window late in a run low parts begin."""
        after, sketcher = self._after, self._averages.sketcher
        if self.folds:
            count = None if after.folds is None else after.folds + 1
            if count is not None and is_late(after.window, after.folded_t, after.t):
                self._kept.clear_rests()
                count = None
            after = replace(after, window=0, folded_t=after.t, folds=count)
        if sketcher is not None and self._before.early:
            sketcher.end_value(self._averages.gammas, after.t, not after.early)
        elif sketcher is not None and self.folds:
            sketcher.end_window(after.t)
        return after

    def _take(self, tile: Tile, own: torch.Tensor, thread: int) -> None:
        sketcher = self._averages.sketcher
        for elements, room in self._wanted:
            elements.take(tile, own, room)
        if sketcher is not None and self._before.early:
            sketcher.take(tile, own)
        self._interpolate(tile, own)
        if self.folds:
            self._fold(tile, own, thread)

    def _interpolate(self, tile: Tile, own: torch.Tensor, back: bool = False) -> None:
        for flat, factor in self._doubles if own.dtype == torch.float64 else self._means:
            changed = flat.flats[tile.bucket][tile.where]
            if factor < 1:
                torch.lerp(changed, own, factor / (factor - 1) if back else factor, out=changed)
            else:  # what was there before does not count
                changed.copy_(own)

    def _fold(self, tile: Tile, newest: torch.Tensor, thread: int) -> None:
        """Take in a tile of the means, and the newest value."""
        kept, at, where, before = self._kept, tile.bucket, tile.where, self._before
        scratch, rest = self._averages._scratch_of(tile, thread)
        for profile, (share, mass) in enumerate(zip(self._factors, self._masses, strict=True)):
            taken = newest
            if before.window:
                taken = torch.lerp(self._averages._mean(tile, profile, rest), newest, share, out=rest)
            if profile == 0 and self._averages.sketcher is not None and not before.early:
                self._averages.sketcher.take(tile, taken)
            if taken.dtype == torch.float64:
                return  # these averages have it already
            high = kept.high[profile].flats[at][where]
            torch.sub(taken, high, out=rest)
            if before.folds is not None:
                torch.sign(rest, out=scratch).mul_(high).view(torch.int32).bitwise_and_(EXPONENT)
                dither = (GOLDEN * (before.folds + 1) % 1 - 0.5) * 2**-23
                high.add_(rest.mul_(mass).add_(scratch, alpha=dither))
                continue
            stored = kept.low[profile].flats[at][where]
            torch.lerp(scratch.copy_(stored), rest, mass, out=scratch)
            rest.copy_(high)
            high.add_(scratch)
            stored.copy_(scratch.add_(rest.sub_(high)))
