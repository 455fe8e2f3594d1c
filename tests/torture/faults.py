"""A fault, a kill, or a loss of power at every operation of a user's run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import PostHocError
from posthoc_cli.snapshots.check import verify
from posthoc_cli.snapshots.directory import SUPERSEDED, find_snapshots
from posthoc_cli.snapshots.outputs import INDEX_NAME
from torture.commands import run_ema
from torture.simulated import HALVED, KINDS, Disk, Faulty, Recording, installed
from torture.tally import Tally
from torture.training import STATE, contents, train, wrong_output, wrong_snapshots

CRASHES = ("kill", "nothing", "names", "some")
"""What `Disk.leave` takes."""


STEPS = 10
STOPS = 7
"""The first training ends here, without a state of its last two steps."""
SAVES = 5


@dataclass
class Run:
    """A run as a user makes it: training with thinning and a resume, synthesis, export into shards, pruning."""

    root: Path
    note: Callable[..., None] = lambda *_: None
    """Told what is durable, and what is done."""
    make_room: Callable[[], None] = lambda: None
    errors: list[str] = field(default_factory=list)
    """What went wrong on the way, each a line."""

    def __post_init__(self) -> None:
        self.directory, self.shards = self.root / "run", self.root / "shards"
        self.outputs = [self.root / "out" / f"sigma_rel-{target}.safetensors" for target in (0.1, 0.2)]

    def do(self) -> None:
        """Do everything; what fails is done once more."""
        if not (self.directory / STATE).exists():
            self._twice(lambda: self._train(STOPS))
        self._twice(lambda: self._train(STEPS))
        out = ["--out", self.root / "out", "--overwrite"]
        self._twice(lambda: self._ema("synthesize", self.directory, "--sigma-rel", "0.1,0.2", *out))
        self.note("output", *(path.relative_to(self.root).as_posix() for path in self.outputs))
        shards = ["--out", self.shards, "--max-shard-size", "40", "--overwrite"]
        self._twice(lambda: self._ema("export", self.outputs[0], *shards))
        self.note("output", "shards")
        self._twice(lambda: self._ema("prune", self.directory, "--keep", 2, "--yes"))

    def names(self) -> set[str]:
        """Of the snapshots."""
        return {snapshot.path.name for snapshot in find_snapshots(self.directory)}

    def _twice(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except (PostHocError, CommandError) as error:
            self.errors.append(str(error))
            self.make_room()
            stage()
        self.make_room()

    def _train(self, until: int) -> None:
        self.errors += train(self.directory, until, (SAVES,), self.note, checkpoint_every=1, max_checkpoints=3)

    def _ema(self, *arguments: object) -> None:
        result = run_ema(*arguments)
        if result.code:
            raise CommandError(result.err.strip() or f"exit code {result.code}")

    def problems(self) -> list[str]:
        """What is wrong in the directory of snapshots."""
        if not any(path.suffix == ".safetensors" for path in self.directory.iterdir()):
            return []
        found = verify(self.directory)
        broken = [f"{file.path.name}: {file.detail}" for file in found.files if not file.is_fine]
        return [*found.problems, *broken] or wrong_snapshots(self.directory)

    def wrong_outputs(self) -> list[str]:
        """What is wrong with all that is to be there at the end."""
        return [*self.wrong_shards(), *(line for path in self.outputs for line in wrong_output(path))]

    def wrong_shards(self) -> list[str]:
        """What is wrong with the exported shards."""
        paths = sorted(self.shards.glob("model*.safetensors"))
        if len(paths) != 2 or not (self.shards / INDEX_NAME).exists():
            return [f"{self.shards.name}: holds {[path.name for path in paths]}"]
        return [line for path in paths for line in wrong_output(path)]


class CommandError(Exception):
    """A command that ended with an exit code above 0."""


# --- errors and crashes


def errors_at_every_operation(folder: Path, share: float, seed: int) -> Tally:
    """Each kind of error at each operation of reading and writing; the user does again what has failed."""
    tally, counting, chance = Tally(), Faulty(), random.Random(seed)
    reference = Run(folder / "reference")
    reference.root.mkdir()
    with installed(counting):
        reference.do()
    for kind in KINDS:
        able = [at for at, name in enumerate(counting.operations) if name in HALVED.get(kind, (name,))]
        for at in sorted(chance.sample(able, max(2, round(share * len(able))))):
            system = Faulty(at, kind)
            run = Run(folder / "faulty", make_room=system.make_room)
            run.root.mkdir()
            try:
                with installed(system):
                    run.do()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
                tally.missed.append(f"{system.failed}: ended with {type(error).__name__}: {error}")
            if system.failed is not None:
                tally.tried += 1
                _judge(tally, run, system.failed, reference.names())
            shutil.rmtree(run.root)
    return tally


def _judge(tally: Tally, run: Run, failed: str, names: set[str]) -> None:
    """After everything has been repeated: all is there and right, nothing partial is left, and the user was told."""
    wrong = [*run.problems(), *run.wrong_outputs()]
    wrong += [f"{path.name} is left over" for path in run.root.rglob(f"{files.TEMPORARY_PREFIX}*.tmp")]
    tally.lost += [f"{failed}: {line}" for line in wrong]
    if not run.errors and run.names() != names:
        tally.missed.append(f"{failed}: nobody was told, and snapshots differ: {sorted(run.names() ^ names)}")


def crashes_at_every_operation(folder: Path, share: float, seed: int) -> Tally:
    """The process is killed, or the machine loses its power, between any two operations; the user starts again."""
    tally, chance = Tally(), random.Random(seed)
    reference = Run(folder / "reference")
    reference.root.mkdir()
    recording = Recording(reference.root)
    reference.note = recording.note
    with installed(recording):
        reference.do()
    newest = {name for name in reference.names() if name.startswith(f"{STEPS:016d}")}
    disk, durable, done = Disk(), dict[str, bytes](), set[str]()
    for number, operation in enumerate(recording.operations):
        disk.apply(operation)
        _follow(operation, durable, done)
        for crash in CRASHES:
            if chance.random() > share:
                continue
            run = Run(folder / "crashed")
            disk.leave(run.root, crash, chance)
            tally.tried += 1
            where = f"{crash} after operation {number}, {operation[0]} {operation[1]}"
            try:
                tally.lost += [f"{where}: {line}" for line in _harmed(run, durable, done)]
                run.do()
                tally.missed += [f"{where}: going on: {error}" for error in run.errors]
                lost = [f"{name} is not there" for name in newest - run.names()]
                lost += [*run.problems(), *run.wrong_outputs()]
                tally.lost += [f"{where}: going on: {line}" for line in lost]
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
                tally.missed.append(f"{where}: {type(error).__name__}: {error}")
            shutil.rmtree(run.root)
    return tally


def _follow(operation: tuple[object, ...], durable: dict[str, bytes], done: set[str]) -> None:
    """What has been reported durable by now, and not been removed since."""
    kind, *rest = operation
    if kind == "note" and rest[0] == "durable":
        durable.clear()
        durable |= rest[1]  # type: ignore[operator]
    elif kind == "note":
        done |= {str(name) for name in rest[1:]}
    elif kind in ("unlink", "rename"):  # a state is replaced by a newer one
        durable.pop(str(rest[-1]).removeprefix("run/"), None)


def _harmed(run: Run, durable: Mapping[str, bytes], done: set[str]) -> list[str]:
    """Before anybody does anything: what was durable and is gone, and what has a name and is not whole."""
    if not run.directory.exists():
        return [f"{name} is gone" for name in durable]
    there, aside = contents(run.directory), contents(run.directory / SUPERSEDED)
    wrong = [
        f"{name}, which was durable, is gone or different"
        for name, content in durable.items()
        if there.get(name) != content and aside.get(name) != content
    ]
    for path in run.outputs:
        if path.exists() or path.relative_to(run.root).as_posix() in done:
            wrong += wrong_output(path)
    if (run.shards / INDEX_NAME).exists() or "shards" in done:
        wrong += run.wrong_shards()
    return [*run.problems(), *wrong]
