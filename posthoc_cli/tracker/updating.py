"""The training's side of a tracker: calls counted, averages updated, snapshots handed to the writer."""

from __future__ import annotations

import copy
import logging
import os
import threading
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from posthoc_cli.errors import (
    DirectoryError,
    LockedError,
    ModelMismatchError,
    NonFiniteError,
    NotReadyError,
    PostHocError,
    WriteError,
)
from posthoc_cli.profiles import ClockRecorder
from posthoc_cli.tracker.attaching import Attachable
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.background import Background, Snapshots, skip_update
from posthoc_cli.tracker.following import follow_change
from posthoc_cli.tracker.live import LiveSource, live_sources
from posthoc_cli.tracker.model_tensors import ModelTensors, TrackedModel, check_model, collect_tensors
from posthoc_cli.tracker.recorder import Recorder
from posthoc_cli.tracker.replicas import is_in_group, is_replica
from posthoc_cli.tracker.settings import Settings, next_time, same_place
from posthoc_cli.tracker.state import load_averages
from posthoc_cli.tracker.watching import WatchedModel
from posthoc_cli.tracker.weights import is_swapped

log = logging.getLogger(__name__)

_writing: weakref.WeakSet[Updating] = weakref.WeakSet()
"""The trackers of this process that have become writers of a directory."""


def wait_for_writers(directory: Path) -> None:
    """Return when the trackers of this process have written what is due in a directory; their errors are theirs."""
    for tracker in [*_writing]:
        if tracker._background is not None and same_place(tracker.checkpoint_dir, directory):
            tracker._background.flush()


class Updating(Attachable):
    """A tracker that a training calls; see `PostHocEMA`."""

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
        self._pending: Exception | None = None
        self._device: str | None = None
        self._watched = WatchedModel()
        self._calling = threading.Lock()
        self._closed = False
        self._process = os.getpid()
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._knows_selection = True
        self._follows = False  # the first process of a group tracks the same model

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
            NotReadyError: the tracker is closed, follows an optimizer or is a forked process's copy, the model holds
                averaged weights, or another thread is calling.
            LockedError, MismatchError, DirectoryError, FileFormatError: at the first call: another writer holds
                the directory, it holds another run, what is in it is damaged, it cannot be read or written, or at no
                time is there a snapshot of every profile to go on from. Nothing of the call has been done.
        """
        check_model(model)
        self._check_caller()
        if is_swapped(model):
            raise NotReadyError("update_: the model holds averaged weights now; call it outside `with ema.model(...)`")
        if not self._calling.acquire(blocking=False):
            raise NotReadyError("update_: another thread is calling it; call it from one thread, after every step")
        try:
            self._check_process()
            # Of work that was done beside the training since the last call; it stays there if this call fails itself.
            self._pending = self._failure()
            self._follows = self._follows or is_replica(model)
            self._check_open() if self._follows else self._begin()
            self._advance(t)
            if not self._follows:
                self._take_in(model)
            if self._pending is None and self._background is not None:
                self._pending = self._background.known_error()  # of the last update, which this one has waited for
        finally:
            self._calling.release()
        failure, self._pending = self._pending, None
        if failure is not None:
            raise failure

    def flush(self) -> None:
        """Return when every update is taken in and every snapshot that was due is durable.

        Raises:
            WriteError, NonFiniteError: what went wrong since the last call; raised once.
        """
        self._check_process()
        if self._background is not None:
            self._background.flush()
        failure = self._failure()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Finish as `flush`, give the directory free and follow no optimizer. Averages can still be read."""
        self.detach()
        self._closed = True
        if self._process != os.getpid():
            return  # of another process, as are the threads and the directory
        try:
            self.flush()
        finally:
            if self._background is not None:
                self._background.close()
            if self._recorder is not None:
                self._recorder.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            self.close()
        except PostHocError:
            if error is None:  # else the block's own error says more; this one was logged when it came
                raise

    # --- inside --------------------------------------------------------------------------------------

    def _advance(self, t: float | None) -> None:
        """Count a call."""
        step = self._step + 1
        self._t = next_time(self.settings, self._own_clock, self._t, step, t)
        self._own_clock = t is not None
        self._step = step
        self._clock.add(step, self._t)

    def _begin(self) -> None:
        """At the first update: become the directory's writer and, in a resumed run, load its averages."""
        self._check_open()
        with self._as_writer(self.run_id) as recorder:
            if self._resumes_from_directory:
                averages, clock = load_averages(self.checkpoint_dir, self.settings.sigma_rels)
                recorder.set_aside_others(averages.t)
                if averages.step != self._step:
                    log.warning(
                        "%s: the run has gone on since from_path looked, from step %d to %d; the averages go on from "
                        "there, and the model should be of then, too",
                        self.checkpoint_dir,
                        self._step,
                        averages.step,
                    )
                self._averages, self._clock = averages, clock
                self._step, self._t = averages.step, averages.t
                self._resumes_from_directory = False

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise NotReadyError(
                f"{self.checkpoint_dir}: this process was forked from the one that has the tracker, and its threads; "
                "call it there, or read the snapshots with PostHocEMA.from_path"
            )

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise NotReadyError(f"{self.checkpoint_dir}: this tracker was closed; go on with PostHocEMA.from_path")

    @contextmanager
    def _as_writer(self, run_id: str) -> Iterator[Recorder]:
        """The directory's writer; where the block fails, this tracker stays one only if it was one before."""
        was_writer = self._recorder is not None
        recorder = self._open_recorder(run_id)
        try:
            yield recorder
        except BaseException:
            if not was_writer:
                self._recorder = None
                recorder.close()
            raise

    def _open_recorder(self, run_id: str) -> Recorder:
        if self._recorder is None:
            try:
                recorder = Recorder(self.checkpoint_dir)
            except WriteError as error:  # not as one: nothing of this call has been done
                raise DirectoryError(str(error)) from error
            except LockedError as error:
                if not is_in_group():
                    raise
                raise LockedError(
                    f"{error}. In a group of processes, make the tracker with the DistributedDataParallel model, "
                    "or call it in one process only"
                ) from error
            try:
                recorder.check_run(run_id)
            except BaseException:
                recorder.close()
                raise
            self._recorder = recorder
            _writing.add(self)
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
        tensors = self._due_tensors(model)
        if tensors is not None:
            background = self._working(tensors.averaged)
            background.update(self._averages, tensors, self._t, self._step, due)
        elif due is not None and self._averages.exist and self._background is not None:
            self._background.write(self._averages, due)

    def _due_tensors(self, model: torch.nn.Module) -> ModelTensors | None:
        """What is to be taken in at this call; None for nothing."""
        if not self.settings.update_is_due(self._step):
            return None
        try:
            return self._watched.tensors(model, self._collect)
        except NonFiniteError as error:  # a new segment cannot begin with it
            skip_update(self.settings, str(error), stacklevel=5)
            return None

    def _working(self, parameters: Mapping[str, torch.Tensor]) -> Background:
        if self._background is None:
            on_host = all(parameter.device.type == "cpu" for parameter in parameters.values())
            self._background = Background(self.settings, (self._device or ("model" if on_host else "cpu")) == "cpu")
        return self._background

    def _failure(self) -> Exception | None:
        pending, self._pending = self._pending, None
        if pending is not None or self._background is None:
            return pending
        return self._background.take_error()

    def _write_snapshots(self, sources: Sequence[LiveSource], weights: Mapping[str, torch.Tensor] | None) -> None:
        recorder = self._open_recorder(self.run_id)
        recorder.write(sources, weights)
        recorder.thin(self.settings.schedule.max_checkpoints, self.settings.schedule.sigma_range)

    def _live_sources(self, clock: ClockRecorder | None = None) -> list[LiveSource]:
        return live_sources(self.run_id, self.settings, self._tracked, self._averages, clock or self._clock)
