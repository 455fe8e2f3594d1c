"""The tracked averages: their state, and the arithmetic of one update.

A float32 average stops moving in a long run: a change of less than half its last digit is lost,
always in the same direction. So each profile has two float32 tensors: `mean` of the values since
the last fold (the window), weighted as the profile weighs them, and `high`, its average at the last
fold. An update is one linear interpolation of each mean, as in other EMA hooks. A fold, after
`WINDOW` updates or an eighth of the run, adds the mean with the profile's mass m of the window, and
a share u of the last digit, |u| < 1/2, of each element that changes, before the sum is rounded:

    high' = fl(high + m (mean - high) + u ulp(high)),    m = 1 - (t_folded / t)^(gamma + 1)

u is a multiple of the golden ratio, modulo 1, by the number of the fold: the same for all elements,
and so independent of threads, parts and devices. These shares average out, so that small steps are
not lost, and each fold leaves one rounding error; n folds leave (n / (2 gamma + 3))^(1/2) of them.
A mean is not dithered: where a weight moves steadily by some digits an update, always rounded
alike, it lags behind by up to a quarter of a digit for each update in it.

Where `WINDOW` updates take less than a thousandth of training, the mean of the first profile, of
the largest gamma, serves all, and the others rest. Within a window of relative length L the weights
of another gamma' differ from it by (gamma - gamma') L: noise leaves ((gamma - gamma') L)^2 / 12 of
its variance's share in the average, drift (gamma - gamma') L^2 / 12 of the path. The newest value
enters each mean with the profile's own share.

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

import torch

from posthoc_cli.profiles import gamma_from_sigma_rel, may_share_mean, new_value_share, window_ends
from posthoc_cli.snapshots.path import PathSketch
from posthoc_cli.snapshots.sources import ElementRange
from posthoc_cli.tracker.background import SINGLE_THREAD, ThreadPool
from posthoc_cli.tracker.measuring import Sketcher, closed
from posthoc_cli.tracker.memory import (
    Elements,
    FlatTensors,
    Layout,
    Reader,
    Tile,
    places_of,
    tiles_of,
)

# the bits of a float32 that alone are the largest power of two not above its size
SIGN_AND_EXPONENT = -0x80_0000
# the largest share of a new value in a mean that may be undone: roundings grow by 1 / (1 - share)
MOST_UNDONE = 3 / 4
# the inverse of the golden ratio, whose multiples, modulo 1, are spread most evenly
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Standing:
    """The state of the averages, except their tensors, at the last update."""

    t: float = 0.0
    step: int = 0
    t_first: float = 0.0  # the time of the first update
    max_interval: float = 0.0  # the longest time between two updates so far
    updates: int = 0
    window: int = 0  # updates since the last fold
    folds: int = 0
    folded_t: float = 0.0  # the time of the last fold
    shared: bool = False  # whether the first profile's mean serves all profiles since the last fold

    def after(self, t: float, step: int) -> Standing:
        """Return the standing after an update, before a fold."""
        return replace(
            self,
            t=t,
            step=step,
            t_first=self.t_first or t,
            window=self.window + 1,
            max_interval=max(self.max_interval, t - self.t) if self.t else 0.0,
            updates=self.updates + 1,
        )

    def masses(self, gammas: Sequence[float]) -> list[float]:
        """Return the share that the values since the last fold have in each average."""
        return [
            new_value_share(gamma, self.folded_t, self.t) if self.window else 0.0
            for gamma in gammas
        ]


class AverageTensors:
    """The tensors by profile: `high`, the average at the last fold, and the `mean` of the values
    since then."""

    def __init__(self, layout: Layout, profiles: int) -> None:
        self.layout = layout
        wide = tuple(replace(bucket, dtype=bucket.wide) for bucket in layout)
        self.places = places_of(wide)
        self.mean = [FlatTensors(wide) for _ in range(profiles)]
        self.high = [FlatTensors(wide) for _ in range(profiles)]
        for tensors in (*self.mean, *self.high):
            for (flat,) in tensors.slabs:
                flat.zero_()  # so that the system allocates the memory now, not at the first write

    @property
    def nbytes(self) -> int:
        return sum(tensors.nbytes for tensors in (*self.mean, *self.high))

    def means(self, tile: Tile, shared: bool) -> list[torch.Tensor]:
        """Return a tile of the means in use: one a profile, or the first alone."""
        first = self.mean[0].tile(tile)
        if shared and first.dtype != torch.float64:
            return [first]
        return [mean.tile(tile) for mean in self.mean]

    def copied(self, layout: Layout) -> AverageTensors:
        """Return a copy in another layout of the same names."""
        made = AverageTensors(layout, len(self.high))
        for target, source in zip((*made.mean, *made.high), (*self.mean, *self.high), strict=True):
            for name, view in target.views.items():
                view.copy_(source.views[name], non_blocking=True)
        return made


@dataclass
class Averages:
    """Averages of the same tensors with several profiles, in ascending order. One thread at a time
    may work on them."""

    sigma_rels: tuple[float, ...]
    standing: Standing = field(default_factory=Standing)
    tensors: AverageTensors | None = None  # before the first update
    # at the last update; never changed in place
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # the model's values of a snapshot's sample at the last update
    sample: Sequence[torch.Tensor] | None = None
    # gets every value, or each window's mean where one serves all profiles
    sketcher: Sketcher | None = None
    # that `sketcher` continues; in a copy for reading, the path at that time
    known_path: PathSketch | None = None

    def __post_init__(self) -> None:
        self.gammas = tuple(gamma_from_sigma_rel(sigma_rel) for sigma_rel in self.sigma_rels)
        # largest norms of tiles that need no check; empty: check all values first
        self._limits: list[float] = []
        self._scratch: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}

    @property
    def exist(self) -> bool:
        return self.standing.t > 0

    @property
    def nbytes(self) -> int:
        held = (self.tensors, self.sketcher, *self._scratch.values(), *self.copies.values())
        return sum(part.nbytes for part in held if part is not None)

    @torch.no_grad()
    def update_(
        self,
        values: Reader,
        copies: Mapping[str, torch.Tensor],
        t: float,
        step: int,
        pool: ThreadPool = SINGLE_THREAD,
        sampled: Elements | None = None,
        sketcher: Sketcher | None = None,
    ) -> str | None:
        """Take in the model's values at time `t`: averages <- averages + (1 - beta) (values -
        averages).

        If a value is nan or infinite, nothing changes, and the first tensor with such a value is
        returned.
        """
        before = self.standing
        gammas = self.gammas
        limits = self._limits
        # after an update that is refused or fails, the next one checks all values first
        self._limits = []
        after = before.after(t, step)
        masses = after.masses(gammas)
        factors = [1.0] * len(gammas)
        if before.window:
            shares = [new_value_share(gamma, before.t, t) for gamma in gammas]
            factors = [share / mass for share, mass in zip(shares, masses, strict=True)]
        folds = window_ends(gammas, after.window, before.folded_t, t, before.shared)
        moves = self.tensors is None or self.tensors.layout != values.layout
        checks_first = folds or moves or not limits or max(factors) > MOST_UNDONE
        norms = values.norms(pool) if checks_first else [0.0] * len(limits)
        if (name := values.nonfinite_name(norms)) is not None:
            return name
        self._allocate(values.layout, pool.size)
        self.sketcher = sketcher
        self.known_path = None
        assert self.tensors is not None
        sample = None if sampled is None else sampled.buffers()
        fold = masses if folds else None
        update = _Update(self, self.tensors, before, values, factors, fold, sampled, sample)
        if not checks_first:
            pool.each(lambda tile, thread: update.try_(tile, thread, norms, limits), values.tiles)
            if (name := values.nonfinite_name(norms)) is not None:
                pool.each(update.undo, update.taken)
                return name
        pool.each(update.take, {*values.tiles}.difference(update.taken))
        if all(bucket.device.type == "cpu" for bucket in values.layout):
            self._limits = [min(2 * norm, torch.finfo(torch.float32).max) for norm in norms]
        if folds:
            shared = may_share_mean(after.window, after.folded_t, t)
            after = replace(after, window=0, folds=after.folds + 1, folded_t=t, shared=shared)
        self.copies = copies
        self.sample = sample
        self.standing = after
        if sketcher is not None and not before.shared:
            sketcher.end_value(gammas, t, after.shared)
        elif sketcher is not None and folds:
            sketcher.end_window(t)
        return None

    @torch.no_grad()
    def values(self, tile: Tile, profile: int, thread: int = 0) -> torch.Tensor:
        """Return a tile of an average, flat, rounded once, in scratch that is valid until the
        thread's next call."""
        tensors = self.tensors
        standing = self.standing
        result = self.scratch_of(tile, thread)[0]
        assert tensors is not None
        high = tensors.high[profile].tile(tile)
        if not standing.window:
            return result.copy_(high)
        means = tensors.means(tile, standing.shared)
        mean = means[min(profile, len(means) - 1)]
        mass = standing.masses(self.gammas)[profile]
        return torch.lerp(high, mean, mass, out=result)

    @torch.no_grad()
    def read(
        self, index: int, ranges: Sequence[ElementRange], pool: ThreadPool = SINGLE_THREAD
    ) -> list[torch.Tensor]:
        """Return ranges of the average of that index, rounded once, on the host."""
        assert self.tensors is not None
        # of neighbouring ranges, in whole rows: the bucket, the begin, and the sizes
        runs: list[tuple[int, int, list[int]]] = []
        end_of_run = None
        for name, begin, end in ranges:
            number, place = self.tensors.places[name]
            first = place.begin + begin - begin % place.row
            last = place.begin + end + -end % place.row
            if (number, first) != end_of_run:
                runs.append((number, first, []))
            runs[-1][2].append(last - first)
            end_of_run = number, last
        spans: list[torch.Tensor] = []
        items: list[tuple[Tile, torch.Tensor]] = []
        for number, start, sizes in runs:
            bucket = self.tensors.layout[number]
            flat = torch.empty(sum(sizes), dtype=bucket.wide)
            spans += torch.split(flat, sizes)
            if not flat.numel():
                continue  # no slab holds a tensor without elements
            for piece in torch.split(flat, bucket.tile):
                items.append((Tile(0, number, start, start + piece.numel()), piece))
                start += piece.numel()
        pool.each(lambda item, thread: item[1].copy_(self.values(item[0], index, thread)), items)
        read = []
        for (name, begin, end), flat in zip(ranges, spans, strict=True):
            place = self.tensors.places[name][1]
            first = begin % place.row
            read.append(place.row_major(flat)[first : first + end - begin])
        return read

    @torch.no_grad()
    def path(self, pool: ThreadPool = SINGLE_THREAD, exact: bool = False) -> PathSketch | None:
        """Return the path of the weights up to the last update; unless `exact`, an open window is
        closed there."""
        tensors = self.tensors
        sketcher = self.sketcher
        standing = self.standing
        path = self.known_path
        if tensors is not None and sketcher is not None:
            is_open = standing.window > 0 and not exact and standing.shared
            if is_open:
                pool.each(
                    lambda tile, _: sketcher.take(tile, tensors.mean[0].tile(tile)),
                    tiles_of(tensors.layout),
                )
            path = sketcher.path(standing.t if is_open else None)
        return path if exact or path is None else closed(path)

    def _allocate(self, layout: Layout, threads: int) -> None:
        """Allocate averages of a layout, and scratch for threads, before a value is changed: memory
        may run out."""
        if self.tensors is None:
            self.tensors = AverageTensors(layout, len(self.gammas))
        elif self.tensors.layout != layout:
            self.tensors = self.tensors.copied(layout)
        for bucket in range(len(layout)):
            for thread in range(threads):
                self.scratch_of(Tile(0, bucket, 0, 0), thread)

    def scratch_of(self, tile: Tile, thread: int) -> list[torch.Tensor]:
        """Return two scratch tensors of a thread for a tile, in the averages' dtype."""
        assert self.tensors is not None
        bucket = self.tensors.layout[tile.bucket]
        key = (thread, bucket.device, bucket.wide)
        if key not in self._scratch:
            with torch.inference_mode(False):  # otherwise later calls could not write to them
                self._scratch[key] = torch.empty(
                    2, bucket.tile, dtype=bucket.wide, device=bucket.device
                )
        return [*self._scratch[key][:, : tile.end - tile.begin]]


@dataclass
class _Update:
    """Takes the values of one update into averages, tile by tile, from any thread of a pool.

    New values have the shares `factors` in the means; at a fold the means have the shares `masses`
    in the averages.
    """

    averages: Averages
    tensors: AverageTensors
    before: Standing
    values: Reader
    factors: Sequence[float]
    masses: Sequence[float] | None
    sampled: Elements | None
    sample: list[torch.Tensor] | None
    # before all values were known to be finite
    taken: list[Tile] = field(default_factory=list)

    def try_(self, tile: Tile, thread: int, norms: list[float], limits: Sequence[float]) -> None:
        """Note the norm of a tile, and take it if that is within its limit."""
        value = self.values.values(tile, thread)
        norms[tile.number] = float(torch.linalg.vector_norm(value))
        if norms[tile.number] <= limits[tile.number]:
            self._take(tile, value, thread)
            self.taken.append(tile)

    def take(self, tile: Tile, thread: int) -> None:
        self._take(tile, self.values.values(tile, thread), thread)

    def undo(self, tile: Tile, thread: int) -> None:
        """Restore the means of a tile that was taken."""
        weights = [factor / (factor - 1) for factor in self.factors]
        self._interpolate(tile, self.values.values(tile, thread), weights)

    def _take(self, tile: Tile, value: torch.Tensor, thread: int) -> None:
        if self.sampled is not None and self.sample is not None:
            self.sampled.take(tile, value, self.sample)
        if self.averages.sketcher is not None and not self.before.shared:
            self.averages.sketcher.take(tile, value)
        if self.masses is None:
            self._interpolate(tile, value, self.factors)
        else:
            self._fold(tile, value, thread, self.masses)

    def _interpolate(self, tile: Tile, value: torch.Tensor, weights: Sequence[float]) -> None:
        means = self.tensors.means(tile, self.before.shared)
        for own, weight in zip(means, weights, strict=False):
            if self.before.window:
                torch.lerp(own, value, weight, out=own)
            else:
                own.copy_(value)

    def _fold(self, tile: Tile, value: torch.Tensor, thread: int, masses: Sequence[float]) -> None:
        means = self.tensors.means(tile, self.before.shared)
        change, digit = self.averages.scratch_of(tile, thread)
        dither = GOLDEN * (self.before.folds + 1) % 1 - 0.5
        for profile, (factor, mass) in enumerate(zip(self.factors, masses, strict=True)):
            mean = value
            if self.before.window:
                own = means[min(profile, len(means) - 1)]
                mean = torch.lerp(own, value, factor, out=change)
            if profile == 0 and self.averages.sketcher is not None and self.before.shared:
                self.averages.sketcher.take(tile, mean)
            high = self.tensors.high[profile].tile(tile)
            torch.sub(mean, high, out=change)
            if high.dtype == torch.float64:
                high.add_(change, alpha=mass)
            else:
                _add_dithered(high, change, digit, mass, dither)


def _add_dithered(
    high: torch.Tensor, change: torch.Tensor, digit: torch.Tensor, mass: float, dither: float
) -> None:
    """Add a share of the change, and of the last digit of each element that changes; `change` and
    `digit` are overwritten."""
    # The last digit away from 0, or towards it: towards it that of a power of two is half as large.
    torch.sign(change, out=digit).abs_().mul_(high)
    digit.mul_(1 if dither > 0 else 1 - 2**-24).view(torch.int32).bitwise_and_(SIGN_AND_EXPONENT)
    high.add_(change.mul_(mass).add_(digit, alpha=dither * 2**-23))
