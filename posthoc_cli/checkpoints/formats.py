"""The kinds of checkpoints, one entry of `TABLE` each: what other programs store, and how it is recognised.

A kind says how its files are recognised, what they do not say themselves, and makes the sources that are in one. To add
one: a function that reads it, an entry in `TABLE` before "checkpoints", which takes what is left, and its name in
`KINDS`. A setting that only some kinds have is a field of `Settings`, named in their `needs` or `takes`.

Ordinary EMAs, of which `FINDERS` know where the average and the weights are, and how it was updated:

    library                 average                          weights                decays
    diffusers' EMAModel     a folder `<component>_ema/`      `<component>/` beside  its `config.json`
    timm                    `state_dict_ema`                 `state_dict`           not there
    Lightning               `state_dict`                     `current_model_state`  not there, but `n_averaged`
    torch's AveragedModel   `module.*` beside `n_averaged`   another group          not there, but `n_averaged`
    ema-pytorch's EMA       `ema_model.*`                    `online_model.*`       its defaults, and `step`
    LitEma                  `model_ema.*` without dots       in the same group      `decay`, `num_updates`
    torch-ema               a list `shadow_params`           another group          `decay`, `num_updates`
    mmengine's EMAHook      `state_dict`                     `ema_state_dict`       not there, but `steps`
    EDM, StyleGAN           `ema`, `G_ema` of a pickle       `net`, `G`             `training_options.json` beside

EDM has `net` in `training-state-*.pt` beside the pickle. Both count images, with the half-life min(its largest, 0.05 of
the images so far), so that the k-th update of a batch keeps 2**(-1 / (0.05 (k - 1))), and the first copies.

mmengine stores the two under each other's names. What is not there is `ema_decay`, which an import is told or finds.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posthoc_cli.checkpoints.read_model import (
    MODEL_GROUPS,
    PARAMETERS,
    Find,
    IndexedCheckpoint,
    Keys,
    Tensors,
    index_checkpoint,
    names_in,
    tensor_shape,
)
from posthoc_cli.checkpoints.read_step import checked_step, step_of
from posthoc_cli.checkpoints.source import Checkpoint, Settings, Updates, make_checkpoint
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import FileFormatError, InvalidValueError, shown
from posthoc_cli.profiles import Discrete, Point, PowerFunction, gamma_from_sigma_rel
from posthoc_cli.profiles.other_libraries import (
    DEFAULT_UPDATE_AFTER_STEP,
    RAMP_UP,
    TORCHTITAN_GAMMA,
    ema_pytorch_profile,
    posthoc_ema_profile,
    torchtitan_profile,
)
from posthoc_cli.reconstruction import DistanceTo, misfit
from posthoc_cli.snapshots.headers import parse_object
from posthoc_cli.snapshots.sources import sample_measurements
from posthoc_cli.snapshots.tensor_file import read_small_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoints.

    Attributes:
        read: makes the sources that are in a checkpoint, from its path, what it holds, its step and the settings; of
            ordinary EMAs without their profiles, see `Checkpoint.told`.
        is_in: whether a checkpoint is of this kind, by its path and what it holds; it is asked if the name fits.
        name: the form of its files' names, with a group for the step; None if they may have any.
        form: the same in words.
        of_name: steps that the number in the name counts.
        needs: settings that the files do not hold.
        takes: settings that may be given beside these and the choice of tensors.
        check: compares the settings with the tensors of all its checkpoints, and says in a line what came out, or
            raises an InvalidValueError that names what fits better.
    """

    read: Callable[[Path, IndexedCheckpoint, int, Settings], list[Checkpoint]]
    is_in: Callable[[Path, IndexedCheckpoint], bool] = lambda *_: True
    name: re.Pattern[str] | None = None
    form: str = ""
    of_name: int = 1
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    check: Callable[[Sequence[Checkpoint], Settings], str] | None = None

    def step(self, path: Path, indexed: IndexedCheckpoint, settings: Settings, by_word: str) -> int:
        """The step of a checkpoint; 0 before the training. Arguments and errors as in `step_of`."""
        match = self.name and self.name.fullmatch(path.name)
        if match is None:
            is_ema = "steps_per_epoch" in self.takes or settings.ema_decay is not None
            per_epoch = settings.steps_per_epoch or 0 if is_ema else None
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
        name for name, kind in TABLE.items() if kind.is_named(path) and kind.is_in(path, indexed)
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


def _is_numbered(inner: bool, _: Path, indexed: IndexedCheckpoint) -> bool:
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
    found = indexed.number("step")
    if found is None or not math.isfinite(found):  # above the range of float16
        return
    eps = max((EPS.get(chunk.tensor.dtype, 0.0) for chunk in indexed.tensors.get(("step",), list)()), default=0.0)
    due = step - max(value, 1) + 1
    if abs(found - due) <= found * eps / 2:
        return
    about = "about " * (found * eps >= 1)
    told = f"{path.name} has counted {found:,.12g} of {step:,} calls, as {about}{step - found + 1:,.12g} makes it"
    reason = f"does not fit the files, whose default is {DEFAULT_UPDATE_AFTER_STEP}: {told}"
    raise InvalidValueError("update_after_step", reason, value=value)


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


def _check_numbered(library: str, checkpoints: Sequence[Checkpoint], settings: Settings) -> str:
    """Compare the distances between averages, in a sample of the tensors, with those that update_every would make.

    Averages of two profiles or more are needed: of one profile any value explains the distances.
    """
    claimed = settings.update_every or 1
    # After the first update all averages are equal: any distance is a rounding error.
    sources = [one for one in checkpoints if isinstance(one.profile, Discrete) and one.profile.times.size > 1]
    times = sorted({source.info.t for source in sources})[-_TIMES:]
    sources = [source for source in sources if source.info.t in times]
    found: dict[int, float] = {}
    if len(times) > 1 and len(sources) >= 2 * len(times):
        measured = sample_measurements(sources)
        shortest = min(source.info.step for source in sources)
        for every in sorted({claimed, *(value for value in _EVERY if value <= shortest)}):
            infos = [source.info for source in sources]
            own = [_numbered_profile(library, info.gamma, info.step, settings, every) for info in infos]
            profiles = dict(zip((info.profile for info in infos), own, strict=True))
            averages = []
            for info, profile, one in zip(infos, own, measured, strict=True):
                apart = tuple(DistanceTo(**vars(d) | {"profile": profiles[d.other]}) for d in one.distances)
                averages.append(replace(info.average(profile), measurements=replace(one, distances=apart)))
            if not math.isnan(fit := misfit(averages)):
                found[every] = fit
    if not found:  # also where nothing moved
        return "update_every is as given: averages of one profile, or at one time, cannot tell it"
    best = sorted(found, key=lambda value: found[value])
    hint = "check `sigma_rels`, `update_after_step`, and that one session of the training wrote all files"
    if found[claimed] > max(_WORSE * found[best[0]], found[best[0]] + _MUCH_WORSE):
        is_one, told = found[best[0]] < _POOR, "the distances between the averages do not fit it"
        other = f"those of {best[0]} do" if is_one else "no other value fits them either"
        raise InvalidValueError("update_every", f"{told}; {other}", "" if is_one else hint, value=claimed)
    if found[claimed] > _POOR:
        log.warning("the distances between the averages fit no update_every; %s", hint)
    others = ", ".join(f"{value}: {found[value]:.2g}" for value in best[:3])
    return f"update_every {claimed} fits the distances between the averages (misfits: {others})"


def _numbered(library: str, inner: bool, takes: tuple[str, ...]) -> Kind:
    return Kind(
        functools.partial(_read_numbered, library), functools.partial(_is_numbered, inner), _NUMBERED,
        _NUMBERED_FORM, needs=("sigma_rels", "update_every"), takes=takes,
        check=functools.partial(_check_numbered, library),
    )  # fmt: skip


# --- ordinary EMAs


@dataclass(frozen=True)
class _Found:
    """An ordinary EMA in a checkpoint, and the weights under the same names; empty where they are not there."""

    averaged: Tensors
    weights: Tensors = field(default_factory=dict)
    updates: Updates = field(default_factory=Updates)
    t_unit: str = "steps"


def _model(indexed: IndexedCheckpoint, but: str) -> Tensors:
    """The tensors of the group that models are in, if there is one beside that of the average."""
    name = next((name for name in MODEL_GROUPS if name != but and name in indexed.groups()), None)
    return {} if name is None else indexed.behind(name)


def _behind(tensors: Tensors, prefix: str) -> dict[str, Find]:
    return {name.removeprefix(prefix): find for name, find in tensors.items() if name.startswith(prefix)}


def _places(indexed: IndexedCheckpoint, ending: str) -> list[Keys]:
    """The keys before those that end so, of values and tensors."""
    keys = [*indexed.tensors, *(tuple(name.split(".")) for name in indexed.values)]
    found = {one[:-1] + ((one[-1].removesuffix(ending).rstrip("."),) if one[-1] != ending else ()) for one in keys
             if one[-1] == ending or one[-1].endswith(f".{ending}")}  # fmt: skip
    return sorted(found)


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and value >= 0 else None


def _copying(count: int | None) -> Updates:
    """Of an average whose first update copies the weights."""
    return Updates({"copies": 1}, count, from_first=True)


def _diffusers(indexed: IndexedCheckpoint) -> _Found | None:
    said = {key.removeprefix("ema."): value for key, value in indexed.values.items() if key.startswith("ema.")}
    updates = _whole(said.get("optimization_step"))
    if updates is None or not isinstance(said.get("decay"), float):
        return None
    warm_up = "power" if said.get("use_ema_warmup") else "ratio"
    rule = {"decay": said["decay"], "warm_up": warm_up, "copies": 1 + int(said.get("update_after_step") or 0)}
    rule |= {own: float(said[name]) for own, name in (("inv_gamma", "inv_gamma"), ("power", "power")) if name in said}
    rule["least"] = float(said.get("min_decay") or 0.0)
    return _Found(indexed.behind("ema"), indexed.behind("model"), Updates(rule, updates))


def _timm(indexed: IndexedCheckpoint) -> _Found | None:
    averaged = indexed.behind("state_dict_ema")
    return _Found(averaged, indexed.behind("state_dict"), _copying(None)) if averaged else None


def _lightning(indexed: IndexedCheckpoint) -> _Found | None:
    weights, averaged = indexed.behind("current_model_state"), indexed.behind("state_dict")
    updates = _whole(indexed.number("averaging_state", "n_averaged"))
    return _Found(averaged, weights, _copying(updates)) if weights and averaged and updates else None


def _averaged_model(indexed: IndexedCheckpoint) -> _Found | None:
    for place in _places(indexed, "n_averaged"):
        averaged = _behind(indexed.behind(*place), "module.")
        if averaged and (updates := _whole(indexed.number(*place, "n_averaged"))):
            return _Found(averaged, _model(indexed, ".".join(place)), _copying(updates))
    return None


def _ema_pytorch(indexed: IndexedCheckpoint) -> _Found | None:
    for place in _places(indexed, "initted"):
        group = indexed.behind(*place)
        averaged, weights = _behind(group, "ema_model."), _behind(group, "online_model.")
        calls = _whole(indexed.number(*place, "step"))
        if averaged and calls:
            updates = Updates({"decay": 0.9999, "warm_up": "power", "copies": 101}, calls, 10, True)
            return _Found(averaged, weights or _model(indexed, ".".join(place)), updates)
    return None


def _lit_ema(indexed: IndexedCheckpoint) -> _Found | None:
    places: list[Keys] = [(), *((name,) for name in indexed.groups())]
    for place in places:
        group = indexed.behind(*place)
        stored = _behind(group, "model_ema.")
        decay = stored.pop("decay", None)
        updates = stored.pop("num_updates", None)
        if decay is None or updates is None or not stored:
            continue
        others = {name: find for name, find in group.items() if not name.startswith("model_ema.")}
        for prefix in sorted({"", *(f"{name.split('.')[0]}." for name in others)}):
            plain = {name.removeprefix(prefix).replace(".", ""): name for name in others if name.startswith(prefix)}
            if stored.keys() <= plain.keys():
                averaged = {plain[name]: find for name, find in stored.items()}
                weights = {name: others[name] for name in others if name.startswith(prefix)}
                value, count = (indexed.number(*place, f"model_ema.{n}") for n in ("decay", "num_updates"))
                rule = {"decay": round(float(value), 7), "warm_up": "ratio" if count >= 0 else ""}
                return _Found(averaged, weights, Updates(rule, _whole(count)))
        raise FileFormatError(indexed.path, f"holds an EMA of {shown(next(iter(stored)))}, and no such weights")
    return None


def _torch_ema(indexed: IndexedCheckpoint) -> _Found | None:
    for place in _places(indexed, "decay"):
        listed = indexed.behind(*place, PARAMETERS)
        if not listed:
            continue
        weights = _model(indexed, ".".join(place))
        names = iter(weights.items())
        averaged = {}
        for find in listed.values():
            shape = tensor_shape(find())
            name = next((name for name, own in names if tensor_shape(own()) == shape and "running_" not in name), None)
            if name is None:
                reason = "holds an EMA without names, and not the weights that it is of in the same order"
                raise FileFormatError(indexed.path, reason)
            averaged[name] = find
        updates = _whole(indexed.number(*place, "num_updates"))
        rule = {"decay": float(indexed.number(*place, "decay")), "warm_up": "ratio" if updates else ""}
        return _Found(averaged, weights, Updates(rule, updates))
    return None


def _mmengine(indexed: IndexedCheckpoint) -> _Found | None:
    weights, averaged = _behind(indexed.behind("ema_state_dict"), "module."), indexed.behind("state_dict")
    updates = _whole(indexed.number("ema_state_dict", "steps"))
    return _Found(averaged, weights, _copying(updates)) if weights and averaged else None


_EDM_FILE = re.compile(r"network-snapshot-(?P<step>\d{1,20})\.pkl")
_EDM_OPTIONS = "training_options.json"


def _edm(indexed: IndexedCheckpoint) -> _Found | None:
    path = indexed.path
    averaged = indexed.behind("ema") or indexed.behind("G_ema")
    match = _EDM_FILE.fullmatch(path.name)
    if not averaged or match is None:
        return None
    state = path.with_name(f"training-state-{match['step']}.pt")
    if state.is_file():
        indexed = index_checkpoint(state)
    weights = indexed.behind("net") or indexed.behind("G")
    beside, said = path.with_name(_EDM_OPTIONS), {}
    if beside.is_file():
        said = parse_object(beside, read_small_file(beside, 10_000_000), "options of a training")
    batch, thousands, share = (
        next((said[name] for name in names if isinstance(said.get(name), int | float)), default)
        for names, default in (
            (("batch_size",), 0), (("ema_halflife_kimg", "ema_kimg"), 0), (("ema_rampup_ratio", "ema_rampup"), RAMP_UP)
        )
    )  # fmt: skip
    has_none = any(name in said and said[name] is None for name in ("ema_rampup_ratio", "ema_rampup"))
    rule: dict[str, Any] = {"copies": 1} if has_none else {"copies": 1, "warm_up": "ramp-up", "power": float(share)}
    if batch and thousands:
        rule["decay"] = 0.5 ** (batch / (1000 * thousands))
    return _Found(averaged, weights, Updates(rule, None, int(batch)), "images")


FINDERS: dict[str, Callable[[IndexedCheckpoint], _Found | None]] = {
    "diffusers-ema": _diffusers,
    "timm": _timm,
    "lightning-ema": _lightning,
    "averaged-model": _averaged_model,
    "ema-pytorch-ema": _ema_pytorch,
    "lit-ema": _lit_ema,
    "torch-ema": _torch_ema,
    "mmengine": _mmengine,
    "edm": _edm,
}
"""By kind, in the order in which a file is asked."""


def _find(library: str, indexed: IndexedCheckpoint) -> _Found | None:
    """The EMA that a library stored, if there is one; a FileFormatError if what is said of it are no such numbers."""
    try:
        found = FINDERS[library](indexed)
        rule = found.updates.rule if found else {}
        if rule.get("inv_gamma", 1.0) <= 0 or rule.get("power", 1.0) < 0:
            raise ValueError("its warm-up never begins")
    except (TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(indexed.path, f"holds an EMA whose settings cannot be read: {error}") from error
    return found


_EMA_NAME = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
"""In the name of a file or folder whose tensors are an ordinary EMA."""


def _read_ordinary(
    library: str, path: Path, indexed: IndexedCheckpoint, step: int, settings: Settings
) -> list[Checkpoint]:
    """The average that a library stored, or an average alone, and the weights where they are in the same checkpoint."""
    is_alone = library == "ema"
    found = _Found(indexed.model_tensors(settings.prefix)) if is_alone else _find(library, indexed)
    if found is None:
        raise FileFormatError(path, f"holds no EMA of {library}")
    averaged, weights = (
        part if is_alone else _behind(part, settings.prefix) for part in (found.averaged, found.weights)
    )
    if not averaged:
        raise FileFormatError(path, f"no tensor's name begins with {settings.prefix!r}")
    every = settings.update_every or found.updates.every
    if not every:
        reason = f"must be given, the images of a batch: neither {path.name} nor {_EDM_OPTIONS} beside it says it"
        raise InvalidValueError("update_every", reason)
    if found.t_unit == "images":  # names count thousands, rounded down
        step = -(-step // every) * every
    if weights and (others := sorted(averaged.keys() - weights.keys())):
        reason = f"holds an EMA and weights of different models: only the EMA has {names_in(others)}"
        raise FileFormatError(path, reason)
    both = settings.chosen({name: averaged.get(name, find) for name, find in weights.items()} or averaged)
    make = functools.partial(make_checkpoint, path, profile=Point(float(step)), step=step, kind=library,
                             t_unit=found.t_unit)  # fmt: skip
    own = [make(found={name: weights[name] for name in both})] if weights else []
    return [*own, make(found=both, updates=found.updates)]


_EMA_TAKES = (
    "step_from", "ema_decay", "ema_warmup", "ema_restarts", "ema_uncertainty", "ema_late", "update_every",
    "update_after_step", "steps_per_epoch",
)  # fmt: skip


def _ordinary(library: str, **named: Any) -> Kind:
    def is_in(_: Path, indexed: IndexedCheckpoint) -> bool:
        return _find(library, indexed) is not None

    return Kind(functools.partial(_read_ordinary, library), is_in, takes=_EMA_TAKES, **named)


# --- EDM2: power functions, with images and width in the name

_EDM2 = re.compile(r"network-snapshot-(?P<step>\d{1,20})-(?P<width>\d*\.\d+)\.pkl")


def _read_edm2(path: Path, indexed: IndexedCheckpoint, images: int, settings: Settings) -> list[Checkpoint]:
    match = _EDM2.fullmatch(path.name)
    width = float(match["width"]) if match else 0.0
    profile = PowerFunction.from_sigma_rel(width, images)
    found = settings.chosen(indexed.model_tensors(settings.prefix, "ema"))
    return [make_checkpoint(path, found, profile, images, "edm2", "images", width)]


TABLE = {
    "edm2": Kind(_read_edm2, name=_EDM2, form="network-snapshot-<images in thousands>-<width>.pkl", of_name=1000),
    "ema-pytorch": _numbered("ema-pytorch", True, ()),
    "posthoc-ema": _numbered("posthoc-ema", False, ("update_after_step",)),
    "torchtitan": Kind(
        _read_torchtitan, lambda _, indexed: bool(_titan_averages(indexed)),
        takes=("step_from", "update_every", "update_after_step"),
    ),
    **{name: _ordinary(name) for name in FINDERS},
    "edm": _ordinary("edm", name=_EDM_FILE, form="network-snapshot-<images in thousands>.pkl", of_name=1000),
    "ema": Kind(
        functools.partial(_read_ordinary, "ema"), lambda path, _: bool(_EMA_NAME.search(path.name)), takes=_EMA_TAKES
    ),
    "checkpoints": Kind(_read_weights, takes=("step_from",)),
}  # fmt: skip
"""Every kind, in the order in which a file is asked whether it is one; `checkpoints` are weights."""
