"""Sharded trainings of which one process is killed, resumed by other numbers of processes.

Parameters follow a walk that is known in advance, so that every average has one correct value, whoever writes it.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

from forked import Forked
from groups import SETTINGS, run_group, start_group, truth

from posthoc_cli.snapshots.directory import find_snapshots
from torture import Tally

STEPS = 24
SPREAD = (("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("tp", 2), ("hsdp", 4), ("fsdp-tp", 4))
PATIENCE = 180.0
"""The seconds, on a busy machine, within which processes end."""

TRAIN = f"""
kind, most = arguments
model = spread(Net(), kind)
restore(model, folder / "run")
note = folder / f"durable-{{rank}}"
note.write_text("0")
most = None if most == "None" else int(most)
with PostHocEMA.from_model(model, folder / "run", **SETTINGS, max_checkpoints=most, resume="auto") as ema:
    for step in range(ema.step + 1, {STEPS} + 1):
        train(model, step, step, ema)
        if step % 4 == 0:
            ema.flush()
            note.write_text(str(step))
        dist.barrier()  # in place of the training's own collectives
"""


def killed_ranks(folder: Path, share: float, seed: int) -> Tally:
    """Kill any one process, 100 times in total; each training is resumed in other processes until it completes."""
    started = time.monotonic()
    run_group(TRAIN, 2, folder / "unkilled", "fsdp", None)
    seconds, place = time.monotonic() - started, folder / "killed"
    tally, chance, times = Tally(), random.Random(seed), max(1, round(100 * share))
    while tally.tried < times:
        most, durable, codes = chance.choice((None, 3)), 0, [1]
        while any(codes):
            is_last = tally.tried >= times  # runs to the end
            tally.tried += not is_last
            kind, ranks = chance.choice(SPREAD)
            where = f"kill {tally.tried}, {kind} on {ranks}, max_checkpoints={most}"
            for note in place.glob("durable-*"):
                note.unlink()
            processes = start_group(TRAIN, ranks, place, kind, most)
            if not is_last:
                time.sleep(chance.uniform(0.2, 1.0) * seconds)
                chance.choice(processes).kill()
            codes = end(processes, PATIENCE if is_last else 10)
            notes = [int(note.read_text() or 0) for note in place.glob("durable-*")]
            durable = max(durable, min(notes) if len(notes) == ranks else 0)
            steps = range(4, durable + 1, 4) if most is None else ([STEPS] if not any(codes) else [])
            tally.lost += [f"{where}: {line}" for line in wrong(place / "run", steps)]
            if is_last and any(codes):
                errors = [process.communicate()[1][-300:] for process in processes]
                tally.missed.append(f"{where}: the resumed job ended with {codes}: {errors}")
                break
        shutil.rmtree(place)
    return tally


def wrong(run: Path, steps: list[int] | range) -> list[str]:
    """Return a line for each missing snapshot at these steps, and each tensor that is not its average."""
    lines, found = [], set()
    for snapshot in find_snapshots(run) if run.exists() else []:
        with snapshot:
            found.add((snapshot.step, snapshot.sigma_rel))
            for name, right in truth(snapshot.sigma_rel, list(range(2, snapshot.step + 1, 2))).items():
                # A float32 average is rounded once when stored, and each time that a training is resumed from it.
                away = (snapshot.tensor(name).double() - right).abs().max()
                if not away <= 1e-6 * right.abs().max():
                    lines.append(f"{snapshot.path.name}: {name} is {float(away):.2g} away from the average")
    due = [(step, sigma_rel) for step in steps for sigma_rel in SETTINGS["sigma_rels"]]
    return [
        *lines,
        *(f"sigma_rel {sigma_rel} at {step} is missing" for step, sigma_rel in due if (step, sigma_rel) not in found),
    ]


def end(processes: list[Forked], patience: float) -> list[int]:
    """Wait for all processes, kill those that are left, as a launcher does, and return the exit codes."""
    until = time.monotonic() + patience
    for process in processes:
        process.poll(max(0.0, until - time.monotonic()))
    for process in processes:
        process.kill()
    return [process.wait() for process in processes]
