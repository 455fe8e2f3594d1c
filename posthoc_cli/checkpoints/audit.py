"""Check that an average is what it claims to be, from checkpoints of it and of the weights; NumPy
float64 on a sample.

`audit_decay` finds the decay that explains how the average moved. This module finds the warm-up and
the restarts, and recognises faults: the average, or some of its tensors, do not move or equal the
weights. An average that restarted from the weights remembers nothing from before the restart; how
far it has moved between two checkpoints gives its time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.checkpoints.audit_decay import (
    Intervals,
    Model,
    Series,
    are_the_same,
    best_models,
    explains_more,
    is_likelier,
    possible_rules,
    refine,
)
from posthoc_cli.checkpoints.content import names_in
from posthoc_cli.checkpoints.lost_updates import MOST_LOST, digits_of, lost_share
from posthoc_cli.checkpoints.settings import UNSPECIFIED, ImportSettings, warm_up_text
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    check_number,
    percent,
)
from posthoc_cli.profiles import (
    POWER_FUNCTION,
    RULES,
    UNLIMITED,
    DecayRule,
    FloatArray,
    OrdinaryEMA,
    Point,
    gamma_from_sigma_rel,
)
from posthoc_cli.snapshots.sources import (
    ElementRange,
    Source,
    expected_roundings,
    finite_values,
)

Bools = npt.NDArray[np.bool_]
Verdict = tuple[str, str]
"""A word of `BAD` or another one, and its text."""

_MOST_ELEMENTS = 100_000  # in the sample
# In a piece, if its tensor has so many: the inverse of what a piece leaves unexplained is its
# weight, and what one element leaves may be 0 by chance.
_LEAST_ELEMENTS = 64
_PIECES = 32  # least pieces of tensors, if the sample has enough elements
# largest factor between the found and the claimed length of an average that is as claimed
_SLACK = 1.1
_FAR = 3.0  # factor in length that no noise explains
_FOREIGN = 0.8  # largest unexplained share of the motion of an average that belongs to the weights
# smallest length that can be determined, as a share of the time between two checkpoints
_SHORTEST = 0.1
_ALL = 0.999  # share of equal elements that counts as all elements
# an explanation is clearly better if its residuals are below this share of another one's
_CLEARLY = 0.5
_RISES = 1e-9  # a decay that its warm-up has not reached is at least so far below it
_CHANGED = 1.5  # least factor between lengths before and after a change of the decay
_JUMP = 1.0  # unexplained share of motion that does not follow from the checkpoint before: all
_VAGUE = 0.25  # above this uncertainty, or difference within it, a length is undetermined

_STILL = "was not updated"
_DIGITS = 2  # by which weights move an average that cannot stand still but by chance
DOES_NOT_MOVE = "does not move"
LOSES_UPDATES = "loses updates"
SET_BACK = "set back"
ONCE = "updated once a file"
SOME_TENSORS = "some tensors"
_OTHER_WEIGHTS = (
    "the weights at these checkpoints do not explain how the average moves between them: they "
    "forget faster than checkpoints are apart, or are of another run"
)
BAD = (
    "too long",
    "too short",
    DOES_NOT_MOVE,
    "equals the weights",
    "began again",
    SOME_TENSORS,
    "another rule",
    SET_BACK,
    LOSES_UPDATES,
    ONCE,
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

    @property
    def time(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Audit:
    """The result of an audit of one average; numbers are None where they cannot be determined."""

    name: str  # empty if the run has one average
    verdict: str  # one of `BAD`, or "as claimed", "found", "undetermined"
    text: str  # explanation of the verdict in a sentence
    what: str  # the parameter in question, "decay" or "sigma_rel"
    found: float | None = None  # the parameter at the end of the training
    length: float | None = None  # the time constant or sigma_rel that explains all intervals
    # of the time constant at the end, relative; infinite if two checkpoints alone show it
    uncertainty: float | None = None
    claimed: float | None = None  # claimed parameter
    difference: float = 0.0  # between the lengths found and claimed, of their logarithms
    warm_up: str = ""  # rule by which the decay rose, as `ImportSettings.ema_warmup` names it
    # times after the beginning of the training at which it started from the weights
    starts: tuple[float, ...] = ()
    is_late: bool = False  # whether the first of these is its beginning, not a restart
    # names of the tensors that the verdict is about; empty for all tensors
    tensors: tuple[str, ...] = ()
    intervals: tuple[Interval, ...] = ()

    def __repr__(self) -> str:
        return f"Audit({self.text})"

    @property
    def spacing(self) -> float:
        """The median time between two checkpoints."""
        times = [interval.time for interval in self.intervals]
        return float(np.median(times or [1.0]))

    @property
    def is_of_other_weights(self) -> bool:
        """Whether most of the motion of an ordinary EMA is not that of the weights."""
        clear = [interval for interval in self.intervals if not interval.note]
        if not clear or self.what != "decay":
            return False
        shares = [interval.unexplained or 0.0 for interval in clear]
        return bool(np.median(shares) > _FOREIGN)

    @property
    def jump(self) -> Interval | None:
        """The interval in which nothing explains the motion of the average, unlike in the others;
        None if there is none.

        Of weights that go back and forth the unexplained share grows with the root of the time
        between checkpoints.
        """
        shares = [interval.unexplained or 0.0 for interval in self.intervals]
        times = [interval.time for interval in self.intervals]
        usual = float(np.median(shares))
        usual_time = float(np.median(times))
        for interval in self.intervals:
            share = interval.unexplained or 0.0
            longer = max(1.0, interval.time / usual_time)
            if not interval.note and share > max(_JUMP, _FAR * usual * math.sqrt(longer)):
                return interval
        return None

    @property
    def change(self) -> float | None:
        """The time before which all intervals show about one length, and after it another one; None
        if there is no such time."""
        clear = [interval for interval in self.intervals if interval.found and not interval.note]
        logs = np.log([interval.found for interval in clear if interval.found])
        for index in range(2, len(logs) - 1):
            sides = (logs[:index], logs[index:])
            most = max(float(np.ptp(side)) for side in sides)
            before, after = map(np.median, sides)
            apart = abs(float(before - after))
            if apart > max(math.log(_CHANGED), 2 * most):
                return clear[index].begin
        return None

    @property
    def is_bad(self) -> bool:
        return self.verdict in BAD

    def to_dict(self) -> dict[str, Any]:
        sigma = None if self.uncertainty == math.inf else self.uncertainty
        return asdict(self) | {"uncertainty": sigma, "contradicted": self.is_bad}


# --- from checkpoints to audits


def audit_sources(
    sources: Sequence[Source],
    claimed: float | None = None,
) -> list[Audit]:
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
    reason = "holds no average"
    if any(not isinstance(source.profile, Point) for source in sources):
        reason = "holds no two checkpoints with both an average and the weights"
    raise InvalidValueError(
        sources[0].path.parent, reason, "an audit compares the average with the weights"
    )


def audits_of(
    checkpoints: Sequence[Any],
    claimed: float | None = None,
    given: ImportSettings = UNSPECIFIED,
) -> Iterator[Audit]:
    """Yield the audit of each average, by sigma_rel; `given` are the settings of an import."""
    weights = {
        checkpoint.t: checkpoint
        for checkpoint in checkpoints
        if isinstance(checkpoint.profile, Point)
    }
    averages = [
        checkpoint
        for checkpoint in checkpoints
        if weights.get(checkpoint.t, checkpoint) is not checkpoint
    ]
    for width in sorted({checkpoint.sigma_rel for checkpoint in averages}):
        of_width = [checkpoint for checkpoint in averages if checkpoint.sigma_rel == width]
        if len(of_width) < 2:
            continue
        pairs = [(weights[checkpoint.t], checkpoint) for checkpoint in of_width]
        if (before := _last_before(of_width, weights)) is not None:
            pairs.insert(0, (before, before))
        claim = _claim(of_width, claimed, given)
        rules = [claim.rule]
        if not claim.claimed:
            rules = _unsaid_rules(of_width[-1], given)
        series, names = _read(pairs)
        name = f"sigma_rel {width:g}" if width else ""
        yield _judge(name, series, names, claim, rules, of_width[0].t_unit)


def _last_before(
    averages: Sequence[Checkpoint],
    weights: Mapping[float, Checkpoint],
) -> Checkpoint | None:
    """Return the last weights before an average that began between them and its first file.

    So it is if it is in all later files, and nothing says that it began earlier.
    """
    first = averages[0]
    earlier = [t for t in weights if t < first.t]
    is_counted = first.updates is None or first.updates.count is not None
    if not earlier or is_counted or not isinstance(first.profile, OrdinaryEMA):
        return None
    before = max(earlier)
    settings = first.profile.settings
    is_late = settings["first"] - settings["every"] >= before
    later = sum(t > before for t in weights)
    if is_late or len(averages) != later:
        return None
    return weights[before]


def _claim(
    averages: Sequence[Checkpoint],
    claimed: float | None,
    given: ImportSettings,
) -> Model:
    """Return the model that averages are claimed to follow, with the restarts that their settings
    say."""
    newest = averages[-1]
    profiles = [average.profile for average in averages if isinstance(average.profile, OrdinaryEMA)]
    every = given.update_every or 1
    rule = DecayRule()
    if profiles:
        every = profiles[-1].settings["every"]
        rule = profiles[-1].rule
    starts: list[float] = []
    last = -math.inf
    for profile in profiles:
        start = profile.settings["first"] - every
        if start >= last:  # a restart, unless it is the first one
            starts.append(start)
        last = profile.t
    model = Model(every=every, starts=tuple(starts) or (0.0,))
    if newest.sigma_rel:
        power = gamma_from_sigma_rel(newest.sigma_rel) + 1
        rule = DecayRule(warm_up=POWER_FUNCTION, power=power, copies=1)
        return replace(model, rule=rule, claimed=power)
    decay = claimed or newest.decay
    if not decay:
        return model
    base = decay if rule.is_schedule else rule.base
    rule = replace(rule, decay=decay, base=base, before=0)
    return replace(model, rule=rule, claimed=-math.log(decay) / every)


def _unsaid_rules(newest: Checkpoint, given: ImportSettings) -> list[DecayRule]:
    """Return the rules that an average of unknown decay may follow: the one that its file or the
    settings say, else all."""
    every = given.update_every or 1
    last = (given.steps or newest.t) / every
    possible = possible_rules(last)
    if not isinstance(newest.profile, OrdinaryEMA):
        return possible
    rule = newest.profile.rule
    if given.ema_warmup is None:
        if not rule.warm_up:
            return possible
        number = RULES[rule.warm_up].number
        arguments = newest.updates.rule if newest.updates else {}
        if number and number not in arguments:  # one of ema-pytorch's powers, which counts calls
            alike = [model for model in possible if model.warm_up == rule.warm_up]
            return [replace(model, copies=rule.copies, stride=rule.stride) for model in alike]
    steps = rule.steps if rule.steps < math.inf else last
    return [replace(rule, decay=UNLIMITED, copies=0, before=0, steps=steps)]


def _read(pairs: Sequence[tuple[Checkpoint, Checkpoint]]) -> tuple[Series, list[str]]:
    """Read pieces of the tensors at all times, of each tensor equally many elements; return their
    names.

    Raises NonFiniteError for nan or infinity.
    """
    _, newest = pairs[-1]
    pieces = _pieces(newest)
    names = [piece.name for piece in pieces]
    sizes = [piece.end - piece.begin for piece in pieces]
    rows = np.empty((2, len(pairs), sum(sizes)), np.float32)
    rounding = np.zeros((len(pairs), len(pieces)))
    for at, (weights, average) in enumerate(pairs):
        with weights, average:  # which share their files
            rows[0, at] = np.concatenate(_values(weights, pieces))
            values = _values(average, pieces)
        rows[1, at] = np.concatenate(values)
        rounding[at] = _roundings(average, names, values)
    times = np.array([average.t for _, average in pairs])
    split = np.split(rows, np.cumsum(sizes)[:-1], axis=2)
    dtypes = [newest.entries[name].dtype for name in names]
    return Series(times, split, rounding, dtypes), names


def _roundings(
    average: Checkpoint,
    names: Sequence[str],
    values: Sequence[npt.NDArray[Any]],
) -> list[float]:
    """Return the squared rounding errors of pieces of tensors with these names."""
    roundings = []
    for name, of_piece in zip(names, values, strict=True):
        dtype = average.entries[name].dtype
        roundings.append(float(expected_roundings(of_piece, dtype, "F32").sum()))
    return roundings


def _pieces(first: Checkpoint) -> list[ElementRange]:
    """Return the ranges of elements that an audit reads, in the order of names."""
    names = [name for name in sorted(first.averages) if first.entries[name].size]
    most = _MOST_ELEMENTS // len(names)
    parts = -(-_PIECES // len(names))
    pieces = []
    for name in names:
        size = first.entries[name].size
        count = min(parts, -(-size // _LEAST_ELEMENTS))
        each = max(1, min(size, most) // count)
        starts = np.linspace(0, size - each, count).astype(np.int64)
        for start in np.unique(starts).tolist():
            pieces.append(ElementRange(name, start, start + each))
    return pieces


def _values(
    source: Checkpoint,
    pieces: Sequence[ElementRange],
) -> list[npt.NDArray[Any]]:
    return [finite_values(source, *piece) for piece in pieces]


# --- what an average did

_FOLLOWED = 1e-4
"""Least change of weights, relative to their norm, that an average has to follow. In float32 one
with decay 0.9995 loses changes below 2^-24 / (1 - decay), as of a bias before a BatchNorm, which
has no gradient and moves by rounding alone."""


def _moves_clearly(weights: npt.NDArray[np.floating]) -> bool:
    moved = np.linalg.norm(weights - weights[0], axis=1)
    norms = np.linalg.norm(weights, axis=1)
    return bool(moved.max() > _FOLLOWED * norms.max())


@dataclass(frozen=True)
class _Moves:
    """Which pieces of weights moved, and which averages did not, by interval; and at which times
    they were equal. Pieces that move too little to be followed count as constant, unless all do."""

    weights: Bools  # [intervals, pieces]
    still: Bools  # also where the weights stand still: [intervals, pieces]
    copied: Bools  # [times, pieces]

    @classmethod
    def of(cls, series: Series) -> _Moves:
        moved = []
        still = []
        copied = []
        clear = [_moves_clearly(weights) for weights, _ in series.values]
        if not any(clear):
            clear = [True] * len(clear)
        for (weights, averages), is_clear in zip(series.values, clear, strict=True):
            stays = averages[1:] == averages[:-1]
            equal = weights == averages
            changes = weights[1:] != weights[:-1]
            moved.append(changes.any(axis=1) & is_clear)
            still.append(stays.mean(axis=1) >= _ALL)
            copied.append(equal.mean(axis=1) >= _ALL)
        moves = np.stack(moved, axis=1)
        stays = np.stack(still, axis=1) | ~moves
        return cls(moves, stays, np.stack(copied, axis=1))

    @property
    def stands(self) -> Bools:
        """Whether the average was not updated: [intervals]."""
        moves = self.weights.any(axis=1)
        return np.asarray(moves & self.still.all(axis=1))

    @property
    def equal(self) -> Bools:
        """Which pieces are always copied: [pieces]."""
        return np.asarray(self.copied[1:].all(axis=0))

    def lost(
        self,
        names: Sequence[str],
        averaged: Bools,
    ) -> tuple[str, ...]:
        """Return those of the pieces' names whose weights move, and which are not averaged."""
        are_lost = self.weights.any(axis=0) & ~averaged
        return tuple(dict.fromkeys(compress(names, are_lost)))

    @property
    def copies(self) -> int:
        """The number of first checkpoints at which the average had not begun."""
        copied = self.copied[:-1] | ~self.weights
        is_copy = copied.all(axis=1) & ~self.stands
        return int(np.argmin([*is_copy, False]))

    @property
    def fault(self) -> Verdict | None:
        """The verdict and its text on an average that does not average at all."""
        if not self.weights.any():
            return "undetermined", "the weights stand still between these checkpoints"
        if self.still.all():
            text = "the average does not move while the weights do: is its update called, and on "
            text += "the same tensors that are saved (names after torch.compile, shards of ZeRO-3)?"
            return DOES_NOT_MOVE, text
        if self.equal.all():
            text = "the average is equal to the weights: it is copied, or its decay is 0"
            return "equals the weights", text
        return None


@dataclass
class _Explanation:
    """The search for the rule, the length and the starts that explain how an average moved."""

    series: Series
    model: Model  # of the claim
    rules: Sequence[DecayRule]  # that are possible
    moves: Sequence[int]  # the intervals in which weights move
    notes: list[str]  # what else happened in an interval, by which it shows no decay
    is_late: bool  # whether the average began in the first interval
    starts: dict[int, float] = field(default_factory=dict)  # times of starts, by interval
    alike: list[Model] = field(default_factory=list)  # the best model, and others about as good

    @cached_property
    def rows(self) -> Intervals:
        return self.series.intervals()

    @property
    def usable(self) -> list[int]:
        moving = [index for index in self.moves if self.notes[index] != _STILL]
        clear = [index for index in moving if not self.notes[index]]
        return clear or moving

    @property
    def stands(self) -> bool:
        """Whether the average was never updated while weights moved."""
        return all(self.notes[index] == _STILL for index in self.moves)

    def find(self) -> None:
        """Find rule and starts in turns: an average that restarted repeats its warm-up, too."""
        for _ in range(2):
            self._fit()
            starts = self._restarts()
            if self.is_late and 0 not in self.starts:
                starts[0] = _locate_start(self.alike[0], self.rows[[0]])
            self.starts |= starts
            for index, time in self.starts.items():
                event = "began again" if index else "begins"
                self.notes[index] = f"{event} near step {time:,.0f}"
            if not starts:
                return
        self._fit()

    def _fit(self) -> None:
        rows = self.rows[self.usable]
        model = self.model.begun(*self.starts.values())
        self.alike = best_models(model, self.rules, rows)

    def _restarts(self) -> dict[int, float]:
        """Return the times at which the average restarted from the weights, by interval."""
        model = self.alike[0]
        usable = [index for index in self.usable if not self.notes[index]]
        restarts: dict[int, float] = {}
        if (model.is_power and model.claimed) or len(usable) < 3:
            return restarts
        before = model.forgotten(self.rows.begin)
        kept = np.exp(before - model.forgotten(self.rows.end))
        for index in usable:
            row = self.rows[[index]]
            is_lost = row.kept()[0] < kept[index] / 2
            if kept[index] < _SHORTEST or not is_lost:
                continue
            # either another decay or a restart explains the interval
            own = row.unexplained(row.fit(model))
            limit = _CLEARLY * row.unexplained(model)
            if own < limit:
                time = _locate_start(model, row)
                begun = row.unexplained(model.begun(time))
                if begun < min(limit, 1.5 * own):
                    restarts[index] = time
        return restarts

    # --- the findings

    @property
    def without_gap(self) -> Series:
        """The longest part of the series of which all intervals are usable."""
        usable = self.usable
        gaps = np.flatnonzero(np.diff(usable) > 1) + 1
        longest = max(np.split(usable, gaps), key=len).tolist()
        return self.series.between(longest[0], longest[-1] + 1)

    @cached_property
    def refined(self) -> tuple[Model, float]:
        """The model with the value that all checkpoints show, and its uncertainty."""
        model, sigma = refine(self.alike[0], self.without_gap)
        end = self.series.times[-1]
        lengths = [rule.length_at(end) for rule in self.alike]
        apart = [abs(math.log(length / lengths[0])) for length in lengths]
        return model, math.hypot(sigma, max(apart))

    def lost_share(self, model: Model) -> float:
        """Return the share of the elements of the average that lose updates, of those that a model
        moves."""
        kept, followed = self.rows.shares(model)
        moves = []
        expected = []
        series = zip(self.series.values, self.series.dtypes, strict=True)
        for (weights, averages), dtype in series:
            before = averages[:-1]
            digits = digits_of(before, dtype)
            apart = weights[:-1] - before
            motion = (1 - kept) * apart + followed * np.diff(weights, axis=0)
            is_expected = np.abs(motion) > _DIGITS * digits
            expected.append(is_expected[self.usable].ravel())
            moved = np.diff(averages, axis=0) / digits
            moves.append(moved[self.usable].ravel())
        return lost_share(np.concatenate(moves), np.concatenate(expected))

    @property
    def rivals(self) -> list[Model]:
        """The best model and others that explain the files about as well, if there are any."""
        best, *others = self.alike
        times = self.series.times
        rivals = [model for model in others if not are_the_same(model, best, times)]
        return [best, *rivals] if rivals else []

    @cached_property
    def better_rules(self) -> list[Model]:
        """The best models of another rule, if a claimed one explains the files clearly worse."""
        claim = self.alike[0]
        if claim.claimed is None or claim.is_power:
            return []
        times = self.series.times
        rows = self.rows[self.usable]
        rules = possible_rules(times[-1] / claim.every)
        better = best_models(replace(claim, claimed=None), rules, rows)
        is_same = are_the_same(better[0], claim, times)
        if is_same or not explains_more(rows, better[0], claim):
            return []
        return better if is_likelier(better[0], claim, self.without_gap) else []

    @property
    def intervals(self) -> list[Interval]:
        model = self.alike[0]
        intervals = []
        for index, note in enumerate(self.notes):
            row = self.rows[[index]]
            intervals.append(_interval(row, model, note))
        return intervals


def _locate_start(model: Model, row: Intervals) -> float:
    """Return the time in an interval at which the average started from the weights."""
    last = np.nextafter(row.end[0], row.begin[0])  # at the end itself it is of the next interval
    times = np.linspace(row.begin[0], last, 51)
    return row.search(model.begun, times)


def _interval(row: Intervals, model: Model, note: str) -> Interval:
    """Return the findings of one interval alone; a warm-up as the constant decay that forgets as
    much.

    One interval may be explained by several values: the nearest one counts.
    """
    begin = float(row.begin[0])
    end = float(row.end[0])
    value = None
    if row.gram[..., 2, 2].any():
        plain = _as_plain(model, begin, end)
        values = plain.value * np.geomspace(1 / 3, 3, 24)
        value = row.fit(plain, values).length
    claimed = None
    if model.claimed is not None:
        claimed = _as_plain(model.claim, begin, end).length
    y, d = np.moveaxis(row.gram[..., :2], -1, 0)  # their products with y, d and v
    squares = y[..., 0] + d[..., 1] - 2 * d[..., 0]
    moved = float(squares.sum())
    unexplained = None
    if moved > 0:
        left = float(row.residuals(model).sum())
        unexplained = math.sqrt(max(left, 0.0) / moved)
    return Interval(begin, end, value, claimed, unexplained, note)


def _as_plain(model: Model, begin: float, end: float) -> Model:
    """Return a model that forgets as much in an interval, but evenly."""
    if model.is_power:
        return replace(model, starts=(0.0,))
    starts = tuple(start for start in model.starts if start < begin)
    began = replace(model, starts=starts or (begin,))
    before, after = began.forgotten(np.array([begin, end])).tolist()
    lost = max(after - before, 1e-12)
    return Model(value=lost / (end - begin), every=model.every)


# --- the verdict


def _judge(
    name: str,
    series: Series,
    tensors: Sequence[str],
    model: Model,
    rules: Sequence[DecayRule],
    unit: str,
) -> Audit:
    """Return the audit of an average; `tensors` are the names of its pieces."""
    moves = _Moves.of(series)
    audit = Audit(name, "undetermined", "", _what(model))
    if model.claimed is not None:
        audit = replace(audit, claimed=model.claim.parameter)
    fault = moves.fault or _updated_once(series, model, unit)
    if fault:
        verdict, text = fault
        return replace(audit, verdict=verdict, text=text)
    averaged = ~moves.still.all(axis=0) & ~moves.equal
    explanation = _explanation(series, moves, averaged, model, rules)
    if explanation.stands:
        return replace(audit, text="in no interval do both the weights and the average move")
    explanation.find()
    lost = moves.lost(tensors, averaged)
    audit = _with_findings(audit, explanation)
    total = len(set(tensors))
    verdict, text = _verdict(audit, explanation, lost, total, unit)
    if verdict in ("undetermined", "another rule"):
        text += _change_text(audit)
    audit = replace(audit, verdict=verdict, text=text)
    if verdict == "undetermined":
        return replace(audit, found=None)
    if verdict != SOME_TENSORS:
        lost = ()
    return replace(audit, tensors=lost)


def _updated_once(series: Series, model: Model, unit: str) -> Verdict | None:
    """Return the verdict on an average that is updated once in each interval, and more often by its
    model."""
    if model.every > 0.9 * series.spacing or not series.intervals().are_single:
        return None
    text = "the average takes in only the weights of these files, as if it is updated once at each"
    return ONCE, f"{text}: every {series.spacing:,.0f} {unit}"


def _what(model: Model) -> str:
    return "sigma_rel" if model.is_power else "decay"


def _explanation(
    series: Series,
    moves: _Moves,
    averaged: Bools,
    model: Model,
    rules: Sequence[DecayRule],
) -> _Explanation:
    """Return the search among the pieces that are averaged, from where the average began."""
    first = max(moves.copies - 1, 0)
    last = len(series.times) - 1
    weights = moves.weights[first:, averaged]
    values = [*compress(series.values, averaged)]
    rounding = series.rounding[:, averaged]
    dtypes = [*compress(series.dtypes, averaged)]
    of_averages = Series(series.times, values, rounding, dtypes)
    stands = moves.stands[first:]
    times = series.times[first:]
    return _Explanation(
        series=of_averages.between(first, last),
        model=model,
        rules=rules,
        moves=np.flatnonzero(weights.any(axis=1)).tolist(),
        notes=_notes(stands, times, model.starts[1:]),
        is_late=moves.copies > 0 and model.rule.copies <= 1,
    )


def _notes(
    stands: Bools,
    times: FloatArray,
    restarts: Sequence[float],
) -> list[str]:
    """Return what the checkpoints or the settings say of each interval; empty if nothing."""
    notes = [_STILL if still else "" for still in stands]
    for restart in restarts:
        index = np.searchsorted(times, restart, "right") - 1
        if 0 <= index < len(notes):
            notes[index] = f"began again near step {restart:,.0f}"
    return notes


def _with_findings(audit: Audit, explanation: _Explanation) -> Audit:
    model, sigma = explanation.refined
    value = model.parameter_at(explanation.series.times[-1])
    starts = explanation.starts
    audit = replace(
        audit,
        what=_what(model),
        found=value,
        warm_up=warm_up_text(model.fitted).replace("none", ""),
        starts=tuple(sorted(starts.values())),
        is_late=0 in starts,
        intervals=tuple(explanation.intervals),
    )
    length = None
    if model.claimed is not None or model.parameter <= value + _RISES:
        length = model.length
    difference = abs(math.log(model.length / model.claim.length))
    return replace(audit, length=length, uncertainty=sigma, difference=difference)


def _verdict(
    audit: Audit,
    explanation: _Explanation,
    lost: Sequence[str],
    tensors: int,
    unit: str,
) -> Verdict:
    """Return the verdict on an average that moved as explained, and its text; it has `lost` some of
    its tensors."""
    if explanation.rivals:
        settings = ", and as ".join(map(_setting, explanation.rivals))
        return "undetermined", f"the files show it about equally as {settings}"
    model, sigma = explanation.refined
    shown = _shown(model, audit.found or 0.0, sigma, unit)
    if audit.starts[audit.is_late :]:
        return _begun_again(audit, explanation, shown)
    if broken := _broken(audit, explanation, unit):
        return broken
    if lost:
        text = f"{len(lost)} of {tensors} tensors are not followed, or copied, while the others are"
        return SOME_TENSORS, f"{text} averaged: {names_in(lost, 3)}"
    if model.starts[1:]:
        shown += f"; begun from the weights near step {_steps(model.starts[1:])}"
    if explanation.better_rules:
        settings = " or ".join(map(_setting, explanation.better_rules))
        text = f"the average moves as by {settings}, not as by {_setting(model.claim)}"
        return "another rule", text
    verdict, text = _compare_lengths(audit, explanation, shown, unit)
    if verdict in ("found", "as claimed"):
        return _set_back(audit, unit) or (verdict, text)
    return verdict, text


def _set_back(audit: Audit, unit: str) -> Verdict | None:
    """Return the verdict on an average of a clear length that jumps; None if it does not."""
    jump = audit.jump
    if jump is None or (audit.uncertainty or 0.0) >= _VAGUE / 2:
        return None
    text = f"the average of {unit[:-1]} {jump.end:,.12g} does not follow from that of "
    text += f"{jump.begin:,.12g}: the average, or the weights, were set back or replaced"
    return SET_BACK, text


def _change_text(audit: Audit) -> str:
    if audit.change is None:
        return ""
    return (
        f"; its decay changes near step {audit.change:,.0f}: name the files of one side by a glob"
    )


def _steps(times: Sequence[float]) -> str:
    return " and ".join(f"{time:,.0f}" for time in times)


def _begun_again(audit: Audit, explanation: _Explanation, shown: str) -> Verdict:
    """Return the verdict on an average that seems to restart: in intervals one after another, its
    decay rises."""
    restarts = audit.starts[audit.is_late :]
    intervals = sorted(index for index in explanation.starts if index)
    if (np.diff(intervals) == 1).any():
        text = f"its decay rises until step {restarts[-1]:,.0f} by a rule that is not known"
        if explanation.model.claimed is None:
            return "found", f"{text}; {shown}"
        return "another rule", f"{text}: name the files after it by a glob"
    text = f"began again from the weights near step {_steps(restarts)}: the average was lost, or "
    return "began again", f"{text}reset, at a resume; {shown}"


def _broken(
    audit: Audit,
    explanation: _Explanation,
    unit: str,
) -> Verdict | None:
    """Return the verdict on an average that follows no decay; None if it may follow one."""
    model, _ = explanation.refined
    if audit.is_of_other_weights:
        model = model.claim
    if (share := explanation.lost_share(model)) > MOST_LOST:
        text = f"the average is kept in too few digits: {share:.0%} of its elements stand still "
        return LOSES_UPDATES, f"{text}where the weights move them by {_DIGITS} digits"
    if audit.is_of_other_weights:
        return "undetermined", _OTHER_WEIGHTS
    moved = [each.time for each in audit.intervals if each.note != _STILL]
    shortest = min(moved, default=0.0)  # a shorter one may lie between two updates
    stopped = []
    for each in audit.intervals:
        is_long = each.time >= max(shortest, 2 * explanation.model.every)  # of two updates or more
        if each.note == _STILL and is_long:
            stopped.append(each)
    if not stopped:
        return None
    text = f"the average does not move from {unit[:-1]} {stopped[0].begin:,.12g} to "
    return DOES_NOT_MOVE, f"{text}{stopped[-1].end:,.12g}, while the weights do"


def _setting(model: Model) -> str:
    """Return the settings of an import that say a model."""
    if model.is_power:
        return f"sigma_rel {model.parameter:.3g}"
    if model.rule.is_schedule:
        return f"warm-up {model.rule.warm_up}:{model.parameter:.5g}"
    warm_up = warm_up_text(model.fitted)
    return f"decay {min(model.parameter, 0.999999):.6g} with warm-up {warm_up}"


def _shown(
    model: Model,
    value: float,
    sigma: float,
    unit: str,
) -> str:
    """Return what was found, for messages."""
    if model.is_power:
        return f"sigma_rel {value:.4g} (± {percent(sigma)})"
    rule = model.fitted.rule
    if model.rule.is_schedule:
        return f"decay by {rule} (± {percent(sigma)} of what an update takes in)"
    if model.parameter > value + _RISES:
        return f"decay {_decay_text(value, sigma)} at the end, still rising by {rule}"
    length = f"a time constant of {model.length:,.4g} {unit} (± {percent(sigma)})"
    shown = f"decay {_decay_text(value, sigma)}, {length}"
    if model.rule.warm_up:
        shown += f", reached by {rule}"
    return shown


def _decay_text(decay: float, sigma: float) -> str:
    """Return a decay with two digits of its uncertainty, `sigma` relative to 1 - decay."""
    error = (1 - decay) * min(max(sigma, 1e-9), 1.0)
    if error <= 0:
        return f"{decay:.7g}"
    decimals = 1 - math.floor(math.log10(error))
    return f"{decay:.{decimals}f}"


def _why_vague(
    audit: Audit,
    model: Model,
    is_better: bool,
    unit: str,
) -> str:
    """Return why a length is undetermined; empty if it is not. `is_better` if the model explains
    the intervals clearly better than its claim."""
    length = model.claim.length
    shortest = _SHORTEST * min(interval.time for interval in audit.intervals)
    if not model.is_power and max(model.length, length) < shortest:
        text = f"its time constant is below {shortest:,.3g} {unit}, too short for the time between"
        text += f" these checkpoints; checkpoints closer than {length / _SHORTEST:,.0f}"
        return f"{text} {unit} would show it"
    sigma = audit.uncertainty or 0.0
    is_far = is_better and audit.difference > math.log(_FAR)
    if sigma > _VAGUE and not is_far:
        return f"the checkpoints do not show its length (± {percent(min(sigma, 1))})"
    return ""


def _compare_lengths(
    audit: Audit,
    explanation: _Explanation,
    shown: str,
    unit: str,
) -> Verdict:
    """Return the verdict on a length, against the claimed one if there is a claim, and its text."""
    model, _ = explanation.refined
    rows = explanation.rows[explanation.usable]
    is_better = explains_more(rows, model, model.claim)
    if text := _why_vague(audit, model, is_better, unit):
        return "undetermined", text
    if model.claimed is None:
        return "found", shown
    sigma = audit.uncertainty or 0.0
    difference = audit.difference
    claimed = f"{model.claim.parameter:.7g}"
    # The ± does not hold how far the paths of all weights together bend.
    is_refuted = is_better and difference > min(math.log(_FAR), 3 * sigma)
    if not is_refuted and difference > _VAGUE:
        return "undetermined", f"the checkpoints show it too vaguely: {shown}, not {claimed}"
    if not is_refuted or difference <= math.log(_SLACK):
        return "as claimed", f"{shown}, as claimed"
    verdict = "too long" if model.length > model.claim.length else "too short"
    text = f"{math.exp(difference):.3g} times {verdict}: {shown}, not {claimed}"
    return verdict, f"{text}; as if updated {_cause(verdict, difference, min(sigma, 1.0))}"


def _cause(verdict: str, difference: float, sigma: float) -> str:
    factors = f"{math.exp(difference - sigma):.3g} to {math.exp(difference + sigma):.3g}"
    if verdict == "too long":
        return f"at every k-th step only, or of steps that are counted twice (k = {factors})"
    return f"{factors} times a step: once a microbatch, or by each of so many processes"
