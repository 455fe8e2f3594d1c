"""`PostHocEMA`: the hook that a training loop calls, and the averages it can give at any time."""

from __future__ import annotations

import copy
import logging
import secrets
import threading
import types
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch

from posthoc_cli.errors import ModelMismatchError, NotReadyError, PostHocError
from posthoc_cli.profiles import ClockRecorder, Profile
from posthoc_cli.snapshots.selection import Selection, check_globs, make_selection
from posthoc_cli.snapshots.store import read_directory
from posthoc_cli.synthesis import Source
from posthoc_cli.targets import Target
from posthoc_cli.tracker.attaching import Attachable
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.background import Background, Snapshots
from posthoc_cli.tracker.following import follow_change
from posthoc_cli.tracker.live import LiveSource, current_sources, live_sources
from posthoc_cli.tracker.model_tensors import ModelTensors, TrackedModel, check_model, collect_tensors
from posthoc_cli.tracker.naming import named_tensors
from posthoc_cli.tracker.recorder import Recorder
from posthoc_cli.tracker.replicas import is_replica
from posthoc_cli.tracker.settings import (
    Settings,
    absolute_directory,
    check_device,
    check_sigma_rels,
    make_schedule,
    next_time,
    override_schedule,
    resumed_habit,
)
from posthoc_cli.tracker.state import (
    TrackerState,
    load_averages,
    newest_complete,
    pack_state,
    resumed_profiles,
    stored_state,
    unpack_state,
)
from posthoc_cli.tracker.state_file import Savable
from posthoc_cli.tracker.synthesizing import Synthesizing
from posthoc_cli.tracker.watching import WatchedModel
from posthoc_cli.tracker.weights import Weights, is_swapped

log = logging.getLogger(__name__)


class PostHocEMA(Attachable, Savable, Synthesizing):
    """Tracks power-function averages of a model and gives the average of any other length.

    Make one with `from_model` or `from_path`. Snapshots are written beside the training: `flush` returns when all that
    were due are on disk, and so does closing, which lets another writer into the directory. A context manager.

    Attributes:
        checkpoint_dir: where the snapshots are.
        run_id: 32 hexadecimal digits that all snapshots of this run carry.
        settings: what was chosen.
    """

    def __init__(self, directory: Path, run_id: str, settings: Settings, tracked: TrackedModel) -> None:
        self.checkpoint_dir = directory
        self.run_id = run_id
        self.settings = settings
        self._tracked = tracked
        self._averages = RunningAverages(settings.sigma_rels)
        self._step = 0
        self._t = 0.0
        self._clock = ClockRecorder()
        self._own_clock: bool | None = None
        self._resumes_from_directory = False
        self._recorder: Recorder | None = None
        self._background: Background | None = None
        self._device: str | None = None
        self._watched = WatchedModel()
        self._calling = threading.Lock()
        self._closed = False
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._knows_selection = True
        self._follows = False  # the first process of a group tracks the same model

    # --- making one ----------------------------------------------------------------------------------

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
        buffers: str = "copy",
        on_change: str = "raise",
        device: str | None = None,
    ) -> PostHocEMA:
        """A tracker for a new run. Nothing is written before the first `update_`.

        Arguments:
            model: what will be tracked, wrapped or bare: names are those of the bare model. Under
                DistributedDataParallel all processes may make a tracker and call it; the first one writes.
            checkpoint_dir: the directory for the snapshots, made when it is missing. One run a directory.
            sigma_rels: profiles to track; two reach almost everything, see `ema error-plot`.
            update_every: averages are updated at the calls that are multiples of it.
            checkpoint_every: snapshots are due at the calls that are multiples of it; a multiple of update_every.
            update_after_step: no update up to this call.
            max_checkpoints: snapshots kept a profile, those that reconstruction needs most; None keeps all.
            checkpoint_dtype: how averages are stored; None for each parameter's own dtype. A tensor with a
                value too large for it is stored in float32.
            t_unit: what `t` counts, when you pass a clock of your own to `update_`.
            only_trainable: leave out parameters that do not require gradients.
            on_nonfinite: what an update does when a parameter holds nan or infinity: "raise" an error, "skip" the
                update, or skip it and "warn". No average takes the value in, ever.
            sigma_range: the averages that `max_checkpoints` keeps snapshots for.
            include: globs on names, such as "decoder.*": what none of them matches is left out.
            exclude: globs on names: what one of them matches is left out.
            buffers: "copy" them, "average" those of floating-point values as if they were parameters, or "skip".
            on_change: what an update does when parameters were frozen, thawed, added or changed: "raise" an error that
                names one, or "follow": a new segment of snapshots begins. Averages of what is as it was go on, others
                begin; a synthesis uses the segment of its time only.
            device: where the averages are: "model", beside the parameters and updated by the training's own thread,
                or "cpu", on the host and updated by a thread of their own; None for "cpu" where a parameter is on an
                accelerator, else "model". Their values are the same.

        Raises:
            InvalidValueError: (a ValueError) naming the argument and what would be accepted.
        """
        schedule = make_schedule(
            update_every, checkpoint_every, update_after_step, max_checkpoints, checkpoint_dtype, sigma_range
        )
        selection = make_selection(only_trainable, include, exclude, buffers)
        settings = Settings(check_sigma_rels(sigma_rels), schedule, t_unit, selection, on_nonfinite, on_change)
        check_globs(selection, [tensor.name for tensor in named_tensors(check_model(model))])
        tracked = TrackedModel.of_model(collect_tensors(model, selection))
        tracker = cls(absolute_directory(checkpoint_dir), secrets.token_hex(16), settings, tracked)
        tracker._follows = is_replica(model)
        tracker._model = weakref.ref(model)
        tracker._device = check_device(device)
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
    ) -> PostHocEMA:
        """The run in a directory: to synthesize from, and to go on tracking.

        Tracking goes on at the first `update_` from the newest snapshots, with the schedule that they hold unless
        an argument says otherwise. The averages then are those snapshots' values, rounded to their storage dtype
        (float16: 2e-4 relative); to go on exactly, restore `state_dict()` with `load_state_dict`.

        Arguments:
            checkpoint_dir: a directory with snapshots.
            model: the model to go on with; checked against the snapshots here and now.
            sigma_rels: the tracked profiles to go on with; the others' snapshots stay in use.
            others: as in `from_model`; what is left out stays as stored.

        Raises:
            DirectoryError, FileFormatError, MismatchError: what is wrong with the directory.
            ModelMismatchError: the model is another one; names the tensor.
        """
        directory = absolute_directory(checkpoint_dir)
        snapshots = read_directory(directory)
        newest = snapshots[-1]
        schedule = override_schedule(
            newest.info.schedule,
            update_every,
            checkpoint_every,
            update_after_step,
            max_checkpoints,
            checkpoint_dtype,
            sigma_range,
        )
        profiles = resumed_profiles(snapshots, sigma_rels)
        selection = newest.info.selection
        settings = Settings(profiles, schedule, newest.info.t_unit, selection or Selection(), on_nonfinite, on_change)
        complete = newest_complete(snapshots, profiles)
        last = newest if complete is None else complete[profiles[0]]
        tracker = cls(directory, newest.info.run_id, settings, TrackedModel.of_snapshot(last))
        tracker._resumes_from_directory = True
        tracker._knows_selection = selection is not None
        tracker._step, tracker._t = last.info.step, last.info.t
        tracker._own_clock = resumed_habit(tracker._step, tracker._t)
        tracker._device = check_device(device)
        if model is not None:
            if on_change == "raise":
                tracker._collect(model, frozen_too=True)  # a model that will only be filled may well be frozen
            tracker._model = weakref.ref(model)
            tracker._follows = is_replica(model)
        return tracker

    # --- tracking ------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Calls of `update_` so far in this run."""
        return self._step

    @property
    def t(self) -> float:
        """Training time of the last call."""
        return self._t

    def update_(self, model: torch.nn.Module, t: float | None = None) -> None:
        """Tell the tracker that the model has made a step. Call it after every optimizer step.

        Arguments:
            model: the model, as it is now, wrapped or bare.
            t: training time on a clock of your own (images, tokens), growing at every call; leave it out at
                every call for steps.

        Raises:
            NonFiniteError: a parameter holds nan or infinity (`on_nonfinite="raise"`). No average is touched. Where the
                averages are updated beside the training, the error comes with the next call.
            ModelMismatchError: names, shapes or dtypes have changed. No average is touched.
            WriteError: a snapshot that was due at an earlier call could not be written; raised once. Nothing partial
                is left, and training may go on: this call has done its work, and later snapshots are tried again.
            NotReadyError: the tracker is closed or follows an optimizer, the model holds averaged weights, or another
                thread is calling.
            LockedError, MismatchError, DirectoryError, FileFormatError: at the first call: another writer holds
                the directory, or it holds another run, or what is in it cannot be read or is damaged.
        """
        check_model(model)
        self._check_caller()
        if is_swapped(model):
            raise NotReadyError("update_: the model holds averaged weights now; call it outside `with ema.model(...)`")
        if not self._calling.acquire(blocking=False):
            raise NotReadyError("update_: another thread is calling it; call it from one thread, after every step")
        try:
            failure = self._failure()  # of work that was done beside the training since the last call
            self._follows = self._follows or is_replica(model)
            self._check_open() if self._follows else self._begin()
            self._advance(t)
            if not self._follows:
                self._take_in(model)
        finally:
            self._calling.release()
        if failure is not None:
            raise failure

    def _advance(self, t: float | None) -> None:
        """Count a call."""
        step = self._step + 1
        self._t = next_time(self.settings, self._own_clock, self._t, step, t)
        self._own_clock = t is not None
        self._step = step
        self._clock.add(step, self._t)

    def flush(self) -> None:
        """Return when every update is taken in and every snapshot that was due is durable.

        Raises:
            WriteError, NonFiniteError: what went wrong since the last call; raised once.
        """
        if self._background is not None:
            self._background.flush()
        failure = self._failure()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Finish as `flush`, give the directory free and follow no optimizer. Averages can still be read."""
        self.detach()
        self._closed = True
        try:
            self.flush()
        finally:
            if self._background is not None:
                self._background.close()
            if self._recorder is not None:
                self._recorder.close()

    def __enter__(self) -> PostHocEMA:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            self.close()
        except PostHocError:
            if error is None:  # else the block's own error says more; this one was logged when it came
                raise

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
            sigma_rel: length of the average, in (0, 0.2887). Any other average may stand here, too: a target such as
                `targets.Beta(0.9999)` or `targets.Window(1000)`, or any object with `density` and `tail`.
            t: its time; by default the current one of a live tracker, else that of the last snapshot.
            step: the same in calls of `update_`.
            dtype: of the averages; None for each parameter's own.
            method: the solver; None for the default one.

        Returns:
            Tensors on the CPU by name, and their `predicted_error`. It may also stand in a `with` statement.

        Raises:
            InvalidValueError, NotReadyError, FileFormatError, MismatchError.
        """
        if sigma_rel is not None:
            return self._synthesized(sigma_rel, t, step, dtype, method)
        if self._follows:
            return {}
        return pack_state(self._state(), self.settings, self._tracked)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly from a tracker's own state, as `state_dict()` gave it.

        Snapshots in the directory that are later than the state, or of another attempt that went on from an
        earlier one, are set aside in its folder `superseded`. Of the settings, this tracker's hold from here on:
        another `update_every` or `checkpoint_every`, or fewer `sigma_rels`, than the state was saved with; snapshots
        say exactly what they are all the same. Where anything is wrong, nothing is changed.

        Raises:
            InvalidValueError: not such a state, without a profile that this tracker has, or of another clock.
            ModelMismatchError: of another model.
            NonFiniteError: an average in it holds nan or infinity.
            LockedError, MismatchError: another writer, or another run, has the directory.
        """
        self._check_open()
        self.flush()
        if self._follows and not state:
            return
        unpacked = unpack_state(state, self.settings, self._tracked)
        if self._follows:
            self.run_id, self._clock = unpacked.run_id, unpacked.clock
            self._step, self._t = unpacked.step, unpacked.t
            self._own_clock = resumed_habit(self._step, self._t)
            return
        recorder = self._open_recorder(unpacked.run_id)
        recorder.check_run(unpacked.run_id)  # this tracker may have begun another run here
        recorder.set_aside_others(unpacked.t, known=unpacked.snapshots)
        self.run_id = unpacked.run_id
        self._averages, self._clock = unpacked.averages, unpacked.clock
        self._tracked = replace(self._tracked, segment=unpacked.segment)
        self._step, self._t = unpacked.step, unpacked.t
        self._own_clock = resumed_habit(self._step, self._t)
        self._resumes_from_directory = False

    # --- inside --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """At the first update: become the directory's writer and, in a resumed run, load its averages."""
        self._check_open()
        recorder = self._open_recorder(self.run_id)
        if self._resumes_from_directory:
            self._averages, self._clock = load_averages(self.checkpoint_dir, self.settings.sigma_rels)
            self._step, self._t = self._averages.step, self._averages.t
            recorder.set_aside_others(self._t)
            self._resumes_from_directory = False

    def _state(self) -> TrackerState:
        """What a tracker would continue from; its tensors are the live ones."""
        self.flush()
        if self._resumes_from_directory:
            return stored_state(self.checkpoint_dir, self.run_id, self.settings.sigma_rels)
        snapshots = frozenset(() if self._recorder is None else self._recorder.checksums)
        segment = self._tracked.segment
        return TrackerState(self.run_id, self._step, self._t, self._clock, self._averages, snapshots, segment)

    def _check_open(self) -> None:
        if self._closed:
            raise NotReadyError(f"{self.checkpoint_dir}: this tracker was closed; go on with PostHocEMA.from_path")

    def _open_recorder(self, run_id: str) -> Recorder:
        if self._recorder is None:
            recorder = Recorder(self.checkpoint_dir)
            try:
                recorder.check_run(run_id)
            except BaseException:
                recorder.close()
                raise
            self._recorder = recorder
        return self._recorder

    def _collect(self, model: torch.nn.Module, frozen_too: bool = False) -> ModelTensors:
        """The model's tensors, after a check that they are those that are tracked; `frozen_too`: frozen meanwhile."""
        lenient = frozen_too or not self._knows_selection
        known = frozenset(self._tracked.tensors.keys() | self._tracked.aliases.keys()) if lenient else None
        tensors = collect_tensors(model, self.settings.selection, also=known)
        try:
            self._tracked.check(TrackedModel.of_model(tensors))
        except ModelMismatchError:
            if self.settings.on_change != "follow":
                raise
            if self._background is not None:
                self._background.flush()  # what is still to be written is of the tensors as they were
            self._tracked = follow_change(self._averages, self._tracked, tensors)
        return tensors

    def _take_in(self, model: torch.nn.Module) -> None:
        """Do what is due at this call."""
        due = None
        if self.settings.snapshot_is_due(self._step):
            due = Snapshots(partial(self._live_sources, copy.deepcopy(self._clock)), self._write_snapshots)
        if self.settings.update_is_due(self._step):
            tensors, changed = self._watched.tensors(model, self._collect)
            background = self._working(tensors.averaged)
            background.update(self._averages, tensors, changed, self._t, self._step, due)
        elif due is not None and self._averages.exist and self._background is not None:
            self._background.write(self._averages, due)

    def _working(self, parameters: Mapping[str, torch.Tensor]) -> Background:
        if self._background is None:
            on_host = all(parameter.device.type == "cpu" for parameter in parameters.values())
            self._background = Background(self.settings, (self._device or ("model" if on_host else "cpu")) == "cpu")
        return self._background

    def _failure(self) -> Exception | None:
        return None if self._background is None else self._background.take_error()

    def _write_snapshots(self, sources: Sequence[LiveSource], weights: Mapping[str, torch.Tensor] | None) -> None:
        recorder = self._open_recorder(self.run_id)
        recorder.write(sources, weights)
        recorder.thin(self.settings.schedule.max_checkpoints, self.settings.schedule.sigma_range)

    def _live_sources(self, clock: ClockRecorder | None = None) -> list[LiveSource]:
        return live_sources(self.run_id, self.settings, self._tracked, self._averages, clock or self._clock)

    def _sources(self) -> list[Source]:
        if self._follows:
            raise NotReadyError(
                "this process keeps no averages, the first one of its group does: make them there and broadcast them, "
                "or read the snapshots with PostHocEMA.from_path"
            )
        self.flush()
        return current_sources(self.checkpoint_dir, self.run_id, self._live_sources())
