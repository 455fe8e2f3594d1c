"""Worker threads: jobs done one after another, crews of threads for large updates, and a warning when training waits.

Signal handlers run in the main thread, between any two steps of its code, and may call the function that they have
interrupted. So no lock is held while Python code runs: a handler that waits for it would wait for the code beneath it.
Queues and deques are appended to and popped from in one step, and `dict.setdefault`, one step as well, decides who
takes a job.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar, cast

import torch
from threadpoolctl import ThreadpoolController

from posthoc_cli.errors import NotReadyError, WriteError, warn

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds that training waits before a warning

Result = TypeVar("Result")
Item = TypeVar("Item")


class Calls:
    """Lets one call at a time into a tracker, of the process that made it, until it is closed."""

    def __init__(self, directory: Path) -> None:
        self.closed, self.caller = False, 0
        self._directory, self._process, self._lock = directory, os.getpid(), threading.Lock()

    def check_process(self) -> None:
        """Raise a NotReadyError in a forked process, which has no threads."""
        if self.is_forked:
            reason = "this process was forked from the one that has the tracker, and its threads"
            hint = "call it there, or read the snapshots with PostHocEMA.from_path"
            raise NotReadyError(self._directory, reason, hint)

    @property
    def is_forked(self) -> bool:
        """Whether the tracker belongs to another process."""
        return self._process != os.getpid()

    def check_open(self) -> None:
        """Raise a NotReadyError in a forked process, and if the tracker is closed."""
        self.check_process()
        if self.closed:
            raise self.closed_error()

    def closed_error(self) -> NotReadyError:
        """The error of calls that come too late."""
        return NotReadyError(self._directory, "this tracker was closed", "go on with PostHocEMA.from_path")

    def lock(self, name: str) -> threading.Lock:
        """The lock to take; a NotReadyError while another call is under way. Two that begin at once take turns."""
        self.check_process()
        if self._lock.locked():
            beneath = self.caller == threading.get_ident()
            who = "this thread, beneath a signal handler, is" if beneath else "another thread is"
            raise NotReadyError(name, f"{who} calling the tracker", "call update_ from one thread, after every step")
        return self._lock


class Job(Generic[Result]):
    """Work that is done once, or never if it was withdrawn."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work: Callable[[], Result] | None = work
        self._taker: dict[None, str] = {}
        self._finished = False
        self._error: BaseException | None = None
        self._value: Result | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def run(self) -> None:
        """Do the work; called by a worker."""
        if self._taker.setdefault(None, "worker") != "worker" or self._work is None:
            return
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            self._error = error
        self._work = None  # it may hold a model
        self._finished = True
        self._gate.release()

    def wait(self) -> None:
        """Return when the work is done."""
        if not self._finished:
            with self._gate:
                pass

    def settle(self) -> None:
        """Withdraw the job, or return when it is done; an exception that is raised meanwhile waits for that, too."""
        try:
            if not self._withdrawn():
                self.wait()
        finally:
            if not (self._finished or self._withdrawn()):
                self.settle()

    def result(self) -> Result:
        """The result, or the error raised."""
        if self._error is not None:
            raise self._error
        return cast("Result", self._value)

    def _withdrawn(self) -> bool:
        return self._taker.setdefault(None, "owner") == "owner"


class Worker:
    """Does jobs in order, in a thread of one torch thread that starts with the first job and ends with `close`.

    The thread also ends when nobody refers to the worker, and does not keep the process alive: `wait` for jobs that
    must be done by then. `concurrent.futures` takes no jobs at the end of the process, not even from another job. An
    error of a submitted job is logged and kept until `take_error`; later jobs are done all the same.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[Job[object] | None] = SimpleQueue()
        self._vacancy: deque[None] = deque((None,))
        self._errors: deque[Exception] = deque()
        self._process = os.getpid()
        # Not at exit: jobs may still start others then.
        weakref.finalize(self, self._queue.put, None).atexit = False

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work` later."""
        errors = self._errors

        def guarded() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  # raised at the next call
                errors.append(error)
                # Of a directory that was deleted nobody wants to hear at the end of the process; the next call tells.
                if not (isinstance(error, WriteError) and error.errno == errno.ENOENT):
                    log.error("beside the training: %s", error)

        self.put(Job(guarded))

    def call(self, work: Callable[[], Result]) -> Result:
        """Have `work` done; return its result or raise its error.

        An exception that a signal handler raises meanwhile waits until the work is done; work that had not begun is
        withdrawn.
        """
        job = Job(work)
        try:
            self.put(job)
            job.wait()
        finally:
            job.settle()
        return job.result()

    def wait(self) -> None:
        """Return when every job is done; at once in a forked child, which has no thread."""
        if not self.is_idle() and os.getpid() == self._process:
            self.call(lambda: None)

    def take_error(self) -> Exception | None:
        """The first error of a job that was not taken yet."""
        with suppress(IndexError):
            return self._errors.popleft()
        return None

    def close(self) -> None:
        """Finish every job and end the thread; a later job would start another one."""
        self.wait()
        if not self._vacancy:
            self._queue.put(None)

    def is_idle(self) -> bool:
        """Whether there is no thread, and no job for one."""
        return bool(self._vacancy) and self._queue.empty()

    def put(self, job: Job[Result]) -> None:
        """Do a job later; whoever waits for it gets its error."""
        self._queue.put(cast("Job[object]", job))
        if self._vacancy:
            serve = (self._queue, self._vacancy)
            thread = threading.Thread(target=_serve, args=serve, name=f"ema-{self._name}", daemon=True)
            _threads[thread] = self._queue
            try:
                thread.start()
            except RuntimeError:  # at the end of the process, Python 3.12 and later start no thread
                self._queue.put(None)
                _serve(*serve)


_threads: weakref.WeakKeyDictionary[threading.Thread, SimpleQueue[Job[object] | None]] = weakref.WeakKeyDictionary()
"""Threads of all workers, with the queues that they serve."""


def end_threads() -> None:
    """End the threads of all workers when their jobs are done.

    A thread that still freed tensors while the interpreter ends would abort the process: it gets the interpreter's lock
    no more, and torch's C++ code cannot be unwound.
    """
    for thread, queue in list(_threads.items()):
        while thread.is_alive():
            queue.put(None)
            thread.join(0.1)  # a job that came after the None has kept the thread: ask again


def _serve(queue: SimpleQueue[Job[object] | None], vacancy: deque[None]) -> None:
    """Do jobs until None comes. Several threads may be started at a time: one takes the vacancy, the others end."""
    _take_one_thread()
    while True:
        try:
            vacancy.pop()
        except IndexError:
            return
        while (job := queue.get()) is not None:
            job.run()
            del job  # a waiting thread must not keep alive what it has worked on
        vacancy.append(None)
        if queue.empty():  # else a job came after the None, from a thread that saw no vacancy
            return


class Crew:
    """The calling thread, limited to one torch thread, and helper threads: `size` in all.

    torch's own threads wait for each other at every operation: beside busy processes an update of 50 M parameters took
    them 840 ms where a crew of two took 41 and one thread 61, with ten times the processor time. Here each thread takes
    one item after another. One thread does all of an item: bits do not depend on the number of threads.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._helpers = [Worker(f"averages-{number}") for number in range(1, size)]

    def each(self, work: Callable[[Item, int], object], items: Iterable[Item]) -> None:
        """Call `work(item, thread)` for every item, in any order, with thread < `size`.

        The first error is raised when all threads have stopped; items that nobody had begun are left then.
        """
        todo = deque(items)

        def take(thread: int) -> None:
            try:
                with torch.no_grad():
                    while True:
                        try:
                            item = todo.popleft()
                        except IndexError:
                            return
                        work(item, thread)
            except BaseException:
                todo.clear()
                raise

        jobs = [Job(partial(take, thread)) for thread in range(1, min(self.size, len(todo)))]
        try:
            for helper, job in zip(self._helpers, jobs, strict=False):
                helper.put(job)
            take(0)
        finally:
            for job in jobs:
                job.settle()
        for job in jobs:
            job.result()

    def close(self) -> None:
        """End the threads."""
        for helper in self._helpers:
            helper.close()


ALONE = Crew(1)  # the calling thread


def _take_one_thread() -> None:
    """Have torch work in the calling thread only.

    `torch.set_num_threads(1)` would do so as well, and all threads that start later would inherit it.
    """
    torch.get_num_threads()  # makes torch set OpenMP's number for this thread, which it does once
    _openmp().limit(limits=1)


@lru_cache
def _openmp() -> ThreadpoolController:
    """The libraries with OpenMP, which must have been imported; looking for them takes 10 ms."""
    return ThreadpoolController().select(user_api="openmp")


class Pace:
    """How long jobs (`what`) take and how often they come; warns once if training waits on them.

    `option` of the tracker says how often; `fitting` gives its value that makes jobs rarer by at least a factor.

    Attributes:
        took: seconds of the last one.
        held_up: seconds that training waited before it handed over the last one.
    """

    def __init__(self, what: str, option: str, fitting: Callable[[float], int]) -> None:
        self.took = self.held_up = 0.0
        self._what, self._option, self._fitting = what, option, fitting
        self._done, self._came, self._took, self._waited = 0, 0, 0.0, 0.0
        self._begin, self._warned = time.monotonic(), False

    def do(self, work: Callable[[], Result]) -> Result:
        """Do a job."""
        began = time.monotonic()
        try:
            return work()
        finally:
            self.took = time.monotonic() - began
            self._took += self.took
            self._done += 1

    def wait(self, wait: Callable[[], None]) -> None:
        """Wait until a new job can be taken."""
        began = time.monotonic()
        wait()
        self.held_up = time.monotonic() - began
        self._came += 1
        self._waited += self.held_up

    def warn(self) -> None:
        """Warn if training has waited for long; call it last, since the warning may be an error."""
        training = time.monotonic() - self._begin - self._waited
        if self._warned or self._waited < max(PATIENCE, 0.1 * training) or not self._done:
            return
        self._warned = True
        takes, comes = self._took / self._done, training / self._came
        warn(
            f"{self._what} takes {takes:.3g} s and is due every {comes:.3g} s: training has waited "
            f"{self._waited:.3g} s so far; {self._option}={self._fitting(takes / comes)} would fit"
        )


def divisor(number: int, least: float) -> int:
    """The smallest divisor of `number` that is at least `least`; `number` itself where none is."""
    return next((n for n in range(1, number) if number % n == 0 and n >= least), number)
