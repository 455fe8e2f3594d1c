"""The decays of averages that other programs wrote: what files and settings say, compared with the
weights, or what the weights show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from posthoc_cli.checkpoints.ask import ASKED, Answer, QuestionError
from posthoc_cli.checkpoints.audit import (
    DOES_NOT_MOVE,
    EQUALS,
    EXCHANGED,
    RARE,
    SET_BACK,
    SOME_TENSORS,
    TOO_COARSE,
    UNRELATED,
    Audit,
    audit_averages,
)
from posthoc_cli.checkpoints.audit_rules import main_number
from posthoc_cli.checkpoints.settings import FOUND, ImportSettings, parse_warm_up, warm_up_text
from posthoc_cli.checkpoints.source import COMPARED_FILES, Checkpoint, first_values, is_copy
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.decay_rules import POWER_FUNCTION, RULES, UNLIMITED, DecayRule, OrdinaryEMA
from posthoc_cli.errors import InvalidValueError, argument
from posthoc_cli.profiles import round_sigma_rel

_SURE = 0.05  # largest uncertainty of a length from which a decay is taken
_CLEAR = 0.12  # and one from which a decay is proposed
_MOST_DOUBT = 3.0  # of the logarithm of a length
_LARGE = 4.0  # times the norm of an average: more than of weights that grow evenly from 0

_SCHEDULES = {"teacher": "cosine", "momentum_encoder": "cosine", "target_encoder": "linear"}
"""How the decay rises to 1 over a training, by the key of the average: in DINO, MoCo v3, I-JEPA."""

Settings = dict[str, Any]
"""Fields of `ImportSettings` to change."""
Settled = tuple[ImportSettings, list[str], list[str]]
"""Settings, lines about how they were decided, and warnings."""


def settle_decays(
    checkpoints: Sequence[Checkpoint],
    given: ImportSettings,
    numbers: str = "",
) -> Settled:
    """Complete the settings with what determines the averages among checkpoints: a stated decay,
    which is compared with the weights, or the round decay that they show.

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

    @property
    def updates(self) -> list[Updates]:
        return [source.updates for source in self.checkpoints if source.updates is not None]

    @property
    def name(self) -> str:
        """The setting that says the averages."""
        return "sigma_rels" if self.given.sigma_rels else "ema_decay"

    def settle(self) -> Settled:
        """Decide the settings, and note how in lines about them."""
        averages = self.averages
        last = self.checkpoints[-1].step
        if self.given.update_after_step and all(map(is_copy, averages)):
            reason = f"is not before the last checkpoint, of step {last:,}: no average has begun"
            value = self.given.update_after_step
            raise InvalidValueError("update_after_step", reason, value=value)
        if any(updates.needs_steps(self.given) for updates in self.updates):
            given, lines, warnings = self._settle_with(last_step=last)
            return given, [f"steps: taken as {last:,}, the last checkpoint's", *lines], warnings
        if not all(source.is_known for source in averages):
            return self._find()
        if averages:
            return self._confirm()
        return self.given, [], []

    def _settle_with(self, **changes: Any) -> Settled:
        given = replace(self.given, **changes)
        changed = [checkpoint.with_settings(given) for checkpoint in self.checkpoints]
        return replace(self, checkpoints=changed, given=given).settle()

    # --- a decay that nothing says

    def _find(self) -> Settled:
        """Complete the settings with the decay that the files show."""
        # some files may say their decay, which is the same in all
        unclaimed = [replace(source, decay=0.0, sigma_rel=0.0) for source in self.checkpoints]
        audit = next(audit_averages(unclaimed, given=self.given), None)
        if audit is None:
            reason = "the files do not hold it, and it cannot be found without weights next to the "
            reason += "averages in two files or more"
            if schedule := self._schedule:
                raise _question_of_schedule(schedule, f"the decay of the average: {reason}")
            raise _question("ema_decay", reason)
        self._check_is_average(audit)
        sigma = audit.uncertainty or 0.0
        if audit.scaled and audit.verdict == "found":
            taken = _find_round(audit, sigma)
            if taken and sigma <= _SURE and not audit.scaled.rises:
                text = " ".join(map(str, taken.values()))
                line = f"found: {audit.text}; taken as {text}"
                return self._adopt(taken | {"ema_restart": _find_restart(audit)}, 0.0), [line], []
            if self.given.ema_decay == FOUND:
                shown = _settings_of(audit.scaled.fitted)
                shown["ema_restart"] = _find_restart(audit)
                return self._adopt(shown, sigma), [f"found: {audit.text}"], []
        raise self._ask(audit)

    def _ask(self, audit: Audit) -> QuestionError:
        """Make the question for a decay that the files do not show clearly."""
        sigma = audit.uncertainty or 0.0
        nearest = _find_round(audit, 2 * sigma)
        if self.numbers and not nearest:
            reason = f"numbers are {self.numbers}, and the decay is not a round one: {audit.text}"
            return _question("steps_per_epoch", reason)
        answers = [nearest] if nearest else []
        if audit.verdict == "found" and sigma <= _CLEAR:
            answers.append({"ema_decay": FOUND})
        reason = audit.text
        if not answers:
            reason += f"; an import with {argument('kind')} checkpoints takes the weights alone"
        return _question("ema_decay", reason, *answers)

    def _adopt(self, changes: Settings, uncertainty: float) -> ImportSettings:
        """Put a decay that was found into the settings."""
        found: Settings = {"ema_decay": None, "ema_uncertainty": uncertainty}
        given = replace(self.given, **(found | changes))
        self._check_steps(given.warm_up_row.is_schedule)
        if given.warm_up_row.is_schedule and not given.steps:
            given = replace(given, last_step=self.checkpoints[-1].step)
        return given

    # --- a decay that files or settings say

    def _confirm(self) -> Settled:
        """Compare the averages that the settings describe with the weights."""
        given = self.given
        self._check_steps(any(updates.ends(given) for updates in self.updates))
        audit = next(audit_averages(self.checkpoints, given=given), None)
        if audit is None:
            return self._confirm_alone()
        is_taken = self._is_taken_as_given(audit)
        if not is_taken:
            self._check_is_average(audit)
        if warm_up := self._find_warm_up(audit):
            settings, lines, warnings = self._settle_with(ema_warmup=warm_up)
            lines = [f"ema_warmup: taken as {warm_up}, which the files show", *lines]
            return settings, lines, warnings
        if audit.is_bad and not is_taken:
            raise self._refute(audit)
        warnings = []
        if is_taken or audit.verdict == "undetermined":
            reason = "which the files do not show: predicted errors hold if it is right"
            if audit.set_back_at is not None:
                reason = "and predicted errors count what the files show"
            warnings = [f"{self.name} is taken as given, {reason}: {audit.text}"]
        doubt = max(given.ema_doubt or 0.0, audit.difference)
        given = replace(
            given, ema_doubt=min(doubt, _MOST_DOUBT) or None, ema_restart=_find_restart(audit)
        )
        return given, [f"given: {audit.text}"], warnings

    def _is_taken_as_given(self, audit: Audit) -> bool:
        """Return whether what the user gives is taken in spite of a fault that an audit names."""
        if audit.verdict == RARE:
            return self.given.update_every is not None
        is_given = bool({"decay", "base"} & self.given.rule().keys())
        return is_given and audit.verdict in (SET_BACK, TOO_COARSE)

    def _find_warm_up(self, audit: Audit) -> str:
        """Find the warm-up that leads to the given decay, if the files show that decay; else ""."""
        decay = self.given.rule().get("decay")
        if not (decay and audit.scaled and audit.verdict == "another rule"):
            return ""
        shown = _settings_of(audit.scaled.fitted)
        is_given = self.given.ema_warmup is not None
        if is_given or audit.scaled.rises or len(shown) < 2:  # no decay with a warm-up
            return ""
        difference = abs(math.log((1 - decay) / (1 - shown["ema_decay"])))
        return shown["ema_warmup"] if difference <= 2 * (audit.uncertainty or 0.0) else ""

    def _confirm_alone(self) -> Settled:
        """Take averages without weights next to them as they are given, with a warning about a
        constant decay where programs that call them so let it rise."""
        given = self.given
        line = self._check_alone()
        decay = given.rule().get("decay")
        if not self._schedule or given.ema_warmup or decay in (None, UNLIMITED):
            return given, [line], []
        reason = "is constant, and programs that call an average so let it rise to 1 over the "
        reason += (
            f"training ({argument('ema_warmup')} {self._schedule}): predicted errors count that"
        )
        longest = self.checkpoints[-1].step  # a time constant that rises ends there
        doubt = longest * (1 - decay)
        return replace(given, ema_doubt=doubt), [line], [f"ema_decay {reason}"]

    def _check_alone(self) -> str:
        """Raise InvalidValueError for averages without weights next to them that contradict the
        settings; return a line that says that little can be checked."""
        given = parse_warm_up(self.given.ema_warmup or "")
        for source, updates in zip(self.averages, self.updates, strict=True):
            stated = updates.rule.get("warm_up")
            if given and stated and given["warm_up"] != stated:
                reason = f"contradicts {source.path.name}, whose decay rises by {stated}, and "
                reason += "without weights next to the averages nothing shows which is right"
                raise InvalidValueError("ema_warmup", reason, value=self.given.ema_warmup)
        _check_size(self.averages)
        reason = (
            "is as given or in files: without weights next to the averages it cannot be checked"
        )
        return f"{self.name} {reason}"

    def _refute(self, audit: Audit) -> QuestionError:
        """Make the error that names the setting which an audit refutes."""
        reason = f"does not fit the files: {audit.text}"
        given = self.given
        answers: list[Settings] = []
        scaled = audit.scaled
        nearest = _find_round(audit, audit.uncertainty or 0.0)
        fits_any = scaled is not None and scaled.rises and given.ema_decay is not None
        if nearest and not fits_any:
            answers.append({"ema_warmup": "none"} | nearest)
        if given.ema_decay and scaled and not scaled.is_width:
            answers.append({"ema_warmup": warm_up_text(scaled.fitted)})
        if scaled and (audit.uncertainty or 1.0) <= _CLEAR:
            answers.append({"ema_decay": FOUND})
        if given.warm_up_row.is_schedule:
            return QuestionError("ema_warmup", reason, *answers, value=given.ema_warmup)
        if given.sigma_rels:
            answers = [{"sigma_rels": ()} | changes for changes in answers]
        return QuestionError(self.name, reason, *answers, value=f"{audit.claimed:.12g}")

    # --- what both refuse

    def _check_steps(self, are_used: bool) -> None:
        if self.given.steps and not are_used:
            reason = "is of no use: these averages have no decay that rises to 1"
            raise InvalidValueError("steps", reason, value=self.given.steps)

    def _check_is_average(self, audit: Audit) -> None:
        """Raise a QuestionError if no decay describes an average, or if nothing says when it
        began."""
        alone = {"kind": "checkpoints"}
        if audit.verdict == UNRELATED:
            average = _find_key(self.averages[-1])
            model = _find_key(next(each for each in self.checkpoints if each.updates is None))
            swapped = [{"average": model, "weights": average}] if average and model else []
            raise QuestionError("average", audit.text, *swapped, alone)
        if audit.verdict == EXCHANGED:
            earlier = set(self.given.exchanged)
            steps = earlier.symmetric_difference(map(int, audit.exchanged))
            raise QuestionError("exchanged", audit.text, {"exchanged": tuple(sorted(steps))}, alone)
        if audit.verdict == RARE:
            raise _question("update_every", audit.text)
        if audit.verdict == SET_BACK and (decay := self._find_decay(audit)):
            reason = f"{audit.text}; with its decay, predicted errors count that"
            raise QuestionError("average", reason, decay, alone)
        if way := _find_way(audit.verdict):
            raise QuestionError("average", f"{audit.text}; {way} alone", alone)
        if begins := self._last_copy(audit):
            what = f"no average differs from the weights until step {begins:,.12g}"
            raise _question("update_after_step", f"{what}, after which it began")

    @property
    def _schedule(self) -> str:
        """The schedule of the programs that call an average as these files do; empty for none."""
        keys = _find_key(self.averages[-1]).split(".")
        return next((_SCHEDULES[key] for key in keys if key in _SCHEDULES), "")

    def _find_decay(self, audit: Audit) -> Settings:
        """Find the decay that files say, or the round one that they show; empty for none."""
        newest = self.averages[-1]
        if isinstance(newest.profile, OrdinaryEMA) and newest.is_known:
            return _settings_of(newest.profile.rule)
        return _find_round(audit, audit.uncertainty or 0.0)

    def _last_copy(self, audit: Audit) -> float:
        """Find the last time of weights without an average, or with a copy, that nothing else
        explains; 0 if there is none."""
        first = self.averages[0]
        is_counted = self.updates[0].count is not None
        begins_as_copy = isinstance(first.profile, OrdinaryEMA) and first.profile.rule.copies
        if is_counted or begins_as_copy or self.given.update_after_step is not None:
            return 0.0
        weights = [source.t for source in self.checkpoints if source.updates is None]
        earlier = [t for t in weights if t < first.t]
        if len(weights) - len(earlier) != len(self.averages):
            earlier = []  # averages are in some files only
        return max([*earlier, audit.copied_until or 0.0])


def _question(name: str, reason: str, *answers: Answer) -> QuestionError:
    """Make the question for a setting, which the user may know better than the answers say."""
    return QuestionError(name, f"must be given: {reason}", *answers, {name: ASKED})


def _question_of_schedule(schedule: str, reason: str) -> QuestionError:
    """Make the question for a decay that rises to 1, from a number that the user knows."""
    reason = f"must be given: {reason}; programs that call an average so let it rise to 1 over the "
    reason += f"training, and a constant one is {argument('ema_decay')} {ASKED}"
    return QuestionError("ema_warmup", reason, {"ema_warmup": f"{schedule}:{ASKED}"})


def _find_way(verdict: str) -> str:
    """Find what to do about an average that no decay describes; empty for another verdict."""
    if verdict in (SET_BACK, DOES_NOT_MOVE):
        later = argument("update_after_step")
        return f"name files of one side by a glob, later ones with {later}; or take the weights"
    if verdict == SOME_TENSORS:
        return f"leave them out with {argument('exclude')}, or take the weights"
    return "take the weights" if verdict in (EQUALS, TOO_COARSE) else ""


def _find_restart(audit: Audit) -> float | None:
    """Find the time by which an average has begun again, or may have."""
    return audit.set_back_at if audit.set_back_at is not None else audit.doubted_at


def _find_key(checkpoint: Checkpoint) -> str:
    """Find the key of a set in a file; empty if it has none."""
    name, stored = next(iter(checkpoint.stored.items()))
    return stored.removesuffix(name).rstrip(".") if stored != name else ""


# --- rules as settings


def _settings_of(rule: DecayRule) -> Settings:
    """Express a rule as settings."""
    if rule.warm_up == POWER_FUNCTION:
        return {"sigma_rels": (round_sigma_rel(main_number(rule), 4),)}
    if rule.is_schedule:
        return {"ema_warmup": warm_up_text(rule)}
    settings: Settings = {"ema_decay": rule.decay}
    if rule.warm_up:
        settings["ema_warmup"] = warm_up_text(rule)
    return settings


def _find_round(audit: Audit, distance: float) -> Settings:
    """Express the rule that was found as settings, with the nearest one of 1 - 10^-k, 1 - 2 10^-k,
    1 - 5 10^-k and the usual number of a schedule; empty if its time constant is not within a
    relative distance. A decay that still rises fits any higher one."""
    scaled = audit.scaled
    if scaled is None or scaled.is_width:
        return {}
    rule = scaled.fitted
    if scaled.rises:
        rest = 10.0 ** math.floor(math.log10(1 - scaled.parameter) - 1)
    else:
        found = 1 - main_number(rule)
        power = 10.0 ** math.floor(math.log10(found))
        rests = [power, 2 * power, 5 * power, 10 * power]
        if rule.is_schedule:
            rests.append(1 - (RULES[rule.warm_up].usual or 0.0))
        rest = min(rests, key=lambda each: abs(math.log(each / found)))
        is_vague = (audit.uncertainty or 0.0) > _CLEAR
        if is_vague or abs(math.log(rest / found)) > distance:
            return {}
    decay = round(1 - rest, 12)
    return _settings_of(replace(rule, decay=decay, base=decay))


def _check_size(averages: Sequence[Checkpoint]) -> None:
    """Raise InvalidValueError if the weights that would make such averages are far larger than the
    averages.

    The mean of what an average took in since an earlier one is (e' - B e) / (1 - B), with the share
    B that is left of e: it is nearly e' if B is 1.
    """
    for earlier, later in pairwise(averages[-COMPARED_FILES:]):
        kept = 1 - float(later.profile.tail(earlier.t))
        if kept > 0.995:
            continue
        after = first_values(later)
        mean = (after - kept * first_values(earlier)) / (1 - kept)
        if np.linalg.norm(mean) > _LARGE * np.linalg.norm(after):
            reason = f"does not fit: the weights between {earlier.path.name} and {later.path.name} "
            reason += "would be far larger than their average"
            hint = "it rises, is shorter, or numbers are no steps"
            raise InvalidValueError("ema_decay", reason, hint)
