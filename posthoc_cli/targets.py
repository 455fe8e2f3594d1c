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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import (
    InvalidValueError,
    abbreviate,
    argument,
    check_number,
    check_word,
    count_noun,
    did_you_mean,
)
from posthoc_cli.profiles import (
    FloatArray,
    Point,
    PowerFunction,
    Profile,
    StoredProfile,
    check_sigma_rel,
    decay_from_sigma_rel,
    round_sigma_rel,
    sigma_rel_from_decay,
    sigma_rel_from_gamma,
)
from posthoc_cli.resources import COUNTS, parse_amount
from posthoc_cli.run_clock import Clock

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
    outside [0, 1] are clipped. `sigma_rel` is the width of a power function of the same length, if
    one is known.
    """

    formula: Function
    t: float
    sigma_rel: float | None = None

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
        title: its name in messages, `sigma_rel 0.15`, `decay 0.9999`; or its text form.
        label: its name in tables and file names: `0.15`, `decay-0.9999`.
        sigma_rel: the width of a power function; None for any other profile.
        beta: the decay of one step of an ordinary EMA; None for any other profile.
        counts_steps: whether it depends on how many steps there were in a time.
    """

    sigma_rel: float | None = None
    beta: float | None = None
    counts_steps = False

    def __init__(self, title: str) -> None:
        self.title = title
        self.label = re.sub("[: ]", "-", title)

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
        """Make the profile at a time `t` of a run whose first update was at `t_first`, in (0, t].

        Raises:
            InvalidValueError: the run is too short for the target, or the target has no profile of
                its own.
        """
        raise NotImplementedError

    def on_clock(self, t: float, clock: Clock) -> str:
        """Write the option, with its value, that names about the same average without steps, for a
        target in steps."""
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
                raise error.with_hint(_decay_hint(repr(float(sigma_rel)))) from error
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


def _decay_hint(decay: str) -> str:
    return f"for an ordinary EMA use {argument('decay')} {decay}, in Python Beta({decay})"


class Beta(Target):
    """The ordinary EMA x <- beta x + (1 - beta) theta at every step, with a decay beta in [0.5, 1).

    Below 0.5 the mean age is less than a step. It starts as a copy of the weights at the first
    update. With n(s) the step at time s, the mass after s is 1 - beta**(n(t) - n(s)).
    """

    beta: float
    counts_steps = True

    def __init__(self, beta: float) -> None:
        accepted = f"lie in [{SHORTEST_BETA:g}, 1)"
        if isinstance(beta, numbers.Real) and beta < SHORTEST_BETA:
            accepted += "; below that the mean age is less than one step"
        self.beta = check_number("decay", beta, lambda value: SHORTEST_BETA <= value < 1, accepted)
        super().__init__(f"decay {self.beta!r}")

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

        return Formula(tail, float(t), sigma_rel_from_decay(self.beta, now))

    def on_clock(self, t: float, clock: Clock) -> str:
        gamma = 1 / _share(-1 / math.log(self.beta), t, clock) - 2  # of the same mean age
        sigma_rel = sigma_rel_from_gamma(max(gamma, 1e-3))
        return f"--sigma-rel {round_sigma_rel(sigma_rel, 4):g}"


class HalfLife(Beta):
    """The ordinary EMA in which weights lose half of their share every `steps` steps, from 1 to
    1e15."""

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
                f"the run has {count_noun(most, 'step')} up to t = {t:,.12g}; must be at most that"
            )

        def tail(s: FloatArray) -> FloatArray:
            ages = now - clock.step_at(s)
            return ages / self.steps

        return Formula(tail, float(t))

    def on_clock(self, t: float, clock: Clock) -> str:
        return f"--target decay:linear:{100 * _share(self.steps, t, clock):.4g}%"


class Decay(Target):
    """The average that emulates a decay of the learning rate that was not run.

    An average multiplies the update at time s by tail(s). So an average with tail(s) = d(x), x = (s
    - start) / (t - start), equals the weights of a run whose learning rate is multiplied by d from
    `start` on, if the updates themselves are otherwise the same. `SHAPES` has d. As a combination
    of checkpoints, sum_j c_j theta_j, it has the sums w_i = sum_(j >= i) c_j, the multiplier of the
    updates up to theta_i (WSM, arXiv 2507.17634, for evenly spaced ones).

    Arguments:
        shape: one of `SHAPES`; "linear" is the plain mean over that part of training.
        over: the fraction of training at its end, in (0, 1].

    Raises:
        InvalidValueError: an unknown shape, or a part of training that is out of range.
    """

    def __init__(self, shape: str = "1-sqrt", over: float = 0.2) -> None:
        check_word("decay", shape, SHAPES)
        accepted = "be a part of training in (0, 1], such as 0.2 or 20%"
        self.shape = shape
        self.over = check_number("over", over, lambda value: 0 < value <= 1, accepted)
        super().__init__(f"decay:{shape}:{_plain(100 * self.over)}%")

    def profile(
        self,
        t: float,
        clock: Clock,
        t_first: float,
    ) -> Profile:
        start = t * (1 - self.over)
        multiplier = SHAPES[self.shape]

        def tail(s: FloatArray) -> FloatArray:
            passed = (s - start) / (t - start)
            return multiplier(np.clip(passed, 0.0, 1.0))

        return Formula(tail, float(t))


class Mean(Target):
    """The plain mean of the last checkpoints at or before the time of the average, whatever their
    distances.

    In a run without checkpoints and with a single tracked profile, it is the mean of that profile's
    last snapshots. It has no profile: `compute_coefficients` makes it from the stored averages.
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

    def compute_coefficients(self, stored: Sequence[StoredProfile]) -> FloatArray:
        """Compute the coefficients of stored averages, in their order: 1 / last for the last,
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
            raise InvalidValueError("profile", reason, value=abbreviate(name))
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
    tail = _tail(profile, times, title)
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


def _tail(profile: Profile, times: FloatArray, title: str) -> FloatArray:
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


Wanted = float | str | Target | Profile
"""What stands for an average, see `as_target`."""


def as_target(value: object) -> Target:
    """Make a target of a sigma_rel, a text that names one target, a target, or an object with
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
        "a sigma_rel in (0, 0.2887), a text such as 'window:1000', or an object with a function "
        "tail(s)"
    )
    raise InvalidValueError("target", f"must be {accepted}", value=abbreviate(value))


def as_targets(values: object) -> tuple[Target, ...]:
    """Make targets of one value or of several, see `as_target`."""
    if isinstance(values, Sequence) and not isinstance(values, str):
        return tuple(map(as_target, values))
    return (as_target(values),)


def name_equal_length(target: Target, steps: float | None) -> str | None:
    """Name the ordinary EMA that is as long as a power function after this number of steps, by its
    decay, or the sigma_rel of an ordinary EMA; None for another target, or without steps."""
    if steps is None:
        return None
    if target.sigma_rel is not None:
        left = 1 - decay_from_sigma_rel(target.sigma_rel, steps)
        return f"decay {1 - float(f'{left:.2g}'):.12g}"
    if target.beta is not None:
        sigma_rel = sigma_rel_from_decay(target.beta, steps)
        return None if sigma_rel is None else f"sigma_rel {round_sigma_rel(sigma_rel, 3):g}"
    return None


def full_title(target: Target, steps: float | None) -> str:
    """Title a target with its other name: "sigma_rel 0.13 (as decay 0.992)"."""
    other = name_equal_length(target, steps)
    return target.title if other is None else f"{target.title} (as {other})"


def _share(steps: float, t: float, clock: Clock) -> float:
    """Compute the part of training until `t` that the last steps took."""
    begin = max(float(clock.step_at(t)) - steps, 0.0)
    return 1 - float(clock.time_at(begin)) / t


def _plain(value: float) -> str:
    return f"{value:.12g}"


def _is_count(value: float) -> bool:
    return 1 <= value < math.inf and value == math.floor(value)


# --- the table of kinds


@dataclass(frozen=True)
class TargetKind:
    """Targets that one number distinguishes, which a text names as NAME:VALUES."""

    make: Callable[[float], Target]  # the target of a number
    example: str  # a text form, which help and messages show
    accepted: str  # what a value is: the end of "must be ..."


_MANY = "a list such as 5,10 or a range START:STOP:STEP"
SIGMA_FORMS = (
    "a number, a list such as 0.05,0.10 or 0.05,0.06,...,0.25, or a range such as 0.05:0.25:0.05"
)
KINDS = {
    "half-life": TargetKind(HalfLife, "half-life:5000", f"a number of steps, {_MANY}"),
    # the classes check that the number is whole
    "window": TargetKind(Window, "window:1000", f"a whole number of steps, {_MANY}"),  # type: ignore[arg-type]
    "last": TargetKind(Mean, "last:10", f"a whole number of checkpoints, {_MANY}"),  # type: ignore[arg-type]
    **{
        f"decay:{shape}": TargetKind(
            functools.partial(Decay, shape),
            f"decay:{shape}:20%",
            f"a part of training such as 20%, {_MANY}",
        )
        for shape in SHAPES
    },
}
"""The kinds of targets that a text can name, by the part of the text before the values."""
EXAMPLES = ", ".join(kind.example for kind in KINDS.values())

MOST_VALUES = 10_000


def parse_targets(text: str, name: str = "target") -> list[Target]:
    """Parse the distinct targets of a text NAME:VALUES, see `KINDS`, or of numbers, which are
    sigma_rels.

    VALUES are a number, a list 50,100 or a range START:STOP:STEP. For other texts, raise an
    InvalidValueError about `name` that says what is accepted.
    """
    for word, kind in KINDS.items():
        before, colon, values = text.partition(f"{word}:")
        if colon and not before.strip():
            return parse_values(values, name, kind.make, kind.accepted, text)
    if any(character.isalpha() for character in text.partition(":")[0]):
        before, _, after = text.rpartition(":")
        reason = f"must be a sigma_rel in (0, 0.2887), or one of {EXAMPLES}"
        has_value = any(character.isdigit() for character in after) and bool(before)
        if has_value and before.strip() in ("beta", "decay"):
            hint = _decay_hint(after.strip())
        elif has_value:
            hint = did_you_mean(text, [f"{word}:{after}" for word in KINDS])
        else:
            hint = did_you_mean(text, [kind.example for kind in KINDS.values()])
        raise bad(name, text, reason, hint)
    return parse_values(text, name, SigmaRel, SIGMA_FORMS)


def parse_values(
    text: str,
    name: str,
    make: Callable[[float], Target],
    accepted: str = f"a number, {_MANY}",
    whole: str = "",
) -> list[Target]:
    """Parse the distinct targets of the numbers in a text, which is the end of a `whole` text;
    raise an InvalidValueError about `name`."""
    with _errors_about(name, whole or text):
        targets = [make(number) for number in _numbers(text, accepted)]
    return list(dict.fromkeys(targets))


def parse_numbers(
    text: str,
    name: str,
    form: str = SIGMA_FORMS,
) -> list[float]:
    """Parse the distinct numbers of `0.05,0.10`, `0.05:0.25:0.05` or `0.05,0.06,...,0.25`, in the
    order given; 5% is 0.05.

    Numbers of a range are rounded to 12 digits, so that `0.05:0.25:0.05` contains 0.15, not
    0.15000000000000002. If the text is not accepted, raise an InvalidValueError about `name` that
    describes the accepted `form` and quotes the text.
    """
    with _errors_about(name, text):
        return list(dict.fromkeys(_numbers(text, form)))


@contextmanager
def _errors_about(name: str, text: str) -> Iterator[None]:
    """Raise errors of single numbers as errors of the whole text."""
    try:
        yield
    except InvalidValueError as error:
        reason = error.reason
        if "," in text and error.value:
            reason = f"{error.value} {reason}"
        raise bad(name, text, reason, error.hint) from error


def _numbers(text: str, form: str) -> list[float]:
    items = [item.strip() for item in text.split(",")]
    numbers: list[float] = []
    for index, item in enumerate(items):
        ends = [end.strip() for end in item.split(":")]
        if item == "..." and 2 <= index < len(items) - 1:
            *_, before, last = numbers
            numbers += _range(last, _number(items[index + 1], form), last - before)
        elif len(ends) == 3:
            start, stop, step = (_number(end, form) for end in ends)
            numbers += _range(start, stop, step)
        else:
            numbers.append(_number(item, form))
    return numbers


def _number(text: str, form: str) -> float:
    """Parse a finite number, 5% as 0.05, 1K as 1000."""
    amount = parse_amount(text.removesuffix("%"), COUNTS)
    number = math.nan if amount is None else float(amount)
    if not math.isfinite(number):
        raise InvalidValueError("number", f"must be {form}", value=text or "(empty)")
    return float(f"{number / 100:.12g}") if text.endswith("%") else number


def _range(
    start: float,
    stop: float,
    step: float,
) -> list[float]:
    """List start, start + step, ... up to stop, which may miss it by a rounding error."""
    if step == 0 or (stop - start) * step < 0:
        reason = "the step must lead from the start to the stop, and not be 0"
        raise InvalidValueError("step", reason)
    intervals = (stop - start) / step
    if intervals >= MOST_VALUES:
        raise InvalidValueError("step", f"makes more than {MOST_VALUES:,} values")
    count = math.floor(intervals + 1e-9) + 1
    return [float(f"{start + index * step:.12g}") for index in range(count)]


def bad(
    name: str,
    text: str,
    reason: str,
    hint: str = "",
) -> InvalidValueError:
    """Make the error for an argument or option whose text is not accepted."""
    return InvalidValueError(name, reason, hint, value=text.strip() or "(empty)")
