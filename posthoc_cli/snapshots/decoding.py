"""Decode a snapshot's metadata and check it, against itself and against the tensors.

Whatever is wrong becomes a FileFormatError that names the file and the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import InvalidValueError, shown
from posthoc_cli.planning import check_sigma_range
from posthoc_cli.profiles import check_sigma_rel, gamma_from_sigma_rel
from posthoc_cli.reconstruction import Distance, Measurements, Motion
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.format import BUFFERS, Selection
from posthoc_cli.snapshots.headers import DecodeCache, Metadata, is_number

_LEAST_SQUARE = 1e-120
"""Squares below this, or above its inverse, are not used: products and ratios of them leave what a float holds."""


def decode_snapshot(path: Path, header: fmt.FileHeader, cache: DecodeCache | None = None) -> fmt.SnapshotInfo:
    """The checked metadata of a snapshot.

    Arguments:
        cache: the one that the header was decoded with.

    Raises:
        FileFormatError: naming the file and the key.
    """
    cache = cache or DecodeCache()
    reader = Metadata(path, header, "snapshot")
    source = (reader.text("ema.tensors"), header.tensors)
    tensors = cache.once("ema.tensors", source, lambda: _decode_tensors(reader, header))
    info = fmt.SnapshotInfo(
        run_id=reader.run_id(),
        sigma_rel=reader.number("ema.sigma_rel"),
        gamma=reader.number("ema.gamma"),
        sigma_rels=_decode_sigma_rels(reader),
        t=reader.number("ema.t"),
        t_unit=reader.unit(),
        step=reader.integer("ema.step"),
        t_first=reader.number("ema.t_first"),
        max_interval=reader.number("ema.max_interval"),
        schedule=decode_schedule(reader),
        tensors=tensors,
        aliases=_decode_aliases(reader, tensors),
        left_out=cache.once("ema.left_out", reader.text("ema.left_out"), lambda: reader.names("ema.left_out")),
        selection=_decode_selection(reader) if reader.has("ema.selection") else None,
        segment=reader.integer("ema.segment") if reader.has("ema.segment") else 0,
        updates=reader.integer("ema.updates") if reader.has("ema.updates") else None,
        inherited=reader.number("ema.inherited") if reader.has("ema.inherited") else 0.0,
        off_schedule=reader.has("ema.off_schedule"),
    )
    if info.off_schedule and reader.text("ema.off_schedule") != "true":
        raise reader.bad("ema.off_schedule", f"{shown(reader.text('ema.off_schedule'))} is not true")
    _check_times(reader, info)
    return replace(
        info,
        clock=_decode_clock(reader, info) if reader.has("ema.clock") else (),
        measurements=_decode_measurements(reader, info) if reader.has("ema.measurements") else None,
        motion=_decode_motion(reader, info) if reader.has("ema.motion") else None,
    )


def decode_schedule(reader: Metadata) -> fmt.TrackingSchedule:
    """The schedule of a snapshot or a state.

    Raises:
        FileFormatError: naming the file and the setting.
    """
    raw = reader.json_object("ema.schedule")
    values: dict[str, Any] = {field.name: raw.get(field.name) for field in fields(fmt.TrackingSchedule)}
    for name, value in values.items():
        if name not in raw or not _fits_schedule(name, value):
            raise reader.bad("ema.schedule", f"{name} is {shown(value)}")
    if values["checkpoint_every"] % values["update_every"]:
        raise reader.bad("ema.schedule", "checkpoint_every is no multiple of update_every")
    try:
        return fmt.TrackingSchedule(**(values | {"sigma_range": check_sigma_range(values["sigma_range"])}))
    except InvalidValueError as error:
        raise reader.bad("ema.schedule", str(error)) from error


def _fits_schedule(name: str, value: Any) -> bool:
    if name == "sigma_range":
        return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
    if value is None:
        return name in ("max_checkpoints", "checkpoint_dtype")
    if name == "checkpoint_dtype":
        return str(value) in fmt.ITEM_BYTES
    return type(value) is int and (0 if name == "update_after_step" else 1) <= value < 2**63


def _decode_tensors(reader: Metadata, header: fmt.FileHeader) -> dict[str, fmt.TrackedTensor]:
    key = "ema.tensors"
    tensors = {
        name: fmt.TrackedTensor(
            reader.one_of(key, value, "role", ("average", "copy")),
            reader.one_of(key, value, "dtype", tuple(fmt.ITEM_BYTES)),
        )
        for name, value in reader.json_object(key).items()
    }
    for name in sorted(tensors.keys() | header.tensors.keys()):
        if name not in tensors or name not in header.tensors:
            raise reader.bad(key, f"tensor {shown(name)} is in the payload or here, but not in both")
        own, stored = tensors[name].dtype, header.tensors[name].dtype
        fits = own == stored if tensors[name].role == "copy" else own in EPS and stored in EPS
        if not fits:
            raise reader.bad(key, f"tensor {shown(name)}: {stored} cannot hold {tensors[name].role} of {own}")
    return tensors


def _decode_aliases(reader: Metadata, tensors: Mapping[str, fmt.TrackedTensor]) -> dict[str, str]:
    aliases = reader.json_object("ema.aliases")
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in tensors or alias in tensors or alias == "__metadata__":
            raise reader.bad("ema.aliases", f"{shown(alias)} must be a further name of a stored tensor")
    return aliases


def _decode_selection(reader: Metadata) -> Selection:
    key = "ema.selection"
    raw = {"copy_only": []} | reader.json_object(key)
    names = [field.name for field in fields(Selection)]
    if set(raw) != set(names) or not isinstance(raw["only_trainable"], bool):
        raise reader.bad(key, f"must have {', '.join(names)}, and nothing else")
    globs = {what: raw[what] for what in ("include", "exclude", "copy_only")}
    if not all(isinstance(listed, list) and all(isinstance(glob, str) for glob in listed) for listed in globs.values()):
        raise reader.bad(key, f"{', '.join(globs)} must be lists of globs")
    buffers = reader.one_of(key, raw, "buffers", BUFFERS)
    return Selection(raw["only_trainable"], buffers=buffers, **{what: tuple(listed) for what, listed in globs.items()})


def _decode_sigma_rels(reader: Metadata) -> tuple[float, ...]:
    key, own = "ema.sigma_rels", reader.number("ema.sigma_rel")
    values = reader.json_list(key)
    if not values or not all(is_number(value) for value in values):
        raise reader.bad(key, "is not a list of numbers")
    try:
        sigma_rels = tuple(check_sigma_rel(value) for value in values)
    except InvalidValueError as error:
        raise reader.bad(key, str(error)) from error
    if not _grows(sigma_rels):
        raise reader.bad(key, "must grow, each profile once")
    if own not in sigma_rels:
        raise reader.bad(key, f"{_listed(sigma_rels)} must include the snapshot's own {own:g}")
    return sigma_rels


def _check_times(reader: Metadata, info: fmt.SnapshotInfo) -> None:
    if not fmt.EARLIEST <= info.t_first <= info.t <= fmt.LATEST or info.step < 1:
        where = f"{info.t:g}, first update {info.t_first:g}, step {info.step}"
        raise reader.bad("ema.t", f"{where}: not a time of training")
    if not 0 <= info.max_interval <= info.t:
        raise reader.bad("ema.max_interval", f"{info.max_interval:g} must lie in [0, {info.t:g}]")
    if info.updates is not None and not 1 <= info.updates <= info.step:
        raise reader.bad("ema.updates", f"{info.updates} must lie in [1, {info.step}]")
    if info.inherited < 0:
        raise reader.bad("ema.inherited", f"{info.inherited:g} must be at least 0")
    gamma = gamma_from_sigma_rel(info.sigma_rel)
    if abs(info.gamma - gamma) > 1e-9 * (gamma + 1):
        raise reader.bad("ema.gamma", f"{info.gamma!r} is not that of sigma_rel {info.sigma_rel!r} ({gamma!r})")


def _decode_clock(reader: Metadata, info: fmt.SnapshotInfo) -> tuple[tuple[int, float], ...]:
    key = "ema.clock"
    pairs = reader.json_list(key)
    if len(pairs) > fmt.MAX_KNOTS:
        raise reader.bad(key, f"has {len(pairs):,} pairs; at most {fmt.MAX_KNOTS:,} are allowed")
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and is_number(pair[1])):
            raise reader.bad(key, f"must be a list of pairs of a whole step and its time, not {shown(pair)}")
    knots = tuple((step, float(t)) for step, t in pairs)
    for (step, t), (next_step, next_t) in pairwise(((0, 0.0), *knots)):
        if not (step < next_step and t < next_t):
            where = f"{_pair(next_step, next_t)} comes after {_pair(step, t)}"
            raise reader.bad(key, f"steps and times must grow from above 0: {where}")
    if not knots or knots[-1] != (info.step, info.t):
        raise reader.bad(key, f"must end with the snapshot's own pair, {_pair(info.step, info.t)}")
    return knots


def _pair(step: int, t: float) -> str:
    return f"step {shown(step)} at t = {t:,.12g}"


def _decode_measurements(reader: Metadata, info: fmt.SnapshotInfo) -> Measurements | None:
    """None also for measurements that cannot be used: those of absurd weights."""
    key = "ema.measurements"
    raw = reader.json_object(key)
    items = raw.pop("distances", None)
    most = 3 * len(info.sigma_rels) - 1
    if not isinstance(items, list) or len(items) > most:
        raise reader.bad(key, f"distances must be a list of at most {most} for {len(info.sigma_rels)} profiles")
    distances = tuple(Distance(**_quantities(reader, item, "t sigma_rel squared rounding")) for item in items)
    tracked = frozenset(info.sigma_rels)  # there may be as many of each as a header can hold
    for distance in distances:
        _check_partner(reader, info, tracked, distance)
    if len({(d.t, d.sigma_rel) for d in distances}) < len(distances):
        raise reader.bad(key, "distances name the same t and sigma_rel twice")
    if raw.get("weights") is None:
        raw.pop("weights", None)
    names = " ".join(["norm rounding", *(name for name in ("weights", "arithmetic") if name in raw)])
    measured = Measurements(**_quantities(reader, raw, names), distances=distances)
    squares = [measured.norm, measured.rounding, measured.weights, measured.arithmetic]
    squares += [square for distance in distances for square in (distance.squared, distance.rounding)]
    return measured if _usable(squares) else None


def _decode_motion(reader: Metadata, info: fmt.SnapshotInfo) -> Motion | None:
    key = "ema.motion"
    raw = reader.json_object(key)
    if set(raw) != {"edges", "walk", "noise"}:
        raise reader.bad(key, "must have edges, walk, noise, and nothing else")
    for name, values in raw.items():
        if not isinstance(values, list) or not all(is_number(value) and value >= 0 for value in values):
            raise reader.bad(key, f"{name} must be a list of finite numbers, at least 0")
    edges, count = raw["edges"], len(raw["walk"])
    if not 1 <= count <= fmt.MAX_PIECES or len(raw["noise"]) != count or len(edges) != count + 1:
        most = f"1 to {fmt.MAX_PIECES:,}"
        raise reader.bad(key, f"must have {most} values of walk, as many of noise, and one more of edges")
    if not (edges[0] > 0 and edges[-1] <= info.t and _grows(edges)):
        raise reader.bad(key, f"edges must grow from above 0 to at most {info.t:,.12g}, the snapshot's own time")
    if not _usable([*raw["walk"], *raw["noise"]]):
        return None
    return Motion(*(np.array(raw[name], dtype=np.float64) for name in ("edges", "walk", "noise")))


def _quantities(reader: Metadata, item: Any, names: str) -> dict[str, float]:
    """Finite numbers, none negative, under exactly these names."""
    if not isinstance(item, dict) or set(item) != set(names.split()):
        raise reader.bad("ema.measurements", f"must have {', '.join(names.split())}, and nothing else")
    for name, value in item.items():
        if not is_number(value) or value < 0:
            raise reader.bad("ema.measurements", f"{name} {shown(value)} must be a finite number, at least 0")
    return {name: float(value) for name, value in item.items()}


def _check_partner(reader: Metadata, info: fmt.SnapshotInfo, tracked: frozenset[float], distance: Distance) -> None:
    reason = None
    if not info.t_first <= distance.t <= info.t:
        reason = f"t {distance.t:g}: must lie in [{info.t_first:g}, {info.t:g}]"
    elif distance.sigma_rel not in tracked:
        reason = f"sigma_rel {distance.sigma_rel:g}, none of the tracked {_listed(info.sigma_rels)}"
    elif (distance.t, distance.sigma_rel) == (info.t, info.sigma_rel):
        reason = f"the snapshot itself, sigma_rel {info.sigma_rel:g} at t = {info.t:,.12g}"
    if reason is not None:
        raise reader.bad("ema.measurements", f"a distance to {reason}")


def _usable(squares: Iterable[float | None]) -> bool:
    return all(not square or _LEAST_SQUARE < square < 1 / _LEAST_SQUARE for square in squares)


def _grows(values: Iterable[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _listed(sigma_rels: tuple[float, ...]) -> str:
    first = ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels[:8])
    return first if len(sigma_rels) <= 8 else f"{first}, ..."
