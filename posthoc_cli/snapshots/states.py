"""The state of a tracker: its entries, checked, and its file's metadata; specified in `snapshots.format`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli.errors import FileFormatError, InvalidValueError, shown
from posthoc_cli.profiles import ClockRecorder
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import headers
from posthoc_cli.snapshots.reading import TensorReader, open_file
from posthoc_cli.snapshots.tensor_file import read_header

COPY, MEAN = "copy", "mean"
"""The prefixes of copied tensors, and of the mean of the last values, before the slash."""


def high_prefix(sigma_rel: float) -> str:
    """The prefix of a profile's averages, rounded."""
    return repr(sigma_rel)


def low_prefix(sigma_rel: float) -> str:
    """The prefix of what rounding has taken from them."""
    return f"low-{sigma_rel!r}"


@dataclass(frozen=True)
class StateInfo:
    """All of a tracker's state that is no tensor: of the last call, and with `averages_` of the last update.

    Zeros before the first update; `updates` is None if unknown. `window`, `folded_t`, `folds` and `inherited` are as in
    `tracker.running.Standing`, `clock` is from `ClockRecorder.state`, `snapshots` are header checksums of those on
    disk.
    """

    run_id: fmt.RunId
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
    folded_t: float
    folds: int | None
    inherited: tuple[float, ...]
    schedule: fmt.TrackingSchedule
    clock: tuple[float, ...]
    sketch: fmt.SketchText
    snapshots: tuple[str, ...]


@dataclass(frozen=True)
class StoredState:
    """The exact state that a tracker keeps beside its snapshots."""

    path: Path
    header: fmt.FileHeader
    info: StateInfo

    def open(self) -> TensorReader:
        """Open it; it must still be the file whose header was read."""
        return open_file(self.path, self.header)


_STATE = headers.kinds_of(StateInfo) | {"clock": Any, "schedule": Any}
"""What each entry of a state must be; `ClockRecorder.of_state` checks the clock."""

# JSON has no infinity, which the clock begins with as its steepest slope.
_IN_FILE = headers.kinds_of(StateInfo) | {"clock_state": tuple[Any, ...]}
del _IN_FILE["clock"]


def state_metadata(info: StateInfo) -> dict[str, str]:
    """The metadata of a state, without its checksums."""
    clock = [None if value == math.inf else value for value in info.clock]
    values = {key: value for key, value in vars(info).items() if key != "clock"}
    return fmt.encode_metadata("state", values | {"clock_state": clock})


def decode_state(path: Path, header: fmt.FileHeader) -> StateInfo:
    """The checked metadata of a state; a FileFormatError names the file and the key."""
    values = headers.decode_metadata(path, _as_now(header), "state", _IN_FILE)
    values["clock"] = [math.inf if value is None else value for value in values["clock_state"]]
    try:
        return state_from(values, values["schedule"])
    except InvalidValueError as error:
        raise FileFormatError(path, f"ema.{error.reason}") from error


def _as_now(header: fmt.FileHeader) -> fmt.FileHeader:
    """The header of a state; of one of release 0.2 as if its averages began a new mean now. See `older_masses`."""
    said = header.metadata
    if said.get("ema.version") != "2":
        return header
    new = {"version": fmt.STATE_VERSION, "window": "0", "folded_t": said.get("ema.averages_t", "0")}
    new |= {"folds": "null", "sketch": ""}
    return replace(header, metadata=said | {f"ema.{key}": text for key, text in new.items()})


def older_masses(header: fmt.FileHeader) -> list[float] | None:
    """Of a state of release 0.2 the mass m of each profile's recent mean; None of later ones.

    It keeps an average as a float64 total, named as `high_prefix` says, and a mean `recent-<sigma_rel>/<name>` in
    float32: total + m (mean - total).
    """
    masses: list[float] | None = json.loads(header.metadata.get("ema.masses", "null"))
    return masses


def read_state(path: Path) -> StoredState:
    """A state; a FileFormatError if it cannot be read, or is none."""
    header = read_header(path)
    return StoredState(path, header, decode_state(path, header))


def state_from(values: Mapping[str, Any], schedule: fmt.TrackingSchedule) -> StateInfo:
    """The checked entries of a state; `values` may have further ones. An InvalidValueError names the entry."""
    checked: dict[str, Any] = {}
    for key, kind in _STATE.items():
        if key not in values:
            raise InvalidValueError("state", f"{key}: is missing; not a tracker's state, as state_dict() gives it")
        try:
            checked[key] = headers.converted(values[key], kind)
        except ValueError as error:
            raise InvalidValueError("state", f"{key}: {error}") from error
    info = StateInfo(**checked | {"schedule": schedule})
    try:
        if len(info.inherited) != len(info.sigma_rels):
            raise InvalidValueError("inherited", f"must be one for each profile, not {len(info.inherited)}")
        clock_at(list(info.clock or ()), info.step, info.t)
    except InvalidValueError as error:
        raise InvalidValueError("state", str(error)) from error
    return replace(info, clock=tuple(info.clock))


def clock_at(state: Any, step: int, t: float) -> ClockRecorder:
    """The clock of a training at `step` and `t`, from its state; an InvalidValueError if it ends at another."""
    clock = ClockRecorder.of_state(state)
    if (clock.step, clock.t) != (step, t):
        there = f"ends at step {shown(clock.step)}, t {clock.t!r}"
        raise InvalidValueError("clock", f"{there}; the training is at step {step}, t {t!r}")
    return clock


def tensor_name(prefix: str, name: str) -> str:
    """The name of a tensor in a state's file. No prefix contains a slash."""
    return f"{prefix}/{name}"


def tensors_with(prefix: str, header: fmt.FileHeader) -> dict[str, str]:
    """Names of a state's tensors with a prefix: the model's name -> the file's."""
    split = {full: full.partition("/") for full in header.tensors}
    return {name: full for full, (first, _, name) in split.items() if first == prefix}
