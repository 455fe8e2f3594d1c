"""The tracked averages: their state, and the arithmetic of one update.

A float32 average stops moving in a long run: a change of less than half its last digit is lost,
always in the same direction. So each profile has two float32 tensors: `mean` of the values since
the last fold (the window), weighted as the profile weighs them, and `high`, its average at the last
fold. An update is one linear interpolation of each mean, as in other EMA hooks. A fold, after
`WINDOW` updates or an eighth of the run, adds the mean with the profile's mass m of the window, and
a share u of each element's last digit, |u| < 1/2, before the sum is rounded:

    high' = fl(high + m (mean - high) + u ulp(high)),    m = 1 - (t_folded / t)^(gamma + 1)

u is a multiple of the golden ratio, modulo 1, by the number of the fold: the same for all elements,
and so independent of threads, parts and devices. These shares average out, so that small steps are
not lost, and each fold leaves one rounding error; n folds leave (n / (2 gamma + 3))^(1/2) of them.
A mean is not dithered: where a weight moves steadily by some digits an update, always rounded
alike, it lags behind by up to a quarter of a digit for each update in it.

Where `FEWEST_SHARED` updates take less than a thousandth of training, the mean of the first
profile, of the largest gamma, serves all for as long, and the others rest. Within a window of
relative length L the weights of another gamma' differ from it by (gamma - gamma') L: noise leaves
((gamma - gamma') L)^2 / 12 of its variance's share in the average, drift (gamma - gamma') L^2 / 12
of the path. The newest value enters each mean with the profile's own share.

The relative L2 error against sums in float64 is at most 1.5e-6 in 1,000,000 updates
(scripts/long_runs.py). Tensors of float64 parameters are float64: their folds are not dithered, and
they share no mean.

On the CPU an update reads the model once: checking all values first would take up to twice the
time. A tile whose norm is finite, and at most twice that at the last update, is taken in
immediately; the others wait until all values are known to be finite. If one is not, the tiles taken
in with share f are undone by an interpolation by f / (f - 1), to 50 u A for means of values up to
A, with u = 2^-24. All values are checked first if that error would be larger (f above
`MOST_UNDONE`), at a fold, after a refused update, so that errors do not add up, and on
accelerators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from posthoc_cli.profiles import gamma_from_sigma_rel
from posthoc_cli.reconstruction import ROUNDING
from posthoc_cli.snapshots.snapshot import START, Moment
from posthoc_cli.snapshots.source import PathSketch
from posthoc_cli.tracker.background import SINGLE_THREAD, ThreadPool
from posthoc_cli.tracker.folding import (
    WINDOW,
    lasting_roundings,
    may_share_mean,
    new_value_share,
    window_ends,
)
from posthoc_cli.tracker.measuring import Sketcher, close_window, join_buckets
from posthoc_cli.tracker.memory import (
    BucketTile,
    Elements,
    FlatTensors,
    Layout,
    TileReader,
    find_places,
    is_on_host,
    tile_buckets,
)

# the bits of a float32 that alone are the largest power of two not above its size
SIGN_AND_EXPONENT = -0x80_0000
# the largest share of a new value in a mean that may be undone: roundings grow by 1 / (1 - share)
MOST_UNDONE = 3 / 4
LARGEST = torch.finfo(torch.float32).max
# the inverse of the golden ratio, whose multiples, modulo 1, are spread most evenly
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Standing:
    """The state of the averages, except their tensors, at the last update."""

    last: Moment = START
    t_first: float = 0.0  # the time of the first update
    max_interval: float = 0.0  # the longest time between two updates so far
    updates: int = 0
    window: int = 0  # updates since the last fold
    folds: int = 0
    folded_t: float = 0.0  # the time of the last fold
    shared: bool = False  # whether the first profile's mean serves all profiles since the last fold
    # of averages that were read from snapshots: their relative error, and their time
    rounding: float = 0.0
    rounded_t: float = 0.0

    @property
    def t(self) -> float:
        return self.last.t

    @property
    def step(self) -> int:
        return self.last.step

    def after(self, gammas: Sequence[float], last: Moment, folds: bool) -> Standing:
        """Make the standing after an update, which folds the means or not."""
        t = last.t
        max_interval = 0.0
        if self.t:
            max_interval = max(self.max_interval, t - self.t)
        after = replace(
            self,
            last=last,
            t_first=self.t_first or t,
            window=self.window + 1,
            max_interval=max_interval,
            updates=self.updates + 1,
        )
        if not folds:
            return after
        return replace(
            after,
            window=0,
            folds=self.folds + 1,
            folded_t=t,
            shared=may_share_mean(gammas, after.window, self.folded_t, t),
        )

    def shares(self, gammas: Sequence[float], t: float) -> Shares:
        """Decide how an update at time `t` is taken in."""
        new = []
        masses = []
        for gamma in gammas:
            mass = new_value_share(gamma, self.folded_t, t)
            share = 1.0
            if self.window:
                share = new_value_share(gamma, self.t, t) / mass
            new.append(share)
            masses.append(mass)
        window = self.window + 1
        folds = window_ends(gammas, window, self.folded_t, t, self.shared)
        return Shares(new, masses, folds)


class Shares(NamedTuple):
    """The shares of an update for each profile: of its values in the mean, and of the mean in the
    average, to which the mean is added if the update `folds`."""

    new: list[float]
    masses: list[float]
    folds: bool


class AverageTensors:
    """The tensors by profile: `high`, the average at the last fold, and the `mean` of the values
    since then."""

    def __init__(self, layout: Layout, profiles: int) -> None:
        self.layout = layout
        wide = tuple(replace(bucket, dtype=bucket.wide) for bucket in layout)
        self.places = find_places(wide)
        self.mean = [FlatTensors(wide) for _ in range(profiles)]
        self.high = [FlatTensors(wide) for _ in range(profiles)]
        for tensors in self.mean + self.high:
            for flat in tensors.flats:
                flat.zero_()  # so that the system allocates the memory now, not at the first write

    @property
    def nbytes(self) -> int:
        return sum(tensors.nbytes for tensors in self.mean + self.high)

    @cached_property
    def _means(self) -> list[list[Tensor]]:
        """Each tile of the means."""
        means = []
        for tile in tile_buckets(self.layout):
            means.append([mean.tile(tile) for mean in self.mean])
        return means

    def means(self, tile: BucketTile, shared: bool) -> list[Tensor]:
        """Return a tile of the means in use: one for each profile, or the first alone."""
        means = self._means[tile.number]
        if shared and means[0].dtype != torch.float64:
            return means[:1]
        return means

    def mean_view(
        self,
        profile: int,
        name: str,
        shared: bool,
    ) -> Tensor:
        """View the mean of a tensor that serves a profile."""
        first = self.mean[0].views[name]
        if shared and first.dtype != torch.float64:
            return first
        return self.mean[profile].views[name]

    def copy_to(self, layout: Layout) -> AverageTensors:
        """Copy the averages to another layout of the same names."""
        copy = AverageTensors(layout, len(self.high))
        targets = copy.mean + copy.high
        sources = self.mean + self.high
        for target, source in zip(targets, sources, strict=True):
            for name, view in target.views.items():
                view.copy_(source.views[name])
        return copy


@dataclass
class Averages:
    """Averages of the same tensors with several profiles, in ascending order. One thread at a time
    may work on them."""

    sigma_rels: tuple[float, ...]
    standing: Standing = field(default_factory=Standing)
    # none before the first update
    tensors: AverageTensors = field(default_factory=lambda: AverageTensors((), 0))
    # at the last update; never changed in place
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    # the model's values of a snapshot's sample at the last update
    sample: Sequence[Tensor] | None = None
    earlier_samples: tuple[Sequence[Tensor], ...] = ()  # at the two updates before
    # gets every value, or each window's mean where one mean serves all profiles
    sketcher: Sketcher | None = None
    # that `sketcher` continues; in a copy for reading, the path at that time
    known_path: PathSketch | None = None

    def __post_init__(self) -> None:
        self.gammas = tuple(map(gamma_from_sigma_rel, self.sigma_rels))
        # largest norms of tiles that need no check; empty: check all values first
        self._limits: list[float] = []
        self._scratch: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @property
    def exist(self) -> bool:
        return self.standing.t > 0

    @property
    def nbytes(self) -> int:
        parts: list[Any] = [*self._scratch.values(), *self.copies.values(), self.tensors]
        if self.sketcher is not None:
            parts.append(self.sketcher)
        return sum(part.nbytes for part in parts)

    @torch.no_grad()
    def update_(
        self,
        values: TileReader,
        copies: Mapping[str, Tensor],
        moment: Moment,
        pool: ThreadPool,
        sampled: Elements,
        sketcher: Sketcher | None,
    ) -> str | None:
        """Take in the model's values of a moment: averages <- averages + (1 - beta) (values -
        averages).

        If a value is nan or infinite, nothing changes, and the first tensor with such a value is
        returned.
        """
        before = self.standing
        shares = before.shares(self.gammas, moment.t)
        limits = self._take_limits(values.layout, shares)
        norms = [0.0] * len(limits)
        if not limits:
            norms = values.norms(pool)
        if (name := values.nonfinite_name(norms)) is not None:
            return name
        self._allocate(values.layout, pool.size)
        self.sketcher = sketcher
        self.known_path = None
        update = _Update(self, values, shares, sampled)
        if limits and (name := update.take_ordinary(norms, limits, pool)) is not None:
            return name
        update.take_others(pool)
        if is_on_host(values.layout):
            self._limits = [min(2 * norm, LARGEST) for norm in norms]
        self.copies = copies
        if self.sample is not None:
            self.earlier_samples = (*self.earlier_samples[-1:], self.sample)
        self.sample = update.sample
        self.standing = before.after(self.gammas, moment, shares.folds)
        if sketcher is not None:
            self._sketch(sketcher, before.shared, shares.folds)
        return None

    def _sketch(
        self,
        sketcher: Sketcher,
        was_shared: bool,
        folds: bool,
    ) -> None:
        """Add to the path what an update has given to its sketch: its values, or at a fold the
        mean that profiles share."""
        now = self.standing
        if not was_shared:
            sketcher.end_value(self.gammas, now.t, now.shared)
        elif folds:
            sketcher.end(now.t, 1.0, ends=True)

    def _take_limits(self, layout: Layout, shares: Shares) -> list[float]:
        """Take the norms up to which tiles need no check; none if all values are to be checked
        first, as after an update that is refused or fails."""
        limits = self._limits
        self._limits = []
        if self.tensors.layout != layout:
            return []
        is_lasting = shares.folds or max(shares.new) > MOST_UNDONE
        return [] if is_lasting else limits

    @torch.no_grad()
    def values(
        self,
        tile: BucketTile,
        profile: int,
        thread: int = 0,
    ) -> Tensor:
        """Compute a tile of an average, flat, rounded once, in scratch that is valid until the
        thread's next call."""
        tensors = self.tensors
        standing = self.standing
        result = self.make_scratch(tile, thread)[0]
        high = tensors.high[profile].tile(tile)
        if not standing.window:
            return result.copy_(high)
        means = tensors.means(tile, standing.shared)
        mean = means[min(profile, len(means) - 1)]
        return torch.lerp(high, mean, self._mass(profile), out=result)

    def _mass(self, profile: int) -> float:
        """Compute the share of the mean in an average."""
        standing = self.standing
        return new_value_share(self.gammas[profile], standing.folded_t, standing.t)

    @torch.no_grad()
    def read(self, profile: int, name: str) -> Tensor:
        """Read the average of a tensor, rounded once, on the host."""
        standing = self.standing
        average = self.tensors.high[profile].views[name]
        if standing.window:
            mean = self.tensors.mean_view(profile, name, standing.shared)
            average = torch.lerp(average, mean, self._mass(profile))
        return average.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def predicted_error(self, profile: int) -> float:
        """Predict the relative L2 error of an average: of its arithmetic, and of the rounded
        snapshots that it has continued from, if these still count."""
        standing = self.standing
        gamma = self.gammas[profile]
        spacings = [torch.finfo(bucket.wide).eps for bucket in self.tensors.layout]
        spacing = max(spacings, default=0.0)  # some processes have no average
        own = lasting_roundings(self.gammas, gamma, standing.updates, self._smooth_share())
        kept = (standing.rounded_t / standing.t) ** (gamma + 1)
        return math.hypot(ROUNDING * spacing * own, standing.rounding * kept)

    def _smooth_share(self) -> float:
        """Find the share of the weights that move too steadily for the roundings of a mean to
        differ: the change of their steps is below its number of values in last digits."""
        if self.sample is None or len(self.earlier_samples) < 2:
            return 1.0
        first, second = map(join_buckets, self.earlier_samples)
        newest = join_buckets(self.sample)
        with np.errstate(all="ignore"):  # values that float32 cannot hold
            scatter = np.abs(newest - 2 * second + first) / np.spacing(np.abs(newest))
            squares = np.square(newest, dtype=np.float64)
            smooth = squares[scatter < min(WINDOW, self.standing.updates / 8)].sum()
            share = float(smooth / squares.sum())
        return share if math.isfinite(share) else 1.0

    @torch.no_grad()
    def path(
        self,
        pool: ThreadPool = SINGLE_THREAD,
        exact: bool = False,
    ) -> PathSketch | None:
        """Return the path of the weights up to the last update; unless `exact`, an open window is
        closed there."""
        tensors = self.tensors
        sketcher = self.sketcher
        standing = self.standing
        path = self.known_path
        if sketcher is not None:
            last_t = None
            if standing.shared and standing.window and not exact:
                mean = tensors.mean[0]

                def take(tile: BucketTile, _: int) -> None:
                    sketcher.take(tile, mean.tile(tile))

                pool.each(take, tile_buckets(tensors.layout))
                last_t = standing.t
            path = sketcher.path(last_t)
        return path if exact or path is None else close_window(path)

    def _allocate(self, layout: Layout, threads: int) -> None:
        """Allocate averages of a layout, and scratch for threads, before a value is changed: memory
        may run out."""
        if not self.tensors.high:
            self.tensors = AverageTensors(layout, len(self.gammas))
        elif self.tensors.layout != layout:
            self.tensors = self.tensors.copy_to(layout)
            self._scratch.clear()  # it is as large as the old layout's tiles
        for bucket in range(len(layout)):
            for thread in range(threads):
                self.make_scratch(BucketTile(0, bucket, 0, 0), thread)

    def make_scratch(self, tile: BucketTile, thread: int) -> list[Tensor]:
        """Make two scratch tensors of a thread for a tile, in the averages' dtype."""
        bucket = self.tensors.layout[tile.bucket]
        key = thread, bucket.device, bucket.wide
        if key not in self._scratch:
            sizes = [0]
            for other in self.tensors.layout:
                if (other.device, other.wide) == (bucket.device, bucket.wide):
                    sizes.append(min(other.size, other.tile))
            with torch.inference_mode(False):  # otherwise later calls could not write to them
                pair = torch.empty(2, max(sizes), dtype=bucket.wide, device=bucket.device)
            self._scratch[key] = pair
        size = tile.end - tile.begin
        return [*self._scratch[key][:, :size]]


class _Update:
    """Takes the values of one update into averages, tile by tile, in the threads of a pool."""

    def __init__(
        self,
        averages: Averages,
        values: TileReader,
        shares: Shares,
        sampled: Elements,
    ) -> None:
        self.sample = sampled.buffers()
        self._sampled = sampled
        self._sample_views = sampled.views(self.sample)
        self._averages = averages
        self._tensors = averages.tensors
        self._sketcher = averages.sketcher
        self._before = averages.standing
        self._values = values
        self._shares = shares
        self._taken = list[BucketTile]()  # before all values were known to be finite

    def take_ordinary(
        self,
        norms: list[float],
        limits: Sequence[float],
        pool: ThreadPool,
    ) -> str | None:
        """Take the tiles whose norms are within limits; fill in the norms.

        If a value is not finite, take none, and return the first tensor with such a value.
        """

        def take(tile: BucketTile, thread: int) -> None:
            value = self._values.values(tile, thread)
            norm = math.sqrt(torch.dot(value, value))  # in half the time of `vector_norm`
            norms[tile.number] = norm
            if norm <= limits[tile.number]:
                self._take(tile, value, thread)
                self._taken.append(tile)

        pool.each(take, self._values.tiles)
        name = self._values.nonfinite_name(norms)
        if name is not None:
            pool.each(self._undo, self._taken)
        return name

    def take_others(self, pool: ThreadPool) -> None:
        """Take the tiles that are not taken yet."""

        def take(tile: BucketTile, thread: int) -> None:
            value = self._values.values(tile, thread)
            self._take(tile, value, thread)

        others = set(self._values.tiles).difference(self._taken)
        pool.each(take, others)

    def _undo(self, tile: BucketTile, thread: int) -> None:
        """Restore the means of a tile that was taken."""
        weights = [share / (share - 1) for share in self._shares.new]
        value = self._values.values(tile, thread)
        self._interpolate(tile, value, weights)

    def _take(
        self,
        tile: BucketTile,
        value: Tensor,
        thread: int,
    ) -> None:
        self._sampled.take(tile, value, self._sample_views)
        if self._sketcher is not None and not self._before.shared:
            self._sketcher.take(tile, value)
        if self._shares.folds:
            self._fold(tile, value, thread)
        else:
            self._interpolate(tile, value, self._shares.new)

    def _interpolate(
        self,
        tile: BucketTile,
        value: Tensor,
        weights: Sequence[float],
    ) -> None:
        means = self._tensors.means(tile, self._before.shared)
        for mean, weight in zip(means, weights, strict=False):
            if self._before.window:
                torch.lerp(mean, value, weight, out=mean)
            else:
                mean.copy_(value)

    def _fold(
        self,
        tile: BucketTile,
        value: Tensor,
        thread: int,
    ) -> None:
        before = self._before
        means = self._tensors.means(tile, before.shared)
        change, digit = self._averages.make_scratch(tile, thread)
        dither = GOLDEN * (before.folds + 1) % 1 - 0.5
        for profile, mass in enumerate(self._shares.masses):
            mean = value
            if before.window:
                earlier = means[min(profile, len(means) - 1)]
                share = self._shares.new[profile]
                mean = torch.lerp(earlier, value, share, out=change)
            if profile == 0 and self._sketcher is not None and before.shared:
                self._sketcher.take(tile, mean)
            high = self._tensors.high[profile].tile(tile)
            torch.sub(mean, high, out=change)
            if high.dtype == torch.float64:
                high.add_(change, alpha=mass)
            else:
                _add_dithered(high, change, digit, mass, dither)


def _add_dithered(
    high: Tensor,
    change: Tensor,
    digit: Tensor,
    mass: float,
    dither: float,
) -> None:
    """Add a share of the change, and less than half of the last digit, which alone changes no
    element (above 1e-37); `change` and `digit` are overwritten."""
    # The last digit away from 0, or towards it: towards 0 the last digit of a power of two is half
    # as large.
    bits = digit.view(torch.int32)
    if dither > 0:
        torch.bitwise_and(high.view(torch.int32), SIGN_AND_EXPONENT, out=bits)
    else:
        torch.mul(high, 1 - 2**-24, out=digit)
        bits.bitwise_and_(SIGN_AND_EXPONENT)
    change.mul_(mass).add_(digit, alpha=dither * 2**-23)
    high.add_(change)
