"""What a sweep has found, as an object and as its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.sweep import search
from posthoc_cli.sweep.records import Record
from posthoc_cli.sweep.rounds import RAW, Axis
from posthoc_cli.targets import Target

RESULT = "sweep.json"


@dataclass(frozen=True)
class Refinement:
    """What a further search has found, of something beside the first, which was as found before.

    Attributes:
        name: "t"; "guide", the length of the second network's average; or "group GLOB", that of a group of tensors.
        value: what it is given: the best, or of a time or a group the one before, where the gain is lost in the noise.
        low, high: ends of the range that is equal to the best within the noise.
        mean, standard_error: the metric at the best.
        gains: whether the value before is not in that range.
    """

    name: str
    value: float
    low: float
    high: float
    mean: float
    standard_error: float
    gains: bool


@dataclass(frozen=True)
class SweepReport:
    """What a sweep has found.

    Attributes:
        metric: its name.
        minimize: whether lower is better.
        axis: the values of what was searched first.
        searched: what that was: the kind of a length, "t" or "guide".
        trials: all measured ones, failed ones with their error.
        found: the estimate; `value_of` gives its `best`, `low` and `high` as a user writes them.
        stopped: why no more was measured.
        best: the average whose metric is estimated to be best, which was written.
        title: what it is, for people; with its time or a second network's average, where these were searched.
        chosen: the value of all that was searched, and of the length: by "t", "guide", "sigma_rel" or another kind.
        kind: of the length.
        beside: what the titles of the trials of `found` end in: the values of all else.
        outputs: files that stay.
        settings: what makes the trials comparable.
        refinements: what further searches have found.
        lengths: sigma_rel by glob of what was written, where a group has one of its own; else empty.
        guide: directory of the second network.
        again: the command line that does it again.
    """

    metric: str
    minimize: bool
    axis: Axis
    searched: str
    trials: tuple[Record, ...]
    found: search.Estimate
    stopped: str
    best: Target
    title: str
    chosen: dict[str, float]
    kind: str = "sigma_rel"
    beside: str = ""
    outputs: tuple[Path, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    refinements: tuple[Refinement, ...] = ()
    lengths: dict[str, float] = field(default_factory=dict)
    guide: Path | None = None
    again: str = ""

    @property
    def failed(self) -> list[Record]:
        """Trials without a value."""
        return [trial for trial in self.trials if trial.value is None]

    @property
    def raw(self) -> float | None:
        """The metric of the raw weights, where they were measured."""
        values = [trial.value for trial in self.trials if trial.target == RAW and trial.value is not None]
        return sum(values) / len(values) if values else None

    def value_of(self, x: float) -> float:
        """A searched parameter as a user writes it."""
        return self.axis.value(x)

    def write(self, folder: str | Path) -> None:
        """Write it to a folder, as a page takes it; a WriteError."""
        folder = files.expanded(folder)
        with files.reported_as_write_error(folder):
            files.make_directory(folder)
        files.write_whole(folder / RESULT, f"{json.dumps(self.to_dict(), indent=1)}\n".encode(), overwrite=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.found
        curve = zip(found.xs.tolist(), found.curve.tolist(), found.errors.tolist(), strict=True)
        return {
            "metric": self.metric,
            "minimize": self.minimize,
            "axis": self.searched,
            "length": self.kind,
            "best": {"target": self.title, **self.chosen},
            "mean": found.mean,
            "standard_error": found.standard_error,
            "equal_within_noise": [self.value_of(found.low), self.value_of(found.high)],
            "expected_regret": found.regret,
            "noise": found.noise,
            "raw": self.raw,
            "stopped": self.stopped,
            "trials": [vars(trial) for trial in self.trials],
            "curve": [{"x": self.axis.unscaled(x), "mean": mean, "standard_error": error} for x, mean, error in curve],
            "beside": self.beside,
            "refinements": [vars(one) for one in self.refinements],
            "lengths": self.lengths,
            "guide": None if self.guide is None else str(self.guide),
            "again": self.again,
            "outputs": list(map(str, self.outputs)),
            "settings": self.settings,
        }
