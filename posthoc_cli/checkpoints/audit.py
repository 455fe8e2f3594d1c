"""Check that an average is what it claims to be, from checkpoints of it and of the weights; NumPy
float64 on a sample.

`audit_decay` finds the decay that explains how the average moved. This module finds the warm-up and
the restarts, and recognises faults: the average, or some of its tensors, do not move or equal the
weights. An average that restarted from the weights remembers nothing from before the restart; how
far it has moved between two checkpoints gives its time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import compress
from typing import Any

import numpy as np

from posthoc_cli.checkpoints.audit_decay import (
    CONSTANT,
    Intervals,
    Model,
    Series,
    best_models,
    refine,
)
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.errors import DirectoryError, InvalidValueError, NonFiniteError, check_number
from posthoc_cli.profiles import (
    POWER_FUNCTION,
    UNLIMITED,
    DecayRule,
    OrdinaryEMA,
    Point,
    gamma_from_sigma_rel,
)
from posthoc_cli.snapshots.sources import ElementRange, Source, expected_rounding

# most elements in the sample; least pieces of tensors if it has enough elements
_MOST_ELEMENTS, _PIECES = (100_000, 32)
_MOST_CHECKPOINTS = 24  # most checkpoints that are explained together
# largest factor between the found and the claimed length of an average that is as claimed
_SLACK = 1.1
_FOREIGN = 0.8  # largest unexplained share of the motion of an average that belongs to the weights
# smallest length that can be determined, as a share of the time between two checkpoints
_SHORTEST = 0.1
_ALL = 0.999  # share of equal elements that counts as all elements
# an explanation is clearly better if its residual is below this share of another one's
_CLEARLY = 0.5
# above this uncertainty a length is undetermined, unless so many times that off
_VAGUE, _BEYOND_DOUBT = (0.25, 5.0)

_STILL = "was not updated"
BAD = (
    "too long",
    "too short",
    "does not move",
    "equals the weights",
    "began again",
    "some tensors",
)
"""Verdicts that name a fault; the others are "as claimed", "found" and "undetermined"."""


@dataclass(frozen=True)
class Interval:
    """What the audit found between two checkpoints, whose times are `begin` and `end`."""

    begin: float
    end: float
    # Time constant in the unit of times, 1 / (1 - decay) for one step, or sigma_rel; None if the
    # weights stand still.
    found: float | None
    claimed: float | None  # None without a claim
    # L2 norm of the residual of the average's motion, divided by that of the motion; None if the
    # average stands still.
    unexplained: float | None
    note: str  # what happened in this interval, or is wrong in it; empty if nothing is


@dataclass(frozen=True)
class Audit:
    """The result of an audit of one average; numbers are None where they cannot be determined."""

    name: str  # empty if the run has one average
    verdict: str  # one of `BAD`, or "as claimed", "found", "undetermined"
    text: str  # explanation of the verdict in a sentence
    what: str  # the parameter in question, "decay" or "sigma_rel"
    found: float | None = None  # the parameter at the end of the training
    length: float | None = None  # the time constant or sigma_rel that explains all intervals
    # of the length, relative; infinite if two checkpoints alone show it
    uncertainty: float | None = None
    claimed: float | None = None  # claimed parameter
    warm_up: str = ""  # rule by which the decay rose, as `ImportSettings.ema_warmup` names it
    # times after the begin of the training at which it started from the weights
    starts: tuple[float, ...] = ()
    is_late: bool = False  # whether the first of these is its begin, and not a restart
    # names of the tensors that the verdict is about; empty for all tensors
    tensors: tuple[str, ...] = ()
    intervals: tuple[Interval, ...] = ()

    def __repr__(self) -> str:
        return f"Audit({self.text})"

    @property
    def spacing(self) -> float:
        """The median time between two checkpoints."""
        return float(
            np.median([interval.end - interval.begin for interval in self.intervals] or [1.0])
        )

    @property
    def is_bad(self) -> bool:
        return self.verdict in BAD

    def to_dict(self) -> dict[str, Any]:
        sigma = None if self.uncertainty == math.inf else self.uncertainty
        return asdict(self) | {"uncertainty": sigma, "contradicted": self.is_bad}


# --- what an average did


def _judge(name: str, series: Series, tensors: Sequence[str], model: Model, unit: str) -> Audit:
    """Return the audit of an average; `tensors` are the names of its pieces."""
    # By interval and piece: whether weights move, and averages stand still; by time and piece:
    # whether they are equal.
    moved = np.array([(x[1:] != x[:-1]).any(axis=1) for x, _ in series.values]).T
    same = np.array([(e[1:] == e[:-1]).mean(axis=1) >= _ALL for _, e in series.values]).T | ~moved
    copied = np.array([(x == e).mean(axis=1) >= _ALL for x, e in series.values]).T
    still, equal = same.all(axis=0), (copied[1:] | ~moved).all(axis=0)
    claimed = None if model.claimed is None else replace(model, value=model.claimed).parameter
    audit = Audit(
        name, "undetermined", "", "sigma_rel" if model.is_power else "decay", claimed=claimed
    )
    if not moved.any():
        return replace(audit, text="the weights stand still between these checkpoints")
    if still.all():
        text = (
            "the average does not move while the weights do: is its update called, and on "
            "the same tensors that are"
        )
        text += " saved (names after torch.compile, shards of ZeRO-3)?"
        return replace(audit, verdict="does not move", text=text)
    if equal.all():
        text = "the average is equal to the weights: it is copied, or its decay is 0"
        return replace(audit, verdict="equals the weights", text=text)

    kept, is_used = ~still & ~equal, moved.any(axis=0)
    stands = moved.any(axis=1) & same.all(axis=1)
    notes = [_STILL * bool(stand) for stand in stands]
    begun = int(np.argmin([*(copied[:-1] | ~moved).all(axis=1) & ~stands, False]))
    notes[:begun] = ["not begun"] * begun
    begin = begun - 1 if begun and not (copied[begun] | ~moved[begun - 1]).all() else None
    for restart in model.starts[1:]:
        for index in np.flatnonzero((series.times[:-1] <= restart) & (restart < series.times[1:])):
            notes[index] = f"began again near step {restart:,.0f}"
    moves = np.flatnonzero(moved[:, kept].any(axis=1)).tolist()
    if not any(notes[index] != _STILL for index in moves):
        return replace(audit, text="in no interval do both the weights and the average move")

    series = Series(series.times, [*compress(series.values, kept)], series.rounding[:, kept])
    rows = series.intervals()
    (fit, *rivals), together, starts = _explain(series, rows, model, moves, notes, begin)
    model, sigma = refine(fit, together)
    found = model.parameter_at(series.times[-1])
    is_rising = model.claimed is None and model.parameter > found + 1e-9
    audit = replace(
        audit,
        what="sigma_rel" if model.is_power else "decay",
        length=None if is_rising else model.length,
        uncertainty=None if is_rising else sigma,
        warm_up=model.warm_up,
        starts=tuple(sorted(starts.values())),
        is_late=any(index in (0, begin) for index in starts),
        intervals=tuple(_interval(rows[[index]], fit, note) for index, note in enumerate(notes)),
    )
    if rivals:
        settings = [
            f"sigma_rel {one.parameter:.3g}"
            if one.is_power
            else f"decay {min(one.parameter, 0.999999):.6g} with warm-up {one.warm_up or 'none'}"
            for one in (fit, *rivals)
        ]
        return replace(
            audit, text=f"the files show it about equally as {', and as '.join(settings)}"
        )
    if is_rising:
        shown = f"decay {found:.7g} at the end, still rising by {model.rule.rule}"
    elif model.is_power:
        shown = f"sigma_rel {found:.4g} (± {sigma:.1%})"
    else:
        shown = f"decay {found:.7g}, a time constant of {model.length:,.4g} {unit} (± {sigma:.1%})"
        shown += f", reached by {model.rule.rule}" * bool(model.warm_up)
    restarts = audit.starts[audit.is_late :]
    steps = " and ".join(f"{time:,.0f}" for time in restarts or model.starts[1:])
    if restarts:
        text = (
            f"began again from the weights near step {steps}: the average was lost, or "
            f"reset, at a resume"
        )
        return replace(audit, verdict="began again", text=f"{text}; {shown}", found=found)
    unexplained = [interval.unexplained or 0.0 for interval in audit.intervals if not interval.note]
    if not model.is_power and np.median(unexplained or 0.0) > _FOREIGN:
        text = (
            "the weights at these checkpoints do not explain how the average moves between "
            "them: they forget faster"
        )
        return replace(audit, text=f"{text} than checkpoints are apart, or are of another run")
    if lost := tuple(dict.fromkeys(compress(tensors, is_used & ~kept))):
        named = ", ".join(lost[:3]) + f" and {len(lost) - 3} more" * (len(lost) > 3)
        text = (
            f"{len(lost)} of {len(set(tensors))} tensors are not followed, or copied, while "
            f"the others are averaged"
        )
        return replace(
            audit, verdict="some tensors", text=f"{text}: {named}", tensors=lost, found=found
        )
    shown += f"; begun from the weights near step {steps}" * bool(steps)
    shortest = _SHORTEST * float((rows.end - rows.begin).min())
    verdict, text = _compare_lengths(model, audit.uncertainty or 0.0, shown, unit, shortest)
    return replace(
        audit, verdict=verdict, text=text, found=None if verdict == "undetermined" else found
    )


def _compare_lengths(
    model: Model, sigma: float, shown: str, unit: str, shortest: float
) -> tuple[str, str]:
    """Return the verdict on a length, against the claimed one if there is a claim, and its text."""
    claim = replace(model, value=model.claimed or model.value)
    length, claimed = model.length, claim.length
    difference = abs(math.log(length / claimed))
    if not model.is_power and max(length, claimed) < shortest:
        text = (
            f"its time constant is below {shortest:,.3g} {unit}, too short for the time "
            f"between these checkpoints"
        )
        closer = f"checkpoints closer than {max(1, claimed / _SHORTEST):,.0f} {unit} would show it"
        return "undetermined", f"{text}; {closer}"
    if sigma > _VAGUE and difference < _BEYOND_DOUBT * sigma:
        return "undetermined", f"the checkpoints do not show its length (± {min(sigma, 1):.0%})"
    if model.claimed is None:
        return "found", shown
    if difference <= max(math.log(_SLACK), 3 * sigma):
        return "as claimed", f"{shown}, as claimed"
    factors = " to ".join(f"{math.exp(difference + sign * sigma):.3g}" for sign in (-1, 1))
    verdict, usual = (
        "too short",
        f"{factors} times a step: once a microbatch, or by each of so many processes",
    )
    if length > claimed:
        verdict, usual = (
            "too long",
            f"at every k-th step only, or of steps that are counted twice (k = {factors})",
        )
    shown += f", not {claim.parameter:.7g}"
    return verdict, f"{math.exp(difference):.3g} times {verdict}: {shown}; as if updated {usual}"


def _explain(
    series: Series,
    rows: Intervals,
    model: Model,
    moves: Sequence[int],
    notes: list[str],
    begin: int | None,
) -> tuple[list[Model], Series, dict[int, float]]:
    """Return the best model and its rivals, the checkpoints that show it, and by interval the times
    of starts.

    `moves` are the intervals in which weights move; those with notes show no decay, and starts are
    noted. In interval `begin` the average began.
    """
    starts: dict[int, float] = {}
    for is_last in (False, False, True):  # an average that restarted repeats its warm-up, too
        usable = [i for i in moves if not notes[i]] or [i for i in moves if notes[i] != _STILL]
        runs = np.split(usable, np.flatnonzero(np.diff(usable) > 1) + 1)
        longest = max(reversed(runs), key=len)
        last = int(longest[-1]) + 2
        together = series[max(int(longest[0]), last - _MOST_CHECKPOINTS) : last]
        best, *rivals = best_models(model.begun(*starts.values()), rows[usable], together)
        base = replace(best, starts=model.starts)
        for _ in range(3 * bool(starts and best.rule.warm_up)):  # by all later intervals
            for index in starts:
                others = (time for other, time in starts.items() if other != index)
                trial = replace(base.begun(*others), value=best.value)
                starts[index] = _locate_start(trial, rows[usable], rows[[index]])
            best, _ = rows[usable].fit(base.begun(*starts.values()))
        found = {} if is_last else _find_restarts(best, rows, [i for i in usable if not notes[i]])
        if begin is not None and begin not in starts:
            found[begin] = _locate_start(best, rows[[begin]], rows[[begin]])
        starts |= found
        for index, time in starts.items():
            notes[index] = (
                f"{'begins' if index in (0, begin) else 'began again'} near step {time:,.0f}"
            )
        if not found:
            break
    return [best, *rivals], together, starts


def _find_restarts(model: Model, rows: Intervals, usable: Sequence[int]) -> dict[int, float]:
    """Return the times at which the average restarted from the weights, by interval."""
    restarts: dict[int, float] = {}
    if (model.is_power and model.claimed) or len(usable) < 3:
        return restarts
    kept = np.exp(model.forgotten(rows.begin) - model.forgotten(rows.end))
    for index in usable:
        row = rows[[index]]
        own, limit = row.shares(row.fit(model)[0])[0], _CLEARLY * row.shares(model)[0]
        # either another decay or a restart explains the interval
        if kept[index] >= _SHORTEST and own < limit:
            time = _locate_start(model, row, row)
            if row.shares(model.begun(time))[0] < min(limit, 1.5 * own):
                restarts[index] = time
    return restarts


def _locate_start(model: Model, rows: Intervals, within: Intervals) -> float:
    """Return the time in one interval at which the average started from the weights, by the
    residuals of `rows`."""
    return rows.search(model.begun, np.linspace(within.begin[0], within.end[0], 51))[0]


def _interval(row: Intervals, model: Model, note: str) -> Interval:
    """Return the findings of one interval alone; a warm-up as the constant decay that forgets as
    much.

    One interval may be explained by several values: its own is the one that the overall fit leads
    to.
    """
    (begin,), (end,) = row.begin.tolist(), row.end.tolist()

    def as_plain(model: Model) -> Model:
        if model.is_power:
            return replace(model, starts=(0.0,))
        began = replace(
            model, starts=tuple(start for start in model.starts if start <= begin) or (begin,)
        )
        lost = float(np.diff(began.forgotten(np.array([begin, end])))[0])
        return Model(CONSTANT, value=lost / (end - begin), every=model.every)

    plain = as_plain(model)
    found = row.fit(plain, plain.value)[0].length if row.gram[..., 2, 2].any() else None
    claimed = (
        None if model.claimed is None else as_plain(replace(model, value=model.claimed)).length
    )
    moved = float((row.gram[..., 0, 0] + row.gram[..., 1, 1] - 2 * row.gram[..., 0, 1]).sum())
    unexplained = (
        math.sqrt(max(float(row.residuals(model).sum()), 0.0) / moved) if moved > 0 else None
    )
    return Interval(begin, end, found, claimed, unexplained, note)


# --- sources


def audit_sources(sources: Sequence[Source], claimed: float | None = None) -> list[Audit]:
    """Audit every average among the checkpoints of one run against the weights at the same times.

    `claimed` is their claimed decay; by default the one that their files or the import say.
    """
    if claimed is not None:
        check_number("claimed", claimed, lambda decay: 0 < decay < 1, "lie in (0, 1)")
    if not isinstance(sources[0], Checkpoint):
        reason = (
            "holds snapshots of a tracker: their headers hold the width exactly, and `ema "
            "info` shows it"
        )
        raise DirectoryError(sources[0].path.parent, reason)
    if audits := list(audits_of(sources, claimed)):
        return audits
    reason = "holds no two times at which there are an average and the weights"
    raise InvalidValueError("the run", reason, "an audit compares the two between checkpoints")


def audits_of(
    checkpoints: Sequence[Any], claimed: float | None = None, every: int = 1
) -> Iterator[Audit]:
    """Yield the audit of each average, by sigma_rel; `every` is the time between updates if nothing
    says it."""
    weights = {one.t: one for one in checkpoints if isinstance(one.profile, Point)}
    pairs = [
        (weights[one.t], one)
        for one in checkpoints
        if not isinstance(one.profile, Point) and one.t in weights
    ]
    for width in sorted({one.sigma_rel for _, one in pairs}):
        of_width = [pair for pair in pairs if pair[1].sigma_rel == width]
        if len(of_width) < 2:
            continue
        averages = [one for _, one in of_width]
        first, before = (
            averages[0],
            max((t for t in weights if t < averages[0].t), default=math.inf),
        )
        settings = getattr(first.profile, "settings", {"first": 0, "every": 0})
        # Files without the average, then all with it: if nothing says that it began earlier, it
        # began between them.
        may_begin = (
            first.updates
            and first.updates.count is None
            and settings["first"] - settings["every"] < before
        )
        if may_begin and len(averages) == sum(t > before for t in weights):
            of_width.insert(0, (weights[before],) * 2)
        model = _claim(averages, claimed, every)
        yield _judge(
            f"sigma_rel {width:g}" if width else "", *_read(of_width), model, averages[0].t_unit
        )


def _claim(averages: Sequence[Checkpoint], claimed: float | None, every: float) -> Model:
    """Return the model that averages are claimed to follow, with the restarts that their settings
    say."""
    profiles = [one.profile for one in averages if isinstance(one.profile, OrdinaryEMA)]
    width, settings = averages[-1].sigma_rel, profiles[-1].settings if profiles else {}
    every = settings.get("every", 0.0 if width else every)
    starts = [profile.settings["first"] - every for profile in profiles] or [0.0]
    restarts = [
        start for start, before in zip(starts[1:], profiles, strict=False) if start >= before.t
    ]
    model = Model(every=every, starts=(starts[0], *restarts))
    if width:
        return replace(
            model,
            rule=DecayRule(UNLIMITED, POWER_FUNCTION),
            claimed=gamma_from_sigma_rel(width) + 1,
        )
    if decay := claimed or averages[-1].decay:
        names = {field.name for field in fields(DecayRule)} & settings.keys()
        model = replace(
            model, rule=DecayRule(**{name: settings[name] for name in names} | {"decay": decay})
        )
        return replace(model, claimed=1.0 if model.rises else -math.log(decay) / every)
    return model


def _read(pairs: Sequence[tuple[Checkpoint, Checkpoint]]) -> tuple[Series, list[str]]:
    """Read pieces of the tensors at all times, of each tensor equally many elements; return their
    names.

    Raises NonFiniteError for nan or infinity.
    """
    first = pairs[-1][1]
    sizes = {
        name: first.entries[name].size
        for name in sorted(first.averages)
        if first.entries[name].size
    }
    most, parts = _MOST_ELEMENTS // len(sizes), -(-_PIECES // len(sizes))
    pieces = []
    for name, size in sizes.items():
        each = max(1, min(size, most) // parts)
        starts = np.unique(np.linspace(0, size - each, min(parts, size)).astype(np.int64)).tolist()
        pieces += [ElementRange(name, start, start + each) for start in starts]
    ends = np.cumsum([piece.end - piece.begin for piece in pieces])
    rows = np.empty((2, len(pairs), ends[-1]), np.float32)
    rounding = np.zeros((len(pairs), len(pieces)))
    for at, pair in enumerate(pairs):
        for source, row in zip(pair, rows[:, at], strict=True):
            with source:
                held = [source.values(*piece) for piece in pieces]
            for values, piece in zip(held, pieces, strict=True):
                if not np.isfinite(values).all():
                    raise NonFiniteError(
                        source.path, f"tensor {piece.name!r}: holds nan or infinity"
                    )
            row[:] = np.concatenate(held)
        dtypes = [source.entries[piece.name].dtype for piece in pieces]
        rounding[at] = [
            expected_rounding(values, dtype, "F32")
            for values, dtype in zip(held, dtypes, strict=True)
        ]
    series = Series(
        np.array([average.t for _, average in pairs]), np.split(rows, ends[:-1], axis=2), rounding
    )
    return series, [piece.name for piece in pieces]
