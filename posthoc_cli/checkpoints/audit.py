"""Check that an average is what it claims to be, or find its decay, from checkpoints of it and of
the weights; NumPy float64 on a sample.

`audit_fit` finds the average that explains how the stored one moved. This module judges it, and
recognises faults: an average that does not move, equals the weights, or does not follow from the
one before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from posthoc_cli.checkpoints.audit_breaks import Falls, find_exchanged, find_falls
from posthoc_cli.checkpoints.audit_fit import FAR, TOLD, Bools, Explanation
from posthoc_cli.checkpoints.audit_rules import (
    ScaledRule,
    claim_text,
    find_claim,
    list_rules,
    list_unclaimed,
    main_number,
)
from posthoc_cli.checkpoints.audit_sample import Pair, Sample, read_sample
from posthoc_cli.checkpoints.content import list_names
from posthoc_cli.checkpoints.settings import UNSPECIFIED, ImportSettings, warm_up_text
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.decay_rules import POWER_FUNCTION
from posthoc_cli.dtypes import DTYPES
from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    check_number,
    count_noun,
    percent,
)
from posthoc_cli.profiles import Point
from posthoc_cli.snapshots.source import Source

_BETTER = 0.05  # and a length if its misfit is less than the claimed length's by this
_WORSE = math.log(2)  # the same, whatever the path of the weights between two files
_SLACK = math.log(1.1)  # between the found and the claimed length of an average that is as claimed
_VAGUE = 0.25  # above this uncertainty, or difference within it, a length is undetermined
_FOREIGN = 0.8  # largest unexplained share of the motion of an average that belongs to the weights
# A decay changes if in a quarter of the intervals a length of their own leaves so much less (mean
# log of squares): of 345 healthy series at most 0.13, with noise about a minimum 0.6. One interval
# differs from the others if it leaves less by the second number: at most 1.2 in these series.
_CHANGED = math.log(2.5)
_ODD = math.log(6)
_STILL = 0.4  # least share of elements that stand still which is said
_FARTHER = 1.25  # least motion, squared, of weights that are taken for an average, to the average's
_SHORTEST = 0.1  # least length that can be determined, as a share of an interval
_STRIDES = (2, 4, 5, 8, 10, 16, 20)  # usual steps between updates

DOES_NOT_MOVE = "does not move"
EQUALS = "equals the weights"
SET_BACK = "set back"
EXCHANGED = "exchanged"
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
    EXCHANGED,
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
    # time constant in the unit of times, or sigma_rel; None if the weights stand still
    found: float | None
    claimed: float | None  # None without a claim
    # L2 norm of the residual of the average's motion, divided by the norm of the motion; None if
    # the average stands still
    unexplained: float | None


@dataclass(frozen=True)
class Audit:
    """The result of an audit of one average; numbers are None where they cannot be determined."""

    verdict: str  # one of `BAD`, or "as claimed", "found", "undetermined"
    text: str  # explanation of the verdict in a sentence
    name: str = ""  # empty if the run has one average
    what: str = "decay"  # the parameter in question, or "sigma_rel"
    unit: str = "steps"  # of times, and of time constants
    found: float | None = None  # the parameter at the end of the training
    length: float | None = None  # the time constant that explains all intervals
    uncertainty: float | None = None  # of the length, relative
    claimed: float | None = None  # claimed parameter
    # between the logarithms of the lengths found and claimed, or found in one interval and in all
    difference: float = 0.0
    warm_up: str = ""  # rule by which the decay rose, as `ImportSettings.ema_warmup` names it
    copied_until: float | None = None  # last time at which the average had not begun
    set_back_at: float | None = None  # first time that does not follow as others do
    doubted_at: float | None = None  # time by which it may have begun again, which is not clear
    exchanged: tuple[float, ...] = ()  # times at which it and the weights are exchanged
    # names of the tensors that the verdict is about; empty for all tensors
    tensors: tuple[str, ...] = ()
    intervals: tuple[Interval, ...] = ()
    # what explains the files, of unknown decay; None if they contradict each other
    scaled: ScaledRule | None = None

    def __repr__(self) -> str:
        return f"Audit({self.text})"

    @property
    def is_bad(self) -> bool:
        return self.verdict in BAD

    def to_dict(self) -> dict[str, Any]:
        """Make a report for JSON."""
        report = asdict(self) | {"contradicted": self.is_bad}
        del report["scaled"]
        return report


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
    if audits := list(audit_averages(sources, claimed, has_intervals=True)):
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
    has_intervals: bool = False,
) -> Iterator[Audit]:
    """Yield the audit of each average, by sigma_rel; `given` are the settings of an import."""
    weights = {source.t: source for source in checkpoints if isinstance(source.profile, Point)}
    averages = [source for source in checkpoints if weights.get(source.t, source) is not source]
    for width in sorted({average.sigma_rel for average in averages}):
        of_width = [average for average in averages if average.sigma_rel == width]
        if len(of_width) > 1:
            name = f"sigma_rel {width:g}" if width else ""
            pairs = [(weights[average.t], average) for average in of_width]
            yield replace(_audit(pairs, claimed, given, has_intervals), name=name)


def _audit(
    pairs: Sequence[Pair], claimed: float | None, given: ImportSettings, has_intervals: bool
) -> Audit:
    _, newest = pairs[-1]
    sample = read_sample(pairs, given.update_every or 1)
    last = float(sample.updates[-1])
    claim = find_claim(newest, claimed, last)
    audit = _find_standstill(sample) or _find_copying(sample)
    if audit is None:
        is_counted = newest.updates is not None and newest.updates.count is not None
        may_be_rarer = sample.every == 1 and given.update_every is None and not is_counted
        possible = list_rules(last) if claim else list_unclaimed(newest, given, last)
        judge = _Judge(sample.intervals, claim, possible, sample, may_be_rarer)
        audit = judge.audit()
        if has_intervals:
            audit = replace(audit, intervals=judge.list_intervals())
    audit = replace(audit, unit=sample.unit)
    if claim:
        audit = replace(audit, claimed=main_number(claim.rule))
    if sample.copies:
        audit = replace(audit, copied_until=float(sample.times[sample.copies - 1]))
    is_fine = audit.verdict in ("found", "as claimed") or sample.dtype in ("F32", "F64")
    return audit if is_fine or sample.still < _STILL else _name_dtype(audit, sample)


def _name_dtype(audit: Audit, sample: Sample) -> Audit:
    """Name the dtype in which an average stands still."""
    dtype = DTYPES[sample.dtype].torch_name
    text = f"{percent(sample.still)} of its elements stand still from file to file: {dtype} has "
    text += "too few digits for an average; keep it in float32"
    return replace(audit, verdict=TOO_COARSE, text=text, found=None, scaled=None)


def _find_standstill(sample: Sample) -> Audit | None:
    """Name weights or an average that do not move."""
    moves = sample.moves.any(axis=1)
    is_still = (sample.stays | ~sample.moves).all(axis=1)
    if not moves.any():
        return Audit("undetermined", "the weights stand still between these checkpoints")
    if sample.updates[-1] < 2:
        reason = f"with an update every {sample.every:,} {sample.unit} there is at most one"
        return Audit("undetermined", reason)
    if is_still.all():
        text = "the average does not move while the weights do: is its update called, and on the "
        text += "same tensors that are saved (names after torch.compile, shards of ZeRO-3)?"
        return Audit(DOES_NOT_MOVE, text)
    spacings = np.diff(sample.times)
    shortest = spacings[~is_still].min()  # a shorter one may lie between two updates
    places = np.flatnonzero(moves & is_still & (spacings >= shortest))
    if not places.size:
        return None
    begin = sample.times[places[0]]
    end = sample.times[places[-1] + 1]
    text = f"the average does not move from {sample.unit[:-1]} {begin:,.12g} to {end:,.12g}, while "
    return Audit(DOES_NOT_MOVE, f"{text}the weights do")


def _find_copying(sample: Sample) -> Audit | None:
    """Name an average, or tensors of it, that are copies of the weights or combine those in the
    files alone."""
    if sample.equals_weights[1:].all():
        text = "the average is equal to the weights: it is copied, or its decay is 0"
        return Audit(EQUALS, text)
    if untracked := sample.untracked:
        count = len(set(sample.names))
        verb = "is" if len(untracked) == 1 else "are"
        text = f"{len(untracked)} of {count} tensors {verb} not followed, or copied, while the "
        text += f"others are averaged: {list_names(untracked, 3)}"
        return Audit(SOME_TENSORS, text, tensors=tuple(untracked))
    rows = sample.intervals
    if not len(rows.gram):
        text = "the average equals the weights, except at the last checkpoint"
        return Audit("undetermined", text)
    if (rows.counts > 1.1).all() and rows.are_single:
        spacing = np.median(np.diff(sample.times))
        text = "the average takes in only the weights of these files, as if it were updated once "
        return Audit(RARE, f"{text}at each: every {spacing:,.0f} {sample.unit}")
    return None


# --- an average that moves


@dataclass(frozen=True)
class _Judge(Explanation):
    """The verdict on an average that moves."""

    sample: Sample
    may_be_rarer: bool  # updates, than at each step

    @property
    def text(self) -> str:
        return self.best.describe(self.sigma, self.sample.every, self.sample.unit)

    # --- the audit

    def audit(self) -> Audit:
        """Judge the average, and add what was found."""
        best = self.best
        rule = best.fitted
        audit = self._find_break()
        if audit is None:
            audit = replace(self._judge_length(), scaled=self.simplest)
            if audit.verdict != "undetermined":
                audit = replace(audit, found=best.parameter)
            if best.is_known and not self.rows.are_noise:
                audit = replace(audit, difference=abs(best.log))
            if doubted := self._falls.doubted:
                audit = replace(audit, doubted_at=self._time_after(doubted[-1]))
        has_length = not (best.rises or rule.is_schedule)
        return replace(
            audit,
            what=best.what,
            length=self._length(best) if has_length else None,
            uncertainty=self.sigma,
            warm_up=warm_up_text(rule).replace("none", ""),
        )

    def list_intervals(self) -> tuple[Interval, ...]:
        """List what each interval shows alone."""
        sample = self.sample
        unexplained = self.unexplained.tolist()
        intervals = []
        for place, fit in enumerate(self.own, sample.copies):
            updates = float(sample.updates[place + 1])
            claim = self.claim and replace(self.claim, updates=updates)
            moves = bool(sample.moves[place].any())
            stays = bool(sample.stays[place].all())
            interval = Interval(
                begin=float(sample.times[place]),
                end=float(sample.times[place + 1]),
                found=self._length(replace(fit, updates=updates)) if moves else None,
                claimed=self._length(claim) if claim else None,
                unexplained=None if stays else unexplained[place - sample.copies],
            )
            intervals.append(interval)
        return tuple(intervals)

    def _length(self, fit: ScaledRule) -> float:
        """Compute the time constant in the unit of times, or the sigma_rel."""
        return fit.parameter if fit.is_width else self.sample.every * fit.length

    def _find_break(self) -> Audit | None:
        """Name an average that the weights do not explain, or not in some intervals."""
        rows = self.rows
        best = self.best
        is_exchanged = find_exchanged(rows)
        if is_exchanged.any() and not is_exchanged.all():
            return self._name_exchanged(is_exchanged)
        is_foreign = np.median(self.unexplained) > _FOREIGN
        is_short = best.length < _SHORTEST * rows.counts.min()
        is_farther = rows.motion.sum() > _FARTHER * rows.gram[..., 2, 2].sum()
        if is_farther and (is_foreign or is_short):
            return Audit(UNRELATED, _UNRELATED)
        if is_foreign:
            return Audit("undetermined", _OTHER_WEIGHTS)
        if falls := self._falls.clear:
            why = ": it began again from the weights in between, or its warm-up did"
            return replace(
                self._name_break(falls[-1], why),  # after which all is well
                verdict=SET_BACK,
                difference=abs(self.claimed.log) if self.claimed else 0.0,
                scaled=None if self.simplest.rule.warm_up else self.simplest,
            )
        if self.claim is not None and not best.is_known:  # another rule than claimed
            return None
        if self._are_updates_rare:
            unit = self.sample.unit
            text = f"updates at every few {unit} explain the files better than one at each"
            return Audit(RARE, text)
        if rows.are_noise:
            return None
        return self._find_change()

    @cached_property
    def _falls(self) -> Falls:
        return find_falls(self.rows)

    def _name_exchanged(self, is_exchanged: Bools) -> Audit:
        """Name the checkpoints that hold the average and the weights in exchanged places."""
        times = self.sample.times[self.sample.copies :][is_exchanged].tolist()
        steps = ", ".join(f"{time:,.12g}" for time in times[:3])
        if len(times) > 3:
            steps += ", ..."
        text = f"the average and the weights are exchanged in {count_noun(len(times), 'file')} "
        text += (
            f"of {self.sample.unit[:-1]} {steps}, as if written while the average was swapped in"
        )
        return Audit(EXCHANGED, text, exchanged=tuple(times))

    def _find_change(self) -> Audit | None:
        """Name a decay that changes, or an interval that differs from the others, by what a length
        of its own gains in each."""
        rows = self.rows.blurred
        most = rows.uneven_misfits(self.best) - self._falls.least
        if most.max() < _CHANGED / 2:  # rates of a table are 7 % apart
            return None
        is_still = self.sample.stays[self.sample.copies :].all(axis=1)  # between two updates
        gains = np.where(is_still, 0.0, [-fit.misfit for fit in self.own])
        if np.quantile(gains, 0.75) > _CHANGED:
            lengths = [self._length(fit) for fit in self.own]
            text = f"each interval alone shows another length, from {min(lengths):,.3g} to "
            text += f"{max(lengths):,.3g} {self.sample.unit}: its decay changes by an unknown rule"
            return Audit("another rule", text)
        if gains.max() > _ODD:
            why = " as others do: it or the weights were replaced, or its decay changed"
            return self._name_break(int(gains.argmax()), why)
        return None

    def _name_break(self, place: int, why: str) -> Audit:
        """Name an interval that differs from the others."""
        begin = self._time_after(place - 1)
        end = self._time_after(place)
        text = f"the average of {self.sample.unit[:-1]} {end:,.12g} does not follow from the one "
        return Audit(
            "undetermined",
            f"{text}at {begin:,.12g}{why}",
            difference=abs(self.fit_alone(place).log - self.best.log),
            set_back_at=end,
        )

    def _time_after(self, place: int) -> float:
        """Find the time of the checkpoint after an interval."""
        return float(self.sample.times[self.sample.copies + place + 1])

    @property
    def _are_updates_rare(self) -> bool:
        """Whether an average is nearly the mean of all weights, and updates at every few steps
        explain the intervals better than updates at each.

        The length does not show it: in the mean of each 10th an error was 4 times as large as
        predicted.
        """
        scaled = replace(self.best, rule=self.best.fitted, is_known=True, log=0.0)
        rule = scaled.rule
        is_mean = rule.warm_up in (POWER_FUNCTION, "power") and 1 <= rule.power < 2
        if not self.may_be_rarer or not is_mean:
            return False
        times = self.sample.times[self.sample.copies :]
        rare = [replace(self.rows, updates=times // every).misfit(scaled) for every in _STRIDES]
        return min(rare) < self.rows.misfit(scaled) - self.equal_within

    # --- lengths

    def _judge_length(self) -> Audit:
        """Judge an average by the length that explains it."""
        if self.claim:
            return self._judge_claim(self.claim)
        if vague := self._why_vague(self.best):
            return Audit("undetermined", vague)
        text = self.text
        if rules := [fit.rule.warm_up for fit in self.alike if fit is not self.best]:
            names = ", ".join(dict.fromkeys(rules))
            text += f"; with {names} the files would look the same"
        return Audit("found", text)

    def _judge_claim(self, claim: ScaledRule) -> Audit:
        """Judge an average by the rule and the length that explain it best."""
        text = self.text
        claimed = claim_text(claim.rule)
        if not self.best.is_known:
            return Audit("another rule", f"the average moves as by {text}, not {claimed}")
        if self._refutes(claim):
            factor = f"{math.exp(abs(self.best.log)):.3g}"
            verdict = "too long"
            cause = f"as if updated every {factor} steps, or at steps that are counted twice"
            if self.best.log < 0:
                verdict = "too short"
                cause = f"as if updated {factor} times a step: once a microbatch, or by each of so "
                cause += "many processes"
            text = f"{verdict} by a factor of {factor}: {text}, not {claimed}; {cause}"
            return Audit(verdict, text)
        if vague := self._why_vague(claim):
            return Audit("undetermined", vague)
        if abs(self.best.log) > _VAGUE:
            text = f"the checkpoints show it too vaguely: {text}, not {claimed}"
            return Audit("undetermined", text)
        return Audit("as claimed", f"{text}, as claimed")

    def _why_vague(self, claim: ScaledRule) -> str:
        """Say why a length is undetermined; empty if it is not."""
        spacing = float(self.rows.counts.min())
        length = claim.length
        longest = max(length, self.best.length)
        every = self.sample.every
        unit = self.sample.unit
        if not self.best.is_width and longest < _SHORTEST * spacing:
            shortest = _SHORTEST * spacing * every
            text = f"its time constant is below {shortest:,.3g} {unit}, too short for the time "
            text += "between these checkpoints; checkpoints closer than "
            return f"{text}{length * every / _SHORTEST:,.0f} {unit} would show it"
        if self.sigma > _VAGUE:
            return f"the checkpoints do not show its length (± {percent(min(self.sigma, 1))})"
        return ""

    def _refutes(self, claim: ScaledRule) -> bool:
        """Return whether the length is clearly another one than claimed: whatever the path of the
        weights between two files, or if these are near each other."""
        is_worse = self.rows.loose_misfit(claim) > self.rows.loose_misfit(self.best) + _WORSE
        if is_worse and abs(self.best.log) > _VAGUE:
            return True
        is_better = self.best.misfit < self.rows.misfit(claim) - _BETTER
        is_clear = abs(self.best.log) > max(3 * self.sigma, _SLACK)
        spacing = float(np.median(self.rows.counts)) / claim.length
        return is_better and is_clear and (self.sigma <= TOLD or spacing < FAR)


_OTHER_WEIGHTS = (
    "the weights at these checkpoints do not explain how the average moves between them: they "
    "forget faster than checkpoints are apart, or are of another run"
)
_UNRELATED = (
    "the average moves farther than the weights, and these do not explain how: the two are "
    "swapped, or of different runs"
)
