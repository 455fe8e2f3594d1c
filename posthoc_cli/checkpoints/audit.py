"""Is an average what it claims to be? From checkpoints that hold it and the weights; NumPy on a sample, float64.

`audit_decay` finds the decay that explains how the average moved; here the warm-up is found, and where it began. What
is wrong shows in the same sums of products: nothing moves, the average is equal to the weights, the decay is above 1,
or it is the weights that follow the average. Where the average began again from the weights it remembers nothing of
before, and how far it is on the way between two checkpoints says when.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from posthoc_cli.checkpoints.audit_decay import (
    PIECES,
    Fit,
    Model,
    PowerModel,
    Products,
    Sample,
    Series,
    WarmModel,
    is_low,
    least,
    misfit,
    passed_since,
    pieces_of,
    products_of,
    read_sample,
    refined,
    rests,
    series_of,
    unexplained,
)
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import FloatArray, Point, gamma_from_sigma_rel
from posthoc_cli.profiles.other_libraries import RAMP_UP, Decay, OrdinaryEMA
from posthoc_cli.snapshots.format import decode_sample
from posthoc_cli.snapshots.path import places
from posthoc_cli.snapshots.sources import FileSource, Snapshot, Source

_SLACK = 1.1
"""A length that differs by less from a claimed one is as claimed."""

_FOREIGN = 0.8
"""With more of its motion left unexplained, an average is of other weights."""

_SHORTEST = 0.1
"""Shorter than this share of the time between two checkpoints, a length cannot be told."""

_ALL, _MANY = 0.999, 0.5
"""Shares of elements that are equal."""

_CLEARLY = 0.5
"""An explanation that leaves less than this share of what another one leaves is the better one."""

_WARMER = 2.0
"""By so much, in e-foldings of what is left summed over the intervals, a warm-up must explain them better."""

BAD = ("too long", "too short", "does not move", "stalls", "is the weights", "began again", "moves away", "swapped",
       "some tensors", "was not updated", "other weights")  # fmt: skip
"""Verdicts that contradict what an average should be; the others are "as claimed", "found" and "cannot be told"."""


@dataclass(frozen=True)
class Interval:
    """Between two checkpoints.

    Attributes:
        begin, end: their steps, or times.
        found: the time constant in the same unit, 1 / (1 - decay) of a step; of a power function its sigma_rel.
        claimed: the same of what is claimed; None without.
        unexplained: what the found decay leaves of the average's motion, relative, as lengths of vectors.
        note: what is wrong here; empty for nothing.
    """

    begin: float
    end: float
    found: float
    claimed: float | None
    unexplained: float
    note: str = ""


@dataclass(frozen=True)
class Audit:
    """What an average is, by its checkpoints.

    Attributes:
        name: of the average, if the run has several.
        verdict: in a few words, one of `BAD`, or "as claimed", "found", "cannot be told".
        text: what it means, for people.
        what: "decay" or "sigma_rel".
        found, length: of all intervals; None where nothing can be told.
        uncertainty: of the length, relative.
        claimed: None without.
        ratio: found length / claimed length.
        warm_up: the rule by which the decay rose, as settings name it; empty for none.
        starts: times at which the average began from the weights, after the training had begun.
        tensors: names of those that the verdict is about; empty for all.
        intervals: one after the other.
        elements: of the sample.
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
    tensors: tuple[str, ...] = ()
    intervals: tuple[Interval, ...] = ()
    elements: int = 0

    def __repr__(self) -> str:
        return f"Audit({self.text})"

    @property
    def is_bad(self) -> bool:
        """Whether the average is not what it claims to be."""
        return self.verdict in BAD

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"contradicted": self.is_bad}


# --- the average


@dataclass
class _Case:
    """An average to be judged: `low` if it is stored, or seems to be kept, in 16 bits; `tensors` are those of pieces.

    `starts` are times at which it is said to have begun again.
    """

    name: str
    products: Sequence[Products]
    series: Series
    tensors: Sequence[str]
    model: Model
    low: bool = False
    starts: tuple[float, ...] = ()
    unit: str = "steps"

    def __post_init__(self) -> None:
        moved = np.array([one.gram[:, 2, 2] > 0 for one in self.products])
        same = np.array([one.same for one in self.products])
        copied = np.array([one.copied for one in self.products])
        self.used = moved.any(axis=0)
        self.still = ((same >= _ALL) | ~moved).all(axis=0) & self.used
        self.equal = ((copied[:, 1] >= _ALL) | ~moved).all(axis=0) & self.used
        self.kept = self.used & ~(self.still | self.equal)
        self.stalled = float(same[:, self.kept].mean()) > _MANY if self.kept.any() else False
        self.notes: dict[int, str] = {}
        for index, row in enumerate(moved):
            if row.any() and (same[index][row] >= _ALL).all():
                self.notes[index] = "was not updated"
        self.idle = [*self.notes]
        for index, row in enumerate(moved):
            if index in self.notes or not (copied[index, 0][row] >= _ALL).all():
                break
            self.notes[index] = "not begun" if (copied[index, 1][row] >= _ALL).all() else "begins"

    @property
    def lost(self) -> tuple[str, ...]:
        """Tensors of which some piece stands still, or is copied."""
        return tuple(dict.fromkeys(np.array(self.tensors)[self.still | self.equal].tolist()))

    def fit(self, model: Model) -> Fit:
        """Of the intervals in which nothing is wrong."""
        return Fit(model, [self.rows[i] for i in self.usable])

    @cached_property
    def rows(self) -> list[Products]:
        """The intervals, without the pieces that stand still or are copied."""
        return [one.only(self.kept) for one in self.products]

    @property
    def usable(self) -> list[int]:
        """Intervals without a note, or those that tell of it nevertheless."""
        told = [i for i in range(len(self.rows)) if self.rows[i].gram[:, 2, 2].any() and i not in self.idle]
        return [i for i in told if i not in self.notes] or told

    @property
    def stretch(self) -> tuple[int, int]:
        """Where the newest of the longest rows of usable intervals begins, and ends, in checkpoints."""
        usable, best = self.usable, (0, 0)
        begin = usable[0]
        for before, index in zip([begin - 1, *usable], usable, strict=False):
            begin = begin if index == before + 1 else index
            best = max(best, (index + 2 - begin, begin))
        return best[1], best[1] + best[0]


def _explained(case: _Case) -> tuple[Fit, dict[int, float]]:
    """The fit of the model that explains the intervals best, and where the average began, with a note for each."""
    starts: dict[int, float] = {}
    begins = [i for i, note in case.notes.items() if note == "begins"]
    for said in case.starts:
        for index, one in enumerate(case.products):
            if one.begin <= said < one.end:
                case.notes[index] = f"began again at {said:,.0f}, as said"
    fit = _best(case, ())
    for _ in range(2):  # what began again has its warm-up again, too
        begun = {index: _start(fit, case.rows[index])[0] for index in begins}
        again = _restarts(case, fit)
        if not (begun | again).keys() - starts.keys():
            break
        starts |= begun | again
        case.notes |= dict.fromkeys(starts, "begins")
        fit = _best(case, tuple(sorted(starts.values())))
        for _ in range(3 * isinstance(fit.model, WarmModel)):
            for index in starts:
                starts[index] = _when(fit, case.rows[index], sorted({*starts.values()} - {starts[index]}))
            fit = case.fit(replace(fit.model, starts=(0.0, *sorted(starts.values()))))  # type: ignore[call-arg]
        case.notes |= {index: f"begins near step {starts[index]:,.0f}" for index in begun}
        case.notes |= {index: f"began again near step {starts[index]:,.0f}" for index in again}
    return fit, starts


_RULES = (
    Decay(0.5, "ratio"), Decay(0.5, "power"), Decay(0.5, "power", power=0.75), Decay(0.5, "ramp-up", power=RAMP_UP),
)  # fmt: skip
"""Warm-ups that libraries have."""


def _best(case: _Case, starts: tuple[float, ...]) -> Fit:
    """The fit of what is claimed; else of a constant decay, or of a warm-up that explains the intervals better."""
    fit, every = case.fit(case.model), case.model.every
    if case.model.what == "decay" and case.model.value is None:
        begun = (0.0, *sorted({*starts, *case.starts}))
        warm = min((case.fit(WarmModel(None, every, rule, begun)) for rule in _RULES), key=lambda one: one.misfit)
        if warm.misfit + _WARMER < fit.misfit and _is_likelier(case, warm, fit):
            return warm
    return fit


def _is_likelier(case: _Case, warm: Fit, constant: Fit) -> bool:
    """Whether a warm-up also explains all checkpoints together better: a path that turns back looks like one."""
    one, other = (misfit(fit, case.series, case.kept, *case.stretch) for fit in (warm, constant))
    return one < other


def _restarts(case: _Case, fit: Fit) -> dict[int, float]:
    """Intervals in which the average began again from the weights, and the times."""
    found: dict[int, float] = {}
    if fit.model.what != "decay" or len(fit.products) < 3:
        return found
    kept, left = fit.kept, fit.rests(fit.value)
    for place, one in enumerate(fit.products):
        index = next(i for i, row in enumerate(case.rows) if row is one)
        if kept[place] < _SHORTEST or index in case.notes:
            continue
        alone, most = Fit(fit.model, [one]), _CLEARLY * (left[place] @ one.scale)
        own = alone.rests(alone.value)[0] @ one.scale
        if own < most:  # another decay than usual would explain it, or a new beginning
            time, rest = _start(fit, one)
            if rest @ one.scale < min(most, 1.5 * own):
                found[index] = time
    return found


def _start(fit: Fit, one: Products) -> tuple[float, FloatArray]:
    """When in an interval an average began from the weights, and what that leaves of each piece."""

    def passed(share: float) -> float:
        begin = one.begin + share * one.length
        return share + (1 - share) * passed_since(fit.model, fit.value, begin, one.end) if share < 1 else 1.0

    weights = one.scale
    for _ in range(3):  # then each piece by what is left of it
        share = least(lambda f: float(rests(one.gram, 0.0, passed(f)) @ weights), np.linspace(0, 1, 51))  # noqa: B023
        left = rests(one.gram, 0.0, passed(share))
        weights = 1 / np.maximum(left, 1e-2 / one.scale)
    return one.begin + share * one.length, left


def _when(fit: Fit, one: Products, others: Sequence[float]) -> float:
    """When in an interval an average began whose warm-up began again: by the intervals after it."""

    def cost(time: float) -> float:
        model = replace(fit.model, starts=(0.0, *sorted([*others, time])))  # type: ignore[call-arg]
        return float((fit.rests(fit.value, model) * fit.weights).sum())

    return least(cost, np.linspace(one.begin, one.end, 51))


def _is_swapped(fit: Fit) -> bool:
    """Whether the weights follow the average much better than the other way round."""
    turn = np.array([[0.0, -1.0, 1.0], [0.0, -1.0, 0.0], [1.0, -1.0, 0.0]])
    other = [replace(one, gram=turn @ one.gram @ turn.T) for one in fit.products]
    pairs = list(zip(other, fit.products, strict=True))
    if np.mean([one.gram[:, 2, 2].sum() < before.gram[:, 2, 2].sum() for one, before in pairs]) > 0.5:
        return False
    plain = Model(None, fit.model.every) if fit.model.what == "decay" else replace(fit.model, value=None)
    turned = Fit(plain, other)
    left = [
        float(np.median(one.rests(one.value).sum(axis=1) / one.gram[..., 0, 0].sum(axis=1).clip(1e-300)))
        for one in (turned, fit)
    ]
    return turned.value > 0 and left[0] < _CLEARLY**2 * left[1]


# --- verdicts

_HOW = {
    "does not move": "the average does not move while the weights do: is its update called, and on the same tensors "
    "that are saved (names after torch.compile, shards of ZeRO-3)?",
    "is the weights": "the average is equal to the weights: it is copied, or its decay is 0",
    "swapped": "the weights are an average of the average: the two are stored under each other's names",
    "other weights": "these weights do not explain how the average moves: they are of another run, or of other steps",
    "moves away": "the average moves away from the weights: the sign of its update is wrong (it adds e - x, not x - e)",
}
_SINGLE = "as in an average kept in 16 bits: keep it in float32"


def _judge(case: _Case) -> Audit:
    """The verdict on an average from its intervals."""
    claimed = None if case.model.value is None else case.model.told(case.model.value)
    base = Audit(case.name, "", "", case.model.what, claimed=claimed)
    if not case.used.any():
        return replace(base, verdict="cannot be told", text="the weights stand still between these checkpoints")
    for mask, verdict in ((case.still, "does not move"), (case.equal, "is the weights")):
        if mask[case.used].all():
            return replace(base, verdict=verdict, text=_HOW[verdict])
    if not case.usable:
        return replace(base, verdict="cannot be told", text="no interval tells of it")
    fit, starts = _explained(case)
    value, uncertainty = refined(fit, case.series, case.kept, *case.stretch)
    found, rising = _reached(fit.model, value, case.products[-1].end)
    told = replace(
        base,
        found=found,
        length=None if rising else fit.model.length(value),
        uncertainty=None if rising else uncertainty,
        warm_up=fit.model.warm_up,
        starts=tuple(starts.values()),
        intervals=tuple(_interval(case.rows[i], fit, case.notes.get(i, "")) for i in range(len(case.rows))),
    )
    for wrong in _wrong(case, fit, value, uncertainty, starts, told.intervals):
        return replace(told, **wrong)
    return _compared(told, case, fit, value)


def _wrong(
    case: _Case, fit: Fit, value: float, uncertainty: float, starts: Mapping[int, float], intervals: Sequence[Interval]
) -> Iterator[dict[str, Any]]:
    """What contradicts an average of any length, the first thing first."""
    spacing = min(case.rows[i].length for i in case.usable)
    if _is_swapped(fit):
        yield {"verdict": "swapped", "text": _HOW["swapped"], "found": None}
    if fit.model.what == "decay" and value * spacing < -0.05:
        yield {"verdict": "moves away", "text": _HOW["moves away"]}
    if case.idle:
        spans = _spans([(case.products[i].begin, case.products[i].end) for i in case.idle])
        yield {"verdict": "was not updated", "text": f"was not updated from {spans}; elsewhere it was"}
    again = [time for index, time in starts.items() if case.notes[index].startswith("began again near")]
    if again:
        near = " and ".join(f"{time:,.0f}" for time in again)
        text = f"began again from the weights near step {near}: the average was lost, or reset, at a resume"
        text += f"; its decay is {fit.model.told(value):.7g} (± {uncertainty:.1%})"
        yield {"verdict": "began again", "text": text}
    gaps = [one.unexplained for one in intervals if not one.note]
    if case.model.what == "decay" and gaps and np.median(gaps) > _FOREIGN and not case.low:
        yield {"verdict": "other weights", "text": _HOW["other weights"], "found": None}
    lost, count = case.lost, len(set(case.tensors))
    if case.low and case.still.any():
        yield {"verdict": "stalls", "text": f"{len(lost)} of {count} tensors stand still, {_SINGLE}", "tensors": lost}
    if lost:
        how = "are not followed" if case.still.any() else "are copied"
        named = ", ".join(lost[:3]) + f" and {len(lost) - 3} more" * (len(lost) > 3)
        text = f"{len(lost)} of {count} tensors {how}, while the others are averaged: {named}"
        yield {"verdict": "some tensors", "text": text, "tensors": lost}


def _compared(told: Audit, case: _Case, fit: Fit, value: float) -> Audit:
    """The verdict on a length."""
    model, sigma, unit = fit.model, told.uncertainty or 0.0, case.unit
    length, spacing = model.length(value), min(case.rows[i].length for i in case.usable)
    own = None if model.value is None else model.length(model.value)
    if model.what == "decay" and max(length, own or 0.0) < _SHORTEST * spacing:
        closer = f"closer than {max(1, (own or length) / _SHORTEST):,.0f} {unit}"
        text = f"its time constant is below {_SHORTEST * spacing:,.3g} {unit}, shorter than these checkpoints can tell"
        return replace(told, verdict="cannot be told", text=f"{text}; {closer} they could", found=None)
    if sigma > 1:
        return replace(told, verdict="cannot be told", text="the checkpoints tell nothing about its length", found=None)
    reached, rising = _reached(model, value, case.products[-1].end)
    shown = f"{model.what} {reached:.7g}, a time constant of {length:,.4g} {unit} (± {sigma:.1%})"
    if model.what == "sigma_rel":
        shown = f"sigma_rel {reached:.4g} (± {sigma:.1%})"
    if model.warm_up:
        rule = model.decay.rule  # type: ignore[attr-defined]
        shown = f"decay {reached:.7g} at the end, still rising by {rule}" if rising else f"{shown}, reached by {rule}"
    if begun := case.starts or told.starts:
        shown += f"; begun from the weights near step {' and '.join(f'{time:,.0f}' for time in begun)}"
    if own is None:
        return replace(told, verdict="found", text=shown)
    ratio = length / own
    told = replace(told, ratio=ratio)
    if abs(math.log(ratio)) <= max(math.log(_SLACK), 3 * sigma):
        return replace(told, verdict="as claimed", text=f"{shown}, as claimed")
    times = f"{max(ratio, 1 / ratio):.3g} times too {'long' if ratio > 1 else 'short'}: {shown}, not {told.claimed:.7g}"
    if case.low and case.stalled:
        return replace(told, verdict="stalls", text=f"{times}; most of its elements stand still, {_SINGLE}")
    ends = [f"{max(ratio, 1 / ratio) * math.exp(sign * sigma):.3g}" for sign in (-1, 1)]
    factor = " to ".join(dict.fromkeys(ends))
    if ratio > 1:
        usual = "updated at every k-th step only, or of steps that are counted twice"
        return replace(told, verdict="too long", text=f"{times}; as if {usual} (k = {factor})")
    usual = "once a microbatch, or by each of so many processes"
    return replace(told, verdict="too short", text=f"{times}; as if updated {factor} times a step: {usual}")


def _reached(model: Model, value: float, end: float) -> tuple[float, bool]:
    """The decay, or sigma_rel, of a value; and whether a warm-up has not reached it at the end: what it is there."""
    told = model.told(value)
    if not model.warm_up:
        return told, False
    gone = np.diff(model.forgotten(value, np.array([end - model.every, end])))
    last = math.exp(-float(gone[0]))
    return min(told, last), model.value is None and told > last + 1e-9


def _interval(one: Products, fit: Fit, note: str) -> Interval:
    """What an interval shows alone: of a warm-up the constant decay that forgets as much."""
    model = fit.model
    plain = replace(model, value=None) if model.what == "sigma_rel" else Model(None, model.every)
    found = plain.length(Fit(plain, [one]).value) if one.gram[:, 2, 2].any() else math.nan
    own = None
    if model.value is not None:
        gone = np.diff(model.forgotten(model.value, np.array([one.begin, one.end])))
        own = model.length(model.value) if model.what == "sigma_rel" else plain.length(float(gone[0]) / one.length)
    moved = one.gram[:, 0, 0] + one.gram[:, 1, 1] - 2 * one.gram[:, 0, 1]
    left = math.sqrt(max(float(unexplained(model, fit.value, one).sum()), 0.0) / max(float(moved.sum()), 1e-300))
    return Interval(one.begin, one.end, found, own, left, note)


def _spans(pairs: Sequence[tuple[float, float]]) -> str:
    joined: list[list[float]] = []
    for begin, end in pairs:
        if joined and joined[-1][1] == begin:
            joined[-1][1] = end
        else:
            joined.append([begin, end])
    return " and ".join(f"{begin:,.12g} to {end:,.12g}" for begin, end in joined)


# --- runs


def audit_sources(sources: Sequence[Source], claimed: float | None = None, every: int = 1) -> list[Audit]:
    """Audit every average of a run against its weights.

    Arguments:
        sources: of one run: checkpoints of averages and of weights at the same times; or snapshots of a tracker, whose
            headers hold a sample of both.
        claimed: the decay that the averages are said to have; by default what their files or the import say.
        every: steps between updates, where nothing else tells.

    Raises:
        InvalidValueError: nothing can be audited, or `claimed` is no decay.
    """
    if claimed is not None and not 0 < claimed < 1:
        raise InvalidValueError("claimed", "must lie in (0, 1)", value=claimed)
    snapshots = [one for one in sources if isinstance(one, Snapshot)]
    found = list(_of_snapshots(snapshots)) if snapshots else list(_of_checkpoints(sources, claimed, every))
    if not found:
        reason = "holds no two times at which there are an average and the weights"
        raise InvalidValueError("the run", reason, "an audit compares the two between checkpoints")
    return found


def _of_checkpoints(sources: Sequence[Source], claimed: float | None, every: int) -> Iterator[Audit]:
    files = [one for one in sources if isinstance(one, FileSource)]
    weights = {one.info.t: one for one in files if isinstance(one.profile, Point)}
    kinds: dict[float, list[FileSource]] = {}
    for one in files:
        if not isinstance(one.profile, Point) and one.info.t in weights:
            kinds.setdefault(one.info.sigma_rel, []).append(one)
    for width, averages in sorted(kinds.items()):
        if len(averages) > 1:
            first, named = averages[0], f"sigma_rel {width:g}" if width else ""
            pieces = pieces_of({name: math.prod(first.stored[name].shape) for name in first.info.averages})
            samples = (read_sample(weights[one.info.t], one, pieces) for one in averages)
            model, starts = _claim(averages, width, claimed, every)
            yield from _audited(samples, named, [name for name, *_ in pieces], model, True, starts, first.info.t_unit)


def _claim(
    averages: Sequence[FileSource], width: float, claimed: float | None, every: float
) -> tuple[Model, tuple[float, ...]]:
    """What averages are said to be, and when they are said to have begun again."""
    if width:
        return PowerModel(gamma_from_sigma_rel(width) + 1), ()
    said: float | None = getattr(averages[-1].info, "decay", 0.0) or None
    profiles = [one.profile for one in averages if isinstance(one.profile, OrdinaryEMA)]
    settings = dict(profiles[-1].settings) if profiles else {}
    if claimed is not None:
        settings["decay"] = said = claimed
    every = settings.pop("every", every)
    first = [one.settings["first"] for one in profiles] or [every]
    again = tuple(float(b - every) for b, one in zip(first[1:], profiles, strict=False) if b - every >= one.t)
    if said is None:
        return Model(None, every), again
    settings = {name: value for name, value in settings.items() if name not in ("updates", "first")}
    if settings.get("warm_up") or settings.get("copies", 0) > 1:
        starts = (float(first[0] - every), *again)
        return WarmModel(1.0, every, Decay(**settings), starts), again
    return Model(-math.log(said) / every, every), again


def _of_snapshots(snapshots: Sequence[Snapshot]) -> Iterator[Audit]:
    """From the samples of the weights and of each average that headers hold."""
    last = snapshots[-1]
    shapes = {name: last.header.tensors[name].shape for name in last.info.averages}
    names = [name for name, _ in places(shapes)]
    cuts = np.array_split(np.arange(len(names)), min(PIECES, len(names)))
    for width in sorted({one.info.sigma_rel for one in snapshots}):
        samples = []
        for one in snapshots:
            if one.info.sigma_rel == width and one.info.sample:
                weights, average = (values.astype(np.float64) for values in decode_sample(one.info.sample))
                if len(weights) == len(names):
                    parts = [[values[cut] for cut in cuts] for values in (weights, average)]
                    samples.append(Sample(one.info.t, parts[0], parts[1], np.zeros(len(cuts))))
        model = PowerModel(gamma_from_sigma_rel(width) + 1)
        yield from _audited(samples, f"sigma_rel {width:g}", [names[cut[0]] for cut in cuts], model)


def _audited(
    samples: Iterable[Sample], name: str, tensors: Sequence[str], model: Model, low: bool = False,
    starts: tuple[float, ...] = (), unit: str = "steps",
) -> Iterator[Audit]:  # fmt: skip
    """The audit of an average by its samples, of which only a part is kept; none of a single one."""
    products: list[Products] = []
    some: list[Sample] = []
    last = None
    for sample in samples:
        low = low and all(is_low(values) for values in sample.average[:8])
        products += [products_of(last, sample)] if last else []
        some.append(sample.thinned())
        last = sample
    if last and products:
        made = _judge(_Case(name, products, series_of(some), tensors, model, low, starts, unit))
        yield replace(made, elements=sum(map(len, last.average)))
