"""A schedule of snapshots before training: what a tracker with these settings will hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posthoc_cli.dtypes import DTYPES, EPS, WORDS
from posthoc_cli.errors import InvalidValueError, check_number, check_word, percent
from posthoc_cli.planning.thinning import USEFUL_RANGE, range_of, snapshots_to_drop
from posthoc_cli.profiles import FloatArray, PowerFunction, check_sigma_rel, gamma_from_sigma_rel
from posthoc_cli.reconstruction import ASSUMED_STRETCH, ROUNDING, Motion, Prior, assumed_prior, expected_errors

MOST_TIMES = 20_000
MOST_SNAPSHOTS = 2_048
"""Limits of a schedule: the dense solve takes seconds at the second one."""

_SIMULATED_TIMES = 8
"""Thinning is simulated at up to so many times the snapshots kept; longer runs keep similar ones."""

_SIMULATED_SNAPSHOTS = 24
"""Snapshots of a profile whose thinning is simulated; larger numbers are spread with the same density."""


PLANNED_BYTES = {DTYPES[name].torch_name: DTYPES[name].nbytes for name in ("F16", "BF16", "F32")}
"""The dtypes of plans, and bytes an element."""


def relative_rounding(dtype: str) -> float:
    """Root mean square error of values rounded to the nearest of a dtype, relative to them; float16 1.9e-4.

    Raises:
        InvalidValueError: a dtype that no plan has.
    """
    check_word("dtype", dtype, PLANNED_BYTES)
    return ROUNDING * EPS[WORDS[dtype]]


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
        for name in ("steps", "checkpoint_every", "max_checkpoints"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, lambda count: count >= 1, "be at least 1")
        check_interval(self.checkpoint_every, self.steps)
        kept = self.kept * len(self.sigma_rels)
        if self.taken > MOST_TIMES or kept > MOST_SNAPSHOTS:
            found = f"takes snapshots at {self.taken:,} times and keeps {kept:,}"
            reason = f"{found}; at most {MOST_TIMES:,} and {MOST_SNAPSHOTS:,} are supported"
            hint = "use a larger one, or fewer max_checkpoints"
            raise InvalidValueError("checkpoint_every", reason, hint, value=f"{self.checkpoint_every:,}")

    @property
    def taken(self) -> int:
        """Times at which snapshots are taken."""
        return self.steps // self.checkpoint_every

    @property
    def kept(self) -> int:
        """Snapshots of each profile at the end."""
        return min(self.taken, self.max_checkpoints or self.taken)

    @property
    def even_motion(self) -> Motion:
        """The assumed motion of the network, relative to its norm, where nothing is known."""
        return Motion.even(self.steps, ASSUMED_STRETCH**2)

    def snapshots(self, motion: Motion | None = None) -> list[PowerFunction]:
        """Profiles of the snapshots at the end, by time; motion is even by default."""
        motion = self.even_motion if motion is None else motion
        gammas = [gamma_from_sigma_rel(s) for s in self.sigma_rels]
        if self.kept == self.taken:
            counts = range(1, self.taken + 1)
            return [PowerFunction(gamma, float(count * self.checkpoint_every)) for count in counts for gamma in gammas]
        if self.kept > _SIMULATED_SNAPSHOTS:
            return self._spread_like(self._with_fewer().snapshots(motion))
        stride = max(1, self.taken // (_SIMULATED_TIMES * self.kept))
        left: list[PowerFunction] = []
        # Starts where the last time is one of the strides.
        for count in range(self.taken - (self.taken - 1) // stride * stride, self.taken + 1, stride):
            left += [PowerFunction(gamma, float(count * self.checkpoint_every)) for gamma in gammas]
            if len(left) > self.kept * len(gammas):
                prior = assumed_prior(left, self.rounding, motion)
                kept_for = range_of(self.sigma_rels)
                dropped = set(snapshots_to_drop(left, prior, self.kept, kept_for))
                left = [p for index, p in enumerate(left) if index not in dropped]
        return left

    def _with_fewer(self) -> Schedule:
        """A schedule small enough to be simulated; each snapshot represents several, whose roundings average out."""
        share = _SIMULATED_SNAPSHOTS / self.kept
        every = self.steps // max(round(self.taken * share), _SIMULATED_SNAPSHOTS)
        rounding = self.rounding * share**0.5
        return replace(self, checkpoint_every=every, max_checkpoints=_SIMULATED_SNAPSHOTS, rounding=rounding)

    def _spread_like(self, fewer: Sequence[PowerFunction]) -> list[PowerFunction]:
        """As many snapshots as this schedule keeps, with the density of the `fewer` ones of each profile."""
        spread = []
        for gamma in {p.gamma: None for p in fewer}:
            times = [0.0, *sorted(p.t for p in fewer if p.gamma == gamma)]
            wanted = np.linspace(0, len(times) - 1, self.kept + 1)[1:]
            at = np.interp(wanted, np.arange(len(times)), times) * self.taken / times[-1]
            number = np.arange(self.kept)
            # Distinct multiples of checkpoint_every that end with the last one.
            counts = np.maximum.accumulate(np.maximum(at.round(), 1) - number) + number
            counts = np.minimum(counts, self.taken - number[::-1])
            spread += [PowerFunction(gamma, float(count * self.checkpoint_every)) for count in counts]
        return sorted(spread, key=lambda p: (p.t, -p.gamma))


def check_interval(checkpoint_every: int, steps: int) -> None:
    """Raise an InvalidValueError if no snapshot would be taken."""
    if checkpoint_every > steps:
        reason = f"must be at most steps ({steps:,}), or no snapshot is ever taken"
        raise InvalidValueError("checkpoint_every", reason, value=f"{checkpoint_every:,}")


def listed(sigma_rels: Sequence[float]) -> str:
    """Numbers for a label."""
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


@dataclass(frozen=True)
class Forecast:
    """Errors over a range of sigma_rel, at the time of the last snapshot.

    Attributes:
        sigma_rels: widths of the averages: shape [points].
        predicted_error: expected relative L2 error of the weights: shape [points].
        profile_error: relative L2 error of the profile: shape [points].
    """

    sigma_rels: FloatArray
    predicted_error: FloatArray
    profile_error: FloatArray

    def __repr__(self) -> str:
        low, high = self.sigma_rels[0], self.sigma_rels[-1]
        errors = f"worst error {percent(self.worst)}, median error {percent(self.median)}"
        return f"Forecast(sigma_rel {low:g} to {high:g}: {errors})"

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
    """Expected errors of averages made of these snapshots, at least one, over a range of sigma_rel.

    Weights of norm 0 are exact.
    """
    sigma_rels = np.clip(np.geomspace(*sigma_range, points), *sigma_range)
    t = max(p.t for p in snapshots)
    targets = [PowerFunction.from_sigma_rel(float(s), t) for s in sigma_rels]
    predicted, profile = expected_errors(snapshots, targets, prior, t)
    return Forecast(sigma_rels, np.nan_to_num(predicted, nan=0.0), profile)
