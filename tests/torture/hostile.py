"""Hostile input: special files in place of files, damaged checkpoints of other programs, and
damaged files of our own.

Each use ends at once with one error, or without harm; nothing outside is touched, nothing partial
is left.
"""

import errno
import itertools
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import stat
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from checkpoint_layouts import LAYOUTS, distributed, walk
from ema_command import run_ema
from factories import INDEX, contents, random_walk, split_snapshot, write_run
from safetensors.torch import save_file
from snapshots.recorded import SMALL, examine, small_output, small_snapshot, used
from tracker.runs import track

from posthoc_cli import Run, export_file, files, import_checkpoints
from torture.training import Tally


class Bomb(str):
    """The path of a file that is created when this is unpickled."""

    def __reduce__(self):
        return open, (str(self), "w")


# --- special files


LINKS = {
    "a link to /dev/zero": "/dev/zero",
    "a link to /proc/kmsg": "/proc/kmsg",
    "a link to /proc/self/mem": "/proc/self/mem",
    "a link to nothing": "nothing",
    "a link to a directory": "outside",
    "a link to somebody's file": "outside/secret",
    "a link to somebody's model": "outside/model.safetensors",
}
"""What a link leads to, within the folder that contains all files."""
UNREADABLE = (
    "a link to /dev/zero",
    "a link to /proc/kmsg",
    "a link to /proc/self/mem",
    "a pipe",
    "a socket",
    "a directory",
    "a file that may not be read",
)
THINGS = (
    *UNREADABLE,
    "a link to nothing",
    "a link to a directory",
    "a link to somebody's file",
    "a link to somebody's model",
    "a link to itself",
    "another name of somebody's file",
    "an empty file",
    "a pickle",
    "a PyTorch file",
    "text",
)


def put(thing, path, home):
    """Put a special file at a path in a folder that contains all others."""
    bomb = Bomb(home / "executed")
    if thing in LINKS:
        path.symlink_to(home / LINKS[thing])
    elif thing == "a link to itself":
        path.symlink_to(path.name)
    elif thing == "another name of somebody's file":
        path.hardlink_to(home / "outside/secret")
    elif thing == "a pipe":
        os.mkfifo(path)
    elif thing == "a socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif thing == "a file that may not be read":
        path.write_bytes(b"{}\n")
        path.chmod(0)
    elif thing == "a directory":
        path.mkdir()
    elif thing == "an empty file":
        path.touch()
    elif thing == "a pickle":
        path.write_bytes(pickle.dumps({"w": bomb}))
    elif thing == "a PyTorch file":
        with path.open("wb") as file:  # torch takes no name like `.metadata`
            torch.save({"w": torch.ones(3), "bomb": bomb}, file)
    else:
        path.write_bytes(b"{}\n" * 100)


ANY = (
    "info x",
    "synthesize x --sigma-rel 0.1 --out out/o.safetensors",
    "export x --out out/o.safetensors",
    "error-plot x --out picture.png",
    "prune x --keep 1 --yes",
)
MADE = "synthesize run --sigma-rel 0.1 --out out/o.safetensors"
RUN = (
    "info run",
    MADE,
    "prune run --keep 2 --yes",
    "error-plot run --out out/o.png",
)
SHARDS = (
    "info sharded",
    "export sharded --out out/o.pt",
    "export made.safetensors --like sharded --out out/f",
)
FOLDER = ("export made.safetensors --out out/f",)
TRAINER = ("info trainer", "synthesize trainer --sigma-rel 0.1 --out out/o.safetensors")
SMALL_FILES = {
    "swept/trials.jsonl": (
        "sweep run --eval \"sh -c 'echo $1' sh {sigma_rel} {weights}\" --minimize --out swept "
        "--sigma-rel 0.1,0.2",
    ),
    "import/ema-import.json": ("info import",),
    f"trainer/checkpoint-20/{INDEX}": TRAINER,
    "trainer/checkpoint-20/trainer_state.json": TRAINER,
    "trainer/checkpoint-20/counts.yaml": TRAINER,
    "pairs/step-20/unet_ema/config.json": ("info pairs",),
    "distributed/step-20/.metadata": ("info distributed",),
    f"sharded/{INDEX}": SHARDS,
    "trainer/checkpoint-20/config.json": (
        "export made.safetensors --like trainer/checkpoint-20 --out out/f",
    ),
    "fresh/.ema.kept": ("",),
}
"""The commands that read a small file beside tensors, in whose place another thing is put."""
PLACES = {
    **SMALL_FILES,
    "x": ANY,
    "x.pt": ("export made.safetensors --like x.pt --out out/o.pt",),
    "run/0000000000000010-0.05.safetensors": RUN,
    "run/stray.safetensors": RUN,
    "run/.ema-0.tmp": RUN,
    "run/.ema.lock": RUN[::2],
    "run/superseded": RUN[::2],
    "sharded/model-00001-of-00002.safetensors": SHARDS,
    "out/o.safetensors": (MADE,),
    "out/o.pt": SHARDS[1:2],
    "out/o.png": RUN[3:],
    "out/f": FOLDER,
    "out/f/model.safetensors": FOLDER,
    f"out/f/{INDEX}": FOLDER,
    "fresh/.ema.lock": ("",),
    "fresh/superseded": ("",),
}
"""The commands that read or write a place; "": a training. Those that write below "out" also run
with --overwrite."""


def replace_files(folder, share, seed, places=PLACES, things=THINGS):
    """Put every special file at every place, and use it."""
    tally = Tally()
    home = folder / "home"
    template = folder / "template"
    before = Path.cwd()
    _write_template(template)
    meetings = all_meetings(places, things)
    count = max(1, round(share * len(meetings)))
    try:
        for meeting in random.Random(seed).sample(meetings, count):
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(template, home)
            os.chdir(home)
            with mock.patch.object(files, "system", Permissions()), bounded_memory():
                _meet(home, *meeting, tally)
    finally:
        os.chdir(before)
    return tally


class Permissions(files.FileSystem):
    """A file system that asks for permission to read a file, also of the superuser."""

    def open(self, path):
        if path.exists() and not path.stat().st_mode & stat.S_IRUSR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return super().open(path)


@contextmanager
def bounded_memory():
    """Let this process have 4 GB of addresses more than now: a device never ends."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (4 << 30)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _write_template(template):
    """Write what meetings are copies of: a run, outputs, checkpoints of other programs."""
    moves = random_walk(20, {"w": (3,), "v": (2, 2)})
    write_run(template / "run", moves, (5, 10, 15, 20))
    Run(template / "run").write([0.05], template / "made.safetensors")
    export_file(template / "made.safetensors", template / "sharded", max_shard_size="14")
    for name in ("out", "outside"):
        (template / name).mkdir()
    (template / "outside" / "secret").write_bytes(b"another user's file, which must not change")
    shutil.copy(template / "made.safetensors", template / "outside" / "model.safetensors")
    for step, weights in enumerate(moves, start=1):
        tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
        if step % 5 == 0:
            LAYOUTS["transformers"](template / "trainer", step, tensors)
            distributed(template / "distributed" / f"step-{step}", tensors)
            for name in ("unet", "unet_ema"):
                part = template / "pairs" / f"step-{step}" / name
                part.mkdir(parents=True)
                save_file(tensors, part / "diffusion_pytorch_model.safetensors")
    import_checkpoints(template / "trainer", template / "import")


def all_meetings(places, things):
    """Return every place, thing and command."""
    meetings = []
    for place, commands in places.items():
        if place.startswith("out/"):
            commands = (*commands, *(f"{command} --overwrite" for command in commands))
        meetings += itertools.product([place], things, commands)
    return meetings


def _meet(home, place, thing, command, tally):
    path = home / place
    what = f"{thing} as {place}: {command}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    put(thing, path, home)
    outside = contents(home / "outside")
    temporaries = {*home.rglob(".ema-*.tmp")}
    tally.tried += 1
    with tally.judged(what):
        if command:
            is_named = place in SMALL_FILES and not path.is_dir()
            tally.missed += _unclear(what, command, path.name if is_named else "")
        else:
            _track(home)
    if (home / "executed").exists():
        tally.executed.append(f"{what}: the pickle was loaded")
    # An output folder that is itself a link is followed, since the user has named it; links in it
    # never are.
    is_followed = path.is_symlink() and path.is_dir() and place in command.split()
    if contents(home / "outside") != outside and not is_followed:
        tally.executed.append(f"{what}: something outside was changed")
    if {*home.rglob(".ema-*.tmp")} != temporaries:
        tally.lost.append(f"{what}: temporaries were left")


def _unclear(what, command, name):
    """Run a command; return a line unless it ends as usual, with one error, which says a name, if
    it fails."""
    result = run_ema(*shlex.split(command))
    errors = [line for line in result.err.splitlines() if line.startswith("ema: error: ")]
    errors += re.findall("^problem.*", result.out, re.MULTILINE)[:1]  # of `ema info`
    is_usual = result.code in (0, 1, 2) and "Traceback" not in result.err
    if is_usual and len(errors) == (result.code > 0) and name in "".join([*errors, name][:1]):
        return []
    return [f"{what}: ended with {result.code}: {result.err[-500:]!a}"]


def _track(home):
    """Train in a directory, and return to an earlier state, which sets snapshots aside."""
    model = torch.nn.Linear(2, 2)
    with track(model, home / "fresh", checkpoint_every=1) as tracker:
        tracker.update_(model)
        state = tracker.state_dict()
        tracker.update_(model)
        tracker.load_state_dict(state)
        tracker.update_(model)


# --- checkpoints

DAMAGES = 400  # for each layout


def damage_checkpoints(folder, share, seed):
    """Truncate files of each layout, flip bits, replace files by a bomb."""
    tally = Tally()
    chance = random.Random(seed)
    weights = walk()
    marker = folder / "executed"
    for layout, write in LAYOUTS.items():
        run = folder / layout.replace(" ", "-")
        run.mkdir()
        for step, state in weights.items():
            write(run, step, state)
        paths = sorted(path for path in run.rglob("*") if path.is_file())
        for _ in range(max(1, round(share * DAMAGES))):
            path = chance.choice(paths)
            intact = path.read_bytes()
            what = f"{layout}: {path.name}"
            path.write_bytes(_changed(intact, chance, marker))
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


def _changed(intact, chance, marker):
    kind = chance.choice(["cut", "flip", "flip", "bomb"])
    if kind == "bomb":
        model = {"w": torch.ones(2)}
        content = {"model": model, "x": Bomb(marker), "step": Bomb(marker)}
        return pickle.dumps(content)
    most = chance.choice([100, 2_000, 10**9])
    place = chance.randrange(min(len(intact), most))
    if kind == "cut":
        return intact[:place]
    return _flipped(intact, 8 * place + chance.randrange(8))


def _flipped(data, place):
    byte, bit = divmod(place, 8)
    changed = bytearray(data)
    changed[byte] ^= 1 << bit
    return bytes(changed)


# --- one small file of each kind: every flipped bit and every truncation is found before a result
# is written


@dataclass(frozen=True)
class Victim:
    """A file that will be damaged, what a command reads it from, and the path that an error must
    name."""

    path: Path
    source: Path
    named: Path

    def results(self, tally, what):
        """Return what `examine` and `used` return; None after an error."""
        found = [None, None]
        out = self.source.with_name("out.safetensors")
        with tally.judged(what, str(self.named)):
            found[0] = examine(self.path)
        with tally.judged(what, str(self.named)):
            found[1] = used(self.source, out)
        if found[1] is None and out.exists():
            tally.lost.append(f"{what}: an output was left")
        out.unlink(missing_ok=True)
        return found


def all_victims(folder):
    """Write one file of each kind."""
    snapshot = small_snapshot(folder / "snapshot")
    output = small_output(folder / "output")
    rows = torch.tensor([[1.0], [-2.5]])
    unsplit = small_snapshot(folder / "parts", SMALL | {"a": rows})
    part = split_snapshot(unsplit, 2) / "part-00002-of-00002.safetensors"
    shards = folder / "shards"
    export_file(output, shards, max_shard_size="10")
    index = shards / INDEX
    shard = shards / "model-00001-of-00002.safetensors"
    return {
        "snapshot": Victim(snapshot, snapshot.parent, snapshot),
        "output": Victim(output, output, output),
        "part": Victim(part, unsplit.parent, part.parent),
        "index": Victim(index, shards, shards),
        "shard": Victim(shard, shards, shard),
    }


def flip_bits(folder, share, seed):
    """Flip every single bit of every small file."""
    return _harm(folder, _flipped, 8, share, seed)


def truncate(folder, share, seed):
    """Cut every small file to every shorter length."""
    return _harm(folder, lambda data, length: data[:length], 1, share, seed)


def _harm(folder, change, ways, share, seed):
    """Damage each file in a share of the `ways` a byte: each damage is found or, in an index,
    changes nothing."""
    tally = Tally()
    chance = random.Random(seed)
    for kind, victim in all_victims(folder).items():
        intact = victim.results(tally, kind)
        data = victim.path.read_bytes()
        count = ways * len(data)
        for number in chance.sample(range(count), max(1, round(share * count))):
            victim.path.write_bytes(change(data, number))
            tally.tried += 1
            found = victim.results(tally, f"{kind}, damage {number}")
            for result, before in zip(found, intact, strict=True):
                # an index has no checksum
                if result is not None and not (kind == "index" and result == before):
                    tally.missed.append(f"{kind}, damage {number}: not found")
        victim.path.write_bytes(data)
        if victim.results(tally, kind) != intact or None in intact:
            tally.lost.append(f"{kind}: differs from before")
    return tally
