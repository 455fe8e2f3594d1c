"""Trainings that are killed with SIGKILL at random moments and resumed by their own script."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from posthoc_cli.snapshots.directory import find_snapshots
from posthoc_cli.snapshots.format import SnapshotInfo
from torture.processes import Nursery
from torture.tally import Tally
from torture.training import damaged_files, train, weights_up_to, wrong_snapshots

STEPS = 40
SAVES = range(8, STEPS + 1, 8)
ROWS = 7500
"""Of the network: each snapshot takes 120 kB."""


def killed_trainings(folder: Path, count: int, chance: random.Random) -> Tally:
    """Kill `count` times in all; every training is killed again and again until it comes to its end."""
    tally, nursery, directory = Tally(), Nursery(folder / "stderr"), folder / "killed"
    right, seconds = {}, 0.0
    weights_up_to(STEPS, 4 * ROWS)  # no child takes time for them
    settings = {"update_every": 2, "checkpoint_every": 4, "rows": ROWS}
    for most in (None, 3):
        unkilled = folder / f"unkilled-{most}"
        seconds = nursery.run_whole(partial(train, unkilled, STEPS, SAVES, max_checkpoints=most, **settings))
        right[most] = _said(unkilled)
    while tally.tried < count:
        most = chance.choice((None, 3))
        work = partial(train, directory, STEPS, SAVES, max_checkpoints=most, **settings)
        for name, _ in nursery.kills(tally, count, chance, seconds, work):
            where = f"{name}, max_checkpoints={most}"
            tally.lost += [f"{where}: {line}" for line in damaged_files(directory)]
        now, names = _said(directory), right[most].keys()
        if most is not None:  # what thinning had removed before a kill cannot come back
            names = {name for name in names if name.startswith(f"{STEPS:016d}")}
        lost = [f"{name} is not there" for name in names - now.keys()]
        lost += [f"{name} says something else" for name in now.keys() & right[most] if now[name] != right[most][name]]
        tally.lost += [f"{where}: {line}" for line in (*lost, *wrong_snapshots(directory))]
        shutil.rmtree(directory)
    return tally


def _said(directory: Path) -> dict[str, SnapshotInfo]:
    """All that each snapshot says but the random name of its run and what was measured."""
    unlike = {"run_id": "", "measurements": None, "motion": None, "inherited": 0.0}
    return {snapshot.path.name: replace(snapshot.info, **unlike) for snapshot in find_snapshots(directory)}
