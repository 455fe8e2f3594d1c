"""Processes that are killed, and several of them in one directory."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

from forked import Forked

from posthoc_cli import Run
from posthoc_cli.snapshots.directory import find_snapshots
from torture import Tally
from torture.training import damaged_files, remove_half_begun, wrong_output
from torture.training import wrong_snapshots as wrong

# --- trainings killed and resumed by their own script

STEPS = 40
TRAIN = f"""
import sys, torch
from pathlib import Path
from torture.training import train
torch.set_num_threads(1)
settings = {{"update_every": 2, "checkpoint_every": 4, "max_checkpoints": int(sys.argv[2]) or None}}
train(Path(sys.argv[1]), {STEPS}, range(8, {STEPS} + 1, 8), rows=7500, **settings)
"""
"""A training with snapshots of 120 kB."""


def killed_trainings(folder: Path, share: float, seed: int) -> Tally:
    """Kill trainings 1,000 times in total; each is killed at random moments until it completes."""
    tally, chance, times = Tally(), random.Random(seed), max(1, round(1_000 * share))
    directory, right, seconds = folder / "killed", {}, 0.0
    for most in (0, 3):
        seconds = -time.monotonic()
        (unkilled := Forked(TRAIN, folder / f"unkilled-{most}", most)).wait()
        seconds += time.monotonic()
        assert unkilled.wait() == 0, unkilled.communicate()
        right[most] = _headers(folder / f"unkilled-{most}")
    while tally.tried < times:
        most, is_killed = chance.choice((0, 3)), True
        while is_killed:
            training = Forked(TRAIN, directory, most)
            if is_killed := tally.tried < times:
                tally.tried += 1
                time.sleep(chance.uniform(0, 1.2 * seconds))
                is_killed = training.poll() is None
                training.kill()
            code, (_, err) = training.wait(), training.communicate()
            where = f"kill {tally.tried}, max_checkpoints={most}"
            tally.lost += [f"{where}: {line}" for line in damaged_files(directory)]
            if code and not is_killed:
                tally.missed.append(f"{where}: the resumed process ended with {code}: {err[-500:]}")
        now, names = _headers(directory), set(right[most])
        if most:  # thinning may have removed snapshots before a kill
            names = {name for name in names if name.startswith(f"{STEPS:016d}")}
        lost = [f"{name} is missing" for name in names - now.keys()]
        other = [name for name in now.keys() & right[most].keys() if now[name] != right[most][name]]
        lost += [f"{name} has another header" for name in other]
        tally.lost += [f"{where}: {line}" for line in (*lost, *wrong(directory))]
        shutil.rmtree(directory)
    return tally


def _headers(directory: Path) -> dict[str, dict[str, object]]:
    """Return the headers by file name, without what differs in a run that continues from rounded averages."""
    unlike = {"run_id", "measurements", "motion", "inherited", "sample", "sketch", "path", "files", "entries"}
    found = {snapshot.path.name: vars(snapshot) for snapshot in find_snapshots(directory)}
    return {name: {key: value for key, value in header.items() if key not in unlike} for name, header in found.items()}


# --- trainings, readers and prunings in one directory

TRAIN_ON = """
import logging, sys, time, warnings
from itertools import count
from pathlib import Path
from posthoc_cli.errors import LockedError
from torture.training import Network, begin
logging.getLogger("posthoc_cli").setLevel(logging.ERROR)  # the warnings about taking over are expected
warnings.simplefilter("ignore")  # as are those that training waits for the disk
run, stop, (first, pause, every, most) = Path(sys.argv[1]), Path(sys.argv[2]), map(float, sys.argv[3:])
network = Network()
try:
    with begin(run, network, checkpoint_every=int(every), max_checkpoints=int(most)) as tracker:
        for number in count():
            if number == first:
                tracker.flush()
                print("trains", tracker.run_id, flush=True)
            if number >= first:
                time.sleep(pause)
                if stop.exists():
                    break
            network.go_to(tracker.step + 1)
            tracker.update_(network)
except LockedError as error:
    print("refused", error, flush=True)
"""
"""A training that says after its first steps that it holds the directory, and goes on until `stop` exists."""

PRUNE = """
import sys
from posthoc_cli import Run
from posthoc_cli.errors import LockedError
try:
    print("pruned", len(Run(sys.argv[1]).prune(keep=int(sys.argv[2])).to_delete))
except LockedError as error:
    print("refused", error)
"""


def readers(folder: Path, share: float, seed: int) -> Tally:
    """Synthesize 1,000 times: while a training writes and thins, and after it while another process prunes."""
    tally, chance, times = Tally(), random.Random(seed), max(1, round(1_000 * share))
    run, stop, out = folder / "run", folder / "stop", folder / "out.safetensors"
    while tally.tried < times:
        stop.unlink(missing_ok=True)
        # If thinning happens every few milliseconds, readers never find a stable plan.
        with Forked(TRAIN_ON, run, stop, 12, 0.01, 3, 6) as training:
            if not training.first_line().startswith("trains"):
                tally.missed.append(f"the training: {training.communicate()}")
                break
            _read(tally, run, out, min(40, times - tally.tried), chance)
            printed, err = Forked(PRUNE, run, 2).communicate()
            if f"process {training.pid} on " not in printed:
                tally.missed.append(f"pruning during the training {training.pid}: {printed}{err}")
            stop.touch()
            if training.wait():
                tally.missed.append(f"the training: {training.communicate()}")
        pruning = Forked(PRUNE, run, chance.randint(1, 5))
        _read(tally, run, out, min(5, times - tally.tried), chance)
        printed, err = pruning.communicate()
        if not printed.startswith("pruned"):
            tally.missed.append(f"pruning after the training: {printed}{err}")
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


def writers(folder: Path, share: float, seed: int) -> Tally:
    """Start two writers 300 times: one holds the directory, the other is refused; a third takes over when it ends."""
    tally, chance = Tally(), random.Random(seed)
    run, stop = folder / "run", folder / "stop"
    for number in range(max(1, round(300 * share))):
        tally.tried += 1
        stop.unlink(missing_ok=True)
        both = [Forked(TRAIN_ON, run, stop, 1, 0, 1, 4) for _ in range(2)]
        lines = {process.first_line(): process for process in both}
        refused, holds = sorted(lines)[0], sorted(lines)[-1]
        holder, wrongs = lines[holds], []
        if not holds.startswith("trains") or f"process {holder.pid} on " not in refused:
            wrongs.append(f"{holds}, {refused}")
        if is_killed := chance.random() < 0.7:
            time.sleep(chance.uniform(0, 0.02))
            holder.kill()
        stop.touch()
        wrongs += [f"{process.communicate()}" for process in both if process.wait() and process is not holder]
        stop.unlink()
        remove_half_begun(run)
        with Forked(TRAIN_ON, run, stop, 1, 0, 1, 4) as third:
            if (answer := third.first_line()) != holds:
                wrongs.append(f"{holds} was to be resumed: {answer}")
            time.sleep(chance.uniform(0, 0.01))
        tally.lost += [f"meeting {number}, killed: {is_killed}: {line}" for line in (*wrongs, *wrong(run))]
        shutil.rmtree(run)
    return tally
