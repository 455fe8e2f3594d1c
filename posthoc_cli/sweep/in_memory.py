"""A sweep in Python: by a function of the model, or of the weights by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli.errors import InvalidValueError, shown, warn
from posthoc_cli.run import Run, Weights
from posthoc_cli.snapshots.selection import statistics_notice
from posthoc_cli.sweep.axes import Axis, good_range
from posthoc_cli.sweep.results import RAW, Record, SweepReport
from posthoc_cli.sweep.rounds import Search, check_counts
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
        run: snapshots or checkpoints, or a tracker, also one that is training. Raw weights are measured, too, where
            they are at hand: in the tracker's own model, or in a checkpoint of the newest time.
        metric: takes `model` with the averaged weights in it, in eval mode, or without a model the weights by name;
            gives the metric, or it and its standard error. Its random numbers are its own affair.
        model: gets the weights of each average in place; afterwards it is as it was.
        low, high: ends of the range; by default where the predicted error is below 1 %.
        values: measure exactly these instead.
        minimize: whether lower is better.
        repeats: calls for each length.
        budget: lengths to measure at most.
        name: of the metric, for the report.

    Raises:
        InvalidValueError: an argument cannot be used.
        PostHocError: too few trials have succeeded: the metric was not finite; or it is the same for all.
    """
    from posthoc_cli.tracker import PostHocEMA
    from posthoc_cli.tracker.model_weights import swapped_in, warn_of_statistics

    if not callable(metric):
        reason = "must be a function that gives the metric of a model, or of weights by name"
        raise InvalidValueError("metric", reason, value=shown(metric))
    tracker = run if isinstance(run, PostHocEMA) else None
    stored = run if isinstance(run, Run) else run.run if isinstance(run, PostHocEMA) else Run(run)
    if values is not None:
        if len(set(values)) < 2:
            raise InvalidValueError("values", "name two lengths or more", value=list(values))
        axis = Axis.of_values("sigma_rel", values)
    else:
        good = good_range(stored) if low is None or high is None else Axis("sigma_rel", low, high)
        axis = Axis("sigma_rel", good.low if low is None else low, good.high if high is None else high)
    check_counts(repeats, budget, [axis])
    newest, warned = stored.sources[-1].info, False
    if model is None and (notice := statistics_notice(newest.copies)):
        warn(notice)

    def measure(wanted: Sequence[tuple[float, int]]) -> Iterator[Record]:
        for value, seed in wanted:
            started = time.perf_counter()
            if model is not None and tracker is not None:
                with tracker.model(model, sigma_rel=value):
                    found = metric(model)
                yield record(value, seed, found, None, started)
                continue
            weights = stored.average(value) if tracker is None else tracker.state_dict(sigma_rel=value)
            yield record(value, seed, measured(weights), weights.predicted_error, started)

    def measured(weights: Weights) -> Any:
        nonlocal warned
        with nullcontext() if model is None else swapped_in(model, weights):
            found = metric(weights if model is None else model)
            if model is not None and not warned:
                warned = warn_of_statistics(model, weights, newest.copies)
        return found

    def measure_raw() -> Iterator[Record]:
        is_own = model is not None and tracker is not None and tracker.tracks(model)
        if not is_own and not stored.has_raw():
            return
        for seed in range(repeats):
            started = time.perf_counter()
            if is_own and model is not None:
                with swapped_in(model, {}):  # as it is, in eval mode
                    found = metric(model)
            else:
                found = measured(stored.average(Mean(1)))
            yield record(0.0, seed, found, None, started, RAW)

    def record(value: float, seed: int, found: Any, predicted: float | None, started: float, title: str = "") -> Record:
        try:
            value_found, error = found if isinstance(found, tuple) else (found, None)
            value_found = float(value_found)
            error = float(error) if error is not None and 0 < error < math.inf else None
        except (TypeError, ValueError, RuntimeError) as wrong_kind:
            reason = "must give a number, or a number and its standard error"
            raise InvalidValueError("metric", reason) from wrong_kind
        wrong = None if math.isfinite(value_found) else f"its metric is {value_found}"
        seconds = time.perf_counter() - started
        valid = None if wrong else value_found
        return Record(title or axis.title(value), value, seed, valid, error, predicted, seconds, wrong)

    raw = [*measure_raw()]
    search = Search(
        axis, minimize=minimize, budget=budget, repeats=repeats, again=repeats > 1,
        beyond=lambda axis, upwards: axis.widened(upwards, stored, None),
    ).run(measure)  # fmt: skip
    axis = search.axis
    settings = {"run": newest.run_id, "t": newest.t if tracker is None else tracker.t, "command": None}
    best = axis.value(search.found.best)
    return SweepReport(
        name, minimize, axis, axis.kind, (*raw, *search.trials), search.found, search.stopped, SigmaRel(best),
        axis.title(best), {axis.kind: best}, settings=settings,
    )  # fmt: skip
