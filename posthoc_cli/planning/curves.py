"""What snapshots are good for: errors against sigma_rel, and the profile that they make of a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning.schedule import Schedule, listed
from posthoc_cli.profiles import UNIFORM_SIGMA_REL, FloatArray, PowerFunction, Profile, check_sigma_rel
from posthoc_cli.reconstruction import Prior, reconstruct, relative_width


@dataclass(frozen=True)
class Candidate:
    """Snapshots to be judged: of a run, or of a schedule.

    Attributes:
        label: what they are, for a legend.
        snapshots: their profiles.
        t_unit: what times count.
        prior: what is known of them besides; None where nothing is.
    """

    label: str
    snapshots: Sequence[PowerFunction]
    t_unit: str = "steps"
    prior: Prior | None = None

    @classmethod
    def of_schedule(cls, schedule: Schedule) -> Candidate:
        """The snapshots that a schedule will leave."""
        label = f"plan: {listed(schedule.sigma_rels)} at {schedule.kept} times in {schedule.steps:,} steps"
        return cls(label, schedule.snapshots())

    def up_to(self, t: float) -> tuple[list[PowerFunction], Prior | None]:
        """The snapshots at or before `t`, and their prior."""
        chosen = [index for index, profile in enumerate(self.snapshots) if profile.t <= t]
        return [self.snapshots[i] for i in chosen], None if self.prior is None else self.prior.of(chosen)


@dataclass(frozen=True)
class ErrorPoint:
    """Errors of one target that is no power function.

    Attributes:
        label: its title.
        sigma_rel: its own width, standard deviation / t.
        profile_error, predicted_error: as in `ErrorCurve`.
    """

    label: str
    sigma_rel: float
    profile_error: float
    predicted_error: float | None


@dataclass(frozen=True)
class ErrorCurve:
    """Reconstruction error against sigma_rel, at one time.

    Attributes:
        label: what the snapshots are, for a legend.
        t: the time of the targets.
        sigma_rels: shape [points].
        profile_error: relative L2 error of the profile: shape [points].
        predicted_error: expected relative L2 error of the weights, shape [points]; None where nothing was measured.
        tracked: sigma_rels that snapshots hold directly.
        others: targets that are no power functions.
    """

    label: str
    t: float
    sigma_rels: FloatArray
    profile_error: FloatArray
    predicted_error: FloatArray | None
    tracked: tuple[float, ...]
    others: tuple[ErrorPoint, ...] = ()

    @property
    def error(self) -> FloatArray:
        """The predicted error where there is one, else that of the profile: shape [points]."""
        return self.profile_error if self.predicted_error is None else self.predicted_error

    def ranges_below(self, threshold: float) -> list[tuple[float, float]]:
        """The ranges of sigma_rel, among the points, in which `error` is below `threshold`.

        A tracked profile whose neighbours are not below is a point and no range.
        """
        below = np.flatnonzero(self.error < threshold)
        if below.size == 0:
            return []
        runs = np.split(below, np.flatnonzero(np.diff(below) > 1) + 1)
        return [(float(self.sigma_rels[run[0]]), float(self.sigma_rels[run[-1]])) for run in runs if run.size > 1]


def ranges_text(ranges: Sequence[tuple[float, float]]) -> str:
    """Ranges for people."""
    return ", ".join(f"{low:.3f} to {high:.3f}" for low, high in ranges) or "no value"


def error_curve(
    candidate: Candidate,
    sigma_range: tuple[float, float] = (0.01, 0.2886),
    points: int = 200,
    t: float | None = None,
    method: str | None = None,
    others: Sequence[tuple[str, Profile]] = (),
) -> ErrorCurve:
    """Reconstruction error over a range of sigma_rel.

    Arguments:
        candidate: the snapshots; those after `t` are left out.
        sigma_range: lowest and highest sigma_rel, both included; spaced evenly in the logarithm. The
            tracked sigma_rels within it are points of their own.
        points: how many, before those.
        t: time of the targets; by default that of the last snapshot.
        method: the solver.
        others: titles and profiles of targets that are no power functions.
    """
    low, high = check_sigma_range(sigma_range)
    times = [p.t for p in candidate.snapshots]
    t = max(times) if t is None else t
    if not min(times) <= t <= max(times):
        raise InvalidValueError(
            f"t {t:.12g}: must lie between the first snapshot, {min(times):,.12g}, and the last, {max(times):,.12g}"
        )
    usable, prior = candidate.up_to(t)
    tracked = tuple(sorted({float(f"{p.sigma_rel:.12g}") for p in usable}))
    inside = [s for s in tracked if low <= s <= high]
    grid = np.unique(np.concatenate((np.geomspace(low, high, points), inside)))
    grid = np.clip(grid, low, high)
    targets: list[Profile] = [PowerFunction.from_sigma_rel(float(s), t) for s in grid]
    result = reconstruct(usable, targets + [profile for _, profile in others], method, prior, t)
    known = result.known_error(0) is not None
    return ErrorCurve(
        label=candidate.label,
        t=t,
        sigma_rels=grid,
        profile_error=result.profile_error[: grid.size],
        predicted_error=result.predicted_error[: grid.size] if known else None,
        tracked=tracked,
        others=tuple(
            ErrorPoint(title, relative_width(profile, t), float(result.profile_error[i]), result.known_error(i))
            for i, (title, profile) in enumerate(others, start=grid.size)
        ),
    )


@dataclass(frozen=True)
class ProfileFit:
    """A target and what snapshots make of it, over training time.

    Attributes:
        title: names the target and the snapshots.
        t_unit: what times count.
        times: shape [points].
        target, reconstructed: densities over `times`, in 1 / time.
        snapshot_times, coefficients: by tracked profile; shape [snapshots of it].
    """

    title: str
    t_unit: str
    times: FloatArray
    target: FloatArray
    reconstructed: FloatArray
    snapshot_times: dict[str, FloatArray]
    coefficients: dict[str, FloatArray]


def profile_fit(
    candidate: Candidate,
    title: str,
    target: Profile,
    t: float | None = None,
    points: int = 1000,
    method: str | None = None,
) -> ProfileFit:
    """The profile that the snapshots make for one target, beside the target itself."""
    t = max(p.t for p in candidate.snapshots) if t is None else t
    usable, prior = candidate.up_to(t)
    column = reconstruct(usable, [target], method, prior, t).coefficients[:, 0]
    times = np.linspace(t / points, t, points)
    made = np.sum([c * p.density(times) for c, p in zip(column, usable, strict=True)], axis=0)
    groups: dict[str, list[tuple[float, float]]] = {}
    for coefficient, profile in zip(column, usable, strict=True):
        groups.setdefault(f"sigma_rel {profile.sigma_rel:.4g}", []).append((profile.t, float(coefficient)))
    return ProfileFit(
        title=f"{title} from {candidate.label}",
        t_unit=candidate.t_unit,
        times=times,
        target=target.density(times),
        reconstructed=made,
        snapshot_times={label: np.array([time for time, _ in group]) for label, group in groups.items()},
        coefficients={label: np.array([c for _, c in group]) for label, group in groups.items()},
    )


def check_sigma_range(sigma_range: tuple[float, float]) -> tuple[float, float]:
    """The two ends of a range of sigma_rel, the lower one first, or an InvalidValueError."""
    try:
        low, high = (check_sigma_rel(s) for s in sigma_range)
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidValueError):
            raise InvalidValueError(f"sigma_range: {error}") from error
        raise InvalidValueError(f"sigma_range {sigma_range!r}: must be two numbers, such as (0.05, 0.28)") from error
    if not low < high:
        raise InvalidValueError(
            f"sigma_range {low:g}:{high:g}: the first must be below the second, both in (0, {UNIFORM_SIGMA_REL:.4f})"
        )
    return low, high
