"""Error curves of snapshots against sigma_rel."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posthoc_cli.errors import InvalidValueError, brief, check_number, printable
from posthoc_cli.planning.schedule import USEFUL_RANGE, Schedule, listed, powers
from posthoc_cli.profiles import (
    UNIFORM_SIGMA_REL,
    Clock,
    FloatArray,
    PowerFunction,
    StoredProfile,
    check_sigma_rel,
)
from posthoc_cli.reconstruction import (
    ASSUMED,
    METHODS,
    Motion,
    Prior,
    Problem,
    assumed_prior,
    check_method,
    reconstruct,
    relative_width,
    thinned_subset,
)
from posthoc_cli.targets import Target

_POINTS = 200
"""Number of points of a curve, evenly spaced in the logarithm; tracked sigma_rels are added."""
EVENLY = "the network moves evenly"
"""The default assumption of the predicted errors of a schedule."""


@dataclass(frozen=True)
class Candidate:
    """Snapshots of a run or of a schedule.

    Attributes:
        label: name in a legend.
        snapshots: profiles of the snapshots.
        prior: prior of these snapshots.
        clock: steps over training time.
        t_first: time of the first update.
    """

    label: str
    snapshots: Sequence[StoredProfile]
    prior: Prior
    clock: Clock = field(default_factory=Clock.of_steps)
    t_first: float = 1.0

    @classmethod
    def of_schedule(cls, schedule: Schedule) -> Candidate:
        """Return the snapshots that a schedule will leave, if the network moves evenly; of very many some."""
        label = f"plan: {listed(schedule.sigma_rels)} at {schedule.kept} times in {schedule.steps:,} steps"
        snapshots = schedule.snapshots()
        snapshots = [snapshots[index] for index in thinned_subset(snapshots)]
        return cls(label, snapshots, assumed_prior(snapshots, schedule.rounding, Motion.even(schedule.steps)))

    @property
    def assumption(self) -> str:
        """The assumption of the predicted errors, in words that follow "if"; empty if the motion was measured."""
        return EVENLY if self.prior.source == ASSUMED else ""

    def __repr__(self) -> str:
        return f"Candidate({self.label})"

    def up_to(self, t: float) -> tuple[list[StoredProfile], Prior]:
        """Return the snapshots at or before `t`, and their prior."""
        usable = [index for index, profile in enumerate(self.snapshots) if profile.t <= t]
        return [self.snapshots[i] for i in usable], self.prior.of(usable)


@dataclass(frozen=True)
class ErrorPoint:
    """Errors, as in `ErrorCurve`, of one target; `sigma_rel` is its standard deviation / t."""

    label: str
    sigma_rel: float
    profile_error: float
    predicted_error: float


@dataclass(frozen=True)
class ErrorCurve:
    """Reconstruction error against sigma_rel, at one time.

    Attributes:
        label: snapshots and assumption, for a legend.
        t: time of the targets.
        sigma_rels: shape [points].
        profile_error: relative L2 error of the profile: shape [points].
        predicted_error: expected relative L2 error of the weights: shape [points].
        tracked: sigma_rels of the snapshots.
        others: errors of further targets.
        assumption: of the predicted errors; empty if the motion was measured.
    """

    label: str
    t: float
    sigma_rels: FloatArray
    profile_error: FloatArray
    predicted_error: FloatArray
    tracked: tuple[float, ...]
    others: tuple[ErrorPoint, ...] = ()
    assumption: str = ""

    def __repr__(self) -> str:
        return f"ErrorCurve({self.label}: below 1 % for sigma_rel {self.ranges_text(0.01) or 'none'})"

    @property
    def worst(self) -> float:
        """The largest predicted error."""
        return float(self.predicted_error.max())

    @property
    def median(self) -> float:
        """The median of the predicted errors."""
        return float(np.median(self.predicted_error))

    def ranges_below(self, threshold: float) -> list[tuple[float, float]]:
        """Return the ranges of sigma_rel, of at least two points, where the predicted error is below `threshold`."""
        below = np.flatnonzero(self.predicted_error < threshold)
        if below.size == 0:
            return []
        runs = np.split(below, np.flatnonzero(np.diff(below) > 1) + 1)
        return [(float(self.sigma_rels[run[0]]), float(self.sigma_rels[run[-1]])) for run in runs if run.size > 1]

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as data for JSON, with None in place of infinite errors."""
        return {
            "label": self.label,
            "t": self.t,
            "tracked": list(self.tracked),
            "assumption": self.assumption or None,
            "below_1_percent": [list(ends) for ends in self.ranges_below(0.01)],
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

    def ranges_text(self, threshold: float) -> str:
        """Return `ranges_below` as text, "0.051 to 0.278", with each end rounded into its range."""
        return ", ".join(_range_text(*ends) for ends in self.ranges_below(threshold))


def several(items: Sequence[object]) -> str:
    """Return the representations of the first ten items, one per line."""
    more = [f"and {len(items) - 10} more"] if len(items) > 10 else []
    return "\n  ".join([*map(repr, items[:10]), *more])


def finite(value: float) -> float | None:
    """Return a value for JSON: the number, or None in place of nan and infinity."""
    return value if math.isfinite(value) else None


def _range_text(low: float, high: float) -> str:
    """Return a range as text, with the fewest digits, at least three, that leave some of it."""
    for digits in range(3, 9):
        first, last = math.ceil(round(low * 10**digits, 9)), math.floor(round(high * 10**digits, 9))
        if first < last:
            break
    return f"{first / 10**digits:.{digits}f} to {last / 10**digits:.{digits}f}"


def error_curve(
    candidate: Candidate,
    sigma_range: tuple[float, float] = (0.01, 0.2886),
    t: float | None = None,
    method: str | None = None,
    others: Sequence[Target] = (),
) -> ErrorCurve:
    """Return the reconstruction error over a range of sigma_rel.

    Arguments:
        candidate: the snapshots, of which those after `t` are not used.
        sigma_range: lowest and highest sigma_rel, both included.
        t: time of the targets; by default that of the last snapshot.
        method: "minvar" or "paper"; by default the first.
        others: further targets.
    """
    low, high = check_sigma_range(sigma_range)
    t = time_between(candidate.snapshots, t)
    usable, prior = candidate.up_to(t)
    tracked = _tracked(usable)
    inside = [s for s in tracked if low <= s <= high]
    grid = np.clip(np.unique(np.concatenate((np.geomspace(low, high, _POINTS), inside))), low, high)
    if check_method(method) == METHODS[0]:
        _, profile_error, predicted = Problem(usable, prior, t).solve(powers(grid, t), METHODS[0])
    else:
        result = reconstruct(usable, powers(grid, t), method, prior, t)
        predicted, profile_error = result.predicted_error, result.profile_error
    profiles = [target.profile(t, candidate.clock, candidate.t_first) for target in others]
    result = reconstruct(usable, profiles, method, prior, t)
    titles, widths = (target.title for target in others), (relative_width(profile, t) for profile in profiles)
    errors = result.profile_error.tolist(), _zero_if_nan(result.predicted_error).tolist()
    points = tuple(map(ErrorPoint, titles, widths, *errors))
    label = f"{candidate.label}, if {candidate.assumption}" if candidate.assumption else candidate.label
    return ErrorCurve(label, t, grid, profile_error, _zero_if_nan(predicted), tracked, points, candidate.assumption)


def forecast(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
    points: int = 41,
    label: str = "forecast",
) -> ErrorCurve:
    """Return the error curve of at least one snapshot by minimum variance, at the time of the last snapshot."""
    grid = np.clip(np.geomspace(*sigma_range, points), *sigma_range)
    t = max(p.t for p in snapshots)
    _, profile_error, predicted = Problem(snapshots, prior, t).solve(powers(grid, t), METHODS[0])
    return ErrorCurve(label, t, grid, profile_error, _zero_if_nan(predicted), _tracked(snapshots))


def _tracked(snapshots: Sequence[StoredProfile]) -> tuple[float, ...]:
    return tuple(sorted({float(f"{p.sigma_rel:.12g}") for p in snapshots if isinstance(p, PowerFunction)}))


def _zero_if_nan(predicted_error: FloatArray) -> FloatArray:
    """Return the errors with 0 in place of nan: weights of norm 0 are exact."""
    return np.nan_to_num(predicted_error, nan=0.0)


@dataclass(frozen=True)
class ErrorReport:
    """Error curves of runs, to compare."""

    curves: tuple[ErrorCurve, ...]

    def __repr__(self) -> str:
        return f"ErrorReport({several(self.curves)})"

    def to_dict(self) -> dict[str, Any]:
        """Return the curves as data for JSON."""
        return {"curves": [curve.to_dict() for curve in self.curves]}

    def to_csv(self) -> str:
        """Return the curves and the other targets as comma-separated values."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["curve", "t", "target", "sigma_rel", "predicted_error", "profile_error"])
        for curve in self.curves:
            report = curve.to_dict()
            columns = (report["sigma_rel"], report["predicted_error"], report["profile_error"])
            rows = [("sigma_rel", *numbers) for numbers in zip(*columns, strict=True)]
            for target, *numbers in (*rows, *(tuple(other.values()) for other in report["others"])):
                cells = ["" if number is None else repr(number) for number in numbers]
                writer.writerow([no_formula(curve.label), repr(curve.t), no_formula(target), *cells])
        return text.getvalue()


_FORMULAS = (*"=+-@", *"＝＋－＠")  # the latter in Chinese and Japanese spreadsheets


def no_formula(text: str) -> str:
    """Return the text as a cell that no spreadsheet reads as a formula, with control characters escaped."""
    return f"'{printable(text)}" if text.lstrip()[:1] in _FORMULAS else printable(text)


def time_between(snapshots: Sequence[StoredProfile], t: float | None) -> float:
    """Return `t`, or the last snapshot's time for None; raise an InvalidValueError if no snapshots surround it."""
    times = [profile.t for profile in snapshots]
    return max(times) if t is None else check_within("t", t, times)


def check_within(name: str, value: float, known: Collection[float]) -> float:
    """Return a time or step; raise an InvalidValueError unless it lies between the least and the largest known one."""
    low, high = min(known), max(known)
    accepted = f"lie between the first snapshot, {low:,.12g}, and the last, {high:,.12g}"
    return check_number(name, value, lambda time: low <= time <= high, accepted)


def check_max_error(max_error: float | None) -> None:
    """Raise an InvalidValueError unless `max_error` is None or lies in (0, 1)."""
    if max_error is not None:
        check_number("max_error", max_error, lambda error: 0 < error < 1, "be a relative error in (0, 1), such as 0.01")


def check_sigma_range(sigma_range: tuple[float, float]) -> tuple[float, float]:
    """Return the ends of a range of sigma_rel; raise an InvalidValueError unless they are two ascending numbers."""
    with suppress(TypeError, ValueError):
        low, high = map(check_sigma_rel, sigma_range)
        if low < high:
            return low, high
    reason = f"must be two numbers in (0, {UNIFORM_SIGMA_REL:.4f}), the first below the second"
    raise InvalidValueError("sigma_range", reason, value=brief(sigma_range))
