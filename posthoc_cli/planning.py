"""Thinning of snapshots, schedules before a training, and the errors to expect after it.

Pure NumPy; nothing here reads a file, so that a schedule can be drawn before training.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import (
    InvalidValueError,
    abbreviate,
    check_count,
    check_number,
    count_noun,
)
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
    Motion,
    Prior,
    Problem,
    Reconstruction,
    assumed_prior,
    check_method,
    choose_evenly,
    one_blas_thread,
    reconstruct,
    relative_width,
)
from posthoc_cli.run_clock import Clock
from posthoc_cli.targets import Target, Wanted, as_targets

_NAMED = 3  # stored times that an error names
USEFUL_RANGE = (0.05, 0.28)  # the default range of sigma_rel for which thinning keeps snapshots

# --- thinning

_PROTECTED_TIMES = 5
"""The newest times that thinning never drops while a training writes: it may be continued from
them."""


def count_protected_times(keep: int) -> int:
    """Compute how many of the newest times thinning never drops: at most a quarter of the times it
    keeps."""
    return max(1, min(_PROTECTED_TIMES, keep // 4))


_TARGETS = 12
_NORM = 8
"""Number of targets over the range, and the norm that combines their errors: near the worst one,
but all count."""


class SameTime(NamedTuple):
    """The snapshots of one time, by their indices: they are dropped together."""

    t: float
    indices: tuple[int, ...]


def group_times(snapshots: Sequence[PowerFunction]) -> list[SameTime]:
    """Group snapshots by time, in order."""
    members: dict[float, list[int]] = {}
    for index, snapshot in enumerate(snapshots):
        members.setdefault(snapshot.t, []).append(index)
    return [SameTime(t, tuple(members[t])) for t in sorted(members)]


@one_blas_thread()
def times_to_drop(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    keep: int,
    needed: Collection[float],
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> list[SameTime]:
    """Choose which times to drop so that `keep` remain, the least needed first.

    All profiles keep the same times, so that a training can continue from each. At each step the
    time is dropped that raises the predicted error over `sigma_range`, at the time of the last
    snapshot, least; among equals (where nothing moved) the time whose neighbours are closest
    together. Times that are `needed` stay. If there are very many, only an even choice of them is
    compared, and the others are dropped first.
    """
    chosen = choose_evenly(snapshots, MOST_SOLVED, keep)
    used = {snapshots[index].t for index in chosen}.union(needed)
    remaining = []
    dropped = []
    for time in group_times(snapshots):
        if time.t in used:
            remaining.append(time)
        else:
            dropped.append(time)
    choice = _Choice(snapshots, prior, remaining, sigma_range)
    may_go = [time for time in remaining if time.t not in needed]
    while may_go and len(remaining) > keep:
        errors = choice.errors_without(may_go)
        is_least = errors == errors.min()
        candidates = [may_go[index] for index in np.flatnonzero(is_least)]
        least = _closest_together(remaining, candidates)
        choice.drop(least)
        remaining.remove(least)
        may_go.remove(least)
        dropped.append(least)
    return dropped


def newest_times(snapshots: Sequence[PowerFunction], count: int) -> list[float]:
    """List the last times of snapshots, in order."""
    return [time.t for time in group_times(snapshots)[-count:]]


class _Choice:
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
        t = max(snapshot.t for snapshot in usable)
        targets = power_functions(np.geomspace(*sigma_range, _TARGETS), t)
        self._eliminator = Problem(usable, prior.subset(indices), t).eliminator(targets)
        self._column = {index: number for number, index in enumerate(indices)}

    def errors_without(self, times: Sequence[SameTime]) -> FloatArray:
        """Compute the error after each time alone is dropped: the 8-norm over targets."""
        columns = []
        for time in times:
            columns.append([self._column[index] for index in time.indices])
        squares = self._eliminator.squares_without(columns)
        scale = float(squares.max()) or 1.0
        powers = (squares / scale) ** (_NORM / 2)
        norms = np.mean(powers, axis=0) ** (1 / _NORM)
        return np.asarray(norms * np.sqrt(scale))

    def drop(self, time: SameTime) -> None:
        for index in time.indices:
            self._eliminator.drop(self._column[index])


def _closest_together(
    remaining: Sequence[SameTime],
    candidates: Sequence[SameTime],
) -> SameTime:
    """Find the time whose neighbours are closest together; `remaining` is in order."""
    gaps = dict.fromkeys(candidates, math.inf)  # infinity without two neighbours
    for before, time, after in zip(remaining, remaining[1:], remaining[2:], strict=False):
        if time in gaps:
            gaps[time] = after.t - before.t
    return min(candidates, key=gaps.__getitem__)


# --- a schedule before a training


@dataclass(frozen=True)
class Schedule:
    """The snapshots of a training of this number of steps, as the arguments of a tracker say."""

    steps: int
    checkpoint_every: int
    max_checkpoints: int | None = 20
    sigma_rels: tuple[float, ...] = (0.05, 0.28)

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        accepted = f"be from 1 to {self.steps:,}, the steps"
        every = self.checkpoint_every
        check_number("every", every, lambda interval: 1 <= interval <= self.steps, accepted)
        if self.max_checkpoints is not None:
            check_count("keep", self.max_checkpoints)

    @one_blas_thread()
    def snapshots(self) -> list[PowerFunction]:
        """List the snapshots that are left at the end if the network moves evenly, by time."""
        gammas = [gamma_from_sigma_rel(sigma_rel) for sigma_rel in self.sigma_rels]
        left: list[PowerFunction] = []
        for count in range(1, self.steps // self.checkpoint_every + 1):
            t = float(count * self.checkpoint_every)
            left += [PowerFunction(gamma, t) for gamma in gammas]
            keep = self.max_checkpoints
            if keep is not None and len(left) > keep * len(gammas):
                needed = newest_times(left, count_protected_times(keep))
                sigma_range = thinning_range(self.sigma_rels)
                dropped = times_to_drop(left, self.prior(left), keep, needed, sigma_range)
                gone = {time.t for time in dropped}
                left = [snapshot for snapshot in left if snapshot.t not in gone]
        return left

    def prior(self, snapshots: Sequence[PowerFunction]) -> Prior:
        """Assume the prior of float16 snapshots of a network that moves evenly."""
        return assumed_prior(snapshots, ROUNDING * EPS["F16"], Motion.even(self.steps))

    def error_curve(self, request: CurveRequest) -> ErrorCurve:
        """Predict the errors of averages, by default at the end, with the snapshots that are left
        at the end."""
        snapshots = self.snapshots()
        time = time_between(snapshots, request.t)
        clock = Clock([self.steps], [self.steps])
        profiles = {target.title: target.profile(time, clock, 1.0) for target in request.wished}
        kept = len(snapshots) // len(self.sigma_rels)
        steps = count_noun(self.steps, "step")
        times = count_noun(kept, "time")
        label = f"snapshots at {times} of {steps}, one every {self.checkpoint_every:,}"
        if request.t is not None:
            label += f", averages at t = {time:,.12g}"
        return error_curve(label, snapshots, self.prior(snapshots), request, profiles)


def thinning_range(sigma_rels: Sequence[float]) -> tuple[float, float]:
    """Choose the range for which thinning keeps snapshots: the tracked range, or the default for a
    single profile."""
    if len(sigma_rels) == 1:
        return USEFUL_RANGE
    return min(sigma_rels), max(sigma_rels)


def power_functions(sigma_rels: FloatArray, t: float) -> list[PowerFunction]:
    """Make the power functions of these widths at time `t`."""
    return [PowerFunction.from_sigma_rel(float(sigma_rel), t) for sigma_rel in sigma_rels]


def format_widths(sigma_rels: Sequence[float]) -> str:
    """Write sigma_rels as text for a label: "0.05, 0.28"."""
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


# --- error curves

EVENLY = "the network moves evenly"  # the default assumption of the predicted errors of a schedule


SMALL_LOSS = 0.05
"""Lost gain up to which averages are taken for exact: beyond it a synthesis warns, and a search
does not look. Nine in ten averages with 5 to 10 % lose less than 10 % (scripts/lost_gain.py)."""


@dataclass(frozen=True)
class CurveRequest:
    """What an error curve is of.

    Arguments:
        sigma_range: the range of sigma_rel.
        t: time of the averages, by default of the last snapshot; snapshots after it are not used.
        method: the solver, one of `reconstruction.METHODS`; None for the first.
        others: further targets; see `targets.as_target`.

    Raises:
        InvalidValueError: an argument is invalid; the error names it and what would be accepted.
    """

    sigma_range: tuple[float, float] = (0.01, 0.2886)
    _: KW_ONLY
    t: float | None = None
    method: str | None = None
    others: Wanted | Sequence[Wanted] = ()

    def __post_init__(self) -> None:
        check_sigma_range(self.sigma_range)
        check_method(self.method)
        self.wished  # noqa: B018  raises an error if invalid

    @cached_property
    def wished(self) -> tuple[Target, ...]:
        return as_targets(self.others)


@dataclass(frozen=True)
class ErrorPoint:
    """The errors of one target. `sigma_rel` is its own, or the width of an ordinary EMA with the
    same mean age, or its standard deviation / t."""

    label: str
    sigma_rel: float
    profile_error: float
    predicted_error: float
    lost_gain: float


@dataclass(frozen=True)
class ErrorCurve:
    """Relative L2 errors of the profiles, expected errors of the weights, and the share of the gain
    that these lose, against sigma_rel, for targets at `t`."""

    label: str  # snapshots and assumption, for a legend
    t: float
    sigma_rels: FloatArray
    profile_error: FloatArray
    predicted_error: FloatArray
    lost_gain: FloatArray
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
        """Find the ranges of sigma_rel, of at least two points, where the loss of gain is below
        `threshold`."""
        below = np.flatnonzero(self.lost_gain < threshold)
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
        """Convert the curve to data for JSON, with None in place of infinite errors."""
        return {
            "label": self.label,
            "t": self.t,
            "tracked": list(self.tracked),
            "assumption": self.assumption or None,
            "good_ranges": [list(ends) for ends in self.ranges_below(SMALL_LOSS)],
            "sigma_rel": self.sigma_rels.tolist(),
            "predicted_error": [finite(error) for error in self.predicted_error.tolist()],
            "lost_gain": self.lost_gain.tolist(),
            "profile_error": self.profile_error.tolist(),
            "others": [
                {
                    "target": other.label,
                    "sigma_rel": other.sigma_rel,
                    "predicted_error": finite(other.predicted_error),
                    "lost_gain": other.lost_gain,
                    "profile_error": other.profile_error,
                }
                for other in self.others
            ],
        }

    @property
    def good_range(self) -> str:
        """Where the loss of gain is below `SMALL_LOSS`, in words: "below 5 % for sigma_rel 0.051 to
        0.278", rounded inwards to the fewest digits that leave a range."""
        limit = f"below {100 * SMALL_LOSS:g} %"
        texts = []
        for low, high in self.ranges_below(SMALL_LOSS):
            for digits in range(3, 9):
                first = math.ceil(round(low * 10**digits, 9))
                last = math.floor(round(high * 10**digits, 9))
                if first < last:
                    break
            texts.append(f"{first / 10**digits:.{digits}f} to {last / 10**digits:.{digits}f}")
        if not texts:
            return f"nowhere {limit}"
        return f"{limit} for sigma_rel {', '.join(texts)}"


def finite(value: float) -> float | None:
    """Convert a value for JSON: the number, or None in place of nan and infinity."""
    return value if math.isfinite(value) else None


def error_curve(
    label: str,
    snapshots: Sequence[StoredProfile],
    prior: Prior,
    request: CurveRequest,
    others: Mapping[str, Profile] | None = None,
    points: int = 200,
) -> ErrorCurve:
    """Compute the reconstruction error over a range of sigma_rel, and the errors of `others`, the
    profiles of the request's further targets, by their titles.

    `label` is the snapshots' name in a legend, and `prior` covers all of them. The `points` of the
    curve are evenly spaced in the logarithm; tracked sigma_rels are added.
    """
    low, high = request.sigma_range
    t = time_between(snapshots, request.t)
    among = [index for index, profile in enumerate(snapshots) if profile.t <= t]
    usable = [snapshots[index] for index in among]
    tracked = tracked_widths(usable)
    grid = _grid(low, high, points, tracked)
    further = dict(others or {})
    targets = [*power_functions(grid, t), *further.values()]
    errors = reconstruct(usable, targets, request.method, prior.subset(among), t)
    assumption = EVENLY if prior.evidence == ASSUMED else ""
    if assumption:
        label = f"{label}, if {assumption}"
    return ErrorCurve(
        label=label,
        t=t,
        sigma_rels=grid,
        profile_error=errors.profile_error[: grid.size],
        predicted_error=_without_nan(errors.predicted_error[: grid.size]),
        lost_gain=errors.lost_gain[: grid.size],
        tracked=tuple(tracked),
        others=_points(further, errors, grid.size, t),
        assumption=assumption,
    )


def _without_nan(errors: FloatArray) -> FloatArray:
    """Set predicted errors to 0 for weights of norm 0, which are exact."""
    return np.nan_to_num(errors, nan=0.0)


def _points(
    others: Mapping[str, Profile],
    errors: Reconstruction,
    first: int,
    t: float,
) -> tuple[ErrorPoint, ...]:
    """List the errors of further targets, the columns of a reconstruction from the `first` on."""
    points = []
    profile_errors = errors.profile_error[first:].tolist()
    predicted_errors = _without_nan(errors.predicted_error[first:]).tolist()
    losses = errors.lost_gain[first:].tolist()
    for title, profile_error, predicted, lost_gain in zip(
        others, profile_errors, predicted_errors, losses, strict=True
    ):
        width = getattr(others[title], "sigma_rel", None) or relative_width(others[title], t)
        width = _drop_rounding(width)
        points.append(ErrorPoint(title, width, profile_error, predicted, lost_gain))
    return tuple(points)


def _grid(
    low: float,
    high: float,
    points: int,
    tracked: Sequence[float],
) -> FloatArray:
    """Space sigma_rels evenly in the logarithm, and add the tracked ones between them."""
    inside = [sigma_rel for sigma_rel in tracked if low <= sigma_rel <= high]
    widths = np.append(np.geomspace(low, high, points), inside)
    return np.asarray(np.unique(widths).clip(low, high))


def tracked_widths(profiles: Iterable[Profile]) -> list[float]:
    """List the distinct sigma_rels of power functions, ascending, up to rounding."""
    widths = set()
    for profile in profiles:
        if isinstance(profile, PowerFunction):
            widths.add(_drop_rounding(profile.sigma_rel))
    return sorted(widths)


def _drop_rounding(sigma_rel: float) -> float:
    """Round a width that was computed from a gamma to the digits that it was given with."""
    return float(f"{sigma_rel:.12g}")


def time_between(snapshots: Sequence[StoredProfile], t: float | None) -> float:
    """Check `t`, by default the last snapshot's time; raise an InvalidValueError if no snapshots
    surround it."""
    times = [profile.t for profile in snapshots]
    return max(times) if t is None else check_within("t", t, times)


def check_within(
    name: str,
    value: float,
    known: Collection[float],
) -> float:
    """Check a time or step; raise an InvalidValueError, which names the nearest known ones, unless
    it lies between the least and the largest of them."""
    stored = sorted({*known})
    low = stored[0]
    high = stored[-1]
    is_late = isinstance(value, Real) and value > high
    nearest = stored[-_NAMED:] if is_late else stored[:_NAMED]
    listed = ", ".join(f"{time:,.12g}" for time in nearest)
    accepted = f"lie between the first snapshot, {low:,.12g}, and the last, {high:,.12g}"
    if len(stored) > _NAMED:
        accepted += f"; the nearest are at {listed}"
    return check_number(name, value, lambda time: low <= time <= high, accepted)


def check_sigma_range(sigma_range: Sequence[float]) -> tuple[float, float]:
    """Check the ends of a range of sigma_rel; raise an InvalidValueError unless they are two
    ascending numbers."""
    with suppress(TypeError, ValueError):
        low, high = map(check_sigma_rel, sigma_range)
        if low < high:
            return low, high
    reason = f"must be two numbers in (0, {UNIFORM_SIGMA_REL:.4f}), the first below the second"
    raise InvalidValueError("sigma_range", reason, value=abbreviate(sigma_range))
