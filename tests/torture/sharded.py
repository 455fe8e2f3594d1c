"""Sharded trainings: one process is killed or has a full disk, or two jobs use one directory.

Parameters follow a walk that is known in advance, so that every average has one correct value, whichever job writes it.
"""

from __future__ import annotations

import random
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from forked import Forked
from groups import SETTINGS, alone, check_group, run_group, start_group, truth

from posthoc_cli import Run
from posthoc_cli.integrations import STATE_NAME
from posthoc_cli.snapshots.directory import find_snapshots
from torture import Tally

STEPS = 24
SIGMA_RELS = SETTINGS["sigma_rels"]
SPREAD = (("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("tp", 2), ("hsdp", 4), ("fsdp-tp", 4))
PATIENCE = 180.0
"""The seconds, on a busy machine, within which the other processes end when one has died."""

TRAIN = f"""
from posthoc_cli.integrations import read_state, write_state
kind, most, *saves = arguments
model = spread(Net(), kind)
restore(model, folder / "run")
(folder / f"durable-{{rank}}").write_text("0")
most = None if most == "None" else int(most)
with PostHocEMA.from_model(model, folder / "run", **SETTINGS, max_checkpoints=most, resume="auto") as ema:
    if saves:
        read_state(ema, folder)
    for step in range(ema.step + 1, {STEPS} + 1):
        train(model, step, step, ema)
        if step % 4 == 0:
            ema.flush()
            (folder / f"durable-{{rank}}").write_text(str(step))
        if saves and step % int(saves[0]) == 0:
            write_state(ema, folder, model)
            (folder / f"saved-{{rank}}").write_text(str(step))
        dist.barrier()  # in place of the training's own collectives
"""

Values = Mapping[str, torch.Tensor]
Found = dict[str, dict[str, torch.Tensor]]
"""The complete tensors of each complete snapshot, by file name without suffix."""


def read(directory: Path) -> Found:
    """Read the snapshots in a directory."""
    found = {}
    for snapshot in find_snapshots(directory) if directory.exists() else []:
        with snapshot:
            found[snapshot.path.name.removesuffix(".safetensors")] = {n: snapshot.tensor(n) for n in snapshot.entries}
    return found


def in_one_process(directory: Path, most: int | None) -> Found:
    """Return what an uninterrupted training in one process writes that resumes the run in a directory."""
    alone(directory, STEPS, max_checkpoints=most, resume="auto")
    return read(directory)


@lru_cache(maxsize=100)
def exact(t: int, sigma_rel: float) -> Values:
    """Return the averages of all updates up to t, by the formula."""
    return truth(sigma_rel, list(range(2, t + 1, 2)))


def wrong_averages(found: Mapping[str, Values]) -> list[str]:
    """Return a line for each tensor that differs from the average that its snapshot claims."""
    wrong = []
    for snapshot, values in found.items():
        t, _, sigma_rel = snapshot.partition("-")
        for name, right in exact(int(t), float(sigma_rel)).items():
            # A float32 average is rounded once when stored, and each time that a training is resumed from it.
            if not torch.allclose(values[name].double(), right, rtol=0, atol=1e-6 * float(right.abs().max())):
                wrong.append(f"{snapshot}: {name} is not the average")
    return wrong


def differing(found: Mapping[str, Values], right: Mapping[str, Values]) -> list[str]:
    """Return a line for each tensor that has different bits in two sets of snapshots."""
    return [
        f"{snapshot}: {name} has other bits"
        for snapshot in found.keys() & right.keys()
        for name, value in found[snapshot].items()
        if not torch.equal(value, right[snapshot][name])
    ]


def missing(found: Mapping[str, Values], last: int = STEPS, first: int = 4) -> list[str]:
    """Return a line for each missing snapshot of the schedule."""
    names = [f"{t:016d}-{sigma_rel}" for t in range(first, last + 1, 4) for sigma_rel in SIGMA_RELS]
    return [f"{name} is missing" for name in names if name not in found]


# --- one process is killed


def killed_ranks(folder: Path, share: float, seed: int) -> Tally:
    """Kill any one process, 100 times in total; each training is resumed in other processes until it completes.

    Some trainings save their state and continue exactly from it; others are resumed from snapshots.
    """
    started = time.monotonic()
    run_group(TRAIN, 2, folder / "unkilled", "fsdp", None)
    seconds = time.monotonic() - started
    uninterrupted, shadow, place = in_one_process(folder / "uninterrupted", None), folder / "shadow", folder / "killed"
    average = Run(folder / "uninterrupted").average(0.15, method="paper")
    tally, chance, times = Tally(), random.Random(seed), max(1, round(100 * share))
    while tally.tried < times:
        most, saves, durable, codes = chance.choice((None, 3)), chance.choice(((), (3,), (5,))), 0, [1]
        while any(codes):
            is_last = tally.tried >= times  # runs to the end
            tally.tried += not is_last
            kind, ranks = chance.choice((*SPREAD, ("fsdp", 1)))
            where = f"kill {tally.tried}, {kind} on {ranks}, max_checkpoints={most}"
            saved = saved_step(place / STATE_NAME)
            if saves and saved is None:  # nothing was saved: the training starts over
                shutil.rmtree(place, ignore_errors=True)
            for note in (*place.glob("saved-*"), *place.glob("durable-*")):
                note.unlink()
            before = read(place / "run")
            if before and not saves:
                shutil.copytree(place / "run", shadow)
            processes = start_group(TRAIN, ranks, place, kind, most, *saves)
            if not is_last:
                time.sleep(chance.uniform(0.2, 1.0) * seconds)
                chance.choice(processes).kill()
            codes = end(processes, PATIENCE if is_last else 10)
            now, right = read(place / "run"), uninterrupted if saves else before | in_one_process(shadow, most)
            shutil.rmtree(shadow, ignore_errors=True)
            durable = max(durable, noted(place, "durable", ranks))
            if most is None and not saves:
                gone = [*missing(now, durable), *(f"{name} is gone" for name in before.keys() - now.keys())]
                tally.lost += [f"{where}: was durable: {line}" for line in gone]
            least = max(saved or 0, noted(place, "saved", ranks))
            if (step := saved_step(place / STATE_NAME) or 0) < least:
                tally.lost.append(f"{where}: the state of step {least} was durable, and is of step {step}")
            tally.lost += [f"{where}: {line}" for line in [*differing(now, right), *wrong_averages(now)]]
            if is_last and any(codes):
                errors = [process.communicate()[1][-300:] for process in processes]
                tally.missed.append(f"{where}: the resumed job ended with {codes}: {errors}")
                break
        # Thinning may have removed earlier snapshots before a kill.
        tally.lost += [f"{where}: {line}" for line in missing(now, first=4 if most is None else STEPS)]
        if saves and now.keys() == uninterrupted.keys():
            made = Run(place / "run").average(0.15, method="paper")
            tally.lost += [f"{where}: {line}" for line in differing({"": made}, {"": average})]
        shutil.rmtree(place)
    return tally


def noted(place: Path, what: str, ranks: int) -> int:
    """Return the last step that every process has noted as durable, or saved."""
    notes = [int(note.read_text() or 0) for note in place.glob(f"{what}-*")]
    return min(notes) if len(notes) == ranks else 0


def saved_step(state: Path) -> int | None:
    """Return the step of a state; None if it does not exist."""
    if not state.is_dir():
        return None
    found = {"step": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=state)
    return found["step"]


def end(processes: list[Forked], patience: float) -> list[int]:
    """Wait for all processes, kill those that are left, as a launcher does, and return the exit codes."""
    until = time.monotonic() + patience
    for process in processes:
        process.poll(max(0.0, until - time.monotonic()))
    for process in processes:
        process.kill()
    return [process.wait() for process in processes]


# --- one process meets a full disk

FULL = f"""
from posthoc_cli import files
from torture.faults import Faulty
kind, victim, at = arguments
model = spread(Net(), kind)
restore(model, folder / "run")
files.system = system = Faulty(int(at) if rank == int(victim) else None, "full")
errors, stop = [], False
try:
    with PostHocEMA.from_model(model, folder / "run", **SETTINGS, resume="auto") as ema:
        for step in range(ema.step + 1, {STEPS} + 1):
            try:
                train(model, step, step, ema)
                if step % 8 == 0:
                    ema.flush()
            except PostHocError as error:
                errors.append(error)
            stop = torch.tensor(len(errors))
            dist.all_reduce(stop)  # no process trains on alone
            if stop:
                break
except PostHocError as error:
    errors.append(error)
print(bool(stop), *(f"{{type(error).__name__}}: {{error}}" for error in errors), sep="\\n")
"""
OPERATIONS = 200
"""The least number of file operations of a process."""


def full_disks(folder: Path, share: float, seed: int) -> Tally:
    """Fill the disk for one process from one of its operations on; the others learn of it, and all start again."""
    tally, chance = Tally(), random.Random(seed)
    for _ in range(max(1, round(60 * share))):
        place, victim, at = folder / "full", chance.randrange(3), chance.randrange(OPERATIONS)
        where, tally.tried = f"rank {victim} at operation {at}", tally.tried + 1
        outs = [out.splitlines() for out in check_group(FULL, 3, place, "fsdp", victim, at)]
        for rank, (stopped, *errors) in enumerate(outs):
            if not errors and (stopped == "True" or (rank == victim and max(map(len, outs)) > 1)):
                tally.missed.append(f"{where}: rank {rank} raised nothing")
            wanted = "no space left" if rank == victim else f"RankError: rank {victim}: "
            tally.missed += [f"{where}: rank {rank} raised {line}" for line in errors if wanted not in line]
        # Training is resumed from the newest time that has all averages; later snapshots are set aside.
        found = read(place / "run")
        times = Counter(name[:16] for name in found)
        before = {name: values for name, values in found.items() if times[name[:16]] == 2}
        tally.lost += [f"{where}: {path.name} is left" for path in place.rglob(".ema-*.tmp")]
        kind, ranks = chance.choice(SPREAD)
        outs = [out.splitlines() for out in check_group(FULL, ranks, place, kind, -1, -1)]
        now = read(place / "run")
        wrong = [*(line for out in outs for line in out[1:]), *wrong_averages(now), *differing(now, before)]
        wrong += [*missing(now), *(f"{name} is gone" for name in before.keys() - now.keys())]
        tally.lost += [f"{where}, resumed with {kind} on {ranks}: {line}" for line in wrong]
        shutil.rmtree(place)
    return tally


# --- two jobs in one directory

WAITING = "import time\nfrom posthoc_cli.tracker import processes\nprocesses.PATIENCE = 10" + TRAIN.replace(
    "        if step % 4",
    "        while step > 12 and not (folder / 'go').exists():\n            time.sleep(0.01)\n        if step % 4",
)


def two_jobs(folder: Path, share: float, seed: int) -> Tally:
    """Start two jobs in one directory: one of them holds it until it ends, and the other is refused."""
    tally, chance = Tally(), random.Random(seed)
    for _ in range(max(1, round(18 * share))):
        place, tally.tried = folder / "jobs", tally.tried + 1
        spread, jobs = [chance.choice(SPREAD) for _ in range(2)], []
        for kind, ranks in spread:
            jobs.append(start_group(WAITING, ranks, place, kind, None))
            time.sleep(chance.choice((0.0, 1.0)))
        where, until = f"meeting {tally.tried} of {spread}", time.monotonic() + PATIENCE
        while (running := [any(process.poll() is None for process in job) for job in jobs]) == [True, True]:
            assert time.monotonic() < until, f"{where}: both are running"
            time.sleep(0.05)
        holder, refused = jobs if running[0] else jobs[::-1]
        errors = [process.communicate()[1].strip().splitlines()[-1:] for process in refused]
        # The first process gets the reason; the others do, too, or have nothing to write and notice that it has ended.
        if not re.search(r"posthoc_cli\.errors\.\w+Error: ", "".join(errors[0])) or not all(errors) or not any(running):
            tally.missed.append(f"{where}: refused with {errors}")
        (place / "go").touch()
        codes = end(holder, PATIENCE)
        now = read(place / "run")
        wrong = [f"ended with {codes}: {[p.communicate()[1][-300:] for p in holder]}"] if any(codes) else []
        tally.lost += [f"{where}: {line}" for line in (*wrong, *wrong_averages(now), *missing(now))]
        shutil.rmtree(place)
    return tally
