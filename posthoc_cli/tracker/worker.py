"""Work beside the training: one job after another in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)


class Worker:
    """Jobs in the order they were given. What is under way when the process ends is finished first.

    An error of a job is logged, and kept until `take_error`; the jobs after it are done all the same.

    Arguments:
        name: for the thread.
        most: jobs that may wait or be under way; `submit` waits for the oldest beyond.
    """

    def __init__(self, name: str, most: int) -> None:
        # Its threads are joined when the interpreter ends, with their queue done; and it starts them when needed.
        self._pool = ThreadPoolExecutor(1, f"ema-{name}")
        self._most = most
        self._jobs: deque[Future[None]] = deque()
        self._errors: deque[Exception] = deque()
        self._lock = threading.Lock()

    def submit(self, job: Callable[[], None]) -> None:
        """Do `job` later; waits while too many others are under way. Where no thread can be had, do it now."""
        while len(self._jobs) >= self._most:
            self._take_oldest()
        self._jobs.append(self._begin(job))

    def wait(self) -> None:
        """Return when every job is done."""
        while self._jobs:
            self._take_oldest()

    def take_error(self) -> Exception | None:
        """The first error of a finished job that was not taken yet."""
        while any(job.done() for job in [*self._jobs][:1]):
            self._take_oldest()
        return self._errors.popleft() if self._errors else None

    def close(self) -> None:
        """Finish every job, and end the thread."""
        self.wait()
        self._pool.shutdown()

    def _begin(self, job: Callable[[], None]) -> Future[None]:
        undone = [job]  # a thread that comes later after all finds nothing to do

        def once() -> None:
            if undone:
                _logged(undone.pop())

        try:
            return self._pool.submit(once)
        except RuntimeError:  # the interpreter is ending and starts no thread any more, or the system has none to give
            done: Future[None] = Future()
            try:
                once()
                done.set_result(None)
            except Exception as error:  # noqa: BLE001  kept, as a thread would
                done.set_exception(error)
            return done

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


def _logged(job: Callable[[], None]) -> None:
    try:
        job()
    except Exception as error:
        log.error("beside the training: %s", error)
        raise
