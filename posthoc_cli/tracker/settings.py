"""The settings of a tracker, and the checks of what users pass."""

from __future__ import annotations

import logging
import math
import operator
import os
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning import USEFUL_RANGE, check_sigma_range
from posthoc_cli.profiles import check_sigma_rel
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.format import Selection, TrackingSchedule
from posthoc_cli.snapshots.tensors import parse_dtype, stored_name, torch_dtype
from posthoc_cli.tracker.names import is_fsdp, named_modules, wrapped_child

ON_NONFINITE = ("raise", "skip", "warn")
ON_CHANGE = ("raise", "follow")


@dataclass(frozen=True)
class Settings:
    """Checked settings of a tracker; the arguments of `PostHocEMA.from_model`."""

    sigma_rels: tuple[float, ...]
    schedule: TrackingSchedule
    t_unit: str = "steps"
    selection: Selection = field(default_factory=Selection)
    on_nonfinite: str = "raise"
    on_change: str = "raise"
    final_snapshot: bool = True
    keep_state: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.t_unit, str) or not self.t_unit or not self.t_unit.isprintable():
            raise InvalidValueError(
                "t_unit", "must name what t counts, such as 'steps' or 'images'", value=f"{self.t_unit!r}"
            )
        if self.on_nonfinite not in ON_NONFINITE:
            raise InvalidValueError(
                "on_nonfinite", f"must be one of {', '.join(ON_NONFINITE)}", value=f"{self.on_nonfinite!r}"
            )
        if self.on_change not in ON_CHANGE:
            raise InvalidValueError("on_change", f"must be one of {', '.join(ON_CHANGE)}", value=f"{self.on_change!r}")

    def update_is_due(self, step: int) -> bool:
        """Whether averages take in the model at this call."""
        return step > self.schedule.update_after_step and step % self.schedule.update_every == 0

    def snapshot_is_due(self, step: int) -> bool:
        """Whether snapshots are written at this call, if averages exist."""
        return step % self.schedule.checkpoint_every == 0


def absolute_directory(checkpoint_dir: str | Path) -> Path:
    """The directory for snapshots as an absolute path: a later change of the working directory does not matter."""
    if not isinstance(checkpoint_dir, str | os.PathLike) or "\0" in str(checkpoint_dir):
        raise InvalidValueError("checkpoint_dir", "must be a path", value=f"{checkpoint_dir!r}")
    return Path(checkpoint_dir).absolute()


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same directory."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def check_device(device: str | None) -> str | None:
    """`device` if it is "cpu", "model" or None, else an InvalidValueError that lists the choices."""
    if device not in (None, "cpu", "model"):
        raise InvalidValueError(
            "device", "must be 'cpu' (the host) or 'model' (beside the parameters)", value=f"{device!r}"
        )
    return device


def check_sigma_rels(sigma_rels: Sequence[float]) -> tuple[float, ...]:
    """Tracked profiles, the shortest first; an InvalidValueError unless there is one, all are in range, none twice."""
    if isinstance(sigma_rels, str) or not isinstance(sigma_rels, Iterable):
        raise InvalidValueError(
            "sigma_rels", "must be a sequence of numbers, such as (0.05, 0.28)", value=f"{sigma_rels!r}"
        )
    checked = tuple(sorted(check_sigma_rel(sigma_rel) for sigma_rel in sigma_rels))
    if not checked:
        raise InvalidValueError("sigma_rels", "at least one profile must be tracked, such as (0.05, 0.28)")
    if len(set(checked)) < len(checked):
        raise InvalidValueError("sigma_rels", "must not name a profile twice", value=checked)
    return checked


def make_schedule(
    update_every: int,
    checkpoint_every: int,
    update_after_step: int,
    max_checkpoints: int | None,
    checkpoint_dtype: torch.dtype | str | None,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> TrackingSchedule:
    """A checked schedule.

    Raises:
        InvalidValueError: a ValueError that names the setting, and both where two do not fit.
    """
    update_every = check_count("update_every", update_every, 1)
    checkpoint_every = check_count("checkpoint_every", checkpoint_every, 1)
    update_after_step = check_count("update_after_step", update_after_step, 0)
    if max_checkpoints is not None:
        max_checkpoints = check_count("max_checkpoints", max_checkpoints, 1)
    if checkpoint_every % update_every:
        raise InvalidValueError(
            "checkpoint_every",
            f"must be a multiple of update_every {update_every}, so that a snapshot holds the average of its own time",
            value=checkpoint_every,
        )
    dtype = parse_dtype(checkpoint_dtype)
    stored = None if dtype is None else stored_name(dtype)
    return TrackingSchedule(
        update_every, checkpoint_every, update_after_step, max_checkpoints, stored, check_sigma_range(sigma_range)
    )


def check_count(name: str, value: int, least: int) -> int:
    """`value` as a whole number, or an InvalidValueError that says what is accepted."""
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = -1
    if count < least:
        raise InvalidValueError(f"{name} {value!r}", f"must be a whole number, at least {least}")
    return count


def override_schedule(
    stored: TrackingSchedule,
    update_every: int | types.EllipsisType,
    checkpoint_every: int | types.EllipsisType,
    update_after_step: int | types.EllipsisType,
    max_checkpoints: int | types.EllipsisType | None,
    checkpoint_dtype: torch.dtype | str | types.EllipsisType | None,
    sigma_range: tuple[float, float] | types.EllipsisType,
) -> TrackingSchedule:
    """A stored schedule with the arguments that a user passes in place of its own; `...` stands for none."""
    name = stored.checkpoint_dtype
    return make_schedule(
        stored.update_every if update_every is ... else update_every,
        stored.checkpoint_every if checkpoint_every is ... else checkpoint_every,
        stored.update_after_step if update_after_step is ... else update_after_step,
        stored.max_checkpoints if max_checkpoints is ... else max_checkpoints,
        (None if name is None else torch_dtype(name)) if checkpoint_dtype is ... else checkpoint_dtype,
        stored.sigma_range if sigma_range is ... else sigma_range,
    )


def next_time(settings: Settings, own_clock: bool | None, last: float, step: int, t: float | None) -> float:
    """The time of the call number `step`, checked against the last one.

    Arguments:
        own_clock: whether earlier calls passed `t`; None before the first call.
        last: time of the last call.
        t: what the caller passed.
    """
    if own_clock is not None and own_clock != (t is not None):
        habit = "passed t" if own_clock else "did not pass t"
        raise InvalidValueError(
            "t", f"earlier calls of update_ in this run {habit}", "pass it at every call or at none"
        )
    if t is None and settings.t_unit != "steps":
        raise InvalidValueError("t", f"this run counts {settings.t_unit}", "pass t= at every call of update_")
    time = float(step) if t is None else _number(t)
    if not math.isfinite(time) or not time > last:
        raise InvalidValueError(
            "t",
            f"must be finite, and larger than at the last call, {last:,.12g} {settings.t_unit}",
            value=f"{time:.12g}",
        )
    if not fmt.EARLIEST <= time <= fmt.LATEST:
        raise InvalidValueError("t", f"must lie between {fmt.EARLIEST:g} and {fmt.LATEST:g}", value=f"{time:g}")
    return time


def _number(t: float) -> float:
    """`t` as a float; nan for what is none."""
    try:
        return math.nan if isinstance(t, str) else float(t)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def resumed_habit(step: int, t: float) -> bool | None:
    """Whether a resumed run passes `t`, judged by its last step and time; None where these are equal."""
    return True if t != step else None


# --- Which process of a group keeps the averages of a model that all of them train -----------------


log = logging.getLogger(__name__)


def choose_writer(chosen: bool | None, model: torch.nn.Module | None) -> bool | None:
    """Whether this process keeps the averages of a model and writes them.

    Without a choice it is the first process of the group in which DistributedDataParallel, or FSDP without sharding,
    holds the model. A model that no wrapper holds yet goes by the group of all processes: training scripts make their
    tracker before they wrap the model, and each process that took itself for the writer would want the same directory.

    Arguments:
        chosen: the user's choice, or None.
        model: what is trained, where it is known.

    Returns:
        None where that cannot be known yet: there is no group, and may be one later.

    Raises:
        InvalidValueError: the choice is none of True, False and None.
    """
    if chosen is not None:
        if not isinstance(chosen, bool):
            raise InvalidValueError("writer", "must be True, False or None", value=f"{chosen!r}")
        return chosen
    if not (dist.is_available() and dist.is_initialized()):
        return None
    wrapper = None if model is None else _replicating(model)
    return bool(dist.get_rank(getattr(wrapper, "process_group", None)) <= 0)


def warn_of_assumption(chosen: bool | None, model: torch.nn.Module) -> None:
    """Warn where only the rank says that this process keeps nothing: processes may train different models."""
    if chosen is None and choose_writer(None, model) is False and _replicating(model) is None:
        log.warning(
            "process %d of its group keeps no averages, as the first one is assumed to train the same model; if this "
            "process trains another one, say from_model(..., writer=True), else writer=False to silence this warning",
            dist.get_rank(),
        )


def is_in_group() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _replicating(model: torch.nn.Module) -> torch.nn.Module | None:
    """The wrapper that keeps a model, or a part of it, the same in several processes."""
    return next((place.module for place in named_modules(model) if _replicates(place.module)), None)


def _replicates(module: torch.nn.Module) -> bool:
    return is_fsdp(module) or (
        wrapped_child(module) == "module" and isinstance(module, torch.nn.parallel.DistributedDataParallel)
    )
