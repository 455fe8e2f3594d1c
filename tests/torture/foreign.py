"""Checkpoints of other programs, damaged at random, with pickles that would run something: one error, or weights."""

from __future__ import annotations

import pickle
import random
import shutil
import warnings
from pathlib import Path

import torch
from checkpoint_layouts import LAYOUTS, walk

from posthoc_cli.errors import PostHocError
from posthoc_cli.run import Run
from torture.strangers import Bomb
from torture.tally import Tally

DAMAGES = 400
"""Of each layout, for a share of 1."""


def damaged(folder: Path, share: float, chance: int) -> Tally:
    """Truncate files of each layout, flip bits, put a bomb in place of a pickle, swap files."""
    tally, dice, weights = Tally(), random.Random(chance), walk()
    for layout, write in LAYOUTS.items():
        run, marker = folder / layout.replace(" ", "-"), folder / "executed"
        run.mkdir()
        for step, state in weights.items():
            write(run, step, state)
        paths = sorted(path for path in run.rglob("*") if path.is_file())
        for _ in range(max(2, round(share * DAMAGES))):
            path = dice.choice(paths)
            whole = path.read_bytes()
            path.write_bytes(_changed(whole, dice, paths, marker))
            tally.tried += 1
            _read(run, tally, f"{layout}: {path.name}")
            if marker.exists():
                tally.executed.append(f"{layout}: {path.name}")
                marker.unlink()
            path.write_bytes(whole)
        shutil.rmtree(run)
    return tally


def _changed(whole: bytes, dice: random.Random, paths: list[Path], marker: Path) -> bytes:
    kind = dice.choice(["cut", "flip", "flip", "many", "bomb", "other"])
    if kind == "cut":
        return whole[: dice.randrange(len(whole))]
    if kind == "bomb":
        return pickle.dumps({"model": {"w": torch.ones(2)}, "x": Bomb(marker), "step": Bomb(marker)})
    if kind == "other":
        return dice.choice(paths).read_bytes()
    changed = bytearray(whole)
    for _ in range(1 if kind == "flip" else 50):
        changed[dice.randrange(min(len(whole), dice.choice([100, 2_000, 10**9])))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _read(run: Path, tally: Tally, what: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            Run(run).average(0.2)
    except PostHocError as error:
        if "\n" in str(error) or str(run) not in str(error):
            tally.missed.append(f"{what}: {error}")
    except Exception as error:  # noqa: BLE001 - what this looks for
        tally.missed.append(f"{what}: {type(error).__name__}: {error}")
