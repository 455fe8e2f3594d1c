"""Things that are no files of ours, at every place where a command or a function takes a file.

Pipes and sockets, devices, links of every kind, pickles that would leave a mark if anybody loaded them: each ends in
one error (or is passed over, or does no harm), at once; nothing outside is touched, nothing half-made is left.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from factories import random_walk, write_run

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import PostHocError
from posthoc_cli.export.convert import export_file
from posthoc_cli.files import is_temporary
from posthoc_cli.snapshots.outputs import INDEX_NAME
from torture.commands import HungError, run_ema, time_limit, wrong_result
from torture.tally import Tally
from torture.victims import synthesize

SECRET = b"somebody's own file, which nobody may change"
SIGMA_REL = ("--sigma-rel", "0.1")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.marker), "w")


class Scene:
    """A directory of snapshots and what goes with it, all below `home`; `outside` is somebody else's."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run, self.outside, self.marker = home / "run", home / "outside", home / "executed"
        self.out, self.made = home / "out" / "out.safetensors", home / "made.safetensors"

    def prepare(self, template: Path) -> None:
        """Everything as at first."""
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(template, self.home, symlinks=True)

    def seen_outside(self) -> dict[str, Any]:
        """What is outside, with all its content."""
        return {path.name: (path.read_bytes(), path.stat().st_mode) for path in self.outside.iterdir()}


def make_template(home: Path) -> Path:
    """A run of two profiles, an output of it, its shards, and the outside."""
    write_run(home / "run", random_walk(20, {"w": (3,), "v": (2, 2)}), (5, 10, 15, 20))
    synthesize(home / "run", home / "made.safetensors")
    export_file(home / "made.safetensors", home / "sharded", max_shard_size="14")
    (home / "out").mkdir()
    (home / "outside").mkdir()
    (home / "outside" / "secret").write_bytes(SECRET)
    shutil.copy(home / "made.safetensors", home / "outside" / "model.safetensors")
    return home


# --- what stands there


def _socket(path: Path, _: Scene) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # names of sockets may have some 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
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


# --- where it stands, and who meets it

Use = tuple[object, ...] | Callable[["Scene", Path], object]
"""Words of a command, in which "X" is the path of the thing and names in capitals are of the scene; or a function."""


def _track(scene: Scene, _: Path) -> None:
    """Train in the directory, and go back in time, which sets snapshots aside."""
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
    ("plan", "--steps", "1000", "--params", "10", "--max-size", "9kB", "--like", "X"),
    lambda _, thing: PostHocEMA.from_path(thing).state_dict(0.1),
)  # fmt: skip
TO_A_RUN: Sequence[Use] = (
    ("info", "RUN"), ("synthesize", "RUN", *SIGMA_REL, "--out", "OUT"), ("prune", "RUN", "--keep", "2", "--yes"),
    ("error-plot", "RUN", "--out", "OUT"),
)  # fmt: skip
TO_SHARDS: Sequence[Use] = (
    ("info", "HOME/sharded"), lambda scene, _: export_file(scene.home / "sharded", scene.out),
    lambda scene, _: export_file(scene.made, scene.out, base=scene.home / "sharded"),
)  # fmt: skip
IN_A_FOLDER = ("synthesize", "RUN", *SIGMA_REL, "--layout", "sharded", "--out", "HOME/out/folder")
IN_FOLDERS = ("", "/model.safetensors", f"/{INDEX_NAME}", "/model-00001-of-00001.safetensors")
LOCKS = (".ema.lock", ".ema.lock.holder", "superseded")
PLACES: dict[str, Sequence[Use]] = {
    "x": TO_ANY,
    "x.pt": [("export", "MADE", "--base", "X", "--out", "OUT")],
    **dict.fromkeys((SNAPSHOT, "run/stray.safetensors", "run/stray.pt", "run/.ema-0123456789abcdef.tmp"), TO_A_RUN),
    **dict.fromkeys((f"run/{name}" for name in (*LOCKS, "damaged")), (TO_A_RUN[2], TO_A_RUN[0])),
    **dict.fromkeys((SHARD, f"sharded/{INDEX_NAME}"), TO_SHARDS),
    "out/x.safetensors": [("synthesize", "RUN", *SIGMA_REL, "--out", "X")],
    "out/x.pt": [("export", "MADE", "--out", "X")],
    "out/x.png": [("error-plot", "RUN", "--out", "X")],
    "out/x.csv": [("error-plot", "RUN", "--out", "X")],
    **dict.fromkeys((f"out/folder{name}" for name in IN_FOLDERS), (IN_A_FOLDER,)),
    **dict.fromkeys((f"fresh/{name}" for name in LOCKS), (_track,)),
}  # fmt: skip


def _meetings() -> Iterator[tuple[str, str, Use]]:
    """Every thing at every place, and who meets it there; what writes below "out" also with --overwrite."""
    for place, uses in PLACES.items():
        for use in uses:
            forced: list[Use] = [(*use, "--overwrite")] if place.startswith("out/") and isinstance(use, tuple) else []
            for one in (use, *forced):
                yield from ((place, thing, one) for thing in THINGS)


# --- the experiment


def meet(folder: Path, share: float, seed: int) -> Tally:
    """Every thing at every place."""
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
    path = scene.home / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    THINGS[thing](path, scene)
    outside, temporaries = scene.seen_outside(), _temporaries(scene)
    named = {"X": path, "RUN": scene.run, "OUT": scene.out, "MADE": scene.made}
    what, wrong = f"{thing} as {place}", ""
    try:
        if isinstance(use, tuple):
            words = [str(named.get(str(word), word)).replace("HOME", str(scene.home), 1) for word in use]
            what += f": ema {' '.join(words).replace(str(scene.home), '')}"
            wrong = wrong_result(run_ema(*words))
        else:
            with time_limit():
                use(scene, path)
    except PostHocError as error:
        wrong = "" if str(error).isprintable() else repr(error)
    except (Exception, HungError) as error:  # noqa: BLE001 - whatever it is, it is no error of the package
        wrong = f"{type(error).__name__}: {error}"[:500]
    tally.tried += 1
    if wrong:
        tally.missed.append(f"{what}: {wrong}")
    if scene.marker.exists():
        tally.executed.append(f"{what}: the pickle was loaded")
    # A folder for outputs that is itself a link: the user has named what it leads to. Names in it are never followed.
    if scene.seen_outside() != outside and not (path.parent.name == "out" and path.is_symlink() and path.is_dir()):
        tally.executed.append(f"{what}: something outside was changed")
    if _temporaries(scene) != temporaries:
        tally.lost.append(f"{what}: temporaries were left")


def _temporaries(scene: Scene) -> set[Path]:
    return {path for path in scene.home.rglob("*") if is_temporary(path.name)}
