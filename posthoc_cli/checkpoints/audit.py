"""Is an average what it claims to be? From checkpoints that hold it and the weights; NumPy on a sample, float64.

`audit_decay` and `audit_together` find the decay that explains how the average moved, `audit_case` the warm-up, and
where it began. What is wrong shows in the same sums of products: nothing moves, the average is equal to the weights,
the decay is above 1, or it is the weights that follow the average. Where the average began again from the weights it
remembers nothing of before, and how far it is on the way between two checkpoints says when.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from posthoc_cli.checkpoints.audit_case import (
    PIECES,
    SHORTEST,
    Case,
    Sample,
    explained,
    is_low,
    is_swapped,
    pieces_of,
    products_of,
    read_sample,
    series_of,
)
from posthoc_cli.checkpoints.audit_decay import (
    Fit,
    Model,
    PowerModel,
    Products,
    WarmModel,
    unexplained,
)
from posthoc_cli.checkpoints.audit_together import refined
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import Point, gamma_from_sigma_rel
from posthoc_cli.profiles.other_libraries import Decay, OrdinaryEMA
from posthoc_cli.snapshots.format import decode_sample
from posthoc_cli.snapshots.path import places
from posthoc_cli.snapshots.sources import FileSource, Snapshot, Source

_SLACK = 1.1
"""A length that differs by less from a claimed one is as claimed."""

_FOREIGN = 0.8
"""With more of its motion left unexplained, an average is of other weights."""

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


def judge(case: Case) -> Audit:
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
    fit, starts = explained(case)
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
    case: Case, fit: Fit, value: float, uncertainty: float, starts: Mapping[int, float], intervals: Sequence[Interval]
) -> Iterator[dict[str, Any]]:
    """What contradicts an average of any length, the first thing first."""
    spacing = min(case.rows[i].length for i in case.usable)
    if is_swapped(fit):
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


def _compared(told: Audit, case: Case, fit: Fit, value: float) -> Audit:
    """The verdict on a length."""
    model, sigma, unit = fit.model, told.uncertainty or 0.0, case.unit
    length, spacing = model.length(value), min(case.rows[i].length for i in case.usable)
    own = None if model.value is None else model.length(model.value)
    if model.what == "decay" and max(length, own or 0.0) < SHORTEST * spacing:
        closer = f"closer than {max(1, (own or length) / SHORTEST):,.0f} {unit}"
        text = f"its time constant is below {SHORTEST * spacing:,.3g} {unit}, shorter than these checkpoints can tell"
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
        if len(averages) < 2:
            continue
        first = averages[0]
        pieces = pieces_of({name: math.prod(first.stored[name].shape) for name in first.info.averages})
        samples: list[Sample] = []
        products, some, low = [], [], True
        for average in averages:
            samples = [*samples[-1:], read_sample(weights[average.info.t], average, pieces)]
            low &= all(is_low(values) for values in samples[-1].average[:8])
            products += [products_of(*samples)] if len(samples) > 1 else []
            some.append(samples[-1].thinned())
        model, starts = _claim(averages, width, claimed, every)
        named = f"sigma_rel {width:g}" if width else ""
        names = [name for name, *_ in pieces]
        made = judge(Case(named, products, series_of(some), names, model, low, starts, first.info.t_unit))
        yield replace(made, elements=sum(end - begin for _, begin, end in pieces))


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
            if one.info.sigma_rel != width or not one.info.sample:
                continue
            weights, average = (values.astype(np.float64) for values in decode_sample(one.info.sample))
            if len(weights) == len(names):
                parts = [[values[cut] for cut in cuts] for values in (weights, average)]
                samples.append(Sample(one.info.t, parts[0], parts[1], np.zeros(len(cuts))))
        products = [products_of(a, b) for a, b in pairwise(samples)]
        if products:
            own = [names[cut[0]] for cut in cuts]
            model = PowerModel(gamma_from_sigma_rel(width) + 1)
            made = judge(Case(f"sigma_rel {width:g}", products, series_of(samples), own, model))
            yield replace(made, elements=len(names))
