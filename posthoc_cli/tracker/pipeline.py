"""The pipeline from the model to the averages and to disk: one thread for the averages, one for the snapshots.

A value has at most six forms from `update_` to a file:

1. the model's tensor (`ModelTensors`);
2. with averages on the host its copy there (`ModelCopy`), from an accelerator through a buffer of that (`_Ring`);
3. the mean of the last values (`AverageTensors.mean`);
4. each profile's average, high and low part (`AverageTensors.high`, `low`), from the next fold on;
5. the average as it is stored (`StagedAverages`), in the storage dtype, on the host;
6. the bytes of the file (`TensorFileWriter`).

From one to the next it goes tile by tile, see `layout`, through memory that stays in the cache; there elements are
taken out for what is measured, the sample of the weights and the sketch of their path.

Only jobs of the first thread change and read averages, one after the other. So each reader sees the averages of one
update, whichever thread it calls from, and no exception of a signal handler can stop an update halfway. The counters
change with the averages, see `Tracking`.

Snapshots are written beside the training, and large updates by a crew of threads, see `worker.Crew`.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from weakref import WeakSet

import torch

from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    LockedError,
    NonFiniteError,
    NotReadyError,
    WriteError,
)
from posthoc_cli.resources import worker_count
from posthoc_cli.snapshots.reading import ElementRange
from posthoc_cli.tracker.layout import HostTensors, Layout, TileReader, lay_out, on_host
from posthoc_cli.tracker.measuring import Sketcher
from posthoc_cli.tracker.model_tensors import ModelTensors, TrackedModel, nonfinite_error
from posthoc_cli.tracker.running import AverageTensors, RunningAverages
from posthoc_cli.tracker.sharding import Members
from posthoc_cli.tracker.snapshotter import LiveSource, PartSnapshotter, Snapshotter, live_sources
from posthoc_cli.tracker.staging import DeviceStreams, Marks, ModelCopier, ModelCopy, StorageLayout, Streams, stage
from posthoc_cli.tracker.state import Progress, Settings, Tracking
from posthoc_cli.tracker.worker import ALONE, Crew, Pace, Worker, divisor, end_threads

log = logging.getLogger(__name__)


class LiveAverages:
    """The averages of one update, for a reader: where they are until the next one, which copies them before."""

    def __init__(self, pipeline: Pipeline, averages: RunningAverages, layout: Layout) -> None:
        self._pipeline, self._averages, self._layout = pipeline, averages, layout
        self._whole = [ElementRange(n, 0, end - begin) for b in layout for n, (begin, end) in b.places.items()]
        self._copied: list[dict[str, torch.Tensor]] = []

    def keep(self) -> None:
        """Copy them; called in the thread that changes them."""
        names = [one.name for one in self._whole]
        self._copied = self._copied or [
            dict(zip(names, self._values(index, self._whole), strict=True))
            for index in range(len(self._averages.sigma_rels))
        ]

    def read(self, index: int, ranges: Sequence[ElementRange]) -> list[torch.Tensor]:
        """Ranges of the average of that index, on the host."""
        return self._pipeline._updates.call(lambda: self._values(index, ranges))

    def _values(self, index: int, ranges: Sequence[ElementRange]) -> list[torch.Tensor]:
        if self._copied:
            return [self._copied[index][name][begin:end] for name, begin, end in ranges]
        with self._pipeline._streams.beside_training():
            return self._averages.read(index, ranges, self._pipeline._crew_for(self._layout))


class Pipeline:
    """Takes in a model's values, gives the averages to any thread, and has snapshots written beside the training.

    Attributes:
        now: what the tracker has after the last update; only a job changes it.
        snapshotter: writes the snapshots; None until the tracker is the directory's writer.
    """

    def __init__(self, settings: Settings, tracking: Tracking, device: str | None = None) -> None:
        if device not in (None, "cpu", "model"):
            reason = "must be 'cpu' (the host) or 'model' (beside the parameters)"
            raise InvalidValueError("device", reason, value=f"{device!r}")
        self.now = tracking
        self.snapshotter: Snapshotter | None = None
        self._settings, self._device = settings, device
        self._beside: bool | None = None  # whether averages are updated by their own thread; known at the first update
        self._counted = tracking.progress
        self._refusal: NotReadyError | None = None
        self._ended, self._process = False, os.getpid()
        self._crew = Crew(min(torch.get_num_threads(), worker_count()))  # as torch takes here, up to a synthesis's
        self._copier, self._streams = ModelCopier(self._crew.size), DeviceStreams()
        self._updates, self._writes = Worker("averages"), Worker("snapshots")
        self._source: tuple[ModelTensors, TileReader] | None = None
        self._storage: StorageLayout | None = None
        self._room: tuple[list[HostTensors], AverageTensors | None] | None = None
        self._readings: WeakSet[LiveAverages] = WeakSet()
        every, snapshots = settings.schedule.update_every, settings.schedule.checkpoint_every
        updates, writes = "an update of the averages", "writing snapshots"
        self._update_pace = Pace(updates, "update_every", lambda factor: divisor(snapshots, every * factor))
        self._write_pace = Pace(writes, "checkpoint_every", lambda factor: int(-(-snapshots * factor // every) * every))
        _at_work.add(self)

    @property
    def written(self) -> int:
        """How often snapshots were written."""
        return 0 if self.snapshotter is None else self.snapshotter.written[0]

    def figures(self) -> dict[str, float]:
        """The memory held, and what was measured when snapshots were last written; see `PostHocEMA.metrics`."""
        copies, exact = self._room or ([], None)
        all_held = [self.now.averages, self._copier, *copies, exact, None if self._source is None else self._source[1]]
        held = {"bytes": float(sum(one.nbytes for one in all_held if one is not None))}
        if self.snapshotter is None or not self.snapshotter.written[0]:
            return held
        pace = self._write_pace
        found = {f"distance_{sigma_rel:g}": value for sigma_rel, value in self.snapshotter.distances().items()}
        figures = {"bytes": self.snapshotter.written[1], "seconds": pace.took, "waited": pace.held_up}
        return held | found | {f"snapshot_{name}": float(value) for name, value in figures.items()}

    @property
    def progress(self) -> Progress:
        """How far the training is; one update behind where a call was interrupted after it was handed over."""
        counted, done = self._counted, self.now.progress
        return counted if counted.step > done.step else done

    # --- called by the training ---

    def wait_for_turn(self, writes_too: bool) -> None:
        """Return when an update can be taken, and with `writes_too` snapshots to write."""
        if self._beside:
            self._update_pace.wait(self._updates.wait)
        if writes_too:
            self._write_pace.wait(self._writes.wait)

    def count(self, progress: Progress) -> None:
        """Count a call without update; due snapshots hold the averages as they are."""
        if self.now.resumes:  # of a process that only counts: the averages differ from those on disk from here on
            self.set(replace(self.now, progress=progress, resumes=False))
        elif self._settings.snapshot_is_due(progress.step) and self.now.averages.exist:
            self.leave_out(progress)
        else:
            self._counted = progress

    def update(self, tensors: ModelTensors, progress: Progress) -> NonFiniteError | None:
        """Take in a model's values, and have snapshots written if they are due; `wait_for_turn` came before.

        `tensors` are the same object as long as the model is unchanged. Returns why the update was left out; beside the
        training that is kept for `take_error`.
        """
        self._check_open()  # a signal handler may have closed the tracker since the call began
        if self._beside is None:
            all_on_cpu = all(tensor.device.type == "cpu" for tensor in tensors.averaged.values())
            self._beside = (self._device or ("model" if all_on_cpu else "cpu")) == "cpu"
        copies = {name: tensor.clone() for name, tensor in tensors.copied.items()}
        refused = None
        values = self._source_of(tensors)
        if self._beside:
            crew, marks = self._crew_for(values.layout), self._streams.marks(copies.values())
            # On an accelerator the training's own stream copies; on the CPU its threads would wait for each other.
            alone = crew is ALONE
            copy = self._copier.copy(values) if alone else self._updates.call(lambda: self._copier.copy(values, crew))
            self._updates.submit(lambda: self._update_beside(copy, copies, progress, marks))
        else:
            devices = [bucket.device for bucket in values.layout] + [copy.device for copy in copies.values()]
            streams = self._streams.current(devices)
            refused = self._updates.call(lambda: self._update_here(values, copies, progress, streams))
        self._counted = progress
        return refused

    def warn_of_waiting(self) -> None:
        """Warn if training has waited for long."""
        self._update_pace.warn()
        self._write_pace.warn()

    def leave_out(self, progress: Progress, writes: bool = True) -> None:
        """Count a call whose update is left out; snapshots that are due are written if `writes`."""
        is_due = writes and self._settings.snapshot_is_due(progress.step)

        def work() -> None:
            self._check_open()
            self.now = replace(self.now, progress=progress)
            if is_due:
                self._have_written(self.now, None)

        self._updates.call(work)
        self._counted = progress

    def set(self, tracking: Tracking) -> None:
        """Go on from elsewhere."""

        def work() -> None:
            self._check_open()
            self._counted = tracking.progress
            self.now = tracking

        self._updates.call(work)

    # --- called by any thread ---

    def live(self) -> list[LiveSource]:
        """The averages as sources, one a profile, of the last update as long as anyone refers to them; or none."""

        def work() -> list[LiveSource]:
            known = self._known()
            kept = known.averages.tensors
            if kept is None or not known.averages.exist:
                return []
            live = LiveAverages(self, known.averages, kept.layout)
            self._readings.add(live)
            return live_sources(self._settings, self._outline(known), kept.layout, live.read)

        return self._updates.call(work) if self.now.averages.exist or not self._updates.is_idle() else []

    def read_exactly(self) -> Tracking:
        """What the tracker has, with a copy of the averages on the host, exact."""

        def work() -> Tracking:
            known = self._known()
            kept = known.averages.tensors if known.averages.exist else None
            return self._exact_copy(known, kept and AverageTensors(on_host(kept.layout), len(kept.high)))

        return self._updates.call(work)

    def write_missing(self, at_end: bool = False) -> None:
        """Have the averages written, when everything due before is durable, unless they are stored. Nobody waits."""

        def work() -> None:
            self._writes.wait()
            known, snapshotter = self._known(), self.snapshotter
            if snapshotter is not None and snapshotter.is_behind(known, at_end):
                self._have_written(known, None, is_due=False)

        self._updates.submit(work)

    def writes_to(self, directory: Path) -> bool:
        """Whether the tracker is, or was, the writer of a directory."""
        with suppress(OSError):
            return self.snapshotter is not None and self.snapshotter.directory.samefile(directory)
        return False

    def end(self) -> None:
        """Have the last snapshots written, once. Nobody waits."""
        if self.snapshotter is not None and not self._ended:
            self._ended = True
            self.write_missing(at_end=True)

    def flush(self) -> None:
        """Return when everything is done and durable, of a run in a store in its spool."""
        self._updates.wait()
        self._writes.wait()

    def upload(self) -> None:
        """Return when everything written is in the run's store, if it has one; a WriteError if that fails."""
        if self.snapshotter is not None:
            self.snapshotter.upload()

    def take_error(self) -> Exception | None:
        """An error of the work beside the training; each is returned once."""
        uploads = None if self.snapshotter is None else self.snapshotter.take_error()
        return self._updates.take_error() or self._writes.take_error() or uploads

    @contextmanager
    def as_writer(self, directory: Path, run_id: str) -> Iterator[Snapshotter]:
        """The directory's writer; if the block fails, this pipeline has one only if it had before."""
        before = snapshotter = self.snapshotter
        members = self.now.tracked.members
        with members.taking_directory():
            try:
                snapshotter = before or _open_snapshotter(directory, self._settings, members)
                snapshotter.check_run(run_id)
                self.snapshotter = snapshotter
                yield snapshotter
            except BaseException:
                if before is None and snapshotter is not None:
                    self.snapshotter = None
                    snapshotter.close()
                raise

    def refuse(self, error: NotReadyError) -> None:
        """Take in nothing that was not handed over yet: later calls raise `error`."""
        self._updates.submit(partial(setattr, self, "_refusal", error))

    def close(self) -> None:
        """Finish everything, and let another writer into the directory."""
        self._updates.close()
        self._crew.close()
        self._writes.close()
        if self.snapshotter is not None:
            self.snapshotter.close()

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _outline(self, known: Tracking, exact: bool = False) -> Tracking:
        """The same with copies on the host, and without averages; the path's sketch is as it would be stored."""
        averages = known.averages
        with self._streams.beside_training():
            crew = ALONE if averages.tensors is None else self._crew_for(averages.tensors.layout)
            path = averages.path(crew, exact=exact)
            copies = {name: copy.to("cpu") for name, copy in averages.copies.items()}
        read = RunningAverages(averages.sigma_rels, averages.standing, None, copies, known_path=path)
        return replace(known, averages=read)

    def _exact_copy(self, known: Tracking, room: AverageTensors | None) -> Tracking:
        """The same with a copy of the averages, if there are any, in this room."""
        made, kept = self._outline(known, exact=True), known.averages.tensors
        if kept is not None and room is not None:
            with self._streams.beside_training():
                kept.copy_to(room, known.averages.standing.early)
            made.averages.tensors = room
        return made

    def _known(self) -> Tracking:
        """The averages with the calls counted so far if no update was among them, else with those until then."""
        counted, now = self._counted, self.now
        later = counted.updated == now.progress.updated and counted.step > now.progress.step
        return replace(now, progress=counted) if later else now

    def _storage_of(self, layout: Layout) -> StorageLayout:
        """How averages of a layout are stored and measured."""
        known, tracked = self._storage, self.now.tracked
        if known is None or known.layout != layout or known.tracked is not tracked:
            self._room = None
            known = self._storage = StorageLayout(layout, tracked, self._settings.schedule.checkpoint_dtype)
        return known

    def _room_for(self, storage: StorageLayout) -> tuple[list[HostTensors], AverageTensors | None]:
        """Memory on the host for what is stored, and for the exact state: it is used again, and takes long to make."""
        if self._room is None:
            layout, profiles = storage.layout, len(self.now.averages.sigma_rels)
            pinned = any(bucket.device.type == "cuda" for bucket in layout)
            exact = AverageTensors(on_host(layout), profiles) if self._settings.keep_state else None
            self._room = [HostTensors(storage.stored, pinned) for _ in range(profiles)], exact
        return self._room

    @torch.inference_mode(False)  # scratch made in inference mode could never be written to outside
    def _source_of(self, tensors: ModelTensors) -> TileReader:
        """The model's tensors, to be read by an update or to be copied."""
        if self._source is None or self._source[0] is not tensors:
            self._source = None  # also where making the next one fails
            layout = lay_out(tensors.averaged)
            threads = 0 if self._beside else self._crew_for(layout).size
            self._source = tensors, TileReader.of_tensors(layout, tensors.averaged, threads)
        return self._source[1]

    def _crew_for(self, layout: Layout) -> Crew:
        """On accelerators one thread: each thread has streams of its own, and a stream keeps order."""
        return self._crew if all(bucket.device.type == "cpu" for bucket in layout) else ALONE

    def _update_here(
        self, values: TileReader, copies: Mapping[str, torch.Tensor], progress: Progress, streams: Streams
    ) -> NonFiniteError | None:
        """Take in values that nobody changes until this is done; returns why the update was left out."""
        with self._streams.entered(streams):
            refused, network = self._take_in(values, copies, progress)
        if self._settings.snapshot_is_due(progress.step):
            self._have_written(self.now, network)
        return refused

    def _update_beside(
        self, copy: ModelCopy, copies: Mapping[str, torch.Tensor], progress: Progress, marks: Marks
    ) -> None:
        """Take in a copy of the values."""
        try:
            refused, network = self._update_pace.do(lambda: self._take_in(copy.arrived(), copies, progress))
        finally:
            self._copier.give_back(copy)
        self._streams.last = marks
        if self._settings.snapshot_is_due(progress.step):
            self._have_written(self.now, network)
        if refused is not None:
            self._settings.skip_update(refused)

    @torch.no_grad()
    def _take_in(
        self, values: TileReader, copies: Mapping[str, torch.Tensor], progress: Progress
    ) -> tuple[NonFiniteError | None, Sequence[torch.Tensor] | None]:
        """Update the averages and the counters; returns why not, or what is measured of the model if that is stored."""
        self._check_open()
        now, averages, storage = self.now, self.now.averages, self._storage_of(values.layout)
        crew = self._crew_for(values.layout)
        if is_due := self._settings.snapshot_is_due(progress.step):
            self._room_for(storage)  # before anything is changed: memory may be short
        for reading in list(self._readings):
            reading.keep()
        sample, network = storage.sample.room(), storage.subset.room() if is_due else None
        wanted = [(storage.sample, sample), *([] if network is None else [(storage.subset, network)])]
        sketcher = self._sketcher(averages, storage, now.tracked)
        name = averages.update_(values, copies, progress.t, progress.step, crew, wanted, sketcher)
        self.now = replace(now, progress=progress)
        if name is not None:
            return nonfinite_error(name, now.tracked.tensors, progress.step), None
        averages.sample = sample
        return None, network

    def _sketcher(self, averages: RunningAverages, storage: StorageLayout, tracked: TrackedModel) -> Sketcher | None:
        """What sketches the path from the first update on, or from where it is known."""
        before, sketcher = averages.known_path, averages.sketcher
        if sketcher is not None and sketcher.subset is not storage.subset:
            before, sketcher = averages.path(exact=True), None
        if sketcher is None and (before is not None or not averages.exist):
            sketcher = Sketcher(storage.subset, tracked.members.rank)
            if before is not None and not sketcher.goes_on(before):  # of a model in other parts
                return None
        return sketcher

    def _have_written(self, known: Tracking, network: Sequence[torch.Tensor] | None, is_due: bool = True) -> None:
        """Have the averages written as they are now; `network` has what is measured of the model then."""
        kept, snapshotter = known.averages.tensors, self.snapshotter
        if kept is None or snapshotter is None or not known.averages.exist:
            return
        self._writes.wait()  # for the memory that they take
        storage = self._storage_of(kept.layout)
        copies, exact_room = self._room_for(storage)
        state = self._outline(known)
        with self._streams.beside_training():
            staged = stage(storage, known.averages, copies, network, self._crew_for(kept.layout))
        exact = None if exact_room is None else self._exact_copy(known, exact_room)

        self._writes.submit(lambda: self._write_pace.do(lambda: snapshotter.record(state, staged, exact, is_due)))


_at_work: WeakSet[Pipeline] = WeakSet()


def _open_snapshotter(directory: Path, settings: Settings, members: Members) -> Snapshotter:
    """The directory's writer, when other trackers of this process that hold it have ended."""
    kind = PartSnapshotter if members.is_chunked else Snapshotter
    wait_for_writers(directory)  # a forgotten tracker may still be writing its last snapshot
    try:
        try:
            return kind(directory, settings, members)
        except LockedError:
            if not _make_way(directory):
                raise
            return kind(directory, settings, members)
    except WriteError as error:  # a WriteError of `update_` would say that the call has done its work
        raise DirectoryError(error.subject, error.reason, error.hint) from error


def _writers(directory: Path) -> list[Pipeline]:
    return [one for one in list(_at_work) if one._process == os.getpid() and one.writes_to(directory)]


def is_followed(directory: Path, tensors: ModelTensors) -> bool:
    """Whether a tracker of this process that was not closed writes averages of these very tensors in a directory."""
    sources = [one._source[0].averaged for one in _writers(directory) if one._source and not one._ended]
    averaged = tensors.averaged
    return any(
        own.keys() == averaged.keys() and all(own[name].is_set_to(averaged[name]) for name in own) for own in sources
    )


def _make_way(directory: Path) -> bool:
    """Close an earlier tracker of this process that writes in a directory, such as that of a notebook's cell."""
    found = _writers(directory)
    for pipeline in found:
        log.warning("%s: an earlier tracker of this process is closed: this one goes on in its place", directory)
        hint = "go on with that one, or give each tracker a directory of its own"
        pipeline.refuse(NotReadyError(directory, "a later tracker has taken the place of this one", hint))
        pipeline.end()
        pipeline.close()
    return bool(found)


def wait_for_writers(directory: Path, last_too: bool = False) -> None:
    """Return when the trackers of this process have written what is due in a directory; they keep their errors.

    With `last_too` also what they would write at the end: another tracker is to go on from there.
    """
    for pipeline in list(_at_work):
        if pipeline.writes_to(directory):
            if last_too and not pipeline._ended:
                pipeline.write_missing(at_end=True)
            pipeline.flush()


@atexit.register
def finish() -> None:
    """Finish the work of every tracker, release its directory, and end the threads, when the process ends."""
    for pipeline in list(_at_work):
        pipeline.end()
        pipeline.flush()
        if pipeline.snapshotter is not None:
            pipeline.snapshotter.close()
    end_threads()
