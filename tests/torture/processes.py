"""Trainings, single and sharded, that are killed, and several processes in one directory."""

import itertools
import random
import shutil
import time

from factories import snapshots_in
from forked import EMA, Forked, program
from groups import SETTINGS, start_group, truth

from posthoc_cli import Run
from torture.training import (
    SIGMA_RELS,
    Tally,
    away,
    remove_half_begun,
    wrong_output,
    wrong_snapshots,
)

# --- trainings killed and resumed by their own script

STEPS = 40
TRAIN = f"""
import sys, torch
from pathlib import Path
from torture.training import train

torch.set_num_threads(1)
settings = {{"update_every": 2, "checkpoint_every": 4, "max_checkpoints": int(sys.argv[2]) or None}}
saves = range(8, {STEPS} + 1, 8)
train(Path(sys.argv[1]), {STEPS}, saves, **settings)
"""


def killed_trainings(folder, share, seed):
    """Kill trainings 1,000 times in total; each is killed at random moments until it completes."""
    return Kills(SingleTraining(folder / "run"), seed).count(1_000 * share)


class SingleTraining:
    """A training by one process in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def start(self, most):
        """Start or resume it, with a number of snapshots a profile, 0 for all."""
        return "alone", [Forked(TRAIN, self.folder, most)]

    def wrong(self, most, is_complete):
        """Return what is wrong, given that number and whether the training is complete."""
        first = STEPS if most else 4  # the others may be thinned
        due = range(first, STEPS + 1, 4) if is_complete else ()
        return [*wrong_snapshots(self.folder), *_missing(self.folder, SIGMA_RELS, due)]


class Kills:
    """Kills of processes of trainings at random moments; each training is resumed until it
    completes."""

    def __init__(self, training, seed):
        self.tally = Tally()
        self.chance = random.Random(seed)
        self.training = training
        self.seconds = 0.0  # of a training without a kill

    def count(self, times):
        """Kill so many times, at least once."""
        Forked("").wait()  # starts the server of processes
        started = time.monotonic()
        _, processes = self.training.start(0)
        _end(processes, 180)
        self.seconds = time.monotonic() - started
        self.tally.lost += self.training.wrong(0, True)
        shutil.rmtree(self.training.folder)
        times = max(1, round(times))
        while self.tally.tried < times and not self.tally.missed:
            most = self.chance.choice((0, 3))
            while self._ends_early(most, is_killed=self.tally.tried < times):
                pass
            shutil.rmtree(self.training.folder)
        return self.tally

    def _ends_early(self, most, is_killed):
        """Run a training until it ends; return whether it has to be resumed."""
        kind, processes = self.training.start(most)
        if is_killed:
            self.tally.tried += 1
            time.sleep(self.chance.uniform(0.0, 1.1) * self.seconds)
            self.chance.choice(processes).kill()
        codes = _end(processes, 10 if is_killed else 180)
        is_complete = not any(codes)
        where = f"kill {self.tally.tried}, {kind}, max_checkpoints={most}"
        for line in self.training.wrong(most, is_complete):
            self.tally.lost.append(f"{where}: {line}")
        # of several processes the others may fail without the killed one
        may_fail = is_killed and (len(codes) > 1 or codes[0] < 0)
        if is_complete or may_fail:
            return not is_complete
        errors = [process.communicate()[1][-500:] for process in processes]
        self.tally.missed.append(f"{where}: the training ended with {codes}: {errors}")
        return False


def _end(processes, patience):
    """Wait for all processes, kill those that are left, as a launcher does, and return the exit
    codes."""
    until = time.monotonic() + patience
    for process in processes:
        process.poll(max(0.0, until - time.monotonic()))
    for process in processes:
        process.kill()
    return [process.wait() for process in processes]


def _missing(run, sigma_rels, steps):
    found = {(snapshot.step, snapshot.sigma_rel) for snapshot in snapshots_in(run)}
    missing = {*itertools.product(steps, sigma_rels)} - found
    return [f"sigma_rel {sigma_rel} at {step} is missing" for step, sigma_rel in sorted(missing)]


# --- sharded trainings of which one process is killed, resumed by other numbers of processes

LAST = 24
SPREAD = (
    ("fsdp", 1),
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp", 4),
    ("tp", 2),
    ("hsdp", 4),
    ("fsdp-tp", 4),
)
TRAIN_SHARDED = f"""
kind, most = arguments
model = spread(Net(), kind)
restore(model, folder / "run")
most = int(most) or None
with PostHocEMA.from_model(
    model, folder / "run", **SETTINGS, max_checkpoints=most, resume="auto"
) as ema:
    for step in range(ema.step + 1, {LAST} + 1):
        train(model, step, step, ema)
        if step % 4 == 0:
            ema.flush()
        dist.barrier()  # in place of the training's own collectives
        if step % 4 == 0 and rank == 0:
            (folder / "durable").write_text(str(step))
"""


def killed_ranks(folder, share, seed):
    """Kill any one process, 100 times in total; each training is resumed in other processes until
    it completes."""
    return Kills(ShardedTraining(folder / "killed", seed), seed).count(100 * share)


class ShardedTraining(SingleTraining):
    """A training by several processes in a folder, which are others each time."""

    def __init__(self, folder, seed):
        super().__init__(folder)
        self.chance = random.Random(seed)

    def start(self, most):
        kind, ranks = self.chance.choice(SPREAD)
        processes = start_group(TRAIN_SHARDED, ranks, self.folder, kind, most)
        return f"{kind} on {ranks}", processes

    def wrong(self, most, is_complete):
        due = [LAST] if is_complete else []
        note = self.folder / "durable"  # the last step whose snapshots are
        if not most and note.exists():
            due = range(4, int(note.read_text() or 0) + 1, 4)
        run = self.folder / "run"
        lines = _missing(run, SETTINGS["sigma_rels"], due) if run.exists() else []
        for snapshot in snapshots_in(run):
            exact = truth(snapshot.sigma_rel, range(2, snapshot.step + 1, 2))
            with snapshot:
                for name, right in exact.items():
                    # A float32 average is rounded once when stored, and each time that a training
                    # is resumed from it.
                    what = f"{snapshot.path.name}: {name}"
                    lines += away(what, snapshot.tensor(name).numpy(), right.numpy(), 1e-6)
        return lines


# --- trainings, readers and prunings in one directory

TRAIN_ON = program("training_that_goes_on")
"""A training that says after its first steps that it holds the directory, and goes on until `stop`
exists."""


def readers(folder, share, seed):
    """Synthesize 1,000 times: while a training writes and thins, and after it while another process
    prunes."""
    tally = Tally()
    chance = random.Random(seed)
    times = max(1, round(1_000 * share))
    run = folder / "run"
    stop = folder / "stop"
    out = folder / "out.safetensors"

    def read(most):
        for _ in range(min(most, times - tally.tried)):
            tally.tried += 1
            with tally.judged(f"reading {tally.tried}", refusable=False):
                Run(run).write(chance.uniform(0.03, 0.28), out, overwrite=True)
                tally.lost += [f"reading {tally.tried}: {line}" for line in wrong_output(out)]

    while tally.tried < times:
        stop.unlink(missing_ok=True)
        # If thinning happens every few milliseconds, readers never find a stable plan.
        with Forked(TRAIN_ON, run, stop, 12, 0.01, 3, 6) as training:
            if not training.first_line().startswith("trains"):
                tally.missed.append(f"the training: {training.communicate()}")
                break
            read(40)
            stop.touch()
            if training.wait():
                tally.missed.append(f"the training: {training.communicate()}")
        pruning = Forked(EMA, "prune", run, "--keep", chance.randint(1, 5), "--yes")
        read(5)
        if pruning.wait():
            tally.missed.append(f"pruning after the training: {pruning.communicate()}")
        tally.lost += wrong_snapshots(run)
    return tally


def writers(folder, share, seed):
    """Start two writers 300 times: one holds the directory, the other is refused; a third takes
    over when it ends."""
    tally = Tally()
    chance = random.Random(seed)
    run = folder / "run"
    stop = folder / "stop"
    for number in range(max(1, round(300 * share))):
        tally.tried += 1
        stop.unlink(missing_ok=True)
        processes = [Forked(TRAIN_ON, run, stop, 1, 0, 1, 4) for _ in range(2)]
        both = {process.first_line(): process for process in processes}
        refused = min(both)
        holds = max(both)
        holder = both[holds]
        wrongs = []
        if not holds.startswith("trains") or f"process {holder.pid} on " not in refused:
            wrongs.append(f"{holds}, {refused}")
        is_killed = chance.random() < 0.7
        if is_killed:
            time.sleep(chance.uniform(0, 0.02))
            holder.kill()
        stop.touch()
        for process in processes:
            if process.wait() and not (is_killed and process is holder):
                wrongs.append(f"{process.communicate()}")
        stop.unlink()
        remove_half_begun(run)
        with Forked(TRAIN_ON, run, stop, 1, 0, 1, 4) as third:
            answer = third.first_line()
            if answer != holds:
                wrongs.append(f"{holds} was to be resumed: {answer}")
            time.sleep(chance.uniform(0, 0.01))
        wrongs += wrong_snapshots(run)
        tally.lost += [f"meeting {number}, killed: {is_killed}: {line}" for line in wrongs]
        shutil.rmtree(run)
    return tally
