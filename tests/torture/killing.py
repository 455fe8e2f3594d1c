"""Processes stopped at random moments: trainings and sweeps by SIGKILL, commands by every signal.

Trainings, including those that write to an object store, are resumed by their own script, sweeps by the same call.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from factories import random_walk, write_run

from posthoc_cli import files
from posthoc_cli.__main__ import main
from posthoc_cli.snapshots.directory import find_snapshots
from posthoc_cli.snapshots.outputs import INDEX_NAME
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.sweep.results import TRIALS
from torture import Tally
from torture.processes import Nursery
from torture.training import damaged_files, problems, train, weights_up_to, wrong_snapshots

STEPS = 40
SAVES = range(8, STEPS + 1, 8)
SETTINGS = {"update_every": 2, "checkpoint_every": 4}
ROWS = 7500
"""The size of the network, which makes each snapshot 120 kB."""


def killed_trainings(folder: Path, count: int, chance: random.Random) -> Tally:
    """Kill trainings `count` times in total; each is killed repeatedly until it completes."""
    tally, nursery, directory = Tally(), Nursery(folder / "stderr"), folder / "killed"
    right, seconds = {}, 0.0
    weights_up_to(STEPS, 4 * ROWS)  # computed once, before the children are forked
    for most in (None, 3):
        unkilled = folder / f"unkilled-{most}"
        seconds = nursery.run_whole(partial(train, unkilled, STEPS, SAVES, rows=ROWS, max_checkpoints=most, **SETTINGS))
        right[most] = _said(unkilled)
    while tally.tried < count:
        most = chance.choice((None, 3))
        work = partial(train, directory, STEPS, SAVES, rows=ROWS, max_checkpoints=most, **SETTINGS)
        for name, _ in nursery.kills(tally, count, chance, seconds, work):
            where = f"{name}, max_checkpoints={most}"
            tally.lost += [f"{where}: {line}" for line in damaged_files(directory)]
        now, names = _said(directory), right[most].keys()
        if most is not None:  # thinning may have removed snapshots before a kill
            names = {name for name in names if name.startswith(f"{STEPS:016d}")}
        lost = [f"{name} is missing" for name in names - now.keys()]
        for name in now.keys() & right[most].keys():
            own, other = vars(now[name]), vars(right[most][name])
            differing = [key for key in own if key not in ("path", "files", "entries") and own[key] != other[key]]
            lost += [f"{name} differs in {', '.join(differing)}"] if differing else []
        tally.lost += [f"{where}: {line}" for line in (*lost, *wrong_snapshots(directory))]
        shutil.rmtree(directory)
    return tally


def _said(directory: Path) -> dict[str, Snapshot]:
    """Return the metadata of each snapshot without its run id and its measurements.

    A run that is resumed from a snapshot continues from rounded averages, so measurements differ in the last bits.
    """
    unlike = {"run_id": "", "measurements": None, "motion": None, "inherited": 0.0, "sample": "", "sketch": ""}
    return {snapshot.path.name: replace(snapshot.info, **unlike) for snapshot in find_snapshots(directory)}


# --- sweeps

SWEEP, LENGTHS = "sweep RUN --sigma-rel 0.05,0.08,0.12,0.2,0.25 --minimize --out OUT --run", 5


def killed_sweeps(folder: Path, count: int, chance: random.Random) -> Tally:
    """Kill sweeps `count` times in total; each is killed repeatedly until it completes."""
    tally, nursery, out, done = Tally(), Nursery(folder / "stderr"), folder / "out", folder / "done"
    write_run(folder / "run", random_walk(8, {"a": (300, 100), "b": (70,)}), range(1, 9))
    # A trial that survived its sweep would still add its line here.
    command = f"sh -c 'sleep 0.02; echo $2 >> {done}; echo $2' sh {{weights}} {{sigma_rel}}"
    work = partial(_run, folder, SWEEP, command)
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
        if evaluations > LENGTHS + attempt:
            tally.lost.append(f"{where}: {evaluations} evaluations for {attempt} kills: some were measured in vain")
    return tally


def measured(out: Path) -> dict[float, float]:
    """Return the values by length from all complete lines."""
    try:
        lines = (out / TRIALS).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    trials = [json.loads(line)["trial"] for line in lines if line.endswith("}\n")]
    return {trial["x"]: trial["value"] for trial in trials if trial["value"] is not None}


# --- commands

COMMANDS = (
    "synthesize RUN --sigma-rel 0.15 --out OUT/one.safetensors",
    "synthesize RUN --sigma-rel 0.05,0.1,0.2 --out OUT/many", "synthesize RUN --sigma-rel 0.15 --out OUT/one.pt",
    "synthesize RUN --sigma-rel 0.15 --out OUT/shards --layout sharded --max-shard-size 100KB",
    "synthesize RUN --sigma-rel 0.15 --dry-run --json",
    "export OLD --out OUT/exported.safetensors --dtype float16",
    "export OLD --out SHARDS --max-shard-size 90KB --overwrite", "error-plot RUN --out OUT/error.png", "info RUN",
    "report RUN --out OUT/report.html",
    "plan --steps 1000 --params 1e6 --disk 50MB --out OUT/plan.png", "prune RUN --keep 3 --yes",
    "profile --sigma-rel 0.05,0.1 --steps 1000", "demo --out OUT/demo --steps 100",
)  # fmt: skip
PREPARED = (
    "synthesize RUN --sigma-rel 0.1 --out OLD",
    "export OLD --out SHARDS --max-shard-size 60KB",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
ENDS = {signal.SIGINT: {0, 130}, signal.SIGTERM: {0, 143, -signal.SIGTERM}, signal.SIGKILL: {0, -signal.SIGKILL}}
"""The exit codes after a signal; the last one of SIGTERM is that of a command that has not begun."""


def signalled_commands(folder: Path, count: int, chance: random.Random) -> Tally:
    """Stop commands `count` times in total: afterwards outputs are complete or absent, and no snapshot is harmed."""
    tally, nursery = Tally(), Nursery(folder / "stderr")
    template, work = folder / "template", folder / "work"
    write_run(template / "run", random_walk(8, {"a": (300, 100), "b": (70,)}), range(1, 9))
    for command in PREPARED:
        nursery.run_whole(partial(_run, template, command))
    rounds = -(-count // (len(COMMANDS) * len(SIGNALS)))
    every = [(command, signalled) for command in COMMANDS for signalled in SIGNALS] * rounds
    seconds: dict[str, float] = {}
    sent: Counter[signal.Signals] = Counter()
    stopped: Counter[signal.Signals] = Counter()
    for command, signalled in chance.sample(every, count):
        if command not in seconds:
            shutil.copytree(template, work)
            seconds[command] = nursery.run_whole(partial(_run, work, command))
            shutil.rmtree(work)
        shutil.copytree(template, work)
        before = {path: path.read_bytes() for path in (work / "run").glob("*.safetensors")}
        after = chance.uniform(0, 1.1 * seconds[command])
        code, err, _ = nursery.run(partial(_run, work, command), after, signalled)
        tally.tried += 1
        sent[signalled] += 1
        stopped[signalled] += code != 0
        where = f"{signalled.name} after {after:.3f} s of {seconds[command]:.3f}: ema {command}"
        if code not in ENDS[signalled] or "Traceback" in err or "Exception ignored" in err:
            tally.missed.append(f"{where}: ended with {code}: {err.strip()[-1500:]}")
        if signalled != signal.SIGKILL:
            tally.lost += [f"{where}: {path.name} is left" for path in work.rglob(f"{files.TEMPORARY_PREFIX}*")]
        tally.lost += [f"{where}: {line}" for line in _harmed(work, before, "prune" in command)]
        shutil.rmtree(work)
    # The moments are spread over a command's duration: a signal that never stops one does not arrive.
    tally.missed += [f"{s.name} stopped none of {sent[s]}" for s in SIGNALS if sent[s] >= 20 and not stopped[s]]
    return tally


def _run(work: Path, command: str, *last: str) -> None:
    (work / "out").mkdir(exist_ok=True)
    places = {"RUN": "run", "OUT": "out", "OLD": "old.safetensors", "SHARDS": "shards"}
    words = [word.split("/", 1) for word in command.split()]
    paths = [work.joinpath(places[head], *tail) if head in places else head for head, *tail in words]
    sys.argv = ["ema", *map(str, paths), *last]
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    except KeyboardInterrupt:  # before the command has begun
        sys.exit(130)
    main()


def _harmed(work: Path, before: dict[Path, bytes], may_shrink: bool) -> list[str]:
    """Return a line for each incomplete file, and for each snapshot that has changed."""
    harmed = damaged_files(work)
    for path, content in before.items():
        if not (may_shrink and not path.exists()) and path.read_bytes() != content:
            harmed.append(f"{path.name} has changed")
    for path in work.rglob("*.pt"):
        torch.load(path, weights_only=True)
    for path in work.rglob("*.png"):
        data = path.read_bytes()
        if not (data.startswith(b"\x89PNG") and b"IEND" in data[-12:]):
            harmed.append(f"{path.name} is incomplete")
    for index in work.rglob(INDEX_NAME):
        harmed += problems(index)
    if len(find_snapshots(work / "run")) < 6:
        harmed.append("snapshots are missing")
    return harmed
