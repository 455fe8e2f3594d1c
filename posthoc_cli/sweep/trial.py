"""What a search measures, and a measurement of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from posthoc_cli.snapshots.decoding import ANY_SIGN
from posthoc_cli.targets import SigmaRel

LARGEST = 1e100  # the largest magnitude of a metric: sums of squares are finite
RANDOM_WEIGHTS = "random weights"
"""The target of trials that show whether an evaluation uses the weights, where all others have the
same metric."""
FRESH = (2, 3)
"""The seeds of measurements that claims are made from, and no choice is: what was chosen for its
metric has a metric that is too good."""


class Spot(NamedTuple):
    """What a search measures: an average of a length, at an end, with a share of the base."""

    sigma_rel: float
    t: float | None = None  # where an average ends that ends earlier than the others
    base_share: float = 0.0  # of the weights that a fine-tuning started from

    @property
    def title(self) -> str:
        title = SigmaRel(self.sigma_rel).title
        if self.t is not None:
            title += f" at t = {self.t:,.12g}"
        return f"{title}, base share {self.base_share:g}" if self.base_share else title


@dataclass(frozen=True)
class Trial:
    """One measurement of a metric; or images without a metric."""

    target: str  # the title of what was measured, such as `sigma_rel 0.15` or `last weights`
    sigma_rel: float | None  # None for weights that are compared with averages
    seed: int  # as given to the command
    # the metric, at most LARGEST; None without a metric, and of a failed trial
    value: Annotated[float, ANY_SIGN] | None = None
    standard_error: float | None = None
    predicted_error: float | None = None  # of the weights; None if unknown
    lost_gain: float | None = None  # by this error, at most
    seconds: float = 0.0  # of the evaluation alone
    error: str | None = None  # why it failed
    t: float | None = None  # this and the next as of a `Spot`
    base_share: float = 0.0

    @property
    def spot(self) -> Spot | None:
        if self.sigma_rel is None:
            return None
        return Spot(self.sigma_rel, self.t, self.base_share)

    @property
    def name(self) -> str:
        """The name of its logs and of the folder of its images."""
        return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{self.target}-seed-{self.seed}")

    @property
    def is_random(self) -> bool:
        return self.target == RANDOM_WEIGHTS


def common_metric(trials: Iterable[Trial]) -> float | None:
    """Find the metric that all successful trials have, at least two, but for random weights."""
    values = []
    for trial in trials:
        if trial.value is not None and not trial.is_random:
            values.append(trial.value)
    is_common = len(values) > 1 and len({*values}) == 1
    return values[0] if is_common else None
