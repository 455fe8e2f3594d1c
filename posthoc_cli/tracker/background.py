"""Worker threads that run jobs in order, a pool for large updates, and the lock of a call.

A signal handler runs in the main thread, between any two steps of its code, and may raise an
exception. So locks are taken by `with` statements, which cannot be interrupted before they hold,
and the locks that a handler may find taken are reentrant.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

import torch
from threadpoolctl import ThreadpoolController

from posthoc_cli.errors import Log, RefusedCallError, WriteError, keep_messages

log = Log(__name__)

PATIENCE = 10.0  # seconds that training waits before a warning
SIGNAL_DELAY = 0.5  # seconds after which a signal is handled that arrived as a wait began

Result = TypeVar("Result")
Item = TypeVar("Item")


class CallLock:
    """Held for the time of a call.

    Another thread waits for the call to end. A call from within it, as from a signal handler, is
    refused: it would wait for itself.
    """

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()

    def hold(self, call: str) -> AbstractContextManager[Any]:
        """Return the lock, for a `with` statement; a RefusedCallError if this thread holds it."""
        if self._lock._is_owned():  # which threading.Condition asks, too
            reason = "the code that this signal handler or callback interrupts is in a call"
            raise RefusedCallError(call, reason, "set a flag, and make the call after it")
        lock: AbstractContextManager[Any] = self._lock
        return lock


class Job(Generic[Result]):
    """Work that is done once, or never if it is withdrawn before a worker starts it."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work: Callable[[], Result] | None = work
        self._owner: dict[None, str] = {}  # `setdefault` is atomic, and cannot be interrupted
        self._finished = False
        self._error: BaseException | None = None
        self._value: Result | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def run(self) -> None:
        """Do the work; called by a worker."""
        if self._owner.setdefault(None, "worker") != "worker" or self._work is None:
            return
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001  # raised by `result`
            self._error = error
        self._work = None  # it may hold a model
        self._finished = True
        self._gate.release()

    def wait(self) -> None:
        """Wait until the work is done."""
        # Again and again: a signal that arrives just before a wait for a lock begins does not end
        # that wait, and its handler would run only after the job.
        while not self._finished:
            if self._gate.acquire(timeout=SIGNAL_DELAY):
                self._gate.release()

    def settle(self) -> None:
        """Withdraw the work, or wait until it is done, even if an exception is raised meanwhile."""
        try:
            if not self._withdraw():
                self.wait()
        finally:
            if not (self._finished or self._withdraw()):
                self.settle()

    def result(self) -> Result:
        """Return the result of work that is done, None if it was withdrawn, or raise its error."""
        if self._error is not None:
            raise self._error
        return cast("Result", self._value)

    def _withdraw(self) -> bool:
        """Withdraw the work; return False if a worker has already started it."""
        return self._owner.setdefault(None, "caller") == "caller"


class Worker:
    """Runs jobs in order, in one thread that starts with the first job, uses one torch thread, and
    ends with `close`.

    It also ends when the worker is garbage-collected, and does not keep the process alive.
    `ThreadPoolExecutor` would refuse new jobs while the process ends, even those that running jobs
    submit.
    """

    def __init__(self, name: str) -> None:
        self.wait_seconds = 0.0
        self._waited = 0.0
        self._name = name
        self._begin = time.monotonic()
        self._has_warned = False
        self._queue: Queue = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()
        self._errors = deque[Exception]()
        self.job_seconds = deque([0.0], maxlen=1)  # of the last submitted job
        # Not at exit: running jobs may still submit others.
        weakref.finalize(self, self._queue.put, None).atexit = False
        _workers.add(self)

    def submit(self, work: Callable[[], None]) -> None:
        """Queue `work`, and return at once. Its error is kept for the log and until `take_error`;
        later jobs still run."""
        # a job must not keep the worker alive
        errors = self._errors
        seconds = self.job_seconds

        def guarded() -> None:
            began = time.monotonic()
            try:
                work()
            except Exception as error:  # noqa: BLE001  # raised at the next call
                errors.append(error)
                # A deleted directory is not worth a message when the process ends; the next call
                # raises the error.
                if not (isinstance(error, WriteError) and error.errno == errno.ENOENT):
                    log.error("in the background: %s", error)
            seconds.append(time.monotonic() - began)

        self.put(Job(guarded))

    def call(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the queue, and return its result. An exception of a signal handler
        withdraws the work, or waits for its end."""
        job = Job(work)
        try:
            self.put(job)
            job.wait()
        except BaseException:
            job.settle()
            raise
        return job.result()

    def put(self, job: Job[Result]) -> None:
        """Queue a job, and return at once; `Job.result` raises its error."""
        self._queue.put(cast("Job[object]", job))
        with self._starting:
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        thread = threading.Thread(
            target=_run_thread, args=(self._queue,), name=f"ema-{self._name}", daemon=True
        )
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # while the process ends, Python 3.12 and later start no thread
            self._queue.put(None)
            _run_jobs(self._queue)

    def wait(self) -> None:
        """Wait until every job is done."""
        if self._thread is not None:
            self.call(_do_nothing)

    def wait_for_turn(self) -> None:
        """Wait as `wait` does, before the training submits a job, and note how long."""
        began = time.monotonic()
        self.wait()
        self.wait_seconds = time.monotonic() - began
        self._waited += self.wait_seconds

    def warn_of_waiting(self, what: str) -> None:
        """Warn, once, if the training has waited for long. Call this last: a filter may turn a
        warning into an error."""
        passed = time.monotonic() - self._begin
        waited = self._waited
        if not self._has_warned and waited >= max(PATIENCE, 0.1 * (passed - waited)):
            self._has_warned = True
            times = (
                f"{waited:.3g} s of {passed:.3g} s; the last one took {self.job_seconds[0]:.3g} s"
            )
            log.warning(
                f"training has waited for {what} for {times}: a larger interval makes them rarer"
            )

    def take_error(self) -> Exception | None:
        with suppress(IndexError):
            return self._errors.popleft()
        return None

    def close(self) -> None:
        """Finish every job and end the thread; a later job starts another one."""
        self.wait()
        with self._starting:
            thread = self._thread
            self._thread = None
        if thread is not None:
            self._queue.put(None)
            thread.join()


Queue = SimpleQueue[Job[object] | None]

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
os.register_at_fork(after_in_child=_workers.clear)  # the threads are the parent's


def _do_nothing() -> None:
    pass


def end_threads() -> None:
    """End the threads of all workers when their jobs are done: one that frees tensors at shutdown
    aborts Python."""
    for worker in [*_workers]:
        worker.close()


def _run_thread(queue: Queue) -> None:
    """Run queued jobs in a thread of their own."""
    keep_messages()
    # `torch.set_num_threads(1)` would also change all threads that start later. Asking torch for
    # the number makes torch set OpenMP's for this thread, which it does once.
    torch.get_num_threads()
    _openmp().limit(limits=1)
    _run_jobs(queue)


def _run_jobs(queue: Queue) -> None:
    """Run queued jobs until None arrives."""
    while (job := queue.get()) is not None:
        job.run()
        del job  # an idle thread must not keep the last job's objects alive


@lru_cache
def _openmp() -> ThreadpoolController:
    """Find the controller of the imported libraries that use OpenMP; searching for them takes 10
    ms."""
    return ThreadpoolController().select(user_api="openmp")


class ThreadPool:
    """A pool of `size` threads: the calling thread, limited to one torch thread, and helper
    threads.

    torch's own threads wait for each other at every operation: on busy cores an update took them 20
    times as long. One thread does all of an item, so that bits do not depend on the number of
    threads.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._helpers = [Worker(f"averages-{number}") for number in range(1, size)]

    def each(
        self,
        work: Callable[[Item, int], object],
        items: Iterable[Item],
    ) -> None:
        """Call `work(item, thread)` for every item, in any order, with thread < `size`; stop at an
        error."""
        pending = deque(items)

        @torch.no_grad()
        def run(thread: int) -> None:
            try:
                while True:
                    try:
                        item = pending.popleft()
                    except IndexError:
                        return
                    work(item, thread)
            finally:
                pending.clear()

        threads = min(self.size, len(pending))
        jobs = [Job(partial(run, thread)) for thread in range(1, threads)]
        try:
            for helper, job in zip(self._helpers, jobs, strict=False):
                helper.put(job)
            run(0)
        finally:
            for job in jobs:
                job.settle()
        for job in jobs:
            job.result()

    def close(self) -> None:
        for helper in self._helpers:
            helper.close()


SINGLE_THREAD = ThreadPool(1)  # the calling thread alone
