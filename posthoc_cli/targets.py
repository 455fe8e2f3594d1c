"""Targets: averages by their width, their decay, a window, a decay of the learning rate, or a
profile; and their text form, KIND:VALUES, by the table `KINDS`.

A target is independent of the run; its profile follows from the time of the average, the run's
clock and the time of the first update. The classes check what does not depend on the run when a
target is made, and the rest in `Target.profile`.
"""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError, brief, check_number, check_word, likely
from posthoc_cli.profiles import (
    Clock,
    FloatArray,
    Point,
    PowerFunction,
    Profile,
    StoredProfile,
    check_sigma_rel,
)

SHORTEST_BETA = 0.5  # the decay whose average has a mean age, beta / (1 - beta), of one step

Function = Callable[[FloatArray], FloatArray]

SHAPES: dict[str, Function] = {
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}
"""The multiplier d(x) at the fraction x of a decay, from 1 down to 0."""


@dataclass(frozen=True)
class Formula:
    """A profile given by its tail in closed form for times from 0 to the time of the average.

    The tail is 1 before 0 and 0 from `t` on. In between the formula must never grow; its values
    outside [0, 1] are clipped.
    """

    formula: Function
    t: float

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        times = np.asarray(s, dtype=np.float64)
        inside = np.clip(times, 0.0, self.t)
        values = self.formula(inside)
        tail = np.clip(values, 0.0, 1.0)
        tail = np.where(times >= self.t, 0.0, tail)
        return np.where(times < 0, 1.0, tail)


class Target:
    """An average that the user wants: one of the classes below.

    Attributes:
        title: its name in messages, `sigma_rel 0.15`; or its text form, `beta:0.9999`.
        label: its name in tables and file names: `0.15`, `beta-0.9999`.
        sigma_rel: the width of a power function; None for any other profile.
        beta: the decay of one step of a classical average; None for any other profile.
        counts_steps: whether it depends on how many steps there were in a time.
    """

    sigma_rel: float | None = None
    beta: float | None = None
    counts_steps = False

    def __init__(self, title: str) -> None:
        self.title = title
        self.label = title.replace(":", "-")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), self.title))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.title}>"

    def profile(
        self,
        t: float,
        clock: Clock,
        t_first: float,
    ) -> Profile:
        """Return the profile at a time `t` of a run whose first update was at `t_first`, in (0, t].

        Raises:
            InvalidValueError: the run is too short for the target, or the target has no profile of
                its own.
        """
        raise NotImplementedError

    def _error(self, reason: str) -> InvalidValueError:
        return InvalidValueError("target", reason, value=self.title)


class SigmaRel(Target):
    """The power function with a width in (0, 0.2887), a fraction of training time."""

    sigma_rel: float

    def __init__(self, sigma_rel: float) -> None:
        try:
            self.sigma_rel = check_sigma_rel(sigma_rel)
        except InvalidValueError as error:
            if isinstance(sigma_rel, numbers.Real) and SHORTEST_BETA <= sigma_rel < 1:
                decay = repr(float(sigma_rel))
                hint = f"for a decay of {decay} per step use beta:{decay}"
                raise error.with_hint(hint) from error
            raise
        super().__init__(f"sigma_rel {self.sigma_rel!r}")
        self.label = repr(self.sigma_rel)

    def profile(
        self,
        t: float,
        clock: Clock,
        t_first: float,
    ) -> Profile:
        return PowerFunction.from_sigma_rel(self.sigma_rel, float(t))


class HalfLifeShare(SigmaRel):
    """The power function whose half-life is a share f of the training so far: gamma + 1 = ln 2 / f.

    torchtitan's `half_life_fraction` and arXiv 2602.03702 name averages so; f = 0.05 is sigma_rel
    0.0629.
    """

    def __init__(self, share: float) -> None:
        most = math.log(2)
        accepted = f"lie in (0, {most:.2%}), a share of training; the bound is the uniform average"
        share = check_number("half-life", share, lambda value: 0 < value < most, accepted)
        power = PowerFunction(most / share - 1, 1.0)
        super().__init__(power.sigma_rel)
        Target.__init__(self, f"half-life:{_plain(100 * share)}%")


class Beta(Target):
    """The classical average x <- beta x + (1 - beta) theta at every step, with a beta in [0.5, 1).

    Below 0.5 the mean age is less than a step. It starts as a copy of the weights at the first
    update. With n(s) the step at time s, the mass after s is 1 - beta**(n(t) - n(s)).
    """

    beta: float
    counts_steps = True

    def __init__(self, beta: float) -> None:
        accepted = f"lie in [{SHORTEST_BETA:g}, 1); below that the mean age is less than one step"
        self.beta = check_number("beta", beta, lambda value: SHORTEST_BETA <= value < 1, accepted)
        super().__init__(f"beta:{self.beta!r}")

    def profile(
        self,
        t: float,
        clock: Clock,
        t_first: float,
    ) -> Profile:
        now = float(clock.step_at(t))
        start = min(float(t_first), t)
        rate = math.log(self.beta)  # the logarithm keeps the digits of a beta near 1

        def tail(s: FloatArray) -> FloatArray:
            ages = np.maximum(now - clock.step_at(s), 0.0)
            later = -np.expm1(rate * ages)
            # all mass before the first update is on the value then
            return np.where(s < start, 1.0, later)

        return Formula(tail, float(t))


class HalfLife(Beta):
    """The classical average in which weights lose half of their share every `steps` steps, from 1
    to 1e15."""

    def __init__(self, steps: float) -> None:
        accepted = "be from 1 to 1e15 steps"
        self.steps = check_number("half-life", steps, lambda n: 1 <= n <= 1e15, accepted)
        rate = 1 / self.steps
        self.beta = float(0.5**rate)
        Target.__init__(self, f"half-life:{_plain(self.steps)}")


class Window(Target):
    """The mean of the last `steps` steps: a whole number from 1 to the run's number of steps."""

    counts_steps = True

    def __init__(self, steps: int) -> None:
        accepted = "be a whole number of steps, at least 1"
        self.steps = int(check_number("window", steps, _is_count, accepted))
        super().__init__(f"window:{_plain(self.steps)}")

    def profile(
        self,
        t: float,
        clock: Clock,
        t_first: float,
    ) -> Profile:
        now = float(clock.step_at(t))
        if self.steps > now:
            most = math.floor(now)
            raise self._error(
                f"the run has {most:,} steps up to t = {t:,.12g}; must be at most that"
            )

        def tail(s: FloatArray) -> FloatArray:
            ages = now - clock.step_at(s)
            return ages / self.steps

        return Formula(tail, float(t))


class Decay(Target):
    """The average that emulates a decay of the learning rate that was not run.

    An average multiplies the update at time s by tail(s). So one with tail(s) = d(x), x = (s -
    start) / (end - start), equals the weights of a run whose learning rate is multiplied by d from
    `start` on, if the updates themselves are otherwise the same. `SHAPES` has d. As a combination
    of checkpoints, sum_j c_j theta_j, it has the sums w_i = sum_(j >= i) c_j, the multiplier of the
    updates up to theta_i (WSM, arXiv 2507.17634, for evenly spaced ones).

    Arguments:
        shape: one of `SHAPES`.
        over: the fraction of training at its end, in (0, 1], or two times (start, end) on the run's
            clock.

    Raises:
        InvalidValueError: an unknown shape, or a part of training that is out of range.
    """

    def __init__(
        self,
        shape: str = "1-sqrt",
        over: float | tuple[float, float] = 0.2,
    ) -> None:
        check_word("decay", shape, SHAPES)
        self.shape = shape
        accepted = "be a part of training in (0, 1], such as 0.2, or two ascending times"
        if isinstance(over, tuple):
            start, end = over if len(over) == 2 else (None, None)
            begin = check_number("over", start, lambda time: 0 <= time < math.inf, accepted)
            finish = check_number("over", end, lambda time: begin < time < math.inf, accepted)
            self.over: float | tuple[float, float] = (begin, finish)
            text = _plain(begin, finish)
        else:
            self.over = check_number("over", over, lambda value: 0 < value <= 1, accepted)
            text = f"{_plain(100 * self.over)}%"
        super().__init__(f"decay:{shape}:{text}")

    def profile(
        self,
        t: float,
        clock: Clock,
        t_first: float,
    ) -> Profile:
        t = float(t)
        if isinstance(self.over, tuple):
            start, end = self.over
        else:
            start = t * (1 - self.over)
            end = t
        if end > t:
            raise self._error(f"ends after t = {t:,.12g}; must end at t or before")
        multiplier = SHAPES[self.shape]

        def tail(s: FloatArray) -> FloatArray:
            passed = (s - start) / (end - start)
            return multiplier(np.clip(passed, 0.0, 1.0))

        return Formula(tail, end)


class Mean(Target):
    """The plain mean of the last checkpoints at or before the time of the average, whatever their
    distances.

    In a run without checkpoints and with a single tracked profile, it is the mean of that profile's
    last snapshots. It has no profile: `coefficients_of` makes it from the stored averages.
    """

    def __init__(self, last: int) -> None:
        accepted = "be a whole number of checkpoints, at least 1"
        self.last = int(check_number("last", last, _is_count, accepted))
        super().__init__(f"last:{_plain(self.last)}")

    def profile(
        self,
        t: float,
        clock: Clock,
        t_first: float,
    ) -> Profile:
        raise self._error("names checkpoints, and has no profile without them")

    def coefficients_of(self, stored: Sequence[StoredProfile]) -> FloatArray:
        """Return the coefficients of stored averages, in their order: 1 / last for the last,
        otherwise 0.

        Raises:
            InvalidValueError: there are fewer checkpoints, or none but more than one average at
                each time.
        """
        everything = range(len(stored))
        usable = [index for index in everything if isinstance(stored[index], Point)]
        if not usable:
            times = {profile.t for profile in stored}
            if len(times) < len(stored):
                reason = "needs checkpoints of weights; this run has averages, more than one"
                raise self._error(f"{reason} at each time")
            usable = list(everything)
        if len(usable) < self.last:
            raise self._error(f"the run has only {len(usable)} up to this time")
        usable.sort(key=lambda index: stored[index].t)
        coefficients = np.zeros(len(stored))
        coefficients[usable[-self.last :]] = 1 / self.last
        return coefficients


class GivenProfile(Target):
    """The target with a profile: any object with a function `tail`, see `profiles.Profile`.

    Arguments:
        given: the object; its mass must lie within (0, t] of the run, and may end before t.
        name: its name in tables and file names: letters, digits and `._+-`, starting with a letter
            or digit.
    """

    def __init__(self, given: Profile, name: str = "given") -> None:
        if not (isinstance(name, str) and re.fullmatch(r"\w[\w.+-]*", name)):
            reason = "the name must be letters, digits and ._+-, a letter or digit first"
            raise InvalidValueError("profile", reason, value=brief(name))
        super().__init__(f"profile {name}")
        self.given = given
        self.label = name

    def profile(
        self,
        t: float,
        clock: Clock,
        t_first: float,
    ) -> Profile:
        _check_profile(self.given, float(t), self.title)
        return self.given


_SLACK = 1e-9  # accepted rounding error of a tail, whose digits end at 1e-16


def _check_profile(profile: Profile, t: float, title: str) -> None:
    """Check a user's profile at about 1,200 times from before the run to after `t`, which are
    denser near 0 and `t`.

    Its tail must take arrays, be 1 before 0 and 0 from `t` on, and never grow. Mass at time 0 is
    allowed.

    Raises:
        InvalidValueError: with `title` as its subject.
    """
    near = np.geomspace(1e-9, 1e-3, 61)
    outside = [-1.0, -1e-6, 0.0, 1.5]
    even = np.arange(1, 1025) / 1024
    places = np.concatenate((outside, even, near, 1 - near))
    times = np.unique(places) * t
    tail = _tail_of(profile, times, title)
    before = np.append(1.0, tail[:-1])
    least = np.where(times < 0, 1.0, 0.0)
    most = np.where(times >= t, 0.0, np.minimum(before, 1.0))
    is_above = tail >= least - _SLACK
    is_below = tail <= most + _SLACK
    is_wrong = ~(is_above & is_below)  # also for nan
    if is_wrong.any():
        first = is_wrong.argmax()
        accepted = f"must be 1 before 0, never grow, and be 0 from t = {t:,.12g} on"
        reason = f"tail is {tail[first]:.6g} at s = {times[first]:,.12g}; {accepted}"
        raise InvalidValueError(title, reason)


def _tail_of(profile: Profile, times: FloatArray, title: str) -> FloatArray:
    refused = "tail fails for an array of times: {}; must take any shape"
    try:
        tail = np.asarray(profile.tail(times), dtype=np.float64)
    except (TypeError, ValueError, ArithmeticError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise InvalidValueError(title, refused.format(lines[0])) from error
    if tail.shape != times.shape:
        fault = f"times of shape {times.shape} give the shape {tail.shape}"
        raise InvalidValueError(title, refused.format(fault))
    return tail


class Groups(Target):
    """Averages with different lengths by tensor: sigma_rels by glob on tensors' names; the first
    match counts.

    `Groups({"unet.up.*": 0.12, "*": 0.08})`
    """

    def __init__(self, widths: Mapping[str, float]) -> None:
        if not widths or not all(isinstance(glob, str) for glob in widths):
            accepted = "must be globs on names, each with its sigma_rel, such as {'unet.*': 0.1}"
            raise InvalidValueError("group", accepted, value=brief(widths))
        self.widths = {glob: check_sigma_rel(width, "group") for glob, width in widths.items()}
        named = [f"{width!r} ({glob})" for glob, width in self.widths.items()]
        super().__init__(f"sigma_rel {', '.join(named)}")
        self.label = f"groups-{'-'.join(map(repr, self.widths.values()))}"

    def profile(
        self,
        t: float,
        clock: Clock,
        t_first: float,
    ) -> Profile:
        raise self._error("has a profile for each group; name one sigma_rel")


def separate(targets: Sequence[Target]) -> list[Target]:
    """Return the targets, with those of `Groups` replaced by the power functions of their
    groups."""
    single: list[Target] = []
    for target in targets:
        if isinstance(target, Groups):
            single += map(SigmaRel, target.widths.values())
        else:
            single.append(target)
    return single


def as_target(value: object) -> Target:
    """Return the target for a sigma_rel, a text that names one target, a target, or an object with
    `tail`.

    Raises:
        InvalidValueError: the value is none of these.
    """
    if isinstance(value, Target):
        return value
    if callable(getattr(value, "tail", None)):
        return GivenProfile(value)  # type: ignore[arg-type]
    if isinstance(value, str):
        targets = parse_targets(value)
        if len(targets) != 1:
            reason = f"must name one average, not {len(targets)}"
            raise InvalidValueError("target", reason, value=repr(value))
        return targets[0]
    if isinstance(value, numbers.Real) or hasattr(value, "__float__"):
        return SigmaRel(value)  # type: ignore[arg-type]  # which checks the value
    accepted = (
        "a sigma_rel in (0, 0.2887), a text such as 'beta:0.9999', or an object with a "
        "function tail(s)"
    )
    raise InvalidValueError("target", f"must be {accepted}", value=brief(value))


def _plain(*values: float) -> str:
    return ":".join(f"{value:.12g}" for value in values)


def _is_count(value: float) -> bool:
    return 1 <= value < math.inf and value == math.floor(value)


# --- the table of kinds


def _unchanged(value: Any) -> Any:
    return value


def _complement(value: Any) -> Any:
    return 1 - value


@dataclass(frozen=True)
class Kind:
    """Targets that one number distinguishes, which a text names as NAME:VALUES.

    Attributes:
        make: the target of a number.
        example: a text form, which help and messages show.
        accepted: what a value is: the end of "must be ...".
        range: an example of a range to search, for a run of a million steps.
        make_of_share: the target of a number that is written with a percent sign, if it is
            another one.
        make_of_span: the target of two times START:END, if there is one.
        is_whole: whether the numbers are whole ones.
        length, value: a search is even in the logarithm of length(number); value is its inverse.
    """

    name: str
    make: Callable[[float], Target]
    example: str
    accepted: str
    range: str
    make_of_share: Callable[[float], Target] | None = None
    make_of_span: Callable[[tuple[float, float]], Target] | None = None
    is_whole: bool = False
    length: Callable[[Any], Any] = _unchanged
    value: Callable[[Any], Any] = _unchanged

    def parse(self, text: str) -> list[Target]:
        """Return the targets of the text after the colon, or raise an InvalidValueError about a
        part of it."""
        if self.make_of_span is None:
            make = self.make
            if self.make_of_share and "%" in text:
                make = self.make_of_share
            return [*map(make, _numbers(text, self.accepted))]
        targets: list[Target] = []
        for part in text.split(","):
            if ":" in part and "%" not in part:
                span = _span(part, self.accepted)
                targets.append(self.make_of_span(span))
            else:
                numbers = _numbers(part, self.accepted)
                targets += map(self.make, numbers)
        return targets


_MANY = "a list such as 5,10 or a range START:STOP:STEP"
_SIGMA_FORMS = (
    "a number, a list such as 0.05,0.10 or 0.05,0.06,...,0.25, or a range such as 0.05:0.25:0.05"
)

WIDTH = Kind("sigma_rel", SigmaRel, "0.15", _SIGMA_FORMS, "0.02:0.28")
"""The kind whose name is left out."""

_NAMED = [
    Kind(
        "beta",
        Beta,
        "beta:0.9999",
        f"a number, {_MANY}",
        "0.99:0.9999",
        length=_complement,
        value=_complement,
    ),
    Kind(
        "half-life",
        HalfLife,
        "half-life:5000",
        f"a number of steps or a share such as 5%, {_MANY}",
        "500:10000",
        make_of_share=HalfLifeShare,
    ),
    Kind(
        "window",
        Window,  # type: ignore[arg-type]  # which checks that the number is whole
        "window:1000",
        f"a whole number of steps, {_MANY}",
        "1000:50000",
        is_whole=True,
    ),
    Kind(
        "last",
        Mean,  # type: ignore[arg-type]  # as `Window`
        "last:10",
        f"a whole number of checkpoints, {_MANY}",
        "2:20",
        is_whole=True,
    ),
    *(
        Kind(
            f"decay:{shape}",
            functools.partial(Decay, shape),
            f"decay:{shape}:20%",
            f"a part of training such as 20%, two times START:END, {_MANY}",
            "5%:50%",
            make_of_span=functools.partial(Decay, shape),
        )
        for shape in SHAPES
    ),
]
KINDS = {kind.name: kind for kind in _NAMED}
"""The kinds of targets that a text can name, by the part of the text before the values."""
EXAMPLES = ", ".join(kind.example for kind in _NAMED)
RANGES = ", ".join(f"{kind.name}:{kind.range}" for kind in _NAMED)

MOST_VALUES = 10_000
_MOST_DIGITS = 1_000
"""Limit of the digits before and after the point: far more than a float has, and few enough for
exact arithmetic."""


def kind_of(text: str) -> tuple[Kind, str] | None:
    """Return the kind that a text names, and the rest of the text; None if it names none."""
    for name, kind in KINDS.items():
        before, colon, values = text.partition(f"{name}:")
        if colon and not before.strip():
            return kind, values.strip()
    return None


def parse_targets(text: str, name: str = "target") -> list[Target]:
    """Return the distinct targets of a text NAME:VALUES, see `KINDS`, or of numbers, which are
    sigma_rels.

    VALUES are a number, a list 0.999,0.9999 or a range START:STOP:STEP (for `decay` in percent);
    `decay` takes lists of START:END, too. For other texts, raise an InvalidValueError about `name`
    that says what is accepted.
    """
    kind, values = kind_of(text) or (WIDTH, text)
    first, _, _ = text.partition(":")
    if kind is WIDTH and any(character.isalpha() for character in first):
        reason = f"must be a sigma_rel in (0, 0.2887), or one of {EXAMPLES}"
        before, _, _ = text.rpartition(":")
        raise bad(name, text, reason, likely(before or text, KINDS))
    try:
        targets = kind.parse(values)
    except InvalidValueError as error:
        reason = error.reason
        if "," in text and error.value:  # the number that is refused
            reason = f"{error.value} {reason}"
        raise bad(name, text, reason, error.hint) from error
    return list(dict.fromkeys(targets))


def _span(text: str, accepted: str) -> tuple[float, float]:
    start, _, end = text.partition(":")
    first = _decimal(start, accepted)
    last = _decimal(end, accepted)
    return float(first), float(last)


def parse_numbers(
    text: str,
    name: str,
    form: str = _SIGMA_FORMS,
) -> list[float]:
    """Return the distinct numbers of `0.05,0.10`, `0.05:0.25:0.05` or `0.05,0.06,...,0.25`, in the
    order given.

    Steps are exact decimals, so that `0.05:0.25:0.05` ends at 0.25 and contains 0.15, not
    0.15000000000000002. If the text is not accepted, raise an InvalidValueError about `name` that
    describes the accepted `form`.
    """
    try:
        return _numbers(text, form)
    except InvalidValueError as error:
        raise bad(name, text, error.reason) from error


def bad(
    name: str,
    text: str,
    reason: str,
    hint: str = "",
) -> InvalidValueError:
    """Return the error for an argument or option whose text is not accepted."""
    return InvalidValueError(name, reason, hint, value=text.strip() or "(empty)")


def _numbers(text: str, form: str) -> list[float]:
    """Return the distinct numbers of a text, see `parse_numbers`; raise an InvalidValueError about
    `form`."""
    items = [item.strip() for item in text.split(",")]
    numbers: list[Decimal] = []
    for index, item in enumerate(items):
        ends = item.split(":")
        if item == "..." and 2 <= index < len(items) - 1:
            *_, before, last = numbers
            step = last - before
            stop = _decimal(items[index + 1], form)
            numbers += _steps(last + step, stop, step)
        elif len(ends) == 3:
            start, stop, step = (_decimal(end, form) for end in ends)
            numbers += _steps(start, stop, step)
        else:
            numbers.append(_decimal(item, form))
    return list(dict.fromkeys(map(float, numbers)))


def _decimal(text: str, form: str) -> Decimal:
    """Return a finite number of a moderate size, 5% as 0.05; raise an InvalidValueError about
    `form` for others."""
    digits = text.strip()
    try:
        number = Decimal(digits.removesuffix("%"))
        if digits.endswith("%"):
            number = number.scaleb(-2)
    except InvalidOperation:
        number = Decimal("nan")
    is_moderate = number.is_finite() and abs(number.adjusted()) <= _MOST_DIGITS
    if not is_moderate or math.isinf(float(number)):
        raise InvalidValueError("number", f"must be {form}", value=digits)
    return number


def _steps(
    start: Decimal,
    stop: Decimal,
    step: Decimal,
) -> list[Decimal]:
    """Return start, start + step, ... up to stop, at most `MOST_VALUES` numbers."""
    span = stop - start
    if step == 0 or span * step < 0:
        reason = "the step must lead from the start to the stop, and not be 0"
        raise InvalidValueError("step", reason)
    count = int(span / step) + 1
    if count > MOST_VALUES:
        raise InvalidValueError("step", f"makes more than {MOST_VALUES:,} values")
    return [start + index * step for index in range(count)]
