"""The training side of `PostHocEMA`: one call after every training step, and the background work that it starts."""

from __future__ import annotations

import logging
import threading
import types
import weakref
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch

from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NonFiniteError,
    NotReadyError,
    PostHocError,
    shown,
)
from posthoc_cli.snapshots.codecs import encode_path, joined_paths
from posthoc_cli.snapshots.states import StateInfo
from posthoc_cli.tracker.averages import Averages
from posthoc_cli.tracker.model_tensors import (
    ModelTensors,
    ModelWatch,
    check_model,
    is_swapped,
    nonfinite_error,
    nonfinite_name,
    unwrapped,
)
from posthoc_cli.tracker.optimizer import Attachment, WeakModel, attach
from posthoc_cli.tracker.pipeline import Pipeline
from posthoc_cli.tracker.resuming import Start
from posthoc_cli.tracker.sharding import Group, ShardOwners
from posthoc_cli.tracker.staging import squared_norms
from posthoc_cli.tracker.state import Settings, Tracking, TrainingProgress, pack_state, state_info, unpack_state
from posthoc_cli.tracker.worker import CallGuard

AnyTracker = TypeVar("AnyTracker", bound="Tracker")

log = logging.getLogger(__name__)


class Tracker:
    """The averages of a model while it trains."""

    def _begin(
        self, directory: Path, settings: Settings, tracking: Tracking, model: torch.nn.Module | None,
        device: str | None, start: Start,
    ) -> None:  # fmt: skip
        """Initialise the tracker. Not `__init__`: that of `PostHocEMA` is an error that names the class methods."""
        self.checkpoint_dir, self.settings = directory, settings
        self._members = members = tracking.tracked.members
        self._watch = ModelWatch(settings.selection, members)
        if model is not None and tracking.resumes:
            try:
                self._watch.check_model(model, tracking.tracked)
            except ModelMismatchError as error:
                hint = f"the run in {self.checkpoint_dir} is of another model; use its model, or another directory"
                raise error if error.hint else error.with_hint(hint) from None
        self._model = None if model is None else WeakModel(model)
        self._pipeline = Pipeline(settings, tracking, device)
        # For a tracker that nobody closes. `end` must not wait for a thread: garbage may be collected in that thread.
        weakref.finalize(self, self._pipeline.end).atexit = False
        self._attachment: Attachment | None = None
        self._start = start
        self._pending: Exception | None = None
        self._callbacks: list[Callable[[Any], None]] = []
        self._reported = 0
        self._warned_of: set[str] = set()
        self._calls = CallGuard(directory)
        members.keeps(model, directory)
        self._sample: dict[int, float] | None = None  # of the model that was given, until the first call
        if model is not None and tracking.resumes:
            self._note_weights(model)
            self._choose_start(model, is_first_call=False)
        if model is not None:
            _watch_restoring(unwrapped(model), self)

    def __repr__(self) -> str:
        profiles = ", ".join(f"{sigma_rel:g}" for sigma_rel in self.settings.sigma_rels)
        closed = ", closed" * self.closed
        return f"PostHocEMA({str(self.checkpoint_dir)!r}, step {self.step:,}, sigma_rels {profiles}{closed})"

    @property
    def run_id(self) -> str:
        """The 32 hexadecimal digits that identify this run in the headers of its snapshots."""
        return self._pipeline.tracking.run_id

    @property
    def step(self) -> int:
        """The number of calls of `update_` so far in this run."""
        return self._pipeline.progress.step

    @property
    def t(self) -> float:
        """The training time of the last call of `update_`."""
        return self._pipeline.progress.t

    @property
    def closed(self) -> bool:
        """Whether `close` was called. A closed tracker takes no updates; its averages can still be read."""
        return self._calls.closed

    @property
    def keeps_averages(self) -> bool:
        """Whether this process keeps and writes averages. Other processes of its group only count the steps."""
        return self._members.keeps(self._tracked_model(), self.checkpoint_dir)

    @property
    def has_average(self) -> bool:
        """Whether an update has been due. Before the first one, calls for averages return the raw weights and warn."""
        return self._pipeline.tracking.resumes or self._pipeline.progress.updated > 0

    def tracks(self, model: torch.nn.Module) -> bool:
        """Return whether `model`, wrapped or bare, is the one that this tracker has taken updates from."""
        tracked = None if self._pipeline.tracking.resumes or not self.step else self._tracked_model()
        return tracked is not None and [*map(id, tracked.parameters())] == [*map(id, check_model(model).parameters())]

    def update_(self, model: torch.nn.Module, t: float | None = None) -> None:
        """Count a training step of the model, wrapped or bare. Call it after every optimizer step.

        `t` is the training time on your own clock (images, tokens), larger at every call; or None at every call.

        Raises:
            NonFiniteError, ModelMismatchError: a parameter holds nan or infinity, or the model has changed. The
                averages stay unchanged, and the call counts. Where a background thread updates the averages, the next
                call raises the NonFiniteError.
            WriteError: an earlier snapshot could not be written. Raised once; this call has done its work.
            NotReadyError: the tracker is closed, attached, in use, or belongs to another process; or the model holds
                averaged weights.
            LockedError, MismatchError, ModelMismatchError, DirectoryError, FileFormatError: at the first call: the
                directory has another writer, holds another run, is damaged, or lacks a profile to resume from; or the
                model is not on the path of the run to be resumed. The call has had no effect.
        """
        check_model(model)
        if self._attachment is not None:
            self._attachment.check_caller()
        if is_swapped(model):
            reason = "the model holds averaged weights now"
            raise NotReadyError("update_", reason, "call it outside `with ema.model(...)`")
        grad_mode = torch.is_grad_enabled()
        try:
            with self._calls.lock("update_"):
                self._calls.caller = threading.get_ident()
                self._advance(model, t)
        finally:  # a signal handler can raise just before torch.no_grad() restores the mode
            torch.set_grad_enabled(grad_mode)
        self._raise_pending()
        self._run_callbacks()

    def attach(self, optimizer: torch.optim.Optimizer, t: Callable[[], float] | None = None) -> Attachment:
        """Call `update_` after every step of `optimizer`, with the model that this tracker was made with.

        A step that a GradScaler skips does not count. `optimizer.step()` raises the errors of `update_`. Trackers of
        several directories may be attached to one optimizer; of one directory the last one is. Steps of other
        optimizers do not count: after replacing one, `detach` and attach again. `close` logs how many steps counted.

        Arguments:
            optimizer: the optimizer that trains the model, also accelerate's; of several, the one that steps last.
            t: returns the training time on your own clock, such as `lambda: images_seen`; None for steps.

        Returns:
            A handle whose `remove()` detaches the tracker, as `detach()` does.

        Raises:
            InvalidValueError: not an optimizer, a second one, a tracker without model, or no `t` for this run's clock.
            NotReadyError: this tracker is closed.
        """
        self._calls.check_open()
        self._attachment = attach(self, optimizer, self._model, t, self._attachment)
        return self._attachment

    def detach(self) -> None:
        """Undo `attach`. Do nothing if the tracker is not attached."""
        if self._attachment is not None:
            self._attachment.remove()

    def on_snapshot(self, callback: Callable[[Any], None]) -> None:
        """Register `callback(ema)`, called once for all profiles when new snapshots are durable.

        The thread that calls `update_` calls it within its next `update_` or `close`, which raises the callback's
        errors after its own work is done. Processes that write no snapshots never call it.
        """
        if not callable(callback):
            raise InvalidValueError("on_snapshot", "must be given a function of the tracker", value=shown(callback))
        self._callbacks.append(callback)

    def flush(self) -> None:
        """Wait until all updates are in the averages and all due snapshots, or this process's parts, are durable.

        Raises:
            WriteError, NonFiniteError: an error since the last call, raised once.
            RankError: another process that keeps a part of the averages has failed.
        """
        self._calls.check_process()
        self._pipeline.flush()
        self._pending = self._take_error()
        self._raise_pending()
        self._members.check()

    def snapshot(self) -> None:
        """Write a snapshot of every profile now unless the newest ones hold this call; wait until it is durable.

        Call it when you save a checkpoint of the model, so that `resume="auto"` can continue from that checkpoint.
        Between two updates it takes in the model's weights first. The snapshot is marked as off the schedule; thinning
        drops it when five later times have snapshots.

        Raises:
            NotReadyError: there was no update yet, the tracker is closed, or the model holds averaged weights.
            WriteError, NonFiniteError: see `flush`.
        """
        self._calls.check_open()
        model, progress = self._tracked_model(), self._pipeline.progress
        if model is not None and self.keeps_averages and 0 < progress.updated < progress.step:
            if is_swapped(model):
                raise NotReadyError(
                    "snapshot", "the model holds averaged weights now", "call it outside ema.model(...)"
                )
            with self._calls.lock("snapshot"):
                self._pipeline.wait_for_turn(writes_too=False)
                self._take_in(model, replace(progress, updated=progress.step))
        if self._pipeline.snapshotter is not None:
            self._pipeline.write_missing()
        elif self.keeps_averages and not self._pipeline.tracking.resumes:
            raise NotReadyError("snapshot", "there was no update yet")
        self.flush()

    def close(self) -> None:
        """Write a last snapshot if one is missing, `flush`, release the directory, and detach.

        The last snapshot is that of `snapshot`. The averages can still be read. The end of a `with` block or of the
        process does the same.
        """
        if self._attachment is not None and self._attachment.optimizer is not None:
            counted = self._attachment.steps
            log.info("%s: %d steps of the attached optimizer were counted", self.checkpoint_dir, counted)
        self.detach()
        self._calls.closed = True
        if self._calls.is_forked:
            return  # the threads and the directory belong to another process
        self._pipeline.refuse(self._calls.closed_error())
        try:
            self._pipeline.end()
            self.flush()
            self._run_callbacks()
        finally:
            self._pipeline.close()

    def __enter__(self: AnyTracker) -> AnyTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            self.close()
        except PostHocError:
            if error is None:  # else the block's own error says more; this one was logged when it was raised
                raise

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse pickling and copying: the threads and the directory's lock cannot be copied."""
        raise NotReadyError(
            "PostHocEMA",
            "a tracker can be neither saved nor copied as an object",
            "save its state, ema.state_dict(), within a checkpoint; to copy or save a module that holds it, keep the "
            "tracker outside of the module",
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly from a tracker's own state, which `state_dict()` returned.

        Snapshots that are later than the state, or of another attempt that continued from an earlier state, are moved
        to the folder `superseded`. From now on this tracker's settings hold, such as another `update_every` or
        `checkpoint_every`, or fewer `sigma_rels`; every profile stays exact. An error changes nothing. For a sharded
        model all processes make the call; each loads the chunks that it owns, also from complete tensors.

        Raises:
            InvalidValueError, ModelMismatchError, NonFiniteError: not a tracker's state, or one that does not fit.
            LockedError, MismatchError: another writer, or another run, has the directory.
            RankError: another process failed.
        """
        self._calls.check_open()
        if not (self._has_state or state):
            # The writer loads the state. This process only counts, and must not resume from disk any more.
            progress = replace(self._pipeline.tracking.progress, updated=max(1, self.step))
            self._pipeline.set(replace(self._pipeline.tracking, progress=progress, resumes=False))
            return
        group = self._members.keepers("load_state_dict(...)")
        with self._calls.lock("load_state_dict"):
            self._calls.caller = threading.get_ident()
            loaded = group.together(lambda: self._unpack(state))
            norms = _squared_norms(group, loaded)
            group.together(lambda: self._write_from(loaded, norms))
            self._pipeline.set(loaded)

    def _unpack(self, state: Mapping[str, Any]) -> Tracking:
        self.flush()
        loaded = unpack_state(state, self.settings, self._pipeline.tracking.tracked)
        if self.keeps_averages:
            return loaded
        return replace(loaded, averages=Averages.none_yet(self.settings.sigma_rels))

    def _write_from(self, loaded: Tracking, norms: Mapping[float, float]) -> None:
        """Become the directory's writer, and set aside snapshots that are not of the state's training."""
        if self.keeps_averages:
            with self._pipeline.as_writer(self.checkpoint_dir, loaded.run_id) as snapshotter:
                snapshotter.list_complete()
                known = loaded.snapshots | snapshotter.holding(loaded.averages, norms)
                snapshotter.set_aside_others(loaded.progress.t, known)

    def _own_state(self) -> dict[str, Any]:
        """Return the tracker's own state, as `state_dict()` does."""
        return pack_state(*self._state(), self._chunked_model()) if self._has_state else {}

    def _state(self) -> tuple[Tracking, StateInfo]:
        """Return a state to continue from: copies of this process's tensors, and everything else."""
        group = self._members.keepers("state_dict()")
        tracking = group.together(self._read_exactly)
        averages = tracking.averages
        part = averages.standing.inherited, encode_path(averages.known_path, exact=True)
        inherited, sketches = zip(*group.from_all_at(self.step, self.t, part), strict=True)
        # Each process knows the rounding and the path of its own part, and some processes have no average.
        total, sketch = tuple(map(sum, zip(*inherited, strict=True))), joined_paths([*filter(None, sketches)])

        def read_info() -> StateInfo:
            snapshotter = self._pipeline.snapshotter
            complete = tracking if snapshotter is None else replace(tracking, snapshots=snapshotter.checksums)
            return state_info(complete, self.settings)

        return tracking, replace(group.from_first(read_info), inherited=total, sketch=sketch)

    def _read_exactly(self) -> Tracking:
        self.flush()
        if self._pipeline.tracking.resumes:
            return self._start.read(self._pipeline.tracking)
        tracking = self._pipeline.read_exactly()
        self._pipeline.flush()  # now the snapshots of that time are on disk
        return tracking

    # --- one call of `update_`

    def _advance(self, model: torch.nn.Module, t: float | None) -> None:
        self._calls.check_open()
        if self.settings.snapshot_is_due(self.step + 1):
            self._members.check()
        # Errors of background work since the last call; they stay pending if this call fails itself.
        self._pending = self._take_error()
        self._pipeline.is_restored = False
        if self._pipeline.tracking.resumes:
            self._choose_start(model, is_first_call=True)
        if self._members.keeps(model, self.checkpoint_dir):
            self._keep(model, t)
        else:
            self._only_count(model, t)

    def _keep(self, model: torch.nn.Module, t: float | None) -> None:
        """Handle one call in a process that keeps averages."""
        if self._pipeline.snapshotter is None or self._pipeline.tracking.resumes:
            self._become_writer()
        progress = self._progress_when_ready(t)
        if self.settings.update_is_due(progress.step):
            self._take_in(model, progress)
        else:
            self._pipeline.count(progress)

    def _only_count(self, model: torch.nn.Module, t: float | None) -> None:
        """Handle one call in a process that keeps no averages."""
        progress = self._next_progress(t)
        if self.settings.update_is_due(progress.step):
            self._members.check_kind(model)
        if self._pipeline.tracking.resumes or not self.step:  # the first call
            self._members.wait_for_writer()
        self._nonfinite_anywhere(None, progress)
        self._pipeline.count(progress)

    def _progress_when_ready(self, t: float | None) -> TrainingProgress:
        """Wait until the pipeline can take what is due at the next call, and return the progress after that call.

        Nothing is counted meanwhile: an interrupted wait for a slow disk has no effect.
        """
        progress, settings = self._next_progress(t), self.settings
        snapshot_is_due = settings.snapshot_is_due(progress.step)
        if snapshot_is_due or settings.update_is_due(progress.step):
            self._pipeline.wait_for_turn(snapshot_is_due)
            self._pending = self._take_error()
            progress = self._next_progress(t)  # the last update may have been interrupted after it was queued
        return progress

    def _take_in(self, model: torch.nn.Module, progress: TrainingProgress) -> None:
        """Queue the model's values for the averages, or skip the update as `on_nonfinite` says."""
        tracked = self._pipeline.tracking.tracked
        try:
            tensors = self._watch.tensors(model)
            self._watch.check(tensors, tracked)
        except PostHocError:
            self._pipeline.skip(progress, writes=False)
            raise
        nonfinite = self._nonfinite_anywhere(tensors, progress)
        if nonfinite is None:
            nonfinite = self._pipeline.update(tensors, progress)
            self._pipeline.warn_of_waiting()
        else:
            self._pipeline.skip(progress)
        if nonfinite is not None:
            self.settings.skip_update(nonfinite)

    def _nonfinite_anywhere(self, tensors: ModelTensors | None, progress: TrainingProgress) -> NonFiniteError | None:
        """Return the error for which all processes of a sharded model skip an update together, or None."""
        may_skip = self.settings.on_nonfinite == "skip" and self.settings.update_is_due(progress.step)
        if not (may_skip and isinstance(self._members, ShardOwners)):
            return None
        name = None if tensors is None else nonfinite_name(tensors.averaged)
        if not self._members.any(name is not None):
            return None
        return nonfinite_error(name, self._pipeline.tracking.tracked.tensors, progress.step)

    def _next_progress(self, t: float | None) -> TrainingProgress:
        """Return the progress after one more call."""
        last = self._pipeline.progress
        try:
            return last.after(t, self.settings)
        except InvalidValueError as error:
            if last.step != self._start.read_at or not isinstance(t, int | float) or t > last.t:
                raise
            hint = "the averages continue from that call; for an earlier checkpoint there is from_path(..., step=N)"
            raise error.with_hint(hint) from error

    def _note_weights(self, model: torch.nn.Module) -> None:
        """Note the model's sampled weights, as far as this process holds them, before training changes them."""
        self._sample = self._watch.sample(model, self._pipeline.tracking.tracked)

    def _choose_start(self, model: torch.nn.Module, is_first_call: bool) -> None:
        """Resume from the newest time at which the network had the model's weights, see `Start.choose`."""
        if self._start.step == 0:
            return
        group, now = self._members.keepers("update_" if is_first_call else "this tracker"), self._pipeline.tracking
        if self._sample is None:
            group.together(lambda: self._note_weights(model))
        sample = dict(ChainMap(*group.from_all(self._sample or {})))
        writes = self._members.keeps(model, self.checkpoint_dir)
        chosen = self._start.choose(now, sample, group, writes, is_first_call)
        if chosen is not now:
            self._pipeline.set(chosen)

    def _become_writer(self) -> None:
        """Become the directory's writer, at the first call, and in a resumed run load its averages."""
        with self._pipeline.as_writer(self.checkpoint_dir, self.run_id) as snapshotter:
            now = self._pipeline.tracking
            if not now.resumes:
                return
            loaded = self._start.read(now)
            progress = loaded.progress
            snapshotter.set_aside_others(progress.t, known=loaded.snapshots)
            self._start.read_at = progress.step
            self._pipeline.set(loaded)

    def _tracked_model(self, default: torch.nn.Module | None = None) -> torch.nn.Module | None:
        """Return the model that this tracker was made with if it still exists, else `default`."""
        model = None if self._model is None else self._model()
        return default if model is None else model  # no `or`: it would ask for a model's length

    def _is_first_warning(self, cause: str) -> bool:
        """Return whether no warning of this cause was given before, and note that one is given now."""
        is_first = cause not in self._warned_of
        self._warned_of.add(cause)
        return is_first

    def _run_callbacks(self) -> None:
        """Call the callbacks if snapshots have become durable."""
        written = self._pipeline.written
        if written != self._reported:
            self._reported = written
            for callback in self._callbacks:
                callback(self)

    def _take_error(self) -> Exception | None:
        """Return the error to be raised by this call or the next one."""
        return self._pending or self._pipeline.take_error()

    def _raise_pending(self) -> None:
        failure, self._pending = self._pending, None
        if failure is not None:
            raise failure

    # --- calls that several processes make

    @property
    def _has_state(self) -> bool:
        """Whether this process holds any part of the tracker's own state."""
        return self._members.is_chunked or self.keeps_averages

    def _chunked_model(self) -> torch.nn.Module | None:
        """Return the sharded model, which must still exist; None where the tracked model is not sharded."""
        if not self._members.is_chunked:
            return None
        model = self._tracked_model()
        if model is None:
            raise NotReadyError("state_dict", "the model, whose parameters say where each chunk is, no longer exists")
        return model


_trackers: WeakKeyDictionary[torch.nn.Module, WeakSet[Tracker]] = WeakKeyDictionary()
"""The trackers that were made with a model, by the bare model."""


def _watch_restoring(model: torch.nn.Module, tracker: Tracker) -> None:
    """Tell a tracker whenever the model's checkpoint is loaded."""
    if model not in _trackers:
        register: Any = model.register_load_state_dict_post_hook
        register(_note_restored)
    _trackers.setdefault(model, WeakSet()).add(tracker)


def _note_restored(model: torch.nn.Module, _: object) -> None:
    """Handle the end of the model's `load_state_dict`; a function of the module, so that models can be pickled."""
    for tracker in [*_trackers.get(model, ())]:
        tracker._pipeline.is_restored = True
        if tracker._pipeline.tracking.resumes and not tracker.closed:
            tracker._note_weights(model)
            if not tracker._members.is_chunked:  # else other processes would have to take part
                tracker._choose_start(model, is_first_call=False)


def _squared_norms(group: Group, state: Tracking) -> dict[float, float]:
    """Return the squared norm of each average by sigma_rel, summed over the processes."""
    averages = state.averages
    parts = group.from_all({} if averages.tensors is None else squared_norms(averages, state.tracked.weights))
    return {sigma_rel: sum(norms.get(sigma_rel, 0.0) for norms in parts) for sigma_rel in averages.sigma_rels}
