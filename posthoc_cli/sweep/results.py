"""The results of a sweep: `trials.jsonl` with one line per trial, and `sweep.json` with the best length."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.profiles import Point
from posthoc_cli.run import Run
from posthoc_cli.sweep.search import Estimate, Trial
from posthoc_cli.targets import Target

TRIALS, RESULT = "trials.jsonl", "sweep.json"
RAW = "raw"
"""The target of trials of raw weights, which are not an average."""


def has_raw(run: Run, t: float | None = None) -> bool:
    """Return whether a checkpoint holds the weights themselves at a time, by default at the newest snapshot's."""
    sources = run.sources
    time = sources[-1].info.t if t is None else t
    return any(isinstance(source.profile, Point) and source.info.t == time for source in sources)


class Records:
    """The recorded trials of one question, in a file of `folder` that may contain trials of other questions.

    The question is the settings that comparable trials share: the run, its time, the command, the metric, ...
    """

    def __init__(self, folder: Path, question: Mapping[str, Any]) -> None:
        self._path, self._question = folder / TRIALS, json.loads(json.dumps(question))

    def read(self) -> list[Trial]:
        """Return the successful trials of this question, the last of repeated ones; skip all other lines."""
        trials = {}
        for line in self._path.read_bytes().splitlines() if self._path.exists() else ():
            try:
                entry = json.loads(line)
                if entry["question"] == self._question:
                    trial = Trial(**entry["trial"])
                    trials[trial.x, trial.seed] = trial
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        return [trial for trial in trials.values() if _is_measured(trial)]

    def append(self, trial: Trial) -> None:
        """Append a trial durably to the file; raise a WriteError if that fails."""
        line = json.dumps({"question": self._question, "trial": asdict(trial)}, allow_nan=False)
        with files.reported_as_write_error(self._path):
            descriptor = files.system.open_append(self._path)
            try:
                # A line that a crash cut off has no end: begin a new one.
                size = os.fstat(descriptor).st_size
                is_cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                files.write_at(descriptor, f"{chr(10) * is_cut}{line}\n".encode(), size)
                files.system.fsync(descriptor)
            finally:
                files.system.close(descriptor)


def _is_measured(trial: Trial) -> bool:
    """Return whether a trial from a file, which may hold any values, has a usable metric."""
    numbers = (trial.x, trial.value, trial.standard_error or 0.0)
    return isinstance(trial.seed, int) and all(isinstance(n, int | float) and abs(n) < 1e300 for n in numbers)


@dataclass(frozen=True, repr=False)
class SweepReport:
    """The result of a sweep.

    Attributes:
        metric: the name of the metric.
        minimize: whether lower is better.
        trials: all trials; failed ones have an error.
        found: the estimate.
        stopped: why the search ended.
        outputs: the files of the best average.
        settings: the settings that the trials share.
        again: the command line that repeats the sweep.
    """

    metric: str
    minimize: bool
    trials: tuple[Trial, ...]
    found: Estimate
    stopped: str
    outputs: tuple[Path, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    again: str = ""

    @property
    def best(self) -> Target:
        """The average whose metric is estimated to be best, which was written."""
        return self.found.axis.target(self.found.best)

    def __repr__(self) -> str:
        estimate = f"{self.metric} {self.found.mean:.6g} ± {self.found.standard_error:.2g} (estimate)"
        unmeasured = "not measured, since neither a checkpoint nor a tracker with its model has them"
        raw = f"raw weights {unmeasured if self.raw is None else f'{self.raw:.6g}'}"
        return f"SweepReport({self.best.title}: {estimate}, {len(self.trials)} trials; {self.stopped}; {raw})"

    def _repr_html_(self) -> str:
        """Return the picture of the sweep, for a notebook."""
        from posthoc_cli import plots

        return plots.as_file(partial(plots.sweep_figure, self.to_dict()), ".svg").decode().partition("?>")[2]

    @property
    def raw(self) -> float | None:
        """The mean metric of the raw weights; None if they were not measured."""
        values = [trial.value for trial in self.trials if trial.target == RAW and trial.value is not None]
        return sum(values) / len(values) if values else None

    def write(self, folder: str | Path) -> None:
        """Write the report to a folder, for `ema report`; raise a WriteError if that fails."""
        folder = files.expanded(folder)
        with files.reported_as_write_error(folder):
            files.make_directory(folder)
        files.write_atomically(folder / RESULT, f"{json.dumps(self.to_dict(), indent=1)}\n".encode(), overwrite=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        found = self.found
        curve = zip(found.xs.tolist(), found.curve.tolist(), found.errors.tolist(), strict=True)
        return {
            "metric": self.metric,
            "minimize": self.minimize,
            "axis": found.axis.kind,
            "best": {"target": self.best.title, found.axis.kind: found.best},
            "estimate": found.mean,
            "standard_error": found.standard_error,
            "equal_within_noise": [found.low, found.high],
            "expected_regret": found.regret,
            "noise": found.noise,
            "raw": self.raw,
            "stopped": self.stopped,
            "trials": [vars(trial) for trial in self.trials],
            "curve": [{"x": x, "estimate": y, "standard_error": error} for x, y, error in curve],
            "again": self.again,
            "outputs": list(map(str, self.outputs)),
            "settings": self.settings,
        }


def answer(found: dict[str, Any]) -> dict[str, str]:
    """Return the results of a report's `to_dict` as texts for people."""
    low, high = found["equal_within_noise"]
    trials = found["trials"]
    failed = sum(trial["value"] is None for trial in trials)
    measured = {trial["target"] for trial in trials if trial["value"] is not None} - {RAW}
    return {
        "best": str(found["best"]["target"]),
        "metric": str(found["metric"]),
        "estimate": f"{found['estimate']:.6g} ± {found['standard_error']:.2g}",
        "equal": f"{low:.12g} to {high:.12g}",
        "raw": "not measured" if found["raw"] is None else f"{found['raw']:.6g}",
        "measured": f"{len(measured)} averages in {len(trials)} trials"
        + f", {failed} of which failed" * bool(failed)
        + f"; {found['stopped']}",
    }
