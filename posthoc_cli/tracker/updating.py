"""The training's side of a tracker: calls counted, averages updated, snapshots handed to the writer."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    LockedError,
    ModelMismatchError,
    NonFiniteError,
    NotReadyError,
    PostHocError,
    WriteError,
)
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.live import LiveSource, Progress, Tracking, live_sources
from posthoc_cli.tracker.model_tensors import (
    Change,
    ModelTensors,
    TrackedModel,
    WatchedModel,
    check_model,
    collect_tensors,
    find_change,
)
from posthoc_cli.tracker.model_weights import is_swapped
from posthoc_cli.tracker.optimizer import Attachable
from posthoc_cli.tracker.pipeline import Background, Update, Writer, skip_update
from posthoc_cli.tracker.resuming import load_start
from posthoc_cli.tracker.settings import Settings, choose_writer, is_in_group, next_time, same_place
from posthoc_cli.tracker.snapshotter import Recorder
from posthoc_cli.tracker.state import TrackerState

log = logging.getLogger(__name__)

_writing: weakref.WeakKeyDictionary[Background, Path] = weakref.WeakKeyDictionary()
"""The directories that trackers of this process write, also after somebody has forgotten a tracker."""


def wait_for_writers(directory: Path, last_too: bool = False) -> None:
    """Return when the trackers of this process have written what is due in a directory; their errors are theirs.

    With `last_too` also what they would write at the end: another tracker is to go on from there.
    """
    for background, place in [*_writing.items()]:
        if same_place(place, directory):
            if last_too and background.last is not None:
                background.write(background.last)
            background.flush()


@dataclass(frozen=True, eq=False)
class Call:
    """A call that changes what the tracker has: there is one at a time. It stands in a variable named `call`."""

    thread: int

    def is_under_way(self) -> bool:
        """Whether its thread is in it still: an exception may have ended it before it could say so."""
        frame = sys._current_frames().get(self.thread)
        while frame is not None:
            if frame.f_locals.get("call") is self:
                return True
            frame = frame.f_back
        return False


class Updating(Attachable):
    """A tracker that a training calls; see `PostHocEMA`."""

    def __init__(
        self,
        directory: Path,
        run_id: str,
        settings: Settings,
        tracked: TrackedModel,
        progress: Progress | None = None,
        resumes: bool = False,
    ) -> None:
        self.checkpoint_dir = directory
        self.settings = settings
        averages = RunningAverages.none_yet(settings.sigma_rels)
        self._background = Background(settings, Tracking(run_id, progress or Progress(), tracked, averages, resumes))
        # Also where nobody closes it. What waits for a thread cannot be done here: collecting garbage may be its work.
        weakref.finalize(self, self._background.end).atexit = False
        self._recorder: Recorder | None = None
        self._pending: Exception | None = None
        self._device: str | None = None
        self._watched = WatchedModel()
        self._checked: tuple[ModelTensors, TrackedModel] | None = None
        self._calls: dict[None, Call] = {}
        self._closed = False
        self._process = os.getpid()
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._knows_selection = True
        self._from_step: int | None = None  # where it goes on, if not from the newest snapshots
        self._resumed_at: int | None = None
        self._writer: bool | None = None

    @property
    def run_id(self) -> str:
        """32 hexadecimal digits that all snapshots of this run carry."""
        return self._background.now.run_id

    @property
    def step(self) -> int:
        """Calls of `update_` so far in this run."""
        return self._background.progress.step

    @property
    def t(self) -> float:
        """Training time of the last call."""
        return self._background.progress.t

    @property
    def keeps_averages(self) -> bool:
        """Whether this process keeps the averages and writes them, or only counts for another one of its group."""
        return not self._follows

    @property
    def _follows(self) -> bool:
        """Whether another process of the group keeps the averages, and this one only counts."""
        self._decide_writer(None if self._model is None else self._model())
        return self._writer is False

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
            NotReadyError: the tracker is closed, follows an optimizer or is a forked process's copy, the model holds
                averaged weights, or a call is under way: of another thread, or of the code that a signal handler stops.
            LockedError, MismatchError, DirectoryError, FileFormatError: at the first call: another writer holds
                the directory, it holds another run, what is in it is damaged, it cannot be read or written, or at no
                time is there a snapshot of every profile to go on from. Nothing of the call has been done.
        """
        check_model(model)
        self._check_caller()
        if is_swapped(model):
            raise NotReadyError(
                "update_", "the model holds averaged weights now", "call it outside `with ema.model(...)`"
            )
        call = Call(threading.get_ident())
        try:
            self._begin_alone("update_", call)
            self._advance(model, t)
        finally:
            self._end_alone(call)
        failure, self._pending = self._pending, None
        if failure is not None:
            raise failure

    def flush(self) -> None:
        """Return when every update is taken in and every snapshot that was due is durable.

        Raises:
            WriteError, NonFiniteError: what went wrong since the last call; raised once.
        """
        self._check_process()
        self._background.flush()
        failure, self._pending = self._failure(), None
        if failure is not None:
            raise failure

    def snapshot(self) -> None:
        """Write a snapshot of every profile now, and return when they are durable.

        They are marked as off the schedule: later snapshots do not depend on them, and when there is no more room for
        them (`max_checkpoints`) they go first. Where the newest snapshots have all updates, nothing is written.

        Raises:
            NotReadyError: there was no update yet, or the tracker is closed.
            WriteError, NonFiniteError: as `flush`.
        """
        self._check_open()
        if self._recorder is not None:
            self._background.write(self._recorder.missing)
        elif not (self._follows or self._background.now.resumes):
            raise NotReadyError("snapshot", "there was no update yet")
        self.flush()

    def close(self) -> None:
        """Finish as `flush`, give the directory free and follow no optimizer. Averages can still be read.

        Where updates were taken in since the newest snapshot, a last one is written, as by `snapshot`, unless
        `final_snapshot=False` was chosen. So it is where a `with` block ends, or the process.
        """
        self.detach()
        self._closed = True
        if self._process != os.getpid():
            return  # of another process, as are the threads and the directory
        self._background.refuse(self._closed_error())
        try:
            self._background.end()
            self.flush()
        finally:
            self._background.close()
            if self._recorder is not None:
                self._recorder.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if error is not None and self.settings.final_snapshot and self._recorder is not None and not self._closed:
            log.warning(
                "%s: %s ended the training at step %d; what it has until then is written",
                self.checkpoint_dir,
                type(error).__name__,
                self.step,
            )
        try:
            self.close()
        except PostHocError:
            if error is None:  # else the block's own error says more; this one was logged when it came
                raise

    # --- inside --------------------------------------------------------------------------------------

    def _begin_alone(self, name: str, call: Call) -> None:
        """Be the only call under way that changes anything."""
        other = self._calls.setdefault(None, call)
        if other is not call and not other.is_under_way():
            self._calls.pop(None, None)
            other = self._calls.setdefault(None, call)
        if other is not call:
            where = "this thread, beneath a signal handler," if other.thread == call.thread else "another thread"
            raise NotReadyError(
                name, f"{where} is calling the tracker", "call update_ from one thread, after every step"
            )

    def _end_alone(self, call: Call) -> None:
        if self._calls.get(None) is call:
            self._calls.pop(None, None)

    def _advance(self, model: torch.nn.Module, t: float | None) -> None:
        """Do what is due at a call."""
        self._check_process()
        # Of work that was done beside the training since the last call; it stays there if this call fails itself.
        self._pending = self._failure()
        self._decide_writer(model)
        if self._follows:
            self._count_only(t)
            return
        self._begin()
        progress = self._after(t)
        if self.settings.update_is_due(progress.step) or self.settings.snapshot_is_due(progress.step):
            # Before anything is counted: a wait for a slow disk can be interrupted, with nothing done.
            self._background.wait_for_turn(self.settings.snapshot_is_due(progress.step))
            self._pending = self._failure()
            progress = self._after(t)  # the last update may have been interrupted when it was handed over already
        self._take_in(model, progress)

    def _decide_writer(self, model: torch.nn.Module | None) -> None:
        """Decide, for good, who keeps the averages: where the tracker is made, or once there is a group."""
        if self._writer is None and self._recorder is None:
            self._writer = choose_writer(None, model)

    def _check_keeps(self) -> None:
        """Raise a NotReadyError in a process that keeps no averages."""
        if self._follows:
            raise NotReadyError(
                "this process keeps no averages, the first one of its group does, or the one that was made "
                "with writer=True",
                "make them there and broadcast them, or read the snapshots on disk with a new "
                "PostHocEMA.from_path(directory), before any update_ of it",
            )

    def _count_only(self, t: float | None) -> None:
        """A call on a process that keeps no averages."""
        self._check_open()
        progress, now = self._after(t), self._background.now
        if now.resumes:  # the writer's averages differ from those on disk from here on
            self._background.set(replace(now, progress=progress, resumes=False))
        else:
            self._background.count(progress)

    def _after(self, t: float | None) -> Progress:
        """How far the training is with one call more."""
        last = self._background.progress
        try:
            time = next_time(self.settings, last.own_clock, last.t, last.step + 1, t)
        except InvalidValueError as error:
            if last.step != self._resumed_at or not isinstance(t, int | float) or t > last.t:
                raise
            raise error.with_hint(
                "the averages go on from there; for an earlier checkpoint there is from_path(..., step=N)"
            ) from error
        return last.after(time, t is not None, self.settings.update_is_due(last.step + 1))

    def _begin(self) -> None:
        """At the first update: become the directory's writer and, in a resumed run, load its averages."""
        self._check_open()
        with self._as_writer(self.run_id) as recorder:
            now = self._background.now
            if now.resumes:
                found = self._stored_state()
                recorder.set_aside_others(found.t, known=found.snapshots)
                if found.step != now.progress.step:
                    log.warning(
                        "%s: the run has gone on since from_path looked, from step %d to %d; the averages go on from "
                        "there, and the model should be of then, too",
                        self.checkpoint_dir,
                        now.progress.step,
                        found.step,
                    )
                self._resumed_at = found.step
                progress = Progress(found.step, found.t, found.clock, now.progress.own_clock, found.step)
                self._background.set(Tracking(now.run_id, progress, now.tracked, found.averages))

    def _stored_state(self) -> TrackerState:
        """What the directory has to go on from."""
        now = self._background.now
        if self._from_step == 0:
            return TrackerState.before(now.run_id, self.settings.sigma_rels)
        return load_start(self.checkpoint_dir, self.settings, now.tracked, self._from_step)

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise NotReadyError(
                self.checkpoint_dir,
                "this process was forked from the one that has the tracker, and its threads",
                "call it there, or read the snapshots with PostHocEMA.from_path",
            )

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise self._closed_error()

    def _closed_error(self) -> NotReadyError:
        return NotReadyError(self.checkpoint_dir, "this tracker was closed", "go on with PostHocEMA.from_path")

    @contextmanager
    def _as_writer(self, run_id: str) -> Iterator[Recorder]:
        """The directory's writer; where the block fails, this tracker stays one only if it was one before."""
        was_writer = self._recorder is not None
        recorder = self._open_recorder(run_id)
        try:
            yield recorder
        except BaseException:
            if not was_writer:
                self._recorder = self._background.last = None
                recorder.close()
            raise

    def _open_recorder(self, run_id: str) -> Recorder:
        if self._recorder is None:
            wait_for_writers(self.checkpoint_dir)  # one that was forgotten may still be writing its last snapshot
            try:
                recorder = self._make_recorder()
            except WriteError as error:  # not as one: nothing of this call has been done
                raise DirectoryError(error.subject, error.reason, error.hint) from error
            except LockedError as error:
                if not is_in_group():
                    raise
                raise error.with_hint(
                    "in a group of processes one writes: from_model(..., writer=rank == 0), and the same for from_path"
                ) from error
            try:
                recorder.check_run(run_id)
            except BaseException:
                recorder.close()
                raise
            self._recorder = recorder
            self._background.last = recorder.last
            _writing[self._background] = self.checkpoint_dir
        return self._recorder

    def _make_recorder(self) -> Recorder:
        try:
            return Recorder(self.checkpoint_dir, self.settings)
        except LockedError:
            # The holder may be garbage, as where a notebook's cell has made everything anew: an optimizer with a
            # scheduler, and a tracker that is attached to it, stay until the collector runs.
            gc.collect()
            wait_for_writers(self.checkpoint_dir)  # it may write a last snapshot
            return Recorder(self.checkpoint_dir, self.settings)

    def _collect(self, model: torch.nn.Module, frozen_too: bool = False) -> ModelTensors:
        """The model's tensors; `frozen_too`: those that were frozen meanwhile."""
        tracked = self._background.now.tracked
        lenient = frozen_too or not self._knows_selection
        known = frozenset(tracked.tensors.keys() | tracked.aliases.keys()) if lenient else None
        return collect_tensors(model, self.settings.selection, also=known)

    def _change(self, tensors: ModelTensors) -> Change | None:
        """How to go on where a model has other tensors than are tracked; None where they are the same.

        Raises:
            ModelMismatchError: they are others, and not to be followed.
            NonFiniteError: see `find_change`.
        """
        tracked = self._background.now.tracked
        if self._checked is not None and self._checked[0] is tensors and self._checked[1] is tracked:
            return None
        try:
            tracked.check(TrackedModel.of_model(tensors))
        except ModelMismatchError:
            if self.settings.on_change != "follow":
                raise
            return find_change(tracked, tensors)
        self._checked = tensors, tracked
        return None

    def _take_in(self, model: torch.nn.Module, progress: Progress) -> None:
        """Do what is due at this call, and count it."""
        due = self._open_recorder(self.run_id).record if self.settings.snapshot_is_due(progress.step) else None
        if self.settings.update_is_due(progress.step):
            self._update(model, progress, due)
        elif due is not None and self._background.now.averages.exist:
            self._background.leave_out(progress, due)
        else:
            self._background.count(progress)

    def _update(self, model: torch.nn.Module, progress: Progress, due: Writer | None) -> None:
        try:
            tensors = self._watched.tensors(model, self._collect)
            change = self._change(tensors)
        except NonFiniteError as error:  # a new segment cannot begin with it
            self._background.leave_out(progress, due)
            skip_update(self.settings, error, stacklevel=6)
            return
        except PostHocError:
            self._background.leave_out(progress, None)
            raise
        self._background.place(tensors.averaged, self._device)
        self._background.update(Update(tensors, progress, due, change))

    def _failure(self) -> Exception | None:
        """What is to be raised by this call or the next one."""
        return self._pending or self._background.take_error()

    def _live_sources(self) -> list[LiveSource]:
        return live_sources(self.settings, self._background.read())
