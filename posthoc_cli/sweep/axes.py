"""What is searched: the parameter of a kind of target, and its range."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import SHAPES
from posthoc_cli.run import Run
from posthoc_cli.targets import Beta, Decay, HalfLife, Mean, SigmaRel, Target, Window, parse_numbers

GOOD_ERROR = 0.01
"""Predicted error of the lengths that are searched unless others are named, and beyond those."""
_STRIDES = (2.0, 1.5, 1.2)
"""Factors by which a range whose end is best is widened: the first that leads to an average that is exact."""


@dataclass(frozen=True)
class Axis:
    """What is searched: a kind of target with one parameter.

    Attributes:
        kind: "sigma_rel", "beta", "half-life", "window" or "last"; "decay:1-sqrt", "decay:linear" or "decay:cosine",
            whose values are parts of training.
        low, high: ends of the range.
        values: measure exactly these; None for a search. One alone is given, and not searched.
    """

    kind: str
    low: float
    high: float
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for end in (self.low, self.high, *(self.values or ())):
            self.target(end)  # checks it
        if not self.low < self.high and not self.is_given:
            ends = f"{self.low:g}:{self.high:g}"
            raise InvalidValueError(self.kind, "the first must be below the second", value=ends)

    @classmethod
    def of_values(cls, kind: str, values: Sequence[float]) -> Axis:
        """A grid."""
        return cls(kind, min(values), max(values), tuple(sorted(set(values))))

    @classmethod
    def parse(cls, text: str, name: str) -> Axis:
        """KIND:LOW:HIGH to search, KIND:LIST to measure; an InvalidValueError about `name` says what is accepted."""
        kind, _, rest = text.partition(":")
        if kind == "decay":
            shape, _, rest = rest.partition(":")
            kind = f"decay:{shape}"
        if kind not in _KINDS:
            raise InvalidValueError(name, f"must be a range or a list of {', '.join([*_KINDS][1:])}", value=text)
        return cls.of_kind(rest, name, kind, text)

    @classmethod
    def of_kind(cls, text: str, name: str, kind: str = "sigma_rel", typed: str = "") -> Axis:
        """LOW:HIGH to search, or a list or LOW:HIGH:STEP to measure; errors show it as `typed`."""
        numbers, ends = text.replace("%", "e-2"), text.split(":")
        form = f"a range LOW:HIGH, such as {_RANGES.get(kind, '5%:50%')}, or a list"
        try:
            if len(ends) != 2:
                return cls.of_values(kind, parse_numbers(numbers, name, form, text))
            low, high = (parse_numbers(end, name, form, text)[0] for end in numbers.split(":"))
            return cls(kind, low, high)
        except InvalidValueError as error:
            raise InvalidValueError(name, error.reason, error.hint, value=typed or text or "(empty)") from error

    @property
    def is_given(self) -> bool:
        """Whether there is nothing to search."""
        return self.values is not None and len(self.values) == 1

    def target(self, value: float) -> Target:
        """The target of a value, as a user writes it."""
        return _KINDS[self.kind](value)

    def title(self, value: float) -> str:
        """For people: `sigma_rel 0.15`."""
        return self.target(value).title

    def scaled(self, value: float) -> float:
        """The parameter whose logarithm is searched: of a decay its horizon in steps, else the value itself."""
        return 1 / (1 - value) if self.kind == "beta" else value

    def unscaled(self, x: float) -> float:
        """The value of a parameter, exactly."""
        return 1 - 1 / x if self.kind == "beta" else x

    def value(self, x: float) -> float:
        """The value of a parameter: one that was named, or with three digits, or as many as a narrow range needs."""
        for named in self.values or ():
            if math.isclose(self.scaled(named), x):
                return named
        width = math.log(self.scaled(self.high) / self.scaled(self.low))
        digits = max(3, 2 - math.floor(math.log10(width or 1)))
        return min(max(self._rounded(x, digits), self.low), self.high)

    def _rounded(self, x: float, digits: int) -> float:
        """The value of a parameter with so many digits, of a beta in 1 - beta."""
        if self.kind == "beta":
            return round(1 - float(f"{1 / x:.{digits}g}"), 12)
        return round(x) if self.kind in ("window", "last") else float(f"{x:.{digits}g}")

    def widened(self, upwards: bool, run: Run, t: float | None) -> Axis | None:
        """The range with its upper end, or its lower one, further out; None where averages there are not exact."""
        x = self.scaled(self.high if upwards else self.low)
        for stride in _STRIDES:
            value = self._rounded(x * stride if upwards else x / stride, 3)
            is_part = self.kind not in ("beta", "half-life", "window", "last")
            if self.low <= value <= self.high or (is_part and value * run.step < 1):
                continue  # there is no whole number in between; or it is less than a step
            try:
                error = _predicted_error(self.target(value), run, t)
            except InvalidValueError:  # there is no such average, or the run is too short for it
                continue
            if error < GOOD_ERROR:
                return replace(self, high=value) if upwards else replace(self, low=value)
        return None


def _predicted_error(target: Target, run: Run, t: float | None) -> float:
    """Of an average; a mean of checkpoints is made as it is asked for, if there are so many."""
    if isinstance(target, Mean):
        run.plan([target], t=t)
        return 0.0
    (point,) = run.error_curve((0.1, 0.2), t=t, others=[target]).others
    return point.predicted_error


_KINDS: dict[str, Callable[[Any], Target]] = {
    "sigma_rel": SigmaRel,
    "beta": Beta,
    "half-life": HalfLife,
    "window": Window,
    "last": Mean,
    **{f"decay:{shape}": functools.partial(Decay, shape) for shape in SHAPES},
}
_RANGES = {
    "sigma_rel": "0.02:0.28", "beta": "0.99:0.9999", "half-life": "100:10000", "window": "1000:50000",
    "last": "2:20",
}  # fmt: skip


def good_range(run: Run, t: float | None = None) -> Axis:
    """The widest range of sigma_rel whose predicted error is below GOOD_ERROR.

    Raises:
        InvalidValueError: there is none.
    """
    ranges = run.error_curve(t=t).ranges_below(GOOD_ERROR)
    if not ranges:
        reason = f"no length has a predicted error below {100 * GOOD_ERROR:g} %"
        raise InvalidValueError("sigma_rel", reason, "name a range, such as 0.05:0.25")
    low, high = max(ranges, key=lambda ends: ends[1] / ends[0])
    return Axis("sigma_rel", math.ceil(low * 1e4) / 1e4, math.floor(high * 1e4) / 1e4)
