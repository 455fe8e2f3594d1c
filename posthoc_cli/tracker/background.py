"""The work of a tracker that training need not wait for: averages on the host, and the writing of snapshots."""

from __future__ import annotations

import atexit
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch

from posthoc_cli.errors import NonFiniteError
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.layout import BlockReader, lay_out
from posthoc_cli.tracker.live import LiveSource
from posthoc_cli.tracker.model_tensors import ModelTensors, nonfinite_name
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.staging import Staged, Stager
from posthoc_cli.tracker.worker import Worker

log = logging.getLogger(__name__)


Writer = Callable[[Sequence[LiveSource], Mapping[str, torch.Tensor] | None], None]
"""Writes the averages of one time; given the network's weights, where they are at hand."""


@dataclass(frozen=True)
class Snapshots:
    """Snapshots that are due: what they say of themselves, once the averages are there, and who writes them."""

    describe: Callable[[], list[LiveSource]]
    write: Writer


PATIENCE = 10.0
"""Seconds that training has waited before it is told so."""


class Pace:
    """How long jobs take and how often they come; says once when training has to wait for them.

    Arguments:
        what: takes the time.
        option: of the tracker, that says how often.
        fitting: the value of the option with which jobs would come less often by at least a factor.
    """

    def __init__(self, what: str, option: str, fitting: Callable[[float], int]) -> None:
        self._what, self._option, self._fitting = what, option, fitting
        self._done, self._seconds = 0, 0.0
        self._came, self._waited = 0, 0.0
        self._begin = time.monotonic()
        self._told = False

    @contextmanager
    def working(self) -> Iterator[None]:
        """A job is done within the block."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._done += 1
            self._seconds += time.monotonic() - started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A job has come, and waits within the block to be taken."""
        started = time.monotonic()
        yield
        self._came += 1
        self._waited += time.monotonic() - started

    def tell(self) -> None:
        """Warn where training has waited for long; called when nothing is left to do that a warning could stop."""
        training = time.monotonic() - self._begin - self._waited
        if self._told or self._waited < max(PATIENCE, 0.1 * training) or not self._done:
            return
        self._told = True
        takes, comes = self._seconds / self._done, training / self._came
        warnings.warn(
            f"{self._what} takes {takes:.3g} s, and training comes with the next after {comes:.3g} s: it has waited "
            f"{self._waited:.3g} s so far; {self._option}={self._fitting(takes / comes)} would fit",
            RuntimeWarning,
            stacklevel=5,
        )


class Background:
    """Takes in a model's values, and has snapshots written beside the training.

    Arguments:
        settings: of the tracker.
        beside: also the averages are updated beside the training, on the host, from a copy of the values.
    """

    def __init__(self, settings: Settings, beside: bool) -> None:
        self._settings = settings
        self._beside = beside
        self._stager = Stager()
        self._updates, self._writes = Worker("averages", 1), Worker("snapshots", 1)
        every, snapshots = settings.schedule.update_every, settings.schedule.checkpoint_every
        self._update_pace = Pace(
            "an update of the averages", "update_every", lambda factor: _divisor(snapshots, every * factor)
        )
        self._write_pace = Pace(
            "writing snapshots", "checkpoint_every", lambda factor: int(-(-snapshots * factor // every) * every)
        )
        self._reader: BlockReader | None = None
        self._read: ModelTensors | None = None
        _at_work.add(self)

    def update(
        self,
        averages: RunningAverages,
        tensors: ModelTensors,
        t: float,
        step: int,
        due: Snapshots | None,
    ) -> None:
        """Take in a model's values, and have snapshots written where they are `due`.

        Arguments:
            tensors: the same object as long as the model's tensors are the same.
        """
        copies = {name: tensor.clone() for name, tensor in tensors.copied.items()}
        if self._beside:
            with self._update_pace.waiting():
                self._updates.wait()
            staged = self._stager.stage(tensors.averaged)
            self._updates.submit(lambda: self._update_beside(averages, staged, copies, t, step, due))
            self._update_pace.tell()
            return
        reader = self._reader_of(tensors)
        taken = self._take_in(averages, reader, tensors.averaged, copies, t, step)
        if due is not None and averages.exist:
            self._write(averages, due, self._stager.stage(tensors.averaged) if taken else None)

    def write(self, averages: RunningAverages, due: Snapshots) -> None:
        """Have the averages written as they are."""
        self._updates.wait()
        self._write(averages, due, None)

    def flush(self) -> None:
        """Return when everything is done and durable."""
        self._updates.wait()
        self._writes.wait()

    def take_error(self) -> Exception | None:
        """What went wrong beside the training; each error is given once."""
        return self._updates.take_error() or self._writes.take_error()

    def known_error(self) -> Exception | None:
        """The same, of work that was waited for."""
        return self._updates.known_error() or self._writes.known_error()

    def close(self) -> None:
        """Finish everything."""
        self._updates.close()
        self._writes.close()

    # --- inside --------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # made there, its scratch could never be written to outside
    def _reader_of(self, tensors: ModelTensors) -> BlockReader:
        if self._reader is None or self._read is not tensors:
            self._reader = self._read = None  # also where making the next one fails
            self._reader = BlockReader.of_tensors(lay_out(tensors.averaged), tensors.averaged)
            self._read = tensors
        return self._reader

    def _update_beside(
        self,
        averages: RunningAverages,
        staged: Staged,
        copies: Mapping[str, torch.Tensor],
        t: float,
        step: int,
        due: Snapshots | None,
    ) -> None:
        taken = False
        try:
            with self._update_pace.working():
                taken = self._take_in(averages, staged.reader(), staged.values.views, copies, t, step)
        finally:
            if due is None or not taken:
                self._stager.give_back(staged)
        if due is not None and averages.exist:
            self._write(averages, due, staged if taken else None)

    def _take_in(
        self,
        averages: RunningAverages,
        reader: BlockReader,
        values: Mapping[str, torch.Tensor],
        copies: Mapping[str, torch.Tensor],
        t: float,
        step: int,
    ) -> bool:
        """Update the averages; False where the update is skipped."""
        with torch.no_grad():
            name = None if reader.surely_finite() else nonfinite_name(values)
        if name is None:
            averages.update_(reader, copies, t, step)
            return True
        message = f"parameter {name!r} holds nan or infinity at step {step}; no average has taken it in"
        skip_update(self._settings, message, stacklevel=6)
        return False

    def _write(self, averages: RunningAverages, due: Snapshots, staged: Staged | None) -> None:
        with self._write_pace.waiting():
            self._writes.wait()  # before anything is held, which Ctrl-C meanwhile would leave held for good
            held = averages.hold()
            # What is held, and not the live averages: on an accelerator updates go on changing those in place.
            sources = [
                replace(source, averages=values.views)
                for source, values in zip(due.describe(), held.accumulators, strict=True)
            ]

            def job() -> None:
                try:
                    with self._write_pace.working():
                        due.write(sources, None if staged is None else staged.arrived())
                finally:
                    averages.release(held)
                    if staged is not None:
                        self._stager.give_back(staged)

            self._writes.submit(job)
        self._write_pace.tell()


def skip_update(settings: Settings, message: str, stacklevel: int) -> None:
    """Say that an update is left out, in the way that the user has chosen, or raise a NonFiniteError."""
    if settings.on_nonfinite == "raise":
        raise NonFiniteError(message)
    if settings.on_nonfinite == "warn":
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)
    log.info("update skipped: %s", message)


_at_work: WeakSet[Background] = WeakSet()


@atexit.register
def finish() -> None:
    """Finish what is under way when the process ends; a job keeps its own alive."""
    for background in list(_at_work):
        background.flush()


def _divisor(whole: int, least: float) -> int:
    """The smallest divisor of `whole` that is at least `least`; `whole` itself where none is."""
    return next((n for n in range(1, whole) if whole % n == 0 and n >= least), whole)
