"""Targets: averages by their width, their decay, a window, a span of time, a decay of the learning rate, or a profile.

A target is independent of the run; its profile follows from the time of the average, the run's clock and the time of
the first update. The constructor checks what does not depend on the run, `profile` the rest. The targets that name
coefficients have no profile of their own: their `coefficients_of` gives the coefficients of the stored averages.
"""

from __future__ import annotations

import math
import numbers
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import (
    SHAPES,
    ClassicalEMA,
    Clock,
    EmulatedDecay,
    FloatArray,
    Point,
    PowerFunction,
    Profile,
    StepWindow,
    StoredProfile,
    Table,
    Tabulated,
    Uniform,
    check_sigma_rel,
    read_table,
    read_text,
    try_profile,
)

_MOST_MISSED = 0.05
"""Part of a decay, at each of its ends, that a file of rates may lack, since rates are often logged now and then."""

SHORTEST_BETA = 0.5
"""The decay whose average has a mean age, beta / (1 - beta), of one step."""


class Target(Protocol):
    """An average that is wanted, independent of the run."""

    @property
    def label(self) -> str:
        """For tables and file names: `0.15`, `beta-0.9999`."""

    @property
    def title(self) -> str:
        """For people: `sigma_rel 0.15`, `beta 0.9999`."""

    @property
    def sigma_rel(self) -> float | None:
        """Width of the power function, None for any other profile."""

    def profile(self, t: float, clock: Clock, t_first: float) -> Profile:
        """The profile at time `t` of a run.

        Arguments:
            t: time of the average, above 0.
            clock: the run's steps over time.
            t_first: time of the run's first update, in (0, t].

        Raises:
            InvalidValueError: the run is too short for the target.
        """


def as_target(value: object) -> Target:
    """The target for a sigma_rel, a target, or any object with `density` and `tail`; else an InvalidValueError."""
    names = ("label", "title", "sigma_rel", "profile")
    if all(hasattr(value, name) for name in names) and not isinstance(value, type):  # a class has its instances' names
        return value  # type: ignore[return-value]
    if any(hasattr(value, name) for name in ("density", "tail")):
        return GivenProfile(value)  # type: ignore[arg-type]  # checked there
    if isinstance(value, str | numbers.Real) or hasattr(value, "__float__"):
        return SigmaRel(value)  # type: ignore[arg-type]  # checked there
    accepted = "a sigma_rel in (0, 0.2887), a target such as Beta(0.9999), or an object with density and tail"
    raise InvalidValueError("target", f"must be {accepted}", value=_shown(value))


class _Named:
    """The names of a target, both from `_names`."""

    @property
    def label(self) -> str:
        """For tables and file names: `0.15`, `beta-0.9999`, `window-1000`."""
        return self._names()[0]

    @property
    def title(self) -> str:
        """For people: `sigma_rel 0.15`, `beta 0.9999`, `window 1000`."""
        return self._names()[1]

    def _names(self) -> tuple[str, str]:
        raise NotImplementedError


@dataclass(frozen=True)
class SigmaRel(_Named):
    """The power function of a width, as a fraction of training time: in (0, 0.2887)."""

    sigma_rel: float

    def __post_init__(self) -> None:
        given = self.sigma_rel
        try:
            object.__setattr__(self, "sigma_rel", check_sigma_rel(given))
        except InvalidValueError as error:
            if isinstance(given, numbers.Real) and SHORTEST_BETA <= given < 1:
                raise error.with_hint(f"for a decay of {float(given)!r} a step use Beta({float(given)!r})") from error
            raise

    def _names(self) -> tuple[str, str]:
        return repr(self.sigma_rel), f"sigma_rel {self.sigma_rel!r}"

    def profile(self, t: float, clock: Clock, t_first: float) -> PowerFunction:  # noqa: ARG002
        """The power function on (0, t]."""
        return PowerFunction.from_sigma_rel(self.sigma_rel, t)


@dataclass(frozen=True)
class Beta(_Named):
    """The classical average with one decay for every step, in [0.5, 1): below, its mean age is less than a step."""

    beta: float
    sigma_rel = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", _number("beta", self.beta))
        if not 0 < self.beta < 1:
            raise InvalidValueError("beta", "must lie in (0, 1)", value=repr(self.beta))
        if self.beta < SHORTEST_BETA:
            reason = f"must be at least {SHORTEST_BETA:g}; below that the mean age is less than one step"
            raise InvalidValueError("beta", reason, value=repr(self.beta))

    def _names(self) -> tuple[str, str]:
        return f"beta-{self.beta!r}", f"beta {self.beta!r}"

    def profile(self, t: float, clock: Clock, t_first: float) -> ClassicalEMA:
        """The classical average that starts as a copy of the weights at `t_first`."""
        return ClassicalEMA(self.beta, float(t), clock, min(float(t_first), float(t)))


@dataclass(frozen=True)
class Window(_Named):
    """The mean of the last `steps` steps: a whole number, at least 1 and at most the run's."""

    steps: int
    sigma_rel = None

    def __post_init__(self) -> None:
        steps = _number("window", self.steps)
        if steps < 1 or steps != math.floor(steps):
            raise InvalidValueError("window", "must be a whole number of steps, at least 1", value=self.steps)
        object.__setattr__(self, "steps", int(steps))

    def _names(self) -> tuple[str, str]:
        return f"window-{self.steps}", f"window {self.steps}"

    def profile(self, t: float, clock: Clock, t_first: float) -> StepWindow:  # noqa: ARG002
        """The last `steps` steps up to `t`."""
        return StepWindow(self.steps, float(t), clock)


@dataclass(frozen=True)
class Between(_Named):
    """The mean of all weights from time `start` to time `end`, on the run's clock: 0 <= start < end."""

    start: float
    end: float
    sigma_rel = None

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            object.__setattr__(self, name, _number("between", getattr(self, name)))
        if self.start < 0:
            raise self._error("must start at 0 or later")
        if self.start >= self.end:
            raise self._error("must end after its start")

    def _names(self) -> tuple[str, str]:
        return f"between-{self.start:.12g}-{self.end:.12g}", f"between {self.start:.12g}:{self.end:.12g}"

    def profile(self, t: float, clock: Clock, t_first: float) -> Uniform:  # noqa: ARG002
        """Uniform over time."""
        if self.end > t:
            raise self._error(f"ends after t = {t:,.12g}; must end at t or before")
        return Uniform(self.start, self.end)

    def _error(self, reason: str) -> InvalidValueError:
        return InvalidValueError("between", reason, value=f"{self.start:.12g}:{self.end:.12g}")


@dataclass(frozen=True)
class ProfileFile(_Named):
    """The profile in a file of times and densities, see `profiles.read_table`; read when first needed."""

    path: Path
    sigma_rel = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    def _names(self) -> tuple[str, str]:
        return self.path.stem, f"profile {self.path.name}"

    @cached_property
    def table(self) -> Table:
        """The content of the file; an InvalidValueError names the line."""
        return read_table(self.path)

    def profile(self, t: float, clock: Clock, t_first: float) -> Profile:  # noqa: ARG002
        """The profile through the file's points, which lie within [0, t]."""
        tabulated = self.table.profile
        if tabulated.times[-1] > t:
            late = next(index for index, time in enumerate(tabulated.times) if time > t)
            found = f"line {self.table.lines[late]}: time {tabulated.times[late]:,.12g}"
            reason = f"{found} puts mass outside the run; times must lie within 0 and t = {t:,.12g}"
            raise InvalidValueError("profile", reason, value=self.path)
        return tabulated


@dataclass(frozen=True)
class GivenProfile(_Named):
    """Any object with `density` and `tail`, see `profiles.Profile`.

    Attributes:
        given: the object; its mass must lie within (0, t] of the run, and may end before t.
        name: its name in tables and file names: letters, digits and `._+-`, a letter or digit first.
    """

    given: Profile
    name: str = "given"
    sigma_rel = None

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and re.fullmatch(r"\w[\w.+-]*", self.name)):
            reason = "the name must be letters, digits and ._+-, a letter or digit first"
            raise InvalidValueError("profile", reason, value=_shown(self.name))
        missing = [name for name in ("density", "tail") if not callable(getattr(self.given, name, None))]
        if missing:
            reason = f"{type(self.given).__name__} has no {' and no '.join(missing)}"
            raise InvalidValueError(self.title, f"{reason}; must have the functions density(s) and tail(s)")

    def _names(self) -> tuple[str, str]:
        return self.name, f"profile {self.name}"

    def profile(self, t: float, clock: Clock, t_first: float) -> Profile:  # noqa: ARG002
        """The object itself, after a check of its values."""
        try_profile(self.given, float(t), self.title)
        return self.given


@dataclass(frozen=True)
class Decay(_Named):
    """The average that stands for a decay of the learning rate that was not run (see `profiles.EmulatedDecay`).

    The weights are what a run would have given whose updates at time s had been multiplied by d(x), with
    x = (s - start) / (end - start), if the updates themselves had been the same:

        "1-sqrt"   d(x) = 1 - sqrt(x)
        "linear"   d(x) = 1 - x
        "cosine"   d(x) = (1 + cos(pi x)) / 2
        a file     of lines x,d with x from 0 to 1: linear between them

    Arguments:
        shape: one of these.
        over: the part of training at its end, in (0, 1], or two times (start, end) on the run's clock.
        lr: a file of lines time,rate: the run's own rate eta over that time, if it was not constant. The multiplier is
            then eta(start) d(x) / eta(s), so that the run's rate and the average's tail together make the decay.

    Raises:
        InvalidValueError: no such shape, or no part of training; a file is read when first needed.
    """

    shape: str | Path = "1-sqrt"
    over: float | tuple[float, float] = 0.2
    lr: str | Path | None = None
    sigma_rel = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            object.__setattr__(self, "shape", Path(self.shape))
            if not self.shape.suffix:  # type: ignore[union-attr]
                reason = f"must be {', '.join(SHAPES)} or a file of lines x,multiplier, such as decay.csv"
                raise InvalidValueError("decay", reason, value=self.shape)
        if isinstance(self.over, tuple):
            if len(self.over) != 2:
                raise self._bad_part()
            start, end = (_number("over", time) for time in self.over)
            if not 0 <= start < end:
                raise self._bad_part()
            object.__setattr__(self, "over", (start, end))
        else:
            part = _number("over", self.over)
            if not 0 < part <= 1:
                raise self._bad_part()
            object.__setattr__(self, "over", part)

    def _bad_part(self) -> InvalidValueError:
        reason = "must be a part of training in (0, 1], such as 0.2, or two growing times"
        return InvalidValueError("over", reason, value=_shown(self.over))

    def _names(self) -> tuple[str, str]:
        shape = self.shape if isinstance(self.shape, str) else self.shape.name
        own = "" if self.lr is None else f", rates in {Path(self.lr).name}"
        plain = self.shape if isinstance(self.shape, str) else self.shape.stem
        if isinstance(self.over, tuple):
            start, end = self.over
            return f"decay-{plain}-{start:.12g}-{end:.12g}", f"decay {shape} over {start:.12g}:{end:.12g}{own}"
        return f"decay-{plain}-{self.over!r}", f"decay {shape} over {100 * self.over:.12g}%{own}"

    @cached_property
    def _tables(self) -> tuple[str | Tabulated, Tabulated | None]:
        shape = self.shape if isinstance(self.shape, str) else _read_points(self.shape, "decay", "x,multiplier")
        if isinstance(shape, Tabulated) and (shape.times[0], shape.times[-1]) != (0, 1):
            found = f"{shape.times[0]:,.12g} to {shape.times[-1]:,.12g}"
            reason = f"x is from {found}; must be the part of the decay, 0 to 1"
            raise InvalidValueError("decay", reason, value=self.shape)
        return shape, None if self.lr is None else _read_points(Path(self.lr), "lr", "time,rate")

    def profile(self, t: float, clock: Clock, t_first: float) -> EmulatedDecay:  # noqa: ARG002
        """The decay up to `t`, or over the given times."""
        start, end = self.over if isinstance(self.over, tuple) else (t * (1 - self.over), t)
        if end > t:
            value = f"{start:.12g}:{end:.12g}"
            raise InvalidValueError("over", f"ends after t = {t:,.12g}; must end at t or before", value=value)
        shape, rate = self._tables
        slack = _MOST_MISSED * (end - start)
        if rate is not None and not rate.times[0] - slack <= start < end <= rate.times[-1] + slack:
            reason = f"holds rates from t = {rate.times[0]:,.12g} to {rate.times[-1]:,.12g}"
            reason += f"; must cover the decay, {start:,.12g} to {end:,.12g}"
            raise InvalidValueError("lr", reason, value=self.lr)
        return EmulatedDecay(start, end, shape, rate)


def _read_points(path: Path, subject: str, columns: str) -> Tabulated:
    """A table as of a profile, whose columns are called otherwise in messages."""
    try:
        return read_table(path).profile
    except InvalidValueError as error:
        reason = error.reason.replace("time,density", columns).replace("density", columns.partition(",")[2])
        raise InvalidValueError(subject, reason, value=path) from error


@dataclass(frozen=True)
class Groups(_Named):
    """Averages whose tensors have different lengths: sigma_rel by glob on their names; the first that matches counts.

    `Groups({"unet.up.*": 0.12, "*": 0.08})`
    """

    widths: Mapping[str, float]
    sigma_rel = None

    def __post_init__(self) -> None:
        if not self.widths:
            raise InvalidValueError("group", "is missing: a glob and its sigma_rel")
        for glob in self.widths:
            if not isinstance(glob, str):
                raise InvalidValueError("group", "must be a glob on names, such as 'unet.*'", value=_shown(glob))
        object.__setattr__(self, "widths", {glob: SigmaRel(width).sigma_rel for glob, width in self.widths.items()})

    def __hash__(self) -> int:
        return hash(tuple(self.widths.items()))

    def _names(self) -> tuple[str, str]:
        widths = self.widths.items()
        title = ", ".join(f"{width!r} ({glob})" for glob, width in widths)
        return f"groups-{'-'.join(repr(width) for _, width in widths)}", f"sigma_rel {title}"

    def profile(self, t: float, clock: Clock, t_first: float) -> Profile:  # noqa: ARG002
        """None: each group has its own."""
        raise InvalidValueError(self.title, "has a profile for each group; name one sigma_rel")


def separate(targets: Sequence[Target]) -> list[Target]:
    """The targets, those of `Groups` one after another."""
    each: list[Target] = []
    for target in targets:
        each += map(SigmaRel, target.widths.values()) if isinstance(target, Groups) else [target]
    return each


class FixedCoefficients(_Named, ABC):
    """A target that names the coefficients themselves."""

    sigma_rel = None

    @abstractmethod
    def coefficients_of(self, names: Sequence[str], stored: Sequence[StoredProfile]) -> FloatArray:
        """The coefficients, with sum 1, of stored averages, by their files' names and profiles: in their order.

        Raises:
            InvalidValueError: they have no such averages.
        """

    def profile(self, t: float, clock: Clock, t_first: float) -> Profile:  # noqa: ARG002
        """None: these coefficients are made, whatever their profile."""
        raise InvalidValueError(self.title, "names coefficients, and has no profile without checkpoints")


@dataclass(frozen=True)
class Mean(FixedCoefficients):
    """The plain mean of the last checkpoints at or before the time of the average, whatever their distances.

    Of averages, if a run has no checkpoints and one tracked profile.
    """

    last: int

    def __post_init__(self) -> None:
        last = _number("mean", self.last)
        if last < 1 or last != math.floor(last):
            raise InvalidValueError("mean", "must be a whole number of checkpoints, at least 1", value=self.last)
        object.__setattr__(self, "last", int(last))

    def _names(self) -> tuple[str, str]:
        return f"mean-last-{self.last}", f"mean of the last {self.last}"

    def coefficients_of(self, names: Sequence[str], stored: Sequence[StoredProfile]) -> FloatArray:
        """1 / last for each of the last ones."""
        kinds = [isinstance(profile, Point) for profile in stored]
        if not any(kinds) and len({profile.t for profile in stored}) < len(names):
            raise InvalidValueError("mean", "several averages of each time; it is for checkpoints", value=self.last)
        own = [index for index, kind in enumerate(kinds) if kind == any(kinds)]
        if len(own) < self.last:
            reason = f"only {len(own)} are there up to this time"
            raise InvalidValueError("mean", reason, value=f"last {self.last}")
        coefficients = np.zeros(len(names))
        coefficients[sorted(own, key=lambda index: stored[index].t)[-self.last :]] = 1 / self.last
        return coefficients


@dataclass(frozen=True)
class Coefficients(FixedCoefficients):
    """Exactly the coefficients in a file of lines name,coefficient, with sum 1.

    Names are those of files or folders, as `ema info` shows them; the header line is optional.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    def _names(self) -> tuple[str, str]:
        return f"coefficients-{self.path.stem}", f"coefficients in {self.path.name}"

    def coefficients_of(self, names: Sequence[str], stored: Sequence[StoredProfile]) -> FloatArray:  # noqa: ARG002
        """Those in the file; 0 for the others."""
        place = {name: index for index, name in enumerate(names)}
        coefficients = np.zeros(len(names))
        seen: set[str] = set()
        for number, line in enumerate(read_text(self.path, "coefficients").splitlines(), 1):
            if not line.strip() or line.startswith("#") or (not seen and line.strip() == "name,coefficient"):
                continue
            name, _, text = (part.strip() for part in line.rpartition(","))
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not name or not math.isfinite(value):
                raise self._bad(f"line {number}: must be name,coefficient, such as step100.safetensors,0.5")
            if name not in place or name in seen:
                which = "is named twice" if name in seen else "is not there, or after the time of the average"
                raise self._bad(f"line {number}: {name[:80]!r} {which}")
            seen.add(name)
            coefficients[place[name]] = value
        if not abs(coefficients.sum() - 1) <= 1e-6:
            raise self._bad(f"their sum is {coefficients.sum():.9g}; must be 1, for an average")
        return coefficients

    def _bad(self, reason: str) -> InvalidValueError:
        return InvalidValueError("coefficients", reason, value=self.path)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InvalidValueError(name, "must be a finite number", value=_shown(value))
    return float(value)


def _shown(value: object) -> str:
    return " ".join(repr(value)[:40].split())
