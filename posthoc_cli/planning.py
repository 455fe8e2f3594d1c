"""Schedules before training, thinning of snapshots during it, and the errors to expect after it.

Pure NumPy; nothing here reads a file, so that schedules can be compared before training.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from posthoc_cli.dtypes import DTYPES, EPS, WORDS
from posthoc_cli.errors import InvalidValueError, brief, check_count, check_number
from posthoc_cli.profiles import (
    UNIFORM_SIGMA_REL,
    FloatArray,
    PowerFunction,
    Profile,
    StoredProfile,
    check_sigma_rel,
    gamma_from_sigma_rel,
)
from posthoc_cli.reconstruction import (
    ASSUMED,
    MOST_SOLVED,
    ROUNDING,
    Losses,
    Motion,
    Prior,
    Problem,
    Reconstruction,
    assumed_prior,
    one_blas_thread,
    reconstruct,
    relative_width,
    thinned_subset,
)

USEFUL_RANGE = (0.05, 0.28)  # the default range of sigma_rel for which thinning keeps snapshots


def relative_rounding(dtype: str) -> float:
    """Return the root mean square error of rounding to a dtype, relative to the values; for float16
    1.9e-4."""
    return ROUNDING * EPS[WORDS[dtype]]


@dataclass(frozen=True)
class Schedule:
    """A plan of snapshots of a training of so many steps, as the arguments of a tracker say.

    `rounding` is the root mean square error of a stored average, relative to its norm.
    """

    sigma_rels: tuple[float, ...]
    steps: int
    checkpoint_every: int
    max_checkpoints: int | None = None
    rounding: float = 0.0

    @property
    def taken(self) -> int:
        """The number of times at which snapshots are taken."""
        return self.steps // self.checkpoint_every

    @property
    def kept(self) -> int:
        """The number of snapshots of each profile at the end."""
        return min(self.taken, self.max_checkpoints or self.taken)

    def snapshots(self) -> list[PowerFunction]:
        """Return the snapshots at the end of a run that moves evenly, by time."""
        motion = Motion.even(self.steps)
        gammas = [gamma_from_sigma_rel(s) for s in self.sigma_rels]
        left: list[PowerFunction] = []
        for count in range(1, self.taken + 1):
            t = float(count * self.checkpoint_every)
            left += [PowerFunction(gamma, t) for gamma in gammas]
            if len(left) > self.kept * len(gammas):
                prior = assumed_prior(left, self.rounding, motion)
                ends = range_of(self.sigma_rels)
                spared = spared_times(self.kept)
                dropped = snapshots_to_drop(left, prior, self.kept, ends, spared)
                left = [p for index, p in enumerate(left) if index not in dropped]
        return left


def powers(sigma_rels: FloatArray, t: float) -> list[PowerFunction]:
    """Return the power functions of these widths at time `t`."""
    return [PowerFunction.from_sigma_rel(float(sigma_rel), t) for sigma_rel in sigma_rels]


def listed(sigma_rels: Sequence[float]) -> str:
    """Return the numbers as text for a label."""
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


# --- thinning


SPARED_TIMES = 5
"""The newest times whose snapshots thinning spares while a training writes: it may be continued
from them."""


def spared_times(keep: int) -> int:
    """Return how many of the newest snapshots of a profile thinning spares: at most a quarter of
    those it keeps."""
    return max(1, min(SPARED_TIMES, keep // 4))


def range_of(sigma_rels: Sequence[float]) -> tuple[float, float]:
    """Return the range for which thinning keeps snapshots: the tracked one, or the default for a
    single profile."""
    if len(sigma_rels) == 1:
        return USEFUL_RANGE
    return min(sigma_rels), max(sigma_rels)


_SIMULATED = 8
"""Limit of the snapshots from which thinning chooses, as a multiple of those kept; more make little
difference."""

_TARGETS = 12
_NORM = 8
"""Number of targets over the range, and the norm that combines their errors: near the worst one,
but all count."""


class SameTime(NamedTuple):
    """The snapshots of one time, by their indices: they are dropped together."""

    t: float
    indices: tuple[int, ...]


def times_of(snapshots: Sequence[PowerFunction]) -> list[SameTime]:
    """Return the times of snapshots, in order."""
    members: dict[float, list[int]] = {}
    for index, snapshot in enumerate(snapshots):
        members.setdefault(snapshot.t, []).append(index)
    return [SameTime(t, tuple(members[t])) for t in sorted(members)]


@one_blas_thread()
def snapshots_to_drop(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    keep: int,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
    spared: int = 1,
) -> list[int]:
    """Return the indices of the snapshots to drop so that `keep` times remain, in the order to
    drop: all profiles keep the same times, from each of which a training can continue.

    Always the time goes whose loss raises the predicted error over `sigma_range`, at the time of
    the last snapshot, least; among equals (where nothing moved) the one whose neighbours are
    closest together. Then `exchanged` improves the rest. The last `spared` times stay. Of very
    many, those that are not evenly chosen go first.
    """
    times = times_of(snapshots)
    needed = times[-spared:]
    unused = []
    if len(snapshots) > MOST_SOLVED:
        most = _SIMULATED * keep * len(snapshots) // len(times)
        unused = unused_times(snapshots, needed, keep, min(most, MOST_SOLVED))
    remaining = [time for time in times if time not in unused]
    dropped = removal_order(snapshots, prior, remaining, keep, needed, sigma_range)
    kept = [time for time in remaining if time not in dropped]
    better = exchanged(snapshots, prior, kept, dropped, needed, sigma_range)
    return [index for time in (*unused, *better) for index in time.indices]


def unused_times(
    snapshots: Sequence[PowerFunction],
    needed: Collection[SameTime],
    keep: int,
    most: int = MOST_SOLVED,
) -> list[SameTime]:
    """Return the times that are not among an even choice of at most `most` snapshots, of at least
    `keep` times."""
    used = {snapshots[index].t for index in thinned_subset(snapshots, most, keep)}
    return [time for time in times_of(snapshots) if time.t not in used and time not in needed]


def removal_order(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    among: Sequence[SameTime],
    keep: int,
    needed: Collection[SameTime],
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> list[SameTime]:
    """Return which times to drop, the least needed first, until `keep` remain; `needed` ones
    stay."""
    remaining = list(among)
    chosen = _Chosen(snapshots, prior, among, sigma_range)
    dropped: list[SameTime] = []
    may_go = [time for time in remaining if time not in needed]
    while may_go and len(remaining) > keep:
        errors = chosen.errors_without(may_go)
        is_least = errors == errors.min()
        candidates = [may_go[index] for index in np.flatnonzero(is_least)]
        least = _closest_together(remaining, candidates)
        chosen.lose(least)
        remaining.remove(least)
        may_go.remove(least)
        dropped.append(least)
    return dropped


_MOST_EXCHANGED = 16
_MOST_TRIED = 240
_LEAST_GAIN = 0.99
"""Limits of the snapshots kept and of the solves for exchanges, one each, and the ratio of errors
from which on none is made. They pay if few snapshots are left: with 3 of 20 they halve the error at
best, with 20 of 40 they gain nothing."""


def exchanged(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    kept: Sequence[SameTime],
    dropped: Sequence[SameTime],
    needed: Collection[SameTime],
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> list[SameTime]:
    """Return the times to drop, in order, after exchanging dropped ones for kept ones.

    Greedy drops do not always find the best set: one that was kept early may be of little use in
    the end.
    """
    kept = list(kept)
    order = list(dropped)
    count = sum(len(time.indices) for time in kept)
    if not order or count > _MOST_EXCHANGED or len(order) > _MOST_TRIED // 2:
        return order
    all_times = _Chosen(snapshots, prior, [*kept, *order], sigma_range)
    least = all_times.of(kept).error
    for _ in range(_MOST_TRIED // len(order)):
        exchanges = _exchanges(all_times, kept, order, needed)
        best = min(exchanges, key=lambda exchange: exchange.error, default=None)
        if best is None or best.error >= _LEAST_GAIN * least:
            break
        least = best.error
        kept[kept.index(best.leaving)] = best.coming
        order[order.index(best.coming)] = best.leaving
    return order


class _Exchange(NamedTuple):
    """A dropped time for a kept one, and the error afterwards."""

    coming: SameTime
    leaving: SameTime
    error: float


def _exchanges(
    all_times: _Chosen,
    kept: Sequence[SameTime],
    dropped: Sequence[SameTime],
    needed: Collection[SameTime],
) -> Iterator[_Exchange]:
    """Yield the best exchange for each of the dropped ones."""
    may_go = [time for time in kept if time not in needed]
    if not may_go:
        return
    for coming in dropped:
        errors = all_times.of([*kept, coming]).errors_without(may_go)
        leaving = may_go[int(errors.argmin())]
        yield _Exchange(coming, leaving, float(errors.min()))


class _Chosen:
    """The snapshots of some times, and the errors without some of them."""

    def __init__(
        self,
        snapshots: Sequence[PowerFunction],
        prior: Prior,
        among: Sequence[SameTime],
        sigma_range: tuple[float, float],
    ) -> None:
        indices = sorted(index for time in among for index in time.indices)
        usable = [snapshots[index] for index in indices]
        self._losses = losses_of(usable, prior.of(indices), sigma_range)
        self._column = {index: number for number, index in enumerate(indices)}

    @property
    def error(self) -> float:
        return float(_combined(self._losses.squares[:, None])[0])

    def of(self, among: Sequence[SameTime]) -> _Chosen:
        """Return the choice among some of its times."""
        indices = [index for time in among for index in time.indices]
        columns = [self._column[index] for index in indices]
        chosen = copy(self)
        chosen._losses = self._losses.of(columns)
        chosen._column = {index: number for number, index in enumerate(indices)}
        return chosen

    def errors_without(self, each: Sequence[SameTime]) -> FloatArray:
        columns = []
        for time in each:
            columns.append([self._column[index] for index in time.indices])
        return _combined(self._losses.squares_without(columns))

    def lose(self, time: SameTime) -> None:
        for index in time.indices:
            self._losses.lose(self._column[index])


def _closest_together(
    remaining: Sequence[SameTime],
    candidates: Sequence[SameTime],
) -> SameTime:
    """Return the time whose neighbours are closest together; `remaining` is in order."""
    gaps = dict.fromkeys(candidates, math.inf)  # infinity without two neighbours
    for before, time, after in zip(remaining, remaining[1:], remaining[2:], strict=False):
        if time in gaps:
            gaps[time] = after.t - before.t
    return min(candidates, key=gaps.__getitem__)


def losses_of(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    sigma_range: tuple[float, float],
) -> Losses:
    """Return the errors of targets over the range, at the time of the last snapshot, as snapshots
    are lost."""
    t = max(p.t for p in snapshots)
    targets = powers(np.geomspace(*sigma_range, _TARGETS), t)
    return Problem(snapshots, prior, t).losses(targets)


def _combined(squares: FloatArray) -> FloatArray:
    """Return the 8-norm over targets of the roots of squared errors: shape [targets, n] to [n]."""
    scale = float(squares.max()) or 1.0
    powers = (squares / scale) ** (_NORM / 2)
    norms = np.mean(powers, axis=0) ** (1 / _NORM)
    return np.asarray(norms * np.sqrt(scale))


# --- error curves

EVENLY = "the network moves evenly"  # the default assumption of the predicted errors of a schedule


GOOD_ERROR = 0.01
"""Predicted error up to which averages are taken for exact: beyond it a synthesis warns, and a
search does not look."""


@dataclass(frozen=True)
class ErrorPoint:
    """The errors of one target; `sigma_rel` is its standard deviation / t."""

    label: str
    sigma_rel: float
    profile_error: float
    predicted_error: float


@dataclass(frozen=True)
class ErrorCurve:
    """Relative L2 errors of the profile, and expected ones of the weights, against sigma_rel, for
    targets at `t`."""

    label: str  # snapshots and assumption, for a legend
    t: float
    sigma_rels: FloatArray
    profile_error: FloatArray
    predicted_error: FloatArray
    tracked: tuple[float, ...]  # sigma_rels of the snapshots
    others: tuple[ErrorPoint, ...] = ()  # errors of further targets
    assumption: str = ""  # of the predicted errors; empty if the motion was measured

    def __repr__(self) -> str:
        return f"ErrorCurve({self.label}: {self.good_range})"

    @property
    def worst(self) -> float:
        return float(self.predicted_error.max())

    @property
    def median(self) -> float:
        return float(np.median(self.predicted_error))

    def ranges_below(
        self,
        threshold: float,
    ) -> list[tuple[float, float]]:
        """Return the ranges of sigma_rel, of at least two points, where the predicted error is
        below `threshold`."""
        below = np.flatnonzero(self.predicted_error < threshold)
        if below.size == 0:
            return []
        gaps = np.flatnonzero(np.diff(below) > 1) + 1
        ends = []
        for run in np.split(below, gaps):
            if run.size > 1:
                low = self.sigma_rels[run[0]]
                high = self.sigma_rels[run[-1]]
                ends.append((float(low), float(high)))
        return ends

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as data for JSON, with None in place of infinite errors."""
        return {
            "label": self.label,
            "t": self.t,
            "tracked": list(self.tracked),
            "assumption": self.assumption or None,
            "below_1_percent": [list(ends) for ends in self.ranges_below(GOOD_ERROR)],
            "sigma_rel": self.sigma_rels.tolist(),
            "predicted_error": [finite(error) for error in self.predicted_error.tolist()],
            "profile_error": self.profile_error.tolist(),
            "others": [
                {
                    "target": other.label,
                    "sigma_rel": other.sigma_rel,
                    "predicted_error": finite(other.predicted_error),
                    "profile_error": other.profile_error,
                }
                for other in self.others
            ],
        }

    @property
    def good_range(self) -> str:
        """Where the predicted error is below `GOOD_ERROR`, in words: "below 1 % for sigma_rel 0.051
        to 0.278", rounded inwards to the fewest digits that leave a range."""
        texts = []
        for low, high in self.ranges_below(GOOD_ERROR):
            for digits in range(3, 9):
                first = math.ceil(round(low * 10**digits, 9))
                last = math.floor(round(high * 10**digits, 9))
                if first < last:
                    break
            texts.append(f"{first / 10**digits:.{digits}f} to {last / 10**digits:.{digits}f}")
        if not texts:
            return "nowhere below 1 %"
        return f"below 1 % for sigma_rel {', '.join(texts)}"


def finite(value: float) -> float | None:
    """Return a value for JSON: the number, or None in place of nan and infinity."""
    return value if math.isfinite(value) else None


def error_curve(
    label: str,
    snapshots: Sequence[StoredProfile],
    prior: Prior,
    sigma_range: tuple[float, float] = (0.01, 0.2886),
    t: float | None = None,
    method: str | None = None,
    others: Mapping[str, Profile] | None = None,
    points: int = 200,
) -> ErrorCurve:
    """Return the reconstruction error over a range of sigma_rel, and of `others` by their titles.

    Targets are at `t`, by default the time of the last snapshot; snapshots after it are not used.
    `label` is their name in a legend, and `prior` that of all of them. The `points` of the curve
    are evenly spaced in the logarithm; tracked sigma_rels are added.
    """
    low, high = check_sigma_range(sigma_range)
    t = time_between(snapshots, t)
    among = [index for index, profile in enumerate(snapshots) if profile.t <= t]
    usable = [snapshots[index] for index in among]
    tracked = tracked_widths(usable)
    grid = _grid(low, high, points, tracked)
    further = dict(others or {})
    targets = [*powers(grid, t), *further.values()]
    errors = reconstruct(usable, targets, method, prior.of(among), t)
    assumption = EVENLY if prior.source == ASSUMED else ""
    if assumption:
        label = f"{label}, if {assumption}"
    return ErrorCurve(
        label=label,
        t=t,
        sigma_rels=grid,
        profile_error=errors.profile_error[: grid.size],
        predicted_error=_without_nan(errors.predicted_error[: grid.size]),
        tracked=tuple(tracked),
        others=_points(further, errors, grid.size, t),
        assumption=assumption,
    )


def _without_nan(errors: FloatArray) -> FloatArray:
    """Return predicted errors with 0 for weights of norm 0, which are exact."""
    return np.nan_to_num(errors, nan=0.0)


def _points(
    others: Mapping[str, Profile],
    errors: Reconstruction,
    first: int,
    t: float,
) -> tuple[ErrorPoint, ...]:
    """Return the errors of further targets, the columns of a reconstruction from the `first` on."""
    points = []
    profile_errors = errors.profile_error[first:].tolist()
    predicted_errors = _without_nan(errors.predicted_error[first:]).tolist()
    for title, profile_error, predicted in zip(
        others, profile_errors, predicted_errors, strict=True
    ):
        width = relative_width(others[title], t)
        points.append(ErrorPoint(title, width, profile_error, predicted))
    return tuple(points)


def _grid(
    low: float,
    high: float,
    points: int,
    tracked: Sequence[float],
) -> FloatArray:
    """Return sigma_rels evenly spaced in the logarithm, and the tracked ones between them."""
    inside = [sigma_rel for sigma_rel in tracked if low <= sigma_rel <= high]
    widths = np.append(np.geomspace(low, high, points), inside)
    return np.asarray(np.unique(widths).clip(low, high))


def tracked_widths(profiles: Iterable[Profile]) -> list[float]:
    """Return the distinct sigma_rels of power functions, ascending, up to rounding."""
    widths = set()
    for profile in profiles:
        if isinstance(profile, PowerFunction):
            widths.add(float(f"{profile.sigma_rel:.12g}"))
    return sorted(widths)


def time_between(snapshots: Sequence[StoredProfile], t: float | None) -> float:
    """Return `t`, or the last snapshot's time for None; raise an InvalidValueError if no snapshots
    surround it."""
    times = [profile.t for profile in snapshots]
    return max(times) if t is None else check_within("t", t, times)


def check_within(
    name: str,
    value: float,
    known: Collection[float],
) -> float:
    """Return a time or step; raise an InvalidValueError unless it lies between the least and the
    largest known one."""
    low = min(known)
    high = max(known)
    accepted = f"lie between the first snapshot, {low:,.12g}, and the last, {high:,.12g}"
    return check_number(name, value, lambda time: low <= time <= high, accepted)


def check_sigma_range(sigma_range: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a range of sigma_rel; raise an InvalidValueError unless they are two
    ascending numbers."""
    with suppress(TypeError, ValueError):
        low, high = map(check_sigma_rel, sigma_range)
        if low < high:
            return low, high
    reason = f"must be two numbers in (0, {UNIFORM_SIGMA_REL:.4f}), the first below the second"
    raise InvalidValueError("sigma_range", reason, value=brief(sigma_range))


# --- named schedules

NAMES = {
    "single": (1, "float16", 10),
    "small": (2, "float16", 8),
    "default": (2, "float16", 20),
    "fine": (2, "float32", 20),
    "exact": (3, "float32", 20),
}
"""The named schedules, by rising size: tracked profiles, dtype, and snapshots kept of each profile.
"""

_TAKEN = 2
"""Snapshots taken, as a multiple of those kept. The worst error of these schedules of 400,000 steps
is then at most 0.8 of that of snapshots that are all kept."""

_UPDATE_EVERY = 10
_UPDATES_IN_WIDTH = 10
"""Upper limit of the steps between updates, and lower limit of the updates within the shortest
average's width."""


@dataclass(frozen=True)
class Proposal:
    """A named schedule, the dtype of its snapshots, their largest size on disk in bytes, and
    expected errors."""

    name: str
    schedule: Schedule
    dtype: str
    nbytes: int
    errors: ErrorCurve

    @property
    def update_every(self) -> int:
        """Steps between updates: 10, or fewer where averages are short, and a divisor of
        `checkpoint_every`."""
        width = float(self.errors.sigma_rels[0]) * self.schedule.steps
        every = max(1, min(_UPDATE_EVERY, int(width / _UPDATES_IN_WIDTH)))
        while self.schedule.checkpoint_every % every:
            every -= 1
        return every

    def call(self) -> str:
        schedule = self.schedule
        return (
            f'PostHocEMA.from_model(model, "run/ema", sigma_rels={schedule.sigma_rels}, '
            f"update_every={self.update_every}, checkpoint_every={schedule.checkpoint_every}, "
            f'max_checkpoints={schedule.max_checkpoints}, checkpoint_dtype="{self.dtype}")'
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sigma_rels": list(self.schedule.sigma_rels),
            "dtype": self.dtype,
            "snapshots_each": self.schedule.kept,
            "update_every": self.update_every,
            "checkpoint_every": self.schedule.checkpoint_every,
            "max_checkpoints": self.schedule.max_checkpoints,
            "bytes": self.nbytes,
            "worst_error": self.errors.worst,
            "median_error": self.errors.median,
            "sigma_rel": self.errors.sigma_rels.tolist(),
            "predicted_error": self.errors.predicted_error.tolist(),
            "call": self.call(),
        }


@dataclass(frozen=True)
class PlanReport:
    """The named schedules of a training, by rising size."""

    proposals: tuple[Proposal, ...]
    disk: int | None = None  # the most bytes of snapshots at any moment; None if any size will do

    @property
    def within_disk(self) -> Proposal | None:
        """The most exact schedule whose snapshots fit the disk; None if none fits, or without a
        disk."""
        if self.disk is None:
            return None
        fitting = [each for each in self.proposals if each.nbytes <= self.disk]
        return min(fitting, key=lambda each: each.errors.worst, default=None)

    def to_dict(self) -> dict[str, Any]:
        chosen = self.within_disk
        return {
            "disk": self.disk,
            "assumption": EVENLY,
            "within_disk": None if chosen is None else chosen.name,
            "schedules": [proposal.to_dict() for proposal in self.proposals],
        }


@one_blas_thread()
def propose(
    steps: int,
    params: int,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> list[Proposal]:
    """Return the schedules of `NAMES` for a training of so many steps, and averaged elements of the
    network.

    The ends of the range are tracked, of a single profile its geometric mean.
    """
    for name, count in (("steps", steps), ("params", params)):
        check_count(name, count)
        check_number(name, count, lambda count: count <= 10**15, "be at most 1e15")
    low, high = check_sigma_range(sigma_range)
    middle = _round_middle(low, high)
    tracked = {
        1: (middle,),
        2: (low, high),
        3: (low, middle, high),
    }
    proposals = []
    for name, (profiles, dtype, kept) in NAMES.items():
        interval = _round_interval(steps, _TAKEN * kept)
        rounding = relative_rounding(dtype)
        schedule = Schedule(tracked[profiles], steps, interval, kept, rounding)
        fullest = profiles * min(schedule.taken, schedule.kept + 1)  # just before thinning
        nbytes = fullest * params * DTYPES[WORDS[dtype]].nbytes
        label = f"{name}: {schedule.kept} each in {dtype}"
        errors = _errors_of(schedule, label, sigma_range)
        proposals.append(Proposal(name, schedule, dtype, nbytes, errors))
    return proposals


def _round_middle(low: float, high: float) -> float:
    """Return the geometric mean of both, of two digits if that lies between them."""
    middle = math.sqrt(low * high)
    rounded = float(f"{middle:.2g}")
    return rounded if low < rounded < high else middle


def _errors_of(
    schedule: Schedule,
    label: str,
    sigma_range: tuple[float, float],
) -> ErrorCurve:
    snapshots = schedule.snapshots()
    prior = assumed_prior(snapshots, schedule.rounding, Motion.even(schedule.steps))
    errors = error_curve(label, snapshots, prior, sigma_range, points=81)
    return replace(errors, label=label, assumption="")


def _round_interval(steps: int, times: int) -> int:
    """Return a checkpoint_every for at most `times` snapshots, preferably a round number that
    divides `steps`."""
    least = -(-steps // times)
    most = min(2 * least, steps)
    zeros = max(len(str(least)) - 2, 0)
    unit = int(10**zeros)
    first = -(-least // unit) * unit
    candidates: set[int] = {least, *range(first, most + 1, unit)}
    counts = range(max(1, steps // most), times + 1)
    candidates |= {steps // count for count in counts if steps % count == 0}

    def cost(every: int) -> tuple[bool, int, float]:
        left = steps % every
        percent_left = round(100 * left / steps)
        digits = len(str(every).rstrip("0"))
        length = math.log(every / least)
        return left > 0, percent_left, length + 0.1 * digits

    allowed = [every for every in candidates if least <= every <= most]
    return min(allowed, key=cost)
