"""Check that an average is what it claims to be, from checkpoints of it and of the weights; NumPy float64 on a sample.

`audit_decay` finds the decay that explains how the average moved. This module finds the warm-up and the restarts, and
recognises faults: the average, or some of its tensors, do not move or equal the weights. An average that restarted from
the weights remembers nothing from before the restart; how far it has moved between two checkpoints gives its time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from posthoc_cli.checkpoints.audit_decay import MOST_CHECKPOINTS, Fit, Intervals, Model, Series, likelihood, refine
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.errors import DirectoryError, InvalidValueError, NonFiniteError, check_number
from posthoc_cli.profiles import POWER_FUNCTION, RAMP_UP, DecayRule, OrdinaryEMA, Point, gamma_from_sigma_rel
from posthoc_cli.snapshots.sources import ElementRange, Source, expected_rounding

_MOST_ELEMENTS, _PIECES = 100_000, 32  # most elements in the sample; least pieces of tensors if it has enough elements
_SLACK = 1.1  # largest factor between the found and the claimed length of an average that is as claimed
_FOREIGN = 0.8  # largest unexplained share of the motion of an average that belongs to the weights
_SHORTEST = 0.1  # smallest length that can be determined, as a share of the time between two checkpoints
_ALL = 0.999  # share of equal elements that counts as all elements
_CLEARLY = 0.5  # an explanation is clearly better if its residual is below this share of another one's
_FAR = 3.0  # rules with log residuals, summed over the intervals, above the least ones by this are not compared further
_ALIKE = 0.05  # rules explain files about equally if -2 log of their likelihoods for each element differ by less
_SAME = 0.02  # rules are the same if their tails differ by less, as much as those of lengths that differ by 5 %
_VAGUE, _BEYOND_DOUBT = 0.25, 5.0  # above this uncertainty a length is undetermined, unless so many times that off

_STILL = "was not updated"
BAD = ("too long", "too short", "does not move", "equals the weights", "began again", "some tensors")
"""Verdicts that name a fault; the others are "as claimed", "found" and "undetermined"."""


@dataclass(frozen=True)
class Interval:
    """What the audit found between two checkpoints, whose times are `begin` and `end`."""

    begin: float
    end: float
    found: float  # time constant in the unit of times, 1 / (1 - decay) for one step; for a power function its sigma_rel
    claimed: float | None  # None without a claim
    unexplained: float  # L2 norm of the residual of the average's motion, divided by that of the motion
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
    uncertainty: float | None = None  # of the length, relative
    claimed: float | None = None  # claimed parameter
    ratio: float | None = None  # found length / claimed length
    warm_up: str = ""  # rule by which the decay rose, as `ImportSettings.ema_warmup` names it
    starts: tuple[float, ...] = ()  # times after the begin of the training at which it started from the weights
    is_late: bool = False  # whether the first of these is its begin, and not a restart
    tensors: tuple[str, ...] = ()  # names of the tensors that the verdict is about; empty for all tensors
    intervals: tuple[Interval, ...] = ()
    elements: int = 0  # in the sample

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


# --- what an average did


@dataclass
class _Case:
    """An average to be judged; `tensors` are the names of its pieces.

    Masks of pieces are `used`, whose weights move, `still` and `equal`, whose average stands still or equals the
    weights, and `kept`, which do neither; `rows` are the intervals of these. Intervals with `notes` show no decay. At
    the begin of interval `begin`, not at its end, the average equals the weights.
    """

    name: str
    series: Series
    tensors: Sequence[str]
    model: Model
    unit: str

    def __post_init__(self) -> None:
        moved = np.array([(x[1:] != x[:-1]).any(axis=1) for x, _ in self.series.values]).T
        same = np.array([(e[1:] == e[:-1]).mean(axis=1) >= _ALL for _, e in self.series.values]).T | ~moved
        copied = np.array([(x == e).mean(axis=1) >= _ALL for x, e in self.series.values]).T
        self.used = moved.any(axis=0)
        self.still = same.all(axis=0) & self.used
        self.equal = (copied[1:] | ~moved).all(axis=0) & self.used
        self.kept = self.used & ~self.still & ~self.equal
        self.rows = self.series.intervals(self.kept)
        self.end = float(self.rows.end[-1])
        stands = moved.any(axis=1) & same.all(axis=1)
        self.notes = [_STILL * bool(stand) for stand in stands]
        copies = (copied[:-1] | ~moved).all(axis=1) & ~stands
        begun = int(np.argmin([*copies, False]))
        self.notes[:begun] = ["not begun"] * begun
        is_within = begun > 0 and not (copied[begun] | ~moved[begun - 1]).all()
        self.begin = begun - 1 if is_within else None
        for restart in self.model.starts[1:]:
            for index in np.flatnonzero((self.rows.begin <= restart) & (restart < self.rows.end)):
                self.notes[index] = f"began again at {restart:,.0f}, as the settings say"

    @property
    def usable(self) -> list[int]:
        """Indexes of intervals without a note; if all have one, of those in which weights and average move."""
        moves = np.flatnonzero(self.rows.gram[..., 2, 2].any(axis=1)).tolist()
        return [i for i in moves if not self.notes[i]] or [i for i in moves if self.notes[i] != _STILL]

    @property
    def stretch(self) -> tuple[int, int]:
        """The longest range of checkpoints, begin and end, with usable intervals only; the newest of several."""
        usable = np.array(self.usable)
        runs = np.split(usable, np.flatnonzero(np.diff(usable) > 1) + 1)
        longest = max(reversed(runs), key=len)
        end = int(longest[-1]) + 2
        return max(int(longest[0]), end - MOST_CHECKPOINTS), end


_RULES = (
    DecayRule(0.5), DecayRule(0.5, "ratio"), DecayRule(0.5, "power"), DecayRule(0.5, "power", power=0.75),
    DecayRule(0.5, "ramp-up", power=RAMP_UP), DecayRule(0.5, POWER_FUNCTION),
)  # fmt: skip
"""A constant decay, the warm-ups that libraries have, and the power function."""


def _explain(case: _Case) -> tuple[Fit, list[Fit], dict[int, float]]:
    """Return the best fit, its rivals, see `_best_fit`, and by interval the times at which the average started."""
    starts: dict[int, float] = {}
    fit, rivals = _best_fit(case, starts)
    for _ in range(2):  # an average that restarted repeats its warm-up, too
        found = _find_restarts(case, fit)
        if case.begin is not None and case.begin not in starts:
            row = case.rows[[case.begin]]
            found[case.begin] = _locate_start(fit.model, fit.value, row, row)
        if not found:
            break
        starts |= found
        for index in found:
            case.notes[index] = "begins" if index in (0, case.begin) else "began again"
        fit, rivals = _best_fit(case, starts)
        rows, base = case.rows[case.usable], replace(fit.model, starts=case.model.starts)
        for _ in range(3 * (base.rises or base.is_power)):  # by all later intervals
            for index in starts:
                others = base.begun(*(time for other, time in starts.items() if other != index))
                starts[index] = _locate_start(others, fit.value, rows, case.rows[[index]])
            fit = Fit(base.begun(*starts.values()), rows)
    for index, time in starts.items():
        case.notes[index] += f" near step {time:,.0f}"
    return fit, rivals, starts


def _best_fit(case: _Case, starts: Mapping[int, float]) -> tuple[Fit, list[Fit]]:
    """Return the fit of the claimed model; without a claim, of the best rule, and of others that are about as good.

    A path that turns back, or slows down, looks like another rule: the likelihoods decide. Among rules that are alike,
    and make the same averages, it is the first one.
    """
    rows, model = case.rows[case.usable], case.model.begun(*starts.values())
    if model.claimed is not None:
        return Fit(model, rows), []
    fits = [Fit(replace(model, rule=rule), rows) for rule in _RULES]
    least = min(fit.misfit for fit in fits)
    fits = [fit for fit in fits if fit.misfit < least + _FAR]
    if len(fits) == 1:
        return fits[0], []
    found = [likelihood(fit, case.series, case.kept, *case.stretch) for fit in fits]
    limit = min(cost for _, cost in found) + _ALIKE
    alike = [(fit, fit.model.masses_before(value, case.series.times))
             for fit, (value, cost) in zip(fits, found, strict=True) if cost <= limit]  # fmt: skip
    (best, masses), *others = alike
    return best, [fit for fit, other in others if np.abs(other - masses).max() > _SAME]


def _find_restarts(case: _Case, fit: Fit) -> dict[int, float]:
    """Return the times at which the average restarted from the weights, by interval."""
    restarts: dict[int, float] = {}
    usable, rows = case.usable, fit.intervals
    if (case.model.is_power and case.model.claimed is not None) or len(usable) < 3:
        return restarts
    kept, joint = rows.factors(fit.model, fit.value)[0], rows.shares(fit.model, fit.value)
    for at, index in enumerate(usable):
        if kept[at] < _SHORTEST or case.notes[index]:
            continue
        row = rows[[at]]
        own, limit = row.shares(fit.model, Fit(fit.model, row).value)[0], _CLEARLY * joint[at]
        if own < limit:  # either another decay or a restart explains the interval
            time = _locate_start(fit.model, fit.value, row, row)
            if row.shares(fit.model.begun(time), fit.value)[0] < min(limit, 1.5 * own):
                restarts[index] = time
    return restarts


def _locate_start(model: Model, value: float, rows: Intervals, within: Intervals) -> float:
    """Return the time in one interval at which the average started from the weights, by the residuals of `rows`."""
    times = np.linspace(within.begin[0], within.end[0], 51)
    return rows.search(lambda time: rows.residuals(model.begun(time), value), times)[0]


# --- verdicts


def _judge(case: _Case) -> Audit:
    """Return the audit of an average from its intervals."""
    model, elements = case.model, sum(values.shape[2] for values in case.series.values)
    claimed = None if model.claimed is None else model.parameter(model.claimed)
    audit = Audit(case.name, "undetermined", "", model.what, claimed=claimed, elements=elements)
    if not case.used.any():
        return replace(audit, text="the weights stand still between these checkpoints")
    if case.still[case.used].all():
        text = "the average does not move while the weights do: is its update called, and on the same tensors that are"
        text += " saved (names after torch.compile, shards of ZeRO-3)?"
        return replace(audit, verdict="does not move", text=text)
    if case.equal[case.used].all():
        text = "the average is equal to the weights: it is copied, or its decay is 0"
        return replace(audit, verdict="equals the weights", text=text)
    if not case.usable:
        return replace(audit, text="in no interval do both the weights and the average move")
    fit, rivals, starts = _explain(case)
    value, sigma = refine(fit, case.series, case.kept, *case.stretch)
    found, rising = fit.model.at_end(value, case.end)
    audit = replace(
        audit,
        what=fit.model.what,
        length=None if rising else fit.model.length(value),
        uncertainty=None if rising else sigma,
        warm_up=fit.model.warm_up,
        starts=tuple(starts[index] for index in sorted(starts)),
        is_late=any(index in (0, case.begin) for index in starts),
        intervals=tuple(_interval(case.rows[[index]], fit, note) for index, note in enumerate(case.notes)),
    )
    if rivals:
        return replace(
            audit, text=f"the files show it about equally as {', and as '.join(map(_in_words, (fit, *rivals)))}"
        )
    if restarts := audit.starts[audit.is_late :]:
        text = f"began again from the weights near step {_steps(restarts)}: the average was lost, or reset, at a resume"
        text += f"; its decay is {found:.7g} " + ("at the end, still rising" if rising else f"(± {sigma:.1%})")
        return replace(audit, verdict="began again", text=text, found=found)
    unexplained = [interval.unexplained for interval in audit.intervals if not interval.note]
    if not fit.model.is_power and unexplained and np.median(unexplained) > _FOREIGN:
        text = "the weights at these checkpoints do not explain how the average moves between them: they forget faster"
        text += " than checkpoints are apart, or are of another run"
        return replace(audit, text=text)
    if lost := tuple(dict.fromkeys(np.array(case.tensors)[case.still | case.equal].tolist())):
        how = "are not followed" if case.still.any() else "are copied"
        named = ", ".join(lost[:3]) + f" and {len(lost) - 3} more" * (len(lost) > 3)
        text = f"{len(lost)} of {len(set(case.tensors))} tensors {how}, while the others are averaged: {named}"
        return replace(audit, verdict="some tensors", text=text, tensors=lost, found=found)
    return _compare_lengths(audit, case, fit.model, value, sigma)


def _compare_lengths(audit: Audit, case: _Case, model: Model, value: float, sigma: float) -> Audit:
    """Return the audit with the verdict on the found length, against the claimed one if there is a claim."""
    rows, unit, length = case.rows[case.usable], case.unit, model.length(value)
    found, rising = model.at_end(value, case.end)
    sigma, shortest = 0.0 if rising else sigma, _SHORTEST * float((rows.end - rows.begin).min())
    claimed = None if model.claimed is None else model.length(model.claimed)
    if not model.is_power and max(length, claimed or 0.0) < shortest:
        text = f"its time constant is below {shortest:,.3g} {unit}, too short for the time between these checkpoints"
        closer = f"checkpoints closer than {max(1, (claimed or length) / _SHORTEST):,.0f} {unit} would show it"
        return replace(audit, text=f"{text}; {closer}")
    if sigma > _VAGUE and (claimed is None or abs(math.log(length / claimed)) < _BEYOND_DOUBT * sigma):
        return replace(audit, text=f"the checkpoints do not show its length (± {min(sigma, 1):.0%})")
    if model.is_power:
        shown = f"sigma_rel {found:.4g} (± {sigma:.1%})"
    elif rising:
        shown = f"decay {found:.7g} at the end, still rising by {model.rule.rule}"
    else:
        shown = f"decay {found:.7g}, a time constant of {length:,.4g} {unit} (± {sigma:.1%})"
        shown += f", reached by {model.rule.rule}" * bool(model.warm_up)
    if starts := case.model.starts[1:] or audit.starts:
        shown += f"; begun from the weights near step {_steps(starts)}"
    if claimed is None:
        return replace(audit, verdict="found", text=shown, found=found)
    ratio, slack = length / claimed, max(math.log(_SLACK), 3 * sigma)
    text, factor = f"{shown}, as claimed", max(ratio, 1 / ratio)
    audit = replace(audit, verdict="as claimed", text=text, found=found, ratio=ratio)
    if math.log(factor) <= slack:
        return audit
    verdict = "too long" if ratio > 1 else "too short"
    factors = " to ".join(dict.fromkeys(f"{factor * math.exp(sign * sigma):.3g}" for sign in (-1, 1)))
    usual = f"updated {factors} times a step: once a microbatch, or by each of so many processes"
    if ratio > 1:
        usual = f"updated at every k-th step only, or of steps that are counted twice (k = {factors})"
    text = f"{factor:.3g} times {verdict}: {shown}, not {audit.claimed:.7g}; as if {usual}"
    return replace(audit, verdict=verdict, text=text)


def _steps(times: Sequence[float]) -> str:
    return " and ".join(f"{time:,.0f}" for time in times)


def _in_words(fit: Fit) -> str:
    """Return the settings of an import that make averages of a model, in words."""
    parameter = fit.model.parameter(fit.value)
    if fit.model.is_power:
        return f"sigma_rel {parameter:.3g}"
    return f"decay {min(parameter, 0.999999):.6g} with warm-up {fit.model.warm_up or 'none'}"


def _interval(row: Intervals, fit: Fit, note: str) -> Interval:
    """Return the findings of one interval alone; a warm-up as the constant decay that forgets as much.

    One interval may be explained by several values: its own is the one that the overall fit leads to.
    """
    model, (begin,), (end,) = fit.model, row.begin.tolist(), row.end.tolist()
    plain = replace(model, rule=model.rule if model.is_power else DecayRule(0.5), claimed=None, starts=(0.0,))
    began = replace(model, starts=tuple(start for start in model.starts if start <= begin) or (begin,))

    def as_plain(value: float) -> float:
        lost = began.forgotten(value, np.array([begin, end]))
        return value if model.is_power else float(lost[1] - lost[0]) / (end - begin)

    moves = row.gram[..., 2, 2].any()
    found = plain.length(Fit(plain, row, as_plain(fit.value)).value) if moves else math.nan
    claimed = None if model.claimed is None else plain.length(as_plain(model.claimed))
    moved = float((row.gram[..., 0, 0] + row.gram[..., 1, 1] - 2 * row.gram[..., 0, 1]).sum())
    left = max(float(row.residuals(model, fit.value).sum()), 0.0)
    return Interval(begin, end, found, claimed, math.sqrt(left / max(moved, 1e-300)), note)


# --- sources


def audit_sources(sources: Sequence[Source], claimed: float | None = None) -> list[Audit]:
    """Audit every average among the checkpoints of a run against the weights at the same times.

    Arguments:
        sources: checkpoints of one run.
        claimed: claimed decay of the averages; by default the one that their files or the import say.

    Raises:
        InvalidValueError: nothing can be audited, or `claimed` is no decay.
    """
    if claimed is not None:
        check_number("claimed", claimed, lambda decay: 0 < decay < 1, "lie in (0, 1)")
    for one in sources:
        if not isinstance(one, Checkpoint):
            reason = "holds snapshots of a tracker: their headers hold the width exactly, and `ema info` shows it"
            raise DirectoryError(one.path.parent, reason)
    if audits := list(audits_of(sources, claimed)):
        return audits
    reason = "holds no two times at which there are an average and the weights"
    raise InvalidValueError("the run", reason, "an audit compares the two between checkpoints")


def audits_of(checkpoints: Sequence[Any], claimed: float | None = None, every: int = 1) -> Iterator[Audit]:
    """Yield the audit of each average, by sigma_rel; `every` is the time between updates if nothing says it."""
    weights = {one.t: one for one in checkpoints if isinstance(one.profile, Point)}
    by_width: dict[float, list[Checkpoint]] = {}
    for one in checkpoints:
        if not isinstance(one.profile, Point) and one.t in weights:
            by_width.setdefault(one.sigma_rel, []).append(one)
    for width, averages in sorted(by_width.items()):
        if len(averages) < 2:
            continue
        pairs, first = [(weights[average.t], average) for average in averages], averages[0]
        before = max((t for t in weights if t < first.t), default=math.inf)
        if len(averages) == sum(t > before for t in weights) and _may_begin(first, before):
            pairs = [(weights[before],) * 2, *pairs]
        model = _claim(averages, claimed, every)
        yield _judge(_Case(f"sigma_rel {width:g}" if width else "", *_read(pairs), model, first.t_unit))


def _may_begin(first: Checkpoint, before: float) -> bool:
    """Return whether nothing says that an average began before the last file without it, so that it began later."""
    settings = getattr(first.profile, "settings", {"first": 0, "every": 0})
    return first.updates is not None and first.updates.count is None and settings["first"] - settings["every"] < before


def _claim(averages: Sequence[Checkpoint], claimed: float | None, every: float) -> Model:
    """Return the model that averages are claimed to follow, with the restarts that their settings say."""
    profiles = [one.profile for one in averages if isinstance(one.profile, OrdinaryEMA)]
    width, settings = averages[-1].sigma_rel, dict(profiles[-1].settings) if profiles else {}
    every = settings.pop("every", 0.0 if width else every)
    starts = [profile.settings["first"] - every for profile in profiles] or [0.0]
    restarts = [start for start, before in zip(starts[1:], profiles, strict=False) if start >= before.t]
    model = Model(every=every, starts=(starts[0], *restarts))
    if width:
        return replace(model, rule=DecayRule(0.5, POWER_FUNCTION), claimed=gamma_from_sigma_rel(width) + 1)
    if decay := claimed or averages[-1].decay:
        settings = {name: value for name, value in settings.items() if name not in ("updates", "first")}
        model = replace(model, rule=DecayRule(**settings | {"decay": decay}))
        return replace(model, claimed=1.0 if model.rises else -math.log(decay) / every)
    return model


def _read(pairs: Sequence[tuple[Checkpoint, Checkpoint]]) -> tuple[Series, list[str]]:
    """Read pieces of the tensors at all times, of each tensor equally many elements; return their names.

    Raises NonFiniteError for nan or infinity.
    """
    first = pairs[-1][1]
    sizes = {name: first.entries[name].size for name in sorted(first.averages) if first.entries[name].size}
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
                    raise NonFiniteError(source.path, f"tensor {piece.name!r}: holds nan or infinity")
            row[:] = np.concatenate(held)
        dtypes = [source.entries[piece.name].dtype for piece in pieces]
        rounding[at] = [expected_rounding(values, dtype, "F32") for values, dtype in zip(held, dtypes, strict=True)]
    series = Series(np.array([average.t for _, average in pairs]), np.split(rows, ends[:-1], axis=2), rounding)
    return series, [piece.name for piece in pieces]
