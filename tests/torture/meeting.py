"""Trainings, readers and prunings that use one directory at the same time."""

from __future__ import annotations

import logging
import multiprocessing
import random
import shutil
import time
import warnings
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

from posthoc_cli import disk_sources, plan_synthesis
from posthoc_cli.errors import LockedError
from posthoc_cli.export.layouts import OutputOptions
from posthoc_cli.export.writing import write_synthesis
from posthoc_cli.run import with_consistent_plan
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.prune import plan_pruning, prune
from posthoc_cli.synthesis.plan import Plan
from torture import Tally
from torture.processes import PATIENCE
from torture.training import Network, begin, remove_half_begun, wrong_output, wrong_snapshots


class Other:
    """A forked process that trains or prunes in a directory on request, and answers.

    Arguments:
        first: the steps before a training answers that it holds the directory; each later step takes `pause` seconds,
            during which the process may be asked to close.
    """

    def __init__(self, folder: Path, first: int = 1, pause: float = 0, **settings: int) -> None:
        context = multiprocessing.get_context("fork")
        self._mine, its = context.Pipe()
        self.process = context.Process(target=_work, args=(its, folder, first, pause, settings), daemon=True)
        self.process.start()
        its.close()

    def ask(self, *words: object) -> tuple[object, ...]:
        """Send a request, and wait for the answer."""
        self.tell(*words)
        return self.answer()

    def tell(self, *words: object) -> None:
        self._mine.send(words)

    def answer(self) -> tuple[object, ...]:
        if not self._mine.poll(PATIENCE):
            return ("hangs",)
        try:
            return tuple(self._mine.recv())
        except EOFError:
            return ("died",)

    def kill(self) -> None:
        """Kill the process by SIGKILL."""
        self.process.kill()
        self.process.join()

    def is_named_by(self, refusal: tuple[object, ...]) -> bool:
        """Return whether another process was refused the directory because this one holds it."""
        return refusal[0] == "refused" and f"process {self.process.pid} on " in str(refusal[1])


def _work(mine: Connection, folder: Path, first: int, pause: float, settings: dict[str, int]) -> None:
    """Answer "train" (twice: at the start, and when asked to close) and "prune" with the result."""
    logging.getLogger("posthoc_cli").setLevel(logging.ERROR)  # the warnings about taking over are expected
    warnings.simplefilter("ignore")  # as are those that training waits for the disk
    network = Network()
    while True:
        what, *keep = mine.recv()
        try:
            if what == "prune":
                answer = "pruned", len(prune(folder, plan_pruning(read_directory(folder), keep=keep[0])).to_delete)
            else:
                with begin(folder, network, **settings) as tracker:
                    for number in count():
                        if number == first:
                            tracker.flush()
                            mine.send(("trains", tracker.run_id))
                        if number >= first and mine.poll(pause):
                            break
                        network.go_to(tracker.step + 1)
                        tracker.update_(network)
                    mine.recv()
                answer = "closed", tracker.step
        except LockedError as error:
            answer = "refused", str(error)
        except Exception as error:  # noqa: BLE001 - the caller judges any error
            answer = "failed", f"{type(error).__name__}: {error}"
        mine.send(answer)


# --- readers during a training and prunings

STEP = 0.01
"""The duration of a training step. If thinning happens every few milliseconds, readers never find a stable plan."""


class Retries(logging.Handler):
    """A log handler that counts the plans that were made again."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "planning again" in record.getMessage()


def readers(folder: Path, times: int, chance: random.Random) -> Tally:
    """Synthesize `times` times: while a training writes and thins, and after it while another process prunes."""
    run, out, tally, retries = folder / "run", folder / "out.safetensors", Tally(), Retries()
    logging.getLogger("posthoc_cli").addHandler(retries)
    training = Other(run, first=12, pause=STEP, checkpoint_every=3, max_checkpoints=6)
    pruner = Other(run)
    while tally.tried < times:
        answer = training.ask("train")
        if answer[0] != "trains":
            tally.missed.append(f"the training: {answer}")
            break
        for _ in range(min(40, times - tally.tried)):
            read_once(tally, run, out, chance)
        answer = pruner.ask("prune", 2)
        if not training.is_named_by(answer):
            tally.missed.append(f"pruning during the training {training.process.pid}: {answer}")
        training.ask("close")
        pruner.tell("prune", chance.randint(1, 5))
        for _ in range(min(5, times - tally.tried)):
            read_once(tally, run, out, chance)
        answer = pruner.answer()
        if answer[0] != "pruned":
            tally.missed.append(f"pruning after the training: {answer}")
        tally.lost += wrong_snapshots(run)
    if times >= 500 and not retries.count:
        tally.missed.append("no snapshot ever went away under a reader: nothing was tried")
    return tally


def read_once(tally: Tally, run: Path, out: Path, chance: random.Random) -> None:
    """Synthesize one random target, and compare the output with the snapshots and coefficients that it names."""
    tally.tried += 1
    sigma_rel, earlier = chance.uniform(0.03, 0.28), chance.random() < 0.3

    def plan() -> Plan:
        sources = disk_sources(run)
        t = chance.choice(sources).info.t if earlier else None
        return plan_synthesis(sources, [sigma_rel], t)

    try:
        with_consistent_plan(plan, lambda plan: write_synthesis(plan, [out], OutputOptions(overwrite=True)))
    except Exception as error:  # noqa: BLE001 - no error may come
        tally.missed.append(f"reading {tally.tried}: {type(error).__name__}: {error}")
    else:
        tally.lost += [f"reading {tally.tried}: {line}" for line in wrong_output(out)]


# --- two writers


def writers(folder: Path, times: int, chance: random.Random) -> Tally:
    """Start two writers `times` times: simultaneously, or one after the other, where the first one is killed."""
    tally = Tally()
    run = folder / "run"
    while tally.tried < times:
        tally.tried += 1
        both = [Other(run, checkpoint_every=1, max_checkpoints=4) for _ in range(2)]
        meeting = at_once if chance.random() < 0.3 else one_is_killed
        tally.lost += [f"meeting {tally.tried}, {meeting.__name__}: {line}" for line in meeting(run, *both, chance)]
        for writer in both:
            writer.kill()
        shutil.rmtree(run)
    return tally


def at_once(run: Path, first: Other, second: Other, chance: random.Random) -> list[str]:
    """Start both at the same moment: one of them holds the directory, the other is refused, and takes over later."""
    for writer in (first, second):
        writer.tell("train")
    answers = [writer.answer() for writer in (first, second)]
    if sorted(str(answer[0]) for answer in answers) != ["refused", "trains"]:
        return [str(answers)]
    if answers[0][0] == "refused":
        first, second, answers = second, first, answers[::-1]
    closed = first.ask("close")
    return ([] if closed[0] == "closed" else [str(closed)]) + taken_over(run, second, answers[0][1], chance)


def one_is_killed(run: Path, first: Other, second: Other, chance: random.Random) -> list[str]:
    """Start the second while the first, which the refusal names, is running; kill the first; the second takes over."""
    holds, refused = first.ask("train"), second.ask("train")
    if not first.is_named_by(refused):
        return [f"started after {first.process.pid}: {holds}, {refused}"]
    time.sleep(chance.uniform(0, 0.02))
    first.kill()
    return taken_over(run, second, holds[1], chance)


def taken_over(run: Path, second: Other, run_id: object, chance: random.Random) -> list[str]:
    """Let the second writer continue the first one's run; return what is wrong."""
    remove_half_begun(run)
    answer = second.ask("train")
    time.sleep(chance.uniform(0, 0.01))
    second.kill()
    wrong = [] if answer == ("trains", run_id) else [f"run {run_id} was to be resumed, and the answer is {answer}"]
    return wrong + wrong_snapshots(run)
