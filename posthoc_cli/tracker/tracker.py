"""The training side of `PostHocEMA`: one call after every step, and what goes on beside it."""

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

import torch

from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NonFiniteError,
    NotReadyError,
    PostHocError,
    shown,
)
from posthoc_cli.snapshots.format import joined_paths
from posthoc_cli.snapshots.states import StateInfo
from posthoc_cli.tracker.going_on import Start
from posthoc_cli.tracker.model_tensors import (
    ModelTensors,
    ModelWatch,
    check_model,
    is_swapped,
    nonfinite_error,
    nonfinite_name,
)
from posthoc_cli.tracker.optimizer import Attachment, attach
from posthoc_cli.tracker.pipeline import Pipeline
from posthoc_cli.tracker.running import RunningAverages
from posthoc_cli.tracker.sharding import Group, Owners
from posthoc_cli.tracker.staging import squared_norms
from posthoc_cli.tracker.state import Progress, Settings, Tracking, pack_state, sketch_of, state_info, unpack_state
from posthoc_cli.tracker.worker import Calls

Own = TypeVar("Own", bound="Tracker")

log = logging.getLogger(__name__)


class Tracker:
    """The averages of a model while it trains."""

    def _begin(
        self, directory: Path, settings: Settings, tracking: Tracking, model: torch.nn.Module | None,
        device: str | None, start: Start,
    ) -> None:  # fmt: skip
        """Begin; no constructor, since that of `PostHocEMA` says how one is made."""
        self.checkpoint_dir, self.settings = directory, settings
        self._members = members = tracking.tracked.members
        self._watch = ModelWatch(settings.selection, members)
        if model is not None and tracking.resumes:
            try:
                self._watch.check_model(model, tracking.tracked)
            except ModelMismatchError as error:
                hint = f"the run in {self.checkpoint_dir} is of another model; use its model, or another directory"
                raise error if error.hint else error.with_hint(hint) from None
        self._model = None if model is None else weakref.ref(model)
        self._pipeline = Pipeline(settings, tracking, device)
        # Also where nobody closes it. It must not wait for a thread: that may be collecting the garbage.
        weakref.finalize(self, self._pipeline.end).atexit = False
        self._attachment: Attachment | None = None
        self._start = start
        self._pending: Exception | None = None
        self._callbacks: list[Callable[[Any], None]] = []
        self._reported = 0
        self._told: set[str] = set()
        self._calls = Calls(directory)
        members.keeps(model, directory)
        if model is not None and tracking.resumes and start.step is None:
            self._choose_start(model, is_first_call=False)

    def __repr__(self) -> str:
        profiles = ", ".join(f"{sigma_rel:g}" for sigma_rel in self.settings.sigma_rels)
        closed = ", closed" * self.closed
        return f"PostHocEMA({str(self.checkpoint_dir)!r}, step {self.step:,}, sigma_rels {profiles}{closed})"

    @property
    def run_id(self) -> str:
        """32 hexadecimal digits that all snapshots of this run carry."""
        return self._pipeline.now.run_id

    @property
    def step(self) -> int:
        """Calls of `update_` so far in this run."""
        return self._pipeline.progress.step

    @property
    def t(self) -> float:
        """Training time of the last call."""
        return self._pipeline.progress.t

    @property
    def closed(self) -> bool:
        """Whether `close` was called: no more updates are taken, averages can still be read."""
        return self._calls.closed

    @property
    def keeps_averages(self) -> bool:
        """Whether this process keeps the averages and writes them, or only counts for another one of its group."""
        return self._members.keeps(self._tracked_model(), self.checkpoint_dir)

    @property
    def has_average(self) -> bool:
        """Whether an update was due by now. Before, calls for averages give the weights as they are, and warn."""
        return self._pipeline.now.resumes or self._pipeline.progress.updated > 0

    def tracks(self, model: torch.nn.Module) -> bool:
        """Whether this tracker has taken in a model, wrapped or bare, so that it holds the raw weights of now."""
        own = None if self._pipeline.now.resumes or not self.step else self._tracked_model()
        return own is not None and [*map(id, own.parameters())] == [*map(id, check_model(model).parameters())]

    def update_(self, model: torch.nn.Module, t: float | None = None) -> None:
        """Count a training step of the model, wrapped or bare. Call it after every optimizer step.

        `t` is the training time on a clock of your own (images, tokens), growing at every call; or None at every call.

        Raises:
            NonFiniteError, ModelMismatchError: a parameter holds nan or infinity, or the model has changed. No average
                is touched, and the call counts. Where averages are updated beside the training, the first comes with
                the next call.
            WriteError: an earlier snapshot could not be written; raised once, this call has done its work.
            NotReadyError: the tracker is closed, attached, in use or another process's; or the weights are averaged.
            LockedError, MismatchError, ModelMismatchError, DirectoryError, FileFormatError: at the first call: the
                directory has another writer or run, or is damaged or lacks a profile to go on from; or the model is not
                on the path of the run that is to go on. Nothing of the call has been done.
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
        finally:  # a signal handler can raise just before torch.no_grad() restores it
            torch.set_grad_enabled(grad_mode)
        self._raise_pending()
        self._run_callbacks()

    def attach(self, optimizer: torch.optim.Optimizer, t: Callable[[], float] | None = None) -> Attachment:
        """Call `update_` after every step of `optimizer`, with the model that this tracker was made with.

        A step that a GradScaler skips does not count. Errors of `update_` leave `optimizer.step()`. Another tracker
        that is attached to the optimizer for the same model is closed, with a warning: when a notebook's cell runs
        again, nothing else can close it. To have two of one model, call `update_` of one of them yourself.

        Arguments:
            optimizer: the one that trains the model, may be accelerate's; of several, the one that steps last.
            t: gives the training time on a clock of your own, such as `lambda: images_seen`; None for steps.

        Returns:
            A handle whose `remove()` undoes it, as `detach()` does.

        Raises:
            InvalidValueError: not an optimizer, a second one, a tracker without model, or no `t` for this run's clock.
            NotReadyError: this tracker is closed.
            others: from closing the other tracker. This one is not attached then; the next try will succeed.
        """
        self._calls.check_open()
        self._attachment = attach(self, optimizer, self._model, t, self._attachment)
        return self._attachment

    def detach(self) -> None:
        """Undo `attach`. Nothing happens if the tracker is not attached."""
        if self._attachment is not None:
            self._attachment.remove()

    def on_snapshot(self, callback: Callable[[Any], None]) -> None:
        """Call `callback(ema)` when new snapshots are durable, once for all profiles.

        The thread that calls `update_` does so, within its next call, or `close`. Errors of the callback leave that
        call, which has done its work. In the processes of a group that write nothing it is never called.
        """
        if not callable(callback):
            raise InvalidValueError("on_snapshot", "must be given a function of the tracker", value=shown(callback))
        self._callbacks.append(callback)

    def flush(self) -> None:
        """Return when all updates are in the averages and all due snapshots are durable, or this process's parts.

        Of a run by URL they are in the store then.

        Raises:
            WriteError, NonFiniteError: what went wrong since the last call; raised once. Snapshots cannot be uploaded.
            LockedError: another process has taken the run by URL.
            RankError: another process that keeps a part of the averages has failed.
        """
        self._finish_writing()
        self._pipeline.upload()

    def _finish_writing(self) -> None:
        """As `flush`; of a run by URL when all is durable on this machine."""
        self._calls.check_process()
        if self._attachment is not None:
            self._attachment.check_steps()
        self._pipeline.flush()
        self._pending = self._take_error()
        self._raise_pending()
        self._members.check()

    def snapshot(self) -> None:
        """Write a snapshot of every profile now, if not all updates are in the newest, and return when it is durable.

        It is marked as off the schedule: later snapshots do not depend on it, and `max_checkpoints` drops it first.

        Raises:
            NotReadyError: there was no update yet, or the tracker is closed.
            WriteError, NonFiniteError: as `flush`.
        """
        self._calls.check_open()
        if self._pipeline.snapshotter is not None:
            self._pipeline.write_missing()
        elif self.keeps_averages and not self._pipeline.now.resumes:
            raise NotReadyError("snapshot", "there was no update yet")
        self.flush()

    def close(self) -> None:
        """Finish as `flush`, release the directory, and detach. Averages can still be read.

        If averages were updated since the newest snapshot, a last one is written, as by `snapshot`. The end of a `with`
        block or of the process does the same.
        """
        if self._attachment is not None:
            self._attachment.check_steps()
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

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            self.close()
        except PostHocError:
            if error is None:  # else the block's own error says more; this one was logged when it came
                raise

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied: the threads and the directory's lock cannot be."""
        raise NotReadyError(
            "PostHocEMA",
            "a tracker can be neither saved nor copied as an object",
            "save its state, ema.state_dict(), within a checkpoint; to copy or save a module that holds it, keep the "
            "tracker outside of the module",
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly from a tracker's own state, as `state_dict()` gave it.

        Snapshots that are later than the state, or of another attempt that went on from an earlier one, are moved to
        the folder `superseded`. This tracker's settings hold from here on: another `update_every` or
        `checkpoint_every`, or fewer `sigma_rels`; every profile stays exact. On an error nothing is changed. Of a model
        that is sharded over processes all of them make the call; each takes what it owns, of complete tensors, too.

        Raises:
            InvalidValueError, ModelMismatchError, NonFiniteError: not such a state, or one that does not fit.
            LockedError, MismatchError: another writer, or another run, has the directory.
            RankError: another process failed.
        """
        self._calls.check_open()
        if not (self._has_state or state):
            # The writer has other averages from here on than those on disk.
            progress = replace(self._pipeline.now.progress, updated=max(1, self.step))
            self._pipeline.set(replace(self._pipeline.now, progress=progress, resumes=False))
            return
        group = self._members.keepers("load_state_dict(...)")
        with self._calls.lock("load_state_dict"):
            self._calls.caller = threading.get_ident()
            loaded = group.together(lambda: self._unpacked(state))
            norms = _norms(group, loaded)
            group.together(lambda: self._begin_from(loaded, norms))
            self._pipeline.set(loaded)

    def _unpacked(self, stored: Mapping[str, Any]) -> Tracking:
        self._finish_writing()
        loaded = unpack_state(stored, self.settings, self._pipeline.now.tracked)
        if self.keeps_averages:
            return loaded
        return replace(loaded, averages=RunningAverages.none_yet(self.settings.sigma_rels))

    def _begin_from(self, loaded: Tracking, norms: Mapping[float, float]) -> None:
        """Become the directory's writer, and set aside what is not of the state's training."""
        if self.keeps_averages:
            with self._pipeline.as_writer(self.checkpoint_dir, loaded.run_id) as snapshotter:
                snapshotter.read_again()
                known = loaded.snapshots | snapshotter.holding(loaded.averages, norms)
                snapshotter.set_aside_others(loaded.progress.t, known)

    def _own_state(self) -> dict[str, Any]:
        """What `state_dict()` gives."""
        return pack_state(*self._state(), self._chunked_model()) if self._has_state else {}

    def _state(self) -> tuple[Tracking, StateInfo]:
        """What a tracker would continue from: its tensors are copies of this process's."""
        group = self._members.keepers("state_dict()")
        own = group.together(self._read_exactly)
        told = own.averages.standing.inherited, sketch_of(own.averages)
        inherited, sketches = zip(*group.from_all_at(self.step, self.t, told), strict=True)
        # Each process knows the rounding and the path of its own part, and some of them have no average.
        total, sketch = tuple(map(sum, zip(*inherited, strict=True))), joined_paths([*filter(None, sketches)])

        def read_info() -> StateInfo:
            snapshotter = self._pipeline.snapshotter
            complete = own if snapshotter is None else replace(own, snapshots=snapshotter.checksums)
            return state_info(complete, self.settings)

        return own, replace(group.from_first(read_info), inherited=total, sketch=sketch)

    def _read_exactly(self) -> Tracking:
        self._finish_writing()
        if self._pipeline.now.resumes:
            return self._start.read(self._pipeline.now)
        reading = self._pipeline.read_exactly()
        self._pipeline.flush()  # the snapshots of that time are on disk now
        return reading

    # --- one call of `update_`

    def _advance(self, model: torch.nn.Module, t: float | None) -> None:
        self._calls.check_open()
        if self.settings.snapshot_is_due(self.step + 1):
            self._members.check()
        # Errors of work beside the training since the last call; they stay if this call fails itself.
        self._pending = self._take_error()
        if self._pipeline.now.resumes:
            self._choose_start(model, is_first_call=True)
        if self._members.keeps(model, self.checkpoint_dir):
            self._keep(model, t)
        else:
            self._only_count(model, t)

    def _keep(self, model: torch.nn.Module, t: float | None) -> None:
        """One call in a process that keeps averages."""
        if self._pipeline.snapshotter is None or self._pipeline.now.resumes:
            self._become_writer()
        progress = self._after_waiting(t)
        if self.settings.update_is_due(progress.step):
            self._take_in(model, progress)
        else:
            self._pipeline.count(progress)

    def _only_count(self, model: torch.nn.Module, t: float | None) -> None:
        """One call in a process that keeps no averages."""
        progress = self._after(t)
        if self.settings.update_is_due(progress.step):
            self._members.check_kind(model)
        if self._pipeline.now.resumes or not self.step:  # the first call
            self._members.wait_for_writer()
        self._refused_anywhere(None, progress)
        self._pipeline.count(progress)

    def _after_waiting(self, t: float | None) -> Progress:
        """The progress after one more call, when the pipeline can take what is due then.

        Nothing is counted before: a wait for a slow disk can be interrupted, with nothing done.
        """
        progress, settings = self._after(t), self.settings
        writes_too = settings.snapshot_is_due(progress.step)
        if writes_too or settings.update_is_due(progress.step):
            self._pipeline.wait_for_turn(writes_too)
            self._pending = self._take_error()
            progress = self._after(t)  # the last update may have been interrupted after it was handed over
        return progress

    def _take_in(self, model: torch.nn.Module, progress: Progress) -> None:
        """Hand the model's values over, or leave them out as `on_nonfinite` says."""
        tracked = self._pipeline.now.tracked
        try:
            tensors = self._watch.tensors(model)
            self._watch.check(tensors, tracked)
        except PostHocError:
            self._pipeline.leave_out(progress, writes=False)
            raise
        skipped = self._refused_anywhere(tensors, progress)
        if skipped is None:
            skipped = self._pipeline.update(tensors, progress)
            self._pipeline.warn_of_waiting()
        else:
            self._pipeline.leave_out(progress)
        if skipped is not None:
            self.settings.skip_update(skipped)

    def _refused_anywhere(self, tensors: ModelTensors | None, progress: Progress) -> NonFiniteError | None:
        """Why all processes of a sharded model leave an update out; None if they do not, or each raises an error."""
        asks = self.settings.on_nonfinite == "skip" and self.settings.update_is_due(progress.step)
        if not (asks and isinstance(self._members, Owners)):
            return None
        name = None if tensors is None else nonfinite_name(tensors.averaged)
        if not self._members.any(name is not None):
            return None
        return nonfinite_error(name, self._pipeline.now.tracked.tensors, progress.step)

    def _after(self, t: float | None) -> Progress:
        """The progress after one more call."""
        last = self._pipeline.progress
        try:
            return last.after(t, self.settings)
        except InvalidValueError as error:
            if last.step != self._start.read_at or not isinstance(t, int | float) or t > last.t:
                raise
            hint = "the averages go on from there; for an earlier checkpoint there is from_path(..., step=N)"
            raise error.with_hint(hint) from error

    def _choose_start(self, model: torch.nn.Module, is_first_call: bool) -> None:
        """Go on from the model's place on the run's path, see `Start.choose`."""
        if self._start.step == 0:
            return
        group, now = self._members.keepers("update_" if is_first_call else "this tracker"), self._pipeline.now
        own = group.together(lambda: self._watch.sample(model, now.tracked))
        sample = dict(ChainMap(*group.from_all(own)))
        writes = self._members.keeps(model, self.checkpoint_dir)
        chosen = self._start.choose(now, sample, group, writes, is_first_call)
        if chosen is not now:
            self._pipeline.set(chosen)

    def _become_writer(self) -> None:
        """At the first call: become the directory's writer and, in a resumed run, load its averages."""
        with self._pipeline.as_writer(self.checkpoint_dir, self.run_id) as snapshotter:
            now = self._pipeline.now
            if not now.resumes:
                return
            found = self._start.read(now)
            progress = found.progress
            snapshotter.set_aside_others(progress.t, known=found.snapshots)
            if progress.step != now.progress.step:
                log.warning(
                    "%s: the run has gone on since from_path looked, from step %d to %d; the averages go on from "
                    "there, and the model should be of then, too",
                    self.checkpoint_dir, now.progress.step, progress.step,
                )  # fmt: skip
            self._start.read_at = progress.step
            self._pipeline.set(found)

    def _tracked_model(self, other: torch.nn.Module | None = None) -> torch.nn.Module | None:
        """The model that this was made with, if it is still there; else another one."""
        own = None if self._model is None else self._model()
        return other if own is None else own  # no `or`: it would ask for a model's length

    def _is_first(self, cause: str) -> bool:
        """Whether the user has not been told of this cause yet."""
        is_first = cause not in self._told
        self._told.add(cause)
        return is_first

    def _run_callbacks(self) -> None:
        """Call the callbacks if snapshots have become durable."""
        written = self._pipeline.written
        if written != self._reported:
            self._reported = written
            for callback in self._callbacks:
                callback(self)

    def _take_error(self) -> Exception | None:
        """The error to be raised by this call or the next one."""
        return self._pending or self._pipeline.take_error()

    def _raise_pending(self) -> None:
        failure, self._pending = self._pending, None
        if failure is not None:
            raise failure

    # --- calls that several processes make

    @property
    def _has_state(self) -> bool:
        """Whether this process has a share in the tracker's own state."""
        return self._members.is_chunked or self.keeps_averages

    def _chunked_model(self) -> torch.nn.Module | None:
        """The model of which each process keeps chunks, which must still be there; None of any other one."""
        if not self._members.is_chunked:
            return None
        model = self._tracked_model()
        if model is None:
            raise NotReadyError("state_dict", "the model, whose parameters say where each chunk is, is gone")
        return model


def _norms(group: Group, state: Tracking) -> dict[float, float]:
    """The squared norms of averages by sigma_rel, of which processes add theirs."""
    averages = state.averages
    every = group.from_all({} if averages.tensors is None else squared_norms(averages, state.tracked.weights))
    return {sigma_rel: sum(own.get(sigma_rel, 0.0) for own in every) for sigma_rel in averages.sigma_rels}
