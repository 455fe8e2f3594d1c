"""Work in threads of their own, one job after another.

Signal handlers run in the main thread, between any two steps of what it does there, and may call whatever it is just
in. So nothing here holds a lock while it runs Python code: a lock that a handler would wait for is one that the code
beneath it cannot give back. Queues and deques are appended to and taken from in one step, and who has a job is decided
by `dict.setdefault`, which is one as well.

Threads of our own for large updates.

torch's own threads wait for each other at every operation: where other processes use the cores, each one waits for the
slowest. Here each thread takes one item after another as long as there are any, and nobody waits but for the items
that others have begun. What is done with an item is done by one thread, whichever it is, so that bits do not depend on
the number of threads.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar, cast

import torch

from posthoc_cli.synthesis.engine import worker_count
from posthoc_cli.threads import take_one_openmp_thread

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


def divisor(whole: int, least: float) -> int:
    """The smallest divisor of `whole` that is at least `least`; `whole` itself where none is."""
    return next((n for n in range(1, whole) if whole % n == 0 and n >= least), whole)


# --- Work in threads of their own, one job after another -------------------------------------------


log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Job(Generic[Result]):
    """One piece of work, which is done once, or never where it was withdrawn before.

    Arguments:
        work: to be done.
        errors: gets what goes wrong, where nobody waits for `result`.
    """

    def __init__(self, work: Callable[[], Result], errors: deque[Exception] | None = None) -> None:
        self._work: Callable[[], Result] | None = work
        self._errors = errors
        self._taker: dict[None, str] = {}
        self._finished = False
        self._error: BaseException | None = None
        self._value: Result | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def run(self) -> None:
        """Do it; called by a worker."""
        if self._taker.setdefault(None, "worker") != "worker" or self._work is None:
            return
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for, or at the next call
            self._error = error
            if self._errors is not None and isinstance(error, Exception):
                self._errors.append(error)
        self._work = None  # it may hold a model
        self._finished = True
        self._gate.release()
        if self._errors is not None and self._error is not None:
            log.error("beside the training: %s", self._error)

    def wait(self) -> None:
        """Return when it is done."""
        if not self._finished:
            with self._gate:
                pass

    def settle(self) -> None:
        """Return when it is done, or will never be; whatever is raised meanwhile waits for that, too."""
        try:
            if not self._withdrawn():
                self.wait()
        finally:
            if not (self._finished or self._withdrawn()):
                self.settle()

    def result(self) -> Result:
        """What came of it."""
        if self._error is not None:
            raise self._error
        return cast("Result", self._value)

    def _withdrawn(self) -> bool:
        return self._taker.setdefault(None, "owner") == "owner"


class Worker:
    """Jobs in the order they were given, in a thread that begins with the first and ends with `close`.

    It also ends when nobody has the worker any more, and does not keep the process from ending: whoever needs the jobs
    done by then has to `wait`. It is none of `concurrent.futures`, which at the end of the process take no job more,
    not even one that another job gives. An error of a job that nobody waits for is logged, and kept until `take_error`;
    the jobs after it are done all the same.

    Arguments:
        name: for the thread.
        begin: called in the thread before its first job.
    """

    def __init__(self, name: str, begin: Callable[[], None] = lambda: None) -> None:
        self._name, self._begin = name, begin
        self._queue: SimpleQueue[Job[object] | None] = SimpleQueue()
        self._vacancy: deque[None] = deque((None,))
        self._errors: deque[Exception] = deque()
        self._process = os.getpid()
        # Not when the process ends: jobs may still begin others then.
        weakref.finalize(self, self._queue.put, None).atexit = False

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work` later."""
        self.put(Job(work, self._errors))

    def call(self, work: Callable[[], Result]) -> Result:
        """Have `work` done, and return what comes of it, or raise its error.

        What is raised by a signal handler meanwhile waits until the work is done, unless it had not begun: then it is
        never done.
        """
        job = Job(work)
        try:
            self.put(job)
            job.wait()
        finally:
            job.settle()
        return job.result()

    def wait(self) -> None:
        """Return when every job is done; in a child that was forked meanwhile, which has no thread, at once."""
        if not self.is_idle() and os.getpid() == self._process:
            job = Job(lambda: None)
            self.put(job)
            job.wait()

    def take_error(self) -> Exception | None:
        """The first error of a job that was not taken yet."""
        try:
            return self._errors.popleft()
        except IndexError:
            return None

    def close(self) -> None:
        """Finish every job, and end the thread; the next job would begin another one."""
        self.wait()
        if not self._vacancy:
            self._queue.put(None)

    def is_idle(self) -> bool:
        """Whether there is no thread, and nothing for one to do."""
        return bool(self._vacancy) and self._queue.empty()

    def put(self, job: Job[Result]) -> None:
        """Do a job later; whoever waits for it gets its error."""
        self._queue.put(cast("Job[object]", job))
        if self._vacancy:
            target = (self._queue, self._vacancy, self._begin)
            try:
                threading.Thread(target=_serve, args=target, name=f"ema-{self._name}", daemon=True).start()
            except RuntimeError:  # when the process ends, Python 3.12 and later begin none
                self._queue.put(None)
                _serve(*target)


def _serve(queue: SimpleQueue[Job[object] | None], vacancy: deque[None], begin: Callable[[], None]) -> None:
    """Do jobs until there comes None. Of several threads that a moment may begin, one does, and the others end."""
    begin()
    while True:
        try:
            vacancy.pop()
        except IndexError:
            return
        while (job := queue.get()) is not None:
            job.run()
            del job  # while it waits, a thread must not keep alive what it has worked on
        vacancy.append(None)
        if queue.empty():  # else a job came after the None, from somebody who saw no vacancy
            return


# --- Threads of our own for large updates ----------------------------------------------------------


Item = TypeVar("Item")


class Crew:
    """The calling thread, in which torch must take no threads of its own, and others that help it.

    Arguments:
        size: threads of them all.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._helpers = [Worker(f"averages-{number}", take_one_thread) for number in range(1, size)]

    @classmethod
    def like_torch(cls) -> Crew:
        """As many threads as torch takes in the calling one, up to those of a synthesis."""
        return cls(min(torch.get_num_threads(), worker_count()))

    def each(self, work: Callable[[Item, int], None], items: Iterable[Item]) -> None:
        """Do `work` with every item, in any order; it gets the number of its thread, below `size`, too.

        The first error is raised when nobody works any more; items that nobody had begun are left then.
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
            with suppress(RuntimeError):  # no thread is to be had any more: then the others do the work
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


ALONE = Crew(1)
"""The calling thread."""


def take_one_thread() -> None:
    """Have torch do in the calling thread what it is asked for there.

    `torch.set_num_threads(1)` would do that as well, and be taken over by all threads that begin later.
    """
    torch.get_num_threads()  # has it set OpenMP's number for this thread, which it does once
    take_one_openmp_thread()
