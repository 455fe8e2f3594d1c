"""The averages that an audit looks for: a rule of decay, with a length."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.decay_rules import POWER_FUNCTION, RULES, WARM_UPS, DecayRule, OrdinaryEMA
from posthoc_cli.errors import percent
from posthoc_cli.profiles import (
    FloatArray,
    gamma_from_sigma_rel,
    round_sigma_rel,
    sigma_rel_from_gamma,
)

# The first so many updates are added one by one, and as many groups of later ones: of 1,000,000
# updates a group spans 1.5 %.
_UPDATES = 512
_COPIED = 40.0  # -log of the share that remains after a copy, which is nothing in float64
_RISES = 0.02  # a decay still rises if its limit is longer than its length by more


@dataclass(frozen=True)
class ScaledRule:
    """An average by a rule, or one that is longer by a factor, given by its logarithm.

    If the decay is unknown, a longer average has a longer decay; a known rule is applied less
    often.
    """

    rule: DecayRule  # of the factor 1
    updates: float  # until a checkpoint, by default the newest one
    is_known: bool = False
    log: float = 0.0
    misfit: float = 0.0  # of the intervals to which it was fitted

    @property
    def fitted(self) -> DecayRule:
        """The rule of this length; a known rule as it is."""
        return self.rule if self.is_known else self.rule.longer(math.exp(self.log))

    @property
    def is_width(self) -> bool:
        return self.rule.warm_up == POWER_FUNCTION

    @property
    def what(self) -> str:
        """The name of the parameter."""
        return "sigma_rel" if self.is_width else "decay"

    @property
    def limits(self) -> tuple[float, float]:
        """The logarithms between which a length is searched."""
        if self.is_known:
            return -5.0, 5.0
        if self.is_width:  # at most as long as the mean of all weights
            return 0.0, math.log(max(self.rule.power, 2.0)) - 1e-9
        return -0.5, math.log(100 * max(self.updates, 2.0))

    def forgotten(self, numbers: FloatArray) -> FloatArray:
        """Compute -log of the share that so many updates leave of what was before them: shape of
        `numbers`."""
        most = max(float(numbers.max()), _UPDATES + 1.0)
        first = np.arange(float(_UPDATES))
        ends = np.append(first, np.geomspace(_UPDATES, most, _UPDATES))
        middles = (ends[1:] + ends[:-1] + 1) / 2
        kept = np.maximum(self.fitted.at(middles), math.exp(-_COPIED))
        lost = np.cumsum(-np.log(kept) * np.diff(ends))
        by_number = np.interp(numbers, ends, np.append(0.0, lost))
        return np.asarray(by_number * math.exp(-self.log) if self.is_known else by_number)

    def tails(self, updates: FloatArray) -> FloatArray:
        """Compute what the average after the last of so many updates has from before each of them:
        shape of `updates`."""
        lost = self.forgotten(updates)
        return np.asarray(np.exp(lost - lost[-1]))

    @property
    def last_decay(self) -> float:
        """The share of the average that the last update keeps."""
        before, after = self.forgotten(np.array([self.updates - 1, self.updates])).tolist()
        return math.exp(before - after)

    @property
    def length(self) -> float:
        """The time constant of the last update, in updates."""
        return 1 / max(1 - self.last_decay, 1e-15)

    @property
    def parameter(self) -> float:
        """The decay of the last update, the first decay of a schedule, or the sigma_rel."""
        if self.is_width or self.rule.is_schedule:
            return main_number(self.rule.longer(math.exp(self.log)))
        return self.last_decay

    @property
    def rises(self) -> bool:
        """Whether the decay of an unknown rule has not reached its limit."""
        if self.is_known or self.is_width or self.rule.is_schedule:
            return False
        return 1 / (1 - self.fitted.decay) > (1 + _RISES) * self.length

    def describe(self, sigma: float, every: int, unit: str) -> str:
        """Describe it, with the uncertainty of its length."""
        rule = self.fitted.rule
        if self.is_width:
            return f"sigma_rel {round_sigma_rel(self.parameter, 4):g} (± {percent(sigma)})"
        if self.rule.is_schedule:
            return f"decay by {rule} (± {percent(sigma)} of what an update takes in)"
        taken_in = float(f"{1 - self.last_decay:.3g}")
        text = f"decay {1 - taken_in:.12g}"
        if self.rises:
            return f"{text} at the end, still rising by {rule}"
        text += f", a time constant of {every * self.length:,.4g} {unit} (± {percent(sigma)})"
        if self.rule.warm_up and not self.is_known:
            text += f", reached by {rule}"
        return text


def main_number(rule: DecayRule) -> float:
    """Find the decay after a warm-up, the first decay of a schedule, or the sigma_rel."""
    if rule.warm_up == POWER_FUNCTION:
        return sigma_rel_from_gamma(max(rule.power - 1, 1e-300))
    return rule.base if rule.is_schedule else rule.decay


def claim_text(rule: DecayRule) -> str:
    """Describe a claimed rule."""
    if rule.is_schedule:
        return f"by {rule.rule}"
    text = f"{main_number(rule):.7g}"
    if rule.warm_up not in ("", POWER_FUNCTION):
        text += f", reached by {rule.rule}"
    return text


# --- which averages are looked for


def find_claim(newest: Checkpoint, claimed: float | None, updates: float) -> ScaledRule | None:
    """Find the rule that an average is claimed to follow; None without a claim."""
    if newest.sigma_rel:
        power = gamma_from_sigma_rel(newest.sigma_rel) + 1
        rule = DecayRule(warm_up=POWER_FUNCTION, power=power, copies=1)
        return ScaledRule(rule, updates, is_known=True)
    decay = claimed or newest.decay
    if not decay:
        return None
    rule = newest.profile.rule if isinstance(newest.profile, OrdinaryEMA) else DecayRule()
    return ScaledRule(replace(rule, decay=decay), updates, is_known=True)


def list_rules(updates: float) -> list[ScaledRule]:
    """List an average by each rule of a library, the simplest first; a schedule ends after so many
    updates."""
    rules = [DecayRule(0.5)]
    for name, row in WARM_UPS.items():
        rule = DecayRule(0.5, name, base=0.5, steps=updates)
        if row.is_schedule or row.usual is None:
            rules.append(rule)
        else:
            rules += [rule.with_number(number) for number in (row.usual, *row.others)]
    rules.append(DecayRule(warm_up=POWER_FUNCTION, power=updates, copies=1))
    return [ScaledRule(rule, updates) for rule in rules]


def list_unclaimed(newest: Checkpoint, given: ImportSettings, updates: float) -> list[ScaledRule]:
    """List the rules that an average of unknown decay may have: the one that its file or the
    settings name, else any."""
    rules = list_rules(updates)
    if not isinstance(newest.profile, OrdinaryEMA):
        return rules
    named = newest.profile.rule
    if given.ema_warmup is None:
        if not named.warm_up:
            return rules
        number = RULES[named.warm_up].number
        if newest.updates and number and number not in newest.updates.rule:
            # one of ema-pytorch's powers, which counts calls
            alike = [each for each in rules if each.rule.warm_up == named.warm_up]
            as_named = [
                replace(each.rule, copies=named.copies, stride=named.stride) for each in alike
            ]
            return [ScaledRule(rule, updates) for rule in as_named]
    steps = min(named.steps, updates)
    return [ScaledRule(replace(named, decay=0.5, base=0.5, before=0, steps=steps), updates)]
