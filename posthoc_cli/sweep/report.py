"""The report of a sweep: for programs, as JSON, and its results as texts for people."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from posthoc_cli import files
from posthoc_cli.errors import argument, at_most, count_noun, percent
from posthoc_cli.profiles import FloatArray
from posthoc_cli.sweep.estimate import Estimate
from posthoc_cli.sweep.search import LONGEST, Lengths, Search
from posthoc_cli.sweep.trial import FRESH, Spot, Trial, common_metric
from posthoc_cli.targets import SigmaRel, full_title, name_equal_length

RESULT = "sweep.json"  # the file of a report in the folder of a sweep
_POINTS = 101  # of the drawn curve
_Point = tuple[float, dict[str, float]]  # a place on the axis of a curve, and the values there


class Gain(NamedTuple):
    """How much better than some weights the best average is, as a fraction of their metric."""

    title: str
    value: float | None  # the mean metric of those weights; None if their trial has failed
    gain: float | None
    margin: float | None  # half the width of the gain's 95 % interval; None if it is unknown


@dataclass(frozen=True, repr=False)
class SweepReport:
    """The result of a sweep: its search with all trials, and the files of the best average.

    `compared` are the titles of what averages are compared with; `settings` what the trials share;
    `rerun_command` the command line that repeats it.
    """

    search: Search
    compared: tuple[str, ...]
    metric: str
    settings: dict[str, Any]
    steps: float | None = None  # of the training; None if it is not known
    t_unit: str = "steps"
    directory: Path = Path()  # of the run
    newest_t: float | None = None  # the time of its newest snapshot or checkpoint
    own_ema: str | None = None  # which of `compared` is the user's own EMA
    checkpoints: tuple[str, ...] = ()  # the titles of the user's own ones that were measured
    rerun_command: str = ""
    outputs: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()  # on what the averages were made of, and what is not used
    findings: tuple[str, ...] = ()  # what other programs' files hold, and how decays were found

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
        if self.share_curve():
            text += plots.as_html(lambda: plots.share_figure(values))
        return text

    @property
    def trials(self) -> tuple[Trial, ...]:
        return self.search.trials

    @property
    def lengths(self) -> Lengths:
        return self.search.lengths

    @property
    def minimize(self) -> bool | None:
        return self.search.minimize

    def with_trials(self, trials: Iterable[Trial]) -> SweepReport:
        return replace(self, search=replace(self.search, trials=tuple(trials)))

    @property
    def estimate(self) -> Estimate:
        """The estimate of each length; raises an InvalidValueError without a metric."""
        return self.search.estimate

    @property
    def t(self) -> float:
        """The time at which the averages end, but for the earlier ones."""
        return self.search.t

    @property
    def all_tied(self) -> bool:
        """Whether all that was measured has the same metric, so that there is nothing to choose."""
        return self.minimize is not None and common_metric(self.trials) is not None

    @property
    def kept(self) -> str | None:
        """The title of the user's weights that are taken in place of an average: his own EMA if all
        tie, since that needs no other length; or a checkpoint that is better than the best
        average."""
        if self.all_tied:
            return self.own_ema if self._values(self.own_ema) else None
        if self.best_checkpoint is None:
            return None
        found = self._gain(self.best_checkpoint)
        is_better = (found.gain or 0.0) < -(found.margin or 0.0)
        is_known = self.estimate.noise == 0 or found.margin is not None
        return self.best_checkpoint if is_better and is_known else None

    @property
    def best_checkpoint(self) -> str | None:
        """The title of the best of the user's own checkpoints, by one measurement each."""
        first = {}
        for trial in self.trials:
            if trial.target in self.checkpoints and trial.seed == 0 and trial.value is not None:
                first[trial.target] = trial.value if self.minimize else -trial.value
        return min(first, key=lambda title: first[title], default=None)

    @property
    def best(self) -> float | None:
        """The length of the best average, which was written; None if weights of the user were
        taken in its place."""
        return self.search.best.sigma_rel if self.kept is None else None

    @property
    def best_t(self) -> float:
        """The time at which the best average ends."""
        return self.search.end_of(self.search.best)

    @property
    def value(self) -> float:
        """The metric of the best weights, measured afresh if it is noisy: the lowest of many is too
        good."""
        return self.search.value if self.kept is None else float(np.mean(self._values(self.kept)))

    @property
    def gains(self) -> list[Gain]:
        """The gain over each of the compared weights, and over the best of the user's own
        checkpoints."""
        titles = [*self.compared]
        if self.best_checkpoint is not None:
            titles.append(self.best_checkpoint)
        return [self._gain(title) for title in titles]

    def _values(self, title: str | None) -> list[float]:
        """List the metrics of weights that averages are compared with; of a checkpoint that was
        chosen for its metric, those that were measured afresh, if there are any."""
        values = []
        fresh = []
        for trial in self.trials:
            if trial.target == title and trial.value is not None:
                values.append(trial.value)
                if trial.seed in FRESH:
                    fresh.append(trial.value)
        return fresh or values

    def _gain(self, title: str) -> Gain:
        values = self._values(title)
        if not values:
            return Gain(title, None, None, None)
        mean = sum(values) / len(values)
        if mean == 0:
            return Gain(title, mean, None, None)
        change = (self.search.value - mean) / abs(mean)
        margin = self.search.margin(len(values)) / abs(mean)
        known = None if math.isnan(margin) else margin
        return Gain(title, mean, -change if self.minimize else change, known)

    def is_best(self, trial: Trial) -> bool:
        """Whether a trial has measured the best average."""
        if self.kept is not None:
            return trial.target == self.kept
        return trial.spot == self.search.best

    @property
    def best_trial(self) -> Trial:
        """The first trial of the best average."""
        return next(filter(self.is_best, self.trials))

    def title(self, trial: Trial) -> str:
        """Name what a trial has measured; for a length with the decay that is as long."""
        if trial.sigma_rel is None or trial.spot != Spot(trial.sigma_rel):
            return trial.target
        return full_title(SigmaRel(trial.sigma_rel), self.steps)

    @property
    def best_title(self) -> str:
        """Name the best average."""
        trial = self.best_trial
        if self.all_tied:
            return f"{self.title(trial)}, untuned, since all tie"
        if self.kept is not None:
            return f"{self.kept}: no average is better"
        text = self.title(trial)
        if trial.t is not None:
            text += ", as if the training had ended there"
        return text

    @property
    def is_at_edge(self) -> bool:
        """Whether the best length is the first or last of the range, so that a better one may lie
        beyond."""
        found = self.estimate
        is_tied = found.noise == 0 and found.tied is not None
        if self.lengths.listed or is_tied:
            return False
        is_last = self.lengths.high < LONGEST and self.search.best == Spot(self.lengths.high)
        return found.best == self.lengths.low or is_last

    @property
    def may_be_percentage(self) -> bool:
        """Whether the metric may be a percentage itself, such as an accuracy."""
        values = [trial.value for trial in self.trials if trial.value is not None]
        is_between = min(values) >= 0 and max(values) <= 100
        return is_between and (not self.minimize or "err" in self.metric.lower())

    def curve(self) -> list[dict[str, float]]:
        """Draw points of a curve through the estimates of the lengths, which has no extreme between
        them, with standard errors."""
        found = self.estimate
        shown = found.shown
        places = np.log(found.points[shown])
        drawn = _draw_curve(places, found.means[shown], found.errors[shown])
        return [{"sigma_rel": math.exp(place)} | values for place, values in drawn]

    def end_curve(self) -> list[dict[str, float]]:
        """Draw points of such a curve through the mean metrics of the best length at each end."""
        search = self.search
        spots = {math.log(search.end_of(spot)): spot for spot in search.line_of_ends}
        return [{"t": math.exp(place)} | values for place, values in self._draw_means(spots)]

    def share_curve(self) -> list[dict[str, float]]:
        """Draw points of such a curve through the mean metrics of each share of the base."""
        spots = {spot.base_share: spot for spot in self.search.line_of_shares}
        return [{"base_share": place} | values for place, values in self._draw_means(spots)]

    def _draw_means(self, spots: Mapping[float, Spot]) -> list[_Point]:
        """Draw a curve through the mean metrics of spots, by their places."""
        places = []
        means = []
        for place in sorted(spots):
            if values := self.search.measured(spots[place]):
                places.append(place)
                means.append(float(np.mean(values)))
        return _draw_curve(np.array(places), np.array(means), np.full(len(means), math.nan))

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
            "notes": list(self.notes),
            "findings": list(self.findings),
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
                "t": self.best_t if self.kept is None else None,
                "base_share": self.search.best.base_share if self.kept is None else None,
                "as": equal,
            },
            "best_length": self.search.walked_end.sigma_rel,
            "best_end": self.search.walked_end.t,
            "all_tied": self.all_tied,
            "value": self.value,
            "predicted_error": best.predicted_error,
            "lost_gain": best.lost_gain,
            "compared": [gain._asdict() for gain in self.gains],
            "noise": None if math.isnan(found.noise) else found.noise,
            "tied": None if found.tied is None else list(found.tied),
            "curve": self.curve(),
            "end_curve": self.end_curve(),
            "share_curve": self.share_curve(),
        }


def _draw_curve(places: FloatArray, values: FloatArray, noises: FloatArray) -> list[_Point]:
    if len(places) < 2:
        return []
    grid = np.linspace(places[0], places[-1], _POINTS)
    means = PchipInterpolator(places, values)(grid)
    errors = np.interp(grid, places, noises)
    points = []
    for place, mean, error in zip(grid.tolist(), means.tolist(), errors.tolist(), strict=True):
        drawn = {"estimate": mean}
        if not math.isnan(error):
            drawn["standard_error"] = error
        points.append((place, drawn))
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
    if report.settings.get("base") and report.kept is None:
        pairs.append(("base", describe_base(report)))
    is_length = report.kept is None and report.search.best == report.search.at_end
    if report.all_tied or is_length:
        pairs.append(("statistically tied", describe_tie(report)))
    if report.kept is None:
        pairs.append(("predicted error", percent(best.predicted_error)))
        pairs.append(("lost gain", at_most(best.lost_gain)))
    if report.is_at_edge:
        count += "; the best lies at the end of the range, and may lie beyond"
    if report.search.was_bounded:
        count += f"; without the bound of {argument('budget')} it would go on"
    pairs.append(("measured", count))
    return pairs


def describe_gain(report: SweepReport) -> str:
    """Say how much better than the compared weights the best average is; empty if unknown."""
    if report.all_tied:
        return f"none: all have the same metric{_random_metric(report)}"
    known = [gain for gain in report.gains if gain.gain is not None]
    text = ", ".join(_compare(report, gain) for gain in known)
    if known and known[0].margin is None:
        is_exact = report.estimate.noise == 0
        text += ", on these examples" if is_exact else ", by one measurement each"
    if report.kept is not None:
        return f"of {report.search.best.title}, the best average: {text}"
    return text


def _random_metric(report: SweepReport) -> str:
    """Say which other metric random weights have, if they were measured."""
    common = common_metric(report.trials)
    text = ""
    for trial in report.trials:
        if trial.is_random:
            text = ", and random weights none"
        if trial.is_random and trial.value not in (None, common):
            return f", and random weights another one, {trial.value:.6g}"
    return text


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
    points = f"{report.search.value - value:+.2g}"
    if margin is not None:
        size += f" ± {percent(margin)}"
        points += f" ± {margin * abs(value):.2g}"
    return [points, size] if report.may_be_percentage else [size]


def describe_base(report: SweepReport) -> str:
    """Say which share of the base the best average has, and what may be behind its gain."""
    share = report.search.best.base_share
    base = f"{report.settings['base']} ({report.settings['base_hash']})"
    if not share:
        return f"{base}: no share of it is better than none"
    text = f"a share of {share:g} of {base}"
    if report.minimize:
        text += (
            "; of a loss, the gain may be one of calibration: check it by accuracy, or at a fitted "
            "temperature"
        )
    return text


def describe_tie(report: SweepReport) -> str:
    """Say which lengths are not significantly worse than the best one."""
    found = report.estimate
    if report.all_tied:
        return "all"
    if found.tied is None and found.noise == 0:
        return "none on these examples: a repetition had the same metric"
    if found.tied is None:
        return "unknown: too few trials show the noise"
    low, high = found.tied
    if low == high:
        return "none"
    text = f"sigma_rel {low:,.12g} to {high:,.12g}"
    return f"{text}, which have the same metric" if found.noise == 0 else text
