"""Check that an average is what it claims to be, from checkpoints of it and of the weights; NumPy float64 on a sample.

`audit_decay` finds the decay that explains how the average moved. This module finds the warm-up and the restarts, and
recognises faults by the same Gram matrices: the average, or some of its tensors, do not move or equal the weights. An
average that restarted from the weights remembers nothing from before the restart;
how far it has moved between two checkpoints gives the time of the restart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from posthoc_cli.checkpoints.audit_decay import (
    PIECES,
    Fit,
    Intervals,
    Mask,
    Model,
    PowerModel,
    Series,
    WarmModel,
    argmin,
    choose_pieces,
    misfit,
    read_series,
    refine,
)
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import RAMP_UP, DecayRule, FloatArray, OrdinaryEMA, Point, gamma_from_sigma_rel
from posthoc_cli.snapshots.path import decode_sample, places
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.sources import Source

_SLACK = 1.1
"""Largest factor between the found and the claimed length of an average that is as claimed."""

_FOREIGN = 0.8
"""Largest unexplained share of the motion of an average that belongs to the weights."""

_SHORTEST = 0.1
"""Smallest length that can be determined, as a share of the time between two checkpoints."""

_ALL = 0.999
"""Share of equal elements that counts as all elements."""

_CLEARLY = 0.5
"""An explanation is clearly better if its residual is below this share of another one's."""

_FAR = 3.0
"""Rules whose log residuals, summed over the intervals, exceed the least ones by this are not compared further."""

_ALIKE, _SAME = 0.05, 0.02
"""Rules explain files about equally if -2 log of their likelihoods for each element differ by less than this; and the
largest difference of their tails, at any checkpoint, with which it does not matter which of them is taken: a length of
another 5 % moves tails as much."""

_VAGUE, _BEYOND_DOUBT = 0.25, 5.0
"""The relative uncertainty of a length above which it is undetermined, unless it differs from the claimed one by that
multiple of the uncertainty."""

BAD = ("too long", "too short", "does not move", "equals the weights", "began again", "some tensors")
"""Verdicts that name a fault; the others are "as claimed", "found" and "undetermined"."""


@dataclass(frozen=True)
class Interval:
    """What the audit found between two checkpoints.

    Attributes:
        begin, end: times of the two checkpoints, in steps or images.
        found: time constant in the same unit, 1 / (1 - decay) for one step; for a power function its sigma_rel.
        claimed: claimed time constant or sigma_rel; None without a claim.
        unexplained: L2 norm of the residual of the average's motion, divided by that of the motion.
        note: what happened in this interval, or is wrong in it; empty if nothing is.
    """

    begin: float
    end: float
    found: float
    claimed: float | None
    unexplained: float
    note: str = ""


@dataclass(frozen=True)
class Audit:
    """The result of an audit of one average.

    Attributes:
        name: name of the average if the run has several.
        verdict: one of `BAD`, or "as claimed", "found", "undetermined".
        text: explanation of the verdict in a sentence.
        what: the parameter in question, "decay" or "sigma_rel".
        found, length: parameter and length that explain all intervals; None where they cannot be determined.
        uncertainty: relative uncertainty of the length.
        claimed: claimed parameter; None without a claim.
        ratio: found length / claimed length.
        warm_up: rule by which the decay rose, as `ImportSettings.ema_warmup` names it; empty without a warm-up.
        starts: times after the begin of the training at which the average started from the weights.
        is_late: whether the first of these is its begin, and not a restart.
        choices: settings of an import, in words, that explain the averages about equally; empty if one is the best.
        tensors: names of the tensors that the verdict is about; empty for all tensors.
        intervals: findings for each interval, in order of time.
        elements: number of elements in the sample.
    """

    name: str
    verdict: str
    text: str
    what: str = "decay"
    found: float | None = None
    length: float | None = None
    uncertainty: float | None = None
    claimed: float | None = None
    ratio: float | None = None
    warm_up: str = ""
    starts: tuple[float, ...] = ()
    is_late: bool = False
    choices: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    intervals: tuple[Interval, ...] = ()
    elements: int = 0

    def __repr__(self) -> str:
        return f"Audit({self.text})"

    @property
    def spacing(self) -> float:
        """The median time between two checkpoints."""
        return float(np.median([interval.end - interval.begin for interval in self.intervals] or [1.0]))

    @property
    def is_bad(self) -> bool:
        """Whether the verdict names a fault."""
        return self.verdict in BAD

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"contradicted": self.is_bad}


# --- the average


class _Note(NamedTuple):
    """What happened in an interval, its time, and whether that is from the settings."""

    what: str
    at: float | None = None
    said: bool = False

    def __str__(self) -> str:
        if self.at is None:
            return self.what
        near, source = (" at", ", as the settings say") if self.said else (" near step", "")
        return f"{self.what}{near} {self.at:,.0f}{source}"


_STILL, _NOT_BEGUN, _BEGINS, _AGAIN = "was not updated", "not begun", "begins", "began again"


@dataclass
class _Case:
    """An average to be judged: `tensors` are the names of the pieces, `restarts` the times that settings say.

    Masks of pieces are `used`, whose weights move, `still` and `equal`, whose average stands still or equals the
    weights, and `kept`, which do neither; `rows` are the intervals of these. `notes` are by interval; those with a note
    show no decay.
    """

    name: str
    series: Series
    tensors: Sequence[str]
    model: Model
    restarts: tuple[float, ...] = ()
    unit: str = "steps"
    counts_calls: bool = False

    def __post_init__(self) -> None:
        intervals = self.series.intervals
        moved = intervals.gram[..., 2, 2] > 0
        same, copied = self.series.same >= _ALL, self.series.copied >= _ALL
        self.used: Mask = np.asarray(moved.any(axis=0))
        self.still: Mask = (same | ~moved).all(axis=0) & self.used
        self.equal: Mask = (copied[1:] | ~moved).all(axis=0) & self.used
        self.kept: Mask = self.used & ~(self.still | self.equal)
        self.rows = intervals.of_pieces(self.kept)
        self.end = float(intervals.end[-1])
        stands = moved.any(axis=1) & (same | ~moved).all(axis=1)
        self.notes = {index: _Note(_STILL) for index in np.flatnonzero(stands).tolist()}
        for index, row in enumerate(moved):
            if index in self.notes or not copied[index, row].all():
                break
            self.notes[index] = _Note(_NOT_BEGUN if copied[index + 1, row].all() else _BEGINS)
        for restart in self.restarts:
            for index in np.flatnonzero((intervals.begin <= restart) & (restart < intervals.end)).tolist():
                self.notes[index] = _Note(_AGAIN, restart, said=True)

    def times(self, what: str) -> tuple[float, ...]:
        """Return the found times of the notes of a kind."""
        return tuple(
            note.at for note in self.notes.values() if note.what == what and note.at is not None and not note.said
        )

    @property
    def usable(self) -> list[int]:
        """Indexes of intervals without a note; if all have one, of those in which weights and average move."""
        moves = self.rows.gram[..., 2, 2].any(axis=1)
        idle = [i for i, note in self.notes.items() if note.what == _STILL]
        moving = [i for i in np.flatnonzero(moves).tolist() if i not in idle]
        return [i for i in moving if i not in self.notes] or moving

    @property
    def stretch(self) -> tuple[int, int]:
        """The longest range of checkpoints, begin and end, with usable intervals only; the newest of several."""
        usable, best = self.usable, (0, 0)
        begin = usable[0]
        for before, index in zip([begin - 1, *usable], usable, strict=False):
            begin = begin if index == before + 1 else index
            best = max(best, (index + 2 - begin, begin))
        return best[1], best[1] + best[0]


def _explain(case: _Case) -> tuple[Fit, tuple[Fit, ...]]:
    """Return the best fit and its rivals, see `_best_fit`; note in the case where the average began or began again."""
    begins = [index for index, note in case.notes.items() if note.what == _BEGINS]
    starts: dict[int, float] = {}
    fit, rivals = _best_fit(case, ())
    for _ in range(2):  # an average that restarted repeats its warm-up, too
        found = {index: _locate_start(fit, case.rows[[index]])[0] for index in begins} | _find_restarts(case, fit)
        if not found.keys() - starts.keys():
            break
        starts |= found
        case.notes |= {index: _Note(_BEGINS, time) for index, time in found.items()}
        fit, rivals = _best_fit(case, tuple(sorted(starts.values())))
        for _ in range(3 * isinstance(fit.model, WarmModel | PowerModel)):  # by all later intervals
            for index in starts:
                others = {*starts.values()} - {starts[index]}
                times = np.linspace(case.rows.begin[index], case.rows.end[index], 51)
                starts[index] = argmin(functools.partial(_cost_of_start, fit, others), times)
            model = replace(fit.model, starts=(0.0, *sorted(starts.values())))
            fit = Fit(model, case.rows[case.usable])
    for index, time in starts.items():  # no checkpoint shows an average before the first interval
        case.notes[index] = _Note(_BEGINS if index in (0, *begins) else _AGAIN, time)
    return fit, rivals


def _cost_of_start(fit: Fit, others: AbstractSet[float], time: float) -> float:
    """Return the residual of an average that began again at a time, and at other ones."""
    return fit.cost(replace(fit.model, starts=(0.0, *sorted({*others, time}))), fit.value)


_RULES = (
    DecayRule(0.5, "ratio"), DecayRule(0.5, "power"), DecayRule(0.5, "power", power=0.75),
    DecayRule(0.5, "ramp-up", power=RAMP_UP),
)  # fmt: skip
"""Warm-ups that libraries have."""


def _best_fit(case: _Case, starts: tuple[float, ...]) -> tuple[Fit, tuple[Fit, ...]]:
    """Return the fit of the claimed model; without a claim, of the best rule, and of others that are about as good.

    A path that turns back, or slows down, looks like another rule: the likelihoods decide. Among rules that are alike,
    and make the same averages, it is the first one.
    """
    rows = case.rows[case.usable]
    if case.model.value is not None or case.model.what != "decay":
        return Fit(case.model, rows), ()
    every, all_starts = case.model.every, (0.0, *sorted({*starts, *case.restarts}))
    warm = [WarmModel(None, every, all_starts, rule) for rule in _RULES]
    fits = [Fit(model, rows) for model in (case.model, *warm, PowerModel(None, every, all_starts))]
    least = min(fit.misfit for fit in fits)
    fits = [fit for fit in fits if fit.misfit < least + _FAR]
    if len(fits) == 1:
        return fits[0], ()
    found = [misfit(fit, case.series, case.kept, *case.stretch) for fit in fits]
    limit = min(cost for cost, _ in found) + _ALIKE
    alike = [(fit, _tails(fit.model, value, case.series.times))
             for fit, (cost, value) in zip(fits, found, strict=True) if cost <= limit]  # fmt: skip
    (best, tails), *others = alike
    return best, tuple(fit for fit, other in others if np.abs(other - tails).max() > _SAME)


def _tails(model: Model, value: float, times: FloatArray) -> FloatArray:
    """Return the mass before each checkpoint in the averages of all checkpoints: [checkpoints, checkpoints]."""
    forgotten = model.forgotten(value, times)
    return np.tril(np.exp(np.minimum(forgotten - forgotten[:, None], 0.0)))


def _find_restarts(case: _Case, fit: Fit) -> dict[int, float]:
    """Return the times at which the average restarted from the weights, by interval."""
    restarts: dict[int, float] = {}
    usable = case.usable
    if case.model.what != "decay" or len(usable) < 3:
        return restarts
    rows = fit.intervals
    kept, joint = rows.factors(fit.model, fit.value)[0], (rows.residuals(fit.model, fit.value) * rows.scale).sum(axis=1)
    for at, index in enumerate(usable):
        if kept[at] < _SHORTEST or index in case.notes:
            continue
        row, limit = rows[[at]], _CLEARLY * joint[at]
        own = float((row.residuals(fit.model, Fit(fit.model, row).value) * row.scale).sum())
        if own < limit:  # either another decay or a restart explains the interval
            time, residual = _locate_start(fit, row)
            if residual < min(limit, 1.5 * own):
                restarts[index] = time
    return restarts


def _locate_start(fit: Fit, row: Intervals) -> tuple[float, float]:
    """Return the time in an interval at which the average started from the weights, and the scaled residual."""

    def left(time: float) -> FloatArray:
        return row.residuals(replace(fit.model, starts=(0.0, time)), fit.value)

    def cost(weights: FloatArray, time: float) -> float:
        return float((left(time) * weights).sum())

    weights, times = row.scale, np.linspace(row.begin[0], row.end[0], 51)
    for _ in range(3):
        time = argmin(functools.partial(cost, weights), times)
        weights = 1 / np.maximum(left(time), 1e-2 / row.scale)
    return time, cost(row.scale, time)


# --- verdicts

_HOW = {
    "does not move": "the average does not move while the weights do: is its update called, and on the same tensors "
    "that are saved (names after torch.compile, shards of ZeRO-3)?",
    "equals the weights": "the average is equal to the weights: it is copied, or its decay is 0",
}
_UNEXPLAINED = (
    "the weights at these checkpoints do not explain how the average moves between them: they forget faster than "
    "checkpoints are apart, or are of another run"
)
_AWAY = "the average moves away from the weights, as if the sign of its update were wrong"


def _judge(case: _Case) -> Audit:
    """Return the audit of an average from its intervals."""
    claimed = None if case.model.value is None else case.model.parameter(case.model.value)
    elements = sum(values.shape[1] for values in case.series.values)
    base = Audit(case.name, "", "", case.model.what, claimed=claimed, elements=elements)
    if not case.used.any():
        return replace(base, verdict="undetermined", text="the weights stand still between these checkpoints")
    for mask, verdict in ((case.still, "does not move"), (case.equal, "equals the weights")):
        if mask[case.used].all():
            return replace(base, verdict=verdict, text=_HOW[verdict])
    if not case.usable:
        return replace(base, verdict="undetermined", text="in no interval do both the weights and the average move")
    fit, rivals = _explain(case)
    model = fit.model
    value, sigma = refine(fit, case.series, case.kept, *case.stretch)
    found, rising = _final_parameter(model, value, case.end)
    audit = replace(
        base,
        what=model.what,
        found=found,
        length=None if rising else model.length(value),
        uncertainty=None if rising else sigma,
        warm_up=model.warm_up,
        starts=case.times(_BEGINS) + case.times(_AGAIN),
        is_late=bool(case.times(_BEGINS)),
        intervals=tuple(_interval(case.rows[[i]], fit, str(case.notes.get(i, ""))) for i in range(len(case.rows.end))),
    )
    if rivals:
        choices = tuple(_in_words(each.model, each.value) for each in (fit, *rivals))
        text = f"the files show it about equally as {', and as '.join(choices)}"
        return replace(audit, verdict="undetermined", text=text, found=None, choices=choices)
    if restarts := case.times(_AGAIN):
        near = " and ".join(f"{time:,.0f}" for time in restarts)
        text = f"began again from the weights near step {near}: the average was lost, or reset, at a resume"
        text += f"; its decay is {found:.7g} " + ("at the end, still rising" if rising else f"(± {sigma:.1%})")
        return replace(audit, verdict="began again", text=text)
    unexplained = [interval.unexplained for interval in audit.intervals if not interval.note]
    if value <= 0 or (model.what == "decay" and unexplained and np.median(unexplained) > _FOREIGN):
        return replace(audit, verdict="undetermined", text=_AWAY if value <= 0 else _UNEXPLAINED, found=None)
    lost = tuple(dict.fromkeys(np.array(case.tensors)[case.still | case.equal].tolist()))
    if lost:
        how = "are not followed" if case.still.any() else "are copied"
        named = ", ".join(lost[:3]) + f" and {len(lost) - 3} more" * (len(lost) > 3)
        text = f"{len(lost)} of {len(set(case.tensors))} tensors {how}, while the others are averaged: {named}"
        return replace(audit, verdict="some tensors", text=text, tensors=lost)
    return _compare_lengths(audit, case, model, value)


def _compare_lengths(audit: Audit, case: _Case, model: Model, value: float) -> Audit:
    """Return the audit with the verdict on the found length, against the claimed one if there is a claim."""
    sigma, unit, rows = audit.uncertainty or 0.0, case.unit, case.rows[case.usable]
    length, spacing = model.length(value), float((rows.end - rows.begin).min())
    claimed = None if model.value is None else model.length(model.value)
    if model.what == "decay" and max(length, claimed or 0.0) < _SHORTEST * spacing:
        closer = f"checkpoints closer than {max(1, (claimed or length) / _SHORTEST):,.0f} {unit} would show it"
        text = f"its time constant is below {_SHORTEST * spacing:,.3g} {unit}, too short for the time between these"
        return replace(audit, verdict="undetermined", text=f"{text} checkpoints; {closer}", found=None)
    if sigma > _VAGUE and (claimed is None or abs(math.log(length / claimed)) < _BEYOND_DOUBT * sigma):
        text = f"the checkpoints do not show its length (± {min(sigma, 1):.0%})"
        return replace(audit, verdict="undetermined", text=text, found=None)
    reached, rising = _final_parameter(model, value, case.end)
    shown = f"{model.what} {reached:.7g}, a time constant of {length:,.4g} {unit} (± {sigma:.1%})"
    if model.what == "sigma_rel":
        shown = f"sigma_rel {reached:.4g} (± {sigma:.1%})"
    if model.warm_up:
        rule = model.decay.rule  # type: ignore[attr-defined]
        shown = f"decay {reached:.7g} at the end, still rising by {rule}" if rising else f"{shown}, reached by {rule}"
    if starts := case.restarts or audit.starts:
        shown += f"; begun from the weights near step {' and '.join(f'{time:,.0f}' for time in starts)}"
    if claimed is None:
        return replace(audit, verdict="found", text=shown)
    ratio = length / claimed
    audit = replace(audit, ratio=ratio)
    slack = max(math.log(_SLACK), 3 * sigma)
    if abs(math.log(ratio)) <= slack:
        return replace(audit, verdict="as claimed", text=f"{shown}, as claimed")
    if case.counts_calls and ratio > 1 and abs(math.log(ratio / round(ratio))) <= slack:
        text = f"{shown}, as claimed if it is updated at about every {round(ratio)}th call, which its files do not say"
        return replace(audit, verdict="as claimed", text=text)
    factor = max(ratio, 1 / ratio)
    text = f"{factor:.3g} times too {'long' if ratio > 1 else 'short'}: {shown}, not {audit.claimed:.7g}"
    factors = " to ".join(dict.fromkeys(f"{factor * math.exp(sign * sigma):.3g}" for sign in (-1, 1)))
    if ratio > 1:
        usual = "updated at every k-th step only, or of steps that are counted twice"
        return replace(audit, verdict="too long", text=f"{text}; as if {usual} (k = {factors})")
    usual = "once a microbatch, or by each of so many processes"
    return replace(audit, verdict="too short", text=f"{text}; as if updated {factors} times a step: {usual}")


def _in_words(model: Model, value: float) -> str:
    """Return the settings of an import that make averages of a model, in words."""
    if model.what == "sigma_rel":
        return f"sigma_rel {model.parameter(value):.3g}"
    return f"decay {min(model.parameter(value), 0.999999):.6g} with warm-up {model.warm_up or 'none'}"


def _final_parameter(model: Model, value: float, end: float) -> tuple[float, bool]:
    """Return the decay or sigma_rel at the end, and whether a warm-up is still below the decay that it leads to."""
    parameter = model.parameter(value)
    if not model.warm_up:
        return parameter, False
    last = math.exp(-float(np.diff(model.forgotten(value, np.array([end - model.every, end])))[0]))
    return min(parameter, last), model.value is None and parameter > last + 1e-9


def _interval(row: Intervals, fit: Fit, note: str) -> Interval:
    """Return the findings of one interval alone; a warm-up as the constant decay that forgets as much."""
    model, (begin,), (end,) = fit.model, row.begin.tolist(), row.end.tolist()
    plain = PowerModel() if model.what == "sigma_rel" else Model(None, model.every)
    found = plain.length(Fit(plain, row).value) if row.gram[..., 2, 2].any() else math.nan
    claimed = None
    if model.value is not None:
        forgotten = float(np.diff(model.forgotten(model.value, np.array([begin, end])))[0])
        is_width = model.what == "sigma_rel"
        claimed = model.length(model.value) if is_width else plain.length(forgotten / (end - begin))
    moved = row.gram[..., 0, 0] + row.gram[..., 1, 1] - 2 * row.gram[..., 0, 1]
    left = max(float(row.residuals(model, fit.value).sum()), 0.0)
    return Interval(begin, end, found, claimed, math.sqrt(left / max(float(moved.sum()), 1e-300)), note)


# --- runs


def audit_sources(sources: Sequence[Source], claimed: float | None = None, every: int = 1) -> list[Audit]:
    """Audit every average of a run against its weights.

    Arguments:
        sources: sources of one run: checkpoints of averages and of weights at the same times; or snapshots of a
            tracker, whose headers hold a sample of both.
        claimed: claimed decay of the averages; by default the one that their files or the import say.
        every: steps between updates where neither files nor settings say them.

    Raises:
        InvalidValueError: nothing can be audited, or `claimed` is no decay.
    """
    if claimed is not None and not 0 < claimed < 1:
        raise InvalidValueError("claimed", "must lie in (0, 1)", value=claimed)
    snapshots = [one for one in sources if isinstance(one, Snapshot)]
    audits = list(_audit_snapshots(snapshots) if snapshots else _audit_checkpoints(sources, claimed, every))
    if not audits:
        reason = "holds no two times at which there are an average and the weights"
        raise InvalidValueError("the run", reason, "an audit compares the two between checkpoints")
    return audits


def _audit_checkpoints(sources: Sequence[Source], claimed: float | None, every: int) -> Iterator[Audit]:
    """Yield the audit of each average, by sigma_rel."""
    files = [source for source in sources if source.files]
    weights = {source.t: source for source in files if isinstance(source.profile, Point)}
    by_width: dict[float, list[Source]] = {}
    for source in files:
        if not isinstance(source.profile, Point) and source.t in weights:
            by_width.setdefault(source.sigma_rel, []).append(source)
    for width, averages in sorted(by_width.items()):
        if len(averages) < 2:
            continue
        first, name = averages[0], f"sigma_rel {width:g}" if width else ""
        pieces = choose_pieces({name: first.entries[name].size for name in first.averages})
        pairs = [(weights[average.t], average) for average in averages]
        before = max((t for t in weights if t < first.t), default=None)
        if before is not None and len(averages) == sum(t > before for t in weights) and _may_begin(first, before):
            pairs = [(weights[before],) * 2, *pairs]
        model, starts = _claim(averages, width, claimed, every)
        updates = getattr(averages[-1], "updates", None)
        calls = updates is not None and updates.counts_calls and getattr(model, "decay", DecayRule(0.5)).stride == 1
        series, names = read_series(pairs, pieces), [name for name, *_ in pieces]
        yield _judge(_Case(name, series, names, model, starts, first.t_unit, calls))


def _may_begin(first: Source, before: float) -> bool:
    """Return whether nothing says that an average began before the last file without it, so that it began later."""
    updates, settings = getattr(first, "updates", None), getattr(first.profile, "settings", {})
    return (
        updates is not None and updates.count is None and settings.get("first", 0) - settings.get("every", 0) < before
    )


def _claim(
    averages: Sequence[Source], width: float, claimed: float | None, every: float
) -> tuple[Model, tuple[float, ...]]:
    """Return the model that averages are claimed to follow, and the restarts that their settings say."""
    profiles = [source.profile for source in averages if isinstance(source.profile, OrdinaryEMA)]
    settings = dict(profiles[-1].settings) if profiles else {}
    if width:
        every, first = settings.get("every", 0.0), settings.get("first", 0.0)
        return PowerModel(gamma_from_sigma_rel(width) + 1, every, (float(first - every),)), ()
    decay: float | None = getattr(averages[-1], "decay", 0.0) or None
    if claimed is not None:
        settings["decay"] = decay = claimed
    every = settings.pop("every", every)
    first = [profile.settings["first"] for profile in profiles] or [every]
    restarts = tuple(float(b - every) for b, before in zip(first[1:], profiles, strict=False) if b - every >= before.t)
    if decay is None:
        return Model(None, every), restarts
    settings = {name: value for name, value in settings.items() if name not in ("updates", "first")}
    if settings.get("warm_up") or settings.get("copies", 0) > 1:
        starts = (float(first[0] - every), *restarts)
        return WarmModel(1.0, every, starts, DecayRule(**settings)), restarts
    return Model(-math.log(decay) / every, every), restarts


def _audit_snapshots(snapshots: Sequence[Snapshot]) -> Iterator[Audit]:
    """Yield the audit of each tracked average, from the samples of weights and average in the headers."""
    last = snapshots[-1]
    names = [name for name, _ in places({name: last.entries[name].shape for name in last.averages})]
    cuts = np.array_split(np.arange(len(names)), min(PIECES, len(names)))
    for width in sorted({one.sigma_rel for one in snapshots}):
        read = [(one.t, decode_sample(one.sample)) for one in snapshots if one.sigma_rel == width and one.sample]
        read = [(t, sample) for t, sample in read if len(sample[0]) == len(names)]
        if len(read) > 1:
            rows = np.array([*(weights for _, (weights, _) in read), *(average for _, (_, average) in read)])
            times, rounding = np.array([t for t, _ in read]), np.zeros((len(read), len(cuts)))
            series = Series(times, [rows[:, cut] for cut in cuts], rounding)
            model = PowerModel(gamma_from_sigma_rel(width) + 1)
            yield _judge(_Case(f"sigma_rel {width:g}", series, [names[cut[0]] for cut in cuts], model))
