"""What `ema import` may be told of other programs' files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from posthoc_cli.checkpoints import KINDS
from posthoc_cli.checkpoints.ema_formats import Tensors
from posthoc_cli.checkpoints.read_step import read_number
from posthoc_cli.errors import InvalidValueError, brief, check_count, check_word
from posthoc_cli.profiles import check_sigma_rel
from posthoc_cli.profiles.other_libraries import POWER, RAMP_UP, WARM_UPS, Decay
from posthoc_cli.snapshots.selection import check_globs, make_selection


@dataclass(frozen=True)
class Settings:
    """What checkpoints do not say themselves, and which of their tensors to take.

    Attributes:
        kind: one of `checkpoints.KINDS`; None to find that of each file.
        step_from: a regular expression whose group is the step, searched in a path; it may be 1_500 or 1.5k, too.
        prefix: what names of the model's tensors begin with; it is left out of the names.
        include, exclude: globs on the names that remain.
        sigma_rels: widths of the averages of `ema-pytorch` or `posthoc-ema`, in the order of their numbers.
        update_every, update_after_step: settings of these libraries; torchtitan's `update_every_n_steps`, `start_step`.
        ema_decay: of ordinary EMAs, in (0, 1), or "half-life:500000" in steps or images; `update_every` is theirs, too.
        ema_warmup: "ratio" of (1 + n) / (10 + n), "power" of 1 - (1 + n)**(-2/3), "power:0.75" of another power, or
            "ramp-up" of a half-life that is 0.05 of the training so far, "ramp-up:0.1" of another share.
        ema_restarts: steps at which an ordinary EMA began again from the weights.
        ema_uncertainty: of the time constant, relative, where the decay was found.
        ema_late: steps by which each of `ema_restarts` may be later, where they were found.
        steps_per_epoch: where files know only the epoch.
    """

    kind: str | None = None
    step_from: str | None = None
    prefix: str = ""
    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = None
    sigma_rels: Sequence[float] = ()
    update_every: int | None = None
    update_after_step: int | None = None
    ema_decay: float | str | None = None
    ema_warmup: str | None = None
    ema_restarts: Sequence[int] = ()
    ema_uncertainty: float | None = None
    ema_late: int | None = None
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        if self.kind is not None:
            check_word("kind", self.kind, KINDS)
        if not isinstance(self.sigma_rels, Iterable):
            raise InvalidValueError("sigma_rels", "must be a list of widths", value=brief(self.sigma_rels))
        for sigma_rel in self.sigma_rels:
            check_sigma_rel(sigma_rel)
        for name, least in (("update_every", 1), ("update_after_step", 0), ("steps_per_epoch", 1)):
            if (value := getattr(self, name)) is not None:
                check_count(name, value, least)
        self.rule()
        if any(type(step) is not int or step < 1 for step in self.ema_restarts):
            raise InvalidValueError("ema_restarts", "must be steps, above 0", value=f"{self.ema_restarts!r}")
        if not isinstance(self.prefix, str):
            raise InvalidValueError("prefix", "must be a text", value=brief(self.prefix))
        groups = 0
        with suppress(re.error, TypeError):
            groups = 1 if self.step_from is None else re.compile(self.step_from).groups
        if groups != 1:
            reason = r"must be a regular expression with one group, for the step, such as 'step(\d+)'"
            raise InvalidValueError("step_from", reason, value=self.step_from or "")
        selection = make_selection(self.include, self.exclude, "copy")
        plain = {"include": selection.include, "exclude": selection.exclude}
        plain |= {name: tuple(getattr(self, name)) for name in ("sigma_rels", "ema_restarts")}
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def rule(self, every: float = 1.0) -> dict[str, Any]:
        """What is given of the decays of an ordinary EMA that is updated so often, as arguments of `Decay`."""
        rule: dict[str, Any] = {}
        if isinstance(self.ema_decay, str):
            half_life = read_number(self.ema_decay.removeprefix("half-life:")) or 0.0
            if half_life <= 0:
                reason = "must lie in (0, 1), or be a half-life such as half-life:500000"
                raise InvalidValueError("ema_decay", reason, value=repr(self.ema_decay))
            rule["decay"] = 0.5 ** (every / half_life)
        elif self.ema_decay is not None:
            rule["decay"] = self.ema_decay
            Decay(self.ema_decay)
        if self.ema_uncertainty is not None:
            rule["uncertainty"] = self.ema_uncertainty
            Decay(0.5, uncertainty=self.ema_uncertainty)
        if self.ema_warmup is not None:
            kind, colon, text = self.ema_warmup.partition(":")
            usual = {"power": POWER, "ramp-up": RAMP_UP}.get(kind)
            number = read_number(text) if colon else usual
            if kind not in WARM_UPS or (kind == "ratio") is (number is not None) or number == 0:
                reason = f"must be one of {', '.join(WARM_UPS)}, or as power:0.75, ramp-up:0.1"
                raise InvalidValueError("ema_warmup", reason, value=repr(self.ema_warmup))
            rule |= {"warm_up": kind} | ({} if number is None else {"power": float(number)})
        return rule

    @property
    def given(self) -> dict[str, Any]:
        """Those that differ from their defaults, as plain values for JSON."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {name: value for name, value in values.items() if value not in (None, "", [])}

    @property
    def said(self) -> Settings:
        """The same without a decay that was found, and what was found with it: more files show another one."""
        found = self.ema_uncertainty is not None
        return (
            replace(self, ema_decay=None, ema_warmup=None, ema_restarts=(), ema_uncertainty=None, ema_late=None)
            if found
            else self
        )

    def chosen(self, found: Tensors, but: Collection[str] = ()) -> Tensors:
        """The tensors that `include` and `exclude` leave, without those named in `but`."""
        selection = make_selection(self.include, self.exclude, "copy")
        check_globs(selection, found)
        chosen = {name: find for name, find in found.items() if selection.names(name) and name not in but}
        if not chosen:
            raise InvalidValueError("include and exclude", "leave no tensor of the model")
        return chosen


UNSPECIFIED = Settings()
