"""The pipeline from the model to the averages and to disk: one thread for the averages, one for the snapshots.

Only jobs of the first thread change and read averages, one after the other. So each reader sees the averages of one
update, whichever thread it calls from, and no exception of a signal handler can stop an update halfway. The counters
change with the averages, see `Tracking`.
"""

from __future__ import annotations

import atexit
import gc
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
from posthoc_cli.tracker.averages import (
    Accumulators,
    BlockReader,
    DeviceStreams,
    Layout,
    Marks,
    RunningAverages,
    Sample,
    Sampler,
    Staged,
    Stager,
    Streams,
    lay_out,
    on_host,
)
from posthoc_cli.tracker.model_tensors import ModelTensors, TrackedModel, nonfinite_name
from posthoc_cli.tracker.settings import Progress, Settings, is_in_group
from posthoc_cli.tracker.sharding import Members
from posthoc_cli.tracker.sketching import Sketcher
from posthoc_cli.tracker.snapshotter import Snapshotter
from posthoc_cli.tracker.state import Tracking
from posthoc_cli.tracker.worker import ALONE, Crew, Pace, Worker, divisor, end_threads, take_one_thread


@dataclass(frozen=True)
class _Update:
    """What a call brings to the averages: the model's tensors and copies of some, and room for snapshots if due."""

    tensors: ModelTensors
    progress: Progress
    copies: Mapping[str, torch.Tensor]
    room: Accumulators | None


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
        self._ended = False
        self._stager, self._streams = Stager(), DeviceStreams()
        self._updates, self._writes = Worker("averages", take_one_thread), Worker("snapshots")
        self._crew = Crew.like_torch()
        every, snapshots = settings.schedule.update_every, settings.schedule.checkpoint_every
        updates, writes = "an update of the averages", "writing snapshots"
        self._update_pace = Pace(updates, "update_every", lambda factor: divisor(snapshots, every * factor))
        self._write_pace = Pace(writes, "checkpoint_every", lambda factor: int(-(-snapshots * factor // every) * every))
        self._reader: BlockReader | None = None
        self._read: ModelTensors | None = None
        self._rooms: deque[Accumulators] = deque(maxlen=1)
        self._exact_rooms: deque[Accumulators] = deque(maxlen=1)
        self._samplers: deque[tuple[Mapping[str, torch.Tensor], object, Sampler]] = deque(maxlen=2)
        _at_work.add(self)

    @property
    def written(self) -> int:
        """How often snapshots were written."""
        return 0 if self.snapshotter is None else self.snapshotter.written[0]

    def figures(self) -> dict[str, float]:
        """What was measured when snapshots were last written; see `PostHocEMA.metrics`."""
        if self.snapshotter is None or not self.snapshotter.written[0]:
            return {}
        pace = self._write_pace
        found = {f"distance_{sigma_rel:g}": value for sigma_rel, value in self.snapshotter.distances().items()}
        figures = {"bytes": self.snapshotter.written[1], "seconds": pace.took, "waited": pace.held_up}
        return found | {f"snapshot_{name}": float(value) for name, value in figures.items()}

    @property
    def progress(self) -> Progress:
        """How far the training is; one update behind where a call was interrupted after it was handed over."""
        counted, done = self._counted, self.now.progress
        return counted if counted.step > done.step else done

    # --- called by the training ---

    def wait_for_turn(self, writes_too: bool) -> None:
        """Return when an update can be taken, and with `writes_too` snapshots to write."""
        if self._beside:
            with self._update_pace.waiting():
                self._updates.wait()
        if writes_too:
            with self._write_pace.waiting():
                self._writes.wait()

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
        is_due = self._settings.snapshot_is_due(progress.step)
        room = self._room_for(lay_out(tensors.averaged)) if is_due else None
        update = _Update(tensors, progress, copies, room)
        refused = None
        if self._beside:
            staged, marks = self._stager.stage(tensors.averaged), self._streams.marks(copies.values())
            self._updates.submit(lambda: self._update_beside(update, staged, marks))
        else:
            reader = self._reader_of(tensors)
            devices = [group.device for group in reader.layout] + [copy.device for copy in copies.values()]
            streams = self._streams.current(devices)
            refused = self._updates.call(lambda: self._update_here(update, reader, streams))
        self._counted = progress
        return refused

    def warn_of_waiting(self, stacklevel: int) -> None:
        """Warn if training has waited for long."""
        self._update_pace.warn(stacklevel + 1)
        self._write_pace.warn(stacklevel + 1)

    def leave_out(self, progress: Progress, writes: bool = True) -> None:
        """Count a call whose update is left out; snapshots that are due are written if `writes`."""
        kept = self.now.averages.accumulators
        is_due = writes and self._settings.snapshot_is_due(progress.step)
        room = self._room_for(kept.layout) if is_due and kept is not None else None

        def work() -> None:
            self._check_open()
            self.now = replace(self.now, progress=progress)
            if is_due:
                self._have_written(self.now, None, room)

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

    def read(self, exact: bool = False) -> Tracking:
        """What the tracker has, with a copy of the averages on the host, rounded once or `exact`."""
        while True:
            averages = self.now.averages
            kept = averages.accumulators
            with torch.inference_mode(False):  # memory of the caller's own: making it must not hold up updates
                room = None if kept is None else Accumulators(on_host(kept.layout), len(kept.high), exact)
            if averages.exist or not self._updates.is_idle():
                found = self._updates.call(lambda: self._fill(room, self._known()))  # noqa: B023  # done by then
            else:
                found = self._fill(room, self._known())
            if found is not None:
                return found

    def write_missing(self, at_end: bool = False) -> None:
        """Have the averages written, when everything due before is durable, unless they are stored. Nobody waits."""

        def work() -> None:
            self._writes.wait()
            known, snapshotter = self._known(), self.snapshotter
            if snapshotter is not None and snapshotter.is_behind(known, at_end):
                self._have_written(known, None, None, is_due=False)

        self._updates.submit(work)

    def end(self) -> None:
        """Have the last snapshots written, once. Nobody waits."""
        if self.snapshotter is not None and not self._ended:
            self._ended = True
            self.write_missing(at_end=True)

    def flush(self) -> None:
        """Return when everything is done and durable."""
        self._updates.wait()
        self._writes.wait()

    def take_error(self) -> Exception | None:
        """An error of the work beside the training; each is returned once."""
        return self._updates.take_error() or self._writes.take_error()

    @contextmanager
    def as_writer(self, directory: Path, run_id: str) -> Iterator[Snapshotter]:
        """The directory's writer; if the block fails, this pipeline has one only if it had before."""
        before, members = self.snapshotter, self.now.tracked.members
        if members is not None and members.rank > 0:
            members.wait_for_writer()
        snapshotter = before
        try:
            snapshotter = before or _open_snapshotter(directory, self._settings, members)
            snapshotter.check_run(run_id)
            self.snapshotter = snapshotter
            yield snapshotter
            if members is not None and members.rank == 0:
                members.announce("writer", "")
        except BaseException as error:
            if members is not None and members.rank == 0:
                members.announce("writer", str(error))
            elif members is not None:
                members.announce("failed", f"rank {members.rank}: {error}")
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

    def _fill(self, room: Accumulators | None, known: Tracking) -> Tracking | None:
        """The same with averages in `room`; None where the room does not fit them."""
        averages, copies, sample, path = known.averages, {}, known.averages.sample, known.averages.known_path
        kept = averages.accumulators if averages.exist else None
        if kept is None:
            room = None
        elif room is None or not room.fits(kept):
            return None
        else:
            with self._streams.beside_training():
                if room.exact:
                    averages.copy_to(room)
                else:
                    averages.read(room.high, self._crew_for(kept.layout))
                if averages.sketcher is not None:
                    path = averages.path(self._crew_for(kept.layout), exact=room.exact)
                copies = {name: copy.to("cpu") for name, copy in averages.copies.items()}
                sample = tuple((numbers, values.to("cpu")) for numbers, values in averages.sample)
        read = RunningAverages(averages.sigma_rels, averages.standing, room, copies, sample, known_path=path)
        return replace(known, averages=read)

    def _known(self) -> Tracking:
        """The averages with the calls counted so far if no update was among them, else with those until then."""
        counted, now = self._counted, self.now
        later = counted.updated == now.progress.updated and counted.step > now.progress.step
        return replace(now, progress=counted) if later else now

    @torch.inference_mode(False)
    def _room_for(self, layout: Layout, exact: bool = False) -> Accumulators:
        """Room on the host for a snapshot's averages, used again: making it takes longer than an update."""
        wanted, profiles = on_host(layout), len(self.now.averages.sigma_rels)
        with suppress(IndexError):
            room = (self._exact_rooms if exact else self._rooms).pop()
            if room.layout == wanted and len(room.high) == profiles:
                return room
        pinned = not exact and any(group.device.type == "cuda" for group in layout)
        return Accumulators(wanted, profiles, exact, pinned)

    @torch.inference_mode(False)  # scratch made in inference mode could never be written to outside
    def _reader_of(self, tensors: ModelTensors) -> BlockReader:
        if self._reader is None or self._read is not tensors:
            self._reader = self._read = None  # also where making the next one fails
            layout = lay_out(tensors.averaged)
            self._reader = BlockReader.of_tensors(layout, tensors.averaged, self._crew_for(layout).size)
            self._read = tensors
        return self._reader

    def _crew_for(self, layout: Layout) -> Crew:
        """On accelerators one thread: each thread has streams of its own, and a stream keeps order."""
        return self._crew if all(group.device.type == "cpu" for group in layout) else ALONE

    def _update_here(self, update: _Update, reader: BlockReader, streams: Streams) -> NonFiniteError | None:
        """Take in values that nobody changes until this is done; returns why the update was left out."""
        averaged = update.tensors.averaged
        with self._streams.entered(streams):
            refused = self._take_in(update, reader, averaged)
            network = self._stager.stage(averaged) if update.room is not None and refused is None else None
        if update.room is not None:
            self._have_written(self.now, network, update.room)
        return refused

    def _update_beside(self, update: _Update, staged: Staged, marks: Marks) -> None:
        """Take in a copy of the values."""
        handed_over = False
        try:
            with self._update_pace.working():
                refused = self._take_in(update, staged.reader(self._crew.size), staged.values.views)
            self._streams.last = marks
            handed_over = update.room is not None and refused is None
            if update.room is not None:
                self._have_written(self.now, staged if handed_over else None, update.room)
        finally:
            if not handed_over:
                self._stager.give_back(staged)
        if refused is not None:
            self._settings.skip_update(refused, stacklevel=2)

    @torch.no_grad()
    def _take_in(
        self, update: _Update, reader: BlockReader, values: Mapping[str, torch.Tensor]
    ) -> NonFiniteError | None:
        """Update the averages and the counters; returns why the update was left out."""
        self._check_open()
        now, progress = self.now, update.progress
        averages = now.averages
        crew = self._crew_for(reader.layout)
        name = None if reader.surely_finite(crew) else nonfinite_name(values)
        if name is None:
            self._sketch(averages, reader.layout, now.tracked)
            averages.update_(reader, update.copies, progress.t, progress.step, crew)
            averages.sample = self._sample_of(values, now.tracked)
        self.now = replace(now, progress=progress, averages=averages)
        if name is None:
            return None
        reason = f"holds nan or infinity at step {progress.step}; no average has taken it in"
        return NonFiniteError(f"parameter {name!r}", reason)

    def _sketch(self, averages: RunningAverages, layout: Layout, tracked: TrackedModel) -> None:
        """Have the path sketched from the first update on, or from where it is known."""
        before, sketcher = averages.known_path, averages.sketcher
        if sketcher is not None and sketcher.layout != layout:
            before, sketcher = averages.path(), None
        if sketcher is None and (before is not None or not averages.exist):
            averaged = frozenset(name for name, own in tracked.tensors.items() if own.role == "average")
            sketcher = Sketcher(layout, averaged, 0 if tracked.members is None else tracked.members.rank)
            if before is not None and not sketcher.goes_on(before):  # of a model in other parts
                sketcher = None
        averages.sketcher, averages.known_path = sketcher, None

    def _sample_of(self, values: Mapping[str, torch.Tensor], tracked: TrackedModel) -> Sample:
        """A sample of values in this place: the model itself, or one of two buffers that hold copies of it in turn."""
        for known, elements, sampler in self._samplers:
            if known is values and elements is tracked.sampled:
                return sampler.take()
        sampler = Sampler(values, tracked.sampled)
        self._samplers.append((values, tracked.sampled, sampler))
        return sampler.take()

    def _have_written(
        self, known: Tracking, network: Staged | None, room: Accumulators | None, is_due: bool = True
    ) -> None:
        """Have the averages written as they are now."""
        kept, snapshotter = known.averages.accumulators, self.snapshotter
        if kept is None or snapshotter is None or not known.averages.exist:
            return
        # An update that was left out leaves averages of other tensors than its own.
        fitting = room if room is not None and room.fits(kept) else self._room_for(kept.layout)
        reading = self._fill(fitting, known)
        exact = self._fill(self._room_for(kept.layout, exact=True), known) if self._settings.keep_state else None
        assert reading is not None, "the room fits"

        def job() -> None:
            try:
                with self._write_pace.working():
                    snapshotter.record(reading, None if network is None else network.arrived(), exact, is_due)
            finally:
                if network is not None:
                    self._stager.give_back(network)
                self._rooms.append(fitting)
                if exact is not None and exact.averages.accumulators is not None:
                    self._exact_rooms.append(exact.averages.accumulators)

        self._writes.submit(job)


_at_work: WeakSet[Pipeline] = WeakSet()


def _open_snapshotter(directory: Path, settings: Settings, members: Members | None) -> Snapshotter:
    """The directory's writer, when other trackers of this process that hold it have ended."""
    wait_for_writers(directory)  # a forgotten tracker may still be writing its last snapshot
    try:
        try:
            return Snapshotter(directory, settings, members)
        except LockedError:
            # The holder may be garbage, such as the tracker of a notebook cell that was run again: one that is
            # attached to an optimizer with a scheduler stays until the collector runs.
            gc.collect()
            wait_for_writers(directory)
            return Snapshotter(directory, settings, members)
    except WriteError as error:  # a WriteError of `update_` would say that the call has done its work
        raise DirectoryError(error.subject, error.reason, error.hint) from error
    except LockedError as error:
        if members is not None or not is_in_group():
            raise
        hint = "in a group of processes one writes: from_model(..., writer=rank == 0), and the same for from_path"
        raise error.with_hint(hint) from error


def wait_for_writers(directory: Path, last_too: bool = False) -> None:
    """Return when the trackers of this process have written what is due in a directory; they keep their errors.

    With `last_too` also what they would write at the end: another tracker is to go on from there.
    """
    for pipeline in list(_at_work):
        if pipeline.snapshotter is not None and _same_place(pipeline.snapshotter.directory, directory):
            if last_too and not pipeline._ended:
                pipeline.write_missing(at_end=True)
            pipeline.flush()


def _same_place(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return False


@atexit.register
def finish() -> None:
    """Finish the work of every tracker, release its directory, and end the threads, when the process ends."""
    for pipeline in list(_at_work):
        pipeline.end()
        pipeline.flush()
        if pipeline.snapshotter is not None:
            pipeline.snapshotter.close()
    end_threads()
