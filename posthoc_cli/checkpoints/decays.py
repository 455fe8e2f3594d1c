"""The decays of averages that other programs wrote: what files and settings say, compared with the
weights, or what the weights show."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posthoc_cli.checkpoints.ask import ASKED, Answer, QuestionError
from posthoc_cli.checkpoints.audit import (
    DOES_NOT_MOVE,
    EQUALS,
    RARE,
    SET_BACK,
    SOME_TENSORS,
    TOO_COARSE,
    UNRELATED,
    Audit,
    Candidate,
    audit_averages,
    round_decays,
)
from posthoc_cli.checkpoints.settings import FOUND, ImportSettings, parse_warm_up
from posthoc_cli.checkpoints.source import COMPARED_FILES, Checkpoint, first_values, is_copy
from posthoc_cli.decay_rules import POWER_FUNCTION, RULES, OrdinaryEMA, WarmUp
from posthoc_cli.errors import InvalidValueError, argument

log = logging.getLogger(__name__)

_SURE = 0.05  # largest uncertainty of a length from which a decay is taken
_CLEAR = 0.12  # and one from which a decay is proposed
_MOST_DOUBT = 3.0  # of the logarithm of a length
_LARGE = 4.0  # times the norm of an average: more than of weights that grow evenly from 0

Settings = dict[str, Any]
"""Fields of `ImportSettings` to change."""


def settle_decays(
    checkpoints: Sequence[Checkpoint],
    given: ImportSettings,
    numbers: str = "",
) -> tuple[ImportSettings, list[str]]:
    """Complete the settings with what determines the averages among checkpoints, and write lines
    about it: a stated decay, which is compared with the weights, or the round decay that they show.

    `numbers` is what the numbers of files are taken for, if these may be epochs. Raise
    InvalidValueError if nothing says or shows the decay, or if they contradict it.
    """
    return _Decays(checkpoints, given, numbers).settle()


@dataclass(frozen=True)
class _Decays:
    """The decays of the averages among checkpoints."""

    checkpoints: Sequence[Checkpoint]
    given: ImportSettings
    numbers: str

    @property
    def averages(self) -> list[Checkpoint]:
        return [source for source in self.checkpoints if source.updates is not None]

    def settle(self) -> tuple[ImportSettings, list[str]]:
        """Decide the settings, and note how in lines about them."""
        averages = self.averages
        last = self.checkpoints[-1].step
        if self.given.update_after_step and all(map(is_copy, averages)):
            reason = f"is not before the last checkpoint, of step {last:,}: no average has begun"
            value = self.given.update_after_step
            raise InvalidValueError("update_after_step", reason, value=value)
        if any(source.updates.needs_steps(self.given) for source in averages if source.updates):
            settled = self._with(replace(self.given, last_step=last))
            given, lines = settled.settle()
            return given, [f"steps: taken as {last:,}, the last checkpoint's", *lines]
        if not all(source.is_known for source in averages):
            return self._find()
        if averages:
            return self._confirm()
        return self.given, []

    def _with(self, given: ImportSettings) -> _Decays:
        changed = [checkpoint.with_settings(given) for checkpoint in self.checkpoints]
        return _Decays(changed, given, self.numbers)

    # --- a decay that nothing says

    def _find(self) -> tuple[ImportSettings, list[str]]:
        """Complete the settings with the decay that the files show."""
        # some files may say their decay, which is the same in all
        unclaimed = [replace(source, decay=0.0, sigma_rel=0.0) for source in self.checkpoints]
        audit = next(audit_averages(unclaimed, given=self.given), None)
        if audit is None:
            reason = "the files do not hold it, and it cannot be found without weights next to the "
            raise _question("ema_decay", f"{reason}averages in two files or more")
        self._check_is_average(audit)
        sigma = audit.uncertainty or 0.0
        rounded = self._round_decays(audit, sigma)
        is_reached = not any(candidate.rises for candidate in audit.candidates)
        if audit.verdict == "found" and len(rounded) == 1 and sigma <= _SURE and is_reached:
            (changes,) = rounded
            shown = changes.get("ema_decay") or changes["ema_warmup"]
            text = f"found: {audit.text}; taken as {shown}"
            return self._adopt(changes, 0.0), [text]
        if audit.verdict == "found" and self.given.ema_decay == FOUND:
            (candidate,) = audit.candidates
            changes = _express_as_settings(candidate, candidate.value)
            return self._adopt(changes, sigma), [f"found: {audit.text}"]
        rounded = self._round_decays(audit, 2 * sigma)
        proposals = rounded
        if audit.verdict == "found" and sigma <= _CLEAR:
            proposals = [*rounded, {"ema_decay": FOUND}]
        if self.numbers and not rounded:
            reason = f"numbers are {self.numbers}, and the decay is not a round one: {audit.text}"
            raise _question("steps_per_epoch", reason)
        reason = audit.text
        if not proposals:
            reason += f"; {argument('kind')} checkpoints takes the weights alone"
        raise _question("ema_decay", reason, *proposals)

    def _adopt(self, changes: Settings, uncertainty: float) -> ImportSettings:
        """Put a decay that was found into the settings."""
        found: Settings = {"ema_decay": None, "ema_uncertainty": uncertainty}
        found |= changes
        if replace(self.given, **found).warm_up_row.is_schedule and not self.given.steps:
            found["last_step"] = self.checkpoints[-1].step
        return replace(self.given, **found)

    def _round_decays(self, audit: Audit, distance: float) -> list[Settings]:
        """List settings with round decays within a relative distance of the length that was found,
        the likeliest first; a decay that still rises fits any higher one."""
        rounded = []
        for candidate in audit.candidates:
            if candidate.rises:
                highest = 10.0 ** math.floor(math.log10(1 - candidate.value) - 1)
                rounded.append(_express_as_settings(candidate, round(1 - highest, 12)))
            elif candidate.warm_up != POWER_FUNCTION and (audit.uncertainty or 0.0) <= _CLEAR:
                near = round_decays(candidate.value, distance)
                row = _row(candidate)
                if row.is_schedule and row.usual:
                    ratio = (1 - row.usual) / (1 - candidate.value)
                    if abs(math.log(ratio)) <= distance:
                        near.append(row.usual)
                rounded += [_express_as_settings(candidate, decay) for decay in near]
        return rounded

    # --- a decay that files or settings say

    def _confirm(self) -> tuple[ImportSettings, list[str]]:
        """Compare the averages that the settings describe with the weights."""
        given = self.given
        name = "sigma_rels" if given.sigma_rels else "ema_decay"
        updates = [source.updates for source in self.averages if source.updates]
        if given.steps and not any(update.ends(given) for update in updates):
            reason = "is of no use: these averages have no decay that rises to 1"
            raise InvalidValueError("steps", reason, value=given.steps)
        lines = []
        for audit in audit_averages(self.checkpoints, given=given):
            is_taken = self._is_taken_as_given(audit)
            if not is_taken:
                self._check_is_average(audit)
            if warm_up := self._warm_up_to(audit):
                given, checks = self._with(replace(self.given, ema_warmup=warm_up)).settle()
                return given, [f"ema_warmup: taken as {warm_up}, which the files show", *checks]
            if audit.is_bad and not is_taken:
                raise self._refute(audit)
            if is_taken or audit.verdict == "undetermined":
                reason = "is taken as given, which the files do not show: predicted errors hold if"
                log.warning("%s %s it is right: %s", name, reason, audit.text)
            doubt = max(given.ema_doubt or 0.0, audit.difference)
            given = replace(given, ema_doubt=min(doubt, _MOST_DOUBT) or None)
            if audit.verdict == SET_BACK:
                given = replace(given, ema_restart=audit.set_back_at)
            lines.append(f"given: {audit.text}")
        if not lines:
            self._check_warm_up()
            _check_alone(self.averages)
            reason = "is as given or in files: without weights next to the averages it cannot be "
            lines.append(f"{name} {reason}checked")
        return given, lines

    def _is_taken_as_given(self, audit: Audit) -> bool:
        """Return whether what the user gives is taken in spite of a fault that an audit names."""
        if audit.verdict == RARE:
            return self.given.update_every is not None
        return audit.verdict in (SET_BACK, TOO_COARSE) and self._is_given

    @property
    def _is_given(self) -> bool:
        """Whether the user says the decay, and not files."""
        given = self.given
        is_rule = given.warm_up_row.is_schedule or bool(given.sigma_rels)
        return is_rule or given.ema_decay not in (None, FOUND)

    def _warm_up_to(self, audit: Audit) -> str:
        """Find the warm-up that leads to the given decay, if the files show that decay; else ""."""
        given = self.given
        if given.ema_warmup is not None or not self._is_given or len(audit.candidates) != 1:
            return ""
        (candidate,) = audit.candidates
        is_rule = candidate.warm_up in (POWER_FUNCTION, "none") or _row(candidate).is_schedule
        if audit.verdict != "another rule" or is_rule or candidate.rises:
            return ""
        decay = given.rule().get("decay", 0.0)
        difference = abs(math.log((1 - decay) / (1 - candidate.value)))
        return candidate.warm_up if difference <= 2 * (audit.uncertainty or 0.0) else ""

    def _check_warm_up(self) -> None:
        """Raise InvalidValueError for a warm-up other than what files state."""
        given = parse_warm_up(self.given.ema_warmup or "")
        for source in self.averages:
            stated = source.updates.rule.get("warm_up") if source.updates else None
            if given and stated and given["warm_up"] != stated:
                reason = f"contradicts {source.path.name}, whose decay rises by {stated}, and "
                reason += "without weights next to the averages nothing shows which is right"
                raise InvalidValueError("ema_warmup", reason, value=self.given.ema_warmup)

    def _refute(self, audit: Audit) -> QuestionError:
        """Make the error that names the setting which an audit refutes."""
        reason = f"does not fit the files: {audit.text}"
        given = self.given
        answers: list[Settings] = []
        for candidate in audit.candidates:
            if given.ema_decay and candidate.warm_up != POWER_FUNCTION:
                answers.append({"ema_warmup": candidate.warm_up})
        rounded = self._round_decays(audit, audit.uncertainty or 0.0)
        answers += [{"ema_warmup": "none"} | changes for changes in rounded]
        if len(audit.candidates) == 1 and (audit.uncertainty or 1.0) <= _CLEAR:
            answers.append({"ema_decay": FOUND})
        if given.warm_up_row.is_schedule:
            return QuestionError("ema_warmup", reason, *answers, value=given.ema_warmup)
        name = "sigma_rels" if given.sigma_rels else "ema_decay"
        if given.sigma_rels:
            answers = [{"sigma_rels": ()} | changes for changes in answers]
        return QuestionError(name, reason, *answers, value=f"{audit.claimed:.12g}")

    # --- what both refuse

    def _check_is_average(self, audit: Audit) -> None:
        """Raise a QuestionError if no decay describes an average, or if nothing says when it
        began."""
        alone = {"kind": "checkpoints"}
        if audit.verdict == UNRELATED:
            average = _find_key(self.averages[-1])
            model = _find_key(next(each for each in self.checkpoints if each.updates is None))
            swapped = [{"average": model, "weights": average}] if average and model else []
            raise QuestionError("average", audit.text, *swapped, alone)
        if audit.verdict == RARE:
            raise _question("update_every", audit.text)
        way = ""
        if audit.verdict in (SET_BACK, DOES_NOT_MOVE):
            later = argument("update_after_step")
            way = f"name files of one side by a glob, later ones with {later}; or take the weights "
        elif audit.verdict == SOME_TENSORS:
            way = f"leave them out with {argument('exclude')}, or take the weights "
        elif audit.verdict in (EQUALS, TOO_COARSE):
            way = "take the weights "
        if way:
            raise QuestionError("average", f"{audit.text}; {way}alone", alone)
        begins = self._last_copy(audit)
        if begins and self.given.update_after_step is None:
            what = f"no average differs from the weights until step {begins:,.12g}"
            raise _question("update_after_step", f"{what}, after which it began")

    def _last_copy(self, audit: Audit) -> float:
        """Find the last time of weights without an average, or with a copy, that nothing else
        explains; 0 if there is none."""
        first = self.averages[0]
        if first.updates is None or first.updates.count is not None:
            return 0.0
        weights = [source.t for source in self.checkpoints if source.updates is None]
        earlier = [t for t in weights if t < first.t]
        if len(weights) - len(earlier) != len(self.averages):
            earlier = []  # averages are in some files only
        last = max([*earlier, audit.copied_until or 0.0])
        if not isinstance(first.profile, OrdinaryEMA) or first.profile.rule.copies:
            return 0.0
        settings = first.profile.settings
        return 0.0 if settings["first"] - settings["every"] >= last else last


def _question(name: str, reason: str, *answers: Answer) -> QuestionError:
    """Make the question for a setting, which the user may know better than the answers say."""
    return QuestionError(name, f"must be given: {reason}", *answers, {name: ASKED})


def _find_key(checkpoint: Checkpoint) -> str:
    """Find the key of a set in a file; empty if it has none."""
    name, stored = next(iter(checkpoint.stored.items()))
    return stored.removesuffix(name).rstrip(".") if stored != name else ""


def _express_as_settings(candidate: Candidate, value: float) -> Settings:
    """Express a rule with another value as settings."""
    if candidate.warm_up == POWER_FUNCTION:
        return {"sigma_rels": (min(float(f"{value:.4g}"), 0.2886),)}
    if _row(candidate).is_schedule:
        return {"ema_warmup": f"{candidate.warm_up}:{value:.12g}"}
    changes: Settings = {"ema_decay": value}
    if candidate.warm_up != "none":
        changes["ema_warmup"] = candidate.warm_up
    return changes


def _row(candidate: Candidate) -> WarmUp:
    name, _, _ = candidate.warm_up.partition(":")
    return RULES[name.replace("none", "")]


def _check_alone(averages: Sequence[Checkpoint]) -> None:
    """Raise InvalidValueError if the weights that would make such averages are far larger than the
    averages.

    The mean of what an average took in since an earlier one is (e' - B e) / (1 - B), with the share
    B that is left of e: it is nearly e' if B is 1.
    """
    newest = averages[-COMPARED_FILES:]
    values = [first_values(average) for average in newest]
    for earlier, later, before, after in zip(newest, newest[1:], values, values[1:], strict=False):
        kept = 1 - float(later.profile.tail(earlier.t))
        if kept > 0.995:
            continue
        mean = (after - kept * before) / (1 - kept)
        if np.linalg.norm(mean) > _LARGE * np.linalg.norm(after):
            reason = f"does not fit: the weights between {earlier.path.name} and {later.path.name} "
            reason += "would be far larger than their average"
            hint = "it rises, is shorter, or numbers are no steps"
            raise InvalidValueError("ema_decay", reason, hint)
