"""The state of a tracker: its entries, checked, and its file's metadata; specified in `snapshots.format`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from posthoc_cli.errors import FileFormatError, InvalidValueError, shown
from posthoc_cli.profiles import ClockRecorder, check_sigma_rel
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.decoding import decode_schedule
from posthoc_cli.snapshots.headers import Metadata, is_number

COPY = "copy"
"""The prefix of copied tensors, before the slash."""


def total_prefix(sigma_rel: float) -> str:
    """The prefix of a profile's totals."""
    return repr(sigma_rel)


def recent_prefix(sigma_rel: float) -> str:
    """The prefix of a profile's recent means."""
    return f"recent-{sigma_rel!r}"


@dataclass(frozen=True)
class StateInfo:
    """All of a tracker's state that is no tensor.

    Attributes:
        run_id, step, t, t_unit: the run, calls and time so far.
        sigma_rels: the tracked profiles, growing.
        averages_t, averages_step: time and calls at the last update; 0 before.
        t_first, max_interval: time of the first update, and the longest time between two since; 0 before.
        updates: how many there were; None if unknown.
        window, masses, inherited: as in `tracker.averages.Standing`.
        schedule: the tracker's.
        clock: from `ClockRecorder.state`.
        snapshots: header checksums of those on disk.
        segment: how often the model's tensors have changed.
    """

    run_id: str
    step: int
    t: float
    t_unit: str
    sigma_rels: tuple[float, ...]
    averages_t: float
    averages_step: int
    t_first: float
    max_interval: float
    updates: int | None
    window: int
    masses: tuple[float, ...]
    inherited: tuple[float, ...]
    schedule: fmt.TrackingSchedule
    clock: tuple[float, ...]
    snapshots: tuple[str, ...]
    segment: int


def state_metadata(info: StateInfo) -> dict[str, str]:
    """The metadata of a state, without its checksums."""
    # JSON has no infinity, which the clock begins with as its steepest slope.
    clock = [None if value == math.inf else value for value in info.clock]
    return {
        "format": "pt",
        "ema.format": "state",
        "ema.version": fmt.STATE_VERSION,
        "ema.run_id": info.run_id,
        "ema.step": str(info.step),
        "ema.t": repr(info.t),
        "ema.t_unit": info.t_unit,
        "ema.sigma_rels": json.dumps(info.sigma_rels),
        "ema.averages_t": repr(info.averages_t),
        "ema.averages_step": str(info.averages_step),
        "ema.t_first": repr(info.t_first),
        "ema.max_interval": repr(info.max_interval),
        "ema.updates": "null" if info.updates is None else str(info.updates),
        "ema.window": str(info.window),
        "ema.masses": json.dumps(info.masses),
        "ema.inherited": json.dumps(info.inherited),
        "ema.schedule": json.dumps(vars(info.schedule)),
        "ema.clock_state": json.dumps(clock, allow_nan=False),
        "ema.snapshots": json.dumps(info.snapshots),
        "ema.segment": str(info.segment),
    }


def decode_state(path: Path, header: fmt.FileHeader) -> StateInfo:
    """The checked metadata of a state.

    Raises:
        FileFormatError: naming the file and the key.
    """
    reader = Metadata(path, header, "state")
    values: dict[str, Any] = {"run_id": reader.run_id(), "t_unit": reader.unit()}
    for key in ("step", "averages_step", "window", "segment"):
        values[key] = reader.integer(f"ema.{key}")
    for key in ("t", "averages_t", "t_first", "max_interval"):
        values[key] = reader.number(f"ema.{key}")
    for key in ("sigma_rels", "masses", "inherited", "snapshots"):
        values[key] = reader.json_list(f"ema.{key}")
    values["updates"] = None if reader.text("ema.updates") == "null" else reader.integer("ema.updates")
    clock = reader.json_list("ema.clock_state")
    if not all(value is None or is_number(value) for value in clock):
        raise reader.bad("ema.clock_state", "is not a list of numbers")
    values["clock"] = [math.inf if value is None else value for value in clock]
    try:
        return state_from(values, decode_schedule(reader))
    except InvalidValueError as error:
        raise FileFormatError(path, f"ema.{error.reason}") from error


def check_state_tensors(path: Path, header: fmt.FileHeader, state: StateInfo) -> None:
    """Check that all profiles of a state have the same averages, and that other tensors are copies.

    Raises:
        FileFormatError: naming the file and a tensor.
    """
    totals = [total_prefix(sigma_rel) for sigma_rel in state.sigma_rels]
    recent = [recent_prefix(sigma_rel) for sigma_rel in state.sigma_rels]
    named = {prefix: tensors_with(prefix, header) for prefix in (*totals, *recent, COPY)}
    known = {full for names in named.values() for full in names.values()}
    if known != header.tensors.keys():
        raise FileFormatError(path, f"tensor {shown(min(header.tensors.keys() - known))} is of no profile of the state")
    for prefixes, compared in ((totals, "dtype shape"), (recent, "dtype shape"), ((totals[0], recent[0]), "shape")):
        entries = [
            {(name, *(getattr(header.tensors[full], a) for a in compared.split())) for name, full in named[p].items()}
            for p in prefixes
        ]
        for prefix, found in zip(prefixes, entries, strict=True):
            if found != entries[0]:
                name = min(found ^ entries[0])[0]
                raise FileFormatError(path, f"tensor {shown(name)} is not the same in {prefixes[0]} and {prefix}")


# --- checking the entries of a state: of a file, or of a tracker's `state_dict()`


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(accepts, value))


_RUN_ID = ("32 hexadecimal digits", lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{32}", v) is not None)
_TEXT = ("a string", lambda v: isinstance(v, str))
_TEXTS = ("a list of strings", lambda v: _is_list(v, lambda item: isinstance(item, str)))
_WHOLE = ("a whole number, at least 0", _is_whole)
_COUNT = ("a whole number, at least 0, or None", lambda v: v is None or _is_whole(v))
_AMOUNT = ("a finite number, at least 0", _is_amount)
_AMOUNTS = ("a list of finite numbers, at least 0", lambda v: _is_list(v, _is_amount))
_ANY: tuple[str, Callable[[Any], bool]] = ("a list", lambda v: isinstance(v, Iterable))

_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "run_id": _RUN_ID, "step": _WHOLE, "t": _AMOUNT, "t_unit": _TEXT, "sigma_rels": _AMOUNTS, "averages_t": _AMOUNT,
    "averages_step": _WHOLE, "t_first": _AMOUNT, "max_interval": _AMOUNT, "updates": _COUNT, "window": _WHOLE,
    "masses": _AMOUNTS, "inherited": _AMOUNTS, "clock": _ANY, "snapshots": _TEXTS, "segment": _WHOLE,
}  # fmt: skip
"""What each entry of a state must be, in words and as a test."""


def state_from(values: Mapping[str, Any], schedule: fmt.TrackingSchedule) -> StateInfo:
    """The checked entries of a state; `values` may have further ones.

    Raises:
        InvalidValueError: the reason begins with the entry that is missing, of another type, or not of one training.
    """
    checked: dict[str, Any] = {}
    for key, (accepted, accepts) in _ENTRIES.items():
        if key not in values:
            raise InvalidValueError("state", f"{key}: is missing; not a tracker's state, as state_dict() gives it")
        value = values[key]
        if not accepts(value):
            raise InvalidValueError("state", f"{key}: must be {accepted}, not {shown(value)}")
        checked[key] = float(value) if accepts is _is_amount else tuple(value) if isinstance(value, list) else value
    info = StateInfo(**checked, schedule=schedule)
    try:
        if not info.sigma_rels or any(a >= b for a, b in pairwise(map(check_sigma_rel, info.sigma_rels))):
            raise InvalidValueError("sigma_rels", "must grow, each profile once")
        check_times(info.step, info.t, info.averages_step, info.averages_t, info.t_first, info.max_interval)
        check_window(len(info.sigma_rels), info.averages_step, info.updates, info.window, info.masses, info.inherited)
        clock_at(list(info.clock), info.step, info.t)
    except InvalidValueError as error:
        raise InvalidValueError("state", str(error)) from error
    return info


def check_times(
    step: int, t: float, averages_step: int, averages_t: float, t_first: float, max_interval: float
) -> None:
    """Check that times and counters are of one training: finite and in order.

    Raises:
        InvalidValueError: they are not.
    """
    in_order = 0 <= t_first <= averages_t <= t < math.inf and 0 <= averages_step <= step
    if not in_order or not 0 <= max_interval <= averages_t or (averages_t > 0) != (t_first > 0):
        raise InvalidValueError(
            "t", "not times of one training", value=f"{t!r}, step {step}, averages at {averages_t!r} since {t_first!r}"
        )


def check_window(
    profiles: int,
    averages_step: int,
    updates: int | None,
    window: int,
    masses: Sequence[float],
    inherited: Sequence[float],
) -> None:
    """Check how averages are made up of totals and recent means; `masses` and `inherited` have a number a profile.

    Raises:
        InvalidValueError: no updates can lead to them.
    """
    counted = averages_step if updates is None else updates
    in_order = (averages_step > 0) == (counted > 0) and window <= counted <= averages_step
    fits = len(masses) == len(inherited) == profiles and all(0 <= error < math.inf for error in inherited)
    if not (in_order and fits and all((0 < mass <= 1) if window else mass == 0 for mass in masses)):
        raise InvalidValueError(
            "updates",
            f"not those of {profiles} averages at step {averages_step}",
            value=f"{shown(updates)}, window {window}, masses {shown(list(masses))}, inherited "
            f"{shown(list(inherited))}",
        )


def clock_at(state: Any, step: int, t: float) -> ClockRecorder:
    """The clock of a training at `step` and `t`, from `ClockRecorder.state`.

    Raises:
        InvalidValueError: it is invalid, or ends elsewhere.
    """
    clock = ClockRecorder.of_state(state)
    if (clock.step, clock.t) != (step, t):
        raise InvalidValueError(
            "clock", f"ends at step {shown(clock.step)}, t {clock.t!r}; the training is at step {step}, t {t!r}"
        )
    return clock


def tensor_name(prefix: str, name: str) -> str:
    """The name of a tensor in a state's file. No prefix contains a slash."""
    return f"{prefix}/{name}"


def tensors_with(prefix: str, header: fmt.FileHeader) -> dict[str, str]:
    """Names of a state's tensors with a prefix: the model's name -> the file's."""
    split = {full: full.partition("/") for full in header.tensors}
    return {name: full for full, (first, _, name) in split.items() if first == prefix}
