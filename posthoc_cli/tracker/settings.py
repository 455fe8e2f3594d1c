"""The settings of a tracker and the checks of its arguments; the calls counted so far; who writes in a group."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import torch
import torch.distributed as dist

from posthoc_cli import files
from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import DirectoryError, InvalidValueError, NonFiniteError, check_count, check_word, warn
from posthoc_cli.planning import range_of
from posthoc_cli.profiles import ClockRecorder, check_sigma_rel
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.format import TrackingSchedule
from posthoc_cli.snapshots.selection import Selection
from posthoc_cli.tracker.model_tensors import is_fsdp, named_modules


@dataclass(frozen=True)
class Settings:
    """Checked settings of a tracker; the arguments of `PostHocEMA.from_model`."""

    sigma_rels: tuple[float, ...]
    schedule: TrackingSchedule
    t_unit: str = "steps"
    selection: Selection = field(default_factory=Selection)
    on_nonfinite: str = "raise"
    keep_state: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.t_unit, str) or not self.t_unit or not self.t_unit.isprintable():
            reason = "must name what t counts, such as 'steps' or 'images'"
            raise InvalidValueError("t_unit", reason, value=f"{self.t_unit!r}")
        check_word("on_nonfinite", self.on_nonfinite, ("raise", "skip"))

    def tracked_index(self, tracked: float) -> int:
        """Which of the tracked profiles a sigma_rel is; an InvalidValueError names them if it is none."""
        for index, own in enumerate(self.sigma_rels):
            if isinstance(tracked, Real) and math.isclose(tracked, own, rel_tol=1e-6):  # also 0.05 of float32
                return index
        reason = f"must be one of the tracked profiles, {', '.join(f'{s:g}' for s in self.sigma_rels)}"
        hint = "for any other use model(model, sigma_rel=...)"
        raise InvalidValueError("tracked", reason, hint, value=f"{tracked!r}")

    def update_is_due(self, step: int) -> bool:
        """Whether averages take in the model at this call."""
        return step > self.schedule.update_after_step and step % self.schedule.update_every == 0

    def snapshot_is_due(self, step: int) -> bool:
        """Whether snapshots are written at this call, if averages exist."""
        return step % self.schedule.checkpoint_every == 0

    def skip_update(self, error: NonFiniteError) -> None:
        """Leave out an update as `on_nonfinite` says: raise the error, or warn."""
        if self.on_nonfinite == "raise":
            raise error
        warn(f"update skipped: {error}")

    def first_update(self, step: int) -> str:
        """When the first average comes, in words, after so many calls."""
        every, after = self.schedule.update_every, self.schedule.update_after_step
        return f"the first update is at call {(max(after, step) // every + 1) * every:,} of update_"


@dataclass(frozen=True)
class Progress:
    """How far a training is: the clock of all calls, and the last one at which an update was due.

    `own_clock` says whether the calls pass a time; None while unknown.
    """

    clock: ClockRecorder = field(default_factory=ClockRecorder)
    own_clock: bool | None = None
    updated: int = 0

    @classmethod
    def resumed(cls, clock: ClockRecorder, updated: int | None = None) -> Progress:
        """The progress of a resumed run; whether it passes `t` is unknown where time and step are equal."""
        return cls(clock, True if clock.t != clock.step else None, clock.step if updated is None else updated)

    @property
    def step(self) -> int:
        """The last call; 0 before the first."""
        return self.clock.step

    @property
    def t(self) -> float:
        """Its time."""
        return self.clock.t

    def after(self, t: float | None, settings: Settings) -> Progress:
        """The progress after one more call, with the caller's `t`, which is checked against the last one."""
        unit, step = settings.t_unit, self.step + 1
        if self.own_clock is not None and self.own_clock != (t is not None):
            habit = "passed t" if self.own_clock else "did not pass t"
            reason = f"earlier calls of update_ in this run {habit}"
            raise InvalidValueError("t", reason, "pass it at every call or at none")
        if t is None and unit != "steps":
            raise InvalidValueError("t", f"this run counts {unit}", "pass t= at every call of update_")
        time = float(step) if t is None else _number(t)
        if not fmt.EARLIEST <= time <= fmt.LATEST or time <= self.t:
            within = f"must lie between {fmt.EARLIEST:g} and {fmt.LATEST:g}"
            reason = f"{within}, and be larger than at the last call, {self.t:,.12g} {unit}"
            raise InvalidValueError("t", reason, value=f"{time:.12g}")
        updated = step if settings.update_is_due(step) else self.updated
        return Progress(self.clock.add(step, time), t is not None, updated)


def _number(t: float) -> float:
    """`t` as a float; nan if it is no number."""
    try:
        return math.nan if isinstance(t, str) else float(t)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def check_path(name: str, path: str | Path) -> Path:
    """An absolute path: the working directory may change later. Of a URL one that a tracker can write to."""
    found = files.given_path(name, path).absolute()
    if not files.is_url(found):
        return found
    from posthoc_cli.tracker.spool import spooled

    return spooled(found)


def check_sigma_rels(sigma_rels: Sequence[float]) -> tuple[float, ...]:
    """Tracked profiles, ascending; an InvalidValueError unless there is one, all are in range, none twice."""
    given = () if isinstance(sigma_rels, str) or not isinstance(sigma_rels, Iterable) else sigma_rels
    checked = sorted(check_sigma_rel(sigma_rel) for sigma_rel in given)
    if not checked or len(set(checked)) < len(checked):
        reason = "must be a sequence of different numbers, such as (0.05, 0.28)"
        raise InvalidValueError("sigma_rels", reason, value=f"{sigma_rels!r}")
    return tuple(checked)


def make_schedule(
    profiles: Sequence[float], update_every: int, checkpoint_every: int, update_after_step: int,
    max_checkpoints: int | None, checkpoint_dtype: torch.dtype | str | None,
) -> TrackingSchedule:  # fmt: skip
    """A checked schedule of the arguments of `from_model`; snapshots are kept for the lengths of the `profiles`."""
    every = check_count("update_every", update_every)
    snapshots = check_count("checkpoint_every", checkpoint_every)
    after = check_count("update_after_step", update_after_step, 0)
    most = None if max_checkpoints is None else check_count("max_checkpoints", max_checkpoints)
    if snapshots % every:
        reason = f"must be a multiple of update_every {every}, so that a snapshot holds the average of its own time"
        raise InvalidValueError("checkpoint_every", reason, value=snapshots)
    dtype = parse_dtype(checkpoint_dtype, "checkpoint_dtype")
    return TrackingSchedule(every, snapshots, after, most, dtype, range_of(profiles))


def check_place(directory: Path) -> None:
    """Raise a DirectoryError or WriteError if no tracker can write to a directory, which may be missing yet."""
    with files.reported_as_write_error(directory):  # the name may be too long
        place = next(place for place in (directory, *directory.parents) if place.is_symlink() or place.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        what = "cannot be written to" if place.is_dir() else "is not a directory"
        reason = f"{what}; snapshots are written to the directory {directory}"
        raise DirectoryError(place, reason, "name another one")


# --- groups of processes ---


def is_first_of_group(model: torch.nn.Module | None) -> bool | None:
    """Whether this process keeps the averages of a model and writes them; None where that is not known yet.

    That is the first process of the group in which DistributedDataParallel, or FSDP without sharding, holds the model.
    Of a model without wrapper it is the first of all processes: training scripts make their tracker before they wrap
    the model, and the processes must not all write to one directory.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None  # there may be a group later
    modules = () if model is None else (place.module for place in named_modules(model))
    replicated = (one for one in modules if is_fsdp(one) or isinstance(one, torch.nn.parallel.DistributedDataParallel))
    return dist.get_rank(getattr(next(replicated, None), "process_group", None)) <= 0


def is_in_group() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
