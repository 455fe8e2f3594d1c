"""The exact state of a tracker: checks of its entries, and its file's metadata, specified in `snapshots.snapshot`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from posthoc_cli.errors import InvalidValueError, shown
from posthoc_cli.profiles import ClockRecorder
from posthoc_cli.snapshots.snapshot import ANY_SIGN, RunId, SketchText, TrackingSchedule, converted, kinds_of


@dataclass(frozen=True)
class StateInfo:
    """A tracker's state without its tensors, as of the last call; fields `averages_...` are as of the last update.

    Values are 0 before the first update; `updates` is None if unknown. `window`, `folds`, `folded_t`, `shared` and
    `inherited` are those of `tracker.averages.Standing`, `clock` is from `ClockRecorder.state`, `snapshots` are the
    header checksums of the snapshots on disk. `weights` are the network's at the last call, at the elements of a
    snapshot's sample; empty if unknown.
    """

    run_id: RunId
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
    folds: int
    folded_t: float
    shared: bool
    inherited: tuple[float, ...]
    schedule: TrackingSchedule
    clock: tuple[float, ...]
    sketch: SketchText
    snapshots: tuple[str, ...]
    weights: tuple[Annotated[float, ANY_SIGN], ...]


_STATE = kinds_of(StateInfo) | {"clock": Any, "schedule": Any}
"""The type of each entry of a state; `ClockRecorder.of_state` checks the clock."""


def state_from(values: Mapping[str, Any], schedule: TrackingSchedule) -> StateInfo:
    """Check the entries of a state, ignoring further ones; raise InvalidValueError, naming the entry, if invalid."""
    checked: dict[str, Any] = {}
    for key, kind in _STATE.items():
        if key not in values:
            raise InvalidValueError("state", f"{key}: is missing; not a tracker's state, as state_dict() gives it")
        try:
            checked[key] = converted(values[key], kind)
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
