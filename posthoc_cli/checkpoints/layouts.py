"""The layouts of checkpoints, one entry of `TABLE` each: what programs store, and how it is
recognised.

To add one, write a function that returns what a checkpoint holds, or None, add it to `TABLE` before
"checkpoints", which takes all other files, and add its name to `KINDS`. A setting that only some
kinds have is a field of `ImportSettings`, named next to their function.

Ordinary EMAs lie in the same checkpoint as the weights, or next to them, under the names that each
function looks for.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from posthoc_cli.checkpoints.index import (
    AVERAGE_WORD,
    NOT_WEIGHTS,
    IndexedCheckpoint,
    Tensors,
    index_checkpoint,
    names_in,
    tensor_shape,
)
from posthoc_cli.checkpoints.pickles import PARAMETERS
from posthoc_cli.checkpoints.settings import UNSPECIFIED, ImportSettings
from posthoc_cli.checkpoints.source import Checkpoint, make_checkpoint
from posthoc_cli.checkpoints.steps import checked_step, step_of
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.errors import FileFormatError, InvalidValueError, shown
from posthoc_cli.profiles import (
    RAMP_UP,
    UNLIMITED,
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
    """What a checkpoint holds: an average, the weights under the same names, or one of them
    alone."""

    averaged: Tensors = field(default_factory=dict)  # by name; empty if the checkpoint has none
    weights: Tensors = field(default_factory=dict)
    # of an ordinary EMA; its profile follows in `Checkpoint.with_settings`
    updates: Updates | None = None
    profile: Callable[[int], StoredProfile] | None = None  # of another average, at a step
    sigma_rel: float = 0.0  # and the width that its user asked for
    step: int | None = None  # in a name of this kind; None to read it
    t_unit: str = "steps"  # what the steps count
    # settings that must be given, and the reason
    asks: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(
    indexed: IndexedCheckpoint, settings: ImportSettings, step: int | None = None, by_word: str = ""
) -> list[Checkpoint]:
    """Return the sources in a checkpoint: the weights, the average, or both; none for the step 0.

    The step is read if it is not given; for `by_word` see `step_of`.
    """
    path, (kind, found) = indexed.path, _recognise(indexed, settings)
    if step is None and found.step is not None:
        step = checked_step(path, found.step)
    elif step is None:
        step = step_of(
            indexed, settings, bool(found.updates) or settings.ema_decay is not None, by_word
        )
    if not step:
        log.warning("%s: left out, as its weights are those before the training, of step 0", path)
        return []
    for setting, why in found.asks.items():
        if getattr(settings, setting) in (None, ()):
            raise InvalidValueError(setting, f"must be given{why}")
    is_one = (
        len(settings.sigma_rels) == 1 if found.updates else found.sigma_rel or not found.profile
    )
    if settings.sigma_rels and not is_one:
        need = "one, of the average" if found.updates else "one for each average, also for that"
        raise InvalidValueError("sigma_rels", f"must be {need} in {path.name}")
    averaged, weights = (
        {
            name.removeprefix(settings.prefix): find
            for name, find in tensors.items()
            if name.startswith(settings.prefix)
        }
        for tensors in (found.averaged, found.weights)
    )
    reason, others = "", sorted(averaged.keys() - weights.keys()) if weights else []
    if others:
        reason = (
            f"holds an EMA and weights of different models: only the EMA has {names_in(others)}"
        )
    if bool(averaged) < bool(found.averaged) or bool(weights) < bool(found.weights):
        known = names_in([*found.weights, *found.averaged])
        reason = f"no tensor's name begins with {shown(settings.prefix)}; it has {known}"
    if reason:
        raise FileFormatError(path, reason)
    tensors, point = settings.select(_completed(averaged, weights)), Point(float(step))
    is_step = indexed.step is not None or found.step is not None or "step" in path.name
    make = functools.partial(
        make_checkpoint,
        path,
        step=step,
        kind=kind,
        t_unit=found.t_unit,
        has_step_unit=is_step or bool(settings.step_from or settings.steps_per_epoch),
    )
    made = [make({name: weights[name] for name in tensors}, profile=point)] if weights else []
    if averaged:
        profile = found.profile(step) if found.profile else point
        average = make(tensors, profile=profile, sigma_rel=found.sigma_rel, updates=found.updates)
        made.append(average.with_settings(settings))
    return made


def _completed(averaged: Tensors, weights: Tensors) -> Tensors:
    """Return an average, with the weights' tensors that it lacks, in their order."""
    return {name: averaged.get(name, find) for name, find in weights.items()} or averaged


def _recognise(indexed: IndexedCheckpoint, settings: ImportSettings) -> tuple[str, Found]:
    """Return the kind of a checkpoint, the given one or the first of `TABLE` that fits, and what it
    holds."""
    given = settings.kind or ("ema" if settings.average or settings.weights else None)
    for kind in [given] if given else TABLE:
        try:
            if found := TABLE[kind][0](indexed, settings):
                return kind, found
        except (TypeError, ValueError, OverflowError) as error:
            raise FileFormatError(
                indexed.path, f"holds an EMA whose settings cannot be read: {error}"
            ) from error
    raise FileFormatError(indexed.path, f"is no file of {given}")


def stored_in(path: Path, weights: bool = False, average: str | None = None) -> Checkpoint:
    """Return the average that a training's checkpoint holds, as it is, or with `weights` its raw
    weights.

    `average` is the key or prefix of the average's tensors, or a glob of it; by default the one
    whose key says it.
    """
    indexed = index_checkpoint(path)
    sets = _sets_of_tensors(indexed)
    models = {key for others in _pairs(sets).values() for key in others}
    if weights and len(models) == 1:  # also if it has several averages
        return make_checkpoint(path, sets[models.pop()], Point(1.0), 1)
    _, found = _recognise(indexed, replace(UNSPECIFIED, average=average))
    if not (weights or found.averaged):
        reason = f"holds no average that its keys name ({names_in(indexed.groups())})"
        raise FileFormatError(
            path, reason, "name its key by `average`, or say `weights` for the raw ones"
        )
    tensors = (
        found.weights or indexed.model_tensors()
        if weights
        else _completed(found.averaged, found.weights)
    )
    return make_checkpoint(path, tensors, Point(1.0), 1)


_Finder = Callable[[IndexedCheckpoint, ImportSettings], Found | None]


# --- ema-pytorch and pytorch-posthoc-ema: averages by number, whose settings are not in their files

_NUMBERED = re.compile(r"(?P<number>\d{1,20})[._](?P<step>\d{1,20})\.(?:pt|safetensors)")
_INNER = "ema_model."  # prefix of names in files of `ema-pytorch`


def _numbered(library: str, indexed: IndexedCheckpoint, settings: ImportSettings) -> Found | None:
    name, inner, has_inner = indexed.path.name, indexed.under(_INNER), library == "ema-pytorch"
    match = _NUMBERED.fullmatch(name)
    if not match or ("initted",) not in indexed.tensors or bool(inner) is not has_inner:
        return None
    number, first = (
        int(match["number"]),
        1 if has_inner else max(settings.update_after_step or 0, 1),
    )
    width = next(iter(settings.sigma_rels[number:]), 0.0)
    gamma, every = gamma_from_sigma_rel(width) if width else 0.0, settings.update_every or 1
    profile = functools.partial(ema_pytorch_profile, gamma, every=every, first=first)
    tensors = inner or indexed.model_tensors(settings.prefix)
    unsaid = f" to an import: files of {library}, such as {name}, do not hold it"
    asks = {"sigma_rels": unsaid, "update_every": unsaid}
    if not has_inner:
        asks["update_after_step"] = f"{unsaid}; the default of the library is 100"
    model = {name: find for name, find in tensors.items() if name not in ("initted", "step")}
    return Found(model, profile=profile, sigma_rel=width, step=int(match["step"]), asks=asks)


# --- ordinary EMAs of known libraries


_TITAN_EMA = re.compile(r"(?:ema_optimizer\.)*state\.(.+)\.ema_params")


def _as_count(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and value >= 0 else None


def _under_keys(average: str, weights: str, count: str = "") -> _Finder:
    """Return the finder of a library that stores both under prefixes, and the number of updates
    under a name.

    They are within a group or in none. Without a prefix, the weights are the model next to the
    group, if there is one.
    """

    def find(indexed: IndexedCheckpoint, _: ImportSettings) -> Found | None:
        for parent in indexed.parents(count) if count else [""]:
            averaged, updates = (
                indexed.under(parent + average),
                _as_count(indexed.number(parent + count)),
            )
            of_model = (
                indexed.under(parent + weights)
                if weights
                else indexed.model_group(other_than=parent)
            )
            if averaged and (of_model or not weights) and (updates or not count):
                return Found(averaged, of_model, Updates({"copies": 1}, updates, from_first=True))
        return None

    return find


def _diffusers(indexed: IndexedCheckpoint, _: ImportSettings) -> Found | None:
    groups = [name for name in indexed.groups() if name.endswith("_ema")]
    prefix = f"{groups[0]}." if len(groups) == 1 else "."
    config = {
        name.removeprefix(prefix): value
        for name, value in indexed.values.items()
        if name.startswith(prefix)
    }
    updates = _as_count(config.get("optimization_step"))
    if updates is None or not isinstance(config.get("decay"), float):
        return None
    warm_up = "power" if config.get("use_ema_warmup") else "ratio"
    rule = {
        "decay": config["decay"],
        "warm_up": warm_up,
        "copies": 1 + int(config.get("update_after_step") or 0),
    }
    rule |= {name: float(config[name]) for name in ("inv_gamma", "power") if name in config}
    rule["least"] = float(config.get("min_decay") or 0.0)
    if rule.get("inv_gamma", 1.0) <= 0 or rule.get("power", 1.0) < 0:
        raise ValueError("its warm-up never begins")
    weights = indexed.under(f"{groups[0].removesuffix('_ema')}.") or indexed.under("model.")
    return Found(indexed.under(prefix), weights, Updates(rule, updates))


def _torchtitan(indexed: IndexedCheckpoint, _: ImportSettings) -> Found | None:
    """The update at `start_step` + n `update_every` keeps 2**(-1 / (0.05 n)), or another
    `half_life_fraction`."""
    matches = ((_TITAN_EMA.fullmatch(name), find) for name, find in indexed.names.items())
    averaged = {match[1]: find for match, find in matches if match}
    rule = {"decay": UNLIMITED, "warm_up": "ramp-up", "power": RAMP_UP}
    return (
        Found(averaged, indexed.model_tensors(), Updates(rule, at_start=True)) if averaged else None
    )


def _ema_pytorch(indexed: IndexedCheckpoint, settings: ImportSettings) -> Found | None:
    for parent in indexed.parents("initted"):
        averaged, calls = (
            indexed.under(f"{parent}{_INNER}"),
            _as_count(indexed.number(f"{parent}step")),
        )
        if averaged and calls:
            weights = indexed.under(f"{parent}online_model.") or indexed.model_group(
                other_than=parent
            )
            updates = Updates({"warm_up": "power"}, calls, from_first=True, counts_calls=True)
            unsaid = f": {indexed.path.name} does not say it; the default of the library is"
            asks = (
                {"update_every": f"{unsaid} 10", "update_after_step": f"{unsaid} 100"}
                if settings.ema_decay
                else {}
            )
            return Found(averaged, weights, updates, asks=asks)
    return None


def _lit_ema(indexed: IndexedCheckpoint, _: ImportSettings) -> Found | None:
    """Its names are those of the weights in the same group, without dots."""
    for parent in indexed.parents("model_ema.decay", "model_ema.num_updates"):
        stored, others = indexed.under(f"{parent}model_ema."), indexed.under(parent)
        decay, count = (
            indexed.number(f"{parent}model_ema.{name}") for name in ("decay", "num_updates")
        )
        stored = {
            name: find for name, find in stored.items() if name not in ("decay", "num_updates")
        }
        others = {name: find for name, find in others.items() if not name.startswith("model_ema.")}
        for prefix in sorted({"", *(f"{name.split('.')[0]}." for name in others)}):
            weights = {name: find for name, find in others.items() if name.startswith(prefix)}
            full_names = {name.removeprefix(prefix).replace(".", ""): name for name in weights}
            if stored.keys() <= full_names.keys():
                averaged = {full_names[name]: find for name, find in stored.items()}
                rule = {"decay": round(float(decay), 7), "warm_up": "ratio" if count >= 0 else ""}
                return Found(averaged, weights, Updates(rule, _as_count(count)))
        raise FileFormatError(
            indexed.path, f"holds an EMA of {shown(next(iter(stored)))}, and no such weights"
        )
    return None


def _torch_ema(indexed: IndexedCheckpoint, _: ImportSettings) -> Found | None:
    """It has a list without names, and the weights are in another group."""
    for parent in indexed.parents("decay", f"{PARAMETERS}.0"):
        weights = indexed.model_group(other_than=parent)
        named = (
            (name, tensor_shape(find())) for name, find in weights.items() if "running_" not in name
        )
        averaged = {}
        # in the order of the model's parameters
        for find in indexed.under(f"{parent}{PARAMETERS}.").values():
            shape = tensor_shape(find())
            name = next((name for name, at in named if at == shape), None)
            if name is None:
                reason = (
                    "holds an EMA without names, and no weights of these shapes in the same order"
                )
                raise FileFormatError(indexed.path, reason)
            averaged[name] = find
        updates = _as_count(indexed.number(f"{parent}num_updates"))
        rule = {
            "decay": float(indexed.number(f"{parent}decay")),
            "warm_up": "ratio" if updates else "",
        }
        return Found(averaged, weights, Updates(rule, updates))
    return None


_EDM_FILE = re.compile(r"network-snapshot-(?P<step>\d{1,20})\.pkl")
_EDM_OPTIONS = "training_options.json"


def _edm(indexed: IndexedCheckpoint, settings: ImportSettings) -> Found | None:
    """The files of EDM and StyleGAN: the weights of EDM are in `training-state-*.pt` next to the
    pickle.

    Both count images, with the half-life min(its largest, 0.05 of the images so far), so that the
    k-th update of a batch keeps 2**(-1 / (0.05 (k - 1))), and the first one copies.
    """
    path, averaged = indexed.path, indexed.under("ema.") or indexed.under("G_ema.")
    match = _EDM_FILE.fullmatch(path.name)
    if not (match and averaged):
        return None
    state = path.with_name(f"training-state-{match['step']}.pt")
    if state.is_file():
        indexed = index_checkpoint(state)
    file, options = path.with_name(_EDM_OPTIONS), dict[str, Any]()
    if file.is_file():
        options = parse_object(file, read_small_file(file, 10_000_000), "options of a training")

    def number(*names: str, default: float = 0) -> Any:
        return next(
            (options[name] for name in names if isinstance(options.get(name), int | float)), default
        )

    rule: dict[str, Any] = {"copies": 1} | ({"warm_up": ""} if options else {})
    ramps = ("ema_rampup_ratio", "ema_rampup")  # null for none
    if options and not any(name in options and options[name] is None for name in ramps):
        rule |= {"warm_up": "ramp-up", "power": float(number(*ramps, default=RAMP_UP))}
    batch, thousands = int(number("batch_size")), number("ema_halflife_kimg", "ema_kimg")
    if batch and thousands:
        rule["decay"] = 0.5 ** (batch / (1000 * thousands))
    asks = dict[str, str]()
    if not batch:
        asks["update_every"] = (
            f", the images of a batch: neither {path.name} nor {_EDM_OPTIONS} in its folder says it"
        )
    if settings.ema_decay is not None and not options:
        asks["ema_warmup"] = (
            f", ramp-up or none: without {_EDM_OPTIONS} {path.name} does not say it"
        )
    every = settings.update_every or batch or 1
    step = -(-1000 * int(match["step"]) // every) * every  # names count thousands, rounded down
    weights = indexed.under("net.") or indexed.under("G.")
    return Found(
        averaged, weights, Updates(rule, every=batch), step=step, t_unit="images", asks=asks
    )


# --- any other trainer: two sets of tensors with the same names, one of whose keys says that it is
# the average


def _find_any(indexed: IndexedCheckpoint, settings: ImportSettings) -> Found | None:
    """Return the average and the weights in a checkpoint, by their keys, or by prefixes of the
    names in one set.

    The average is the set whose key has a word for it, the weights are a set next to it with the
    same names and shapes; or both are those that the settings name. Raise FileFormatError if
    several may be meant. Else an average may be alone, in the only group or in a file that a name
    or the settings call an average.
    """
    sets, decay = _sets_of_tensors(indexed), named_decay(indexed.path)
    average, weights = (
        _named_set(indexed, sets, text) for text in (settings.average, settings.weights)
    )
    updates, pairs = (
        Updates({} if decay is None else {"decay": decay}),
        _pairs(sets, average, weights),
    )
    unclear = [*pairs] if len(pairs) > 1 else [key for others in pairs.values() for key in others]
    if len(unclear) > 1 and not average:
        reason = (
            f"which of its sets of tensors is the "
            f"{'average' if len(pairs) > 1 else 'model'} is unclear: "
        )
        hint = "name the average by `average`, or both by `average` and `weights` in an import"
        raise FileFormatError(indexed.path, reason + names_in(unclear), hint)
    for key in pairs:
        return Found(sets[key], sets[unclear[0]] if len(unclear) == 1 else {}, updates)
    if average:
        return Found(sets[average], updates=updates)
    models = [
        name for name in indexed.groups() if not name.startswith(NOT_WEIGHTS) and name != "opt"
    ]
    if len(models) == 1 and AVERAGE_WORD.search(models[0]):
        return Found(indexed.under(f"{models[0]}."), updates=updates)
    if settings.kind or settings.weights or AVERAGE_WORD.search(indexed.path.name):
        return Found(indexed.model_tensors(settings.prefix), updates=updates)
    return None


def _pairs(
    sets: Mapping[str, Tensors], average: str | None = None, weights: str | None = None
) -> dict[str, list[str]]:
    """Return the sets that may be the weights of each average, which is a set whose key has a word
    for it.

    Of several, it is the one whose key is that of the average without the word, as of
    `generator_ema`.
    """
    named = [key for key in sets if AVERAGE_WORD.search(key.rpartition(".")[2])]
    pairs = {}
    for key in [average] if average else named:
        outer, dot, last = key.rpartition(".")
        others = (
            [weights]
            if weights
            else [
                other
                for other in sets
                if other.rpartition(".")[0] == outer
                and other not in (key, *named)
                and _are_alike(sets[key], sets[other])
            ]
        )
        twins = [
            other
            for other in others
            if other == outer + dot + AVERAGE_WORD.sub("", last).strip("_-")
        ]
        if others:
            pairs[key] = twins or others
    return pairs


# the most keys that lead to a set of tensors: deeper ones are the states of optimizers
_DEEPEST_SET = 2


def _sets_of_tensors(indexed: IndexedCheckpoint) -> dict[str, Tensors]:
    """Return the sets of tensors by the keys that lead to them, of which the last may be the first
    part of names."""
    sets, prefixes = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for keys, find in indexed.tensors.items():
        for depth in range(1, min(len(keys), _DEEPEST_SET + 1)):
            sets.setdefault(".".join(keys[:depth]), {})[".".join(keys[depth:])] = find
        first, dot, rest = keys[-1].partition(".")
        if dot and len(keys) <= _DEEPEST_SET:
            prefixes.setdefault(".".join((*keys[:-1], first)), {})[rest] = find
    # A prefix of fewer names is that of a layer.
    counts = Counter(".".join(keys[:-1]) for keys in indexed.tensors)
    return sets | {
        key: part
        for key, part in prefixes.items()
        if 4 * len(part) >= counts[key.rpartition(".")[0]]
    }


def _named_set(indexed: IndexedCheckpoint, sets: Collection[str], text: str | None) -> str | None:
    if text is None:
        return None
    matching = [key for key in sets if fnmatchcase(key, text.rstrip("."))]
    outermost = [
        key for key in matching if key.count(".") == min(each.count(".") for each in matching)
    ]
    if len(outermost) == 1:
        return outermost[0]
    wrong = "has several sets of tensors" if outermost else "has no set of tensors"
    raise FileFormatError(
        indexed.path, f"{wrong} {shown(text)}: {names_in([*(outermost or sets)])}"
    )


def _are_alike(averaged: Tensors, weights: Tensors) -> bool:
    """Return whether the weights have all names of an average, with the same shapes, and mostly no
    others."""
    if not averaged.keys() <= weights.keys() or 2 * len(averaged) < len(weights):
        return False
    return all(
        tensor_shape(find()) == tensor_shape(weights[name]()) for name, find in averaged.items()
    )


def named_decay(path: Path) -> float | None:
    """Return the decay in the name of guided-diffusion's `ema_0.9999_000050.pt`, next to
    `model000050.pt`."""
    match = re.match(r"ema_(0\.\d+)_", path.name)
    return float(match[1]) if match else None


# --- EDM2: power functions, with images and width in the name

_EDM2 = re.compile(
    r"(?:network-snapshot|edm2(?:-[a-z0-9]+)+)-(?P<step>\d{1,20})-(?P<width>\d*\.\d+)\.pkl"
)


def _find_edm2(indexed: IndexedCheckpoint, settings: ImportSettings) -> Found | None:
    if not (match := _EDM2.fullmatch(indexed.path.name)):
        return None
    width = float(match["width"])
    profile = functools.partial(PowerFunction.from_sigma_rel, width)
    tensors = indexed.under("ema.") or indexed.model_tensors(settings.prefix)
    return Found(
        tensors, profile=profile, sigma_rel=width, step=1000 * int(match["step"]), t_unit="images"
    )


EMA_TAKES = (
    "step_from", "sigma_rels", "ema_decay", "ema_warmup", "ema_restarts", "ema_uncertainty",
    "ema_late", "update_every", "update_after_step", "steps_per_epoch",
)  # fmt: skip


TABLE: dict[str, tuple[_Finder, tuple[str, ...]]] = {
    "edm2": (_find_edm2, ()),
    "ema-pytorch": (functools.partial(_numbered, "ema-pytorch"), ("sigma_rels", "update_every")),
    "posthoc-ema": (
        functools.partial(_numbered, "posthoc-ema"),
        ("sigma_rels", "update_every", "update_after_step"),
    ),
    "torchtitan": (_torchtitan, EMA_TAKES),
    "diffusers-ema": (_diffusers, EMA_TAKES),
    "timm": (_under_keys("state_dict_ema.", "state_dict."), EMA_TAKES),
    "lightning-ema": (
        _under_keys("state_dict.", "current_model_state.", "averaging_state.n_averaged"),
        EMA_TAKES,
    ),
    "averaged-model": (_under_keys("module.", "", "n_averaged"), EMA_TAKES),
    "ema-pytorch-ema": (_ema_pytorch, EMA_TAKES),
    "lit-ema": (_lit_ema, EMA_TAKES),
    "torch-ema": (_torch_ema, EMA_TAKES),
    # Its hook swaps the two before a checkpoint is written.
    "mmengine": (
        _under_keys("state_dict.", "ema_state_dict.module.", "ema_state_dict.steps"),
        EMA_TAKES,
    ),
    "edm": (_edm, EMA_TAKES),
    "ema": (_find_any, (*EMA_TAKES, "average", "weights")),
    "checkpoints": (
        lambda indexed, settings: Found(weights=indexed.model_tensors(settings.prefix)),
        ("step_from",),
    ),
}
"""What finds each kind, in the order in which a file is tried, and the settings that it takes
besides the selection of tensors; the last one, `checkpoints`, is for weights."""
