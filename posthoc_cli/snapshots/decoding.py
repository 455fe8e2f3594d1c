"""Decode a snapshot's metadata and check it, against itself and against the tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.planning import check_sigma_range
from posthoc_cli.profiles import check_sigma_rel, gamma_from_sigma_rel
from posthoc_cli.reconstruction import Distance, Measurements, Motion
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import headers
from posthoc_cli.snapshots.chunks import Chunk
from posthoc_cli.snapshots.format import BUFFERS, GLOBS, Selection
from posthoc_cli.snapshots.headers import DecodeCache, Entry, is_amount, is_list_of, is_number, is_whole

_LEAST_SQUARE = 1e-120
"""Squares below this, or above its inverse, are not used: products and ratios of them leave what a float holds."""

Values = Mapping[str, Any]


def decode_snapshot(path: Path, header: fmt.FileHeader, cache: DecodeCache | None = None) -> fmt.SnapshotInfo:
    """The checked metadata of a snapshot; a FileFormatError names the file and the key."""
    cache = cache or DecodeCache()
    values = headers.decode_metadata(path, header, "snapshot", _ENTRIES, cache)
    raw, aliases = values["tensors"], values["aliases"]
    try:
        tensors = cache.once("tensors", (raw, header.tensors), lambda: decode_tensors(raw, header.tensors))
        for alias, name in aliases.items():
            if not isinstance(name, str) or name not in tensors or alias in tensors or alias == "__metadata__":
                raise ValueError(f"ema.aliases: {shown(alias)} must be a further name of a stored tensor")
        chunks: dict[str, Chunk] = {}
        if "part" in values:
            places = values.get("chunks", {})
            chunks = cache.once("chunks", (places, header.tensors), lambda: _chunks(places, header.tensors))
    except ValueError as error:
        raise FileFormatError(path, str(error)) from error
    return fmt.SnapshotInfo(**(values | {"tensors": tensors, "chunks": chunks}))


def decode_tensors(raw: Values, stored: Mapping[str, fmt.TensorEntry]) -> dict[str, fmt.TrackedTensor]:
    """The content of ema.tensors; a ValueError if it does not fit the tensors that are stored."""
    tensors = {name: fmt.TrackedTensor(*_role_and_dtype(value)) for name, value in raw.items()}
    for name in sorted(tensors.keys() | stored.keys()):
        if name not in tensors or name not in stored:
            raise ValueError(f"ema.tensors: tensor {shown(name)} is in the payload or here, but not in both")
        role, own, kept = tensors[name].role, tensors[name].dtype, stored[name].dtype
        if not (own == kept if role == "copy" else own in EPS and kept in EPS):
            raise ValueError(f"ema.tensors: tensor {shown(name)}: {kept} cannot hold {role} of {own}")
    return tensors


def _chunks(raw: Values, stored: Mapping[str, fmt.TensorEntry]) -> dict[str, Chunk]:
    chunks = {}
    for name in sorted(raw.keys() | stored.keys()):
        if name not in raw or name not in stored:
            raise ValueError(f"ema.chunks: tensor {shown(name)} is in the payload or here, but not in both")
        value = raw[name]
        if not (isinstance(value, dict) and set(value) == {"shape", "offset"} and all(map(_is_sizes, value.values()))):
            raise ValueError(f"ema.chunks: {shown(name)} must have a shape and an offset, not {shown(value)}")
        own, chunk = stored[name].shape, Chunk(tuple(value["shape"]), tuple(value["offset"]))
        fits = len(own) == len(chunk.shape) == len(chunk.offset)
        if not fits or any(last > size for last, size in zip(chunk.box(own).end, chunk.shape, strict=True)):
            what = f"shape {list(own)} at {list(chunk.offset)} is not within {list(chunk.shape)}"
            raise ValueError(f"ema.chunks: tensor {shown(name)}: {what}")
        chunks[name] = chunk
    return chunks


def _is_sizes(value: Any) -> bool:
    return is_list_of(value, is_whole)


def _is_part(text: str) -> bool:
    return re.fullmatch("[1-9][0-9]{0,5}/[1-9][0-9]{0,5}", text) is not None and int.__le__(*_part(text, {}))


def _part(text: str, _: Values) -> tuple[int, int]:
    number, count = text.split("/")
    return int(number), int(count)


def _role_and_dtype(value: Any) -> tuple[str, str]:
    role = _one_of(value, "role", ("average", "copy"), "ema.tensors: ")
    return role, _one_of(value, "dtype", fmt.ITEM_BYTES, "ema.tensors: ")


def _one_of(value: Any, name: str, accepted: Collection[str], prefix: str = "") -> str:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, str) or found not in accepted:
        raise ValueError(f"{prefix}{name} {shown(found)} is none of {', '.join(accepted)}")
    return found


def _schedule(raw: dict[str, Any], _: Values) -> fmt.TrackingSchedule:
    values: dict[str, Any] = {field.name: raw.get(field.name) for field in fields(fmt.TrackingSchedule)}
    for name, value in values.items():
        if name not in raw or not _SETTINGS.get(name, _is_count)(value):
            raise ValueError(f"{name} is {shown(value)}")
    schedule = fmt.TrackingSchedule(**(values | {"sigma_range": check_sigma_range(raw["sigma_range"])}))
    if schedule.checkpoint_every % schedule.update_every:
        raise ValueError("checkpoint_every is no multiple of update_every")
    return schedule


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 1


_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "update_after_step": is_whole,
    "max_checkpoints": lambda v: v is None or _is_count(v),
    "checkpoint_dtype": lambda v: v is None or str(v) in fmt.ITEM_BYTES,
    "sigma_range": lambda v: is_list_of(v, is_number) and len(v) == 2,
}
"""What a schedule accepts; of the others whole numbers above 0."""


def _selection(raw: dict[str, Any], _: Values) -> Selection:
    given: dict[str, Any] = {"copy_only": [], **raw}
    names = [field.name for field in fields(Selection)]
    if set(given) != set(names) or not isinstance(given["only_trainable"], bool):
        raise ValueError(f"must have {', '.join(names)}, and nothing else")
    if not all(isinstance(given[what], list) and headers.TEXTS.accepts(given[what]) for what in GLOBS):
        raise ValueError(f"{', '.join(GLOBS)} must be lists of globs")
    _one_of(given, "buffers", BUFFERS)
    return Selection(**(given | {what: tuple(given[what]) for what in GLOBS}))


def _sigma_rels(raw: list[float], values: Values) -> tuple[float, ...]:
    sigma_rels = tuple(map(check_sigma_rel, raw))
    if not _grow(sigma_rels):
        raise ValueError("must grow, each profile once")
    if values["sigma_rel"] not in sigma_rels:
        raise ValueError(f"{_listed(sigma_rels)} must include the snapshot's own {values['sigma_rel']:g}")
    return sigma_rels


def _gamma(raw: float, values: Values) -> float:
    gamma = gamma_from_sigma_rel(values["sigma_rel"])
    if abs(raw - gamma) > 1e-9 * (gamma + 1):
        raise ValueError(f"{raw!r} is not that of sigma_rel {values['sigma_rel']!r} ({gamma!r})")
    return float(raw)


def _t(raw: float, values: Values) -> float:
    if not fmt.EARLIEST <= values["t_first"] <= raw <= fmt.LATEST or values["step"] < 1:
        where = f"{raw:g}, first update {values['t_first']:g}, step {values['step']}"
        raise ValueError(f"{where}: not a time of training")
    return float(raw)


def _from_to(least: int, key: str) -> Callable[[Any, Values], Any]:
    """Converts nothing; refuses a value below `least`, or above that of an earlier entry."""

    def check(raw: float, values: Values) -> float:
        if not least <= raw <= values[key]:
            raise ValueError(f"{raw:g} must lie in [{least}, {values[key]:g}]")
        return raw

    return check


def _clock(pairs: list[Any], values: Values) -> tuple[tuple[int, float], ...]:
    if len(pairs) > fmt.MAX_KNOTS:
        raise ValueError(f"has {len(pairs):,} pairs; at most {fmt.MAX_KNOTS:,} are allowed")
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and is_number(pair[1])):
            raise ValueError(f"must be a list of pairs of a whole step and its time, not {shown(pair)}")
    knots = tuple((step, float(t)) for step, t in pairs)
    for (step, t), (next_step, next_t) in pairwise(((0, 0.0), *knots)):
        if not (step < next_step and t < next_t):
            where = f"{_pair(next_step, next_t)} comes after {_pair(step, t)}"
            raise ValueError(f"steps and times must grow from above 0: {where}")
    if not knots or knots[-1] != (values["step"], values["t"]):
        raise ValueError(f"must end with the snapshot's own pair, {_pair(values['step'], values['t'])}")
    return knots


def _measurements(raw: dict[str, Any], values: Values) -> Measurements | None:
    """None also for measurements that cannot be used: those of absurd weights."""
    items, sigma_rels = raw.get("distances"), values["sigma_rels"]
    most = 3 * len(sigma_rels) - 1
    if not isinstance(items, list) or len(items) > most:
        raise ValueError(f"distances must be a list of at most {most} for {len(sigma_rels)} profiles")
    distances = tuple(Distance(**_amounts(item, ["t", "sigma_rel", "squared", "rounding"])) for item in items)
    tracked = frozenset(sigma_rels)  # there may be as many of each as a header can hold
    for distance in distances:
        _check_partner(distance, values, tracked)
    if len({(d.t, d.sigma_rel) for d in distances}) < len(distances):
        raise ValueError("distances name the same t and sigma_rel twice")
    own = {key: value for key, value in raw.items() if key != "distances" and (key, value) != ("weights", None)}
    names = ["norm", "rounding", *(name for name in ("weights", "arithmetic") if name in own)]
    measured = Measurements(**_amounts(own, names), distances=distances)
    squares = [measured.norm, measured.rounding, measured.weights, measured.arithmetic]
    squares += [square for distance in distances for square in (distance.squared, distance.rounding)]
    return measured if _usable(squares) else None


def _amounts(item: Any, names: list[str]) -> dict[str, float]:
    if not isinstance(item, dict) or set(item) != set(names):
        raise ValueError(f"must have {', '.join(names)}, and nothing else")
    for name, value in item.items():
        if not is_amount(value):
            raise ValueError(f"{name} {shown(value)} must be a finite number, at least 0")
    return {name: float(value) for name, value in item.items()}


def _check_partner(distance: Distance, values: Values, tracked: frozenset[float]) -> None:
    t, own = values["t"], values["sigma_rel"]
    if not values["t_first"] <= distance.t <= t:
        raise ValueError(f"a distance to t {distance.t:g}: must lie in [{values['t_first']:g}, {t:g}]")
    if distance.sigma_rel not in tracked:
        listed = _listed(values["sigma_rels"])
        raise ValueError(f"a distance to sigma_rel {distance.sigma_rel:g}, none of the tracked {listed}")
    if (distance.t, distance.sigma_rel) == (t, own):
        raise ValueError(f"a distance to the snapshot itself, sigma_rel {own:g} at t = {t:,.12g}")


def _motion(raw: dict[str, Any], values: Values) -> Motion | None:
    """None also for a motion that cannot be used."""
    if set(raw) != {"edges", "walk", "noise"}:
        raise ValueError("must have edges, walk, noise, and nothing else")
    for name, listed in raw.items():
        if not is_list_of(listed, is_amount):
            raise ValueError(f"{name} must be a list of finite numbers, at least 0")
    edges, count = raw["edges"], len(raw["walk"])
    if not 1 <= count <= fmt.MAX_PIECES or len(raw["noise"]) != count or len(edges) != count + 1:
        most = f"1 to {fmt.MAX_PIECES:,}"
        raise ValueError(f"must have {most} values of walk, as many of noise, and one more of edges")
    if not (edges[0] > 0 and edges[-1] <= values["t"] and _grow(edges)):
        raise ValueError(f"edges must grow from above 0 to at most {values['t']:,.12g}, the snapshot's own time")
    usable = _usable([*raw["walk"], *raw["noise"]])
    return Motion(**{name: np.array(raw[name], dtype=np.float64) for name in raw}) if usable else None


def _pair(step: int, t: float) -> str:
    return f"step {shown(step)} at t = {t:,.12g}"


def _usable(squares: Iterable[float | None]) -> bool:
    return all(not square or _LEAST_SQUARE < square < 1 / _LEAST_SQUARE for square in squares)


def _grow(values: Iterable[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _listed(sigma_rels: Sequence[float]) -> str:
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels[:8]) + ", ..." * (len(sigma_rels) > 8)


SCHEDULE = replace(headers.OBJECT, convert=_schedule)

_ENTRIES = {
    "run_id": headers.RUN_ID,
    "t_unit": headers.UNIT,
    "sigma_rel": headers.NUMBER,
    "sigma_rels": Entry("a list of numbers", lambda v: is_list_of(v, is_number) and len(v) > 0, _sigma_rels),
    "gamma": replace(headers.NUMBER, convert=_gamma),
    "step": headers.WHOLE,
    "t_first": headers.NUMBER,
    "t": replace(headers.NUMBER, convert=_t),
    "max_interval": replace(headers.NUMBER, convert=_from_to(0, "t")),
    "schedule": SCHEDULE,
    "tensors": headers.OBJECT,
    "aliases": headers.OBJECT,
    "left_out": headers.TEXTS,
    "selection": replace(headers.OBJECT, convert=_selection, optional=True),
    "segment": replace(headers.WHOLE, optional=True),
    "updates": replace(headers.WHOLE, convert=_from_to(1, "step"), optional=True),
    "inherited": replace(headers.AMOUNT, optional=True),
    "off_schedule": Entry("true", lambda value: value == "true", lambda *_: True, is_text=True, optional=True),
    "clock": replace(headers.LIST, convert=_clock, optional=True),
    "measurements": replace(headers.OBJECT, convert=_measurements, optional=True),
    "motion": replace(headers.OBJECT, convert=_motion, optional=True),
    "part": Entry("two numbers such as 3/8", _is_part, _part, is_text=True, optional=True),
    "chunks": replace(headers.OBJECT, optional=True),
    "mesh": replace(headers.OBJECT, optional=True),
}
"""What the metadata of a snapshot must be, in an order in which later values are checked against earlier ones."""
