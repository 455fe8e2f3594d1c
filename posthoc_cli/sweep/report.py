"""The report of a sweep: for programs, as JSON, and its results as texts for people."""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, at_most, count_noun, percent
from posthoc_cli.sweep.search import (
    Estimate,
    Lengths,
    Trial,
    common_metric,
    estimate,
    estimate_ends,
)
from posthoc_cli.targets import SigmaRel, full_title, name_equal_length

RESULT = "sweep.json"  # the file of a report in the folder of a sweep
_POINTS = 101  # of the drawn curve


class Gain(NamedTuple):
    """How much better than some weights the best average is, as a fraction of their metric."""

    title: str
    value: float | None  # the mean metric of those weights; None if their trial has failed
    gain: float | None
    margin: float | None  # half the width of the gain's 95 % interval; None if it is unknown


@dataclass(frozen=True, repr=False)
class SweepReport:
    """The result of a sweep: all its trials, the estimate, and the files of the best average.

    `compared` are the titles of what averages are compared with; `settings` what the trials share;
    `rerun_command` the command line that repeats it.
    """

    lengths: Lengths
    budget: int
    compared: tuple[str, ...]
    metric: str
    minimize: bool | None
    settings: dict[str, Any]
    ends: tuple[float, ...] = ()  # at which the longest average may end, too, the latest first
    steps: float | None = None  # of the training; None if it is not known
    t_unit: str = "steps"
    directory: Path = Path()  # of the run
    newest_t: float | None = None  # the time of its newest snapshot or checkpoint
    own_ema: str | None = None  # which of `compared` is the user's own EMA
    rerun_command: str = ""
    trials: tuple[Trial, ...] = ()
    outputs: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        if self.minimize is None:
            return f"SweepReport({count_noun(len(self.trials), 'trial')}, by eye)"
        text = f"best: {self.best_title}; {self.metric}: {self.value:.6g}"
        if gain := describe_gain(self):
            text += f"; gain: {gain}"
        return f"SweepReport({text})"

    def _repr_html_(self) -> str:
        """Show the result and its curve in a notebook."""
        text = f"<p>{html.escape(repr(self))}</p>"
        if self.minimize is None:
            return text
        from posthoc_cli import plots

        values = self.to_dict()
        text += plots.as_html(lambda: plots.sweep_figure(values))
        if self.end_curve():
            text += plots.as_html(lambda: plots.end_figure(values))
        return text

    @cached_property
    def estimate(self) -> Estimate:
        """The estimate; raises an InvalidValueError without a metric."""
        if self.minimize is None:
            raise InvalidValueError("estimate", "there is no estimate without a metric")
        return estimate(self.trials, self.lengths.step(self.budget), self.minimize)

    @cached_property
    def end_estimate(self) -> Estimate | None:
        """The estimate for each end of the longest average; None if no earlier one was measured."""
        if all(trial.t is None for trial in self.trials) or self.estimate.best != self.lengths.high:
            return None
        return estimate_ends(self.trials, self.estimate, self.t, bool(self.minimize))

    @property
    def t(self) -> float:
        """The time at which the averages end, but for the earlier ones."""
        return float(self.settings["t"])

    @property
    def all_tied(self) -> bool:
        """Whether all that was measured has the same metric, so that there is nothing to choose."""
        return self.minimize is not None and common_metric(self.trials) is not None

    @property
    def keeps_own_ema(self) -> bool:
        """Whether the user's own EMA is taken: if all tie, that needs no other length."""
        return self.all_tied and any(self.is_own_ema(trial) for trial in self.trials)

    def is_own_ema(self, trial: Trial) -> bool:
        return trial.target == self.own_ema and trial.value is not None

    @property
    def best(self) -> float | None:
        """The sigma_rel whose metric is estimated to be best, which was written; None if that is
        the user's own EMA."""
        return None if self.keeps_own_ema else self.estimate.best

    @property
    def best_t(self) -> float:
        """The time at which the best average ends."""
        return self.t if self.end_estimate is None else self.end_estimate.best

    @property
    def chosen(self) -> Estimate:
        """The estimate whose best point is the best average: for each end if that is earlier."""
        if self.end_estimate is None or self.best_t == self.t:
            return self.estimate
        return self.end_estimate

    @property
    def value(self) -> float:
        """The estimated metric of the best average: of the lowest of many the measured one is too
        good."""
        return self.chosen.value

    @property
    def gains(self) -> list[Gain]:
        """The gain over each of the compared weights."""
        return [self._gain(title) for title in self.compared]

    def _gain(self, title: str) -> Gain:
        values = []
        for trial in self.trials:
            if trial.target == title and trial.value is not None:
                values.append(trial.value)
        if not values:
            return Gain(title, None, None, None)
        mean = sum(values) / len(values)
        if mean == 0:
            return Gain(title, mean, None, None)
        change = (self.value - mean) / abs(mean)
        margin = self.chosen.margin(len(values)) / abs(mean)
        known = None if math.isnan(margin) else margin
        return Gain(title, mean, -change if self.minimize else change, known)

    def is_best(self, trial: Trial) -> bool:
        """Whether a trial has measured the best average."""
        if self.keeps_own_ema:
            return self.is_own_ema(trial)
        end = self.settings["t"] if trial.t is None else trial.t
        return trial.sigma_rel == self.best and end == self.best_t

    @property
    def best_trial(self) -> Trial:
        """The first trial of the best average."""
        return next(filter(self.is_best, self.trials))

    def title(self, trial: Trial) -> str:
        """Name what a trial has measured; for a length with the decay that is as long."""
        if trial.sigma_rel is None or trial.t is not None:
            return trial.target
        return full_title(SigmaRel(trial.sigma_rel), self.steps)

    @property
    def best_title(self) -> str:
        """Name the best average; one that ends earlier by what it is the mean of."""
        trial = self.best_trial
        if self.all_tied:
            return f"{self.title(trial)}, untuned, since all tie"
        if trial.t is None:
            return self.title(trial)
        return f"the mean of {self.t_unit} 1 to {trial.t:,.12g} ({trial.target})"

    @property
    def is_at_end(self) -> bool:
        """Whether the best length is the first or last of the range, so that a better one may lie
        beyond."""
        is_tied = self.estimate.noise == 0 and self.estimate.tied is not None
        if self.lengths.listed or is_tied:
            return False
        if self.ends:
            return self.best == self.lengths.low
        return self.best in (self.lengths.low, self.lengths.high)

    @property
    def may_be_percentage(self) -> bool:
        """Whether the metric may be a percentage itself, such as an accuracy."""
        values = [trial.value for trial in self.trials if trial.value is not None]
        is_between = min(values) >= 0 and max(values) <= 100
        return is_between and (not self.minimize or "err" in self.metric.lower())

    def curve(self) -> list[dict[str, float]]:
        """Draw points of a curve through the estimates of the lengths, which has no extreme between
        them, with standard errors."""
        return _draw_curve(self.estimate, "sigma_rel")

    def end_curve(self) -> list[dict[str, float]]:
        """Draw points of such a curve through the estimates of the ends."""
        return [] if self.end_estimate is None else _draw_curve(self.end_estimate, "t")

    def write(self, folder: Path) -> None:
        """Write the report to a folder, made where it is missing; raise a WriteError if that
        fails."""
        files.make_directory(folder)
        text = f"{json.dumps(self.to_dict(), indent=1, allow_nan=False)}\n"
        files.write_atomically(folder / RESULT, text.encode(), overwrite=True)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "metric": self.metric,
            "minimize": self.minimize,
            "trials": [asdict(trial) for trial in self.trials],
            "again": self.rerun_command,
            "outputs": list(map(str, self.outputs)),
            "settings": self.settings,
            "t_unit": self.t_unit,
        }
        if self.minimize is None:
            return values
        found = self.estimate
        best = self.best_trial
        equal = None
        if best.sigma_rel is not None:
            equal = name_equal_length(SigmaRel(best.sigma_rel), self.steps)
        return values | {
            "best": {
                "target": best.target,
                "sigma_rel": best.sigma_rel,
                "t": None if self.keeps_own_ema else self.best_t,
                "as": equal,
            },
            "all_tied": self.all_tied,
            "value": self.value,
            "predicted_error": best.predicted_error,
            "lost_gain": best.lost_gain,
            "compared": [gain._asdict() for gain in self.gains],
            "noise": None if math.isnan(found.noise) else found.noise,
            "tied": None if found.tied is None else list(found.tied),
            "curve": self.curve(),
            "end_curve": self.end_curve(),
        }


def _draw_curve(found: Estimate, name: str) -> list[dict[str, float]]:
    places = np.log(found.points[found.shown])
    if len(places) < 2:
        return []
    grid = np.linspace(places[0], places[-1], _POINTS)
    means = PchipInterpolator(places, found.means[found.shown])(grid)
    errors = np.interp(grid, places, found.errors[found.shown])
    points = []
    for place, mean, error in zip(grid.tolist(), means.tolist(), errors.tolist(), strict=True):
        point = {name: math.exp(place), "estimate": mean}
        if not math.isnan(error):
            point["standard_error"] = error
        points.append(point)
    return points


def summarize(report: SweepReport) -> list[tuple[str, str]]:
    """Summarize a report as names and texts for people, the most important first."""
    failed = 0
    for trial in report.trials:
        failed += trial.error is not None and not trial.is_random
    count = count_noun(len(report.trials), "trial")
    if failed:
        count += f", {failed} of them failed"
    if report.minimize is None:
        return [("measured", count)]
    pairs = []
    for compared in report.gains:
        text = "its trial failed" if compared.value is None else f"{compared.value:.6g}"
        pairs.append((compared.title, text))
    best = report.best_trial
    pairs.append(("best", report.best_title))
    pairs.append((report.metric, f"{report.value:.6g}"))
    if gain := describe_gain(report):
        pairs.append(("gain", gain))
    pairs.append(("statistically tied", describe_tie(report)))
    if not report.keeps_own_ema:
        pairs.append(("predicted error", percent(best.predicted_error)))
        pairs.append(("lost gain", at_most(best.lost_gain)))
    if report.is_at_end:
        count += "; the best lies at the end of the range, and may lie beyond"
    pairs.append(("measured", count))
    return pairs


def describe_gain(report: SweepReport) -> str:
    """Say how much better than the compared weights the best average is; empty if unknown."""
    if report.all_tied:
        return f"none: all have the same metric, and random weights {_random_metric(report)}"
    known = [gain for gain in report.gains if gain.gain is not None]
    text = ", ".join(_compare(report, gain) for gain in known)
    if known and known[0].margin is None:
        is_exact = report.chosen.noise == 0
        text += ", on these examples" if is_exact else ", by one measurement each"
    return text


def _random_metric(report: SweepReport) -> str:
    """Say which other metric random weights have."""
    common = common_metric(report.trials)
    for trial in report.trials:
        if trial.is_random and trial.value not in (None, common):
            return f"another one, {trial.value:.6g}"
    return "none"


def _compare(report: SweepReport, compared: Gain) -> str:
    title, value, gain, margin = compared
    assert value is not None
    assert gain is not None
    name = title if title.startswith("your") else f"the {title}"
    if margin is not None and abs(gain) <= margin:
        sizes = _sizes(report, value, gain, margin)
        return f"within the noise of {name} ({', '.join(sizes)})"
    if gain == 0:
        return f"as good as {name}"
    first, *others = _sizes(report, value, abs(gain), margin)
    size = f"{first} ({others[0]})" if others else first
    return f"{size} {'better' if gain > 0 else 'worse'} than {name}"


def _sizes(report: SweepReport, value: float, gain: float, margin: float | None) -> list[str]:
    """Write a gain with its margin; of a metric that may be a percentage first in its points, since
    a percentage of a percentage can be read as either."""
    size = percent(gain) if gain >= 0 else f"-{percent(-gain)}"
    points = f"{report.value - value:+.2g}"
    if margin is not None:
        size += f" ± {percent(margin)}"
        points += f" ± {margin * abs(value):.2g}"
    return [points, size] if report.may_be_percentage else [size]


def describe_tie(report: SweepReport) -> str:
    """Say which lengths, or ends, are not significantly worse than the best one."""
    found = report.chosen
    if report.all_tied:
        return "all"
    if found.tied is None and found.noise == 0:
        return "none on these examples: a repetition had the same metric"
    if found.tied is None:
        return "unknown: too few trials show the noise"
    low, high = found.tied
    if low == high:
        return "none"
    name = "sigma_rel" if found is report.estimate else "t ="
    text = f"{name} {low:,.12g} to {high:,.12g}"
    return f"{text}, which have the same metric" if found.noise == 0 else text
