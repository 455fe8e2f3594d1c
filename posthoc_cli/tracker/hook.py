"""`PostHocEMA`: the hook that a training loop calls, and the averages it can give at any time."""

from __future__ import annotations

import logging
import secrets
import types
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from posthoc_cli.errors import NonFiniteError, NotReadyError
from posthoc_cli.profiles import ClockRecorder, Profile
from posthoc_cli.snapshots.store import read_directory
from posthoc_cli.synthesis import Source
from posthoc_cli.targets import Target
from posthoc_cli.tracker.attaching import Attachable
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.live import LiveSource, current_sources, live_sources
from posthoc_cli.tracker.model_tensors import ModelTensors, TrackedModel, check_model, collect_tensors, nonfinite_name
from posthoc_cli.tracker.recorder import Recorder
from posthoc_cli.tracker.settings import (
    Settings,
    absolute_directory,
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
from posthoc_cli.tracker.weights import Weights, is_swapped

log = logging.getLogger(__name__)


class PostHocEMA(Attachable, Savable, Synthesizing):
    """Tracks power-function averages of a model and gives the average of any other length.

    Make one with `from_model` or `from_path`. A context manager; closing it only lets another writer into the
    directory: every snapshot that was due is on disk when the call of `update_` that it was due at returns.

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
        self._closed = False
        self._model: weakref.ref[torch.nn.Module] | None = None

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
    ) -> PostHocEMA:
        """A tracker for a new run. Nothing is written before the first `update_`.

        Arguments:
            model: what will be tracked; its parameters are averaged, its buffers copied.
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

        Raises:
            InvalidValueError: (a ValueError) naming the argument and what would be accepted.
        """
        schedule = make_schedule(
            update_every, checkpoint_every, update_after_step, max_checkpoints, checkpoint_dtype, sigma_range
        )
        settings = Settings(check_sigma_rels(sigma_rels), schedule, t_unit, only_trainable, on_nonfinite)
        tracked = TrackedModel.of_model(collect_tensors(model, only_trainable))
        tracker = cls(absolute_directory(checkpoint_dir), secrets.token_hex(16), settings, tracked)
        tracker._model = weakref.ref(model)
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
        settings = Settings(profiles, schedule, newest.info.t_unit, on_nonfinite=on_nonfinite)
        tracker = cls(directory, newest.info.run_id, settings, TrackedModel.of_snapshot(newest))
        tracker._resumes_from_directory = True
        complete = newest_complete(snapshots, profiles)
        last = newest if complete is None else complete[profiles[0]]
        tracker._step, tracker._t = last.info.step, last.info.t
        tracker._own_clock = resumed_habit(tracker._step, tracker._t)
        if model is not None:
            tracker._collect(model)
            tracker._model = weakref.ref(model)
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
            model: the model, as it is now.
            t: training time on a clock of your own (images, tokens), growing at every call; leave it out at
                every call for steps.

        Raises:
            NotReadyError: the tracker was closed, follows an optimizer, or the model holds averaged weights.
            NonFiniteError: a parameter holds nan or infinity (`on_nonfinite="raise"`). No average is touched.
            ModelMismatchError: names, shapes or dtypes have changed. No average is touched.
            WriteError: a snapshot that was due could not be written. Nothing partial is left, and training
                may go on.
            LockedError, MismatchError, DirectoryError, FileFormatError: at the first call: another writer holds
                the directory, or it holds another run, or what is in it cannot be read or is damaged.
        """
        check_model(model)
        self._check_caller()
        if is_swapped(model):
            raise NotReadyError("update_: the model holds averaged weights now; call it outside `with ema.model(...)`")
        self._begin()
        step = self._step + 1
        self._t = next_time(self.settings, self._own_clock, self._t, step, t)
        self._own_clock = t is not None
        self._step = step
        self._clock.add(step, self._t)
        weights = self._take_in(model) if self.settings.update_is_due(step) else None
        if self.settings.snapshot_is_due(step) and self._averages.exist:
            self._write_snapshots(weights)

    def close(self) -> None:
        """Give the directory free and follow no optimizer. Averages can still be read; there are no updates."""
        self.detach()
        self._closed = True
        if self._recorder is not None:
            self._recorder.close()

    def __enter__(self) -> PostHocEMA:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

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
        training checkpoint; `load_state_dict` continues from it exactly.

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
        unpacked = unpack_state(state, self.settings, self._tracked)
        recorder = self._open_recorder(unpacked.run_id)
        recorder.check_run(unpacked.run_id)  # this tracker may have begun another run here
        recorder.set_aside_others(unpacked.t, known=unpacked.snapshots)
        self.run_id = unpacked.run_id
        self._averages, self._clock = unpacked.averages, unpacked.clock
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

    def _settle(self) -> None:
        """Return when every update that was asked for is taken in: averages are updated by the call itself."""

    def _state(self) -> TrackerState:
        """What a tracker would continue from; its tensors are the live ones."""
        self._settle()
        if self._resumes_from_directory:
            return stored_state(self.checkpoint_dir, self.run_id, self.settings.sigma_rels)
        snapshots = frozenset(() if self._recorder is None else self._recorder.checksums)
        return TrackerState(self.run_id, self._step, self._t, self._clock, self._averages, snapshots)

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

    def _collect(self, model: torch.nn.Module) -> ModelTensors:
        """The model's tensors, after a check that they are those that are tracked."""
        known = self._tracked.tensors.keys() | self._tracked.aliases.keys()
        tensors = collect_tensors(model, self.settings.only_trainable, also=known)
        self._tracked.check(TrackedModel.of_model(tensors))
        return tensors

    def _take_in(self, model: torch.nn.Module) -> Mapping[str, torch.Tensor] | None:
        """The weights that the averages took in; None where the update was skipped."""
        tensors = self._collect(model)
        name = nonfinite_name(tensors.averaged)
        if name is None:
            self._averages.update_(tensors.averaged, tensors.copied, self._t, self._step)
            return tensors.averaged
        message = f"parameter {name!r} holds nan or infinity at step {self._step}; no average has taken it in"
        if self.settings.on_nonfinite == "raise":
            raise NonFiniteError(message)
        if self.settings.on_nonfinite == "warn":
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        log.info("update skipped: %s", message)
        return None

    def _write_snapshots(self, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        recorder = self._open_recorder(self.run_id)
        recorder.write(self._live_sources(), weights)
        recorder.thin(self.settings.schedule.max_checkpoints, self.settings.schedule.sigma_range)

    def _live_sources(self) -> list[LiveSource]:
        return live_sources(self.run_id, self.settings, self._tracked, self._averages, self._clock)

    def _sources(self) -> list[Source]:
        return current_sources(self.checkpoint_dir, self.run_id, self._live_sources())
