"""Trainings that are killed with SIGKILL at random moments and resumed by their own script."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA
from posthoc_cli.snapshots.directory import find_snapshots
from torture.scenario import damaged_files
from torture.tally import Tally

if TYPE_CHECKING:
    from torture.nursery import Nursery

STEPS = 40
SAVE_EVERY = 8
Contents = dict[str, tuple[object, dict[str, torch.Tensor]]]
SETTINGS = {"sigma_rels": (0.05, 0.28), "update_every": 2, "checkpoint_every": 4}


def train(directory: Path, max_checkpoints: int | None) -> None:
    """A user's script: goes on with what is there, and saves its state now and then."""
    model = torch.nn.Linear(300, 100)
    state = directory / "state.safetensors"
    stored = find_snapshots(directory)
    if state.exists():
        tracker = _begin(model, directory, max_checkpoints)
        tracker.load_state(state)
    elif {snapshot.info.sigma_rel for snapshot in stored} == {0.05, 0.28}:
        tracker = PostHocEMA.from_path(directory, model)
    else:
        for snapshot in stored:  # killed while the first ones were written
            snapshot.path.unlink()
        tracker = _begin(model, directory, max_checkpoints)
    with tracker:
        for step in range(tracker.step + 1, STEPS + 1):
            generator = torch.Generator().manual_seed(step)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            tracker.update_(model)
            if step % SAVE_EVERY == 0:
                tracker.save_state(state)


def _begin(model: torch.nn.Module, directory: Path, max_checkpoints: int | None) -> PostHocEMA:
    return PostHocEMA.from_model(
        model, directory, max_checkpoints=max_checkpoints, checkpoint_dtype=torch.float32, **SETTINGS
    )


def killed_trainings(nursery: Nursery, folder: Path, count: int, chance: random.Random) -> Tally:
    """Kill `count` times in all; every training is killed again and again until it comes to its end."""
    tally = Tally()
    right, seconds = {}, 0.0
    for most in (None, 3):
        directory = folder / f"unkilled-{most}"
        code, err, seconds = nursery.run(lambda d=directory, m=most: train(d, m), None, 0)
        assert code == 0, err
        right[most] = _contents(directory)
    while tally.tried < count:
        most, directory = chance.choice((None, 3)), folder / "killed"
        for attempt in range(1_000):
            after = chance.uniform(0, 1.2 * seconds) if tally.tried < count else None
            code, err, _ = nursery.run(lambda d=directory, m=most: train(d, m), after, signal.SIGKILL)
            tally.tried += after is not None
            where = f"kill {tally.tried}, max_checkpoints={most}, attempt {attempt}"
            if directory.exists():
                tally.lost += [f"{where}: {line}" for line in damaged_files(directory)]
            if code == 0:
                break
            if code != -signal.SIGKILL:
                tally.missed.append(f"{where}: going on ended with {code}: {err.strip()[-500:]}")
                break
        _compare(tally, where, _contents(directory), right[most], most)
        shutil.rmtree(directory)
    return tally


def _contents(directory: Path) -> Contents:
    """All that a snapshot says but the random name of its run and what was measured, and its tensors."""
    found = {}
    for snapshot in find_snapshots(directory):
        said = {**vars(snapshot.info), "run_id": None, "measurements": None, "motion": None, "inherited": None}
        found[snapshot.path.name] = (said, load_file(snapshot.path))
    return found


def _alike(one: tuple[object, dict[str, torch.Tensor]], other: tuple[object, dict[str, torch.Tensor]]) -> bool:
    """A resume from float32 snapshots rounds the averages once; one from a state rounds nothing."""
    return one[0] == other[0] and all(
        torch.allclose(value, other[1][name], rtol=1e-5, atol=1e-6) for name, value in one[1].items()
    )


def _compare(tally: Tally, where: str, now: Contents, right: Contents, most: int | None) -> None:
    tally.lost += [
        f"{where}: {name} differs from the unkilled run's"
        for name in now.keys() & right
        if not _alike(now[name], right[name])
    ]
    missing = right.keys() - now.keys()
    if most is not None:  # what thinning had removed before a kill cannot come back
        missing = {name for name in missing if name.startswith(f"{STEPS:016d}")}
    tally.lost += [f"{where}: {name} is not there" for name in missing]
