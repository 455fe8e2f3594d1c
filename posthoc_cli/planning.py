"""Snapshot schedules: when snapshots are taken, which are kept, what that will be good for.

Pure NumPy; nothing here reads a file, so that a schedule can be judged before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import UNIFORM_SIGMA_REL, FloatArray, PowerFunction, check_sigma_rel
from posthoc_cli.reconstruction import reconstruct

MOST_TIMES = 20_000
MOST_SNAPSHOTS = 2_048
"""What a schedule may take and leave: the solve is dense, and takes seconds at the second."""


# --- which snapshots are kept ----------------------------------------------------------------------


def snapshots_to_drop(times: Sequence[float], keep: int | None) -> list[int]:
    """Which of the snapshots at `times` (growing) go, so that `keep` remain: indices, in the order to drop.

    The first and the last time stay (the last, where `keep` is 1). Of the others the one goes first whose
    neighbours are closest together; between equals, the newest. Applied as snapshots arrive at even
    distances this keeps the widest gap at most twice the even one, so that long averages stay within reach;
    dropping the oldest would lose them.
    """
    if keep is None:
        return []
    if keep < 1:
        raise InvalidValueError(f"max_checkpoints {keep}: must be at least 1, or None to keep all")
    left = list(range(len(times)))
    dropped = []
    while len(left) > keep:
        dropped.append(left.pop(_most_crowded([times[i] for i in left], keep)))
    return dropped


def _most_crowded(times: Sequence[float], keep: int) -> int:
    if keep == 1 or len(times) == 2:
        return 0
    return min(range(1, len(times) - 1), key=lambda i: (times[i + 1] - times[i - 1], -i))


# --- a schedule before training --------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """A plan of snapshots: what a tracker with these settings will hold after `steps` steps."""

    sigma_rels: tuple[float, ...]
    steps: int
    checkpoint_every: int
    max_checkpoints: int | None = None

    def __post_init__(self) -> None:
        for sigma_rel in self.sigma_rels:
            check_sigma_rel(sigma_rel)
        for name, value in (("steps", self.steps), ("checkpoint_every", self.checkpoint_every)):
            if value < 1:
                raise InvalidValueError(f"{name} {value}: must be at least 1")
        if self.checkpoint_every > self.steps:
            raise InvalidValueError(
                f"checkpoint_every {self.checkpoint_every:,}: must be at most steps ({self.steps:,}), "
                "or no snapshot is ever taken"
            )
        taken = self.steps // self.checkpoint_every
        kept = min(taken, self.max_checkpoints or taken) * len(self.sigma_rels)
        if taken > MOST_TIMES or kept > MOST_SNAPSHOTS:
            raise InvalidValueError(
                f"checkpoint_every {self.checkpoint_every:,}: takes snapshots at {taken:,} times and keeps {kept:,}; "
                f"at most {MOST_TIMES:,} and {MOST_SNAPSHOTS:,} can be judged: "
                "take a larger one, or fewer max_checkpoints"
            )

    def times(self) -> list[float]:
        """Times of the snapshots that are left at the end, thinned as they arrive."""
        kept: list[float] = []
        for t in range(self.checkpoint_every, self.steps + 1, self.checkpoint_every):
            kept.append(float(t))
            for index in snapshots_to_drop(kept, self.max_checkpoints):
                del kept[index]
        return kept

    def snapshots(self) -> list[PowerFunction]:
        """Profiles of all the snapshots that are left at the end."""
        return [PowerFunction.from_sigma_rel(s, t) for t in self.times() for s in self.sigma_rels]


# --- what snapshots are good for -------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Snapshots to be judged: of a run, or of a schedule."""

    label: str
    snapshots: Sequence[PowerFunction]
    t_unit: str = "steps"

    @classmethod
    def of_schedule(cls, schedule: Schedule) -> Candidate:
        """The snapshots that a schedule will leave."""
        count = len(schedule.times())
        label = f"plan: {_listed(schedule.sigma_rels)} at {count} times in {schedule.steps:,} steps"
        return cls(label, schedule.snapshots())


@dataclass(frozen=True)
class ErrorCurve:
    """Reconstruction error against sigma_rel, at one time.

    Attributes:
        label: what the snapshots are, for a legend.
        t: the time of the targets.
        sigma_rels, profile_error: the curve; shape [points].
        tracked: sigma_rels that snapshots hold directly.
    """

    label: str
    t: float
    sigma_rels: FloatArray
    profile_error: FloatArray
    tracked: tuple[float, ...]

    def ranges_below(self, threshold: float) -> list[tuple[float, float]]:
        """The ranges of sigma_rel, among the points, in which the error is below `threshold`.

        A tracked profile whose neighbours are not below is a point and no range.
        """
        below = np.flatnonzero(self.profile_error < threshold)
        if below.size == 0:
            return []
        runs = np.split(below, np.flatnonzero(np.diff(below) > 1) + 1)
        return [(float(self.sigma_rels[run[0]]), float(self.sigma_rels[run[-1]])) for run in runs if run.size > 1]


def error_curve(
    candidate: Candidate,
    sigma_range: tuple[float, float] = (0.01, 0.2886),
    points: int = 200,
    t: float | None = None,
    method: str | None = None,
) -> ErrorCurve:
    """Reconstruction error over a range of sigma_rel.

    Arguments:
        candidate: the snapshots; those after `t` are left out.
        sigma_range: lowest and highest sigma_rel, both included; spaced evenly in the logarithm. The
            tracked sigma_rels within it are points of their own.
        points: how many, before those.
        t: time of the targets; by default that of the last snapshot.
        method: the solver.
    """
    low, high = check_sigma_range(sigma_range)
    times = [p.t for p in candidate.snapshots]
    t = max(times) if t is None else t
    if not min(times) <= t <= max(times):
        raise InvalidValueError(
            f"t {t:g}: must lie between the first snapshot, {min(times):g}, and the last, {max(times):g}"
        )
    usable = [p for p in candidate.snapshots if p.t <= t]
    tracked = tuple(sorted({float(f"{p.sigma_rel:.12g}") for p in usable}))
    inside = [s for s in tracked if low <= s <= high]
    grid = np.unique(np.concatenate((np.geomspace(low, high, points), inside)))
    grid = np.clip(grid, low, high)
    result = reconstruct(usable, [PowerFunction.from_sigma_rel(float(s), t) for s in grid], method)
    return ErrorCurve(candidate.label, t, grid, result.profile_error, tracked)


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
    sigma_rel: float,
    t: float | None = None,
    points: int = 1000,
    method: str | None = None,
) -> ProfileFit:
    """The profile that the snapshots make for one target, beside the target itself."""
    t = max(p.t for p in candidate.snapshots) if t is None else t
    usable = [p for p in candidate.snapshots if p.t <= t]
    target = PowerFunction.from_sigma_rel(sigma_rel, t)
    column = reconstruct(usable, [target], method).coefficients[:, 0]
    times = np.linspace(t / points, t, points)
    made = np.sum([c * p.density(times) for c, p in zip(column, usable, strict=True)], axis=0)
    groups: dict[str, list[tuple[float, float]]] = {}
    for coefficient, profile in zip(column, usable, strict=True):
        groups.setdefault(f"sigma_rel {profile.sigma_rel:.4g}", []).append((profile.t, float(coefficient)))
    return ProfileFit(
        title=f"sigma_rel {sigma_rel:g} from {candidate.label}",
        t_unit=candidate.t_unit,
        times=times,
        target=target.density(times),
        reconstructed=made,
        snapshot_times={label: np.array([time for time, _ in group]) for label, group in groups.items()},
        coefficients={label: np.array([c for _, c in group]) for label, group in groups.items()},
    )


def _listed(sigma_rels: Sequence[float]) -> str:
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


def check_sigma_range(sigma_range: tuple[float, float]) -> tuple[float, float]:
    """The two ends of a range of sigma_rel, the lower one first, or an InvalidValueError."""
    try:
        low, high = (check_sigma_rel(s) for s in sigma_range)
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidValueError):
            raise
        raise InvalidValueError(f"sigma_range {sigma_range!r}: must be two numbers, such as (0.05, 0.28)") from error
    if not low < high:
        raise InvalidValueError(
            f"sigma range {low:g} to {high:g}: the first must be below the second, both in (0, {UNIFORM_SIGMA_REL:.4f})"
        )
    return low, high
