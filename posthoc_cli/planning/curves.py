"""Error curves of snapshots against sigma_rel, and the fit of their profile to a target's."""

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
    Point,
    PowerFunction,
    StoredProfile,
    check_sigma_rel,
)
from posthoc_cli.reconstruction import (
    ASSUMED,
    METHODS,
    Motion,
    Prior,
    assumed_prior,
    check_method,
    expected_errors,
    points_of,
    reconstruct,
    relative_width,
)
from posthoc_cli.targets import Target

_POINTS = 200
"""Of a curve, spaced evenly in the logarithm; tracked sigma_rels are added."""
EVENLY = "the network moves evenly"
"""The default assumption behind the predicted errors of a schedule."""


@dataclass(frozen=True)
class Candidate:
    """Snapshots of a run or of a schedule.

    Attributes:
        label: for a legend.
        snapshots: their profiles.
        prior: of these snapshots.
        t_unit: of their times.
        clock: steps over training time.
        t_first: time of the first update.
        assumption: behind the predicted errors where the motion is assumed, by default that it is even; else empty.
    """

    label: str
    snapshots: Sequence[StoredProfile]
    prior: Prior
    t_unit: str = "steps"
    clock: Clock = field(default_factory=Clock.of_steps)
    t_first: float = 1.0
    assumption: str = ""

    def __post_init__(self) -> None:
        if not self.assumption and self.prior.source == ASSUMED:
            object.__setattr__(self, "assumption", EVENLY)

    @classmethod
    def of_schedule(cls, schedule: Schedule, motion: Motion | None = None, assumption: str = EVENLY) -> Candidate:
        """The snapshots that a schedule will leave; `motion` is relative to the norm, by default even."""
        label = f"plan: {listed(schedule.sigma_rels)} at {schedule.kept} times in {schedule.steps:,} steps"
        motion = motion or Motion.even(schedule.steps)
        snapshots = schedule.snapshots(motion)
        return cls(label, snapshots, assumed_prior(snapshots, schedule.rounding, motion), assumption=assumption)

    def __repr__(self) -> str:
        return f"Candidate({self.label})"

    def up_to(self, t: float) -> tuple[list[StoredProfile], Prior]:
        """The snapshots at or before `t`, and their prior."""
        usable = [index for index, profile in enumerate(self.snapshots) if profile.t <= t]
        return [self.snapshots[i] for i in usable], self.prior.of(usable)


@dataclass(frozen=True)
class ErrorPoint:
    """Errors of one target that is no power function, as in `ErrorCurve`; `sigma_rel` is its standard deviation / t."""

    label: str
    sigma_rel: float
    profile_error: float
    predicted_error: float


@dataclass(frozen=True)
class ErrorCurve:
    """Reconstruction error against sigma_rel, at one time.

    Attributes:
        label: snapshots and assumption, for a legend.
        t: the time of the targets.
        sigma_rels: shape [points].
        profile_error: relative L2 error of the profile: shape [points].
        predicted_error: expected relative L2 error of the weights: shape [points].
        tracked: sigma_rels of the snapshots.
        others: targets that are no power functions.
        assumption: behind the predicted errors; empty where the motion was measured.
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
        """The ranges of sigma_rel, of two points or more, in which the predicted error is below `threshold`."""
        below = np.flatnonzero(self.predicted_error < threshold)
        if below.size == 0:
            return []
        runs = np.split(below, np.flatnonzero(np.diff(below) > 1) + 1)
        return [(float(self.sigma_rels[run[0]]), float(self.sigma_rels[run[-1]])) for run in runs if run.size > 1]

    def to_dict(self) -> dict[str, Any]:
        """The curve as data for JSON; None in the place of infinite errors."""
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
        """The same as text, "0.051 to 0.278", with each end rounded into its range."""
        return ", ".join(_range_text(*ends) for ends in self.ranges_below(threshold))


def several(things: Sequence[object]) -> str:
    """The first ten, a line each."""
    more = [f"and {len(things) - 10} more"] if len(things) > 10 else []
    return "\n  ".join([*map(repr, things[:10]), *more])


def finite(value: float) -> float | None:
    """A number that JSON can hold: None in the place of nan and infinity."""
    return value if math.isfinite(value) else None


def _range_text(low: float, high: float) -> str:
    for digits in range(3, 9):
        first, last = math.ceil(round(low * 10**digits, 9)), math.floor(round(high * 10**digits, 9))
        if first < last:
            break
    return f"{first / 10**digits:.{digits}f} to {last / 10**digits:.{digits}f}"


def error_curve(
    candidate: Candidate | Schedule,
    sigma_range: tuple[float, float] = (0.01, 0.2886),
    t: float | None = None,
    method: str | None = None,
    others: Sequence[Target] = (),
) -> ErrorCurve:
    """Reconstruction error over a range of sigma_rel.

    Arguments:
        candidate: the snapshots, or the schedule that will leave them; those after `t` are left out.
        sigma_range: lowest and highest sigma_rel, both included.
        t: time of the targets; by default that of the last snapshot.
        others: further targets, which are no power functions.
    """
    low, high = check_sigma_range(sigma_range)
    if isinstance(candidate, Schedule):
        candidate = Candidate.of_schedule(candidate)
    t = time_between(candidate.snapshots, t)
    usable, prior = candidate.up_to(t)
    tracked = _tracked(usable)
    inside = [s for s in tracked if low <= s <= high]
    grid = np.clip(np.unique(np.concatenate((np.geomspace(low, high, _POINTS), inside))), low, high)
    if check_method(method) == METHODS[0]:
        predicted, profile_error = expected_errors(usable, powers(grid, t), prior, t)
    else:
        result = reconstruct(usable, powers(grid, t), method, prior, t)
        predicted, profile_error = result.predicted_error, result.profile_error
    profiles = [target.profile(t, candidate.clock, candidate.t_first) for target in others]
    found = reconstruct(usable, profiles, method, prior, t)
    widths = (relative_width(profile, t) for profile in profiles)
    each = zip(others, widths, found.profile_error.tolist(), _or_exact(found.predicted_error).tolist(), strict=True)
    points = tuple(ErrorPoint(one.title, *numbers) for one, *numbers in each)
    label = f"{candidate.label}, if {candidate.assumption}" if candidate.assumption else candidate.label
    return ErrorCurve(label, t, grid, profile_error, _or_exact(predicted), tracked, points, candidate.assumption)


def forecast(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
    points: int = 41,
    label: str = "forecast",
) -> ErrorCurve:
    """The error curve of these snapshots, at least one, at the time of the last one, by minimum variance."""
    grid = np.clip(np.geomspace(*sigma_range, points), *sigma_range)
    t = max(p.t for p in snapshots)
    predicted, profile_error = expected_errors(snapshots, powers(grid, t), prior, t)
    return ErrorCurve(label, t, grid, profile_error, _or_exact(predicted), _tracked(snapshots))


def _tracked(snapshots: Sequence[StoredProfile]) -> tuple[float, ...]:
    return tuple(sorted({float(f"{p.sigma_rel:.12g}") for p in snapshots if isinstance(p, PowerFunction)}))


def _or_exact(predicted_error: FloatArray) -> FloatArray:
    """The errors, where weights of norm 0 are exact."""
    return np.nan_to_num(predicted_error, nan=0.0)


@dataclass(frozen=True)
class ErrorReport:
    """Error curves to compare: of runs, then of schedules."""

    curves: tuple[ErrorCurve, ...]

    def __repr__(self) -> str:
        return f"ErrorReport({several(self.curves)})"

    def to_dict(self) -> dict[str, Any]:
        """The curves as data for JSON."""
        return {"curves": [curve.to_dict() for curve in self.curves]}

    def to_csv(self) -> str:
        """The curves and the other targets as comma-separated values."""
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
    """A cell that no spreadsheet takes for a formula, with control characters escaped."""
    return f"'{printable(text)}" if text.lstrip()[:1] in _FORMULAS else printable(text)


@dataclass(frozen=True)
class ProfileFit:
    """The profiles of a target and of its reconstruction over training time, as densities in 1 / time: [points].

    `snapshot_times` and `coefficients` are by tracked profile; shape [snapshots of it].
    """

    title: str
    t_unit: str
    times: FloatArray
    target: FloatArray
    reconstructed: FloatArray
    snapshot_times: dict[str, FloatArray]
    coefficients: dict[str, FloatArray]

    def __repr__(self) -> str:
        return f"ProfileFit({self.title})"


def profile_fit(
    candidate: Candidate, target: Target, t: float | None = None, points: int = 1000, method: str | None = None
) -> ProfileFit:
    """The reconstructed profile of one target, and the profile of the target itself."""
    t = time_between(candidate.snapshots, t)
    wanted = target.profile(t, candidate.clock, candidate.t_first)
    usable, prior = candidate.up_to(t)
    column = reconstruct(usable, [wanted], method, prior, t).coefficients[:, 0]
    times = np.linspace(t / points, t, points)
    knots = np.append(0.0, points_of(usable))
    made = np.sum([c * _density(p, times, knots) for c, p in zip(column, usable, strict=True)], axis=0)
    labels = np.array([_kind(profile) for profile in usable])
    places = {label: labels == label for label in dict.fromkeys(labels.tolist())}
    ends = np.array([profile.t for profile in usable])
    return ProfileFit(
        title=f"{target.title} from {candidate.label}", t_unit=candidate.t_unit, times=times,
        target=wanted.density(times), reconstructed=made,
        snapshot_times={label: ends[own] for label, own in places.items()},
        coefficients={label: column[own] for label, own in places.items()},
    )  # fmt: skip


def _density(profile: StoredProfile, times: FloatArray, knots: FloatArray) -> FloatArray:
    """The density at evenly spaced times from the first one after 0 on; mass at a knot spread over the time before."""
    if isinstance(profile, PowerFunction):
        return profile.density(times)
    tail = np.interp(times, knots, profile.tail(knots))
    return np.asarray(-np.diff(tail, prepend=1.0) / times[0], dtype=np.float64)


def _kind(profile: StoredProfile) -> str:
    if isinstance(profile, PowerFunction):
        return f"sigma_rel {profile.sigma_rel:.4g}"
    return "checkpoints" if isinstance(profile, Point) else "other averages"


def time_between(snapshots: Sequence[StoredProfile], t: float | None) -> float:
    """A time between the first snapshot and the last, which is the default; else an InvalidValueError."""
    times = [profile.t for profile in snapshots]
    return max(times) if t is None else check_within("t", t, times)


def check_within(name: str, value: float, known: Collection[float]) -> float:
    """A time or a step between those of the first snapshot and of the last, or an InvalidValueError."""
    low, high = min(known), max(known)
    accepted = f"lie between the first snapshot, {low:,.12g}, and the last, {high:,.12g}"
    return check_number(name, value, lambda time: low <= time <= high, accepted)


def check_max_error(max_error: float | None) -> None:
    """Raise an InvalidValueError unless it is None or a number above 0."""
    if max_error is not None:
        check_number("max_error", max_error, lambda error: error > 0, "be a number above 0, such as 0.01")


def check_sigma_range(sigma_range: tuple[float, float]) -> tuple[float, float]:
    """The two ends of a range of sigma_rel, the lower one first, or an InvalidValueError."""
    with suppress(TypeError, ValueError):
        low, high = map(check_sigma_rel, sigma_range)
        if low < high:
            return low, high
    reason = f"must be two numbers in (0, {UNIFORM_SIGMA_REL:.4f}), the first below the second"
    raise InvalidValueError("sigma_range", reason, value=brief(sigma_range))
