"""Threads of our own for large updates.

torch's own threads wait for each other at every operation: where other processes use the cores, each one waits for the
slowest. Here each thread takes one item after another as long as there are any, and nobody waits but for the items
that others have begun. What is done with an item is done by one thread, whichever it is, so that bits do not depend on
the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch

from posthoc_cli.synthesis.workers import worker_count
from posthoc_cli.threads import take_one_openmp_thread
from posthoc_cli.tracker.worker import Job, Worker

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
