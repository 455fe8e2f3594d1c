"""`PostHocEMA`: the hook that a training loop calls, and the averages that it gives at any time."""

from __future__ import annotations

import secrets
import threading
import types
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, overload

import torch

from posthoc_cli.errors import InvalidValueError, NotReadyError, shown
from posthoc_cli.profiles import ClockRecorder, Profile
from posthoc_cli.snapshots.directory import find_snapshots, read_directory
from posthoc_cli.snapshots.format import Selection, check_globs, make_selection
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.synthesis.sources import Source
from posthoc_cli.targets import Target
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.live import Progress, Tracking, current_sources
from posthoc_cli.tracker.model_tensors import TrackedModel, check_model, collect_tensors
from posthoc_cli.tracker.model_weights import Weights
from posthoc_cli.tracker.names import named_tensors
from posthoc_cli.tracker.resuming import find_start, keeps_state, resumed_profiles, snapshots_until
from posthoc_cli.tracker.settings import (
    Settings,
    absolute_directory,
    check_device,
    check_sigma_rels,
    choose_writer,
    make_schedule,
    override_schedule,
    resumed_habit,
    warn_of_assumption,
)
from posthoc_cli.tracker.state import TrackerState, check_profiles, pack_state, unpack_state
from posthoc_cli.tracker.state_file import Savable
from posthoc_cli.tracker.synthesizing import Synthesizing
from posthoc_cli.tracker.updating import Call, Updating, wait_for_writers


class PostHocEMA(Updating, Savable, Synthesizing):
    """Tracks power-function averages of a model and gives the average of any other length.

    Make one with `from_model` or `from_path`. Snapshots are written beside the training: `flush` returns when all that
    were due are on disk, and so does closing, which lets another writer into the directory. A context manager.

    Attributes:
        checkpoint_dir: where the snapshots are.
        run_id: 32 hexadecimal digits that all snapshots of this run carry.
        settings: what was chosen.
    """

    # --- making one ----------------------------------------------------------------------------------

    def __init__(self, *parts: Any, **others: Any) -> None:
        if len(parts) < 3 or not isinstance(parts[2], Settings):
            raise InvalidValueError(
                "PostHocEMA(...)",
                "is made by PostHocEMA.from_model(model, checkpoint_dir, sigma_rels=...) for a new run, or "
                "by PostHocEMA.from_path(checkpoint_dir) for the run in a directory",
            )
        super().__init__(*parts, **others)

    @classmethod
    def from_model(
        cls,
        model: torch.nn.Module,
        checkpoint_dir: str | Path,
        sigma_rels: Sequence[float] = (0.05, 0.28),
        update_every: int = 10,
        checkpoint_every: int = 1000,
        update_after_step: int = 0,
        max_checkpoints: int | None = 20,
        checkpoint_dtype: torch.dtype | str | None = torch.float16,
        t_unit: str = "steps",
        only_trainable: bool = True,
        on_nonfinite: str = "raise",
        sigma_range: tuple[float, float] = (0.05, 0.28),
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        copy_only: str | Sequence[str] | None = None,
        buffers: str = "copy",
        on_change: str = "raise",
        device: str | None = None,
        writer: bool | None = None,
        final_snapshot: bool = True,
        keep_state: bool = False,
        resume: str | int | None = None,
    ) -> PostHocEMA:
        """A tracker for a new run, or with `resume` of one that goes on. Nothing is written before the first `update_`.

        Arguments:
            model: what will be tracked, wrapped or bare: names are those of the bare model.
            checkpoint_dir: the directory for the snapshots, made when it is missing. One run a directory.
            sigma_rels: profiles to track; two reach almost everything, see `ema error-plot`.
            update_every: averages are updated at the calls that are multiples of it.
            checkpoint_every: snapshots are due at the calls that are multiples of it; a multiple of update_every.
            update_after_step: no update up to this call.
            max_checkpoints: snapshots to keep of each profile: those that reconstruction needs most. None keeps all.
            checkpoint_dtype: the dtype that averages are stored in; None for each parameter's own. A tensor whose
                values do not fit into it is stored in float32.
            t_unit: the unit of `t`, if you pass a clock of your own to `update_`.
            only_trainable: leave out parameters that do not require gradients.
            on_nonfinite: what an update does when a parameter holds nan or infinity: "raise" an error, "skip" the
                update, or skip it and "warn". Such a value never enters an average.
            sigma_range: the range of sigma_rel that `max_checkpoints` keeps snapshots for.
            include: globs on names, such as "decoder.*": tensors that match none of them are left out.
            exclude: globs on names: tensors that match one of them are left out.
            copy_only: globs on names: tensors that match one of them are copied, as buffers are, and not averaged,
                whether they require gradients or not. Every average holds the newest copy at its time.
            buffers: "copy" them, "average" floating-point ones as if they were parameters, or "skip" them.
            on_change: what an update does when parameters were frozen, unfrozen, added or changed: "raise" an error
                that names one, or "follow", which begins a new segment of snapshots. Unchanged tensors keep their
                averages, new ones start fresh; a synthesis uses only the segment of its time.
            device: where the averages are: "model", beside the parameters and updated by the training's own thread,
                or "cpu", on the host and updated by a thread of their own; None for "cpu" where a parameter is on an
                accelerator, else "model". For a model on the CPU both give the same bits.
            writer: in a group of processes that train one model, each of which may make a tracker and call it:
                whether this one keeps the averages and writes. The others only count. None for the first process of
                the model's DistributedDataParallel; of a model that is not wrapped (yet), of all processes.
            final_snapshot: write a last snapshot at `close`, at the end of a `with` block or of the process, where
                updates were taken in since the newest one. See `snapshot`.
            keep_state: keep what the averages are exactly beside the snapshots, in `state.safetensors`, replaced after
                each time of snapshots: `from_path` and `resume` then go on without rounding. It takes 12 bytes an
                element and profile (16 for float64 parameters) on the disk, and as much of the host's memory.
            resume: "auto" to go on, as `from_path` does but with the settings that are said here, where the directory
                holds a run; it must be of this model. A number to go on from the snapshots of that call of `update_`.
                None for a new run only: the first `update_` is refused where there is another one.

        Raises:
            InvalidValueError: (a ValueError) naming the argument and what would be accepted.
        """
        schedule = make_schedule(
            update_every, checkpoint_every, update_after_step, max_checkpoints, checkpoint_dtype, sigma_range
        )
        selection = make_selection(only_trainable, include, exclude, buffers, copy_only)
        settings = Settings(
            check_sigma_rels(sigma_rels),
            schedule,
            t_unit,
            selection,
            on_nonfinite,
            on_change,
            final_snapshot,
            keep_state,
        )
        check_globs(selection, [tensor.name for tensor in named_tensors(check_model(model))])
        tracked = TrackedModel.of_model(collect_tensors(model, selection))
        tracked.check_header()
        directory = absolute_directory(checkpoint_dir)
        tracker = None if resume is None else cls._resumed(directory, settings, tracked, resume)
        if tracker is None:
            tracker = cls(directory, secrets.token_hex(16), settings, tracked)
        tracker._writer = choose_writer(writer, model)
        warn_of_assumption(writer, model)
        tracker._device = check_device(device)
        tracker._know(model)
        return tracker

    @classmethod
    def from_path(
        cls,
        checkpoint_dir: str | Path,
        model: torch.nn.Module | None = None,
        update_every: int | types.EllipsisType = ...,
        checkpoint_every: int | types.EllipsisType = ...,
        update_after_step: int | types.EllipsisType = ...,
        max_checkpoints: int | types.EllipsisType | None = ...,
        checkpoint_dtype: torch.dtype | str | types.EllipsisType | None = ...,
        on_nonfinite: str = "raise",
        sigma_range: tuple[float, float] | types.EllipsisType = ...,
        device: str | None = None,
        on_change: str = "raise",
        sigma_rels: Sequence[float] | types.EllipsisType = ...,
        writer: bool | None = None,
        final_snapshot: bool = True,
        keep_state: bool | None = None,
        step: int | None = None,
    ) -> PostHocEMA:
        """The run in a directory: to synthesize from, and to go on tracking.

        Tracking goes on at the first `update_` from the newest snapshots, with the schedule that they hold unless
        an argument says otherwise. The averages then are those snapshots' values, rounded to their storage dtype
        (float16: 2e-4 relative), unless `keep_state` has left an exact state of their time beside them; to go on
        exactly without one, restore `state_dict()` with `load_state_dict`. Where a tracker of this process is writing
        to the directory, what that one has due is waited for first.

        Arguments:
            checkpoint_dir: a directory with snapshots.
            model: the model to go on with; checked against the snapshots here and now.
            sigma_rels: the tracked profiles to go on with; the others' snapshots stay in use.
            keep_state: as in `from_model`; None: where a state of this run is there.
            step: go on from the snapshots of this call of `update_`, as the training's own checkpoint may be of then.
                Later ones are set aside in the folder `superseded` when tracking begins.
            others: as in `from_model`; what is left out stays as stored.

        Raises:
            DirectoryError, FileFormatError, MismatchError: what is wrong with the directory.
            ModelMismatchError: the model is another one; names the tensor.
            InvalidValueError: an argument, or a `step` without snapshots; names those that have some.
        """
        directory = absolute_directory(checkpoint_dir)
        wait_for_writers(directory)
        stored = read_directory(directory)
        profiles = resumed_profiles(stored, sigma_rels)
        snapshots = snapshots_until(stored, profiles, step)
        newest = snapshots[-1].info
        schedule = override_schedule(
            newest.schedule,
            update_every,
            checkpoint_every,
            update_after_step,
            max_checkpoints,
            checkpoint_dtype,
            sigma_range,
        )
        settings = Settings(
            profiles,
            schedule,
            newest.t_unit,
            newest.selection or Selection(),
            on_nonfinite,
            on_change,
            final_snapshot,
            keeps_state(directory, newest.run_id) if keep_state is None else keep_state,
        )
        tracker = cls._going_on(directory, settings, snapshots, step)
        tracker._knows_selection = newest.selection is not None
        tracker._device = check_device(device)
        tracker._writer = choose_writer(writer, model)
        if model is not None:
            tracker._know(model)
        return tracker

    @classmethod
    def _resumed(
        cls, directory: Path, settings: Settings, tracked: TrackedModel, resume: str | int
    ) -> PostHocEMA | None:
        """A tracker that goes on with what a directory holds; None where it holds nothing, and may."""
        if isinstance(resume, str) and resume != "auto":
            raise InvalidValueError(
                "resume", "must be 'auto', a call of update_ that has snapshots, or None", value=f"{resume!r}"
            )
        wait_for_writers(directory, last_too=True)
        stored = find_snapshots(directory) if resume == "auto" else read_directory(directory)
        if not stored:
            return None
        newest, schedule = stored[-1].info, settings.schedule
        if newest.t_unit != settings.t_unit:
            found = shown(newest.t_unit)
            raise InvalidValueError("t_unit", f"the run in {directory} counts {found}", value=f"{settings.t_unit!r}")
        check_profiles(newest.sigma_rels, settings.sigma_rels)
        is_first = newest.step <= schedule.update_after_step + schedule.checkpoint_every
        if resume == "auto" and is_first and len(stored) < len(settings.sigma_rels):
            # Killed while it wrote its first snapshots: they are set aside when it begins again.
            tracker = cls(directory, newest.run_id, settings, tracked, resumes=True)
            tracker._from_step = 0
            return tracker
        step = None if isinstance(resume, str) else resume
        return cls._going_on(directory, settings, snapshots_until(stored, settings.sigma_rels, step), step)

    @classmethod
    def _going_on(
        cls, directory: Path, settings: Settings, snapshots: Sequence[Snapshot], step: int | None
    ) -> PostHocEMA:
        """A tracker that goes on from the newest of some snapshots, or only reads them."""
        start = find_start(directory, snapshots, settings.sigma_rels)
        last = snapshots[-1] if start is None else start.snapshot
        clock = ClockRecorder.of_knots(last.info.clock_pairs) if start is None else start.clock
        progress = Progress(clock.step, clock.t, clock, resumed_habit(clock.step, clock.t), clock.step)
        tracked = TrackedModel.of_snapshot(last)
        tracker = cls(directory, last.info.run_id, settings, tracked, progress, resumes=True)
        tracker._from_step = step
        return tracker

    def _know(self, model: torch.nn.Module) -> None:
        """Take a model for the one to track."""
        if self._background.now.resumes and self.settings.on_change == "raise":
            # A model that will only be filled may well be frozen.
            self._change(self._collect(model, frozen_too=True))
        self._model = weakref.ref(model)

    # --- tracking ------------------------------------------------------------------------------------

    def __enter__(self) -> PostHocEMA:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied: the threads, and the right to write to the directory, are there once."""
        raise NotReadyError(
            "PostHocEMA",
            "a tracker can be neither saved nor copied as an object. Save its state: ema.state_dict() "
            "within a checkpoint, ema.save_state(path) as a file of its own. To copy or save a module "
            "that holds it, keep the tracker outside of the module",
        )

    # --- the average of any length -------------------------------------------------------------------

    @overload
    def state_dict(self) -> dict[str, Any]: ...

    @overload
    def state_dict(
        self,
        sigma_rel: float | Target | Profile,
        t: float | None = None,
        step: int | None = None,
        dtype: torch.dtype | str | None = None,
        method: str | None = None,
    ) -> Weights: ...

    def state_dict(
        self,
        sigma_rel: float | Target | Profile | None = None,
        t: float | None = None,
        step: int | None = None,
        dtype: torch.dtype | str | None = None,
        method: str | None = None,
    ) -> Weights | dict[str, Any]:
        """Averaged weights as a state dict; without `sigma_rel`, the tracker's own state.

        The tracker's own state (averages in full precision, clock, counters, schedule, run) goes with your
        training checkpoint; `load_state_dict` continues from it exactly. In the processes of a group that do not
        write it is empty, and an empty one may be loaded there.

        Arguments:
            sigma_rel: length of the average, in (0, 0.2887); or another target, such as `targets.Beta(0.9999)` or
                `targets.Window(1000)`; or any object with `density` and `tail`.
            t: time of the average; by default the current time of a live tracker, else that of the last snapshot.
            step: the same time as a number of calls of `update_`.
            dtype: dtype of the averages; None for each parameter's own.
            method: the solver, "minvar" or "paper"; None for the first.

        Returns:
            A dict of tensors on the CPU by name, with their `predicted_error`; it can also be used in a `with`
            statement. The tensors are copies: they stay as they are while training goes on.

        Raises:
            InvalidValueError, NotReadyError, FileFormatError, MismatchError.
        """
        if sigma_rel is not None:
            return self._synthesized(sigma_rel, t, step, dtype, method)
        if self._follows:
            return {}
        return pack_state(self._state(), self.settings, self._background.now.tracked)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly from a tracker's own state, as `state_dict()` gave it.

        Snapshots in the directory that are later than the state, or belong to another attempt that went on from an
        earlier state, are moved to its folder `superseded`. From here on this tracker's settings hold: they may have
        another `update_every` or `checkpoint_every`, or fewer `sigma_rels`, than those that the state was saved with,
        and every profile stays exact. On an error nothing is changed.

        Raises:
            InvalidValueError: not such a state, one of a process that keeps no averages, without a profile that this
                tracker has, or of another clock.
            ModelMismatchError: of another model.
            NonFiniteError: an average in it holds nan or infinity.
            LockedError, MismatchError: another writer, or another run, has the directory.
        """
        self._check_open()
        call = Call(threading.get_ident())
        try:
            self._begin_alone("load_state_dict", call)
            self.flush()
            self._load(state)
        finally:
            self._end_alone(call)

    # --- inside --------------------------------------------------------------------------------------

    def _load(self, state: Mapping[str, Any]) -> None:
        if self._follows and not state:
            return
        tracked = self._background.now.tracked
        unpacked = unpack_state(state, self.settings, tracked)
        step, t = unpacked.step, unpacked.t
        progress = Progress(step, t, unpacked.clock, resumed_habit(step, t), step)
        if not self._follows:
            with self._as_writer(unpacked.run_id) as recorder:
                recorder.check_run(unpacked.run_id)  # this tracker may have begun another run here
                recorder.set_aside_others(t, known=unpacked.snapshots | recorder.holding(unpacked.averages))
            tracked = replace(tracked, segment=unpacked.segment)
        averages = RunningAverages.none_yet(self.settings.sigma_rels) if self._follows else unpacked.averages
        self._background.set(Tracking(unpacked.run_id, progress, tracked, averages))

    def _state(self) -> TrackerState:
        """What a tracker would continue from; its tensors are copies."""
        self.flush()
        if self._background.now.resumes:
            return self._stored_state()
        reading = self._background.read_exactly()
        self._background.flush()  # the snapshots of that time are on disk now
        snapshots = frozenset(() if self._recorder is None else self._recorder.checksums)
        return TrackerState.of(reading, snapshots)

    def _sources(self) -> list[Source]:
        if not self._background.now.resumes:  # else what is on disk is all that the writer has, too
            self._check_keeps()
        self.flush()
        sources = current_sources(self.checkpoint_dir, self.run_id, self._live_sources())
        if self._background.now.resumes and self._from_step is not None:
            return [source for source in sources if source.info.step <= self._from_step]
        return sources
