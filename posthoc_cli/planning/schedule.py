"""A schedule of snapshots before training: what a tracker with these settings will hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning.thinning import USEFUL_RANGE, snapshots_to_drop
from posthoc_cli.profiles import FloatArray, PowerFunction, check_sigma_rel, gamma_from_sigma_rel
from posthoc_cli.reconstruction import Motion, Prior, assumed_prior, expected_errors
from posthoc_cli.reconstruction.prior import ASSUMED_STRETCH

MOST_TIMES = 20_000
MOST_SNAPSHOTS = 2_048
"""What a schedule may take and leave: the solve is dense, and takes seconds at the second."""

_FOLLOWED_TIMES = 8
"""Thinning is followed at up to this many times of what is kept; what longer runs keep looks alike."""

_FOLLOWED_SNAPSHOTS = 24
"""Snapshots of a profile whose thinning is followed one by one; where more are kept, they lie as densely as those."""


@dataclass(frozen=True)
class Schedule:
    """A plan of snapshots.

    Attributes:
        sigma_rels: tracked profiles.
        steps: length of training.
        checkpoint_every: steps between snapshots.
        max_checkpoints: snapshots kept a profile, thinned as they arrive; None keeps all.
        rounding: root mean square error of a stored average, relative to its norm.
    """

    sigma_rels: tuple[float, ...]
    steps: int
    checkpoint_every: int
    max_checkpoints: int | None = None
    rounding: float = 0.0

    def __post_init__(self) -> None:
        for sigma_rel in self.sigma_rels:
            check_sigma_rel(sigma_rel)
        for name, value in (("steps", self.steps), ("checkpoint_every", self.checkpoint_every)):
            if value < 1:
                raise InvalidValueError(f"{name} {value}", "must be at least 1")
        if self.max_checkpoints is not None and self.max_checkpoints < 1:
            raise InvalidValueError(
                "max_checkpoints", "must be at least 1, or None to keep all", value=self.max_checkpoints
            )
        if self.checkpoint_every > self.steps:
            raise InvalidValueError(
                "checkpoint_every",
                f"must be at most steps ({self.steps:,}), or no snapshot is ever taken",
                value=f"{self.checkpoint_every:,}",
            )
        kept = self.kept * len(self.sigma_rels)
        if self.taken > MOST_TIMES or kept > MOST_SNAPSHOTS:
            raise InvalidValueError(
                "checkpoint_every",
                f"takes snapshots at {self.taken:,} times and keeps {kept:,}; at most {MOST_TIMES:,} and "
                f"{MOST_SNAPSHOTS:,} can be judged: take a larger one, or fewer max_checkpoints",
                value=f"{self.checkpoint_every:,}",
            )

    @property
    def taken(self) -> int:
        """Times at which snapshots are taken."""
        return self.steps // self.checkpoint_every

    @property
    def kept(self) -> int:
        """Snapshots of each profile that are left at the end."""
        return min(self.taken, self.max_checkpoints or self.taken)

    @property
    def even_motion(self) -> Motion:
        """What is taken of a network's movement, relative to its norm, where nothing is known."""
        return Motion.even(self.steps, ASSUMED_STRETCH**2)

    def snapshots(
        self, motion: Motion | None = None, sigma_range: tuple[float, float] = USEFUL_RANGE
    ) -> list[PowerFunction]:
        """Profiles of all the snapshots that are left at the end, by time.

        Arguments:
            motion: how the network will move, relative to its norm; by default evenly.
            sigma_range: what snapshots are kept for.
        """
        if motion is None:
            motion = self.even_motion
        gammas = [gamma_from_sigma_rel(s) for s in self.sigma_rels]
        if self.kept == self.taken:
            counts = range(1, self.taken + 1)
            return [PowerFunction(gamma, float(count * self.checkpoint_every)) for count in counts for gamma in gammas]
        if self.kept > _FOLLOWED_SNAPSHOTS:
            return self._spread_like(self._with_fewer().snapshots(motion, sigma_range))
        stride = max(1, self.taken // (_FOLLOWED_TIMES * self.kept))
        left: list[PowerFunction] = []
        # So that the last one of all is among them, whatever the stride.
        for count in range(self.taken - (self.taken - 1) // stride * stride, self.taken + 1, stride):
            left += [PowerFunction(gamma, float(count * self.checkpoint_every)) for gamma in gammas]
            if len(left) > self.kept * len(gammas):
                prior = assumed_prior(left, self.rounding, motion)
                gone = set(snapshots_to_drop(left, prior, self.max_checkpoints, sigma_range))
                left = [p for index, p in enumerate(left) if index not in gone]
        return left

    def _with_fewer(self) -> Schedule:
        """A schedule with as many snapshots as can be followed, that takes and keeps in the same proportion.

        Each of them stands for several, whose roundings average out.
        """
        share = _FOLLOWED_SNAPSHOTS / self.kept
        every = self.steps // max(round(self.taken * share), _FOLLOWED_SNAPSHOTS)
        return replace(
            self, checkpoint_every=every, max_checkpoints=_FOLLOWED_SNAPSHOTS, rounding=self.rounding * share**0.5
        )

    def _spread_like(self, fewer: Sequence[PowerFunction]) -> list[PowerFunction]:
        """As many snapshots as this schedule keeps, each profile's as densely in time as its `fewer` ones."""
        spread = []
        for gamma in {p.gamma: None for p in fewer}:
            times = [0.0, *sorted(p.t for p in fewer if p.gamma == gamma)]
            wanted = np.linspace(0, len(times) - 1, self.kept + 1)[1:]
            at = np.interp(wanted, np.arange(len(times)), times) * self.taken / times[-1]
            number = np.arange(self.kept)
            # Whole multiples of checkpoint_every, no two the same, the last one the last.
            counts = np.maximum.accumulate(np.maximum(at.round(), 1) - number) + number
            counts = np.minimum(counts, self.taken - number[::-1])
            spread += [PowerFunction(gamma, float(count * self.checkpoint_every)) for count in counts]
        return sorted(spread, key=lambda p: (p.t, -p.gamma))


def listed(sigma_rels: Sequence[float]) -> str:
    """Numbers for a label."""
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


# --- The errors that snapshots will have over a range of sigma_rel ---------------------------------


@dataclass(frozen=True)
class Forecast:
    """Errors over a range of sigma_rel, at the time of the last snapshot.

    Attributes:
        sigma_rels: what the errors are of: shape [points].
        predicted_error: expected relative L2 error of the weights: shape [points].
        profile_error: relative L2 error of the profile: shape [points].
    """

    sigma_rels: FloatArray
    predicted_error: FloatArray
    profile_error: FloatArray

    @property
    def worst(self) -> float:
        """The largest predicted error in the range."""
        return float(self.predicted_error.max())

    @property
    def median(self) -> float:
        """The median of the predicted errors in the range."""
        return float(np.median(self.predicted_error))


def forecast(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
    points: int = 41,
) -> Forecast:
    """What errors to expect of averages made of these snapshots.

    Arguments:
        snapshots: profiles of what is stored, at least one.
        prior: of these snapshots; an assumed one counts, too. Weights of norm 0 are reproduced exactly.
        sigma_range: lowest and highest sigma_rel.
        points: how many sigma_rels, spread over the range.
    """
    return forecast_at(snapshots, prior, sigma_rels_in(sigma_range, points))


def sigma_rels_in(sigma_range: tuple[float, float], points: int = 41) -> FloatArray:
    """Evenly spaced in the logarithm, both ends included: shape [points]."""
    return np.clip(np.geomspace(*sigma_range, points), *sigma_range)


def forecast_at(snapshots: Sequence[PowerFunction], prior: Prior, sigma_rels: FloatArray) -> Forecast:
    """As `forecast`, at these sigma_rels."""
    t = max(p.t for p in snapshots)
    targets = [PowerFunction.from_sigma_rel(float(s), t) for s in sigma_rels]
    predicted, profile = expected_errors(snapshots, targets, prior, t)
    return Forecast(sigma_rels, np.nan_to_num(predicted, nan=0.0), profile)
