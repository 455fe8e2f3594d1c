"""The pipeline from the model to the averages and to disk: one thread for the averages, one for the snapshots.

Only jobs of the first thread change and read averages, one after the other. So each reader sees the averages of one
update, whichever thread it calls from, and no exception of a signal handler can stop an update halfway. The counters
change with the averages, see `Tracking`.
"""

from __future__ import annotations

import atexit
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakSet

import torch

from posthoc_cli.errors import NonFiniteError, NotReadyError
from posthoc_cli.tracker.averages import Accumulators, Rounded
from posthoc_cli.tracker.buffers import (
    BlockReader,
    DeviceStreams,
    Layout,
    Marks,
    Staged,
    Stager,
    Streams,
    lay_out,
    on_host,
)
from posthoc_cli.tracker.model_tensors import Change, ModelTensors, nonfinite_name
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.snapshotter import Reading, Room, Snapshotter
from posthoc_cli.tracker.state import Progress, Tracking
from posthoc_cli.tracker.worker import ALONE, Crew, Pace, Worker, divisor, take_one_thread

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What a call brings to the averages.

    Attributes:
        tensors: the model's; the same object as long as the model is unchanged.
        progress: of the training with this call.
        is_due: whether snapshots are due afterwards.
        change: set where the model has changed.
    """

    tensors: ModelTensors
    progress: Progress
    is_due: bool
    change: Change | None


class Pipeline:
    """Takes in a model's values, gives the averages to any thread, and has snapshots written beside the training.

    Arguments:
        settings: of the tracker.
        tracking: at its beginning.
        device: "cpu" or "model", as in `PostHocEMA.from_model`; None for "cpu" where a parameter is on an accelerator.

    Attributes:
        now: what the tracker has after the last update; only a job changes it.
        snapshotter: writes the snapshots; None until the tracker is the directory's writer.
    """

    def __init__(self, settings: Settings, tracking: Tracking, device: str | None = None) -> None:
        self.now = tracking
        self.snapshotter: Snapshotter | None = None
        self._settings = settings
        self._device = device
        self._beside: bool | None = None  # whether averages are updated by their own thread; known at the first update
        self._counted = tracking.progress
        self._refusal: NotReadyError | None = None
        self._ended = False
        self._stager = Stager()
        self._updates, self._writes = Worker("averages", take_one_thread), Worker("snapshots")
        self._crew = Crew.like_torch()
        every, snapshots = settings.schedule.update_every, settings.schedule.checkpoint_every
        self._update_pace = Pace(
            "an update of the averages", "update_every", lambda factor: divisor(snapshots, every * factor)
        )
        self._write_pace = Pace(
            "writing snapshots", "checkpoint_every", lambda factor: int(-(-snapshots * factor // every) * every)
        )
        self._reader: BlockReader | None = None
        self._read: ModelTensors | None = None
        self._rooms: deque[Rounded] = deque(maxlen=1)
        self._exact_rooms: deque[Accumulators] = deque(maxlen=1)
        self._streams = DeviceStreams()
        _at_work.add(self)

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
        """Count a call at which nothing else is due."""
        self._counted = progress

    def update(self, update: Update) -> NonFiniteError | None:
        """Take in a model's values, and have snapshots written if they are due; `wait_for_turn` came before.

        Returns:
            Why the update was left out, if it was; an update beside the training keeps that for `take_error`.
        """
        self._check_open()  # a signal handler may have closed the tracker since the call began
        if self._beside is None:
            all_on_cpu = all(tensor.device.type == "cpu" for tensor in update.tensors.averaged.values())
            self._beside = (self._device or ("model" if all_on_cpu else "cpu")) == "cpu"
        copies = {name: tensor.clone() for name, tensor in update.tensors.copied.items()}
        room = self._snapshot_room(lay_out(update.tensors.averaged)) if update.is_due else None
        refused = None
        if self._beside:
            staged = self._stager.stage(update.tensors.averaged)
            marks = self._streams.marks(update.tensors.copied.values())
            self._updates.submit(lambda: self._update_beside(update, staged, copies, marks, room))
        else:
            reader = self._reader_of(update.tensors)
            devices = [group.device for group in reader.layout] + [copy.device for copy in copies.values()]
            streams = self._streams.current(devices)
            refused = self._updates.call(lambda: self._update_here(update, reader, copies, streams, room))
        self._counted = update.progress
        return refused

    def warn_of_waiting(self, stacklevel: int) -> None:
        """Warn if training has waited for long."""
        self._update_pace.warn(stacklevel + 1)
        self._write_pace.warn(stacklevel + 1)

    def leave_out(self, progress: Progress, is_due: bool) -> None:
        """Count a call whose update is left out; snapshots that are due hold the averages as they are."""
        kept = self.now.averages.accumulators
        room = self._snapshot_room(kept.layout) if is_due and kept is not None else None

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

    def read(self) -> Reading[Rounded]:
        """The averages, in memory of the caller's own."""
        return self._ask(Rounded.on_host)

    def read_exactly(self) -> Reading[Accumulators]:
        """The averages' accumulators, in memory of the caller's own."""
        return self._ask(Accumulators.on_host)

    def write_missing(self, at_end: bool = False) -> None:
        """Have the averages written, when everything due before is durable, unless they are stored. Nobody waits."""

        def work() -> None:
            self._writes.wait()
            known, snapshotter = self._known(), self.snapshotter
            if snapshotter is None:
                return
            if snapshotter.is_behind_at_end(known) if at_end else snapshotter.is_behind(known):
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

    def refuse(self, error: NotReadyError) -> None:
        """Take in nothing that was not handed over yet: later calls raise `error`."""

        def work() -> None:
            self._refusal = error

        if self._updates.is_idle():
            work()
        else:
            self._updates.submit(work)

    def close(self) -> None:
        """Finish everything."""
        self._updates.close()
        self._crew.close()
        self._writes.close()

    # --- inside ---

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _ask(self, make: Callable[[Accumulators], Room]) -> Reading[Room]:
        """A reading in a room that the caller makes: allocating memory must not hold up updates."""
        while self.now.averages.exist or not self._updates.is_idle():
            kept = self.now.averages.accumulators
            with torch.inference_mode(False):
                room = None if kept is None else make(kept)
            found = self._updates.call(lambda: self._fill(room, self._known()))  # noqa: B023  # done before the next
            if found is not None:
                return found
        return self._fill(None, self._known()) or self._ask(make)

    def _fill(self, room: Room | None, known: Tracking) -> Reading[Room] | None:
        """A reading in `room`; None where the room does not fit the averages."""
        averages = known.averages
        if not averages.exist:
            return Reading(known, averages.standing, None, {})
        kept = averages.accumulators
        if room is None or kept is None or not room.fits(kept):
            return None
        with self._streams.beside_training():
            room.read(averages, self._crew_for(kept.layout))
            copies = {name: copy.to("cpu") for name, copy in averages.copies.items()}
        return Reading(known, averages.standing, room, copies)

    def _known(self) -> Tracking:
        """The averages with the calls counted so far if no update was among them, else with those until then."""
        counted, now = self._counted, self.now
        later = counted.updated == now.progress.updated and counted.step > now.progress.step
        return replace(now, progress=counted) if later else now

    @torch.inference_mode(False)
    def _snapshot_room(self, layout: Layout) -> Rounded:
        """Room for a snapshot's averages, used again: making it takes longer than an update."""
        wanted, profiles = on_host(layout), len(self.now.averages.sigma_rels)
        try:
            room = self._rooms.pop()
            if room.layout == wanted and len(room.profiles) == profiles:
                return room
        except IndexError:
            pass
        return Rounded(wanted, profiles, pinned=any(group.device.type == "cuda" for group in layout))

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

    # --- jobs ---

    def _update_here(
        self,
        update: Update,
        reader: BlockReader,
        copies: Mapping[str, torch.Tensor],
        streams: Streams,
        room: Rounded | None,
    ) -> NonFiniteError | None:
        """Take in values that nobody changes until this is done; returns why the update was left out."""
        with self._streams.entered(streams):
            refused = self._take_in(update, reader, update.tensors.averaged, copies)
            network = self._stager.stage(update.tensors.averaged) if update.is_due and refused is None else None
        if update.is_due:
            self._have_written(self.now, network, room)
        return refused

    def _update_beside(
        self, update: Update, staged: Staged, copies: Mapping[str, torch.Tensor], marks: Marks, room: Rounded | None
    ) -> None:
        """Take in a copy of the values."""
        handed_over = False
        try:
            with self._update_pace.working():
                refused = self._take_in(update, staged.reader(self._crew.size), staged.values.views, copies)
            self._streams.last = marks
            handed_over = update.is_due and refused is None
            if update.is_due:
                self._have_written(self.now, staged if handed_over else None, room)
        finally:
            if not handed_over:
                self._stager.give_back(staged)
        if refused is not None:
            self._settings.skip_update(refused, stacklevel=2)

    @torch.no_grad()
    def _take_in(
        self,
        update: Update,
        reader: BlockReader,
        values: Mapping[str, torch.Tensor],
        copies: Mapping[str, torch.Tensor],
    ) -> NonFiniteError | None:
        """Update the averages and the counters; returns why the update was left out."""
        self._check_open()
        now, progress = self.now, update.progress
        averages, tracked = now.averages, now.tracked
        if update.change is not None:
            begun = {name: values[name] for name in update.change.begun}
            averages, tracked = averages.changed(reader.layout, begun, copies), update.change.tracked
        crew = self._crew_for(reader.layout)
        name = None if reader.surely_finite(crew) else nonfinite_name(values)
        if name is None:
            averages.update_(reader, copies, progress.t, progress.step, crew)
        self.now = replace(now, progress=progress, tracked=tracked, averages=averages)
        if name is None:
            return None
        return NonFiniteError(
            f"parameter {name!r}", f"holds nan or infinity at step {progress.step}; no average has taken it in"
        )

    def _have_written(self, known: Tracking, network: Staged | None, room: Rounded | None, is_due: bool = True) -> None:
        """Have the averages written as they are now."""
        kept, snapshotter = known.averages.accumulators, self.snapshotter
        if kept is None or snapshotter is None or not known.averages.exist:
            return
        # An update that was left out leaves averages of other tensors than its own.
        fitting = room if room is not None and room.fits(kept) else self._snapshot_room(kept.layout)
        reading = self._fill(fitting, known)
        assert reading is not None, "the room fits"
        exact = self._exact_copy(kept, known) if self._settings.keep_state else None

        def job() -> None:
            try:
                with self._write_pace.working():
                    snapshotter.record(reading, None if network is None else network.arrived(), exact, is_due)
            finally:
                if network is not None:
                    self._stager.give_back(network)
                self._rooms.append(fitting)
                if exact is not None and exact.room is not None:
                    self._exact_rooms.append(exact.room)

        self._writes.submit(job)

    @torch.inference_mode(False)
    def _exact_copy(self, kept: Accumulators, known: Tracking) -> Reading[Accumulators] | None:
        """The accumulators, in room that is used again."""
        room = self._exact_rooms.pop() if self._exact_rooms else None
        return self._fill(room if room is not None and room.fits(kept) else Accumulators.on_host(kept), known)


_at_work: WeakSet[Pipeline] = WeakSet()


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
    try:
        return one.samefile(other)
    except OSError:
        return False


@atexit.register
def finish() -> None:
    """Finish the work of every tracker when the process ends."""
    for pipeline in list(_at_work):
        pipeline.end()
        pipeline.flush()
