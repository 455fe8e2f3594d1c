"""One average at all its checkpoints: a sample of it, which model of its decay explains it, and where it began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from posthoc_cli.checkpoints.audit_decay import Fit, Model, Products, WarmModel, least, passed_since, rests
from posthoc_cli.checkpoints.audit_together import Series, misfit
from posthoc_cli.errors import NonFiniteError
from posthoc_cli.profiles import FloatArray
from posthoc_cli.profiles.other_libraries import RAMP_UP, Decay
from posthoc_cli.snapshots.sources import FileSource, expected_rounding, read_values

MOST_ELEMENTS, _TOGETHER = 1_000_000, 30_000
"""Of the sample; and of all checkpoints together."""

PIECES = 32
"""Parts of tensors that are read, at least, as far as there are elements."""

SHORTEST = 0.1
"""Shorter than this share of the time between two checkpoints, a length cannot be told."""

_ALL, _MANY = 0.999, 0.5
"""Shares of elements that are equal."""

_CLEARLY = 0.5
"""An explanation that leaves less than this share of what another one leaves is the better one."""

_WARMER = 2.0
"""By so much, in e-foldings of what is left summed over the intervals, a warm-up must explain them better."""


@dataclass
class Sample:
    """Elements of the weights and of the average at a time: by piece, [elements] each; variance of their rounding."""

    t: float
    weights: list[FloatArray]
    average: list[FloatArray]
    rounding: FloatArray

    def thinned(self) -> Sample:
        """At most some `_TOGETHER` elements of it."""
        every = -(-sum(values.size for values in self.weights) // _TOGETHER)
        sizes = [len(values) / len(values[::every]) for values in self.weights]
        weights, average = ([values[::every] for values in own] for own in (self.weights, self.average))
        return Sample(self.t, weights, average, self.rounding / sizes)


def pieces_of(sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Parts of tensors to read: name, begin and end; all of small tensors, and as much of each larger one."""
    names = sorted(name for name in sizes if sizes[name])
    quota, left = MOST_ELEMENTS, MOST_ELEMENTS
    for rest, size in zip(range(len(names), 0, -1), sorted(sizes[name] for name in names), strict=True):
        quota = left // rest
        if size > quota:
            break
        left -= size
    parts = -(-PIECES // max(1, len(names)))
    found = []
    for name in names:
        each = max(1, min(sizes[name], max(quota, 1)) // parts)
        starts = np.unique(np.linspace(0, sizes[name] - each, min(parts, sizes[name])).astype(np.int64))
        found += [(name, int(start), int(start) + each) for start in starts]
    return found


def read_sample(weights: FileSource, average: FileSource, pieces: Sequence[tuple[str, int, int]]) -> Sample:
    """The pieces of the weights and of the average at one time."""
    values: list[list[FloatArray]] = [[], []]
    rounding = []
    for source, own in zip((weights, average), values, strict=True):
        with source.open() as file:
            for name, begin, end in pieces:
                own.append(read_values(file, name, begin, end))
                if not np.isfinite(own[-1]).all():
                    raise NonFiniteError(source.path, f"tensor {name!r}: holds nan or infinity")
                if source is average:
                    dtypes = source.stored[name].dtype, "F32"
                    rounding.append(expected_rounding(own[-1], *dtypes))
    return Sample(average.info.t, values[0], values[1], np.array(rounding))


def products_of(a: Sample, b: Sample) -> Products:
    """What happened between two checkpoints."""
    grams, same, copied = [], [], []
    for x, e, later_x, later_e in zip(a.weights, a.average, b.weights, b.average, strict=True):
        rows = np.array([later_e - x, e - x, later_x - x])
        grams.append(rows @ rows.T)
        same.append(np.mean(later_e == e))
        copied.append((np.mean(e == x), np.mean(later_e == later_x)))
    rounding = np.array([b.rounding, a.rounding])
    gram = np.array(grams)
    gram[:, 0, 0] = np.maximum(gram[:, 0, 0] - rounding[0], 0)
    gram[:, 1, 1] = np.maximum(gram[:, 1, 1] - rounding[1], 0)
    return Products(a.t, b.t, gram, rounding.sum(axis=0), np.array(same), np.array(copied).T)


def series_of(samples: Sequence[Sample]) -> Series:
    """All checkpoints together."""
    values = [
        np.array([*(one.weights[piece] for one in samples), *(one.average[piece] for one in samples)], np.float32)
        for piece in range(len(samples[0].weights))
    ]
    sizes = np.array([one.shape[1] for one in values])
    rounding = np.array([one.rounding / sizes for one in samples])
    return Series(np.array([one.t for one in samples]), values, np.vstack([0 * rounding, rounding]).T)


def is_low(values: FloatArray) -> bool:
    """Whether all values are as bfloat16 or float16 has them."""
    single = values.astype(np.float32)
    with np.errstate(over="ignore"):
        is_half = bool((single.astype(np.float16).astype(np.float32) == single).all())
    return is_half or not (single.view(np.uint32) & 0xFFFF).any()


# --- the average


@dataclass
class Case:
    """An average to be judged.

    Attributes:
        name: of the average, if the run has several.
        products: of one interval after the other.
        series: some elements at all times.
        tensors: the name of each piece's.
        model: what it may be, or is claimed to be.
        low: whether the average is stored, or seems to be kept, in 16 bits.
        starts: times at which it is said to have begun again.
        unit: of time.
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
        self.moved, self.used = moved, moved.any(axis=0)
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


def explained(case: Case) -> tuple[Fit, dict[int, float]]:
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


def _best(case: Case, starts: tuple[float, ...]) -> Fit:
    """The fit of what is claimed; else of a constant decay, or of a warm-up that explains the intervals better."""
    fit, every = case.fit(case.model), case.model.every
    if case.model.what == "decay" and case.model.value is None:
        begun = (0.0, *sorted({*starts, *case.starts}))
        warm = min((case.fit(WarmModel(None, every, rule, begun)) for rule in _RULES), key=lambda one: one.misfit)
        if warm.misfit + _WARMER < fit.misfit and _is_likelier(case, warm, fit):
            return warm
    return fit


def _is_likelier(case: Case, warm: Fit, constant: Fit) -> bool:
    """Whether a warm-up also explains all checkpoints together better: a path that turns back looks like one."""
    one, other = (misfit(fit, case.series, case.kept, *case.stretch) for fit in (warm, constant))
    return one < other


def _restarts(case: Case, fit: Fit) -> dict[int, float]:
    """Intervals in which the average began again from the weights, and the times."""
    found: dict[int, float] = {}
    if fit.model.what != "decay" or len(fit.products) < 3:
        return found
    kept, left = fit.factors(fit.value).kept, fit.rests(fit.value)
    for place, one in enumerate(fit.products):
        index = next(i for i, row in enumerate(case.rows) if row is one)
        if kept[place] < SHORTEST or index in case.notes:
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


def is_swapped(fit: Fit) -> bool:
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
