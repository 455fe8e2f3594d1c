"""Targets: averages by their width, their decay, a window, a span of time, a decay of the learning rate, or a profile;
and their text form, KIND:VALUE.

A target is independent of the run; its profile follows from the time of the average, the run's clock and the time of
the first update. The constructor checks what does not depend on the run, `profile` the rest. A mean of the last
checkpoints has no profile: its `coefficients_of` returns the coefficients of the stored averages directly.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

import numpy as np

from posthoc_cli.errors import InvalidValueError, brief, check_number, check_word
from posthoc_cli.profiles import (
    SHAPES,
    Clock,
    FloatArray,
    Formula,
    Point,
    PowerFunction,
    Profile,
    StoredProfile,
    check_sigma_rel,
    classical_average,
    emulated_decay,
    step_window,
    try_profile,
    uniform_average,
)

SHORTEST_BETA = 0.5
"""The decay whose average has a mean age, beta / (1 - beta), of one step."""
SHORTEST_SPAN = 1e-9
"""The least duration of `Between`, as a fraction of the time of the average."""


class Target(Protocol):
    """An average that the user wants, independent of the run."""

    @property
    def label(self) -> str:
        """Its name in tables and file names: `0.15`, `beta-0.9999`."""

    @property
    def title(self) -> str:
        """Its name in messages: `sigma_rel 0.15`, `beta:0.9999`."""

    @property
    def sigma_rel(self) -> float | None:
        """The width of a power function; None for any other profile."""

    def profile(self, t: float, clock: Clock, t_first: float) -> Profile:
        """Return the profile at time `t` of a run.

        Arguments:
            t: time of the average, above 0.
            clock: the run's steps over time.
            t_first: time of the run's first update, in (0, t].

        Raises:
            InvalidValueError: the run is too short for the target.
        """


def as_target(value: object) -> Target:
    """Return the target for a sigma_rel, a text that names one target, a target, or an object with `tail`.

    Raises:
        InvalidValueError: the value is none of these.
    """
    names = ("label", "title", "sigma_rel", "profile")
    if all(hasattr(value, name) for name in names) and not isinstance(value, type):  # a class has its instances' names
        return value  # type: ignore[return-value]
    if callable(getattr(value, "tail", None)):
        return GivenProfile(value)  # type: ignore[arg-type]
    if isinstance(value, str):
        targets = parse_targets(value)
        if len(targets) != 1:
            raise InvalidValueError("target", f"must name one average, not {len(targets)}", value=repr(value))
        return targets[0]
    if isinstance(value, numbers.Real) or hasattr(value, "__float__"):
        return SigmaRel(value)  # type: ignore[arg-type]  # its constructor checks the value
    accepted = "a sigma_rel in (0, 0.2887), a text such as 'beta:0.9999', or an object with a function tail(s)"
    raise InvalidValueError("target", f"must be {accepted}", value=brief(value))


class _Named:
    """A target that is named by its text form, from which `parse_targets` makes it; no power function by default."""

    sigma_rel: float | None = None
    text: str

    @property
    def label(self) -> str:
        """The name in tables and file names: `0.15`, `beta-0.9999`, `window-1000`."""
        return self.text.replace(":", "-")

    @property
    def title(self) -> str:
        """The name in messages: `sigma_rel 0.15`, `beta:0.9999`, `window:1000`."""
        return self.text

    def _check(self, name: str, kind: str, is_valid: Callable[[float], bool], accepted: str) -> None:
        """Check the number in a field, and make it a float."""
        object.__setattr__(self, name, check_number(kind, getattr(self, name), is_valid, accepted))


def _is_count(value: float) -> bool:
    return 1 <= value < math.inf and value == math.floor(value)


def _plain(*values: float) -> str:
    return ":".join(f"{value:.12g}" for value in values)


def _ends_in_time(target: _Named, end: float, t: float) -> None:
    """Raise an InvalidValueError if a target ends after the time of the average."""
    if end > t:
        raise InvalidValueError("target", f"ends after t = {t:,.12g}; must end at t or before", value=target.title)


@dataclass(frozen=True)
class SigmaRel(_Named):
    """The power function with a width in (0, 0.2887), a fraction of training time."""

    sigma_rel: float = field()

    def __post_init__(self) -> None:
        given = self.sigma_rel
        try:
            object.__setattr__(self, "sigma_rel", check_sigma_rel(given))
        except InvalidValueError as error:
            if isinstance(given, numbers.Real) and SHORTEST_BETA <= given < 1:
                raise error.with_hint(f"for a decay of {float(given)!r} per step use beta:{float(given)!r}") from error
            raise

    @property
    def text(self) -> str:  # type: ignore[override]
        """The number alone."""
        return repr(self.sigma_rel)

    @property
    def title(self) -> str:
        """The name in messages: `sigma_rel 0.15`."""
        return f"sigma_rel {self.sigma_rel!r}"

    def profile(self, t: float, clock: Clock, t_first: float) -> PowerFunction:  # noqa: ARG002
        """Return the power function on (0, t]."""
        return PowerFunction.from_sigma_rel(self.sigma_rel, t)


@dataclass(frozen=True)
class Beta(_Named):
    """The classical average with one decay for every step, in [0.5, 1): below 0.5 the mean age is less than a step.

    It starts as a copy of the weights at the first update.
    """

    beta: float

    def __post_init__(self) -> None:
        accepted = f"lie in [{SHORTEST_BETA:g}, 1); below that the mean age is less than one step"
        self._check("beta", "beta", lambda beta: SHORTEST_BETA <= beta < 1, accepted)
        object.__setattr__(self, "text", f"beta:{self.beta!r}")

    def profile(self, t: float, clock: Clock, t_first: float) -> Formula:
        """Return the classical average."""
        return classical_average(self.beta, float(t), clock, min(float(t_first), float(t)))


@dataclass(frozen=True)
class HalfLife(_Named):
    """The classical average in which weights lose half of their share every `steps` steps: decay 0.5**(1 / steps)."""

    steps: float

    def __post_init__(self) -> None:
        self._check("steps", "half-life", lambda steps: 1 <= steps <= 1e15, "be from 1 to 1e15 steps")
        object.__setattr__(self, "text", f"half-life:{_plain(self.steps)}")

    @property
    def beta(self) -> float:
        """The decay of one step."""
        return float(0.5 ** (1 / self.steps))

    def profile(self, t: float, clock: Clock, t_first: float) -> Formula:
        """Return the classical average."""
        return Beta(self.beta).profile(t, clock, t_first)


@dataclass(frozen=True)
class HalfLifeShare(_Named):
    """The power function whose half-life is a share f of the training so far: gamma + 1 = ln 2 / f.

    torchtitan's `half_life_fraction` and arXiv 2602.03702 name averages so; f = 0.05 is sigma_rel 0.0629.
    """

    share: float

    def __post_init__(self) -> None:
        reason = f"lie in (0, {math.log(2):.2%}), a share of training; the bound is the uniform average"
        self._check("share", "half-life", lambda share: 0 < share < math.log(2), reason)
        object.__setattr__(self, "text", f"half-life:{_plain(100 * self.share)}%")
        object.__setattr__(self, "sigma_rel", check_sigma_rel(self.profile(1.0).sigma_rel))

    def profile(self, t: float, clock: Clock | None = None, t_first: float = 0.0) -> PowerFunction:  # noqa: ARG002
        """Return the power function on (0, t]."""
        return PowerFunction(math.log(2) / self.share - 1, t)


@dataclass(frozen=True)
class Window(_Named):
    """The mean of the last `steps` steps: a whole number from 1 to the run's number of steps."""

    steps: int

    def __post_init__(self) -> None:
        self._check("steps", "window", _is_count, "be a whole number of steps, at least 1")
        object.__setattr__(self, "steps", int(self.steps))
        object.__setattr__(self, "text", f"window:{self.steps}")

    def profile(self, t: float, clock: Clock, t_first: float) -> Formula:  # noqa: ARG002
        """Return the mean of the last `steps` steps up to `t`."""
        if self.steps > (count := float(clock.step_at(t))):
            reason = f"the run has {math.floor(count):,} steps up to t = {t:,.12g}; must be at most that"
            raise InvalidValueError("target", reason, value=self.title)
        return step_window(self.steps, float(t), clock)


@dataclass(frozen=True)
class Between(_Named):
    """The mean of all weights from time `start` to time `end`, on the run's clock: 0 <= start < end."""

    start: float
    end: float

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            self._check(name, "between", math.isfinite, "be finite")
        ends = _plain(self.start, self.end)
        if not 0 <= self.start < self.end:
            raise InvalidValueError("between", "must start at 0 or later, and end after its start", value=ends)
        object.__setattr__(self, "text", f"between:{ends}")

    def profile(self, t: float, clock: Clock, t_first: float) -> Formula:  # noqa: ARG002
        """Return the uniform profile over the span."""
        _ends_in_time(self, self.end, t)
        if self.end - self.start < SHORTEST_SPAN * t:
            reason = f"must span at least {SHORTEST_SPAN:g} of t = {t:,.12g}"
            raise InvalidValueError("target", reason, value=self.title)
        return uniform_average(self.start, self.end)


@dataclass(frozen=True)
class Decay(_Named):
    """The average that emulates a decay of the learning rate that was not run (see `profiles.emulated_decay`).

    The weights are those of a run whose updates at time s are multiplied by d(x), with x = (s - start) / (end - start),
    if the updates themselves are otherwise the same:

        "1-sqrt"   d(x) = 1 - sqrt(x)
        "linear"   d(x) = 1 - x
        "cosine"   d(x) = (1 + cos(pi x)) / 2

    Arguments:
        shape: one of these.
        over: the fraction of training at its end, in (0, 1], or two times (start, end) on the run's clock.

    Raises:
        InvalidValueError: an unknown shape, or a part of training that is out of range.
    """

    shape: str = "1-sqrt"
    over: float | tuple[float, float] = 0.2

    def __post_init__(self) -> None:
        check_word("decay", self.shape, SHAPES)
        is_span = isinstance(self.over, tuple)
        ends: tuple[Any, ...] = self.over if isinstance(self.over, tuple) else (0.0, self.over)
        accepted = "be a part of training in (0, 1], such as 0.2, or two ascending times"
        most = math.inf if is_span else 1.0
        last = ends[-1] if len(ends) == 2 else None
        end = check_number("over", last, lambda end: last is not None and 0 <= ends[0] < end <= most, accepted)
        object.__setattr__(self, "over", (float(ends[0]), end) if is_span else end)
        part = _plain(float(ends[0]), end) if is_span else f"{_plain(100 * end)}%"
        object.__setattr__(self, "text", f"decay:{self.shape}:{part}")

    def profile(self, t: float, clock: Clock, t_first: float) -> Formula:  # noqa: ARG002
        """Return the decay up to `t`, or over the given times."""
        start, end = self.over if isinstance(self.over, tuple) else (t * (1 - self.over), t)
        _ends_in_time(self, end, t)
        return emulated_decay(start, end, self.shape)


@dataclass(frozen=True)
class GivenProfile(_Named):
    """Any object with a function `tail`, see `profiles.Profile`.

    Attributes:
        given: the object; its mass must lie within (0, t] of the run, and may end before t.
        text: its name in tables and file names: letters, digits and `._+-`, starting with a letter or digit.
    """

    given: Profile
    text: str = "given"

    def __post_init__(self) -> None:
        if not (isinstance(self.text, str) and re.fullmatch(r"\w[\w.+-]*", self.text)):
            reason = "the name must be letters, digits and ._+-, a letter or digit first"
            raise InvalidValueError("profile", reason, value=brief(self.text))

    @property
    def title(self) -> str:
        """The name in messages: `profile given`."""
        return f"profile {self.text}"

    def profile(self, t: float, clock: Clock, t_first: float) -> Profile:  # noqa: ARG002
        """Check the object's values and return it."""
        try_profile(self.given, float(t), self.title)
        return self.given


# --- targets without a profile of their own ---------------------------------------------------------


@dataclass(frozen=True)
class Groups(_Named):
    """Averages with different lengths by tensor: sigma_rels by glob on the tensors' names; the first match counts.

    `Groups({"unet.up.*": 0.12, "*": 0.08})`
    """

    widths: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.widths or not all(isinstance(glob, str) for glob in self.widths):
            accepted = "must be globs on names, each with its sigma_rel, such as {'unet.*': 0.1}"
            raise InvalidValueError("group", accepted, value=brief(self.widths))
        widths = {glob: check_sigma_rel(width, "group") for glob, width in self.widths.items()}
        object.__setattr__(self, "widths", widths)
        object.__setattr__(self, "text", f"groups:{':'.join(map(repr, widths.values()))}")

    @property
    def title(self) -> str:
        """The name in messages: `sigma_rel 0.12 (unet.up.*), 0.08 (*)`."""
        return "sigma_rel " + ", ".join(f"{width!r} ({glob})" for glob, width in self.widths.items())

    def profile(self, t: float, clock: Clock, t_first: float) -> Profile:  # noqa: ARG002
        """Raise an InvalidValueError: each group has its own profile."""
        raise InvalidValueError(self.title, "has a profile for each group; name one sigma_rel")


def separate(targets: Sequence[Target]) -> list[Target]:
    """Return the targets, with each `Groups` replaced by the power functions of its groups."""
    single: list[Target] = []
    for target in targets:
        single += map(SigmaRel, target.widths.values()) if isinstance(target, Groups) else [target]
    return single


@dataclass(frozen=True)
class Mean(_Named):
    """The plain mean of the last checkpoints at or before the time of the average, whatever their distances.

    In a run without checkpoints and with a single tracked profile, it is the mean of that profile's last snapshots.
    """

    last: int

    def __post_init__(self) -> None:
        self._check("last", "last", _is_count, "be a whole number of checkpoints, at least 1")
        object.__setattr__(self, "last", int(self.last))
        object.__setattr__(self, "text", f"last:{self.last}")

    def profile(self, t: float, clock: Clock, t_first: float) -> Profile:  # noqa: ARG002
        """Raise an InvalidValueError: the mean is one of checkpoints, whatever their profiles."""
        reason = "names checkpoints, and has no profile without them"
        raise InvalidValueError("target", reason, value=self.title)

    def coefficients_of(self, stored: Sequence[StoredProfile]) -> FloatArray:
        """Return the coefficients of stored averages, in their order: 1 / last for the last ones, otherwise 0.

        Raises:
            InvalidValueError: there are fewer checkpoints, or none but more than one average at each time.
        """
        points = [isinstance(profile, Point) for profile in stored]
        if not any(points) and len({profile.t for profile in stored}) < len(stored):
            reason = "is for checkpoints; this run has none, but more than one average at each time"
            raise InvalidValueError("target", reason, value=self.title)
        usable = [index for index, is_point in enumerate(points) if is_point == any(points)]
        if len(usable) < self.last:
            raise InvalidValueError("target", f"the run has only {len(usable)} up to this time", value=self.title)
        coefficients = np.zeros(len(stored))
        coefficients[sorted(usable, key=lambda index: stored[index].t)[-self.last :]] = 1 / self.last
        return coefficients


# --- text form


FORMS = {
    "beta": "beta:0.9999", "half-life": "half-life:5000", "window": "window:1000", "between": "between:50000:80000",
    "last": "last:10", "decay": "decay:linear:20%",
}  # fmt: skip
"""The kinds of targets other than sigma_rel: an example of each, and its meaning. All take lists and ranges."""

MOST_VALUES = 10_000
_MOST_DIGITS = 1_000
"""Limit of the digits before and after the point: far more than a float has, and few enough for exact arithmetic."""
NUMBER_FORMS = {
    "beta": "a number, a list such as 0.999,0.9999 or a range such as 0.99:0.999:0.003",
    "half-life": "a number of steps or a share such as 5%, a list such as 500,1000 or a range such as 500:2000:500",
    "window": "a whole number of steps, a list such as 500,1000 or a range such as 500:2000:500",
    "last": "a whole number of checkpoints, a list such as 5,10 or a range such as 5:20:5",
}
_SIGMA_FORMS = "a number, a list such as 0.05,0.10 or 0.05,0.06,...,0.25, or a range such as 0.05:0.25:0.05"


def parse_targets(text: str, name: str = "target") -> list[Target]:
    """Return the distinct targets of a text KIND:VALUES, see `FORMS`, or of numbers, which are sigma_rels.

    VALUES are a number, a list 0.999,0.9999 or a range START:STOP:STEP (for `decay` in percent); `between` and `decay`
    take lists of START:END. For other texts, raise an InvalidValueError about `name` that says what is accepted.
    """
    kind, colon, rest = (part.strip() for part in text.partition(":"))
    targets: list[Target]
    try:
        if not colon or kind not in FORMS:
            if any(character.isalpha() for character in kind):
                forms = ", ".join(FORMS.values())
                raise bad(name, text, f"must be a sigma_rel in (0, 0.2887), or one of {forms}")
            return [SigmaRel(width) for width in _numbers(text, _SIGMA_FORMS)]
        if kind == "between":
            targets = [Between(*_ends(part)) for part in rest.split(",")]
        elif kind == "decay":
            targets = [*_decays(rest)]
        elif kind == "half-life" and "%" in rest:
            targets = [HalfLifeShare(number / 100) for number in _numbers(rest.replace("%", ""), NUMBER_FORMS[kind])]
        else:
            make: dict[str, Callable[[Any], Target]] = {
                "beta": Beta, "half-life": HalfLife, "window": Window, "last": Mean,
            }  # fmt: skip
            values = _numbers(rest, NUMBER_FORMS[kind])
            targets = [make[kind](int(value) if value.is_integer() else value) for value in values]
    except InvalidValueError as error:
        number = f"{error.value} " * (error.subject != name and "," in text)  # of a list, the number that is refused
        raise bad(name, text, number + error.reason, error.hint) from error
    return list(dict.fromkeys(targets))


def parse_numbers(text: str, name: str, form: str = _SIGMA_FORMS) -> list[float]:
    """Return the distinct numbers of `0.05,0.10`, `0.05:0.25:0.05` or `0.05,0.06,...,0.25`, in the order given.

    Steps are exact decimals, so that `0.05:0.25:0.05` ends at 0.25 and contains 0.15, not 0.15000000000000002. If the
    text is not accepted, raise an InvalidValueError about `name` that describes the accepted `form`.
    """
    try:
        return _numbers(text, form)
    except InvalidValueError as error:
        raise bad(name, text, error.reason) from error


def bad(name: str, text: str, reason: str, hint: str = "") -> InvalidValueError:
    """Return the error for an argument or option whose text is not accepted."""
    return InvalidValueError(name, reason, hint, value=text.strip() or "(empty)")


def _numbers(text: str, form: str) -> list[float]:
    """Return the distinct numbers of a text, see `parse_numbers`; raise an InvalidValueError about `form`."""
    items = [item.strip() for item in text.split(",")]
    numbers: list[Decimal] = []
    for index, item in enumerate(items):
        ends = item.split(":")
        if item == "..." and 2 <= index < len(items) - 1:
            last, step = numbers[-1], numbers[-1] - numbers[-2]
            numbers += _steps(last + step, _decimal(items[index + 1], form), step)
        elif len(ends) == 3:
            numbers += _steps(*(_decimal(end, form) for end in ends))
        else:
            numbers.append(_decimal(item, form))
    return list(dict.fromkeys(map(float, numbers)))


def _decays(text: str) -> Iterator[Decay]:
    """Yield the decays of `linear:20%`, `linear:10%,20%`, `linear:5%:50%:5%` or `linear:50000:80000`."""
    shape, _, parts = text.partition(":")
    form = "decay:SHAPE:PART with a shape of " + ", ".join(SHAPES) + ", and 20%, a list, a range or START:END"
    if shape not in SHAPES or not parts:
        raise InvalidValueError(text, f"must be {form}")
    for part in parts.split(","):
        if ":" in part and "%" not in part:
            yield Decay(shape, _ends(part))
        else:
            unit = 100 if "%" in part else 1
            yield from (Decay(shape, number / unit) for number in _numbers(part.replace("%", ""), form))


def _ends(text: str) -> tuple[float, float]:
    form = "START:END, two training times, such as 50000:80000"
    start, _, end = text.partition(":")
    return float(_decimal(start, form)), float(_decimal(end, form))


def _decimal(text: str, form: str) -> Decimal:
    """Return a finite number of a moderate size; raise an InvalidValueError about `form` for anything else."""
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or abs(number.adjusted()) > _MOST_DIGITS or math.isinf(float(number)):
        raise InvalidValueError(text, f"must be {form}")
    return number


def _steps(start: Decimal, stop: Decimal, step: Decimal) -> list[Decimal]:
    """Return start, start + step, ... up to stop, at most `MOST_VALUES` numbers."""
    if step == 0 or (stop - start) * step < 0:
        raise InvalidValueError("step", "the step must lead from the start to the stop, and not be 0")
    count = int((stop - start) / step) + 1
    if count > MOST_VALUES:
        raise InvalidValueError("step", f"makes more than {MOST_VALUES:,} values")
    return [start + index * step for index in range(count)]
