"""The exact state of a tracker: checks of its entries, and its file's metadata, specified in `snapshots.format`."""

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
"""The prefixes of the names of copied tensors and of the mean of the latest values, before the slash."""


def high_prefix(sigma_rel: float) -> str:
    """Return the prefix for a profile's rounded averages."""
    return repr(sigma_rel)


def low_prefix(sigma_rel: float) -> str:
    """Return the prefix for the parts of a profile's averages that rounding removed."""
    return f"low-{sigma_rel!r}"


@dataclass(frozen=True)
class StateInfo:
    """A tracker's state without its tensors, as of the last call; fields `averages_...` are as of the last update.

    Values are 0 before the first update; `updates` is None if unknown. `window`, `folded_t`, `folds` and `inherited`
    are those of `tracker.running.Standing`, `clock` is from `ClockRecorder.state`, `snapshots` are the header checksums
    of the snapshots on disk.
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
    """The file with the exact state that a tracker keeps next to its snapshots."""

    path: Path
    header: fmt.FileHeader
    info: StateInfo

    def open(self) -> TensorReader:
        """Open the file for reading; it must still be the one whose header was read."""
        return open_file(self.path, self.header)


_STATE = headers.kinds_of(StateInfo) | {"clock": Any, "schedule": Any}
"""The type of each entry of a state; `ClockRecorder.of_state` checks the clock."""

# JSON has no infinity, the initial value of the clock's steepest slope.
_IN_FILE = headers.kinds_of(StateInfo) | {"clock_state": tuple[Any, ...]}
del _IN_FILE["clock"]


def state_metadata(info: StateInfo) -> dict[str, str]:
    """Return the metadata of a state without checksums."""
    clock = [None if value == math.inf else value for value in info.clock]
    values = {key: value for key, value in vars(info).items() if key != "clock"}
    return fmt.encode_metadata("state", values | {"clock_state": clock})


def decode_state(path: Path, header: fmt.FileHeader) -> StateInfo:
    """Return the checked metadata of a state; raise FileFormatError, naming the file and the key, if it is invalid."""
    values = headers.decode_metadata(path, _as_current(header), "state", _IN_FILE)
    values["clock"] = [math.inf if value is None else value for value in values["clock_state"]]
    try:
        return state_from(values, values["schedule"])
    except InvalidValueError as error:
        raise FileFormatError(path, f"ema.{error.reason}") from error


def _as_current(header: fmt.FileHeader) -> fmt.FileHeader:
    """Convert a header of release 0.2 to the current version, with an empty recent mean. See `older_masses`."""
    metadata = header.metadata
    if metadata.get("ema.version") != "2":
        return header
    new = {"version": fmt.STATE_VERSION, "window": "0", "folded_t": metadata.get("ema.averages_t", "0")}
    new |= {"folds": "null", "sketch": ""}
    return replace(header, metadata=metadata | {f"ema.{key}": text for key, text in new.items()})


def older_masses(header: fmt.FileHeader) -> list[float] | None:
    """Return the mass m of each profile's recent mean in a state of release 0.2; None for later releases.

    Such a state keeps an average as total + m (mean - total): a float64 total, whose name has `high_prefix`, and a
    float32 mean named `recent-<sigma_rel>/<name>`.
    """
    masses: list[float] | None = json.loads(header.metadata.get("ema.masses", "null"))
    return masses


def read_state(path: Path) -> StoredState:
    """Read the header of a state; raise FileFormatError if the file cannot be read or is not a state."""
    header = read_header(path)
    return StoredState(path, header, decode_state(path, header))


def state_from(values: Mapping[str, Any], schedule: fmt.TrackingSchedule) -> StateInfo:
    """Check the entries of a state, ignoring further ones; raise InvalidValueError, naming the entry, if invalid."""
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
    """Return a training's clock from its state; raise InvalidValueError unless it ends at `step` and `t`."""
    clock = ClockRecorder.of_state(state)
    if (clock.step, clock.t) != (step, t):
        end = f"ends at step {shown(clock.step)}, t {clock.t!r}"
        raise InvalidValueError("clock", f"{end}; the training is at step {step}, t {t!r}")
    return clock


def tensor_name(prefix: str, name: str) -> str:
    """Return the name of a tensor in a state's file. No prefix contains a slash."""
    return f"{prefix}/{name}"


def tensors_with(prefix: str, header: fmt.FileHeader) -> dict[str, str]:
    """Return the state's tensors with a prefix: name in the model -> name in the file."""
    split = {full: full.partition("/") for full in header.tensors}
    return {name: full for full, (first, _, name) in split.items() if first == prefix}
