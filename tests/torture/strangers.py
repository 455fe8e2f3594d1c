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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from factories import random_walk, write_run

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import PostHocError
from posthoc_cli.export.convert import export_file
from posthoc_cli.files import is_temporary
from posthoc_cli.snapshots.outputs import INDEX_NAME
from torture.commands import HungError, run_ema, time_limit
from torture.tally import Experiment, Tally
from torture.victims import synthesize

SECRET = b"somebody's own file, which nobody may change"
SIGMA_REL = ("--sigma-rel", "0.1", "-q")


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
    """A run of two profiles, an output of it, its shards, a tracker's state, and the outside."""
    write_run(home / "run", random_walk(20, {"w": (3,), "v": (2, 2)}), (5, 10, 15, 20))
    synthesize(home / "run", home / "made.safetensors")
    export_file(home / "made.safetensors", home / "sharded", max_shard_size="14")
    model = torch.nn.Linear(2, 2)
    tracker = PostHocEMA.from_model(model, home / "tracked", update_every=1)
    tracker.update_(model)
    tracker.save_state(home / "state.safetensors")
    tracker.close()
    (home / "profile.csv").write_text("0,1\n20,1\n")
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
    "a pipe": lambda path, _: os.mkfifo(path),
    "a socket": _socket,
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
    "a directory": lambda path, _: path.mkdir(),
    "an empty file": lambda path, _: path.touch(),
    "a pickle": _pickled,
    "a PyTorch file": _saved,
    "text": lambda path, _: path.write_bytes(b"{}\n" * 100),
}


# --- where it stands, and who meets it


@dataclass(frozen=True)
class Place:
    """Where something else stands, and what is then done.

    Attributes:
        path: below the scene's home.
        arguments: of a command, or a function that is called.
    """

    path: str
    use: Callable[[Scene, Path], tuple[object, ...]] | Callable[[Scene, Path], None]


def _command(*words: object) -> Callable[[Scene, Path], tuple[object, ...]]:
    """A command; "X" is the path where the thing stands, and names in capitals are of the scene."""

    def arguments(scene: Scene, thing: Path) -> tuple[object, ...]:
        named = {"X": thing, "RUN": scene.run, "OUT": scene.out, "MADE": scene.made, "HOME": scene.home}
        return tuple(named.get(str(word), word) for word in words)

    return arguments


def _python(use: Callable[[Scene, Path], object]) -> Callable[[Scene, Path], None]:
    def call(scene: Scene, thing: Path) -> None:
        use(scene, thing)

    return call


def _load_state(scene: Scene, thing: Path) -> None:
    with PostHocEMA.from_model(torch.nn.Linear(2, 2), scene.home / "fresh", update_every=1) as tracker:
        tracker.load_state(thing)


def _save_state(scene: Scene, thing: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with PostHocEMA.from_model(model, scene.home / "fresh", update_every=1) as tracker:
        tracker.update_(model)
        tracker.save_state(thing)


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
ALL_OF_A_RUN = (
    ("info", "RUN"), ("synthesize", "RUN", *SIGMA_REL, "--out", "OUT"), ("prune", "RUN", "--keep", "2", "--yes"),
    ("error-plot", "RUN", "--csv", "OUT"),
)  # fmt: skip


def _places() -> Iterator[Place]:
    yield Place("x", _command("info", "X"))
    yield Place("x", _command("synthesize", "X", *SIGMA_REL, "--out", "OUT"))
    yield Place("x", _command("export", "X", "--out", "OUT"))
    yield Place("x.pt", _command("export", "MADE", "--base", "X", "--out", "OUT"))
    yield Place("x", _command("error-plot", "X", "--out", "picture.png"))
    yield Place("x", _command("plan", "--steps", "1000", "--params", "10", "--max-size", "9kB", "--like", "X"))
    yield Place("x", _command("prune", "X", "--keep", "1", "--yes"))
    yield Place("x.csv", _command("synthesize", "RUN", "--profile", "X", "-q", "--out", "OUT"))
    yield Place("x.csv", _command("error-plot", "RUN", "--profile", "X", "--csv", "OUT"))
    for name in (SNAPSHOT, "run/stray.safetensors", "run/stray.pt", "run/.ema-0123456789abcdef.tmp"):
        for words in ALL_OF_A_RUN:
            yield Place(name, _command(*words))
    for name in ("run/.ema.lock", "run/.ema.lock.holder", "run/superseded", "run/quarantine"):
        yield Place(name, _command("prune", "RUN", "--keep", "2", "--yes"))
        yield Place(name, _command("info", "RUN"))
    for name in (SHARD, f"sharded/{INDEX_NAME}"):
        yield Place(name, _command("info", "HOME/sharded"))
        yield Place(name, _python(lambda scene, _: export_file(scene.home / "sharded", scene.out)))
        yield Place(name, _python(lambda scene, _: export_file(scene.made, scene.out, base=scene.home / "sharded")))
    for force in ((), ("--force",)):
        yield Place("out/x.safetensors", _command("synthesize", "RUN", *SIGMA_REL, "--out", "X", *force))
        yield Place("out/x.pt", _command("export", "MADE", "--out", "X", *force))
        yield Place("out/x.png", _command("error-plot", "RUN", "--out", "X", *force))
        yield Place("out/x.csv", _command("error-plot", "RUN", "--csv", "X", *force))
        for name in ("", "/model.safetensors", f"/{INDEX_NAME}", "/model-00001-of-00001.safetensors"):
            sharded = ("synthesize", "RUN", *SIGMA_REL, "--format", "sharded", "--out", "HOME/out/folder", *force)
            yield Place(f"out/folder{name}", _command(*sharded))
            yield Place(f"out/folder{name}", _command(*sharded, "--shard", "1/1"))
    yield Place("state2.safetensors", _python(_load_state))
    yield Place("state2.safetensors", _python(_save_state))
    yield Place("x", _python(lambda _, thing: PostHocEMA.from_path(thing).state_dict(0.1)))
    for name in (".ema.lock", ".ema.lock.holder", "superseded"):
        yield Place(f"fresh/{name}", _python(_track))


# --- the experiment


def meet(folder: Path, share: float, seed: int) -> Tally:
    """Every thing at every place."""
    tally, template = Tally(), make_template(folder / "template")
    pairs = [(place, thing) for place in _places() for thing in THINGS]
    scene = Scene(folder / "scene")
    before = Path.cwd()
    try:
        for place, thing in random.Random(seed).sample(pairs, max(1, round(share * len(pairs)))):
            scene.prepare(template)
            os.chdir(scene.home)
            _meet(scene, place, thing, tally)
    finally:
        os.chdir(before)
    return tally


def _meet(scene: Scene, place: Place, thing: str, tally: Tally) -> None:
    path = scene.home / place.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.unlink()
    THINGS[thing](path, scene)
    outside, temporaries = scene.seen_outside(), _temporaries(scene)
    what = _done(scene, place, path, thing, tally)
    tally.tried += 1
    if scene.marker.exists():
        tally.executed.append(f"{what}: the pickle was loaded")
    if scene.seen_outside() != outside and not _is_named_folder(path):
        tally.executed.append(f"{what}: something outside was changed")
    if _temporaries(scene) != temporaries:
        tally.lost.append(f"{what}: temporaries were left")


def _is_named_folder(path: Path) -> bool:
    """A folder for outputs that is itself a link: as with the folders above it, the user has named what it leads to.
    Names *in* it are never followed."""
    return path.parent.name == "out" and path.is_symlink() and path.is_dir()


def _temporaries(scene: Scene) -> set[Path]:
    return {path for path in scene.home.rglob("*") if is_temporary(path.name)}


def _done(scene: Scene, place: Place, path: Path, thing: str, tally: Tally) -> str:
    """Do what is to be done; returns what it was, in words."""
    try:
        with time_limit():
            arguments = place.use(scene, path)
    except PostHocError as error:
        if not str(error).isprintable():
            tally.missed.append(f"{thing} as {place.path}: {error!r}")
        return f"{thing} as {place.path}, in Python"
    except (Exception, HungError) as error:  # noqa: BLE001 - whatever it is, it is no error of the package
        tally.missed.append(f"{thing} as {place.path}, in Python: {type(error).__name__}: {error}"[:500])
        return f"{thing} as {place.path}, in Python"
    if arguments is None:
        return f"{thing} as {place.path}, in Python"
    words = [str(word).replace("HOME", str(scene.home), 1) for word in arguments]
    what = f"{thing} as {place.path}: ema {' '.join(words).replace(str(scene.home), '')}"
    try:
        result = run_ema(*words)
    except HungError as error:
        tally.missed.append(f"{what}: {error}")
        return what
    lines = result.err.splitlines()
    errors = [line for line in lines if line.startswith("ema: error: ")]
    if result.code not in (0, 1, 2) or len(errors) > 1 or "unexpected" in result.err or "Traceback" in result.err:
        tally.missed.append(f"{what}: ended with {result.code}: {result.err[:500]}")
    elif result.code and not errors and "problem: " not in result.out:
        tally.missed.append(f"{what}: ended with {result.code} without a word")
    return what


EXPERIMENTS = [Experiment("pipes, devices, links and pickles in place of files", meet, 0.05)]
