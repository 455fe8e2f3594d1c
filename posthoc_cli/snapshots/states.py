"""What the file of a tracker's own state says about itself; specified in `snapshots.format`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.errors import FileFormatError, InvalidValueError, shown
from posthoc_cli.profiles import ClockRecorder
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.decoding import decode_schedule
from posthoc_cli.snapshots.headers import Metadata, is_number

COPY = "copy"
"""What the names of copied tensors begin with, before the slash."""


def total_prefix(sigma_rel: float) -> str:
    """What the names of a profile's totals begin with."""
    return repr(sigma_rel)


def recent_prefix(sigma_rel: float) -> str:
    """What the names of a profile's recent means begin with."""
    return f"recent-{sigma_rel!r}"


@dataclass(frozen=True)
class StateInfo:
    """All of a tracker's state that is no tensor.

    Attributes:
        run_id, step, t, t_unit: the run, and how far its training is.
        sigma_rels: the tracked profiles.
        averages_t, averages_step: time and calls at the last update; 0 before.
        t_first, max_interval: time of the first update, and the longest time between two since; 0 before.
        updates: how many there were; None where that is not known.
        window, masses, inherited: as in `tracker.averages.Standing`.
        schedule: what was chosen.
        clock: what `ClockRecorder.state` gives.
        snapshots: header checksums of those on disk.
        segment: how often the model's tensors have changed, see `snapshots.segments`.
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
    """What a state's metadata says.

    Raises:
        FileFormatError: naming the file and the key; its numbers are not those of one training.
    """
    reader = Metadata(path, header, "state")
    info = StateInfo(
        run_id=reader.run_id(),
        step=reader.integer("ema.step"),
        t=reader.number("ema.t"),
        t_unit=reader.unit(),
        sigma_rels=_numbers(reader, "ema.sigma_rels"),
        averages_t=reader.number("ema.averages_t"),
        averages_step=reader.integer("ema.averages_step"),
        t_first=reader.number("ema.t_first"),
        max_interval=reader.number("ema.max_interval"),
        updates=None if reader.text("ema.updates") == "null" else reader.integer("ema.updates"),
        window=reader.integer("ema.window"),
        masses=_numbers(reader, "ema.masses"),
        inherited=_numbers(reader, "ema.inherited"),
        schedule=decode_schedule(reader),
        clock=_numbers(reader, "ema.clock_state", null=math.inf),
        snapshots=reader.names("ema.snapshots"),
        segment=reader.integer("ema.segment"),
    )
    try:
        check_times(info.step, info.t, info.averages_step, info.averages_t, info.t_first, info.max_interval)
        check_window(len(info.sigma_rels), info.averages_step, info.updates, info.window, info.masses, info.inherited)
        clock_at(list(info.clock), info.step, info.t)
    except InvalidValueError as error:
        raise FileFormatError(path, str(error)) from error
    return info


def check_times(
    step: int, t: float, averages_step: int, averages_t: float, t_first: float, max_interval: float
) -> None:
    """Check times and counters of one training: finite, and none after what it must not be after.

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
    """Check what says how averages are made up of their totals and their recent means; one number a profile.

    Raises:
        InvalidValueError: no updates can have left that.
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
    """The clock, as `ClockRecorder.state` gave it, of a training that is at `step` and `t`.

    Raises:
        InvalidValueError: it is none, or ends elsewhere.
    """
    clock = ClockRecorder.of_state(state)
    if (clock.step, clock.t) != (step, t):
        raise InvalidValueError(
            "clock", f"ends at step {shown(clock.step)}, t {clock.t!r}; the training is at step {step}, t {t!r}"
        )
    return clock


def tensor_name(prefix: str, name: str) -> str:
    """What a tensor is called in a state's file. No prefix has a slash in it."""
    return f"{prefix}/{name}"


def tensors_with(prefix: str, header: fmt.FileHeader) -> dict[str, str]:
    """Names of a state's tensors of one kind: the model's name -> the file's."""
    split = {full: full.partition("/") for full in header.tensors}
    return {name: full for full, (first, _, name) in split.items() if first == prefix}


def _numbers(reader: Metadata, key: str, null: float | None = None) -> tuple[float, ...]:
    """A JSON list of finite numbers, whole ones as such; `null` stands for nulls, if any may be there."""
    values = reader.json_list(key)
    if not all(is_number(value) or (value is None and null is not None) for value in values):
        raise reader.bad(key, "is not a list of numbers")
    found: list[Any] = [null if value is None else value for value in values]
    return tuple(found)
