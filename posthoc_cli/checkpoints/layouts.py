"""The layouts of checkpoints, one entry of `TABLE` each: what programs store, and how it is recognised.

To add one, write a function that returns what a checkpoint holds, or None, add it to `TABLE` before "checkpoints",
which takes all other files, and add its name to `KINDS`. A setting that only some kinds have is a field of
`ImportSettings`, named in their `takes`.

Ordinary EMAs (of `LIBRARIES`) lie in the same checkpoint as the weights, or next to them:

    library                 average                           weights                 decay
    diffusers' EMAModel     a folder `<component>_ema/`       a folder `<component>/`  its `config.json`
    timm                    `state_dict_ema`                  `state_dict`             absent
    Lightning               `state_dict`                      `current_model_state`    absent; `n_averaged`
    torch's AveragedModel   `module.*` next to `n_averaged`   another group            absent; `n_averaged`
    ema-pytorch's EMA       `ema_model.*`                     `online_model.*`         absent; `step`
    LitEma                  `model_ema.*` without dots        in the same group        `decay`, `num_updates`
    torch-ema               a list `shadow_params`            another group            `decay`, `num_updates`
    torchtitan              `state.<name>.ema_params`         the rest of the folder   0.05 of training: its default
    mmengine's EMAHook      `state_dict`, since they swap     `ema_state_dict`         absent; `steps`
    EDM, StyleGAN           `ema`, `G_ema` of a pickle        `net`, `G`               `training_options.json`
    any other (DiT, ...)    a key with a word for it          a set with its names     absent

EDM has `net` in `training-state-*.pt` next to the pickle. Both count images, with the half-life min(its largest, 0.05
of the images so far), so that the k-th update of a batch keeps 2**(-1 / (0.05 (k - 1))), and the first one copies.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from posthoc_cli.checkpoints.index import (
    AVERAGE_WORD,
    MODEL_GROUPS,
    NOT_WEIGHTS,
    Find,
    IndexedCheckpoint,
    Tensors,
    index_checkpoint,
    names_in,
    tensor_shape,
)
from posthoc_cli.checkpoints.pickles import PARAMETERS, Keys
from posthoc_cli.checkpoints.source import Checkpoint, ImportSettings, Updates, make_checkpoint
from posthoc_cli.checkpoints.steps import checked_step, step_of
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import FileFormatError, InvalidValueError, shown
from posthoc_cli.profiles import (
    RAMP_UP,
    UNLIMITED,
    Discrete,
    Point,
    PowerFunction,
    StoredProfile,
    ema_pytorch_profile,
    gamma_from_sigma_rel,
)
from posthoc_cli.snapshots.tensorfile import parse_object, read_small_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a checkpoint holds: an average, the weights under the same names, or one of them alone.

    Attributes:
        averaged, weights: tensors by their names; empty if the checkpoint has none.
        updates: how an ordinary EMA was updated; its profile follows in `Checkpoint.with_settings`.
        profile, sigma_rel: of another average, the profile at a step, and the width that its user asked for.
        t_unit: what the steps count.
        asks, asks_with_decay: settings that must be given, or must be if a decay is, and the reason.
    """

    averaged: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    updates: Updates | None = None
    profile: Callable[[int], StoredProfile] | None = None
    sigma_rel: float = 0.0
    t_unit: str = "steps"
    asks: Mapping[str, str] = field(default_factory=dict)
    asks_with_decay: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> Tensors:
        """The average, with the weights' tensors that it lacks."""
        return {name: self.averaged.get(name, find) for name, find in self.weights.items()} or self.averaged

    def without_prefix(self, indexed: IndexedCheckpoint, prefix: str) -> Found:
        """Return what has a prefix, by its names without it."""
        averaged, weights = (_without_prefix(tensors, prefix) for tensors in (self.averaged, self.weights))
        if not averaged:
            raise FileFormatError(indexed.path, f"no tensor's name begins with {prefix!r}")
        return replace(self, averaged=averaged, weights=weights)


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoints.

    Attributes:
        find: returns what a checkpoint of this kind holds, else None; called only if the name fits.
        name: pattern of its files' names, with a group for the step; None if they may have any name.
        of_name: number of steps that 1 in the name counts.
        takes: settings in addition to the selection of tensors.
    """

    find: Callable[[IndexedCheckpoint, ImportSettings], Found | None]
    name: re.Pattern[str] | None = None
    of_name: int = 1
    takes: tuple[str, ...] = ()


def _recognise(indexed: IndexedCheckpoint, settings: ImportSettings) -> tuple[str, Found]:
    """Return the kind of a checkpoint, the given one or the first of `TABLE` that fits, and what it holds."""
    given = settings.kind or ("ema" if settings.average or settings.weights else None)
    for name in [given] if given else TABLE:
        kind = TABLE[name]
        if (kind.name is None or kind.name.fullmatch(indexed.path.name)) and (found := kind.find(indexed, settings)):
            return name, found
    raise FileFormatError(indexed.path, f"is no file of {given}")


def _step_in(kind: Kind, indexed: IndexedCheckpoint, settings: ImportSettings, by_word: str) -> int:
    """Return the step of a checkpoint of a kind; 0 before the training."""
    if kind.name and (match := kind.name.fullmatch(indexed.path.name)):
        number = kind.of_name * int(match["step"])
        return checked_step(indexed.path, number) if number else 0
    is_ema = "steps_per_epoch" in kind.takes or settings.ema_decay is not None
    return step_of(indexed, settings.step_from, by_word, settings.steps_per_epoch or 0 if is_ema else None)


def read_checkpoint(
    indexed: IndexedCheckpoint, settings: ImportSettings, step: int | None = None, by_word: str = ""
) -> list[Checkpoint]:
    """Return the sources in a checkpoint: the weights, the average, or both; none for the step 0.

    The step is read if it is not given; for `by_word` see `step_of`.
    """
    (kind, found), path = _recognise(indexed, settings), indexed.path
    step = _step_in(TABLE[kind], indexed, settings, by_word) if step is None else step
    if not step:
        log.warning("%s: left out, as its weights are those before the training, of step 0", path)
        return []
    for name, reason in {**found.asks, **(found.asks_with_decay if settings.ema_decay is not None else {})}.items():
        if getattr(settings, name) in (None, ()):
            raise InvalidValueError(name, f"must be given{reason}")
    if found.updates and len(settings.sigma_rels) > 1:
        _refuse_widths(settings, f"must be one, of the average in {path.name}")
    if found.updates and found.t_unit == "images":  # names count thousands, rounded down
        every = settings.update_every or found.updates.every
        step = -(-step // every) * every
    if found.weights and (others := sorted(found.averaged.keys() - found.weights.keys())):
        reason = f"holds an EMA and weights of different models: only the EMA has {names_in(others)}"
        raise FileFormatError(path, reason)
    tensors, point = settings.select(found.complete), Point(float(step))
    make = functools.partial(make_checkpoint, path, step=step, kind=kind, t_unit=found.t_unit)
    made = [make({name: found.weights[name] for name in tensors}, profile=point)] if found.weights else []
    if found.averaged:
        profile = found.profile(step) if found.profile else point
        made.append(make(tensors, profile=profile, sigma_rel=found.sigma_rel, updates=found.updates))
    return made


def check_used(settings: ImportSettings, kinds: Collection[str]) -> None:
    """Raise InvalidValueError if a given setting does not apply to checkpoints of these kinds."""
    known = {"kind", "prefix", "include", "exclude"}.union(*(TABLE[kind].takes for kind in kinds))
    for name, value in settings.given.items():
        if name not in known:
            text = ",".join(f"{each:.12g}" for each in value) if isinstance(value, list) else str(value)
            hint = "averages that no name tells are said by kind 'ema', or by `average`" if name in _EMA_TAKES else ""
            raise InvalidValueError(name, f"says nothing about {' and '.join(sorted(kinds))}", hint, value=text)


def _refuse_widths(settings: ImportSettings, reason: str) -> None:
    raise InvalidValueError("sigma_rels", reason, value=names_in([f"{width:g}" for width in settings.sigma_rels]))


# --- ema-pytorch and pytorch-posthoc-ema: averages by number, whose settings are not in their files

_DEFAULT_AFTER = 100
"""The `update_after_step` of `pytorch-posthoc-ema` unless it was changed."""
_NUMBERED = re.compile(r"(?P<number>\d{1,20})[._](?P<step>\d{1,20})\.(?:pt|safetensors)")
_COUNTERS = ("initted", "step")
"""Tensors of these libraries that are not of the model."""
_INNER = "ema_model."
"""Prefix of names in files of `ema-pytorch`."""


def _find_numbered(library: str, indexed: IndexedCheckpoint, settings: ImportSettings) -> Found | None:
    path, inner = indexed.path, _INNER if library == "ema-pytorch" else ""
    has_inner = any(keys[0].startswith(_INNER) for keys in indexed.tensors)
    match = _NUMBERED.fullmatch(path.name)
    if match is None or (_COUNTERS[0],) not in indexed.tensors or bool(inner) is not has_inner:
        return None
    tensors = {name: find for name, find in indexed.model_tensors(settings.prefix or inner).items()
               if name not in _COUNTERS}  # fmt: skip
    number, widths = int(match["number"]), settings.sigma_rels
    unsaid = f" to an import: files of {library}, such as {path.name}, do not hold it"
    asks = {"sigma_rels": unsaid, "update_every": unsaid}
    if widths and number >= len(widths):
        _refuse_widths(settings, f"must be one for each average; {path.name} is of number {number}, counted from 0")
    if not (widths and settings.update_every):
        return Found(tensors, asks=asks)
    if not inner:
        _check_update_after_step(indexed, int(match["step"]), settings)
    first = {} if inner else {"first": max(_update_after_step(settings), 1)}
    gamma, every = gamma_from_sigma_rel(widths[number]), settings.update_every

    def profile(step: int) -> Discrete:
        return ema_pytorch_profile(gamma, step, every, **first)

    return Found(tensors, sigma_rel=widths[number], profile=profile)


def _update_after_step(settings: ImportSettings) -> int:
    return _DEFAULT_AFTER if settings.update_after_step is None else settings.update_after_step


def _check_update_after_step(indexed: IndexedCheckpoint, step: int, settings: ImportSettings) -> None:
    """Raise InvalidValueError if the number of calls that `pytorch-posthoc-ema` counted contradicts the setting."""
    counted, value = indexed.number("step"), _update_after_step(settings)
    if counted is None or not math.isfinite(counted):  # above the range of float16
        return
    eps = max((EPS.get(chunk.tensor.dtype, 0.0) for chunk in indexed.tensors.get(("step",), list)()), default=0.0)
    first = step - counted + 1  # it counts from the call of this number on
    if abs(first - max(value, 1)) > counted * eps / 2:
        reason = f"does not fit {indexed.path.name}, which has counted {counted:,.12g} of {step:,} calls: about"
        raise InvalidValueError("update_after_step", f"{reason} {first:,.12g} would", value=value)


# --- ordinary EMAs of known libraries


_Finder = Callable[[IndexedCheckpoint], Found | None]
_TITAN_EMA = re.compile(r"(?:ema_optimizer\.)*state\.(.+)\.ema_params")


def _model_tensors(indexed: IndexedCheckpoint, average: Keys) -> Tensors:
    """Return the tensors of the model's group, which is not that of the average; empty if there is none."""
    groups = [name for name in MODEL_GROUPS if name != ".".join(average) and name in indexed.groups()]
    return indexed.under(groups[0]) if groups else {}


def _without_prefix(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the tensors or values whose names have a prefix, by their names without it."""
    return {name.removeprefix(prefix): find for name, find in tensors.items() if name.startswith(prefix)}


def _parents(indexed: IndexedCheckpoint, last: str) -> list[Keys]:
    """Return the keys of the groups with a tensor or value of this name."""
    parents: set[Keys] = set()
    for *outer, name in (*indexed.tensors, *(name.split(".") for name in indexed.values)):
        group, dot, end = name.rpartition(".")  # a key may be several names, as in a state dict
        if end == last:
            parents.add((*outer, group) if dot else tuple(outer))
    return sorted(parents)


def _as_count(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and value >= 0 else None


def _first_copies(count: int | None) -> Updates:
    """Return the updates of an average whose first update copies the weights."""
    return Updates({"copies": 1}, count, from_first=True)


def _under_keys(average: str, weights: str, count: Keys = (), inner: str = "") -> _Finder:
    """Return the finder of a library that stores both under fixed keys, the weights with an inner prefix."""

    def find(indexed: IndexedCheckpoint) -> Found | None:
        averaged, of_model = indexed.under(average), _without_prefix(indexed.under(weights), inner)
        updates = _as_count(indexed.number(*count)) if averaged and of_model and count else None
        is_found = averaged and of_model and (updates or not count)
        return Found(averaged, of_model, _first_copies(updates)) if is_found else None

    return find


def _diffusers(indexed: IndexedCheckpoint) -> Found | None:
    groups = [name for name in indexed.groups() if name.endswith("_ema")]
    config = _without_prefix(indexed.values, f"{groups[0]}.") if len(groups) == 1 else {}
    updates = _as_count(config.get("optimization_step"))
    if updates is None or not isinstance(config.get("decay"), float):
        return None
    warm_up = "power" if config.get("use_ema_warmup") else "ratio"
    rule = {"decay": config["decay"], "warm_up": warm_up, "copies": 1 + int(config.get("update_after_step") or 0)}
    rule |= {name: float(config[name]) for name in ("inv_gamma", "power") if name in config}
    rule["least"] = float(config.get("min_decay") or 0.0)
    weights = indexed.under(groups[0].removesuffix("_ema")) or indexed.under("model")
    return Found(indexed.under(groups[0]), weights, Updates(rule, updates))


def _averaged_model(indexed: IndexedCheckpoint) -> Found | None:
    for parent in _parents(indexed, "n_averaged"):
        averaged = _without_prefix(indexed.under(*parent), "module.")
        if averaged and (updates := _as_count(indexed.number(*parent, "n_averaged"))):
            return Found(averaged, _model_tensors(indexed, parent), _first_copies(updates))
    return None


def _torchtitan(indexed: IndexedCheckpoint) -> Found | None:
    """The update at `start_step` + n `update_every` keeps 2**(-1 / (0.05 n)), or another `half_life_fraction`."""
    matches = ((_TITAN_EMA.fullmatch(".".join(keys)), find) for keys, find in indexed.tensors.items())
    averaged = {match[1]: find for match, find in matches if match}
    rule = {"decay": UNLIMITED, "warm_up": "ramp-up", "power": RAMP_UP}
    return Found(averaged, indexed.model_tensors(), Updates(rule, at_start=True)) if averaged else None


def _ema_pytorch(indexed: IndexedCheckpoint) -> Found | None:
    for parent in _parents(indexed, "initted"):
        group = indexed.under(*parent)
        averaged, weights = _without_prefix(group, _INNER), _without_prefix(group, "online_model.")
        if averaged and (calls := _as_count(indexed.number(*parent, "step"))):
            updates = Updates({"warm_up": "power"}, calls, from_first=True, counts_calls=True)
            unsaid = f": {indexed.path.name} does not say it; the default of the library is"
            asks = {"update_every": f"{unsaid} 10", "update_after_step": f"{unsaid} 100"}
            return Found(averaged, weights or _model_tensors(indexed, parent), updates, asks_with_decay=asks)
    return None


def _lit_ema(indexed: IndexedCheckpoint) -> Found | None:
    for parent in [(), *((name,) for name in indexed.groups())]:
        group = indexed.under(*parent)
        stored = _without_prefix(group, "model_ema.")
        decay, updates = stored.pop("decay", None), stored.pop("num_updates", None)
        if decay is None or updates is None or not stored:
            continue
        others = {name: find for name, find in group.items() if not name.startswith("model_ema.")}
        for prefix in sorted({"", *(f"{name.split('.')[0]}." for name in others)}):
            weights = {name: find for name, find in others.items() if name.startswith(prefix)}
            full_names = {name.removeprefix(prefix).replace(".", ""): name for name in weights}
            if stored.keys() <= full_names.keys():
                averaged = {full_names[name]: find for name, find in stored.items()}
                value, count = (indexed.number(*parent, f"model_ema.{n}") for n in ("decay", "num_updates"))
                rule = {"decay": round(float(value), 7), "warm_up": "ratio" if count >= 0 else ""}
                return Found(averaged, weights, Updates(rule, _as_count(count)))
        raise FileFormatError(indexed.path, f"holds an EMA of {shown(next(iter(stored)))}, and no such weights")
    return None


def _torch_ema(indexed: IndexedCheckpoint) -> Found | None:
    for parent in _parents(indexed, "decay"):
        if not (listed := indexed.under(*parent, PARAMETERS)):
            continue
        weights = _model_tensors(indexed, parent)
        named = ((name, tensor_shape(find())) for name, find in weights.items() if "running_" not in name)
        averaged = {}
        for find in listed.values():  # in the order of the model's parameters
            shape = tensor_shape(find())
            name = next((name for name, at in named if at == shape), None)
            if name is None:
                reason = "holds an EMA without names, and no weights of these shapes in the same order"
                raise FileFormatError(indexed.path, reason)
            averaged[name] = find
        updates = _as_count(indexed.number(*parent, "num_updates"))
        rule = {"decay": float(indexed.number(*parent, "decay")), "warm_up": "ratio" if updates else ""}
        return Found(averaged, weights, Updates(rule, updates))
    return None


_EDM_FILE = re.compile(r"network-snapshot-(?P<step>\d{1,20})\.pkl")
_EDM_OPTIONS = "training_options.json"


def _edm(indexed: IndexedCheckpoint) -> Found | None:
    path = indexed.path
    averaged, match = indexed.under("ema") or indexed.under("G_ema"), _EDM_FILE.fullmatch(path.name)
    if not averaged or match is None:
        return None
    state, file = path.with_name(f"training-state-{match['step']}.pt"), path.with_name(_EDM_OPTIONS)
    if state.is_file():
        indexed = index_checkpoint(state)
    options: dict[str, Any] = {}
    if file.is_file():
        options = parse_object(file, read_small_file(file, 10_000_000), "options of a training")

    def number(*names: str, default: float = 0) -> Any:
        return next((options[name] for name in names if isinstance(options.get(name), int | float)), default)

    rule: dict[str, Any] = {"copies": 1} | ({"warm_up": ""} if options else {})
    ramps = ("ema_rampup_ratio", "ema_rampup")  # null for none
    if options and not any(name in options and options[name] is None for name in ramps):
        rule |= {"warm_up": "ramp-up", "power": float(number(*ramps, default=RAMP_UP))}
    batch, thousands = number("batch_size"), number("ema_halflife_kimg", "ema_kimg")
    if batch and thousands:
        rule["decay"] = 0.5 ** (batch / (1000 * thousands))
    unsaid = f", the images of a batch: neither {path.name} nor {_EDM_OPTIONS} in its folder says it"
    unclear = f", ramp-up or none: without {_EDM_OPTIONS} {path.name} does not say it"
    return Found(
        averaged, indexed.under("net") or indexed.under("G"), Updates(rule, None, int(batch)), t_unit="images",
        asks={} if batch else {"update_every": unsaid}, asks_with_decay={} if options else {"ema_warmup": unclear},
    )  # fmt: skip


LIBRARIES: dict[str, _Finder] = {
    "torchtitan": _torchtitan,
    "diffusers-ema": _diffusers,
    "timm": _under_keys("state_dict_ema", "state_dict"),
    "lightning-ema": _under_keys("state_dict", "current_model_state", ("averaging_state", "n_averaged")),
    "averaged-model": _averaged_model,
    "ema-pytorch-ema": _ema_pytorch,
    "lit-ema": _lit_ema,
    "torch-ema": _torch_ema,
    "mmengine": _under_keys("state_dict", "ema_state_dict", ("ema_state_dict", "steps"), "module."),
    "edm": _edm,
}
"""A function for each library that returns its EMA in a checkpoint, or None; in the order of the calls."""


def _find_library(library: str, indexed: IndexedCheckpoint, settings: ImportSettings) -> Found | None:
    """Return the EMA that a library stored, or None; raise FileFormatError if its settings are not such numbers."""
    try:
        found = LIBRARIES[library](indexed)
        rule = found.updates.rule if found and found.updates else {}
        if rule.get("inv_gamma", 1.0) <= 0 or rule.get("power", 1.0) < 0:
            raise ValueError("its warm-up never begins")
    except (TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(indexed.path, f"holds an EMA whose settings cannot be read: {error}") from error
    return found.without_prefix(indexed, settings.prefix) if found and settings.prefix else found


# --- any other trainer: two sets of tensors with the same names, one of whose keys says that it is the average


def _two_sets(indexed: IndexedCheckpoint, settings: ImportSettings) -> Found | None:
    """Return the average and the weights in a checkpoint, by their keys, or by prefixes of the names in one set.

    The average is the set whose key has a word for it, the weights are a set next to it with the same names and shapes;
    or both are those that the settings name. Raise FileFormatError if several may be meant.
    """
    sets = _sets_of_tensors(indexed)
    wanted, given = (_named_set(indexed, sets, text) for text in (settings.average, settings.weights))
    pairs = _pairs(sets, [wanted] if wanted else None, given)
    if wanted and not pairs:
        return Found(sets[wanted])
    unclear = [*pairs] if len(pairs) > 1 else next(iter(pairs.values()), [])
    if len(unclear) > 1:
        reason = f"which of its sets of tensors is the {'average' if len(pairs) > 1 else 'model'} is unclear: "
        hint = "name the average by `average`, or both by `average` and `weights` in an import"
        raise FileFormatError(indexed.path, reason + names_in([".".join(key) for key in unclear]), hint)
    for key, (weights,) in pairs.items():
        return Found(sets[key], sets[weights])
    models = [name for name in indexed.groups() if not name.startswith(NOT_WEIGHTS) and name != "opt"]
    is_alone = len(models) == 1 and AVERAGE_WORD.search(models[0])
    return Found(indexed.under(models[0])) if is_alone else None


def _pairs(
    sets: Mapping[Keys, Tensors], averages: Sequence[Keys] | None = None, weights: Keys | None = None
) -> dict[Keys, list[Keys]]:
    """Return the sets that may be the weights of each average, which is a set whose key has a word for it.

    Of several, it is the one whose key is that of the average without the word, as of `generator_ema`.
    """
    named = [key for key in sets if AVERAGE_WORD.search(key[-1])]
    pairs = {}
    for key in named if averages is None else averages:
        others = [
            other
            for other in sets
            if other[:-1] == key[:-1] and other not in (key, *named) and _are_alike(sets[key], sets[other])
        ]
        twins = [other for other in others if other[-1] == AVERAGE_WORD.sub("", key[-1]).strip("_-")]
        if weights or others:
            pairs[key] = [weights] if weights else twins or others
    return pairs


_DEEPEST_SET = 2
"""The most keys that lead to a set of tensors: deeper ones are the states of optimizers."""


def _sets_of_tensors(indexed: IndexedCheckpoint) -> dict[Keys, dict[str, Find]]:
    """Return the sets of tensors by the keys that lead to them, of which the last may be the first part of names."""
    sets: dict[Keys, dict[str, Find]] = {}
    prefixes: dict[Keys, dict[str, Find]] = {}
    for keys, find in indexed.tensors.items():
        for depth in range(1, min(len(keys), _DEEPEST_SET + 1)):
            sets.setdefault(keys[:depth], {})[".".join(keys[depth:])] = find
        first, dot, rest = keys[-1].partition(".")
        if dot and len(keys) <= _DEEPEST_SET:
            prefixes.setdefault((*keys[:-1], first), {})[rest] = find
    # A prefix of fewer names is that of a layer.
    counts = Counter(keys[:-1] for keys in indexed.tensors)
    return sets | {key: part for key, part in prefixes.items() if 4 * len(part) >= counts[key[:-1]]}


def _named_set(indexed: IndexedCheckpoint, sets: Collection[Keys], text: str | None) -> Keys | None:
    if text is None:
        return None
    matching = [keys for keys in sets if fnmatchcase(".".join(keys), text.rstrip("."))]
    outermost = [keys for keys in matching if len(keys) == min(map(len, matching))]
    if len(outermost) == 1:
        return outermost[0]
    wrong = "has several sets of tensors" if outermost else "has no set of tensors"
    known = names_in([".".join(keys) for keys in outermost or sets])
    raise FileFormatError(indexed.path, f"{wrong} {shown(text)}: {known}")


def _are_alike(averaged: Tensors, weights: Tensors) -> bool:
    """Return whether the weights have all names of an average, with the same shapes, and mostly no others."""
    if not averaged.keys() <= weights.keys() or 2 * len(averaged) < len(weights):
        return False
    return all(tensor_shape(find()) == tensor_shape(weights[name]()) for name, find in averaged.items())


def named_decay(path: Path) -> float | None:
    """Return the decay in the name of guided-diffusion's `ema_0.9999_000050.pt`, next to `model000050.pt`."""
    match = re.match(r"ema_(0\.\d+)_", path.name)
    return float(match[1]) if match else None


def _find_any(indexed: IndexedCheckpoint, settings: ImportSettings) -> Found | None:
    """Return two sets of tensors, or one in a file that a name or the settings call an average."""
    if (found := _two_sets(indexed, settings)) is not None:
        found = found.without_prefix(indexed, settings.prefix) if settings.prefix else found
        return replace(found, updates=Updates())
    if not (settings.kind or settings.average or settings.weights or AVERAGE_WORD.search(indexed.path.name)):
        return None
    decay = named_decay(indexed.path)
    return Found(indexed.model_tensors(settings.prefix), updates=Updates({} if decay is None else {"decay": decay}))


def stored_in(path: Path, weights: bool = False, average: str | None = None) -> Checkpoint:
    """Return the average that a training's checkpoint holds, as it is, or with `weights` its raw weights.

    `average` is the key or prefix of the average's tensors, or a glob of it; by default the one whose key says it.
    """
    indexed, settings = index_checkpoint(path), ImportSettings()
    sets = _sets_of_tensors(indexed)
    if key := _named_set(indexed, sets, average):
        others = _pairs(sets, [key]).get(key, [])
        found: Found | None = Found(sets[key], sets[others[0]] if len(others) == 1 else {})
    else:
        found = next(filter(None, (_find_library(library, indexed, settings) for library in LIBRARIES)), None)
    if weights:
        models = {key for others in _pairs(sets).values() for key in others}
        tensors = found.weights if found else sets[models.pop()] if len(models) == 1 else {}
        return make_checkpoint(path, tensors or indexed.model_tensors(), Point(1.0), 1)
    if not (found := found or _find_any(indexed, settings)):
        keys = names_in(indexed.groups())
        reason = f"holds no average that its keys name ({keys})" if keys else "holds no average that a key names"
        raise FileFormatError(path, reason, "name its key by `average`, or say `weights` for the raw ones")
    return make_checkpoint(path, found.complete, Point(1.0), 1)


# --- EDM2: power functions, with images and width in the name

_EDM2 = re.compile(r"(?:network-snapshot|edm2(?:-[a-z0-9]+)+)-(?P<step>\d{1,20})-(?P<width>\d*\.\d+)\.pkl")


def _find_edm2(indexed: IndexedCheckpoint, settings: ImportSettings) -> Found | None:
    match = _EDM2.fullmatch(indexed.path.name)
    width = float(match["width"]) if match else 0.0
    profile = functools.partial(PowerFunction.from_sigma_rel, width)
    return Found(indexed.model_tensors(settings.prefix, "ema"), profile=profile, sigma_rel=width, t_unit="images")


_EMA_TAKES = (
    "step_from", "sigma_rels", "ema_decay", "ema_warmup", "ema_restarts", "ema_uncertainty", "ema_late", "update_every",
    "update_after_step", "steps_per_epoch",
)  # fmt: skip

TABLE = {
    "edm2": Kind(_find_edm2, _EDM2, of_name=1000),
    "ema-pytorch": Kind(
        functools.partial(_find_numbered, "ema-pytorch"), _NUMBERED, takes=("sigma_rels", "update_every")
    ),
    "posthoc-ema": Kind(
        functools.partial(_find_numbered, "posthoc-ema"),
        _NUMBERED,
        takes=("sigma_rels", "update_every", "update_after_step"),
    ),
    **{name: Kind(functools.partial(_find_library, name), takes=_EMA_TAKES) for name in LIBRARIES},
    "edm": Kind(functools.partial(_find_library, "edm"), _EDM_FILE, of_name=1000, takes=_EMA_TAKES),
    "ema": Kind(_find_any, takes=(*_EMA_TAKES, "average", "weights")),
    "checkpoints": Kind(
        lambda indexed, settings: Found(weights=indexed.model_tensors(settings.prefix)), takes=("step_from",)
    ),
}
"""Every kind, in the order in which a file is tried; the last one, `checkpoints`, is for weights."""
