"""A sweep in Python, by a function of the model or of the weights by name."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli.errors import InvalidValueError, shown, warn
from posthoc_cli.run import Run
from posthoc_cli.snapshots.snapshot import statistics_notice
from posthoc_cli.sweep.search import RAW, Axis, Search, SweepReport, Trial, good_range, has_raw
from posthoc_cli.targets import Mean, SigmaRel

if TYPE_CHECKING:
    import torch

    from posthoc_cli.tracker import PostHocEMA


def sweep(
    run: Run | PostHocEMA | str | Path,
    metric: Callable[[Any], float | tuple[float, float]],
    *,
    model: torch.nn.Module | None = None,
    low: float | None = None,
    high: float | None = None,
    values: Sequence[float] | None = None,
    minimize: bool = True,
    repeats: int = 1,
    budget: int = 20,
    name: str = "metric",
) -> SweepReport:
    """Find the best sigma_rel by a metric, in memory.

    Arguments:
        run: snapshots or checkpoints, or a tracker, which may be training. Raw weights are measured, too, if they are
            available: in the model that the tracker averages, or in a checkpoint of the newest time.
        metric: a function of `model` with the averaged weights, in eval mode, or without a model of the weights by
            name; returns the metric, or a tuple of the metric and its standard error. Random seeds are up to it.
        model: receives the weights of each average in place, and is restored afterwards.
        low, high: ends of the range; by default the range where the predicted error is below 1 %.
        values: the lengths to measure, instead of a search.
        repeats: calls for each length.
        budget: the most lengths to measure.
        name: of the metric in the report.

    Raises:
        InvalidValueError: an argument cannot be used.
        PostHocError: the metric was finite for too few lengths, or the same for all.
    """
    from posthoc_cli.tracker import PostHocEMA

    if not callable(metric):
        raise InvalidValueError("metric", "must be a function of a model, or of weights by name", value=shown(metric))
    tracker = run if isinstance(run, PostHocEMA) else None
    stored = run if isinstance(run, Run) else run.run if isinstance(run, PostHocEMA) else Run(run)
    newest = stored.sources[-1]
    if values is not None:
        axis = Axis.of_values("sigma_rel", values)
    else:
        good = good_range(stored) if low is None or high is None else Axis("sigma_rel", low, high)
        axis = Axis("sigma_rel", good.low if low is None else low, good.high if high is None else high)
    if notice := statistics_notice(newest.copies):
        warn(notice)
    is_tracked = model is not None and tracker is not None and tracker.tracks(model)
    raw = is_tracked or has_raw(stored)
    search = Search(axis, minimize=minimize, budget=budget, repeats=repeats, again=repeats > 1, raw=raw)
    averages = functools.partial(_average, stored, tracker, model, is_tracked)

    def measure(wanted: Sequence[tuple[float, int]]) -> Iterator[Trial]:
        for length, seed in wanted:
            started = time.perf_counter()
            with averages(length) as (average, error):
                value, noise = _checked(metric(average))
            title, seconds = SigmaRel(length).title if length else RAW, time.perf_counter() - started
            reason = None if math.isfinite(value) else f"its metric is {value}"
            yield Trial(title, length, seed, None if reason else value, noise, error, seconds, reason)

    for _ in search.rounds(measure):
        pass
    return search.report(name, {"run": newest.run_id, "t": newest.t if tracker is None else tracker.t, "command": None})


@contextmanager
def _average(
    run: Run, tracker: PostHocEMA | None, model: torch.nn.Module | None, is_tracked: bool, length: float
) -> Iterator[tuple[Any, float | None]]:
    """Yield the argument of the metric, and the predicted error of the average; the length 0 means the raw weights."""
    from posthoc_cli.tracker.filling import swapped_in

    if model is not None and tracker is not None and (length or is_tracked):
        # Without a length the model keeps its weights, and is only put into eval mode.
        with tracker.model(model, sigma_rel=length) if length else swapped_in(model, {}):
            yield model, None
        return
    weights = tracker.state_dict(sigma_rel=length) if tracker and length else run.average(length or Mean(1))
    with nullcontext() if model is None else swapped_in(model, weights):
        yield (weights if model is None else model), weights.predicted_error if length else None


def _checked(result: Any) -> tuple[float, float | None]:
    """Return what a metric has returned, as a number and its standard error; else raise an InvalidValueError."""
    try:
        value, error = result if isinstance(result, tuple) else (result, None)
        return float(value), float(error) if error is not None and 0 < error < math.inf else None
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InvalidValueError("metric", "must return a number, or a number and its standard error") from cause
