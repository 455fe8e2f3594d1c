"""Targets: averages by their width, their decay, a window, a span of time, a decay of the learning
rate, or a profile; and their text form, KIND:VALUE.

A target is independent of the run; its profile follows from the time of the average, the run's
clock and the time of the first update. The functions that make targets check what does not depend
on the run, `Target.profile` the rest.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError, brief, check_number, check_word
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
SHORTEST_SPAN = 1e-9  # the least duration of `Between`, as a fraction of the time of the average

SHAPES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}
"""The multiplier d(x) at the fraction x of a decay, from 1 down to 0."""


@dataclass(frozen=True)
class Formula:
    """A profile given by its tail in closed form, for times from 0 to the time of the average."""

    formula: Callable[[FloatArray], FloatArray]
    t: float

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        times = np.asarray(s, dtype=np.float64)
        inside = np.clip(self.formula(np.clip(times, 0.0, self.t)), 0.0, 1.0)
        return np.where(times < 0, 1.0, np.where(times >= self.t, 0.0, inside))


@dataclass(frozen=True)
class Target:
    """An average that the user wants, as the functions below make it."""

    kind: str  # "sigma_rel", one of `KINDS`, "profile" or "groups"
    values: tuple[Any, ...]  # its parameters
    title: str  # its name in messages, `sigma_rel 0.15`; or its text form, `beta:0.9999`
    label: str  # its name in tables and file names: `0.15`, `beta-0.9999`
    sigma_rel: float | None = None  # the width of a power function; None for any other profile

    @property
    def beta(self) -> float | None:
        """The decay of one step of a classical average; None for any other profile."""
        if self.kind == "half-life":
            return float(0.5 ** (1 / self.values[0]))
        return float(self.values[0]) if self.kind == "beta" else None

    @property
    def counts_steps(self) -> bool:
        """Whether it depends on how many steps there were in a time."""
        return self.beta is not None or self.kind == "window"

    @property
    def widths(self) -> dict[str, float]:
        return dict(self.values)

    def profile(self, t: float, clock: Clock, t_first: float) -> Profile:
        """Return the profile at a time `t` of a run whose first update was at `t_first`, in (0, t].

        Raises:
            InvalidValueError: the run is too short for the target, or the target has no profile of
                its own.
        """
        t = float(t)
        step_at = clock.step_at
        if self.sigma_rel is not None:
            return PowerFunction.from_sigma_rel(self.sigma_rel, t)
        if self.beta is not None:
            # The logarithm keeps the digits of a beta near 1; all mass before the first update is
            # on the value then.
            now = float(step_at(t))
            log, start = math.log(self.beta), min(float(t_first), t)
            return Formula(
                lambda s: np.where(
                    s < start, 1.0, -np.expm1(log * np.maximum(now - step_at(s), 0.0))
                ),
                t,
            )
        if self.kind == "window":
            (steps,) = self.values
            now = float(step_at(t))
            most = math.floor(now)
            self._check(
                steps <= now,
                f"the run has {most:,} steps up to t = {t:,.12g}; must be at most that",
            )
            return Formula(lambda s: (now - step_at(s)) / steps, t)
        if self.kind == "profile":
            _try(self.values[0], t, self.title)
            return self.values[0]  # type: ignore[no-any-return]
        self._check(self.kind != "groups", "has a profile for each group; name one sigma_rel")
        self._check(self.kind != "last", "names checkpoints, and has no profile without them")
        # the mean of a span is linear
        shape, over = self.values if self.kind == "decay" else ("linear", self.values)
        start, end = over if isinstance(over, tuple) else (t * (1 - over), t)
        self._check(end <= t, f"ends after t = {t:,.12g}; must end at t or before")
        is_long = self.kind == "decay" or end - start >= SHORTEST_SPAN * t
        self._check(is_long, f"must span at least {SHORTEST_SPAN:g} of t = {t:,.12g}")
        return Formula(lambda s: SHAPES[shape](np.clip((s - start) / (end - start), 0.0, 1.0)), end)

    def _check(self, holds: bool, reason: str) -> None:
        """Raise an InvalidValueError about this target if a condition does not hold."""
        if not holds:
            raise InvalidValueError("target", reason, value=self.title)

    def coefficients_of(self, stored: Sequence[StoredProfile]) -> FloatArray:
        """Return the coefficients of `Mean` for stored averages, in their order: 1 / last for the
        last, otherwise 0.

        Raises:
            InvalidValueError: there are fewer checkpoints, or none but more than one average at
                each time.
        """
        (last,) = self.values
        points = [isinstance(profile, Point) for profile in stored]
        is_clear = any(points) or len({profile.t for profile in stored}) == len(stored)
        self._check(
            is_clear,
            "is for checkpoints; this run has none, but more than one average at each time",
        )
        usable = [index for index, is_point in enumerate(points) if is_point == any(points)]
        self._check(len(usable) >= last, f"the run has only {len(usable)} up to this time")
        coefficients = np.zeros(len(stored))
        coefficients[sorted(usable, key=lambda index: stored[index].t)[-last:]] = 1 / last
        return coefficients


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
            raise InvalidValueError(
                "target", f"must name one average, not {len(targets)}", value=repr(value)
            )
        return targets[0]
    if isinstance(value, numbers.Real) or hasattr(value, "__float__"):
        return SigmaRel(value)  # type: ignore[arg-type]  # which checks the value
    accepted = (
        "a sigma_rel in (0, 0.2887), a text such as 'beta:0.9999', or an object with a "
        "function tail(s)"
    )
    raise InvalidValueError("target", f"must be {accepted}", value=brief(value))


# --- the kinds


def SigmaRel(sigma_rel: float) -> Target:
    """Return the power function with a width in (0, 0.2887), a fraction of training time."""
    try:
        width = check_sigma_rel(sigma_rel)
    except InvalidValueError as error:
        is_decay = isinstance(sigma_rel, numbers.Real) and SHORTEST_BETA <= sigma_rel < 1
        decay = repr(float(sigma_rel)) if is_decay else ""
        raise error.with_hint(
            f"for a decay of {decay} per step use beta:{decay}" if decay else ""
        ) from error
    return Target("sigma_rel", (width,), f"sigma_rel {width!r}", repr(width), width)


def Beta(beta: float) -> Target:
    """Return the classical average x <- beta x + (1 - beta) theta at every step, with a beta in
    [0.5, 1).

    Below 0.5 the mean age is less than a step. It starts as a copy of the weights at the first
    update. With n(s) the step at time s, the mass after s is 1 - beta**(n(t) - n(s)).
    """
    accepted = f"lie in [{SHORTEST_BETA:g}, 1); below that the mean age is less than one step"
    beta = check_number("beta", beta, lambda value: SHORTEST_BETA <= value < 1, accepted)
    return _of("beta", beta, text=repr(beta))


def HalfLife(steps: float) -> Target:
    """Return the classical average in which weights lose half of their share every `steps`
    steps."""
    return _of(
        "half-life",
        check_number("half-life", steps, lambda n: 1 <= n <= 1e15, "be from 1 to 1e15 steps"),
    )


def HalfLifeShare(share: float) -> Target:
    """Return the power function whose half-life is a share f of the training so far: gamma + 1 = ln
    2 / f.

    torchtitan's `half_life_fraction` and arXiv 2602.03702 name averages so; f = 0.05 is sigma_rel
    0.0629.
    """
    accepted = (
        f"lie in (0, {math.log(2):.2%}), a share of training; the bound is the uniform average"
    )
    share = check_number("half-life", share, lambda value: 0 < value < math.log(2), accepted)
    width = check_sigma_rel(PowerFunction(math.log(2) / share - 1, 1.0).sigma_rel)
    text = f"half-life:{_plain(100 * share)}%"
    return Target("sigma_rel", (width,), text, text.replace(":", "-"), width)


def Window(steps: int) -> Target:
    """Return the mean of the last `steps` steps: a whole number from 1 to the run's number of
    steps."""
    return _of(
        "window",
        int(check_number("window", steps, _is_count, "be a whole number of steps, at least 1")),
    )


def Between(start: float, end: float) -> Target:
    """Return the mean of all weights from time `start` to time `end`, on the run's clock: 0 <=
    start < end."""
    start, end = (
        check_number("between", time, math.isfinite, "be finite") for time in (start, end)
    )
    target = _of("between", start, end)
    target._check(0 <= start < end, "must start at 0 or later, and end after its start")
    return target


def Decay(shape: str = "1-sqrt", over: float | tuple[float, float] = 0.2) -> Target:
    """Return the average that emulates a decay of the learning rate that was not run.

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
    check_word("decay", shape, SHAPES)
    accepted = "be a part of training in (0, 1], such as 0.2, or two ascending times"
    if not isinstance(over, tuple):
        part = check_number("over", over, lambda value: 0 < value <= 1, accepted)
        return _of("decay", shape, part, text=f"{shape}:{_plain(100 * part)}%")
    start, end = over if len(over) == 2 else (None, None)
    begin = check_number("over", start, lambda time: 0 <= time < math.inf, accepted)
    finish = check_number("over", end, lambda time: begin < time < math.inf, accepted)
    return _of("decay", shape, (begin, finish), text=f"{shape}:{_plain(begin, finish)}")


def Mean(last: int) -> Target:
    """Return the plain mean of the last checkpoints at or before the time of the average, whatever
    their distances.

    In a run without checkpoints and with a single tracked profile, it is the mean of that profile's
    last snapshots. It has no profile: `Target.coefficients_of` makes it from the stored averages.
    """
    return _of(
        "last",
        int(check_number("last", last, _is_count, "be a whole number of checkpoints, at least 1")),
    )


def GivenProfile(given: Profile, name: str = "given") -> Target:
    """Return the target with a profile: any object with a function `tail`, see `profiles.Profile`.

    Arguments:
        given: the object; its mass must lie within (0, t] of the run, and may end before t.
        name: its name in tables and file names: letters, digits and `._+-`, starting with a letter
            or digit.
    """
    if not (isinstance(name, str) and re.fullmatch(r"\w[\w.+-]*", name)):
        reason = "the name must be letters, digits and ._+-, a letter or digit first"
        raise InvalidValueError("profile", reason, value=brief(name))
    return Target("profile", (given,), f"profile {name}", name)


_SLACK = 1e-9  # accepted rounding error of a tail


def _try(profile: Profile, t: float, title: str) -> None:
    """Check a user's profile at about 1,200 times from before the run to after `t`, which are
    denser near 0 and `t`.

    Its tail must take arrays, be 1 before 0 and 0 from `t` on, and never grow. Mass at time 0 is
    allowed.

    Raises:
        InvalidValueError: with `title` as its subject.
    """
    near = np.geomspace(1e-9, 1e-3, 61)
    times = (
        np.unique(
            np.concatenate(([-1.0, -1e-6, 0.0, 1.5], np.arange(1, 1025) / 1024, near, 1 - near))
        )
        * t
    )
    try:
        tail, cause = np.asarray(profile.tail(times), dtype=np.float64), None
        fault = (
            f"times of shape {times.shape} give the shape {tail.shape}"
            if tail.shape != times.shape
            else ""
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        fault, cause = (str(error).splitlines() or [type(error).__name__])[0], error
    if fault:
        raise InvalidValueError(
            title, f"tail fails for an array of times: {fault}; must take any shape"
        ) from cause
    before = np.concatenate(([1.0], tail[:-1]))
    least, most = np.where(times < 0, 1.0, 0.0), np.where(times >= t, 0.0, np.minimum(before, 1.0))
    is_wrong = ~((tail >= least - _SLACK) & (tail <= most + _SLACK))
    if is_wrong.any():
        first = is_wrong.argmax()
        accepted = f"must be 1 before 0, never grow, and be 0 from t = {t:,.12g} on"
        raise InvalidValueError(
            title, f"tail is {tail[first]:.6g} at s = {times[first]:,.12g}; {accepted}"
        )


def Groups(widths: Mapping[str, float]) -> Target:
    """Return averages with different lengths by tensor: sigma_rels by glob on tensors' names; the
    first match counts.

    `Groups({"unet.up.*": 0.12, "*": 0.08})`
    """
    if not widths or not all(isinstance(glob, str) for glob in widths):
        accepted = "must be globs on names, each with its sigma_rel, such as {'unet.*': 0.1}"
        raise InvalidValueError("group", accepted, value=brief(widths))
    checked = {glob: check_sigma_rel(width, "group") for glob, width in widths.items()}
    title = "sigma_rel " + ", ".join(f"{width!r} ({glob})" for glob, width in checked.items())
    return Target(
        "groups", tuple(checked.items()), title, f"groups-{'-'.join(map(repr, checked.values()))}"
    )


def separate(targets: Sequence[Target]) -> list[Target]:
    """Return the targets, with those of `Groups` replaced by the power functions of their
    groups."""
    single: list[Target] = []
    for target in targets:
        single += map(SigmaRel, target.widths.values()) if target.kind == "groups" else [target]
    return single


def _of(kind: str, *values: Any, text: str = "") -> Target:
    """Return the target that is named by its text form KIND:VALUES."""
    title = f"{kind}:{text or _plain(*values)}"
    return Target(kind, values, title, title.replace(":", "-"))


def _plain(*values: float) -> str:
    return ":".join(f"{value:.12g}" for value in values)


def _is_count(value: float) -> bool:
    return 1 <= value < math.inf and value == math.floor(value)


# --- text form

_MANY = "a list such as 5,10 or a range START:STOP:STEP"

KINDS = {
    "beta": ("beta:0.9999", f"a number, {_MANY}"),
    "half-life": ("half-life:5000", f"a number of steps or a share such as 5%, {_MANY}"),
    "window": ("window:1000", f"a whole number of steps, {_MANY}"),
    "between": ("between:50000:80000", "START:END, two training times, such as 50000:80000"),
    "last": ("last:10", f"a whole number of checkpoints, {_MANY}"),
    "decay": (
        "decay:linear:20%",
        f"SHAPE:PART with a shape of {', '.join(SHAPES)}, and 20%, {_MANY}",
    ),
}
"""The kinds of targets other than sigma_rel that a text can name: an example, and what is accepted
after the colon."""

MOST_VALUES = 10_000
_MOST_DIGITS = 1_000
"""Limit of the digits before and after the point: far more than a float has, and few enough for
exact arithmetic."""
_SIGMA_FORMS = (
    "a number, a list such as 0.05,0.10 or 0.05,0.06,...,0.25, or a range such as 0.05:0.25:0.05"
)


def parse_targets(text: str, name: str = "target") -> list[Target]:
    """Return the distinct targets of a text KIND:VALUES, see `KINDS`, or of numbers, which are
    sigma_rels.

    VALUES are a number, a list 0.999,0.9999 or a range START:STOP:STEP (for `decay` in percent);
    `between` and `decay` take lists of START:END. For other texts, raise an InvalidValueError about
    `name` that says what is accepted.
    """
    kind, colon, rest = (part.strip() for part in text.partition(":"))
    try:
        if colon and kind in KINDS:
            targets = _targets_of(kind, rest, KINDS[kind][1])
        elif any(character.isalpha() for character in kind):
            examples = ", ".join(example for example, _ in KINDS.values())
            raise InvalidValueError(
                name, f"must be a sigma_rel in (0, 0.2887), or one of {examples}"
            )
        else:
            targets = [*map(SigmaRel, _numbers(text, _SIGMA_FORMS))]
    except InvalidValueError as error:
        # of a list, the number that is refused
        number = f"{error.value} " * (error.subject != name and "," in text)
        raise bad(name, text, number + error.reason, error.hint) from error
    return list(dict.fromkeys(targets))


def _targets_of(kind: str, text: str, accepted: str) -> list[Target]:
    """Return the targets of one of `KINDS` that the text after its colon names."""
    shape, _, parts = text.partition(":")
    if kind == "between":
        return [Between(*_ends(part, accepted)) for part in text.split(",")]
    if kind == "decay":
        if shape not in SHAPES or not parts:
            raise InvalidValueError(text, f"must be {accepted}")
        targets: list[Target] = []
        for part in parts.split(","):
            is_span = ":" in part and "%" not in part
            overs = [_ends(part, accepted)] if is_span else _numbers(part, accepted)
            targets += [Decay(shape, over) for over in overs]
        return targets
    half_life = HalfLifeShare if "%" in text else HalfLife
    make: Callable[[Any], Target] = {
        "beta": Beta,
        "half-life": half_life,
        "window": Window,
        "last": Mean,
    }[kind]
    return [*map(make, _numbers(text, accepted))]


def _ends(text: str, accepted: str) -> tuple[float, float]:
    # times, no parts of training
    start, _, end = ("", "", "") if "%" in text else text.partition(":")
    return float(_decimal(start, accepted)), float(_decimal(end, accepted))


def parse_numbers(text: str, name: str, form: str = _SIGMA_FORMS) -> list[float]:
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


def bad(name: str, text: str, reason: str, hint: str = "") -> InvalidValueError:
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
            last, step = numbers[-1], numbers[-1] - numbers[-2]
            numbers += _steps(last + step, _decimal(items[index + 1], form), step)
        elif len(ends) == 3:
            numbers += _steps(*(_decimal(end, form) for end in ends))
        else:
            numbers.append(_decimal(item, form))
    return list(dict.fromkeys(map(float, numbers)))


def _decimal(text: str, form: str) -> Decimal:
    """Return a finite number of a moderate size, 5% as 0.05; raise an InvalidValueError about
    `form` for others."""
    try:
        number = Decimal(text.strip().removesuffix("%")).scaleb(
            -2 if text.rstrip().endswith("%") else 0
        )
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or abs(number.adjusted()) > _MOST_DIGITS or math.isinf(float(number)):
        raise InvalidValueError(text, f"must be {form}")
    return number


def _steps(start: Decimal, stop: Decimal, step: Decimal) -> list[Decimal]:
    """Return start, start + step, ... up to stop, at most `MOST_VALUES` numbers."""
    leads = step != 0 and (stop - start) * step >= 0
    count = int((stop - start) / step) + 1 if leads else 0
    if not 0 < count <= MOST_VALUES:
        reason = "the step must lead from the start to the stop, and not be 0"
        raise InvalidValueError(
            "step", f"makes more than {MOST_VALUES:,} values" if leads else reason
        )
    return [start + index * step for index in range(count)]
