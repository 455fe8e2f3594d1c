"""The settings that an import adds to what files say themselves."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from posthoc_cli.checkpoints import KINDS
from posthoc_cli.checkpoints.content import Tensors
from posthoc_cli.checkpoints.names import read_number
from posthoc_cli.decay_rules import POWER_FUNCTION, RULES, UNLIMITED, WARM_UPS, DecayRule, WarmUp
from posthoc_cli.errors import InvalidValueError, abbreviate, at_most_one
from posthoc_cli.profiles import check_sigma_rel, gamma_from_sigma_rel
from posthoc_cli.snapshots.decoding import Count, convert, field_kinds
from posthoc_cli.snapshots.selection import Selection, make_selection
from posthoc_cli.snapshots.source import Rule

Arguments = dict[str, Any]
"""Arguments of `DecayRule`, or values by name."""


def _groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error:
        return 0


def _half_life(value: Any) -> float:
    """Read the number in "half-life:500000" or "half-life:5%"; 0 for any other value."""
    if not isinstance(value, str) or not value.startswith("half-life:"):
        return 0.0
    return read_number(value.removeprefix("half-life:").removesuffix("%")) or 0.0


FOUND = "found"
"""The `ema_decay` that takes what the files show."""


def _check_decay(value: Any) -> Any:
    """Return a decay, one of NumPy as a plain float; raise ValueError for what is none."""
    if isinstance(value, int | float) and 0 < value < 1:
        return float(value)
    if value != FOUND and not _half_life(value):
        raise ValueError(
            "must be in (0, 1), 0.99 for 99%, a half-life such as half-life:500000 or "
            "half-life:5%, or found"
        )
    return value


def parse_warm_up(text: str) -> Arguments | None:
    """Parse "none", "ratio" or "power:0.75" to arguments of `DecayRule`; None for any other
    text."""
    name, colon, number = text.partition(":")
    if name == "none" and not colon:
        return {"warm_up": ""}
    if name not in WARM_UPS:
        return None
    row = WARM_UPS[name]
    if not row.number:
        return None if colon else {"warm_up": name}
    value = read_number(number) if colon else row.usual
    if not value or (row.is_schedule and value >= 1):
        return None
    return {"warm_up": name, row.number: float(value)}


def warm_up_text(rule: DecayRule) -> str:
    """Write the warm-up of a rule as `parse_warm_up` reads it; "none" for none."""
    if rule.warm_up not in WARM_UPS:
        return "none"
    row = WARM_UPS[rule.warm_up]
    number = getattr(rule, row.number) if row.number else None
    return rule.warm_up if number == row.usual else f"{rule.warm_up}:{number:.12g}"


def _warm_up_names() -> str:
    """List the names of the rules, with the numbers that they have by default."""
    names = ["none"]
    for name, row in WARM_UPS.items():
        names.append(f"{name}[:{round(row.usual, 3):g}]" if row.usual else name)
    return ", ".join(names)


_Kind = Annotated[str, Rule(f"one of {', '.join(KINDS)}", lambda kind: kind in KINDS)]
_Pattern = Annotated[
    str,
    Rule(
        r"a regular expression with one group, for the step, such as 'step(\d+)'",
        lambda text: _groups(text) == 1,
    ),
]
_FirstEpoch = Annotated[int, Rule("0 or 1", lambda epoch: epoch in (0, 1))]
_WarmUp = Annotated[
    str,
    Rule(
        f"one of {_warm_up_names()}",
        lambda text: parse_warm_up(text) is not None,
    ),
]


@dataclass(frozen=True)
class ImportSettings:
    """What checkpoints do not say themselves, and which of their tensors to take; see the guide
    `layouts`."""

    kind: _Kind | None = None  # None to recognise the kind of each file
    # what to search in a path; its group is the step, also as 1_500 or 1.5k
    step_from: _Pattern | None = None
    include: tuple[str, ...] = ()  # globs on names
    exclude: tuple[str, ...] = ()
    # Widths of power functions: of averages in the order of the numbers in their names, or of the
    # one in each file.
    sigma_rels: tuple[float, ...] = ()
    update_every: Count | None = None  # interval of the updates of an average
    update_after_step: int | None = None  # the step after which they began
    # of ordinary EMAs, in (0, 1), or "half-life:500000" in steps or images, or in %, or `FOUND`
    ema_decay: Annotated[Any, _check_decay] | None = None
    # one of `WARM_UPS`, perhaps with its number, as "power:0.75"; "none" for none
    ema_warmup: _WarmUp | None = None
    steps: Count | None = None  # of the whole training, after which a scheduled decay is 1
    last_step: Count | None = None  # the last checkpoint's, if an import takes it as `steps`
    # relative, of the time constant, if an import found the decay
    ema_uncertainty: float | None = None
    # the same of a given decay, if an import found another one, but not clearly, or if programs
    # that call the average so have another rule
    ema_doubt: float | None = None
    # the last checkpoint's time by which the average had begun again, if an import found that
    ema_restart: float | None = None
    steps_per_epoch: Count | None = None  # for files whose numbers are epochs
    first_epoch: _FirstEpoch | None = None  # the number of their first epoch
    average: str | None = None  # key or prefix of the average's tensors in a file, such as "ema"
    weights: str | None = None  # and of the weights'
    # steps of files that hold these two in exchanged places
    exchanged: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        globs = make_selection(self.include, self.exclude, "copy")
        object.__setattr__(self, "include", globs.include)
        object.__setattr__(self, "exclude", globs.exclude)
        for name, kind in field_kinds(ImportSettings).items():
            value = getattr(self, name)
            try:
                listed = tuple(value) if isinstance(value, list | np.ndarray) else value
                object.__setattr__(self, name, convert(listed, kind))
            except ValueError as error:
                raise InvalidValueError(
                    name, str(error).partition(", not ")[0], value=abbreviate(value)
                ) from None
        for sigma_rel in self.sigma_rels:
            check_sigma_rel(sigma_rel, "sigma_rels")
        at_most_one(sigma_rels=self.sigma_rels or None, ema_decay=self.ema_decay)
        at_most_one(sigma_rels=self.sigma_rels or None, ema_warmup=self.ema_warmup)
        if self.warm_up_row.is_schedule and self.ema_decay is not None:
            reason = f"has no place beside ema_warmup {self.ema_warmup}, which has its own"
            raise InvalidValueError("ema_decay", reason, value=self.ema_decay)

    @property
    def warm_up_row(self) -> WarmUp:
        """The rule that `ema_warmup` names, or a constant decay."""
        name, _, _ = (self.ema_warmup or "none").partition(":")
        return RULES[name.replace("none", "")]

    def rule(self, every: float = 1.0) -> Arguments:
        """Collect the given arguments of `DecayRule` for an ordinary EMA that is updated at this
        interval."""
        rule: Arguments = {}
        if half_life := _half_life(self.ema_decay):
            rule["decay"] = 0.5 ** (every / half_life)
            if str(self.ema_decay).endswith("%"):
                rule = {"decay": UNLIMITED, "warm_up": "ramp-up", "power": half_life / 100}
        elif self.ema_decay not in (None, FOUND):
            rule["decay"] = self.ema_decay
        elif self.sigma_rels:
            power = gamma_from_sigma_rel(self.sigma_rels[0]) + 1
            rule = {"decay": UNLIMITED, "warm_up": POWER_FUNCTION, "power": power, "copies": 1}
        others = {
            "uncertainty": self.ema_uncertainty or self.ema_doubt,
            "restart": self.ema_restart,
            "steps": self.steps or self.last_step,
        }
        rule |= {name: value for name, value in others.items() if value is not None}
        return rule | (parse_warm_up(self.ema_warmup or "") or {})

    @property
    def given(self) -> Arguments:
        """The settings that differ from their defaults, as plain values for JSON."""
        return {name: value for name, value in vars(self).items() if value not in (None, "", ())}

    @property
    def without_findings(self) -> ImportSettings:
        """The settings without what an import found: with more files it finds
        others."""
        names = ["last_step", "ema_doubt", "ema_restart"]
        if self.ema_uncertainty is not None:
            names += ["ema_decay", "ema_warmup", "sigma_rels", "ema_uncertainty"]
        return replace(self, **{name: getattr(UNSPECIFIED, name) for name in names})

    def command(self, place: object, number: int = 1, **changes: object) -> str:
        """Write the command line of an import of a place with these settings, some of them
        changed, into the first free folder, or the next one, by its number."""
        text = str(place)
        words = ["ema", "import", f"./{text}" if text.startswith("-") else text]
        for name, value in (self.without_findings.given | changes).items():
            if value in ((), None):
                continue
            option = "--from" if name == "kind" else f"--{name.replace('_', '-')}"
            if name in ("include", "exclude"):
                for glob in value:
                    words += [option, glob]
            elif isinstance(value, tuple):
                words += [option, ",".join(map(str, value))]
            else:
                words += [option, str(value)]
        names = chain(["run"], (f"run-{suffix}" for suffix in count(2)))
        free = (name for name in names if not Path(name).exists())
        return shlex.join([*words, "--out", next(islice(free, number - 1, None))])

    @property
    def selection(self) -> Selection:
        """What `include` and `exclude` choose of the names."""
        return make_selection(self.include, self.exclude, "copy")

    def select(self, tensors: Tensors) -> Tensors:
        names = self.selection.names
        selected = {name: tensor for name, tensor in tensors.items() if names(name)}
        if tensors and not selected:
            raise InvalidValueError("include and exclude", "leave no tensor of the model")
        return selected


UNSPECIFIED = ImportSettings()
