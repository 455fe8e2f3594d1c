"""Processes that are killed, and several of them in one directory; each runs forked from one that has loaded torch."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import warnings
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import forked
import torch

from posthoc_cli import Run
from posthoc_cli.errors import LockedError
from posthoc_cli.snapshots.directory import find_snapshots
from torture import Tally
from torture.training import Network, begin, damaged_files, remove_half_begun, train, weights_up_to, wrong_output
from torture.training import wrong_snapshots as wrong

PATIENCE = 60.0
"""The seconds after which a process that should have ended or answered is considered to hang."""


def apart(name: str, most: int, folder: Path, share: float, seed: int) -> Tally:
    """Run an experiment of this module up to `most` times in a process that has loaded torch."""
    times = max(1, round(most * share))
    process = forked.Forked("from torture.processes import run_alone; run_alone()", name, folder, times, seed)
    out, err = process.communicate(timeout=1e6)
    assert process.returncode == 0, err
    return Tally(**json.loads(out))


def run_alone() -> None:
    """Run the experiment named on the command line, in the process that `apart` has started."""
    name, folder, times, seed = sys.argv[1:]
    torch.set_num_threads(1)  # before a thread pool exists: forked children would lack its threads
    gc.collect()
    gc.freeze()  # else the garbage collector of a forked child would touch, and so copy, all loaded objects
    print(json.dumps(vars(globals()[name](Path(folder), int(times), random.Random(int(seed))))))


# --- trainings killed and resumed by their own script

STEPS, ROWS = 40, 7500
"""The rows of the network make each snapshot 120 kB."""


def killed_trainings(folder: Path, times: int, chance: random.Random) -> Tally:
    """Kill trainings `times` times in total; each is killed at random moments until it completes."""
    tally, directory, err = Tally(), folder / "killed", folder / "err"
    weights_up_to(STEPS, 4 * ROWS)  # computed once, before the children are forked

    def work(directory: Path, most: int | None) -> None:
        train(
            directory,
            STEPS,
            range(8, STEPS + 1, 8),
            rows=ROWS,
            max_checkpoints=most,
            update_every=2,
            checkpoint_every=4,
        )

    right, seconds = {}, 0.0
    for most in (None, 3):
        seconds = -time.monotonic()
        assert _forked(partial(work, folder / f"unkilled-{most}", most), None, err) == 0, err.read_text()
        seconds += time.monotonic()
        right[most] = _headers(folder / f"unkilled-{most}")
    while tally.tried < times:
        most, code = chance.choice((None, 3)), -signal.SIGKILL
        while code == -signal.SIGKILL:
            after = chance.uniform(0, 1.2 * seconds) if tally.tried < times else None
            code = _forked(partial(work, directory, most), after, err)
            tally.tried += after is not None
            where = f"kill {tally.tried}, max_checkpoints={most}"
            tally.lost += [f"{where}: {line}" for line in damaged_files(directory)]
        if code:
            tally.missed.append(f"{where}: the resumed process ended with {code}: {err.read_text()[-500:]}")
        now, names = _headers(directory), set(right[most])
        if most is not None:  # thinning may have removed snapshots before a kill
            names = {name for name in names if name.startswith(f"{STEPS:016d}")}
        lost = [f"{name} is missing" for name in names - now.keys()]
        lost += [
            f"{name} has another header" for name in now.keys() & right[most].keys() if now[name] != right[most][name]
        ]
        tally.lost += [f"{where}: {line}" for line in (*lost, *wrong(directory))]
        shutil.rmtree(directory)
    return tally


def _forked(work: partial[None], after: float | None, err: Path) -> int:
    """Do `work` in a child, which gets SIGKILL after `after` seconds if given; return its exit code."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        work()
        sys.exit(0)  # through the top of the program, as every Python process ends
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    until = time.monotonic() + PATIENCE
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            until += PATIENCE
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(done[1])


def _headers(directory: Path) -> dict[str, dict[str, object]]:
    """Return the headers by file name, without what differs in a run that continues from rounded averages."""
    unlike = {"run_id", "measurements", "motion", "inherited", "sample", "sketch", "path", "files", "entries"}
    found = {snapshot.path.name: vars(snapshot.info) for snapshot in find_snapshots(directory)}
    return {name: {key: value for key, value in header.items() if key not in unlike} for name, header in found.items()}


# --- trainings, readers and prunings in one directory


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

    def tell(self, *words: object) -> None:
        self._mine.send(words)

    def answer(self) -> tuple[object, ...]:
        try:
            return tuple(self._mine.recv()) if self._mine.poll(PATIENCE) else ("hangs",)
        except EOFError:
            return ("died",)

    def ask(self, *words: object) -> tuple[object, ...]:
        self.tell(*words)
        return self.answer()

    def kill(self) -> None:
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
                answer = "pruned", len(Run(folder).prune(keep=keep[0]).to_delete)
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


def readers(folder: Path, times: int, chance: random.Random) -> Tally:
    """Synthesize `times` times: while a training writes and thins, and after it while another process prunes."""
    run, tally = folder / "run", Tally()
    # If thinning happens every few milliseconds, readers never find a stable plan.
    training = Other(run, first=12, pause=0.01, checkpoint_every=3, max_checkpoints=6)
    pruner = Other(run)
    while tally.tried < times:
        answer = training.ask("train")
        if answer[0] != "trains":
            tally.missed.append(f"the training: {answer}")
            break
        _read(tally, run, folder / "out.safetensors", min(40, times - tally.tried), chance)
        answer = pruner.ask("prune", 2)
        if not training.is_named_by(answer):
            tally.missed.append(f"pruning during the training {training.process.pid}: {answer}")
        training.ask("close")
        pruner.tell("prune", chance.randint(1, 5))
        _read(tally, run, folder / "out.safetensors", min(5, times - tally.tried), chance)
        answer = pruner.answer()
        if answer[0] != "pruned":
            tally.missed.append(f"pruning after the training: {answer}")
        tally.lost += wrong(run)
    return tally


def _read(tally: Tally, run: Path, out: Path, times: int, chance: random.Random) -> None:
    """Synthesize random targets, and compare outputs with the snapshots and coefficients that they name."""
    for _ in range(times):
        tally.tried += 1
        try:
            Run(run).write(chance.uniform(0.03, 0.28), out, overwrite=True)
        except Exception as error:  # noqa: BLE001 - no error may come
            tally.missed.append(f"reading {tally.tried}: {type(error).__name__}: {error}")
        else:
            tally.lost += [f"reading {tally.tried}: {line}" for line in wrong_output(out)]


def writers(folder: Path, times: int, chance: random.Random) -> Tally:
    """Start two writers `times` times: one holds the directory, the other is refused, and takes over when that ends."""
    tally, run = Tally(), folder / "run"
    for number in range(times):
        tally.tried += 1
        first, second = both = [Other(run, checkpoint_every=1, max_checkpoints=4) for _ in range(2)]
        if is_killed := chance.random() < 0.7:
            holds, refused = first.ask("train"), second.ask("train")
        else:
            for writer in both:
                writer.tell("train")
            holds, refused = (writer.answer() for writer in both)
            if holds[0] == "refused":
                first, second, holds, refused = second, first, refused, holds
        lines = [] if holds[0] == "trains" and first.is_named_by(refused) else [f"{holds}, {refused}"]
        if is_killed:
            time.sleep(chance.uniform(0, 0.02))
            first.kill()
        elif first.ask("close")[0] != "closed":
            lines.append("the holder did not close")
        remove_half_begun(run)
        answer = second.ask("train")
        time.sleep(chance.uniform(0, 0.01))
        second.kill()
        first.kill()
        lines += [] if answer == ("trains", holds[-1]) else [f"run {holds[-1]} was to be resumed: {answer}"]
        tally.lost += [f"meeting {number}, killed: {is_killed}: {line}" for line in (*lines, *wrong(run))]
        shutil.rmtree(run)
    return tally
