"""The kinds of checkpoints, one entry of `TABLE` each; and the settings that `ema import` may be told of them.

A kind says how its files are recognised, what they do not say themselves, and makes the sources that are in one. To add
one: a function that reads it, an entry in `TABLE` before "checkpoints", which takes what is left, and its name in
`KINDS`. A setting that only some kinds have is a field of `Settings`, named in their `needs` or `takes`.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli.checkpoints.ema_formats import EDM_NAME, EDM_OPTIONS, FINDERS, FoundEMA, Tensors
from posthoc_cli.checkpoints.read_model import IndexedCheckpoint, names_in
from posthoc_cli.checkpoints.read_step import checked_step, step_of
from posthoc_cli.checkpoints.settings import Settings
from posthoc_cli.checkpoints.source import Checkpoint, make_checkpoint
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import FileFormatError, InvalidValueError
from posthoc_cli.profiles import Discrete, Point, PowerFunction, gamma_from_sigma_rel
from posthoc_cli.profiles.other_libraries import (
    DEFAULT_UPDATE_AFTER_STEP,
    TORCHTITAN_GAMMA,
    Decay,
    ema_pytorch_profile,
    posthoc_ema_profile,
    torchtitan_profile,
)
from posthoc_cli.reconstruction import DistanceTo, misfit
from posthoc_cli.snapshots.sources import FileSource, sample_measurements

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoints.

    Attributes:
        read: makes the sources that are in a checkpoint, from its path, what it holds, its step and the settings.
        is_in: whether a checkpoint is of this kind, by what it holds; it is asked if the name fits.
        name: the form of its files' names, with a group for the step; None if they may have any.
        form: the same in words.
        named_so: what must be in a name, unless this kind is given.
        of_name: steps that the number in the name counts.
        needs: settings that the files do not hold.
        takes: settings that may be given beside these and the choice of tensors.
        check: compares the settings with the tensors of all its checkpoints, and says in a line what came out, or
            raises an InvalidValueError that names what fits better.
    """

    read: Callable[[Path, IndexedCheckpoint, int, Settings], list[Checkpoint]]
    is_in: Callable[[IndexedCheckpoint], bool] = lambda _: True
    name: re.Pattern[str] | None = None
    form: str = ""
    named_so: re.Pattern[str] | None = None
    of_name: int = 1
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    check: Callable[[Sequence[Checkpoint], Settings], str] | None = None

    def step(self, path: Path, indexed: IndexedCheckpoint, settings: Settings, by_word: str) -> int:
        """The step of a checkpoint; 0 before the training. Arguments and errors as in `steps.step_of`."""
        match = self.name and self.name.fullmatch(path.name)
        if match is None:
            per_epoch = settings.steps_per_epoch or 0 if "steps_per_epoch" in self.takes else None
            return step_of(path, indexed, settings.step_from, by_word, per_epoch)
        number = self.of_name * int(match["step"])
        return checked_step(path, number) if number else 0

    def is_named(self, path: Path) -> bool:
        """Whether a file has a name of this form."""
        return self.name is None or self.name.fullmatch(path.name) is not None


def kind_of(path: Path, indexed: IndexedCheckpoint, settings: Settings) -> str:
    """The kind of a checkpoint: the first of `TABLE` whose names and contents fit, unless one is given.

    Raises:
        FileFormatError: it is not named as those of the kind that was given.
        InvalidValueError: a setting that its files do not hold is missing.
    """
    found = settings.kind or next(
        name
        for name, kind in TABLE.items()
        if kind.is_named(path) and (not kind.named_so or kind.named_so.search(path.name)) and kind.is_in(indexed)
    )
    if not TABLE[found].is_named(path):
        raise FileFormatError(path, f"is not named as files of {found} are: {TABLE[found].form}")
    missing = [name for name in TABLE[found].needs if not getattr(settings, name)]
    if missing and settings.given:
        reason = f"must be given: files of {found}, such as {path.name}, do not hold it"
        raise InvalidValueError(missing[0], reason)
    if missing:
        reason = f"is of {found}, whose files do not hold {' and '.join(missing)}"
        raise InvalidValueError(path, reason, "give them to an import")
    return found


def check_used(settings: Settings, kinds: Collection[str]) -> None:
    """An InvalidValueError if a setting was given that says nothing about checkpoints of these kinds."""
    known = {"kind", "prefix", "include", "exclude", *(n for kind in kinds for n in TABLE[kind].needs)}
    for name, value in settings.given.items():
        if name not in known and not any(name in TABLE[kind].takes for kind in kinds):
            raise InvalidValueError(name, f"says nothing about {' and '.join(sorted(kinds))}", value=_shown(value))


def _shown(value: Any) -> str:
    return ",".join(f"{each:.12g}" for each in value) if isinstance(value, list) else str(value)


# --- weights, and torchtitan's average beside them

_TITAN_EMA = re.compile(r"(?:ema_optimizer\.)?state\.(.+)\.ema_params")


def _read_weights(path: Path, indexed: IndexedCheckpoint, step: int, settings: Settings) -> list[Checkpoint]:
    found = settings.chosen(indexed.model_tensors(settings.prefix))
    return [make_checkpoint(path, found, Point(float(step)), step)]


def _read_torchtitan(path: Path, indexed: IndexedCheckpoint, step: int, settings: Settings) -> list[Checkpoint]:
    averaged = _titan_averages(indexed)
    found = settings.chosen(indexed.model_tensors(settings.prefix))
    both = {name: averaged.get(settings.prefix + name, find) for name, find in found.items()}
    if all(find is found[name] for name, find in both.items()):
        raise FileFormatError(path, "holds no average of torchtitan for these tensors")
    profile = torchtitan_profile(step, settings.update_every or 1, settings.update_after_step or 0)
    width = PowerFunction(TORCHTITAN_GAMMA, step).sigma_rel
    weights = make_checkpoint(path, found, Point(float(step)), step, "torchtitan")
    return [weights, make_checkpoint(path, both, profile, step, "torchtitan", sigma_rel=width)]


def _titan_averages(indexed: IndexedCheckpoint) -> Tensors:
    """The averages by the names of their tensors."""
    return {
        match[1]: find
        for keys, find in indexed.tensors.items()
        if (match := _TITAN_EMA.fullmatch(".".join(keys[1:] if keys[0] == "ema_optimizer" else keys)))
    }


# --- ema-pytorch and pytorch-posthoc-ema: averages by number, whose settings are not in their files

_NUMBERED = re.compile(r"(?P<number>\d{1,20})[._](?P<step>\d{1,20})\.(?:pt|safetensors)")
_NUMBERED_FORM = "<number>.<step>.pt, or <number>_<step>.safetensors"
_COUNTERS = ("initted", "step")
"""What these libraries store beside the weights."""
_INNER = "ema_model."
"""What names in files of `ema-pytorch` begin with."""


def _is_numbered(indexed: IndexedCheckpoint, inner: bool) -> bool:
    return (_COUNTERS[0],) in indexed.tensors and inner is any(keys[0].startswith(_INNER) for keys in indexed.tensors)


def _read_numbered(
    library: str, path: Path, indexed: IndexedCheckpoint, step: int, settings: Settings
) -> list[Checkpoint]:
    """An average that one of these libraries stored."""
    match, inner = _NUMBERED.fullmatch(path.name), _INNER if library == "ema-pytorch" else ""
    number = int(match["number"]) if match else 0
    if number >= len(settings.sigma_rels):
        given = names_in([f"{sigma_rel:g}" for sigma_rel in settings.sigma_rels])
        reason = f"must be one for each average; {path.name} is of number {number}, counted from 0"
        raise InvalidValueError("sigma_rels", reason, value=given)
    if library == "posthoc-ema":
        _check_update_after_step(path, indexed, step, settings.update_after_step)
    width, every = settings.sigma_rels[number], settings.update_every or 1
    profile = _numbered_profile(library, gamma_from_sigma_rel(width), step, settings, every)
    found = settings.chosen(indexed.model_tensors(settings.prefix or inner), _COUNTERS)
    return [make_checkpoint(path, found, profile, step, library, sigma_rel=width)]


def _numbered_profile(library: str, gamma: float, step: int, settings: Settings, update_every: int) -> Discrete:
    """What one of these libraries really tracks."""
    if library == "ema-pytorch":
        return ema_pytorch_profile(gamma, step, update_every)
    later = DEFAULT_UPDATE_AFTER_STEP if settings.update_after_step is None else settings.update_after_step
    return posthoc_ema_profile(gamma, step, update_every, later)


def _check_update_after_step(path: Path, indexed: IndexedCheckpoint, step: int, given: int | None) -> None:
    """Compare the setting with what a file of `pytorch-posthoc-ema` has counted: calls from that of this number on."""
    value = DEFAULT_UPDATE_AFTER_STEP if given is None else given
    counted = indexed.value("step")
    if counted is None or not math.isfinite(counted[0]):  # above the range of float16
        return
    found, dtype = counted
    due = step - max(value, 1) + 1
    if abs(found - due) <= found * EPS.get(dtype, 0.0) / 2:
        return
    about = "about " * (found * EPS.get(dtype, 0.0) >= 1)
    told = f"{path.name} has counted {found:,.12g} of {step:,} calls, as {about}{step - found + 1:,.12g} makes it"
    reason = f"does not fit the files, whose default is {DEFAULT_UPDATE_AFTER_STEP}: {told}"
    raise InvalidValueError("update_after_step", reason, value=value)


def _check_numbered(library: str, checkpoints: Sequence[Checkpoint], settings: Settings) -> str:
    """Compare `update_every` with the distances between averages, from a sample of the tensors."""
    claimed = settings.update_every or 1

    def profile(source: FileSource, update_every: int) -> Discrete:
        info: Any = source.info
        return _numbered_profile(library, info.gamma, info.step, settings, update_every)

    fits = check_update_every(checkpoints, claimed, profile)
    if not fits:
        return "update_every is as given: averages of one profile, or at one time, cannot tell it"
    others = ", ".join(f"{value}: {fit:.2g}" for value, fit in list(fits.items())[:3])
    return f"update_every {claimed} fits the distances between the averages (misfits: {others})"


_EVERY = (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, 128, 200, 250, 500, 1000)
"""Values of update_every that a claim is compared with."""

_TIMES = 24
"""Newest times that a claim is checked at; with 8 of them values half as large as the true one often passed."""

_WORSE, _MUCH_WORSE = 1.25, 0.1
"""A claim is wrong if it fits worse than another value by more than this factor and this difference. In 18 runs (six
recorded trainings, updates every 1, 10 and 100 steps) the true value was at most 1.06 times and 0.006 worse than the
best one; values half or twice as large were refused, but for some at 100."""

_POOR = 1.0
"""A claim that fits worse than this is doubted, also if no other fits better. In recorded trainings the true value had
at most 0.42; widths in the wrong order, and two sessions of which one has replaced files of the other, 1.2 or more."""


def check_update_every(
    sources: Sequence[FileSource], claimed: int, profile: Callable[[FileSource, int], Discrete]
) -> dict[int, float]:
    """Compare the distances between another library's averages with those that its update_every would make.

    Averages of two profiles or more are needed: of one profile any value explains the distances.

    Arguments:
        sources: averages of one run.
        claimed: the value that is claimed.
        profile: the profile of a source if update_every had this value.

    Returns:
        For each value that was tried, how badly it fits (see `misfit`), the best one first; empty where the averages
        cannot tell.

    Raises:
        InvalidValueError: another value fits much better; it is named.
    """
    # After the first update all averages are equal: any distance is a rounding error.
    sources = [source for source in sources if profile(source, claimed).times.size > 1]
    times = sorted({source.info.t for source in sources})[-_TIMES:]
    sources = [source for source in sources if source.info.t in times]
    if len(times) < 2 or len(sources) < 2 * len(times):
        return {}
    measured = sample_measurements(sources)
    shortest = min(source.info.step for source in sources)
    found = {}
    for every in sorted({claimed, *(value for value in _EVERY if value <= shortest)}):
        profiles = {source.profile: profile(source, every) for source in sources}
        apart = [
            tuple(DistanceTo(**vars(one) | {"profile": profiles[one.other]}) for one in own.distances)
            for own in measured
        ]
        averages = [
            replace(source.info.average(profiles[source.profile]), measurements=replace(own, distances=distances))
            for source, own, distances in zip(sources, measured, apart, strict=True)
        ]
        if not math.isnan(fit := misfit(averages)):
            found[every] = fit
    if not found:  # nothing moved
        return {}
    best = min(found, key=lambda value: found[value])
    hint = "check `sigma_rels`, `update_after_step`, and that one session of the training wrote all files"
    if found[claimed] > max(_WORSE * found[best], found[best] + _MUCH_WORSE):
        other, hint = (f"those of {best} do", "") if found[best] < _POOR else ("no other value fits them either", hint)
        reason = f"the distances between the averages do not fit it; {other}"
        raise InvalidValueError("update_every", reason, hint, value=claimed)
    if found[claimed] > _POOR:
        log.warning("the distances between the averages fit no update_every; %s", hint)
    return dict(sorted(found.items(), key=lambda one: one[1]))


def _numbered(library: str, inner: bool, takes: tuple[str, ...]) -> Kind:
    return Kind(
        functools.partial(_read_numbered, library), functools.partial(_is_numbered, inner=inner), _NUMBERED,
        _NUMBERED_FORM, needs=("sigma_rels", "update_every"), takes=takes,
        check=functools.partial(_check_numbered, library),
    )  # fmt: skip


# --- ordinary EMAs

_EMA_NAME = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
"""In the name of a file or folder whose tensors are an ordinary EMA."""


def _read_ema(path: Path, indexed: IndexedCheckpoint, step: int, settings: Settings) -> list[Checkpoint]:
    """A file of an average alone; it is not used without a decay, so that weights beside it are."""
    found = FoundEMA(indexed.model_tensors(settings.prefix))
    return _ordinary(path, found, step, settings, "ema")


def _read_library(
    library: str, path: Path, indexed: IndexedCheckpoint, step: int, settings: Settings
) -> list[Checkpoint]:
    """The average and the weights that a library stored in one checkpoint."""
    found = FINDERS[library](indexed)
    if found is None:
        raise FileFormatError(path, f"holds no EMA of {library}")
    return _ordinary(path, found, step, settings, library)


def _ordinary(path: Path, found: FoundEMA, step: int, settings: Settings, kind: str) -> list[Checkpoint]:
    begin = settings.prefix if kind != "ema" else ""
    parts = [
        {name.removeprefix(begin): find for name, find in part.items() if name.startswith(begin)}
        for part in (found.averaged, found.weights)
    ]
    averaged, weights = parts
    if not averaged:
        raise FileFormatError(path, f"no tensor's name begins with {begin!r}")
    every = settings.update_every or found.every
    if not every:
        reason = f"must be given, the images of a batch: neither {path.name} nor {EDM_OPTIONS} beside it says it"
        raise InvalidValueError("update_every", reason)
    if found.t_unit == "images":  # names count thousands, rounded down
        step = -(-step // every) * every
    if weights and (others := sorted(averaged.keys() - weights.keys())):
        reason = f"holds an EMA and weights of different models: only the EMA has {names_in(others)}"
        raise FileFormatError(path, reason)
    both = settings.chosen({name: averaged.get(name, find) for name, find in weights.items()} or averaged)
    made = []
    if weights:
        own = {name: weights[name] for name in both}
        made.append(make_checkpoint(path, own, Point(float(step)), step, kind, found.t_unit))
    rule = dict(found.rule) | settings.rule(every)
    if "decay" in rule:
        decay, updates, every, first = _schedule(path, found, step, settings, rule)
        profile = decay.profile(step, updates, every, first)
        made.append(make_checkpoint(path, both, profile, step, kind, found.t_unit, decay=decay.decay))
    return made


def _schedule(
    path: Path, found: FoundEMA, step: int, settings: Settings, rule: dict[str, Any]
) -> tuple[Decay, int, int, int]:
    """The decays, the number of updates, the steps between them, and the first one."""
    every = settings.update_every or found.every
    if began := [begin for begin in settings.ema_restarts if begin < step]:
        return (
            Decay(**rule | {"copies": 0, "late": settings.ema_late or 0}),
            (step - max(began)) // every,
            every,
            max(began) + every,
        )
    later, counted = settings.update_after_step or 0, found.updates
    if counted is None:
        first = later + 1 if found.from_first else (later // every + 1) * every
        return Decay(**rule), max(0, (step - first) // every + 1), every, first
    if counted > step:
        raise FileFormatError(path, f"has counted {counted:,} updates of its EMA, and is of step {step:,}")
    if found.every > 1:  # calls are counted, of which the first is an update
        if settings.update_after_step is not None:
            rule["copies"] = settings.update_after_step + 1
        return Decay(**rule, stride=every), (counted - 1) // every + 1, every, step - counted + 1
    if settings.update_every is None and counted:
        every = max(1, step // counted) if -(-step // max(1, step // counted)) - counted in (0, 1) else 1
    last = (step - 1) // every * every + 1 if found.from_first else step // every * every
    first = last - (counted - 1) * every
    if counted and first < 1:
        reason = f"cannot be: {path.name} has counted {counted:,} updates by step {step:,}"
        raise InvalidValueError("update_every", reason, value=every)
    return Decay(**rule), counted, every, first


_EMA_TAKES = (
    "step_from", "ema_decay", "ema_warmup", "ema_restarts", "ema_uncertainty", "ema_late", "update_every",
    "update_after_step", "steps_per_epoch",
)  # fmt: skip


def lacks_decay(indexed: IndexedCheckpoint, kind: str) -> bool:
    """Whether a checkpoint holds an ordinary EMA, and not its decay."""
    found = FINDERS[kind](indexed) if kind in FINDERS else None
    return kind == "ema" or (found is not None and "decay" not in found.rule)


def _is_of(library: str, indexed: IndexedCheckpoint) -> bool:
    return FINDERS[library](indexed) is not None


# --- EDM2: power functions, with images and width in the name

_EDM2 = re.compile(r"network-snapshot-(?P<step>\d{1,20})-(?P<width>\d*\.\d+)\.pkl")


def _read_edm2(path: Path, indexed: IndexedCheckpoint, images: int, settings: Settings) -> list[Checkpoint]:
    match = _EDM2.fullmatch(path.name)
    width = float(match["width"]) if match else 0.0
    profile = PowerFunction.from_sigma_rel(width, images)
    found = settings.chosen(indexed.model_tensors(settings.prefix, "ema"))
    return [make_checkpoint(path, found, profile, images, "edm2", "images", width)]


_EDM_NAMED: dict[str, Any] = {"name": EDM_NAME, "form": "network-snapshot-<images in thousands>.pkl", "of_name": 1000}

TABLE = {
    "edm2": Kind(
        _read_edm2, name=_EDM2, form="network-snapshot-<images in thousands>-<width>.pkl", of_name=1000
    ),
    "ema-pytorch": _numbered("ema-pytorch", True, ()),
    "posthoc-ema": _numbered("posthoc-ema", False, ("update_after_step",)),
    "torchtitan": Kind(
        _read_torchtitan, lambda indexed: bool(_titan_averages(indexed)),
        takes=("step_from", "update_every", "update_after_step"),
    ),
    **{
        name: Kind(
            functools.partial(_read_library, name), functools.partial(_is_of, name), takes=_EMA_TAKES, **named
        )
        for name, named in ((name, _EDM_NAMED if name == "edm" else {}) for name in FINDERS)
    },
    "ema": Kind(_read_ema, named_so=_EMA_NAME, takes=_EMA_TAKES),
    "checkpoints": Kind(_read_weights, takes=("step_from",)),
}  # fmt: skip
"""Every kind, in the order in which a file is asked whether it is one; `checkpoints` are weights."""
