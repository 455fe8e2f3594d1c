"""Sweeps that are killed with SIGKILL at random moments and started again by the same call."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

from factories import random_walk, write_run

from posthoc_cli import Run
from posthoc_cli.sweep import Axis, Sweep
from posthoc_cli.sweep.metrics import Metric
from posthoc_cli.sweep.results import TRIALS
from torture.processes import Nursery
from torture.tally import Tally
from torture.training import damaged_files

AXIS = Axis.of_values("sigma_rel", (0.05, 0.08, 0.12, 0.2, 0.25))


def killed_sweeps(folder: Path, count: int, chance: random.Random) -> Tally:
    """Kill `count` times in all; every sweep is killed again and again until it comes to its end."""
    tally, nursery, out, done = Tally(), Nursery(folder / "stderr"), folder / "out", folder / "done"
    write_run(folder / "run", random_walk(8, {"a": (300, 100), "b": (70,)}), range(1, 9))
    # A trial that is not ended with its sweep would go on to count itself.
    command = f"sh -c 'sleep 0.02; echo $2 >> {done}; echo $2' sh {{weights}} {{sigma_rel}}"
    work = partial(_sweep, folder / "run", command, out)
    seconds = nursery.run_whole(work)
    right = measured(out)
    while tally.tried < count:
        shutil.rmtree(out)
        done.unlink()
        before: dict[float, float] = {}
        for where, attempt in nursery.kills(tally, count, chance, seconds, work):  # noqa: B007 - used below
            now = measured(out)
            tally.lost += [f"{where}: the trial of {x} is gone" for x in before.keys() - now.keys()]
            tally.lost += [f"{where}: {line}" for line in damaged_files(out)]
            before = now
        tally.lost += [f"{where}: {path.name} is left" for path in out.iterdir() if "scratch" in path.name]
        evaluations = len(done.read_text().split())
        if before != right or not (out / "best.safetensors").exists():
            tally.lost.append(f"{where}: the result is another one")
        if evaluations > len(AXIS.values or ()) + attempt:
            tally.lost.append(f"{where}: {evaluations} evaluations for {attempt} kills: some were measured in vain")
    return tally


def measured(out: Path) -> dict[float, float]:
    """Values by length, of all whole lines."""
    try:
        lines = (out / TRIALS).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    trials = [json.loads(line)["trial"] for line in lines if line.endswith("}\n")]
    return {trial["x"]: trial["value"] for trial in trials if trial["value"] is not None}


def _sweep(run: Path, command: str, out: Path) -> None:
    Sweep(Run(run), command, Metric(), out, AXIS).run_all()
