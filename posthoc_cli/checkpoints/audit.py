"""Which decay an average really has, from checkpoints that hold it and the weights; NumPy on a sample, float64.

Between two checkpoints, with the weights x and the average e at both, let d = e - x and v = x' - x of the first and of
what they become, and y = e' - x. With the raw weights in between expected on the line,

    y = B d + s v + the rest,

where B is the mass that e' has of before, and s = integral of its tail over the interval, relative to its length. For a
decay b and n updates B = b**n, and s = 1 - b (1 - B) / (n (1 - b)); for a power function it follows from its exponent.
The sums of products of y, d and v over the elements of a tensor (Gram matrices) hold all that is needed: the best decay
is where the rest is least, weighted by each tensor's own. A sign that is flipped is a negative rate, B > 1. Rounding of
stored averages adds a known variance to d and y, which is subtracted.

What an update does wrong shows in the free regression y = alpha d + beta v: nothing moves (1, 0), it is a copy of the
weights (e = x), it began again at the fraction f of the interval (alpha = 0, and beta follows from f).

The uncertainty is a jackknife over tensors and one over intervals. On trainings that are recorded at each step the true
decay was within three of these, with `_CURVED` for the way between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import FloatArray, Point, gamma_from_sigma_rel, sigma_rel_from_gamma
from posthoc_cli.profiles.other_libraries import Decay, OrdinaryEMA
from posthoc_cli.snapshots.format import decode_sample
from posthoc_cli.snapshots.measurements import expected_rounding, read_values
from posthoc_cli.snapshots.path import places
from posthoc_cli.snapshots.sources import FileSource, Snapshot, Source

MOST_ELEMENTS = 1_000_000
_PIECES = 32
"""Of which a jackknife is made, at least, as far as there are elements."""

_SLACK, _CURVED = 1.1, 0.04
"""A length that differs by less from a claimed one is as claimed; and its relative error in times of interval / length,
since the weights do not move on a line: 0.2 % at 20 intervals, 2 % at 2, 20 % at a fifth of one."""

_SHORTEST = 0.1
"""Shorter than this share of the time between two checkpoints, a length cannot be told."""

_ALL, _MANY = 0.999, 0.5
"""Shares of elements that are equal."""

_CLEARLY = 0.5
"""An explanation that leaves less than this share of what another one leaves is the better one."""

BAD = ("too long", "too short", "does not move", "stalls", "is the weights", "began again", "moves away", "swapped",
       "some tensors", "was not updated")  # fmt: skip
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
        found, uncertainty: of all intervals; None where nothing can be told. The latter is relative, of the length.
        claimed: None without.
        ratio: found length / claimed length.
        tensors: names of those that the verdict is about; empty for all.
        intervals: one after the other.
        elements: of the sample.
    """

    name: str
    verdict: str
    text: str
    what: str = "decay"
    found: float | None = None
    uncertainty: float | None = None
    claimed: float | None = None
    ratio: float | None = None
    tensors: tuple[str, ...] = ()
    intervals: tuple[Interval, ...] = ()
    elements: int = 0

    @property
    def is_bad(self) -> bool:
        """Whether the average is not what it claims to be."""
        return self.verdict in BAD

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"contradicted": self.is_bad}


# --- samples


@dataclass
class _Sample:
    """Elements of the weights and of the average at a time: by piece, [elements] each; variance of their rounding."""

    t: float
    weights: list[FloatArray]
    average: list[FloatArray]
    rounding: FloatArray


@dataclass
class Products:
    """Of the pieces in one interval: Gram matrices of y, d, v, [pieces, 3, 3], and shares of equal elements, [pieces].

    Attributes:
        begin, end: times.
        gram: without the expected part of the rounding.
        rounding: that part of y and d, [pieces].
        same: elements of the average that are equal at both times; copied: equal to the weights at the end.
    """

    begin: float
    end: float
    gram: FloatArray
    rounding: FloatArray
    same: FloatArray
    copied: FloatArray

    @property
    def length(self) -> float:
        """Time between the checkpoints."""
        return self.end - self.begin


def _pieces(sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Parts of tensors to read: name, begin and end; all of small tensors, and as much of each larger one."""
    names = sorted(name for name in sizes if sizes[name])
    quota, left = MOST_ELEMENTS, MOST_ELEMENTS
    for rest, size in zip(range(len(names), 0, -1), sorted(sizes[name] for name in names), strict=True):
        quota = left // rest
        if size > quota:
            break
        left -= size
    parts = -(-_PIECES // max(1, len(names)))
    found = []
    for name in names:
        each = max(1, min(sizes[name], max(quota, 1)) // parts)
        starts = np.unique(np.linspace(0, sizes[name] - each, min(parts, sizes[name])).astype(np.int64))
        found += [(name, int(start), int(start) + each) for start in starts]
    return found


def _read(weights: FileSource, average: FileSource, pieces: Sequence[tuple[str, int, int]]) -> _Sample:
    values: list[list[FloatArray]] = [[], []]
    rounding = []
    for source, own in zip((weights, average), values, strict=True):
        with source.open() as file:
            for name, begin, end in pieces:
                own.append(read_values(file, name, begin, end))
                if source is average:
                    dtypes = source.stored[name].dtype, "F32"
                    rounding.append(expected_rounding(own[-1], *dtypes))
    return _Sample(average.info.t, values[0], values[1], np.array(rounding))


def _products(a: _Sample, b: _Sample) -> Products:
    grams, same, copied = [], [], []
    for x, e, later_x, later_e in zip(a.weights, a.average, b.weights, b.average, strict=True):
        rows = np.array([later_e - x, e - x, later_x - x])
        grams.append(rows @ rows.T)
        same.append(np.mean(later_e == e))
        copied.append(np.mean(later_e == later_x))
    rounding = np.array([b.rounding, a.rounding])
    gram = np.array(grams)
    gram[:, 0, 0] = np.maximum(gram[:, 0, 0] - rounding[0], 0)
    gram[:, 1, 1] = np.maximum(gram[:, 1, 1] - rounding[1], 0)
    return Products(a.t, b.t, gram, rounding.sum(axis=0), np.array(same), np.array(copied))


# --- fits

Factors = Callable[[float, float, float], tuple[float, float]]
"""B and s of an interval, from what is fitted and from the times of its begin and end."""


def decay_factors(every: int) -> Factors:
    """Of an ordinary EMA with an update every so many steps; fitted is the rate -log(decay) / every, also below 0."""

    def factors(rate: float, begin: float, end: float) -> tuple[float, float]:
        count = max(1.0, (end - begin) / every)
        x = max(rate * every, -30.0 / count)
        kept = math.exp(-x * count)
        if abs(x * count) < 1e-8:
            return kept, x * (count + 1) / 2
        return kept, 1 + math.expm1(-x * count) * math.exp(-x) / (count * -math.expm1(-x))

    return factors


def power_factors(x: float, begin: float, end: float) -> tuple[float, float]:
    """Of a power function; fitted is gamma + 1."""
    x = max(x, -0.999)
    ratio = begin / end
    return ratio**x, 1 - end / (end - begin) * (1 - ratio ** (x + 1)) / (x + 1)


def _rest(gram: FloatArray, kept: float, s: float) -> FloatArray:
    """Squared length of y - B d - s v by piece."""
    row = np.array([1.0, -kept, -s])
    return np.asarray(np.einsum("i,pij,j->p", row, gram, row))


def _least(cost: Callable[[float], float], grid: FloatArray) -> float:
    """Where a function of one value is least: on a grid, then between its neighbours by golden sections."""
    costs = [cost(float(value)) for value in grid]
    best = int(np.argmin(costs))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if cost(a) < cost(b) else (a, high)
    return (low + high) / 2


@dataclass
class _Fit:
    """The best value for some intervals, and the weights of their pieces, [intervals, pieces]."""

    factors: Factors
    products: Sequence[Products]
    grid: FloatArray
    weights: FloatArray = field(init=False)
    value: float = field(init=False)

    def __post_init__(self) -> None:
        self.weights = np.array(
            [1 / np.maximum(one.gram[:, 0, 0] + one.gram[:, 2, 2], 1e-300) for one in self.products]
        )
        for _ in range(3):
            self.value = self.best()
            for row, one in zip(self.weights, self.products, strict=True):
                rest = np.maximum(_rest(one.gram, *self.factors(self.value, one.begin, one.end)), 0) + one.rounding
                row[:] = 1 / np.maximum(rest, 1e-4 * one.gram[:, 2, 2] + 1e-300)
        self.value = self.best()

    def cost(self, value: float, rows: Sequence[int] | None = None, drop: npt.NDArray[np.bool_] | None = None) -> float:
        total = 0.0
        for index in range(len(self.products)) if rows is None else rows:
            one = self.products[index]
            rest = _rest(one.gram, *self.factors(value, one.begin, one.end)) * self.weights[index]
            total += float(rest.sum() if drop is None else rest[~drop].sum())
        return total

    def best(self, rows: Sequence[int] | None = None, drop: npt.NDArray[np.bool_] | None = None) -> float:
        return _least(lambda value: self.cost(value, rows, drop), self.grid)

    def uncertainty(self) -> float:
        """Of the logarithm of the value, by leaving out pieces, and intervals."""
        pieces, count = self.weights.shape[1], len(self.products)
        groups = np.arange(pieces) % min(8, pieces)
        left_out = [[self.best(drop=groups == g) for g in range(groups.max() + 1)]] if pieces > 1 else []
        if count > 1:
            blocks = np.arange(count) % min(8, count)
            left_out.append([self.best(np.flatnonzero(blocks != k).tolist()) for k in range(blocks.max() + 1)])
        total = 0.0
        for values in left_out:
            logs = np.log(np.maximum(np.abs(values), 1e-300))
            total += (len(values) - 1) / len(values) * float(((logs - logs.mean()) ** 2).sum())
        return math.sqrt(total)


def warmed_factors(decay: Decay, every: int, first: int) -> Factors:
    """Of an ordinary EMA with a warm-up; fitted is by how much its time constants are shorter than these."""

    def factors(scale: float, begin: float, end: float) -> tuple[float, float]:
        from_, to = (max(0, int((t - first) // every) + 1) for t in (begin, end))
        logs = decay.kept_logs(to)[from_:]
        kept = np.exp(np.minimum(scale * (logs[-1] - logs), 30.0))
        return float(kept[0]), float(1 - kept[:-1].mean()) if to > from_ else 0.0

    return factors


# --- verdicts


@dataclass(frozen=True)
class Claim:
    """What an average is said to be: `length` of a time constant, or a sigma_rel; None if nothing is said.

    Attributes:
        what: "decay" or "sigma_rel".
        factors: what is fitted, and `value`, what that is if the claim is true; None if nothing is claimed.
        every: steps between updates.
    """

    what: str
    factors: Factors
    value: float | None
    every: int = 1
    shown: float | None = None

    def length(self, value: float) -> float:
        """The length that a fitted value stands for: a time constant, or a sigma_rel."""
        if self.what == "sigma_rel":
            return sigma_rel_from_gamma(value - 1) if value > 1 else 12**-0.5
        rate = value if self.shown is None or self.value != 1.0 else -math.log(self.shown) / self.every * value
        return math.inf if rate == 0 else self.every / -math.expm1(-rate * self.every)

    def told(self, value: float) -> float:
        """The decay, or sigma_rel, of a fitted value."""
        length = self.length(value)
        return length if self.what == "sigma_rel" else 1 - self.every / length


def _grid(claim: Claim, products: Sequence[Products]) -> FloatArray:
    """Values that are tried first: lengths from a hundredth of the least interval to a hundred times the run."""
    if claim.what == "sigma_rel":
        return np.geomspace(1.0, 2000.0, 60)
    unit = 1.0 if claim.value is None or claim.value != 1.0 else claim.length(1.0)
    shortest = min(one.length for one in products) / 100
    span = products[-1].end - products[0].begin
    rates = np.geomspace(0.01 / span, 1 / max(shortest, claim.every / 20), 60)
    return np.concatenate((-rates[::-1], [0.0], rates)) * unit


def judge(name: str, products: Sequence[Products], tensors: Sequence[str], claim: Claim, low: bool = False) -> Audit:
    """The verdict on an average from its intervals.

    Arguments:
        products: of one interval after the other.
        tensors: the name of each piece's.
        claim: what is fitted, and claimed.
        low: whether the average is stored, or seems to be kept, in 16 bits.
    """
    moved = np.array([one.gram[:, 2, 2] > 0 for one in products])
    claimed = None if claim.value is None else claim.told(claim.value)
    base = Audit(name, "", "", claim.what, claimed=claimed)
    used = moved.any(axis=0)
    if not used.any():
        return replace(base, verdict="cannot be told", text="the weights stand still between these checkpoints")
    same = np.array([one.same for one in products])
    copied = np.array([one.copied for one in products])
    names = np.array(tensors)
    still = ((same >= _ALL) | ~moved).all(axis=0) & used
    equal = ((copied >= _ALL) | ~moved).all(axis=0) & used
    for mask, verdict, meaning in (
        (still, "does not move", "the average does not move while the weights do: is its update called, and on the "
         "same tensors that are saved (names after torch.compile, shards of ZeRO-3)?"),
        (equal, "is the weights", "the average is equal to the weights: it is copied, or its decay is 0"),
    ):  # fmt: skip
        if mask[used].all():
            return replace(base, verdict=verdict, text=meaning)
    lost = tuple(dict.fromkeys(names[still | equal].tolist()))
    idle = [index for index in range(len(products)) if (same[index][moved[index]] >= _ALL).all() and moved[index].any()]
    notes = dict.fromkeys(idle, "was not updated")
    kept = used & ~(still | equal)
    rows = [_only(one, kept) for one in products]
    usable = [index for index in range(len(rows)) if index not in notes and rows[index].gram[:, 2, 2].any()]
    if not usable:
        return replace(base, verdict="cannot be told", text="no interval tells of it")
    fit = _Fit(claim.factors, [rows[i] for i in usable], _grid(claim, products))
    again = _restarts(fit, usable, claim)
    if again:
        notes |= {index: f"began again near {step:,.0f}" for index, step in again.items()}
        usable = [index for index in usable if index not in again] or usable
        fit = _Fit(claim.factors, [rows[i] for i in usable], fit.grid)
    uncertainty, value = fit.uncertainty(), fit.value
    if claim.what == "decay":
        curved = _CURVED * float(np.median([rows[i].length for i in usable])) / max(claim.length(value), claim.every)
        uncertainty = math.hypot(uncertainty, curved)
    intervals = tuple(_interval(rows[i], claim, fit, notes.get(i, "")) for i in range(len(rows)))
    told = replace(base, intervals=intervals, found=claim.told(value), uncertainty=uncertainty)
    if _is_swapped(fit, claim):
        text = "the weights are an average of the average: the two are stored under each other's names"
        return replace(told, verdict="swapped", text=text, found=None)
    spacing = min(rows[i].length for i in usable)
    if claim.what == "decay" and value * spacing < -0.05 and abs(value) * spacing > 3 * uncertainty * abs(value):
        text = "the average moves away from the weights: the sign of its update is wrong (it adds e - x, not x - e)"
        return replace(told, verdict="moves away", text=text)
    if idle:
        spans = _spans([(products[i].begin, products[i].end) for i in idle])
        text = f"was not updated from {spans}; elsewhere it was"
        return replace(told, verdict="was not updated", text=text)
    if again:
        steps = " and ".join(f"{step:,.0f}" for step in again.values())
        text = f"began again from the weights near step {steps}: the average was lost, or reset, at a resume"
        return replace(told, verdict="began again", text=text)
    if low and still.any():
        text = f"{len(lost)} of {len(set(tensors))} tensors stand still, as in an average kept in 16 bits: {_SINGLE}"
        return replace(told, verdict="stalls", text=text, tensors=lost)
    if lost:
        how = "are not followed" if still.any() else "are copied"
        text = f"{len(lost)} of {len(set(tensors))} tensors {how}, while the others are averaged: {_names(lost)}"
        return replace(told, verdict="some tensors", text=text, tensors=lost)
    return _compared(told, claim, value, spacing, low and float(same[:, kept].mean()) > _MANY)


def _compared(told: Audit, claim: Claim, value: float, spacing: float, stalled: bool) -> Audit:
    """The verdict on a length."""
    length, sigma = claim.length(value), told.uncertainty or 0.0
    own = None if claim.value is None else claim.length(claim.value)
    short = claim.what == "decay" and length < _SHORTEST * spacing
    if short and (own is None or own < 2 * _SHORTEST * spacing):
        reach = f"{_SHORTEST * spacing:,.3g}"
        closer = f"closer than {max(1, (own or length) / _SHORTEST):,.0f} steps"
        text = f"its time constant is below {reach} steps, shorter than these checkpoints can tell; {closer} they could"
        return replace(told, verdict="cannot be told", text=text, found=None)
    if sigma > 1:
        return replace(told, verdict="cannot be told", text="the checkpoints tell nothing about its length", found=None)
    shown = f"{claim.what} {told.found:.7g}, a time constant of {length:,.4g} steps (± {sigma:.1%})"
    if claim.what == "sigma_rel":
        shown = f"sigma_rel {told.found:.4g} (± {sigma:.1%})"
    if own is None:
        return replace(told, verdict="found", text=shown)
    ratio = length / own
    told = replace(told, ratio=ratio)
    if abs(math.log(ratio)) <= max(math.log(_SLACK), 3 * sigma):
        return replace(told, verdict="as claimed", text=f"{shown}, as claimed")
    times = f"{max(ratio, 1 / ratio):.3g} times too {'long' if ratio > 1 else 'short'}: {shown}, not {told.claimed:.7g}"
    if stalled:
        text = f"{times}; most of its elements stand still, as in an average kept in 16 bits: {_SINGLE}"
        return replace(told, verdict="stalls", text=text)
    if ratio > 1:
        usual = "updated at every k-th step only, or of steps that are counted twice"
        return replace(told, verdict="too long", text=f"{times}; as if {usual} (k = {ratio:.3g})")
    usual = "once a microbatch, or by each of so many processes"
    return replace(told, verdict="too short", text=f"{times}; as if updated {1 / ratio:.3g} times a step: {usual}")


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


_SINGLE = "keep it in float32"


def _only(one: Products, kept: npt.NDArray[np.bool_]) -> Products:
    held = (one.gram[kept], one.rounding[kept], one.same[kept], one.copied[kept])
    return Products(one.begin, one.end, *held)


def _interval(one: Products, claim: Claim, fit: _Fit, note: str) -> Interval:
    alone = _Fit(claim.factors, [one], fit.grid) if one.gram[:, 2, 2].any() else None
    found = math.nan if alone is None else claim.length(alone.value)
    rest = _rest(one.gram, *claim.factors(fit.value, one.begin, one.end)).sum()
    moved = one.gram[:, 0, 0] + one.gram[:, 1, 1] - 2 * one.gram[:, 0, 1]
    unexplained = math.sqrt(max(float(rest), 0.0) / max(float(moved.sum()), 1e-300))
    own = None if claim.value is None else claim.length(claim.value)
    return Interval(one.begin, one.end, found, own, unexplained, note)


def _restarts(fit: _Fit, usable: Sequence[int], claim: Claim) -> dict[int, float]:
    """Intervals in which the average began again from the weights, and the times."""
    found: dict[int, float] = {}
    if claim.what != "decay" or len(usable) < 3:
        return found
    alone = [_Fit(claim.factors, [one], fit.grid).value for one in fit.products]
    value = float(np.median(alone))
    kept = np.array([claim.factors(value, one.begin, one.end)[0] for one in fit.products])
    if kept.max() < 0.1:
        return found
    off = np.log(np.maximum(alone, 1e-300) / value) if value > 0 else np.zeros(len(alone))
    usual = float(np.median(np.abs(off)))
    for place, (index, one) in enumerate(zip(usable, fit.products, strict=True)):
        if off[place] < max(0.4, 8 * usual) or all(off[: place + 1] > 0.2):  # the latter is a warm-up
            continue
        fractions = np.linspace(0, 0.98, 50)
        passed = [f + (1 - f) * claim.factors(value, one.end - (1 - f) * one.length, one.end)[1] for f in fractions]
        rests = [float(_rest(one.gram, 0.0, s) @ fit.weights[place]) for s in passed]
        found[index] = one.begin + float(fractions[int(np.argmin(rests))]) * one.length
    return found


def _is_swapped(fit: _Fit, claim: Claim) -> bool:
    """Whether the weights follow the average much better than the other way round."""
    turn = np.array([[0.0, -1.0, 1.0], [0.0, -1.0, 0.0], [1.0, -1.0, 0.0]])
    other = [replace(one, gram=turn @ one.gram @ turn.T) for one in fit.products]
    smoother = [one.gram[:, 2, 2].sum() < before.gram[:, 2, 2].sum()
                for one, before in zip(other, fit.products, strict=True)]  # fmt: skip
    if np.mean(smoother) > 0.5:
        return False
    turned = _Fit(claim.factors, other, fit.grid)

    def left(one: _Fit) -> float:
        rests = [_rest(p.gram, *claim.factors(one.value, p.begin, p.end)).sum() for p in one.products]
        return float(
            np.median([r / max(p.gram[:, 0, 0].sum(), 1e-300) for r, p in zip(rests, one.products, strict=True)])
        )

    return turned.value > 0 and left(turned) < _CLEARLY**2 * left(fit)


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
    if claimed is not None:
        Decay(claimed)
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
        sizes = {name: math.prod(first.stored[name].shape) for name in first.info.averages}
        pieces = _pieces(sizes)
        products, low = [], True
        before = _read(weights[first.info.t], first, pieces)
        for average in averages[1:]:
            now = _read(weights[average.info.t], average, pieces)
            products.append(_products(before, now))
            low &= all(_is_low(values) for values in now.average[:8])
            before = now
        claim = _claim(averages[-1], width, claimed, every)
        made = judge(f"sigma_rel {width:g}" if width else "", products, [name for name, *_ in pieces], claim, low)
        yield replace(made, elements=sum(end - begin for _, begin, end in pieces))


def _is_low(values: FloatArray) -> bool:
    """Whether all values are as bfloat16 or float16 has them."""
    single = values.astype(np.float32)
    with np.errstate(over="ignore"):
        is_half = bool((single.astype(np.float16).astype(np.float32) == single).all())
    return is_half or not (single.view(np.uint32) & 0xFFFF).any()


def _claim(average: FileSource, width: float, claimed: float | None, every: int) -> Claim:
    profile: Any = average.profile
    if width:
        return Claim("sigma_rel", power_factors, gamma_from_sigma_rel(width) + 1)
    settings = dict(profile.settings) if isinstance(profile, OrdinaryEMA) else {}
    said: float | None = getattr(average.info, "decay", 0.0) or None
    if claimed is not None:
        settings["decay"] = said = claimed
    every = settings.pop("every", every)
    first = settings.pop("first", every)
    settings.pop("updates", None)
    if said is not None and (settings.get("warm_up") or settings.get("copies", 0) > 1):
        return Claim("decay", warmed_factors(Decay(**settings), every, first), 1.0, every, said)
    return Claim("decay", decay_factors(every), None if said is None else -math.log(said) / every, every)


def _of_snapshots(snapshots: Sequence[Snapshot]) -> Iterator[Audit]:
    """From the samples of the weights and of each average that headers hold."""
    last = snapshots[-1]
    shapes = {name: last.header.tensors[name].shape for name in last.info.averages}
    names = [name for name, _ in places(shapes)]
    cuts = np.array_split(np.arange(len(names)), min(_PIECES, len(names)))
    for width in sorted({one.info.sigma_rel for one in snapshots}):
        samples = []
        for one in snapshots:
            if one.info.sigma_rel != width or not one.info.sample:
                continue
            weights, average = (values.astype(np.float64) for values in decode_sample(one.info.sample))
            if len(weights) == len(names):
                parts = [[values[cut] for cut in cuts] for values in (weights, average)]
                samples.append(_Sample(one.info.t, parts[0], parts[1], np.zeros(len(cuts))))
        products = [_products(a, b) for a, b in pairwise(samples)]
        if products:
            claim = Claim("sigma_rel", power_factors, gamma_from_sigma_rel(width) + 1)
            made = judge(f"sigma_rel {width:g}", products, [names[cut[0]] for cut in cuts], claim)
            yield replace(made, elements=len(names))
