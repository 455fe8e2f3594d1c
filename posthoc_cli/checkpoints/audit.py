"""Check that an average is what it claims to be, or find its decay, from checkpoints of it and of
the weights; NumPy float64 on a sample.

`audit_decay` finds the length that explains how the average moved. This module says which rule it
follows, and recognises faults: an average that does not move, equals the weights, or does not
follow from the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.checkpoints.audit_decay import (
    FAR,
    Average,
    Bools,
    Intervals,
    possible_averages,
)
from posthoc_cli.checkpoints.content import list_names
from posthoc_cli.checkpoints.settings import UNSPECIFIED, ImportSettings, warm_up_text
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.decay_rules import POWER_FUNCTION, RULES, DecayRule, OrdinaryEMA
from posthoc_cli.dtypes import DTYPES
from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    check_number,
    percent,
)
from posthoc_cli.profiles import FloatArray, Point, gamma_from_sigma_rel, sigma_rel_from_gamma
from posthoc_cli.snapshots.sampling import estimate_roundings, read_elements
from posthoc_cli.snapshots.sources import (
    ElementRange,
    Source,
)

_MOST_ELEMENTS = 100_000  # in the sample
_LEAST_ELEMENTS = 64  # of a piece, if its tensor has so many: what one element leaves may be 0
_PIECES = 32  # least pieces of tensors, if the sample has enough elements
# Rules explain n intervals about equally if their misfits, times n, differ by less than this /
# sqrt(n). Of 13 rules and 10 recorded trainings the true rule was within 0.42 of the best one with
# 5 files, and within 0.23 with 20.
_ALIKE = 1.2
# Another rule explains n intervals clearly better than a claimed one if its misfit, times n, is
# less by 1 and this for each interval: of 13 rules and 4 trainings with files 20, 100 and 300 steps
# apart no other one explained them better than the true rule by more than 0.7 with 15 files, and
# 1.9 with 75; a constant decay was worse than a schedule by 3.6.
_CLEARLY = 0.05
_BETTER = 0.05  # and a length if its misfit is less than the claimed length's by this
_SAME = 0.06  # rules are the same if their tails differ by less
_SLACK = math.log(1.1)  # between the found and the claimed length of an average that is as claimed
_VAGUE = 0.25  # above this uncertainty, or difference within it, a length is undetermined
_TOLD = 0.2  # and up to this one another rule is told, or a length by files that are far apart
_RISES = 0.02  # a decay still rises if its limit is longer than its length by more
_FOREIGN = 0.8  # largest unexplained share of the motion of an average that belongs to the weights
# A decay changes if in a quarter of the intervals a length of their own leaves so much less (mean
# log of squares): of 345 healthy series at most 0.13, with noise about a minimum 0.6. One interval
# differs from the others if it leaves less by the second number: at most 1.2 in these series.
_CHANGED = math.log(2.5)
_ODD = math.log(6)
_STILL = 0.4  # least share of elements that stand still which is said
_FARTHER = 1.25  # least motion, squared, of weights that are taken for an average, to the average's
_SHORTEST = 0.1  # least length that can be determined, as a share of an interval

# Least change of weights, relative to their norm, that an average has to follow. In float32 one
# with decay 0.9995 loses changes below 2^-24 / (1 - decay), as of a bias before a BatchNorm, which
# has no gradient and moves by rounding alone.
_FOLLOWED = 1e-4

_STRIDES = (2, 4, 5, 8, 10, 16, 20)  # usual steps between updates
_OTHER_WEIGHTS = (
    "the weights at these checkpoints do not explain how the average moves between them: they "
    "forget faster than checkpoints are apart, or are of another run"
)
_UNRELATED = (
    "the average moves farther than the weights, and these do not explain how: the two are "
    "swapped, or of different runs"
)
DOES_NOT_MOVE = "does not move"
EQUALS = "equals the weights"
SET_BACK = "set back"
RARE = "updated rarely"
UNRELATED = "unrelated"
TOO_COARSE = "too few digits"
SOME_TENSORS = "some tensors"
BAD = (
    "too long",
    "too short",
    DOES_NOT_MOVE,
    EQUALS,
    SOME_TENSORS,
    "another rule",
    SET_BACK,
    RARE,
    UNRELATED,
    TOO_COARSE,
)
"""Verdicts that name a fault; the others are "as claimed", "found" and "undetermined"."""


@dataclass(frozen=True)
class Interval:
    """What the audit found between two checkpoints, whose times are `begin` and `end`."""

    begin: float
    end: float
    # time constant in the unit of times; None if the weights stand still
    found: float | None
    claimed: float | None  # None without a claim
    # L2 norm of the residual of the average's motion, divided by the norm of the motion; None if
    # the average stands still
    unexplained: float | None


@dataclass(frozen=True)
class Candidate:
    """A rule that explains the files, as the settings of an import."""

    warm_up: str  # as `ImportSettings.ema_warmup`; `POWER_FUNCTION` for a width
    value: float  # the decay after the warm-up, or the first one of a schedule, or the sigma_rel
    rises: bool  # whether the decay has not reached this value: any larger one explains the files
    text: str


@dataclass(frozen=True)
class Audit:
    """The result of an audit of one average; numbers are None where they cannot be determined."""

    name: str  # empty if the run has one average
    verdict: str  # one of `BAD`, or "as claimed", "found", "undetermined"
    text: str  # explanation of the verdict in a sentence
    what: str = "decay"  # the parameter in question, or "sigma_rel"
    found: float | None = None  # the parameter at the end of the training
    length: float | None = None  # the time constant that explains all intervals
    uncertainty: float | None = None  # of the length, relative
    claimed: float | None = None  # claimed parameter
    # between the logarithms of the lengths found and claimed, or found in one interval and in all
    difference: float = 0.0
    warm_up: str = ""  # rule by which the decay rose, as `ImportSettings.ema_warmup` names it
    # rules that explain the files about equally, the best first; none for a claim
    candidates: tuple[Candidate, ...] = ()
    copied_until: float | None = None  # last time at which the average had not begun
    set_back_at: float | None = None  # first time that does not follow as others do
    # names of the tensors that the verdict is about; empty for all tensors
    tensors: tuple[str, ...] = ()
    intervals: tuple[Interval, ...] = ()

    def __repr__(self) -> str:
        return f"Audit({self.text})"

    @property
    def is_bad(self) -> bool:
        return self.verdict in BAD

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"contradicted": self.is_bad}


# --- from checkpoints to audits


def audit_sources(
    sources: Sequence[Source],
    claimed: float | None = None,
) -> list[Audit]:
    """Audit every average among the checkpoints of one run against the weights at the same times.

    `claimed` is their claimed decay; by default the decay in their files or in the import.
    """
    if claimed is not None:
        check_number("claimed", claimed, lambda decay: 0 < decay < 1, "lie in (0, 1)")
    if not isinstance(sources[0], Checkpoint):
        reason = (
            "holds snapshots of a tracker: their headers hold the width exactly, and `ema "
            "info` shows it"
        )
        raise DirectoryError(sources[0].path.parent, reason)
    if audits := list(audit_averages(sources, claimed)):
        return audits
    reason = "holds no average"
    if any(not isinstance(source.profile, Point) for source in sources):
        reason = "holds no two checkpoints with both an average and the weights"
    raise InvalidValueError(
        sources[0].path.parent, reason, "an audit compares the average with the weights"
    )


def audit_averages(
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
        name = f"sigma_rel {width:g}" if width else ""
        yield _Judge(name, of_width[-1], _read(pairs), claimed, given).audit()


@dataclass(frozen=True)
class _Sample:
    """What a sample of the tensors shows, in intervals between times. Tensors whose weights move
    too little to be followed count as constant, unless all do."""

    names: list[str]  # of the tensor of each piece
    times: FloatArray
    gram: FloatArray  # as in `Intervals`: [intervals, pieces, 5, 5]
    rounding: FloatArray  # squared rounding errors of the averages: [times, pieces]
    stays: Bools  # whether the average stands still: [intervals, pieces]
    equals_weights: Bools  # whether the average equals the weights: [times, pieces]
    norms: FloatArray  # squared, of the newest weights: [pieces]
    # share of the elements of the average that stand still while the weights move: [intervals]
    still: FloatArray
    dtype: str  # in which the average is stored

    @cached_property
    def moves(self) -> Bools:
        """Whether the weights move: [intervals, pieces]."""
        motion = self.gram[..., 2, 2]
        is_clear = motion.sum(axis=0) > _FOLLOWED**2 * self.norms
        if not is_clear.any():
            is_clear[:] = True
        return np.asarray((motion > 0) & is_clear)

    def intervals(self, updates: FloatArray, pieces: Bools) -> Intervals:
        """Select the intervals of some pieces, each relative to the motion of its weights, without
        the variance of rounding."""
        motion = self.gram[:, pieces, 2, 2].mean(axis=0)
        scale = 1 / np.maximum(motion, 1e-300)
        gram = self.gram[:, pieces] * scale[:, None, None]
        rounding = self.rounding[:, pieces] * scale
        before, after = rounding[:-1], rounding[1:]
        moved = gram[..., 0, 0] + gram[..., 1, 1] - 2 * gram[..., 0, 1]
        shared = _rounding_covariance(moved, (before + after) / 2)
        gram[..., 0, 0] -= after
        gram[..., 1, 1] -= before
        gram[..., 0, 1] -= shared
        gram[..., 1, 0] -= shared
        return Intervals(updates, gram, rounding[1:] + rounding[:-1])


def _rounding_covariance(moved: FloatArray, rounding: FloatArray) -> FloatArray:
    """Estimate the covariance of the rounding errors of two values that moved so far, of the
    variance `rounding` each: both squared, as stored.

    A value that moves by m spacings moves by f (1 - f) more, squared, if it is rounded, where f is
    the fraction of m. If m is normally distributed with deviation s, this is in the mean 1/6 less
    the sum of exp(-2 (pi k s)^2) / (pi k)^2, and twice the variance less twice the covariance.
    """
    deviations = np.append(0, np.geomspace(1e-4, 2, 200))
    numbers = np.arange(1, 30)
    decays = np.exp(-2 * (np.pi * numbers * deviations[:, None]) ** 2)
    covariances = (decays / (np.pi * numbers) ** 2 / 2).sum(axis=1)
    squares = deviations**2 + 2 * (covariances[0] - covariances)
    spacings = 12 * np.maximum(rounding, 1e-300)
    return np.asarray(spacings * np.interp(moved / spacings, squares, covariances, right=0.0))


_Point = tuple[FloatArray, FloatArray]
"""The weights and the average of one time: [elements]."""


def _read(pairs: Sequence[tuple[Checkpoint, Checkpoint]]) -> _Sample:
    """Read pieces of the tensors at all times, equally many elements of each tensor; raise
    NonFiniteError for nan or infinity."""
    _, newest = pairs[-1]
    pieces = _choose_pieces(newest)
    sizes = [piece.end - piece.begin for piece in pieces]
    starts = np.cumsum([0, *sizes[:-1]])
    window = list[_Point]()
    rounding = []
    equals = []
    stays = []
    still = []
    grams = []
    for weights, average in pairs:
        with weights, average:  # which share their files
            x = read_elements(weights, pieces)
            e = read_elements(average, pieces)
        rounding.append(np.add.reduceat(estimate_roundings(average, pieces, e), starts))
        equals.append(np.logical_and.reduceat(x == e, starts))
        x_begin, e_begin = window[-1] if window else (x, e)
        stays.append(np.logical_and.reduceat(e == e_begin, starts))
        still.append(float(((e == e_begin) & (x != x_begin)).mean()))
        if not window:
            window.append((x, e))  # before the first one nothing moves, and after the last one
        window = [*window[-3:], (x, e)]
        if len(window) == 4:
            grams.append(_sum_products(window, starts))
    grams.append(_sum_products([*window[-3:], window[-1]], starts))
    return _Sample(
        names=[piece.name for piece in pieces],
        times=np.array([average.t for _, average in pairs]),
        gram=np.array(grams),
        rounding=np.array(rounding),
        stays=np.array(stays[1:]),
        equals_weights=np.array(equals),
        norms=np.add.reduceat(x * x, starts),
        still=np.array(still[1:]),
        dtype=newest.entries[pieces[0].name].dtype,
    )


def _sum_products(window: Sequence[_Point], starts: npt.NDArray[np.intp]) -> FloatArray:
    """Sum the products in the interval between the second and the third of four times, by piece:
    [pieces, 5, 5]."""
    (before, _), (x, e), (x_end, e_end), (after, _) = window
    rows = np.stack([e_end - x, e - x, x_end - x, x - before, after - x_end])
    products = rows[:, None] * rows
    return np.moveaxis(np.add.reduceat(products, starts, axis=2), 2, 0)


def _choose_pieces(first: Checkpoint) -> list[ElementRange]:
    """Choose the ranges of elements that an audit reads, in the order of names."""
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


# --- the verdict


@dataclass(frozen=True)
class _Findings:
    """The average that explains the intervals best."""

    rows: Intervals
    best: Average
    sigma: float  # the uncertainty of its length, relative
    own: list[Average]  # of each interval alone


class _Judge:
    """What an average did between checkpoints."""

    def __init__(
        self,
        name: str,
        newest: Checkpoint,
        sample: _Sample,
        claimed: float | None,
        given: ImportSettings,
    ) -> None:
        self.name = name
        self.sample = sample
        self.unit = newest.t_unit
        self.every = given.update_every or 1
        first = self.every
        if isinstance(newest.profile, OrdinaryEMA):
            self.every = newest.profile.settings["every"]
            first = newest.profile.settings["first"]
        self.updates = np.maximum((sample.times - first) // self.every + 1, 0)
        self.last = float(self.updates[-1])
        self.claim = _find_claim(newest, claimed)
        self.averages = possible_averages(self.last)
        if not self.claim:
            self.averages = _list_averages(newest, given, self.last)
        is_counted = newest.updates is not None and newest.updates.count is not None
        self.may_be_rarer = self.every == 1 and given.update_every is None and not is_counted
        moves = sample.moves
        follows = (~sample.stays & moves).any(axis=0)
        is_copied = sample.equals_weights[1:].all(axis=0)
        self.is_averaged: Bools = np.logical_and(follows, np.logical_not(is_copied))
        is_copy = (sample.equals_weights[:-1] | ~moves).all(axis=1)
        self.copies = int(np.argmin(np.append(is_copy, False)))

    def audit(self) -> Audit:
        what = "decay"
        claimed = None
        if self.claim:
            what = _name_parameter(self.claim.rule)
            claimed = _main_number(self.claim.rule)
        audit = Audit(self.name, "undetermined", "", what, claimed=claimed)
        if self.copies:
            audit = replace(audit, copied_until=float(self.sample.times[self.copies - 1]))
        audit = self._judge(audit)
        still = float(np.median(self.sample.still))
        is_fine = audit.verdict in ("found", "as claimed") or self.sample.dtype in ("F32", "F64")
        if is_fine or still < _STILL:
            return audit
        dtype = DTYPES[self.sample.dtype].torch_name
        text = f"{percent(still)} of its elements stand still from file to file: {dtype} has too "
        text += "few digits for an average; keep it in float32"
        return replace(audit, verdict=TOO_COARSE, text=text, found=None, candidates=())

    def _judge(self, audit: Audit) -> Audit:
        if fault := self._find_fault():
            verdict, text = fault
            tensors = tuple(self._untracked) if verdict == SOME_TENSORS else ()
            return replace(audit, verdict=verdict, text=text, tensors=tensors)
        return self._explain(audit)

    @property
    def _untracked(self) -> dict[str, None]:
        """The names of tensors whose weights move, and which are not averaged."""
        are_untracked = self.sample.moves.any(axis=0) & ~self.is_averaged
        return dict.fromkeys(compress(self.sample.names, are_untracked))

    def _find_fault(self) -> tuple[str, str] | None:
        """Find the fault of an average that does not average: the verdict, and its text."""
        moves = self.sample.moves
        stays = self.sample.stays
        if not moves.any():
            return "undetermined", "the weights stand still between these checkpoints"
        if self.last < 2:
            reason = f"with an update every {self.every:,} {self.unit} there is at most one"
            return "undetermined", reason
        if (stays | ~moves).all():
            text = "the average does not move while the weights do: is its update called, and on "
            text += "the same tensors that are saved (names after torch.compile, shards of ZeRO-3)?"
            return DOES_NOT_MOVE, text
        if self.sample.equals_weights[1:].all():
            text = "the average is equal to the weights: it is copied, or its decay is 0"
            return EQUALS, text
        if untracked := self._untracked:
            count = len(set(self.sample.names))
            verb = "is" if len(untracked) == 1 else "are"
            text = f"{len(untracked)} of {count} tensors {verb} not followed, or copied, while the "
            return SOME_TENSORS, f"{text}others are averaged: {list_names([*untracked], 3)}"
        stands = (stays | ~moves).all(axis=1)
        spacings = np.diff(self.sample.times)
        shortest = spacings[~stands].min()  # a shorter one may lie between two updates
        stopped = moves.any(axis=1) & stands & (spacings >= shortest)
        if stopped.any():
            where = np.flatnonzero(stopped)
            begin = self.sample.times[where[0]]
            end = self.sample.times[where[-1] + 1]
            text = (
                f"the average does not move from {self._format_time(begin)} to {end:,.12g}, while "
            )
            return DOES_NOT_MOVE, f"{text}the weights do"
        return None

    def _format_time(self, time: float) -> str:
        return f"{self.unit[:-1]} {time:,.12g}"

    def _explain(self, audit: Audit) -> Audit:
        """Judge an average that moves by the lengths that explain how."""
        count = len(self.sample.gram)
        rows = self.sample.intervals(self.updates, self.is_averaged).between(self.copies, count)
        if not len(rows.gram):
            text = "the average equals the weights, except at the last checkpoint"
            return replace(audit, text=text)
        if (rows.counts > 1.1).all() and rows.are_single:
            spacing = np.median(np.diff(self.sample.times))
            text = "the average takes in only the weights of these files, as if it were updated "
            text += f"once at each: every {spacing:,.0f} {self.unit}"
            return replace(audit, verdict=RARE, text=text)
        fits = self._fit_all(rows, self.averages)
        best = fits[0]
        is_other = False
        if self.claim:
            best = self._fit_all(rows, [self.claim])[0]
            is_clear = fits[0].misfit < best.misfit - _clear_from(rows)
            is_other = is_clear and not self._are_same(fits[0], best)
            is_other = is_other and self._uncertainty(rows, fits[0]) <= _TOLD
        found = self._describe(rows, fits[0] if is_other else best)
        audit = replace(
            self._with_findings(audit, found), candidates=self._find_candidates(fits, found)
        )
        if is_other and self.claim:
            texts = " or by ".join(candidate.text for candidate in audit.candidates)
            text = f"the average moves as by {texts}, not {_claim_text(self.claim.rule)}"
            return replace(audit, verdict="another rule", text=text)
        if broken := self._judge_breaks(audit, found):
            return broken
        return self._judge_length(audit, found)

    def _judge_length(self, audit: Audit, found: _Findings) -> Audit:
        """Judge an average by the length that explains it best, or by the rules that do."""
        best = found.best
        texts = ", and as ".join(candidate.text for candidate in audit.candidates)
        if self.claim:
            if not found.rows.are_noise:
                audit = replace(audit, difference=abs(best.log))
            if wrong := self._judge_claim(audit, found, self.claim):
                return wrong
            texts = self._describe_candidate(best, found.sigma).text
            audit = replace(audit, candidates=())
        if self._are_updates_rare(found):
            text = f"updates at every few {self.unit} explain the files better than one at each"
            return replace(audit, verdict=RARE, text=text, candidates=())
        if len(audit.candidates) > 1:
            text = f"the files show it about equally as {texts}"
            return replace(audit, found=None, text=text)
        if vague := self._why_vague(found):
            return replace(audit, found=None, text=vague)
        if not self.claim:
            return replace(audit, verdict="found", text=texts)
        if abs(best.log) > _VAGUE:
            claimed = _claim_text(best.rule)
            text = f"the checkpoints show it too vaguely: {texts}, not {claimed}"
            return replace(audit, found=None, text=text)
        return replace(audit, verdict="as claimed", text=f"{texts}, as claimed")

    def _fit_all(self, rows: Intervals, averages: Sequence[Average]) -> list[Average]:
        """Fit the best average of each rule; return them, the best of all first.

        Rules that few libraries have, and rules that begin as the mean of all weights, count as
        worse by as much as is about equal.
        """
        fits = []
        for average in averages:
            fit = rows.fit(average)
            misfit = rows.misfit(fit)
            rule = fit.own_rule
            if not fit.is_known and (rule.begins_as_mean or not RULES[rule.warm_up].is_common):
                misfit += _equal_within(rows)
            fits.append(replace(fit, misfit=misfit))
        return sorted(fits, key=lambda fit: fit.misfit)

    def _uncertainty(self, rows: Intervals, fit: Average) -> float:
        """Estimate the uncertainty of a length; for a decay that rises, by how much more or less
        often it may be applied."""
        if not self._rises(fit):
            return rows.uncertainty(fit)
        often = rows.fit(Average(fit.own_rule, is_known=True))
        return math.hypot(often.log, rows.uncertainty(often))

    def _is_told(self, found: _Findings) -> bool:
        """Return whether the intervals may refute a length: they are not noise, nor as long as
        several claimed lengths, so that the path within them may change what is found."""
        spacing = float(np.median(found.rows.counts)) / (self.claim or found.best).length(self.last)
        return not found.rows.are_noise and (found.sigma <= _TOLD or spacing < FAR)

    def _find_candidates(self, fits: Sequence[Average], found: _Findings) -> tuple[Candidate, ...]:
        """Describe the best average, and averages of other rules that explain the intervals about
        as well."""
        rivals = [fits[0]]
        for fit in fits[1:]:
            is_alike = fit.misfit < fits[0].misfit + _equal_within(found.rows)
            if is_alike and not any(self._are_same(fit, rival) for rival in rivals):
                rivals.append(fit)
        return tuple(self._describe_candidate(fit, found.sigma) for fit in rivals)

    def _are_same(self, one: Average, other: Average) -> bool:
        """Return whether two fits make about the same averages at the times of the checkpoints."""
        difference = _tails(one, self.updates) - _tails(other, self.updates)
        return bool(np.abs(difference).max() <= _SAME)

    # --- findings

    def _describe(self, rows: Intervals, best: Average) -> _Findings:
        return _Findings(rows, best, self._uncertainty(rows, best), self._fit_each(rows, best))

    def _with_findings(self, audit: Audit, found: _Findings) -> Audit:
        """Add to the audit the numbers of an average and of its intervals."""
        best = found.best
        rule = best.own_rule
        intervals = []
        unexplained = _residual_shares(found.rows, best)
        for index, fit in enumerate(found.own):
            at = index + self.copies
            begin, end = self.sample.times[at : at + 2].tolist()
            updates = float(self.updates[at + 1])
            moves = bool(self.sample.moves[at].any())
            stays = bool(self.sample.stays[at].all())
            interval = Interval(
                begin,
                end,
                found=self._length(fit, updates) if moves else None,
                claimed=self._length(self.claim, updates) if self.claim else None,
                unexplained=None if stays else float(unexplained[index]),
            )
            intervals.append(interval)
        return replace(
            audit,
            what=_name_parameter(rule),
            found=self._parameter(best),
            length=None if self._rises(best) else self._limit(best),
            uncertainty=found.sigma,
            warm_up=warm_up_text(rule).replace("none", ""),
            intervals=tuple(intervals),
        )

    def _fit_each(self, rows: Intervals, best: Average) -> list[Average]:
        """Fit the average that explains each interval alone; its misfit is relative to the best
        average's, if the weights moved at any times within the interval."""
        fits = []
        for index in range(len(rows.gram)):
            row = rows.between(index, index + 1)
            fit = row.fit(best, is_near=True)
            fits.append(replace(fit, misfit=row.uneven_misfit(fit) - row.uneven_misfit(best)))
        return fits

    def _length(self, fit: Average, updates: float) -> float:
        """Compute the time constant after so many updates, in units of time, or the sigma_rel."""
        if _name_parameter(fit.rule) == "sigma_rel":
            return self._parameter(fit)
        return self.every * fit.length(updates)

    def _limit(self, fit: Average) -> float:
        """Compute the time constant after the warm-up, or before a schedule, or the sigma_rel."""
        rule = fit.own_rule
        if fit.is_known or _name_parameter(rule) == "sigma_rel":
            return self._length(fit, self.last)
        return self.every / (1 - _main_number(rule))

    def _parameter(self, fit: Average) -> float:
        """Compute the decay of the last update, or the first decay of a schedule, or the
        sigma_rel."""
        rule = fit.rule
        if rule.is_schedule or _name_parameter(rule) == "sigma_rel":
            return _main_number(rule.longer(math.exp(fit.log)))
        return fit.last_decay(self.last)

    def _rises(self, fit: Average) -> bool:
        """Return whether the decay of an unknown rule has not reached its limit."""
        rule = fit.rule
        if fit.is_known or not rule.warm_up or rule.is_schedule:
            return False
        return self._limit(fit) > (1 + _RISES) * self._length(fit, self.last)

    def _describe_candidate(self, fit: Average, sigma: float) -> Candidate:
        """Describe an average by the settings of an import, and by a text."""
        rule = fit.own_rule
        value = self._parameter(fit)
        warm_up = warm_up_text(rule)
        if _name_parameter(rule) == "sigma_rel":
            return Candidate(
                POWER_FUNCTION, value, False, f"sigma_rel {value:.4g} (± {percent(sigma)})"
            )
        if rule.is_schedule:
            text = f"decay by {rule.rule} (± {percent(sigma)} of what an update takes in)"
            return Candidate(warm_up.partition(":")[0], value, False, text)
        shown = _decay_text(value, sigma)
        if self._rises(fit):
            text = f"decay {shown} at the end, still rising by {rule.rule}"
            return Candidate(warm_up, value, True, text)
        length = self._limit(fit)
        text = f"decay {shown}, a time constant of {length:,.4g} {self.unit} (± {percent(sigma)})"
        if not fit.is_known and rule.warm_up:
            text += f", reached by {rule.rule}"
            value = rule.decay
        return Candidate(warm_up, value, False, text)

    # --- verdicts

    def _judge_breaks(self, audit: Audit, found: _Findings) -> Audit | None:
        """Judge an average that the weights do not explain, or not in some intervals."""
        rows = found.rows
        best = found.best
        audit = replace(audit, found=None, candidates=())
        is_foreign = np.median(_residual_shares(rows, best)) > _FOREIGN
        length = best.length(self.last)
        is_unlike = is_foreign or length < _SHORTEST * rows.counts.min()
        if is_unlike and rows.motion.sum() > _FARTHER * rows.gram[..., 2, 2].sum():
            return replace(audit, verdict=UNRELATED, text=_UNRELATED)
        if is_foreign:
            return replace(audit, text=_OTHER_WEIGHTS)
        is_still = self.sample.stays[self.copies :].all(axis=1)  # between two updates
        restarts = rows.find_restarts(self.claim or best)
        places = np.flatnonzero(restarts & ~is_still)
        if places.size:
            last = int(places[-1])  # after which all is well
            why = ": it began again from the weights in between"
            audit = self._name_break(audit, last, found, why)
            return replace(audit, verdict=SET_BACK, difference=abs(best.log))
        gains = np.where(is_still, 0.0, [-fit.misfit for fit in found.own])
        if rows.are_noise:
            return None
        if np.quantile(gains, 0.75) > _CHANGED:
            lengths = [self._length(fit, self.last) for fit in found.own]
            text = f"each interval alone shows another length, from {min(lengths):,.3g} to "
            text += f"{max(lengths):,.3g} {self.unit}: its decay changes by an unknown rule"
            return replace(audit, verdict="another rule", text=text)
        if gains.max() > _ODD:
            why = " as others do: it or the weights were replaced, or its decay changed"
            return self._name_break(audit, int(gains.argmax()), found, why)
        return None

    def _name_break(self, audit: Audit, place: int, found: _Findings, why: str) -> Audit:
        """Name an interval that differs from the others."""
        begin, end = self.sample.times[self.copies :][place : place + 2]
        text = f"the average of {self._format_time(end)} does not follow from the one at "
        doubt = abs(found.own[place].log - found.best.log)
        text += f"{begin:,.12g}{why}"
        return replace(audit, text=text, difference=doubt, set_back_at=float(end))

    def _judge_claim(self, audit: Audit, found: _Findings, claim: Average) -> Audit | None:
        """Judge an average that is clearly longer or shorter than claimed."""
        best = found.best
        difference = abs(best.log)
        is_better = best.misfit < found.rows.misfit(claim) - _BETTER
        is_clear = difference > max(3 * found.sigma, _SLACK)
        if not (is_better and is_clear and self._is_told(found)):
            return None
        verdict = "too long" if best.log > 0 else "too short"
        shown = self._describe_candidate(best, found.sigma).text
        text = f"{verdict} by a factor of {math.exp(difference):.3g}: {shown}, not "
        text += f"{_claim_text(claim.rule)}; {_cause(verdict, difference, found.sigma)}"
        return replace(audit, verdict=verdict, text=text)

    def _are_updates_rare(self, found: _Findings) -> bool:
        """Return whether an average is nearly the mean of all weights, and updates at every few
        steps explain the intervals better than updates at each.

        The length does not show it: in the mean of each 10th an error was 4 times as large as
        predicted.
        """
        rows = found.rows
        average = Average(found.best.own_rule, is_known=True)
        rule = average.rule
        is_mean = rule.warm_up in (POWER_FUNCTION, "power") and 1 <= rule.power < 2
        if not self.may_be_rarer or not is_mean:
            return False
        times = self.sample.times[self.copies :]
        rare = [replace(rows, updates=times // every).misfit(average) for every in _STRIDES]
        return min(rare) < rows.misfit(average) - _equal_within(rows)

    def _why_vague(self, found: _Findings) -> str:
        """Say why a length is undetermined; empty if it is not."""
        spacing = float(found.rows.counts.min())
        length = (self.claim or found.best).length(self.last)
        longest = max(length, found.best.length(self.last))
        if _name_parameter(found.best.rule) == "decay" and longest < _SHORTEST * spacing:
            shortest = _SHORTEST * spacing * self.every
            text = f"its time constant is below {shortest:,.3g} {self.unit}, too short for the "
            text += "time between these checkpoints; checkpoints closer than "
            return f"{text}{length * self.every / _SHORTEST:,.0f} {self.unit} would show it"
        if found.sigma > _VAGUE:
            return f"the checkpoints do not show its length (± {percent(min(found.sigma, 1))})"
        return ""


def _find_claim(newest: Checkpoint, claimed: float | None) -> Average | None:
    """Find the rule that an average is claimed to follow; None without a claim."""
    if newest.sigma_rel:
        power = gamma_from_sigma_rel(newest.sigma_rel) + 1
        return Average(DecayRule(warm_up=POWER_FUNCTION, power=power, copies=1), is_known=True)
    decay = claimed or newest.decay
    if not decay:
        return None
    rule = DecayRule()
    if isinstance(newest.profile, OrdinaryEMA):
        rule = newest.profile.rule
    return Average(replace(rule, decay=decay), is_known=True)


def _list_averages(newest: Checkpoint, given: ImportSettings, updates: float) -> list[Average]:
    """List the rules that an average of unknown decay may follow: the rule that its file or the
    settings name, else all."""
    possible = possible_averages(updates)
    if not isinstance(newest.profile, OrdinaryEMA):
        return possible
    rule = newest.profile.rule
    if given.ema_warmup is None:
        if not rule.warm_up:
            return possible
        number = RULES[rule.warm_up].number
        said = newest.updates.rule if newest.updates else {}
        if number and number not in said:  # one of ema-pytorch's powers, which counts calls
            alike = [each.rule for each in possible if each.rule.warm_up == rule.warm_up]
            return [
                Average(replace(each, copies=rule.copies, stride=rule.stride)) for each in alike
            ]
    steps = rule.steps if rule.steps < math.inf else updates
    return [Average(replace(rule, decay=0.5, base=0.5, before=0, steps=steps))]


def _name_parameter(rule: DecayRule) -> str:
    """Name the parameter in question."""
    return "sigma_rel" if rule.warm_up == POWER_FUNCTION else "decay"


def _main_number(rule: DecayRule) -> float:
    """Find the decay after a warm-up, or the first decay of a schedule, or the sigma_rel."""
    if _name_parameter(rule) == "sigma_rel":
        return sigma_rel_from_gamma(max(rule.power - 1, 1e-300))
    return rule.base if rule.is_schedule else rule.decay


def round_decays(decay: float, distance: float) -> list[float]:
    """List the decays 1 - 10^-k, 1 - 2 10^-k and 1 - 5 10^-k whose time constants are within a
    relative distance, the nearest first."""
    rest = 1 - decay
    power = 10.0 ** math.floor(math.log10(rest))
    near = []
    for digit in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0):
        candidate = digit * power
        log_ratio = abs(math.log(candidate / rest))
        if log_ratio <= distance and candidate <= 0.5:
            near.append((log_ratio, round(1 - candidate, 15)))
    return [decay for _, decay in sorted(near)]


def _claim_text(rule: DecayRule) -> str:
    if rule.is_schedule:
        return f"by {rule.rule}"
    text = f"{_main_number(rule):.7g}"
    if rule.warm_up not in ("", POWER_FUNCTION):
        text += f", reached by {rule.rule}"
    return text


def _tails(fit: Average, updates: FloatArray) -> FloatArray:
    """Compute what the average after so many updates has of each earlier one: [updates,
    updates]."""
    lost = fit.forgotten(np.append(0.0, updates))
    return np.tril(np.exp(np.minimum(lost - lost[:, None], 0)))


def _equal_within(rows: Intervals) -> float:
    """Compute the difference of misfits at which rules explain intervals about equally."""
    return float(_ALIKE / len(rows.gram) ** 1.5)


def _clear_from(rows: Intervals) -> float:
    """Compute the difference of misfits at which a rule explains intervals clearly better."""
    return _CLEARLY + 1 / len(rows.gram)


def _residual_shares(rows: Intervals, fit: Average) -> FloatArray:
    """Compute the share of the average's motion in each interval that is left unexplained, as an L2
    norm: in the median over the pieces, since one of them may have been scaled for some steps."""
    shares = np.maximum(rows.residuals(fit), 0) / rows.motion
    return np.sqrt(np.median(shares, axis=1))


def _cause(verdict: str, difference: float, sigma: float) -> str:
    low, high = (f"{math.exp(difference + error):.3g}" for error in (-min(sigma, 1), min(sigma, 1)))
    factor = low if low == high else f"{low} to {high}"
    if verdict == "too long":
        return f"as if updated every k steps, or at steps that are counted twice (k = {factor})"
    return (
        f"as if updated {factor} times a step: once a microbatch, or by each of so many processes"
    )


def _decay_text(decay: float, sigma: float) -> str:
    """Write a decay with two digits of its uncertainty, `sigma` relative to 1 - decay."""
    error = (1 - decay) * min(max(sigma, 1e-9), 1.0)
    if error <= 0:
        return f"{decay:.7g}"
    decimals = 1 - math.floor(math.log10(error))
    return f"{decay:.{decimals}f}"
