"""Names and texts that would steer a terminal, a table, a picture or a spreadsheet: shown escaped, everywhere."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from factories import RUN_ID, flip_bit, write_snapshot

from posthoc_cli.snapshots.writer import HOLDER_NAME, DirectoryLock
from torture.commands import HungError, run_ema
from torture.forging import forge
from torture.tally import Tally
from torture.victims import synthesize

NAMES = (
    "\x1b]0;owned\x07", "\x1b[2J\x1b[31m", "\x9b31m", "\u202egnp.exe", "a\nema: error: forged", "a\r\nb",
    "\x08\x08", "\u2028", "\x7f", "\x01", "[bold red]x[/]", "\\[link=file:///etc/passwd]x", ":smile:", "$x$",
    "$\\undefined{$", "$", '=HYPERLINK("x")', "+1", "@x", "-1", "\t=1", "%s%n", "{sigma_rel}", "~", "é", "e\u0301",
    "\u200b", "\ufeff", "\U000e0041", "x" * 100,
)  # fmt: skip
SIGMA_REL = ("--sigma-rel", "0.1")


@dataclass
class Stage:
    """Where a name stands in everything that can have one, below `home`."""

    home: Path
    name: str

    def __post_init__(self) -> None:
        self.run, self.output = self.home / f"{self.name} run", self.home / f"{self.name}.safetensors"

    def prepare(self) -> None:
        """Everything anew."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        values = {"w": torch.arange(4.0), self.name: torch.ones(2), f"{self.name}n": torch.tensor([1])}
        for t in (5, 10):
            for sigma_rel in (0.05, 0.28):
                left = {"left_out": (self.name, "frozen"), "sigma_rels": (0.05, 0.28)}
                write_snapshot(self.run, t, sigma_rel, RUN_ID, values, **left)
        write_snapshot(self.home / "broken", 10, 0.05, RUN_ID, {self.name: torch.tensor([math.nan])})
        flip_bit(write_snapshot(self.home / "harmed", 10, 0.05, RUN_ID, {self.name: torch.ones(3)}))
        synthesize(self.run, self.output)
        made_of = json.dumps([{"file": self.name, "coefficient": 1.0}])
        forge(self.output, {"ema.profile": self.name, "ema.method": self.name, "ema.snapshots": made_of})

    def commands(self) -> Iterator[tuple[object, ...]]:
        """What is run on it."""
        home, run, new = self.home, self.run, self.home / f"new {self.name}"
        yield "info", run
        yield "info", run, "--json"
        yield "info", self.output
        yield "info", home / self.name / "absent"
        yield "synthesize", run, *SIGMA_REL, "--dry-run", "--verbose"
        yield from [("synthesize", run, *SIGMA_REL, "--out", f"{new}.safetensors")] * 2
        yield "synthesize", run, "--sigma-rel", "0.1,0.2", "--out", f"{new} folder", "--verbose"
        yield "synthesize", run, "--target", "beta:0.9", "--verbose", "--out", f"{new} beta"
        yield "synthesize", run, "--target", f"decay:{self.name}", "--out", f"{new} bad"
        yield "synthesize", run, *SIGMA_REL, "--out", f"{new}.pt", "--dtype", self.name
        yield "synthesize", run, "--sigma-rel", self.name, "--out", f"{new}.pt"
        yield "synthesize", home / "harmed", *SIGMA_REL, "--out", f"{new}.pt"
        yield "synthesize", home / "broken", *SIGMA_REL, "--out", f"{new}.pt"
        yield "--debug", "synthesize", home / "broken", *SIGMA_REL, "--out", f"{new}.pt"
        yield "export", self.output, "--out", f"{new}.pt"
        yield "export", self.output, "--out", f"{new}-2.pt", "--strip-prefix", f"{self.name}zz"
        yield "export", home / "broken" / "0000000000000010-0.05.safetensors", "--out", f"{new}-3.pt"
        yield "error-plot", run, "--out", f"{new}.svg", "--target", "0.1"
        yield "error-plot", run, "--target", "window:5", "--out", f"{new}.png"
        yield "error-plot", run, "--target", "window:5", "--out", f"{new}.csv"
        quick = ("--sigma-rels", "0.05,0.28", "--dtype", "float16")
        task = ("--steps", "1000", "--params", "10", "--max-size", "1MB", *quick)
        yield "plan", *task, "--like", run, "--out", f"{new}.pdf"
        yield "prune", run, "--keep", "1", "--dry-run"
        yield "prune", run, "--keep", "99", "--yes"
        yield "profile", "--sigma-rel", self.name
        yield (self.name,)
        yield "info", f"--{self.name}"


def steer(folder: Path, share: float, seed: int) -> Tally:
    """Every name through every command; of a share of the names a few."""
    tally, chance = Tally(), random.Random(seed)
    for name in chance.sample(NAMES, max(1, round(share * len(NAMES)))):
        stage = Stage(folder / "stage", name)
        stage.prepare()
        commands = list(stage.commands())
        for arguments in commands if share == 1 else chance.sample(commands, 6):
            _run(tally, name, arguments)
        _hold(tally, stage)
        for table in stage.home.rglob("*.csv"):
            if table.name.startswith("new "):
                _check_cells(tally, name, table)
    return tally


def _run(tally: Tally, name: str, arguments: tuple[object, ...]) -> None:
    tally.tried += 1
    what = f"{name!r}: {' '.join(map(str, arguments))[:200]!a}"
    try:
        result = run_ema(*arguments)
    except HungError as error:
        tally.missed.append(f"{what}: {error}")
        return
    raw = {c for c in result.out + result.err if not c.isprintable() and c != "\n"}
    if raw:
        tally.missed.append(f"{what}: {sorted(raw)!a} came through")
    errors = sum(line.startswith("ema: error: ") for line in result.err.splitlines())
    if "unexpected" in result.err or errors > 1 or ("Traceback" in result.err and "--debug" not in what):
        tally.missed.append(f"{what}: {result.err[-500:]}")


def _hold(tally: Tally, stage: Stage) -> None:
    """A directory whose holder's note a stranger has written."""
    holders = ((1, 0.0), ("9" * 5_000, 1e400), (10**4000, -1e308))
    notes = [{"host": stage.name, "process": process, "since": since} for process, since in holders]
    lock = DirectoryLock(stage.run)
    for note in (*notes, [[[]]], stage.name):
        (stage.run / HOLDER_NAME).write_text(json.dumps(note))
        _run(tally, stage.name, ("prune", stage.run, "--keep", "1", "--yes"))
    lock.release()


def _check_cells(tally: Tally, name: str, table: Path) -> None:
    for line in table.read_text(encoding="utf-8").splitlines():
        if not line.isprintable() or line.lstrip('"')[:1] in tuple("=+-@"):
            tally.missed.append(f"{name!r}: a live cell: {line!r}")
