"""Runs in a process of its own, with torch loaded: trainings, readers and prunings that meet in one directory.

Its arguments: readers FOLDER COUNT SEED, or writers FOLDER COUNT SEED.

What the network is at every step follows from the step alone, so that whatever comes out can be computed a second
time, by the formulas. Prints one JSON object.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from factories import FloatArray, exact_gamma, exact_weights
from safetensors.numpy import load_file

from posthoc_cli import PostHocEMA, disk_sources, plan_synthesis
from posthoc_cli.errors import LockedError, PostHocError
from posthoc_cli.export.outputs import write_synthesis
from posthoc_cli.snapshots.directory import find_snapshots, read_directory
from posthoc_cli.snapshots.outputs import decode_output
from posthoc_cli.snapshots.pruning import plan_pruning, prune
from posthoc_cli.snapshots.reader import read_header
from posthoc_cli.synthesis.engine import Options
from posthoc_cli.synthesis.plan import Plan, with_consistent_plan
from torture.tally import Tally

SIGMA_RELS = (0.05, 0.28)
ELEMENTS = 6
LARGEST = 2.0
UNIT = 2.0**-24
"""Rounding of one float32, relative."""

PATIENCE = 60.0
"""Seconds after which a process that should have answered is taken to hang."""

STEP = 0.01
"""Seconds of a training step beside readers. Of one that thins every few milliseconds a reader never gets hold."""

# --- a training, twice


class Vector(torch.nn.Module):
    """The smallest network."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(ELEMENTS))

    def go_to(self, step: int) -> None:
        """Be what the network is after a step."""
        with torch.no_grad():
            self.w.copy_(torch.from_numpy(weights_up_to(step)[-1]))


def weights_up_to(step: int) -> FloatArray:
    """What the network is after the steps 1 to `step`, at most `LARGEST`: shape [step, ELEMENTS], float32 values."""
    size = -(-step // 4096) * 4096
    return _weights(size)[:step]


@lru_cache(maxsize=4)
def _weights(steps: int) -> FloatArray:
    phase = np.arange(1, steps + 1)[:, None] * np.arange(1, ELEMENTS + 1)
    return (np.sin(0.37 * phase) + np.cos(0.011 * phase)).astype(np.float32).astype(np.float64)


def exact_snapshot(step: int, sigma_rel: float) -> tuple[FloatArray, float]:
    """The average at a step, and how far a float32 one may be from it.

    An update rounds a difference, a product and a sum, less than 3 units of the largest value; what it leaves at step k
    fades like (k / step)^(gamma + 1) until then.
    """
    value = exact_weights(sigma_rel, range(1, step + 1)) @ weights_up_to(step)
    return value, 3 * UNIT * LARGEST * (step / (exact_gamma(sigma_rel) + 2) + 1)


def tracker_in(folder: Path, model: Vector, **settings: object) -> PostHocEMA:
    """One that goes on with what is there, or begins."""
    if {snapshot.info.sigma_rel for snapshot in find_snapshots(folder)} == set(SIGMA_RELS):
        return PostHocEMA.from_path(folder, model)
    return PostHocEMA.from_model(
        model, folder, sigma_rels=SIGMA_RELS, update_every=1, checkpoint_dtype=torch.float32, **settings
    )


def step_on(tracker: PostHocEMA, model: Vector) -> None:
    """One step of the training."""
    model.go_to(tracker.step + 1)
    tracker.update_(model)


def wrong_snapshots(folder: Path) -> list[str]:
    """Snapshots that are not the averages that they say they are, and runs that are more than one."""
    wrong = []
    for snapshot in read_directory(folder):  # raises where two runs are mixed
        exact, tolerance = exact_snapshot(snapshot.info.step, snapshot.info.sigma_rel)
        away = float(np.abs(load_file(snapshot.path)["w"] - exact).max())
        if away > tolerance:
            wrong.append(f"{snapshot.path.name}: is {away:.2g} away from the average, more than {tolerance:.2g}")
    return wrong


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
    model = Vector()
    while mine.recv() == ("train",):
        with tracker_in(folder, model, checkpoint_every=3, max_checkpoints=6) as tracker:
            for _ in range(12):
                step_on(tracker, model)
            tracker.flush()
            mine.send(("training", tracker.step))
            while not mine.poll(STEP):
                step_on(tracker, model)
            mine.recv()
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


def readers(folder: Path, count: int, chance: random.Random) -> Tally:
    """Synthesize `count` times, while a training writes and thins, and while it has stopped and somebody prunes."""
    run, out, tally, retries = folder / "run", folder / "out.safetensors", Tally(), Retries()
    logging.getLogger("posthoc_cli").addHandler(retries)
    training, pruner = Other(trains, run), Other(prunes, run)
    while tally.tried < count:
        answer = training.ask("train")
        if answer[0] != "training":
            tally.missed.append(f"the training: {answer}")
            break
        for _ in range(min(40, count - tally.tried)):
            read_once(tally, run, out, chance)
        answer = pruner.ask("prune", 2)
        if answer[0] != "refused" or f"process {training.process.pid} on " not in str(answer[1]):
            tally.missed.append(f"pruning beside the training {training.process.pid}: {answer}")
        training.ask("close")
        pruner.tell("prune", chance.randint(1, 5))
        for _ in range(min(5, count - tally.tried)):
            read_once(tally, run, out, chance)
        answer = pruner.answer()
        if answer[0] != "pruned":
            tally.missed.append(f"pruning after the training: {answer}")
        tally.lost += wrong_snapshots(run)
    if count >= 500 and not retries.count:
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
        with_consistent_plan(plan, lambda plan: write_synthesis(plan, [out], Options(overwrite=True)))
        info = decode_output(out, read_header(out))
    except PostHocError as error:
        tally.missed.append(f"reading {tally.tried}: {type(error).__name__}: {error}")
        return
    exact, tolerance = np.zeros(ELEMENTS), 0.0
    for name, coefficient in info.snapshots:
        clock, _, own = name.removesuffix(".safetensors").partition("-")
        value, away = exact_snapshot(int(clock), float(own))
        exact += coefficient * value
        tolerance += abs(coefficient) * (away + (len(info.snapshots) + 1) * UNIT * LARGEST)
    away = float(np.abs(load_file(out)["w"] - exact).max())
    if away > tolerance or abs(sum(c for _, c in info.snapshots) - 1) > 1e-9:
        tally.lost.append(f"reading {tally.tried}: {away:.2g} away from what it is made of, more than {tolerance:.2g}")


# --- two writers


def writes(mine: Connection, folder: Path) -> None:
    """Try to become the writer, whenever told; then train until told to close, or killed."""
    model = Vector()
    while True:
        if mine.recv() == ("take over",) and is_half_begun(folder):
            for snapshot in find_snapshots(folder):
                snapshot.path.unlink()
        with refusals(mine):
            with tracker_in(folder, model, checkpoint_every=1, max_checkpoints=4) as tracker:
                step_on(tracker, model)
                tracker.flush()
                mine.send(("holds", tracker.run_id))
                while not mine.poll():
                    step_on(tracker, model)
                mine.recv()
            mine.send(("closed", tracker.step))


def is_half_begun(folder: Path) -> bool:
    """Whether a training was killed while it wrote its first snapshots: there is nothing to go on from."""
    return len({snapshot.info.sigma_rel for snapshot in find_snapshots(folder)}) == 1


def writers(folder: Path, count: int, chance: random.Random) -> Tally:
    """Two writers meet `count` times: at once, or one beside the other, which is killed then."""
    tally = Tally()
    run = folder / "run"
    while tally.tried < count:
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


EXPERIMENTS = {"readers": readers, "writers": writers}

if __name__ == "__main__":
    torch.set_num_threads(1)  # before anything starts a pool of threads, which no fork would have
    name, where, number, seed = sys.argv[1:]
    found = EXPERIMENTS[name](Path(where), int(number), random.Random(int(seed)))
    print(json.dumps(vars(found)))
