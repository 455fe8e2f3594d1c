"""Trainings, readers and prunings that meet in one directory."""

from __future__ import annotations

import logging
import multiprocessing
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

from posthoc_cli import PostHocEMA, disk_sources, plan_synthesis
from posthoc_cli.errors import LockedError, PostHocError
from posthoc_cli.export.layouts import OutputOptions, write_synthesis
from posthoc_cli.run import with_consistent_plan
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.pruning import plan_pruning, prune
from posthoc_cli.synthesis.plan import Plan
from torture import Tally
from torture.processes import PATIENCE
from torture.training import Network, begin, remove_half_begun, wrong_output, wrong_snapshots

STEP = 0.01
"""Seconds of a training step beside readers. Of one that thins every few milliseconds a reader never gets hold."""


def train_until_told(
    mine: Connection, tracker: PostHocEMA, network: Network, said: str, first: int = 1, pause: float = 0
) -> None:
    """Train for `first` steps, say what is then so, and train on, with pauses between the steps."""
    for number in count():
        if number == first:
            tracker.flush()
            mine.send((said, tracker.run_id))
        if number >= first and mine.poll(pause):
            break
        network.go_to(tracker.step + 1)
        tracker.update_(network)
    mine.recv()


# --- processes


class Other:
    """A forked process, and what it says."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("fork")
        self._mine, its = context.Pipe()
        self.process = context.Process(target=_work, args=(work, its, *arguments), daemon=True)
        self.process.start()
        its.close()

    def ask(self, *words: object) -> tuple[object, ...]:
        """Tell it something, and wait for the answer."""
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
        """As by SIGKILL."""
        self.process.kill()
        self.process.join()


def _work(work: Callable[..., None], mine: Connection, *arguments: object) -> None:
    logging.getLogger("posthoc_cli").setLevel(logging.ERROR)  # taking over is what is wanted
    warnings.simplefilter("ignore")  # training waits for the disk, as it should
    try:
        work(mine, *arguments)
    except Exception as error:  # noqa: BLE001
        mine.send(("failed", f"{type(error).__name__}: {error}"))


@contextmanager
def refusals(mine: Connection) -> Iterator[None]:
    """Answer with the one error that a second writer may meet."""
    try:
        yield
    except LockedError as error:
        mine.send(("refused", str(error)))


# --- readers beside a training and prunings


def trains(mine: Connection, folder: Path) -> None:
    """Train from "train" to "close", again and again; writes at every third step and keeps six."""
    network = Network()
    while mine.recv() == ("train",):
        with begin(folder, network, checkpoint_every=3, max_checkpoints=6) as tracker:
            train_until_told(mine, tracker, network, "training", 12, STEP)
        mine.send(("closed", tracker.step))


def prunes(mine: Connection, folder: Path) -> None:
    """Prune to so many a profile, whenever told."""
    while True:
        _, keep = mine.recv()
        with refusals(mine):
            pruning = prune(folder, plan_pruning(read_directory(folder), keep=keep))
            mine.send(("pruned", len(pruning.gone)))


class Retries(logging.Handler):
    """Counts the plans that were made again."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "planning again with what is there" in record.getMessage()


def readers(folder: Path, times: int, chance: random.Random) -> Tally:
    """Synthesize `times` times, while a training writes and thins, and while it has stopped and somebody prunes."""
    run, out, tally, retries = folder / "run", folder / "out.safetensors", Tally(), Retries()
    logging.getLogger("posthoc_cli").addHandler(retries)
    training, pruner = Other(trains, run), Other(prunes, run)
    while tally.tried < times:
        answer = training.ask("train")
        if answer[0] != "training":
            tally.missed.append(f"the training: {answer}")
            break
        for _ in range(min(40, times - tally.tried)):
            read_once(tally, run, out, chance)
        answer = pruner.ask("prune", 2)
        if answer[0] != "refused" or f"process {training.process.pid} on " not in str(answer[1]):
            tally.missed.append(f"pruning beside the training {training.process.pid}: {answer}")
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
    """One synthesis of anything, compared with what it says that it was made of."""
    tally.tried += 1
    sigma_rel, earlier = chance.uniform(0.03, 0.28), chance.random() < 0.3

    def plan() -> Plan:
        sources = disk_sources(run)
        t = chance.choice(sources).info.t if earlier else None
        return plan_synthesis(sources, [sigma_rel], t)

    try:
        with_consistent_plan(plan, lambda plan: write_synthesis(plan, [out], OutputOptions(overwrite=True)))
    except PostHocError as error:
        tally.missed.append(f"reading {tally.tried}: {type(error).__name__}: {error}")
    else:
        tally.lost += [f"reading {tally.tried}: {line}" for line in wrong_output(out)]


# --- two writers


def writes(mine: Connection, folder: Path) -> None:
    """Try to become the writer, whenever told; then train until told to close, or killed."""
    network = Network()
    while True:
        if mine.recv() == ("take over",):
            remove_half_begun(folder)
        with refusals(mine):
            with begin(folder, network, checkpoint_every=1, max_checkpoints=4) as tracker:
                train_until_told(mine, tracker, network, "holds")
            mine.send(("closed", tracker.step))


def writers(folder: Path, times: int, chance: random.Random) -> Tally:
    """Two writers meet `times` times: at once, or one beside the other, which is killed then."""
    tally = Tally()
    run = folder / "run"
    while tally.tried < times:
        tally.tried += 1
        first, second = Other(writes, run), Other(writes, run)
        meeting = at_once if chance.random() < 0.3 else one_is_killed
        wrong = meeting(run, first, second, chance)
        tally.lost += [f"meeting {tally.tried}, {meeting.__name__}: {line}" for line in wrong]
        for one in (first, second):
            one.kill()
        shutil.rmtree(run)
    return tally


def at_once(run: Path, first: Other, second: Other, chance: random.Random) -> list[str]:
    """Both begin in the same moment: one of them holds the directory, the other is told so, and comes next."""
    for one in (first, second):
        one.tell("write")
    answers = [one.answer() for one in (first, second)]
    if sorted(str(answer[0]) for answer in answers) != ["holds", "refused"]:
        return [str(answers)]
    if answers[0][0] == "refused":
        first, second, answers = second, first, answers[::-1]
    closed = first.ask("close")
    return ([] if closed[0] == "closed" else [str(closed)]) + taken_over(run, second, answers[0][1], chance)


def one_is_killed(run: Path, first: Other, second: Other, chance: random.Random) -> list[str]:
    """The second one is refused by name as long as the first one lives, and takes over when it was killed."""
    holds, refused = first.ask("write"), second.ask("write")
    if refused[0] != "refused" or f"process {first.process.pid} on " not in str(refused[1]):
        return [f"beside {first.process.pid}: {holds}, {refused}"]
    time.sleep(chance.uniform(0, 0.02))
    first.kill()
    return taken_over(run, second, holds[1], chance)


def taken_over(run: Path, second: Other, run_id: object, chance: random.Random) -> list[str]:
    """What is wrong when the second writer goes on with the first one's run."""
    answer = second.ask("take over")
    time.sleep(chance.uniform(0, 0.01))
    second.kill()
    wrong = [] if answer == ("holds", run_id) else [f"run {run_id} was to go on, and it is {answer}"]
    return wrong + wrong_snapshots(run)
