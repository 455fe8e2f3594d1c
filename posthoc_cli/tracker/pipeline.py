"""The thread that has a tracker's averages, and the one that writes snapshots of them.

Averages are changed and read by jobs of one worker only, one after the other: each reader sees those of one update,
whichever thread it calls from, and no exception that a signal handler raises can stop an update halfway. What has been
counted goes with them, see `Tracking`.
"""

from __future__ import annotations

import atexit
import logging
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakSet

import torch

from posthoc_cli.errors import NonFiniteError, NotReadyError
from posthoc_cli.tracker.averages import Accumulators
from posthoc_cli.tracker.layout import BlockReader, Layout, lay_out, on_host
from posthoc_cli.tracker.live import Progress, Reading, Room, Tracking, Values
from posthoc_cli.tracker.model_tensors import Change, ModelTensors, nonfinite_name
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.staging import DeviceStreams, Marks, Staged, Stager, Streams
from posthoc_cli.tracker.worker import ALONE, Crew, Pace, Worker, divisor, take_one_thread

log = logging.getLogger(__name__)

Writer = Callable[[Reading[Values], Mapping[str, torch.Tensor] | None, Reading[Accumulators] | None], None]
"""Writes the averages of one time; given the network's weights, where they are at hand, and, with `keep_state`, what
the averages are kept in."""

Chooser = Callable[[Tracking], Writer | None]
"""Gives what writes the averages as they are; None where nothing is to be written."""


@dataclass(frozen=True)
class Update:
    """What a call brings to the averages.

    Attributes:
        tensors: the model's; the same object as long as they are the same.
        progress: of the training with this call.
        due: writes the averages afterwards, where snapshots are due.
        change: where the model's tensors are others than before.
    """

    tensors: ModelTensors
    progress: Progress
    due: Writer | None
    change: Change | None


class Background:
    """Takes in a model's values, gives the averages to whoever asks, and has snapshots written beside the training.

    Arguments:
        settings: of the tracker.
        tracking: where it begins.

    Attributes:
        now: what the last update, or whatever else came instead of one, has left. Only a job changes it.
        last: what is to be written at the end; it must not hold the tracker.
    """

    def __init__(self, settings: Settings, tracking: Tracking) -> None:
        self.now = tracking
        self.last: Chooser | None = None
        self._settings = settings
        self._counted = tracking.progress
        self._refusal: NotReadyError | None = None
        self._beside: bool | None = None
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
        self._rooms: deque[Values] = deque(maxlen=1)
        self._exact_rooms: deque[Accumulators] = deque(maxlen=1)
        self._streams = DeviceStreams()
        _at_work.add(self)

    @property
    def progress(self) -> Progress:
        """How far the training is; behind by the last update where that was interrupted after it was handed over."""
        counted, done = self._counted, self.now.progress
        return counted if counted.step > done.step else done

    # --- the training's side -------------------------------------------------------------------------

    def place(self, parameters: Mapping[str, torch.Tensor], device: str | None) -> None:
        """Decide where the averages are: "cpu" has them updated beside the training, from a copy of the values."""
        if self._beside is None:
            host = all(parameter.device.type == "cpu" for parameter in parameters.values())
            self._beside = (device or ("model" if host else "cpu")) == "cpu"

    def wait_for_turn(self, writes_too: bool) -> None:
        """Return when an update may be handed over, and with `writes_too` snapshots to write."""
        if self._beside:
            with self._update_pace.waiting():
                self._updates.wait()
        if writes_too:
            with self._write_pace.waiting():
                self._writes.wait()

    def count(self, progress: Progress) -> None:
        """Count a call at which nothing else is due."""
        self._counted = progress

    def update(self, update: Update) -> None:
        """Take in a model's values, and have snapshots written where they are due. It was this call's turn."""
        self._check_open()  # a signal handler may have closed the tracker since the call began
        copies = {name: tensor.clone() for name, tensor in update.tensors.copied.items()}
        room = None if update.due is None else self._snapshot_room(lay_out(update.tensors.averaged))
        if self._beside:
            staged = self._stager.stage(update.tensors.averaged)
            marks = self._streams.marks(update.tensors.copied.values())
            self._updates.submit(lambda: self._update_beside(update, staged, copies, marks, room))
            self._counted = update.progress
            refused = None
        else:
            reader = self._reader_of(update.tensors)
            devices = [group.device for group in reader.layout] + [copy.device for copy in copies.values()]
            streams = self._streams.current(devices)
            refused = self._updates.call(lambda: self._update_here(update, reader, copies, streams, room))
            self._counted = update.progress
        self._update_pace.tell()
        self._write_pace.tell()
        if refused is not None:
            skip_update(self._settings, refused, stacklevel=5)

    def leave_out(self, progress: Progress, due: Writer | None) -> None:
        """Count a call whose update is left out; snapshots that are due hold the averages as they are."""
        kept = self.now.averages.accumulators
        room = None if due is None or kept is None else self._snapshot_room(kept.layout)

        def work() -> None:
            self._check_open()
            self.now = replace(self.now, progress=progress)
            self._have_written(due, None, room)

        self._updates.call(work)
        self._counted = progress

    def set(self, tracking: Tracking) -> None:
        """Go on from elsewhere."""

        def work() -> None:
            self._check_open()
            self._counted = tracking.progress
            self.now = tracking

        self._updates.call(work)

    # --- everybody's side ----------------------------------------------------------------------------

    def read(self) -> Reading[Values]:
        """The averages in memory of the caller's own."""
        return self._ask(
            lambda kept: Values(on_host(kept.layout), len(kept.totals)),
            self._read_averages,
        )

    def read_exactly(self) -> Reading[Accumulators]:
        """What the averages are kept in, the same way."""
        return self._ask(
            lambda kept: Accumulators.zeros(on_host(kept.layout), len(kept.totals)),
            lambda room: self.now.averages.copy_to(room),
        )

    def write(self, choose: Chooser) -> None:
        """Have the averages of now written, when all that is due before is durable. Nobody waits."""

        def work() -> None:
            self._writes.wait()
            known = self._known()
            self._have_written(choose(known), None, None, known)

        self._updates.submit(work)

    def end(self) -> None:
        """Have written what is to be written at the end, once. Nobody waits."""
        last, self.last = self.last, None
        if last is not None:
            self.write(last)

    def flush(self) -> None:
        """Return when everything is done and durable."""
        self._updates.wait()
        self._writes.wait()

    def take_error(self) -> Exception | None:
        """What went wrong beside the training; each error is given once."""
        return self._updates.take_error() or self._writes.take_error()

    def refuse(self, error: NotReadyError) -> None:
        """Take in nothing that was not handed over yet: whatever is tried after this raises `error`."""

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

    # --- inside --------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _ask(self, make: Callable[[Accumulators], Room], fill: Callable[[Room], None]) -> Reading[Room]:
        """Have a room filled that the caller has made: what the system takes to give memory holds up no update."""
        while self.now.averages.exist or not self._updates.is_idle():
            kept = self.now.averages.accumulators
            with torch.inference_mode(False):
                room = None if kept is None else make(kept)
            found = self._updates.call(partial(self._fill, room, fill))
            if found is not None:
                return found
        return Reading.of(self._known(), None, {})

    def _fill(
        self, room: Room | None, fill: Callable[[Room], None], known: Tracking | None = None
    ) -> Reading[Room] | None:
        """A reading in `room`; None where there are averages, and it is none for them."""
        known = known or self._known()
        if not known.averages.exist:
            return Reading.of(known, None, {})
        if room is None or not room.fits(known.averages.accumulators):
            return None
        with self._streams.beside_training():
            fill(room)
            copies = {name: copy.to("cpu") for name, copy in known.averages.copies.items()}
        return Reading.of(known, room, copies)

    def _known(self) -> Tracking:
        """What was counted last and what the averages are, where these belong together: else what was counted then."""
        counted, now = self._counted, self.now
        later = counted.updated == now.progress.updated and counted.step > now.progress.step
        return replace(now, progress=counted) if later else now

    @torch.inference_mode(False)
    def _snapshot_room(self, layout: Layout) -> Values:
        """Room for the averages that snapshots hold: making it takes longer than an update, so it is used again."""
        wanted, profiles = on_host(layout), len(self.now.averages.sigma_rels)
        try:
            room = self._rooms.pop()
            if room.layout == wanted and len(room.tensors) == profiles:
                return room
        except IndexError:
            pass
        return Values(wanted, profiles, pinned=any(group.device.type == "cuda" for group in layout))

    @torch.inference_mode(False)  # made there, its scratch could never be written to outside
    def _reader_of(self, tensors: ModelTensors) -> BlockReader:
        if self._reader is None or self._read is not tensors:
            self._reader = self._read = None  # also where making the next one fails
            layout = lay_out(tensors.averaged)
            self._reader = BlockReader.of_tensors(layout, tensors.averaged, self._crew_for(layout).size)
            self._read = tensors
        return self._reader

    # --- jobs ----------------------------------------------------------------------------------------

    def _update_here(
        self,
        update: Update,
        reader: BlockReader,
        copies: Mapping[str, torch.Tensor],
        streams: Streams,
        room: Values | None,
    ) -> NonFiniteError | None:
        """Take in values that stay as they are until this is done; returns why the update was left out."""
        with self._streams.entered(streams):
            refused = self._take_in(update, reader, update.tensors.averaged, copies)
            staged = None
            if update.due is not None and refused is None:
                staged = self._stager.stage(update.tensors.averaged)
        self._have_written(update.due, staged, room)
        return refused

    def _update_beside(
        self, update: Update, staged: Staged, copies: Mapping[str, torch.Tensor], marks: Marks, room: Values | None
    ) -> None:
        """Take in a copy of the values."""
        handed_over = False
        try:
            with self._update_pace.working():
                refused = self._take_in(update, staged.reader(self._crew.size), staged.values.views, copies)
            self._streams.last = marks
            handed_over = update.due is not None and refused is None
            self._have_written(update.due, staged if handed_over else None, room)
        finally:
            if not handed_over:
                self._stager.give_back(staged)
        if refused is not None:
            skip_update(self._settings, refused, stacklevel=2)

    @torch.no_grad()
    def _take_in(
        self,
        update: Update,
        reader: BlockReader,
        values: Mapping[str, torch.Tensor],
        copies: Mapping[str, torch.Tensor],
    ) -> NonFiniteError | None:
        """Update the averages, and say how far the training is; returns why the update was left out."""
        self._check_open()
        now, progress = self.now, update.progress
        averages, tracked = now.averages, now.tracked
        if update.change is not None:
            begun = {name: values[name] for name in update.change.begun}
            averages, tracked = averages.followed(reader.layout, begun, copies), update.change.tracked
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

    def _read_averages(self, room: Values) -> None:
        kept = self.now.averages.accumulators
        assert kept is not None, "called when there are some"
        self.now.averages.read(room.tensors, self._crew_for(kept.layout))

    def _crew_for(self, layout: Layout) -> Crew:
        """Streams of an accelerator are a thread's own, and order what is done there."""
        return self._crew if all(group.device.type == "cpu" for group in layout) else ALONE

    def _have_written(
        self, due: Writer | None, staged: Staged | None, room: Values | None, known: Tracking | None = None
    ) -> None:
        """Have the averages written as they are; `known` says it where more calls than the last update count."""
        known = known or self.now
        kept = known.averages.accumulators
        if due is None or kept is None or not self.now.averages.exist:
            return
        # An update that was left out leaves averages of other tensors than its own.
        fitting = room if room is not None and room.fits(kept) else self._snapshot_room(kept.layout)
        reading = self._fill(fitting, self._read_averages, known)
        assert reading is not None, "the room fits"
        exact = self._exact_copy(kept, known) if self._settings.keep_state else None

        def job() -> None:
            try:
                with self._write_pace.working():
                    due(reading, None if staged is None else staged.arrived(), exact)
            finally:
                if staged is not None:
                    self._stager.give_back(staged)
                self._rooms.append(fitting)
                if exact is not None and exact.room is not None:
                    self._exact_rooms.append(exact.room)

        self._writes.submit(job)

    @torch.inference_mode(False)
    def _exact_copy(self, kept: Accumulators, known: Tracking) -> Reading[Accumulators] | None:
        """What the averages are kept in, in room that is used again."""
        room = self._exact_rooms.pop() if self._exact_rooms else None
        if room is None or not room.fits(kept):
            room = Accumulators.zeros(on_host(kept.layout), len(kept.totals))
        return self._fill(room, lambda own: self.now.averages.copy_to(own), known)


def skip_update(settings: Settings, error: NonFiniteError, stacklevel: int) -> None:
    """Say that an update is left out, in the way that the user has chosen, or raise a NonFiniteError."""
    if settings.on_nonfinite == "raise":
        raise error
    if settings.on_nonfinite == "warn":
        warnings.warn(str(error), RuntimeWarning, stacklevel=stacklevel)
    log.info("update skipped: %s", error)


_at_work: WeakSet[Background] = WeakSet()


@atexit.register
def finish() -> None:
    """Finish what is under way when the process ends; a job keeps its own alive."""
    for background in list(_at_work):
        background.end()
        background.flush()
