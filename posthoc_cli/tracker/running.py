"""The running averages: state, and the arithmetic of one update.

An average over millions of updates cannot be kept in float32 alone: a change of less than half its last digit is lost,
always in the same direction. So the values since the last fold (the window) are kept as float32 means, and each profile
keeps its average at the last fold, `high`, in float32. A fold adds a mean to each average, with the profile's mass m:

    average = high + m (mean - high),    m = 1 - (t_folded / t)^(gamma + 1)

**Early** in a run there are two means: `mean`, weighted as the profile of the largest gamma weights the window, and
`second`, weighted as that of the smallest. An update is one linear interpolation of each, as in other EMA hooks. For
two profiles windows are exact, and end after `WINDOW` updates, when the means' own roundings would begin to count. A
third profile interpolates between both means, by gamma, which is right to second order: then windows end earlier, see
`profiles.window_ends`. A fold must not lose small steps always in the same direction, either. So it is dithered: before
the sum is rounded, a share u of the last digit, |u| < 1/2, is added to each element that changes:

    high' = fl(high + m (mean - high) + u ulp(high))

u is a multiple of the golden ratio, modulo 1, by the number of the fold: the same for all elements, and so independent
of threads, parts and devices. These shares average out, and each fold leaves one rounding error.

**Later** these roundings would add up: n folds leave (n / (2 gamma + 3))^(1/2) of them. So when `WINDOW` updates take
less than a thousandth of training, so that all profiles may share one `mean`, the memory of `second` is used for `low`,
the rounding errors of `high`, in bfloat16. An update changes one mean only, and a fold is exact in the sum high + low:

    low <- low + m ((mean - high) - low),    high' = high + low,    low <- low - (high' - high)

The weights of another gamma' differ from the mean's within a window of relative length L by (gamma - gamma') L. Noise
of variance w leaves ((gamma - gamma') L)^2 / 12 of its share in the average, drift (gamma - gamma') L^2 / 12 of the
path. The newest value enters each profile's mean with that profile's share, so that windows of one or two are exact.

Relative L2 error against sums in float64, sigma_rel 0.05 / 0.28 (scripts/long_runs.py):

                                  at 1,000,000 updates  the largest until then
    Adam, rate a cosine to 0      2.8e-8 / 2.8e-8       1.4e-7 / 4.9e-7
    random walk, the same         2.6e-8 / 2.7e-8       1.4e-7 / 4.1e-7
    noise of 3 %, the same        2.6e-8 / 3.1e-8       1.4e-7 / 4.6e-7
    pure noise of 3 %             2.6e-8 / 3.4e-8       1.4e-7 / 4.6e-7
    drift on sines                1.2e-7 / 5.2e-8       4.1e-7 / 3.9e-7

The error is largest where low parts begin. Reading rounds to float32, which is 2.3e-8 of this.

Averages of float64 parameters are float64, and take in every value at once; their mean is for `sketcher` only.

On the CPU an update reads the model once. A tile whose norm is finite, and at most twice that at the last update, is
taken in immediately, while it is in the cache. The other tiles wait until all values are known to be finite. If a value
is not, the tiles already taken in with share f are undone by an interpolation by f / (f - 1): means of values up to A
are then as before to 50 u A, with u = 2^-24. All values are checked first if that error would be larger (f above
`MOST_UNDONE`), at a fold, after a refused update, so that errors do not add up, and on accelerators, where each check
would wait for the device.
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
from posthoc_cli.snapshots.codecs import PathSketch
from posthoc_cli.snapshots.sources import ElementRange
from posthoc_cli.tracker.layout import BucketTile, Elements, FlatTensors, Layout, LayoutReader, tiles_of, zeros
from posthoc_cli.tracker.measuring import Sketcher, closed
from posthoc_cli.tracker.worker import SINGLE_THREAD, ThreadPool

EXPONENT = 0x7F80_0000
"""The exponent bits of a float32; alone they are the largest power of two that is not above the number's size."""

MOST_UNDONE = 3 / 4
"""The largest share of a new value in a mean that may be undone: roundings grow by 1 / (1 - share)."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""The inverse of the golden ratio, whose multiples, modulo 1, are the most evenly spread for any number of them."""

Sampled = Sequence[tuple[Elements, Sequence[torch.Tensor]]]
"""Selected elements of the values, and the buffers that they are copied to."""


@dataclass(frozen=True)
class Standing:
    """The state of running averages, except their tensors, at the last update.

    Attributes:
        t_first, max_interval: time of the first update, and the longest time between two updates so far.
        updates, window: number of updates, None if unknown, and number of updates since the last fold.
        folded_t: time of the last fold.
        folds: number of folds early in the run, None later.
        inherited: expected squared norms of the errors left by the rounded snapshots that the run resumed from.
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
        """Return the standing after an update without fold in which the new values have these shares."""
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
        """Whether the averages have no low parts yet."""
        return self.folds is not None

    def masses(self, gammas: Sequence[float]) -> list[float]:
        """Return the share that the values since the last fold have in each average."""
        return [new_value_share(gamma, self.folded_t, self.t) if self.window else 0.0 for gamma in gammas]


class AverageTensors:
    """The tensors of running averages: the `mean` of the window; `high` and `low` of each profile.

    Early in a run the memory of two profiles' `low` holds the `second` mean. Float64 averages have neither.
    """

    def __init__(self, layout: Layout, profiles: int) -> None:
        self.layout = layout

        def wide() -> FlatTensors:
            return FlatTensors(layout, [zeros(b.bounds[-1:], b.wide, b.device) for b in layout])

        self.mean, self.high = wide(), tuple(wide() for _ in range(profiles))
        self._low = [
            None if b.wide == torch.float64 else zeros((profiles, b.bounds[-1]), torch.bfloat16, b.device)
            for b in layout
        ]
        self.low = tuple(self._views_of_low(itemgetter(index)) for index in range(profiles))
        self.second = self._views_of_low(_as_second) if profiles > 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(flat.nbytes for tensors in (self.mean, *self.high, *self.low) for flat in tensors.flats)

    @property
    def bits(self) -> tuple[FlatTensors, ...]:
        """Views of each profile's `low` as int16."""
        return tuple(self._views_of_low(partial(_bits, index=index)) for index in range(len(self.low)))

    def clear_low(self) -> None:
        """Set `low` to zeros, which overwrites `second`."""
        for low in self._low:
            if low is not None:
                low.zero_()

    def means(self, early: bool) -> tuple[FlatTensors, ...]:
        """Return the means in use: both, or `mean` alone."""
        return (self.mean, self.second) if early and self.second is not None else (self.mean,)

    def moved(self, layout: Layout, early: bool) -> AverageTensors:
        """Return a copy in another layout of the same names."""
        made = AverageTensors(layout, len(self.high))
        pairs = [*zip(made.means(early) + made.high, self.means(early) + self.high, strict=True)]
        if not early:
            pairs += zip(made.low, self.low, strict=True)
        for target, source in pairs:
            for name, view in target.views.items():
                view.copy_(source.views[name])
        return made

    def copy_to(self, target: AverageTensors, early: bool) -> None:
        """Copy all tensors to the same layout on the host, packed as a state has them.

        A state can be loaded for a part of its profiles. So of two means, the state's `mean` holds the upper halves of
        the bits, and `low` of the first and of the last profile hold the lower halves of the first and second mean.
        """
        second = self.second if early else None
        pairs = [*zip((target.mean, *target.high), (self.mean, *self.high), strict=True)]
        if second is None:
            pairs += zip(target.low, self.low, strict=True)
        for copies, source in pairs:
            for flat, values in zip(copies.flats, source.flats, strict=True):
                flat.copy_(values, non_blocking=True)
        for bucket, low in enumerate(target._low):
            if second is not None and low is not None:
                upper, first, last = (_halves(mean.flats[bucket]) for mean in (target.mean, self.mean, second))
                upper[:, 0].copy_(first[:, 1], non_blocking=True)
                upper[:, 1].copy_(last[:, 1], non_blocking=True)
                low[1:-1].zero_()
                _bits(low, 0).copy_(first[:, 0], non_blocking=True)
                _bits(low, -1).copy_(last[:, 0], non_blocking=True)

    def unpack_(self) -> None:
        """Restore both means from the packed form of a state, in place."""
        for bucket, low in enumerate(self._low):
            if self.second is not None and low is not None:
                lower = [_bits(low, index).clone() for index in (0, -1)]
                first, last = (_halves(mean.flats[bucket]) for mean in (self.mean, self.second))
                last[:, 1] = first[:, 1]
                first[:, 1] = first[:, 0]
                first[:, 0], last[:, 0] = lower

    def _views_of_low(self, view: Callable[[torch.Tensor], torch.Tensor]) -> FlatTensors:
        return FlatTensors(self.layout, [None if low is None else view(low) for low in self._low])


def _as_second(low: torch.Tensor) -> torch.Tensor:
    return low[:2].flatten().view(torch.float32)


def _bits(low: torch.Tensor, index: int) -> torch.Tensor:
    return low[index].view(torch.int16)


def _halves(flat: torch.Tensor) -> torch.Tensor:
    """Return the lower and the upper bits of each float32: shape [elements, 2]."""
    return flat.view(torch.int16).view(len(flat), 2)


@dataclass
class RunningAverages:
    """Averages of the same tensors with several profiles. One thread at a time may work on them.

    Attributes:
        tensors: None before the first update.
        copies: the copied tensors at the last update; never changed in place.
        sample: the model's values of a snapshot's sample at the last update, one tensor a bucket; None if unknown.
        sketcher: gets the tiles of every value early in a run, later of each window's mean as the first profile has it.
        known_path: the path that `sketcher` continues, or in a copy for reading the path at that time.
    """

    sigma_rels: tuple[float, ...]
    standing: Standing
    tensors: AverageTensors | None = None
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sample: Sequence[torch.Tensor] | None = None
    sketcher: Sketcher | None = None
    known_path: PathSketch | None = None

    def __post_init__(self) -> None:
        self.gammas = tuple(gamma_from_sigma_rel(sigma_rel) for sigma_rel in self.sigma_rels)
        most, least = self.gammas[0], self.gammas[-1]
        self._places = [(most - gamma) / (most - least) if gamma < most else 0.0 for gamma in self.gammas]
        self._limits: list[float] = []  # largest norms of tiles that need no check; empty: check all values first
        self._scratch: dict[tuple[int, torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def none_yet(cls, sigma_rels: Sequence[float]) -> RunningAverages:
        """Return the averages of a run before its first update."""
        return cls(tuple(sigma_rels), Standing(inherited=(0.0,) * len(sigma_rels)))

    @property
    def exist(self) -> bool:
        """Whether the averages have taken in an update."""
        return self.standing.t > 0

    @torch.no_grad()
    def update_(
        self, values: LayoutReader, copies: Mapping[str, torch.Tensor], t: float, step: int,
        pool: ThreadPool = SINGLE_THREAD, wanted: Sampled = (), sketcher: Sketcher | None = None,
    ) -> str | None:  # fmt: skip
        """Take in the model's values at time `t`: averages <- averages + (1 - beta) (values - averages).

        The averages move to the layout of `values` if it has changed; `copies` replace the earlier ones. The `wanted`
        elements of the values are copied to their buffers, and `sketcher` replaces the earlier one. If a value is nan
        or infinite, nothing is taken in, and the first tensor with such a value is returned.
        """
        new, norms, limits = _Update(self, values, wanted, t, step), list[float](), self._limits
        self._limits = []  # after an update that is refused or fails, the next one checks all values first
        moves = self.tensors is None or self.tensors.layout != values.layout
        checks_first = new.folds or moves or not limits or new.largest_share > MOST_UNDONE
        if checks_first:
            norms = values.norms(pool)
            bad = [tile for tile, norm in zip(values.tiles, norms, strict=True) if not math.isfinite(norm)]
            if (name := values.nonfinite_name(bad)) is not None:
                return name
        self._allocate(values.layout, pool.size)
        self.sketcher, self.known_path = sketcher, None
        new.begin()
        if checks_first:
            pool.each(new.take, values.tiles)
        else:
            norms, others = new.take_up_to(limits, pool)
            if (name := values.nonfinite_name(others)) is not None:
                pool.each(new.undo, {*values.tiles}.difference(others))
                return name
            pool.each(new.take, others)
        self.copies, self.standing = copies, new.end()
        if all(bucket.device.type == "cpu" for bucket in values.layout):
            self._limits = [min(2 * norm, torch.finfo(torch.float32).max) for norm in norms]
        return None

    def _allocate(self, layout: Layout, threads: int) -> None:
        """Allocate averages of a layout, and scratch for threads, before a value is changed: memory may run out."""
        tensors = self.tensors
        if tensors is None:
            self.tensors = AverageTensors(layout, len(self.gammas))
        elif tensors.layout != layout:
            self.tensors = tensors.moved(layout, self.standing.early)
        for bucket in range(len(layout)):
            for thread in range(threads):
                self._scratch_of(BucketTile(0, bucket, 0, 0), thread)

    def _mean(self, tile: BucketTile, profile: int, out: torch.Tensor) -> torch.Tensor:
        """Return a tile of the window's mean as a profile weights it; a mean between the two is written to `out`."""
        tensors, bucket, where, place = self.tensors, tile.bucket, tile.where, self._places[profile]
        assert tensors is not None
        mean = tensors.mean.flats[bucket][where]
        if not self.standing.early or tensors.second is None or place == 0 or mean.dtype == torch.float64:
            return mean
        second = tensors.second.flats[bucket][where]
        return second if place == 1 else torch.lerp(mean, second, place, out=out)

    @torch.no_grad()
    def of(self, sigma_rels: Sequence[float]) -> RunningAverages:
        """Return a copy of the averages of some of the profiles."""
        tensors, standing = self.tensors, self.standing
        assert tensors is not None
        made = AverageTensors(tensors.layout, len(sigma_rels))
        chosen = [self.sigma_rels.index(sigma_rel) for sigma_rel in sigma_rels]
        sources = [*zip(made.high, [tensors.high[index] for index in chosen], strict=True)]
        if not standing.early:
            sources += zip(made.low, [tensors.low[index] for index in chosen], strict=True)
        means = [*zip(made.means(standing.early), (chosen[0], chosen[-1]), strict=False)]
        for tile in tiles_of(tensors.layout):
            bucket, where = tile.bucket, tile.where
            for target, source in sources:
                target.flats[bucket][where] = source.flats[bucket][where]
            for target, index in means:
                mean = target.flats[bucket][where]
                mean.copy_(self._mean(tile, index, self._scratch_of(tile, 0)[0])[: len(mean)])
        standing = replace(standing, inherited=tuple(standing.inherited[index] for index in chosen))
        return RunningAverages(tuple(sigma_rels), standing, made, self.copies, known_path=self.known_path)

    @torch.no_grad()
    def values(self, tile: BucketTile, profile: int, thread: int = 0) -> torch.Tensor:
        """Return a tile of an average, flat: rounded once to float32, or float64 if its parameters are.

        The memory is the thread's scratch: it may be written to, and is valid until the thread's next call.
        """
        tensors, bucket, where = self.tensors, tile.bucket, tile.where
        assert tensors is not None
        result, change = self._scratch_of(tile, thread)
        high = tensors.high[profile].flats[bucket][where]
        if high.dtype == torch.float64:
            return result.copy_(high)
        window, mass = self.standing.window, self.standing.masses(self.gammas)[profile]
        if self.standing.early:
            if not window:
                return result.copy_(high)
            return torch.lerp(high, self._mean(tile, profile, change), mass, out=result)
        result.copy_(tensors.low[profile].flats[bucket][where])
        if window:
            torch.sub(tensors.mean.flats[bucket][where], high, out=change)
            torch.lerp(result, change, mass, out=result)
        return result.add_(high)

    @torch.no_grad()
    def read(self, index: int, ranges: Sequence[ElementRange], pool: ThreadPool = SINGLE_THREAD) -> list[torch.Tensor]:
        """Return ranges of the average of that index, rounded once, on the host; adjacent ranges share memory."""
        tensors = self.tensors
        assert tensors is not None
        bucket_of = {name: number for number, bucket in enumerate(tensors.layout) for name in bucket.names}
        runs: list[tuple[int, list[int]]] = []  # for adjacent ranges: their bucket, and the bounds of each
        for name, begin, end in ranges:
            number = bucket_of[name]
            first = tensors.layout[number].places[name][0]
            if not runs or runs[-1][0] != number or runs[-1][1][-1] != first + begin:
                runs.append((number, [first + begin]))
            runs[-1][1].append(first + end)
        values: list[torch.Tensor] = []
        items: list[tuple[BucketTile, torch.Tensor]] = []
        for number, bounds in runs:
            bucket, first = tensors.layout[number], bounds[0]
            run = torch.empty(bounds[-1] - first, dtype=bucket.wide)
            values += torch.split(run, [end - begin for begin, end in pairwise(bounds)])
            for begin in range(first, bounds[-1], bucket.tile):
                end = min(begin + bucket.tile, bounds[-1])
                items.append((BucketTile(0, number, begin, end), run[begin - first : end - first]))
        pool.each(lambda item, thread: item[1].copy_(self.values(item[0], index, thread)), items)
        return values

    @torch.no_grad()
    def path(self, pool: ThreadPool = SINGLE_THREAD, exact: bool = False) -> PathSketch | None:
        """Return the path of the weights up to the last update; unless `exact`, an open window is closed there."""
        tensors, sketcher, standing = self.tensors, self.sketcher, self.standing
        if tensors is None or sketcher is None:
            return self.known_path if exact or self.known_path is None else closed(self.known_path)
        is_open = standing.window > 0 and not exact and not standing.early
        if is_open:
            flats = tensors.mean.flats
            pool.each(lambda tile, _: sketcher.take(tile, flats[tile.bucket][tile.where]), tiles_of(tensors.layout))
        path = sketcher.path(standing.t if is_open else None)
        return path if exact or path is None else closed(path)

    def _scratch_of(self, tile: BucketTile, thread: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two scratch tensors of a thread for a tile, in the averages' dtype."""
        assert self.tensors is not None
        bucket = self.tensors.layout[tile.bucket]
        key = (thread, bucket.device, bucket.wide)
        if key not in self._scratch:
            with torch.inference_mode(False):  # otherwise later calls could not write to them
                first, second = (torch.empty(bucket.tile, dtype=bucket.wide, device=bucket.device) for _ in range(2))
            self._scratch[key] = first, second
        first, second = self._scratch[key]
        return first[: tile.end - tile.begin], second[: tile.end - tile.begin]

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the averages, the copies, the sketcher and the scratch."""
        held = sum(part.nbytes for part in (self.tensors, self.sketcher) if part is not None)
        scratch = (tensor.nbytes for pair in self._scratch.values() for tensor in pair)
        return held + sum(scratch) + sum(copy.nbytes for copy in self.copies.values())


class _Update:
    """One update: the shares of the new values, and the work on each tile of them, for any thread of a pool.

    Attributes:
        folds: whether the update ends a window, so that its means are folded into the averages.
        largest_share: the largest share of the new values in a mean or an average.
    """

    def __init__(self, averages: RunningAverages, values: LayoutReader, wanted: Sampled, t: float, step: int) -> None:
        self._averages, self._values, self._wanted = averages, values, wanted
        self._before, gammas = (before := averages.standing), averages.gammas
        self._shares = [new_value_share(gamma, before.t, t) for gamma in gammas]
        self._after = before.after(self._shares, t, step)
        self._masses = self._after.masses(gammas)  # of the window in each average, and the value's share in that
        self._factors = [share / mass for share, mass in zip(self._shares, self._masses, strict=True)]
        self.folds = window_ends(gammas, self._after.window, before.folded_t, t, before.early)
        self.largest_share = max(self._factors if before.window else self._shares)

    def begin(self) -> None:
        """Prepare the work on tiles, when the averages' memory is allocated."""
        assert self._averages.tensors is not None
        self._tensors, early = self._averages.tensors, self._before.early
        last = (self._factors[0], self._factors[-1]) if self._before.window else (1.0, 1.0)
        self._interpolated = [] if self.folds else [*zip(self._tensors.means(early), last, strict=False)]
        self._interpolated_float64 = [*zip(self._tensors.high, self._shares, strict=True)]
        self._interpolated_float64 += [] if early else self._interpolated

    def take(self, tile: BucketTile, thread: int) -> None:
        """Take in a tile."""
        self._take(tile, self._values.values(tile, thread), thread)

    def take_up_to(self, limits: Sequence[float], pool: ThreadPool) -> tuple[list[float], list[BucketTile]]:
        """Take in the tiles whose norms are within limits; return all norms, and the other tiles."""
        values, norms, others = self._values, [0.0] * len(limits), list[BucketTile]()

        def take_if_small(tile: BucketTile, thread: int) -> None:
            flat = values.flat(tile, thread)
            norms[tile.number] = norm = float(torch.linalg.vector_norm(flat))
            if norm <= limits[tile.number]:
                self._take(tile, values.wide(flat, tile, thread), thread)
            else:
                others.append(tile)

        pool.each(take_if_small, values.tiles)
        return norms, others

    def undo(self, tile: BucketTile, thread: int) -> None:
        """Undo the update of a tile that was taken in."""
        self._interpolate(tile, self._values.values(tile, thread), undo=True)

    def end(self) -> Standing:
        """Return the standing when all tiles are taken in; low parts begin after the first fold late in a run."""
        after, sketcher = self._after, self._averages.sketcher
        if self.folds:
            count = None if after.folds is None else after.folds + 1
            if count is not None and is_late(after.window, after.folded_t, after.t):
                self._tensors.clear_low()
                count = None
            after = replace(after, window=0, folded_t=after.t, folds=count)
        if sketcher is not None and self._before.early:
            sketcher.end_value(self._averages.gammas, after.t, not after.early)
        elif sketcher is not None and self.folds:
            sketcher.end_window(after.t)
        return after

    def _take(self, tile: BucketTile, values: torch.Tensor, thread: int) -> None:
        sketcher = self._averages.sketcher
        for elements, buffers in self._wanted:
            elements.take(tile, values, buffers)
        if sketcher is not None and self._before.early:
            sketcher.take(tile, values)
        self._interpolate(tile, values)
        if self.folds:
            self._fold(tile, values, thread)

    def _interpolate(self, tile: BucketTile, values: torch.Tensor, undo: bool = False) -> None:
        for flat, factor in self._interpolated_float64 if values.dtype == torch.float64 else self._interpolated:
            changed = flat.flats[tile.bucket][tile.where]
            if factor < 1:
                torch.lerp(changed, values, factor / (factor - 1) if undo else factor, out=changed)
            else:  # the earlier contents do not count
                changed.copy_(values)

    def _fold(self, tile: BucketTile, newest: torch.Tensor, thread: int) -> None:
        """Fold a tile of the means, with the newest values, into the averages."""
        tensors, bucket, where, before = self._tensors, tile.bucket, tile.where, self._before
        scratch, change = self._averages._scratch_of(tile, thread)
        for profile, (share, mass) in enumerate(zip(self._factors, self._masses, strict=True)):
            mean = newest
            if before.window:
                mean = torch.lerp(self._averages._mean(tile, profile, change), newest, share, out=change)
            if profile == 0 and self._averages.sketcher is not None and not before.early:
                self._averages.sketcher.take(tile, mean)
            if mean.dtype == torch.float64:
                return  # float64 averages have taken in every value already
            high = tensors.high[profile].flats[bucket][where]
            torch.sub(mean, high, out=change)
            if before.folds is not None:
                torch.sign(change, out=scratch).mul_(high).view(torch.int32).bitwise_and_(EXPONENT)
                dither = (GOLDEN * (before.folds + 1) % 1 - 0.5) * 2**-23
                high.add_(change.mul_(mass).add_(scratch, alpha=dither))
                continue
            low = tensors.low[profile].flats[bucket][where]
            torch.lerp(scratch.copy_(low), change, mass, out=scratch)
            change.copy_(high)
            high.add_(scratch)
            low.copy_(scratch.add_(change.sub_(high)))
