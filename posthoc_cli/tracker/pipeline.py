"""The pipeline from the model to the averages and to disk: one thread for the averages, one for the
snapshots.

From `update_` to a file a value is in the model's tensor (`ModelTensors`); if averages are on the
host, in a copy there (`HostCopy`); in the mean of the last values (`AverageTensors.mean`); from
the next fold on in each profile's average (`AverageTensors.high`); in the storage dtype on the host
(`StagedAverage`); and in the file (`TensorFileWriter`). Each step works tile by tile, see `memory`,
and selects the elements for measurements, for the sample of the weights and for the sketch of their
path in the same pass. No exception of a signal handler can stop a job of these threads halfway.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from posthoc_cli.devices import in_stream, streams_of
from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    Log,
    RefusedCallError,
    WriteError,
    kept_messages,
    log_kept_messages,
)
from posthoc_cli.files import remove_unfinished
from posthoc_cli.group import Group
from posthoc_cli.resources import worker_count
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.tracker.arguments import Settings
from posthoc_cli.tracker.background import (
    SINGLE_THREAD,
    ThreadPool,
    Worker,
    end_threads,
)
from posthoc_cli.tracker.filling import check_fits
from posthoc_cli.tracker.measuring import Sketcher, Values
from posthoc_cli.tracker.memory import HostCopy, Layout, TileReader, is_on_host, on_host
from posthoc_cli.tracker.model import ModelTensors, nonfinite_error
from posthoc_cli.tracker.progress import TrainingProgress
from posthoc_cli.tracker.snapshotter import (
    Snapshotter,
    Storage,
    headers,
    stage,
)
from posthoc_cli.tracker.state import Tracking
from posthoc_cli.tracker.tracked_averages import Averages

log = Log(__name__)


class Pipeline:
    """Takes in a model's values, lets any thread read the averages, and has snapshots written in
    the background."""

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        tracking: Tracking,
        device: str | None = None,
    ) -> None:
        if device not in ("cpu", "model", None):
            reason = "must be 'cpu', or 'model' for the model's own device"
            raise InvalidValueError("device", reason, value=f"{str(device)!r}")
        # the state; only their thread changes its averages, which are of the last update
        self.tracking = tracking
        self._counting = threading.Lock()
        self._noted: Exception | None = None
        self.snapshotter: Snapshotter | None = None  # until the tracker is the directory's writer
        self.has_begun = False  # whether this process is a writer, or knows the writers
        self.closed = False  # if so, calls that change the state are refused
        self._has_ended = False
        self.directory = directory
        self._settings = settings
        self._device = device
        # whether updates return before they are done; known at the first update
        self._is_async: bool | None = None
        self._process = os.getpid()
        self._pool = ThreadPool(min(torch.get_num_threads(), worker_count()))
        self._host_copy = HostCopy(self._pool.size)
        self._streams = DeviceStreams()
        self._averaging = Worker("averages")
        self._writing = Worker("snapshots")
        # of the model that was taken in last; gone when its tensors are
        self._values: WeakKeyDictionary[ModelTensors, TileReader] = WeakKeyDictionary()
        self._storage: Storage | None = None
        # of the last snapshots: the step, and the model's sampled values
        self._last_sample: tuple[int, Values] | None = None

    def figures(self) -> dict[str, float]:
        storage = self._storage
        memory = [] if storage is None else storage.memory
        parts: tuple[Any, ...] = (
            self.tracking.averages,
            self._host_copy,
            *memory,
            *self._values.values(),
        )
        figures = {"bytes": float(sum(part.nbytes for part in parts))}
        writer = self.snapshotter
        if writer is not None and writer.times_written:
            figures["snapshot_bytes"] = float(writer.nbytes)
            figures["snapshot_seconds"] = self._writing.job_seconds[0]
            figures["snapshot_waited"] = self._writing.wait_seconds
        return figures

    @property
    def progress(self) -> TrainingProgress:
        """The last call that was counted."""
        return self.tracking.progress

    @property
    def sample(self) -> Values | None:
        """The model's values of a snapshot's sample at the last update; None if unknown."""

        def work() -> Values | None:
            averages = self.tracking.averages
            if averages.sample is None:
                return None
            storage = self._find_storage(averages.tensors.layout)
            with self._streams.in_own_streams():
                return storage.in_order(averages.sample)

        return self._averaging.call(work)

    # --- which calls are admitted ---

    @property
    def is_forked(self) -> bool:
        return self._process != os.getpid()

    def check_process(self) -> None:
        if self.is_forked:
            reason = "this process was forked from the one that has the tracker, and its threads"
            hint = "call it there, or read the snapshots with PostHocEMA.from_path"
            raise RefusedCallError(self.directory, reason, hint)

    def check_open(self) -> None:
        """Raise a RefusedCallError in a forked process, and if the tracker is closed."""
        self.check_process()
        if self.closed:
            raise RefusedCallError(
                self.directory, "this tracker was closed", "continue with PostHocEMA.from_path"
            )

    # --- called by the training ---

    def wait_for_turn(self, writes_too: bool) -> None:
        """Wait until an update can be queued, and with `writes_too` also snapshots."""
        if self._is_async:
            self._averaging.wait_for_turn()
        if writes_too:
            self._writing.wait_for_turn()

    def count(self, progress: TrainingProgress) -> None:
        """Count a call, unless it was counted. An update is counted by its job, too: the call may
        be interrupted after it has queued the job."""
        with self._counting:
            now = self.tracking
            if progress.is_after(now.progress):
                self.tracking = replace(now, progress=progress)

    def update(self, tensors: ModelTensors, progress: TrainingProgress) -> None:
        """Take in a model's values, after `wait_for_turn`; raise the error about values that are
        not finite, if it is known.

        `tensors` must be the same object while the model is unchanged.
        """
        if self._is_async is None:
            all_on_cpu = all(tensor.device.type == "cpu" for tensor in tensors.averaged.values())
            self._is_async = (self._device or ("model" if all_on_cpu else "cpu")) == "cpu"
            if self._is_async and not all_on_cpu:
                self._averaging.call(self._use_cores)
        copies = {name: torch.empty_like(tensor) for name, tensor in tensors.copied.items()}
        if copies:  # by one kernel: batch norms have many counters
            torch._foreach_copy_([*copies.values()], [*tensors.copied.values()])
        values = self._find_reader(tensors)
        if self._is_async:
            self._update_by_copy(values, copies, progress)
        else:
            self._update_in_place(values, copies, progress)
        self.count(progress)
        self._averaging.warn_of_waiting("updates of the averages (update_every)")
        self._writing.warn_of_waiting("snapshots (checkpoint_every)")

    def _update_by_copy(
        self,
        values: TileReader,
        copies: Mapping[str, Tensor],
        progress: TrainingProgress,
    ) -> None:
        """Copy the values to the host, and update the averages while the training goes on."""
        streams = self._streams.current(copy.device for copy in copies.values())
        events = self._streams.record_events(streams)
        # On an accelerator the training's own stream copies. On the CPU torch's threads would wait
        # for each other.
        pool = self._pool_for(values.layout)
        host_copy = self._host_copy
        if pool is SINGLE_THREAD:
            host_copy.copy(values)
        else:
            self._averaging.call(lambda: host_copy.copy(values, pool))

        def take_in() -> str | None:
            self._streams.last_events = events
            return self._take_in(host_copy.wait(), copies, progress)

        self._averaging.submit(lambda: self._update(take_in, progress))

    def _update_in_place(
        self,
        values: TileReader,
        copies: Mapping[str, Tensor],
        progress: TrainingProgress,
    ) -> None:
        """Update the averages while the training waits."""
        devices = [bucket.device for bucket in values.layout]
        devices += [copy.device for copy in copies.values()]
        streams = self._streams.current(devices)

        def take_in() -> str | None:
            with self._streams.in_streams_of_caller(streams):
                return self._take_in(values, copies, progress)

        self._averaging.call(lambda: self._update(take_in, progress))

    def _update(
        self,
        take_in: Callable[[], str | None],
        progress: TrainingProgress,
    ) -> None:
        """Take in values, and queue due snapshots even if the values are refused; do nothing once
        the end of the process has closed the tracker."""
        if self.closed:
            return
        name = take_in()
        if self._settings.snapshot_is_due(progress.step):
            self._submit_snapshots()
        if name is not None:
            raise nonfinite_error(name, self.tracking.tracked.tensors, progress.step)

    def _use_cores(self) -> None:
        """Let averages on the host use this process's share of the cores, which an accelerator's
        training leaves idle: torchrun sets OMP_NUM_THREADS to 1."""
        threads = worker_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if threads > self._pool.size:
            self._pool.close()
            self._pool = ThreadPool(threads)
            self._host_copy = HostCopy(threads)

    def set(self, tracking: Tracking) -> None:
        """Replace the state and the progress."""

        def work() -> None:
            self.check_open()
            self.tracking = tracking

        self._averaging.call(work)

    # --- called by any thread ---

    def read(
        self,
        profile: int,
        dtypes: Mapping[str, torch.dtype],
    ) -> dict[str, Tensor]:
        """Read a profile's average of the last update in these dtypes, and the copies, on the host;
        raise a NonFiniteError for values that a dtype cannot hold."""

        def work() -> dict[str, Tensor]:
            averages = self.tracking.averages
            weights = {}
            with self._streams.in_own_streams():
                for name, dtype in dtypes.items():
                    exact = averages.read(profile, name)
                    check_fits(name, exact, dtype)
                    weights[name] = exact.to(dtype)
                for name, copy in averages.copies.items():
                    weights[name] = copy.to("cpu", copy=True)
            return weights

        return self._averaging.call(work)

    def predict_error(self, profile: int) -> float:
        """Predict the relative L2 error of what `read` returns, before its conversion."""

        def work() -> float:
            with self._streams.in_own_streams():
                return self.tracking.averages.predicted_error(profile)

        return self._averaging.call(work)

    def read_exactly(self) -> Tracking:
        """Copy the state, with the averages exact, to the host."""

        def work() -> Tracking:
            now = self.tracking
            averages = now.averages
            tensors = averages.tensors
            with self._streams.in_own_streams():
                kept = tensors.copy_to(on_host(tensors.layout))
                copies = _on_cpu(averages.copies)
                path = averages.path(exact=True)
            exact = Averages(averages.sigma_rels, averages.standing, kept, copies, known_path=path)
            return replace(now, averages=exact)

        return self._averaging.call(work)

    def write_missing(self) -> None:
        """Queue snapshots of the averages, unless they are stored when all earlier snapshots are
        durable."""

        def work() -> None:
            self._writing.wait()
            t = self.tracking.averages.standing.t
            if self.snapshotter is not None and not self.snapshotter.has(t):
                self._submit_snapshots()

        self._averaging.submit(work)

    def keep_present(self) -> None:
        """Queue a note that the snapshots of the last update are to be kept."""

        def work() -> None:
            snapshotter = self.snapshotter
            t = self.tracking.averages.standing.t
            if snapshotter is not None:
                self._writing.submit(lambda: snapshotter.keep(t))

        self._averaging.submit(work)

    def end(self) -> None:
        """Refuse later calls that change the state, and queue the last snapshots of the training,
        once."""
        if not self._has_ended:
            self._averaging.submit(lambda: setattr(self, "closed", True))
            self.write_missing()
            self._averaging.submit(self._submit_end)
            self._has_ended = True  # last: an interrupted call is made again

    def _submit_end(self) -> None:
        """Queue the last thinning, which waits for the parts of other processes."""
        if self.snapshotter is not None and self.tracking.tracked.members.is_chunked:
            self._writing.submit(self.snapshotter.end)

    def wait(self) -> None:
        """Wait until all work is done and durable."""
        self._averaging.wait()
        self._writing.wait()

    def flush(self) -> None:
        """Wait as `wait` does, and raise an error of background work since the last call, once."""
        self.wait()
        self.note_error()
        self.raise_noted()

    def note_error(self) -> None:
        """Note an error of background work since the last call; it stays noted if this call fails
        itself."""
        self._noted = self._noted or self.take_error()

    def raise_noted(self) -> None:
        if kept_messages:
            log_kept_messages()
        failure = self._noted
        self._noted = None
        if failure is not None:
            raise failure

    def take_error(self) -> Exception | None:
        return self._averaging.take_error() or self._writing.take_error()

    def begin(
        self,
        group: Group,
        run_id: str,
        read: Callable[[], Tracking | None],
    ) -> None:
        """Become the directory's writer with the other processes of a group, the first one first,
        and continue from the state of `read`."""
        loaded = group.first_then_others(lambda: self._become_writer(run_id, read))
        if loaded is not None:
            self.set(loaded)
        self.has_begun = True

    def _become_writer(
        self,
        run_id: str,
        read: Callable[[], Tracking | None],
    ) -> Tracking | None:
        """Become the directory's writer, unless this is it or only counts, and return the state of
        `read`; a failure leaves all as it was."""
        if not self.tracking.tracked.members.keeps:
            return read()
        before = self.snapshotter
        try:
            snapshotter = before or self._new_writer()
            snapshotter.check_run(run_id)
            loaded = read()
            if loaded is not None:
                snapshotter.continue_from(loaded)
        except BaseException:
            if before is None:
                self.release()
                self.snapshotter = None
            raise
        return loaded

    def _new_writer(self) -> Snapshotter:
        # a forgotten tracker may still be writing its last snapshot
        wait_for_writers(self.directory)
        _writers.add(self)
        # A child that multiprocessing has forked ends without the functions of atexit.
        if multiprocessing.parent_process() is not None:
            multiprocessing.util.Finalize(None, finish, exitpriority=0)
        members = self.tracking.tracked.members
        try:
            self.snapshotter = Snapshotter(self.directory, self._settings, members)
        # a WriteError of `update_` would mean that the call has done its work
        except WriteError as error:
            raise DirectoryError(error.subject, error.reason, error.hint) from error
        return self.snapshotter

    def close(self) -> None:
        """Finish all work, and release the model's tensors and the directory."""
        self._values.clear()
        self._averaging.close()
        self._pool.close()
        self._writing.close()
        self.release()

    def abandon(self) -> None:
        """Queue the last snapshots and the release of the directory; for a tracker that nothing
        refers to any more."""
        if self in _writers:
            self.end()
            self._averaging.submit(lambda: self._writing.submit(self.release))

    def release(self) -> None:
        """Release the directory for another writer."""
        _writers.discard(self)
        if self.snapshotter is not None:
            self.snapshotter.close()

    @property
    def known_snapshots(self) -> Sequence[Snapshot] | None:
        """All snapshots of the directory, as its writer holds them in memory; None if this is not
        the writer."""
        if self.snapshotter is None or self not in _writers or self.is_forked:
            return None
        return None if self.tracking.resumes else self.snapshotter.known

    def _pool_for(self, layout: Layout) -> ThreadPool:
        """Choose the pool for work on a layout: one thread for accelerators, so that one stream
        keeps the order."""
        return self._pool if is_on_host(layout) else SINGLE_THREAD

    def _find_storage(self, layout: Layout) -> Storage:
        storage = self._storage
        tracked = self.tracking.tracked
        if storage is None or storage.layout != layout or storage.tracked is not tracked:
            self._storage = None  # its memory must go first
            storage = Storage(layout, tracked, self._settings.schedule.checkpoint_dtype)
            self._storage = storage
        return storage

    # scratch made in inference mode could not be written to outside it
    @torch.inference_mode(False)
    def _find_reader(self, tensors: ModelTensors) -> TileReader:
        if tensors not in self._values:
            self._values.clear()  # the old reader must go even if making the next one fails
            on_cpu = all(tensor.device.type == "cpu" for tensor in tensors.averaged.values())
            threads = 0 if self._is_async else self._pool.size if on_cpu else 1
            self._values[tensors] = TileReader.from_tensors(tensors.averaged, threads)
        return self._values[tensors]

    @torch.no_grad()
    def _take_in(
        self,
        values: TileReader,
        copies: Mapping[str, Tensor],
        progress: TrainingProgress,
    ) -> str | None:
        """Update averages and counters; if a value is not finite, only count, and return the first
        tensor with such a value."""
        averages = self.tracking.averages
        storage = self._find_storage(values.layout)
        if self._settings.snapshot_is_due(progress.step):
            # before anything is changed: memory may run out
            storage.allocate(len(averages.sigma_rels))
        pool = self._pool_for(values.layout)
        sample = storage.sample
        sketcher = self._sketcher(averages, storage)
        name = averages.update_(values, copies, progress.last, pool, sample, sketcher)
        self.count(progress)
        return name

    def _sketcher(self, averages: Averages, storage: Storage) -> Sketcher | None:
        """Find what sketches the path: known from the first update on, or continued; None for the
        path of a model that was divided in another way."""
        sketcher = averages.sketcher
        path = averages.known_path
        if sketcher is not None:
            if sketcher.subset is storage.subset:
                return sketcher
            path = averages.path(exact=True)
        if path is None and averages.exist:
            return None
        sketcher = Sketcher(storage.subset, self.tracking.tracked.members.rank)
        if path is not None and not sketcher.resume(path):
            return None
        return sketcher

    def _warn_of_standstill(self, step: int, sample: Values | None) -> None:
        """Warn if the sampled weights have not changed since the last snapshots."""
        before = self._last_sample
        if sample is None or not len(sample):  # some processes of a sharded model have none
            return
        self._last_sample = step, sample
        if before is not None and before[0] < step and np.array_equal(before[1], sample):
            log.warning(
                "%s: the weights have not changed from step %d to %d: does the optimizer step, and "
                "is this the model that it trains?",
                self.directory,
                before[0],
                step,
            )

    def _submit_snapshots(self) -> None:
        """Stage the averages, and queue their snapshots, when earlier ones, which use the same
        memory, are written."""
        now = self.tracking
        averages = now.averages
        tensors = averages.tensors
        snapshotter = self.snapshotter
        if snapshotter is None or not averages.exist:
            return
        storage = self._find_storage(tensors.layout)
        storage.allocate(len(averages.sigma_rels))
        pool = self._pool_for(tensors.layout)
        with self._streams.in_own_streams():
            staged = stage(storage, averages, pool)
            measured = [average.measurements for average in staged]
            copies = _on_cpu(averages.copies)
            sample = None
            if averages.sample is not None:
                sample = storage.in_order(averages.sample)
            infos = headers(self._settings, now, averages.path(pool), sample, measured)
            self._warn_of_standstill(averages.standing.step, sample)
        self._writing.submit(lambda: snapshotter.record(infos, staged, copies))


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu") for name, tensor in tensors.items()}


# --- streams of accelerators


Streams = dict[torch.device, Any]
# one event for each device, which ends when the work queued before it has ended
DeviceEvents = tuple[tuple[torch.device, Any], ...]


class DeviceStreams:
    """Orders a tracker's threads on accelerators, each in its own streams; `last_events` mark the
    end of the last update."""

    def __init__(self) -> None:
        self.last_events: DeviceEvents = ()
        self._own: Streams = {}

    @staticmethod
    def current(devices: Iterable[torch.device]) -> Streams:
        streams = {}
        for device in {*devices}:
            if module := streams_of(device):
                streams[device] = module.current_stream(device)
        return streams

    @staticmethod
    def record_events(streams: Streams) -> DeviceEvents:
        return tuple((device, stream.record_event()) for device, stream in streams.items())

    @contextmanager
    def in_streams_of_caller(self, streams: Streams) -> Iterator[None]:
        """Work in the streams of another thread, which waits for the block, after the last update,
        which may have been in others; set `last_events` at its end."""
        with ExitStack() as stack:
            for device, event in self.last_events:
                if device in streams:
                    streams[device].wait_event(event)
            for stream in streams.values():
                stack.enter_context(in_stream(stream))
            try:
                yield
            finally:  # an update that has failed may have queued work
                self.last_events = self.record_events(streams)

    @contextmanager
    def in_own_streams(self) -> Iterator[None]:
        """Work in separate streams, after the last update, and wait for that work at the end of the
        block."""
        with ExitStack() as stack:
            for device, event in self.last_events:
                if device not in self._own:
                    self._own[device] = streams_of(device).Stream(device)
                self._own[device].wait_event(event)
                stack.enter_context(in_stream(self._own[device]))
                # also after an error: the next update may change what is still being read
                stack.callback(self._own[device].synchronize)
            yield


# --- the end


_writers: set[Pipeline] = set()  # each of its directory
os.register_at_fork(after_in_child=_writers.clear)  # a forked child writes and releases nothing


def wait_for_writers(directory: Path) -> None:
    """Wait until the trackers of this process have written all due snapshots in a directory; they
    keep their errors.

    Those that nothing refers to any more, as of a notebook's cell that has run again, have then
    released it.
    """
    for pipeline in list(_writers):
        if str(pipeline.directory) == os.path.realpath(directory):  # resolves a loop of links, too
            pipeline.wait()
    log_kept_messages()


@atexit.register
def finish() -> None:
    """Finish the work of every tracker, release its directory, and end all threads; called when the
    process ends.

    A first Ctrl-C is answered by what is still being written, and a second one ends the process.
    """
    try:
        _finish_all()
    except KeyboardInterrupt:
        try:
            log.warning(
                "writing the last snapshots of %s; interrupt again to lose them", _list_unwritten()
            )
            _finish_all()
        except KeyboardInterrupt:
            log.error("interrupted: the last snapshots of %s are lost", _list_unwritten())
            remove_unfinished()
            logging.shutdown()
            os._exit(128 + signal.SIGINT)  # an exception here would leave the exit code at 0


def _finish_all() -> None:
    for pipeline in list(_writers):
        pipeline.end()
    for pipeline in list(_writers):
        pipeline.wait()
        pipeline.release()
    end_threads()
    log_kept_messages()


def _list_unwritten() -> str:
    return ", ".join(str(pipeline.directory) for pipeline in list(_writers))
