"""Hostile input: special files in place of files, damaged checkpoints, names that control terminals.

Pipes, sockets, devices, links of every kind, and pickles that would create a marker file when loaded are put at every
path that a command or a function reads or writes: each use ends at once with one error, or without harm; nothing
outside is touched, nothing partial is left. Damaged checkpoints of other programs give one error, or weights. Names and
texts that would control a terminal, a table, a plot or a spreadsheet are always shown escaped.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoint_layouts import LAYOUTS, walk
from ema_command import run_ema
from factories import RUN_ID, flip_bit, random_walk, write_run, write_snapshot

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.export.convert import export_file
from posthoc_cli.files import is_temporary
from posthoc_cli.snapshots.directory import HOLDER_NAME, DirectoryLock
from posthoc_cli.snapshots.outputs import INDEX_NAME
from torture import Tally
from torture.victims import forge, synthesize

SECRET = b"another user's file, which must not change"
SIGMA_REL = ("--sigma-rel", "0.1")


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.marker), "w")


class Scene:
    """A directory of snapshots, its outputs and exports, all below `home`; `outside` belongs to another user."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run, self.outside, self.marker = home / "run", home / "outside", home / "executed"
        self.out, self.made = home / "out" / "out.safetensors", home / "made.safetensors"

    def prepare(self, template: Path) -> None:
        """Restore the initial files."""
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(template, self.home, symlinks=True)

    def seen_outside(self) -> dict[str, Any]:
        """Return the names, content and modes of the files outside."""
        return {path.name: (path.read_bytes(), path.stat().st_mode) for path in self.outside.iterdir()}


def make_template(home: Path) -> Path:
    """Create a run of two profiles, an output of it, its shards, and the folder outside."""
    write_run(home / "run", random_walk(20, {"w": (3,), "v": (2, 2)}), (5, 10, 15, 20))
    synthesize(home / "run", home / "made.safetensors")
    export_file(home / "made.safetensors", home / "sharded", max_shard_size="14")
    (home / "out").mkdir()
    (home / "outside").mkdir()
    (home / "outside" / "secret").write_bytes(SECRET)
    shutil.copy(home / "made.safetensors", home / "outside" / "model.safetensors")
    return home


# --- special files


def _socket(path: Path, _: Scene) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # names of sockets are limited to about 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(before)


def _pickled(path: Path, scene: Scene) -> None:
    path.write_bytes(pickle.dumps({"w": Bomb(scene.marker)}))


def _saved(path: Path, scene: Scene) -> None:
    torch.save({"w": torch.ones(3), "v": torch.ones(2, 2), "bomb": Bomb(scene.marker)}, path)


THINGS: dict[str, Callable[[Path, Scene], object]] = {
    "a pipe": lambda path, _: os.mkfifo(path), "a socket": _socket,
    "a link to /dev/zero": lambda path, _: path.symlink_to("/dev/zero"),
    "a link to /dev/full": lambda path, _: path.symlink_to("/dev/full"),
    "a link to /dev/null": lambda path, _: path.symlink_to("/dev/null"),
    "a link to nothing": lambda path, _: path.symlink_to("nothing"),
    "a link to itself": lambda path, _: path.symlink_to(path.name),
    "a link to a pipe": lambda path, scene: (os.mkfifo(scene.home / "pipe"), path.symlink_to(scene.home / "pipe")),
    "a link to a directory": lambda path, scene: path.symlink_to(scene.outside),
    "a link to somebody's file": lambda path, scene: path.symlink_to(scene.outside / "secret"),
    "a link to somebody's model": lambda path, scene: path.symlink_to(scene.outside / "model.safetensors"),
    "another name of somebody's file": lambda path, scene: path.hardlink_to(scene.outside / "secret"),
    "a directory": lambda path, _: path.mkdir(), "an empty file": lambda path, _: path.touch(), "a pickle": _pickled,
    "a PyTorch file": _saved, "text": lambda path, _: path.write_bytes(b"{}\n" * 100),
}  # fmt: skip


# --- where the special files are put, and how they are used

Use = tuple[object, ...] | Callable[["Scene", Path], object]
"""The words of a command, where "X" is the special file and names in capitals are paths of the scene; or a function."""


def _track(scene: Scene, _: Path) -> None:
    """Train in the directory, and return to an earlier state, which sets snapshots aside."""
    model = torch.nn.Linear(2, 2)
    with PostHocEMA.from_model(model, scene.home / "fresh", update_every=1, checkpoint_every=1) as tracker:
        tracker.update_(model)
        state = tracker.state_dict()
        tracker.update_(model)
        tracker.load_state_dict(state)
        tracker.update_(model)


SNAPSHOT = "run/0000000000000010-0.05.safetensors"
SHARD = "sharded/model-00001-of-00002.safetensors"
TO_ANY: Sequence[Use] = (
    ("info", "X"), ("synthesize", "X", *SIGMA_REL, "--out", "OUT"), ("export", "X", "--out", "OUT"),
    ("error-plot", "X", "--out", "picture.png"), ("prune", "X", "--keep", "1", "--yes"),
    ("plan", "--steps", "1000", "--params", "10", "--disk", "9kB", "--like", "X"),
    lambda _, thing: PostHocEMA.from_path(thing).state_dict(0.1),
)  # fmt: skip
TO_A_RUN: Sequence[Use] = (
    ("info", "RUN"), ("synthesize", "RUN", *SIGMA_REL, "--out", "OUT"), ("prune", "RUN", "--keep", "2", "--yes"),
    ("error-plot", "RUN", "--out", "OUT"),
)  # fmt: skip
TO_SHARDS: Sequence[Use] = (
    ("info", "HOME/sharded"), ("export", "HOME/sharded", "--out", "OUT"),
    ("export", "MADE", "--base", "HOME/sharded", "--out", "OUT"),
)  # fmt: skip
IN_A_FOLDER = ("synthesize", "RUN", *SIGMA_REL, "--layout", "sharded", "--out", "HOME/out/folder")
IN_FOLDERS = ("", "/model.safetensors", f"/{INDEX_NAME}", "/model-00001-of-00001.safetensors")
LOCKS = (".ema.lock", ".ema.lock.holder", "superseded")
PLACES: dict[str, Sequence[Use]] = {
    "x": TO_ANY,
    "x.pt": [("export", "MADE", "--base", "X", "--out", "OUT")],
    **dict.fromkeys((SNAPSHOT, "run/stray.safetensors", "run/stray.pt", "run/.ema-0123456789abcdef.tmp"), TO_A_RUN),
    **dict.fromkeys((f"run/{name}" for name in LOCKS), (TO_A_RUN[2], TO_A_RUN[0])),
    **dict.fromkeys((SHARD, f"sharded/{INDEX_NAME}"), TO_SHARDS),
    "out/x.safetensors": [("synthesize", "RUN", *SIGMA_REL, "--out", "X")],
    "out/x.pt": [("export", "MADE", "--out", "X")],
    "out/x.png": [("error-plot", "RUN", "--out", "X")],
    "out/x.csv": [("error-plot", "RUN", "--out", "X")],
    **dict.fromkeys((f"out/folder{name}" for name in IN_FOLDERS), (IN_A_FOLDER,)),
    **dict.fromkeys((f"fresh/{name}" for name in LOCKS), (_track,)),
}  # fmt: skip


def _meetings() -> Iterator[tuple[str, str, Use]]:
    """Yield every special file at every place with every use; commands that write below "out" also with --overwrite."""
    for place, uses in PLACES.items():
        for use in uses:
            forced: list[Use] = [(*use, "--overwrite")] if place.startswith("out/") and isinstance(use, tuple) else []
            for variant in (use, *forced):
                yield from ((place, thing, variant) for thing in THINGS)


def replace_files(folder: Path, share: float, seed: int) -> Tally:
    """Put every special file at every place, and use it."""
    tally, template, scene = Tally(), make_template(folder / "template"), Scene(folder / "scene")
    meetings, before = list(_meetings()), Path.cwd()
    try:
        for meeting in random.Random(seed).sample(meetings, max(1, round(share * len(meetings)))):
            scene.prepare(template)
            os.chdir(scene.home)
            _meet(scene, *meeting, tally)
    finally:
        os.chdir(before)
    return tally


def _meet(scene: Scene, place: str, thing: str, use: Use, tally: Tally) -> None:
    path, words = scene.home / place, list[str]()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    THINGS[thing](path, scene)
    outside, temporaries = scene.seen_outside(), _temporaries(scene)
    if isinstance(use, tuple):
        named = {"X": path, "RUN": scene.run, "OUT": scene.out, "MADE": scene.made}
        words = [str(named.get(str(word), word)).replace("HOME", str(scene.home), 1) for word in use]
    what = f"{thing} as {place}: {' '.join(words).replace(str(scene.home), '')}"
    if callable(use):
        tally.tried += 1
        with tally.judged(what):
            use(scene, path)
    else:
        _run(tally, what, words)
    if scene.marker.exists():
        tally.executed.append(f"{what}: the pickle was loaded")
    # An output folder that is itself a link is followed, since the user has named it; links in it never are.
    if scene.seen_outside() != outside and not (path.parent.name == "out" and path.is_symlink() and path.is_dir()):
        tally.executed.append(f"{what}: something outside was changed")
    if _temporaries(scene) != temporaries:
        tally.lost.append(f"{what}: temporaries were left")


def _run(tally: Tally, what: str, words: Sequence[object]) -> None:
    """Run a command; it must succeed or fail with one line of error, and print no control characters."""
    tally.tried += 1
    with tally.judged(what):
        result = run_ema(*words)
        errors = [line for line in result.err.splitlines() if line.startswith("ema: error: ")]
        raw = {c for c in result.out + result.err if not c.isprintable() and c != "\n"}
        is_plain = "unexpected" not in result.err and ("Traceback" not in result.err or "--debug" in words)
        if result.code not in (0, 1, 2) or len(errors) > 1 or not is_plain or raw:
            tally.missed.append(f"{what}: ended with {result.code}, raw {sorted(raw)!a}: {result.err[-500:]!a}")
        if result.code and not errors and "problem: " not in result.out and "--debug" not in words:
            tally.missed.append(f"{what}: ended with {result.code} without a word")


def _temporaries(scene: Scene) -> set[Path]:
    return {path for path in scene.home.rglob("*") if is_temporary(path.name)}


# --- checkpoints

DAMAGES = 400
"""The number of damages for each layout with a share of 1."""


def damage_checkpoints(folder: Path, share: float, seed: int) -> Tally:
    """Truncate files of each layout, flip bits, replace pickles by a bomb, swap files."""
    tally, chance, weights, marker = Tally(), random.Random(seed), walk(), folder / "executed"
    for layout, write in LAYOUTS.items():
        run = folder / layout.replace(" ", "-")
        run.mkdir()
        for step, state in weights.items():
            write(run, step, state)
        paths = sorted(path for path in run.rglob("*") if path.is_file())
        for _ in range(max(2, round(share * DAMAGES))):
            path = chance.choice(paths)
            intact, what = path.read_bytes(), f"{layout}: {path.name}"
            path.write_bytes(_changed(intact, chance, paths, marker))
            tally.tried += 1
            with warnings.catch_warnings(), tally.judged(what, str(run)):
                warnings.simplefilter("error", RuntimeWarning)
                Run(run).average(0.2)
            if marker.exists():
                tally.executed.append(what)
                marker.unlink()
            path.write_bytes(intact)
        shutil.rmtree(run)
    return tally


def _changed(intact: bytes, chance: random.Random, paths: list[Path], marker: Path) -> bytes:
    kind = chance.choice(["cut", "flip", "flip", "many", "bomb", "other"])
    if kind == "cut":
        return intact[: chance.randrange(len(intact))]
    if kind == "bomb":
        return pickle.dumps({"model": {"w": torch.ones(2)}, "x": Bomb(marker), "step": Bomb(marker)})
    if kind == "other":
        return chance.choice(paths).read_bytes()
    changed = bytearray(intact)
    for _ in range(1 if kind == "flip" else 50):
        changed[chance.randrange(min(len(intact), chance.choice([100, 2_000, 10**9])))] ^= 1 << chance.randrange(8)
    return bytes(changed)


# --- names

NAMES = (
    "\x1b]0;owned\x07", "\x1b[2J\x1b[31m", "\x9b31m", "\u202egnp.exe", "a\nema: error: forged", "a\r\nb",
    "\x08\x08", "\u2028", "\x7f", "\x01", "[bold red]x[/]", "\\[link=file:///etc/passwd]x", ":smile:", "$x$",
    "$\\undefined{$", "$", '=HYPERLINK("x")', "+1", "@x", "-1", "\t=1", "%s%n", "{sigma_rel}", "~", "é", "e\u0301",
    "\u200b", "\ufeff", "\U000e0041", "x" * 100,
)  # fmt: skip


class Stage:
    """Runs, outputs and broken files below `home` that have a name in every place that can have one."""

    def __init__(self, home: Path, name: str) -> None:
        self.home, self.name = home, name
        self.run, self.output = home / f"{name} run", home / f"{name}.safetensors"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        values = {"w": torch.arange(4.0), name: torch.ones(2), f"{name}n": torch.tensor([1])}
        for t in (5, 10):
            for sigma_rel in (0.05, 0.28):
                left = {"left_out": (self.name, "frozen"), "sigma_rels": (0.05, 0.28)}
                write_snapshot(self.run, t, sigma_rel, RUN_ID, values, **left)
        write_snapshot(self.home / "broken", 10, 0.05, RUN_ID, {self.name: torch.tensor([math.nan])})
        flip_bit(write_snapshot(self.home / "harmed", 10, 0.05, RUN_ID, {self.name: torch.ones(3)}))
        synthesize(self.run, self.output)
        made_of = json.dumps([{"file": self.name, "coefficient": 1.0}])
        forge(self.output, {"profile": json.dumps(self.name), "method": json.dumps(self.name), "snapshots": made_of})

    def commands(self) -> Iterator[tuple[object, ...]]:
        """Yield the commands to run."""
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
        yield "plan", "--steps", "1000", "--params", "10", "--like", run, "--out", f"{new}.pdf"
        yield "prune", run, "--keep", "1", "--dry-run"
        yield "prune", run, "--keep", "99", "--yes"
        yield "profile", "--sigma-rel", self.name
        yield (self.name,)
        yield "info", f"--{self.name}"


def name_things(folder: Path, share: float, seed: int) -> Tally:
    """Run every command with every name; with a share, a few commands with some names."""
    tally, chance = Tally(), random.Random(seed)
    for name in chance.sample(NAMES, max(1, round(share * len(NAMES)))):
        stage = Stage(folder / "stage", name)
        commands = list(stage.commands())
        for arguments in commands if share == 1 else chance.sample(commands, 6):
            _run(tally, f"{name!r}: {' '.join(map(str, arguments))[:200]!a}", arguments)
        _hold(tally, stage)
        for table in stage.home.rglob("new *.csv"):
            for line in table.read_text(encoding="utf-8").splitlines():
                if not line.isprintable() or line.lstrip('"')[:1] in tuple("=+-@"):
                    tally.missed.append(f"{name!r}: a live cell: {line!r}")
    return tally


def _hold(tally: Tally, stage: Stage) -> None:
    """Run a command on a locked directory whose note on the holder is hostile."""
    holders = ((1, 0.0), ("9" * 5_000, 1e400), (10**4000, -1e308))
    notes = [{"host": stage.name, "process": process, "since": since} for process, since in holders]
    lock = DirectoryLock(stage.run)
    for note in (*notes, [[[]]], stage.name):
        (stage.run / HOLDER_NAME).write_text(json.dumps(note))
        _run(tally, f"{stage.name!r}: held", ("prune", stage.run, "--keep", "1", "--yes"))
    lock.release()
