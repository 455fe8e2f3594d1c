"""Ordinary EMAs in other libraries' files: where the average and the weights are, and with which decays it was updated.

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

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from posthoc_cli.checkpoints.read_model import (
    MODEL_GROUPS,
    PARAMETERS,
    FoundChunk,
    IndexedCheckpoint,
    index_checkpoint,
    tensor_shape,
)
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.profiles.other_libraries import RAMP_UP
from posthoc_cli.snapshots.headers import parse_object
from posthoc_cli.snapshots.tensor_file import read_small_file

Tensors = Mapping[str, Callable[[], list[FoundChunk]]]
Keys = tuple[str, ...]


@dataclass(frozen=True)
class FoundEMA:
    """An ordinary EMA in a checkpoint.

    Attributes:
        averaged: its tensors by the names that they have in the model.
        weights: those of the model; empty where they are not there.
        rule: arguments of `profiles.other_libraries.Decay`; without "decay" where that is not there.
        updates: how many were made; None if that is not there.
        every: calls between updates, as the library does it by default; images of a batch, 0 where that is not there.
        from_first: whether the first call is an update, and not the one of number `every`.
        t_unit: of the training's clock.
    """

    averaged: Tensors
    weights: Tensors = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)
    updates: int | None = None
    every: int = 1
    from_first: bool = False
    t_unit: str = "steps"


Finder = Callable[[IndexedCheckpoint], FoundEMA | None]


def _group(indexed: IndexedCheckpoint, place: Keys) -> dict[str, Callable[[], list[FoundChunk]]]:
    """The tensors behind some keys, by their names there."""
    deep = len(place)
    return {".".join(k[deep:]): find for k, find in indexed.tensors.items() if len(k) > deep and k[:deep] == place}


def _model(indexed: IndexedCheckpoint, but: str) -> Tensors:
    """The tensors of the group that models are in, if there is one beside that of the average."""
    name = next((name for name in MODEL_GROUPS if name != but and name in indexed.groups()), None)
    return {} if name is None else _group(indexed, (name,))


def _behind(tensors: Tensors, prefix: str) -> dict[str, Callable[[], list[FoundChunk]]]:
    return {name.removeprefix(prefix): find for name, find in tensors.items() if name.startswith(prefix)}


def _number(indexed: IndexedCheckpoint, *keys: str) -> Any:
    """A number of the content, be it a value or a tensor; None if it is not there."""
    value = indexed.values.get(".".join(keys))
    found = None if value is not None else indexed.value(keys)
    return value if found is None else found[0]


def _places(indexed: IndexedCheckpoint, ending: str) -> list[Keys]:
    """The keys before those that end so, of values and tensors."""
    keys = [*indexed.tensors, *(tuple(name.split(".")) for name in indexed.values)]
    found = {one[:-1] + ((one[-1].removesuffix(ending).rstrip("."),) if one[-1] != ending else ()) for one in keys
             if one[-1] == ending or one[-1].endswith(f".{ending}")}  # fmt: skip
    return sorted(found)


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and value >= 0 else None


def _diffusers(indexed: IndexedCheckpoint) -> FoundEMA | None:
    said = {key.removeprefix("ema."): value for key, value in indexed.values.items() if key.startswith("ema.")}
    updates = _whole(said.get("optimization_step"))
    if updates is None or not isinstance(said.get("decay"), float):
        return None
    warm_up = "power" if said.get("use_ema_warmup") else "ratio"
    rule = {"decay": said["decay"], "warm_up": warm_up, "copies": 1 + int(said.get("update_after_step") or 0)}
    rule |= {own: float(said[name]) for own, name in (("inv_gamma", "inv_gamma"), ("power", "power")) if name in said}
    rule["least"] = float(said.get("min_decay") or 0.0)
    return FoundEMA(_group(indexed, ("ema",)), _group(indexed, ("model",)), rule, updates)


def _timm(indexed: IndexedCheckpoint) -> FoundEMA | None:
    averaged = _group(indexed, ("state_dict_ema",))
    return FoundEMA(averaged, _group(indexed, ("state_dict",)), {"copies": 1}, None, 1, True) if averaged else None


def _lightning(indexed: IndexedCheckpoint) -> FoundEMA | None:
    weights, averaged = _group(indexed, ("current_model_state",)), _group(indexed, ("state_dict",))
    updates = _whole(_number(indexed, "averaging_state", "n_averaged"))
    return FoundEMA(averaged, weights, {"copies": 1}, updates, 1, True) if weights and averaged and updates else None


def _averaged_model(indexed: IndexedCheckpoint) -> FoundEMA | None:
    for place in _places(indexed, "n_averaged"):
        averaged = _behind(_group(indexed, place), "module.")
        if averaged and (updates := _whole(_number(indexed, *place, "n_averaged"))):
            return FoundEMA(averaged, _model(indexed, ".".join(place)), {"copies": 1}, updates, 1, True)
    return None


def _ema_pytorch(indexed: IndexedCheckpoint) -> FoundEMA | None:
    for place in _places(indexed, "initted"):
        group = _group(indexed, place)
        averaged, weights = _behind(group, "ema_model."), _behind(group, "online_model.")
        calls = _whole(_number(indexed, *place, "step"))
        if averaged and calls:
            rule = {"decay": 0.9999, "warm_up": "power", "copies": 101}
            return FoundEMA(averaged, weights or _model(indexed, ".".join(place)), rule, calls, 10, True)
    return None


def _lit_ema(indexed: IndexedCheckpoint) -> FoundEMA | None:
    places: list[Keys] = [(), *((name,) for name in indexed.groups())]
    for place in places:
        group = _group(indexed, place)
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
                value, count = (_number(indexed, *place, f"model_ema.{n}") for n in ("decay", "num_updates"))
                rule = {"decay": round(float(value), 7), "warm_up": "ratio" if count >= 0 else ""}
                return FoundEMA(averaged, weights, rule, _whole(count))
        raise FileFormatError(indexed.path, f"holds an EMA of {shown(next(iter(stored)))}, and no such weights")
    return None


def _torch_ema(indexed: IndexedCheckpoint) -> FoundEMA | None:
    for place in _places(indexed, "decay"):
        listed = _group(indexed, (*place, PARAMETERS))
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
        updates = _whole(_number(indexed, *place, "num_updates"))
        rule = {"decay": float(_number(indexed, *place, "decay")), "warm_up": "ratio" if updates else ""}
        return FoundEMA(averaged, weights, rule, updates)
    return None


def _mmengine(indexed: IndexedCheckpoint) -> FoundEMA | None:
    weights, averaged = _behind(_group(indexed, ("ema_state_dict",)), "module."), _group(indexed, ("state_dict",))
    updates = _whole(_number(indexed, "ema_state_dict", "steps"))
    return FoundEMA(averaged, weights, {"copies": 1}, updates, 1, True) if weights and averaged else None


EDM_NAME = re.compile(r"network-snapshot-(?P<step>\d{1,20})\.pkl")
EDM_OPTIONS = "training_options.json"


def _edm(indexed: IndexedCheckpoint) -> FoundEMA | None:
    path = indexed.path
    averaged = _group(indexed, ("ema",)) or _group(indexed, ("G_ema",))
    match = EDM_NAME.fullmatch(path.name)
    if not averaged or match is None:
        return None
    state = path.with_name(f"training-state-{match['step']}.pt")
    if state.is_file():
        indexed = index_checkpoint(state)
    weights = _group(indexed, ("net",)) or _group(indexed, ("G",))
    beside, said = path.with_name(EDM_OPTIONS), {}
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
    return FoundEMA(averaged, weights, rule, None, int(batch), t_unit="images")


FINDERS: dict[str, Finder] = {
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
