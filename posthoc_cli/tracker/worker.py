"""Work beside the training: one job after another in a thread of its own."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

log = logging.getLogger(__name__)

Job = Callable[[], None]


class Worker:
    """Jobs in the order they were given, in a thread that ends with `close` or when nobody has the worker any more.

    The thread does not keep the process from ending: whoever needs the jobs done by then has to `wait`. It is none of
    `concurrent.futures`, which at the end of the process take no job any more, not even one that another job gives.
    An error of a job is logged, and kept until `take_error`; the jobs after it are done all the same.

    Arguments:
        name: for the thread.
        most: jobs that may wait or be under way; `submit` waits for the oldest beyond.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name, self._most = name, most
        self._queue: SimpleQueue[tuple[Future[None], Job] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._jobs: deque[Future[None]] = deque()
        self._errors: deque[Exception] = deque()
        self._lock = threading.Lock()

    def submit(self, job: Job) -> None:
        """Do `job` later; waits while too many others are under way."""
        while len(self._jobs) >= self._most:
            self._take_oldest()
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._queue,), name=f"ema-{self._name}", daemon=True)
            self._thread.start()
            # Not when the process ends: jobs may still begin others then.
            weakref.finalize(self, self._queue.put, None).atexit = False
        done: Future[None] = Future()
        self._jobs.append(done)
        self._queue.put((done, job))

    def wait(self) -> None:
        """Return when every job is done; in a child that was forked meanwhile, which has no thread, at once."""
        while self._jobs and os.getpid() == self._process:
            self._take_oldest()

    def take_error(self) -> Exception | None:
        """The first error of a finished job that was not taken yet."""
        while any(job.done() for job in [*self._jobs][:1]):
            self._take_oldest()
        return self.known_error()

    def known_error(self) -> Exception | None:
        """The same, of jobs that somebody has waited for."""
        return self._errors.popleft() if self._errors else None

    def close(self) -> None:
        """Finish every job, and end the thread."""
        self.wait()
        if self._thread is not None and os.getpid() == self._process:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _take_oldest(self) -> None:
        with self._lock:
            if not self._jobs:
                return
            job = self._jobs[0]
        error = job.exception()  # waits, without the lock; Ctrl-C meanwhile leaves the job in its place
        with self._lock:
            if not self._jobs or self._jobs[0] is not job:
                return  # another thread has taken it
            self._jobs.popleft()
            if isinstance(error, Exception):
                self._errors.append(error)


def _work(queue: SimpleQueue[tuple[Future[None], Job] | None]) -> None:
    while (item := queue.get()) is not None:
        done, job = item
        try:
            job()
        except Exception as error:  # noqa: BLE001  # raised at the next call
            log.error("beside the training: %s", error)
            done.set_exception(error)
        else:
            done.set_result(None)
        del item, job, done  # while it waits, a thread must not keep alive what it has worked on
