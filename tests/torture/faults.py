"""A fault, a kill, or a loss of power at every operation of a user's run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.snapshots.directory import SUPERSEDED, find_snapshots
from posthoc_cli.snapshots.models import INDEX_NAME
from torture.scenario import STEPS, Run
from torture.simulated import HALVED, KINDS, Disk, Faulty, Recording, installed
from torture.tally import Experiment, Tally
from torture.training import contents, wrong_output

CRASHES = ("kill", "nothing", "names", "some")
"""What `Disk.leave` takes."""


def names_of(run: Run) -> set[str]:
    return {snapshot.path.name for snapshot in find_snapshots(run.directory)}


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
                _judge(tally, run, system.failed, names_of(reference))
            shutil.rmtree(run.root)
    return tally


def _judge(tally: Tally, run: Run, failed: str, names: set[str]) -> None:
    """After everything has been repeated: all is there and right, nothing partial is left, and the user was told."""
    wrong = [*run.problems(), *run.wrong_shards(), *(line for path in run.outputs for line in wrong_output(path))]
    wrong += [f"{path.name} is left over" for path in run.root.rglob(f"{files.TEMPORARY_PREFIX}*.tmp")]
    tally.lost += [f"{failed}: {line}" for line in wrong]
    if not run.errors and names_of(run) != names:
        tally.missed.append(f"{failed}: nobody was told, and snapshots differ: {sorted(names_of(run) ^ names)}")


def crashes_at_every_operation(folder: Path, share: float, seed: int) -> Tally:
    """The process is killed, or the machine loses its power, between any two operations; the user starts again."""
    tally, chance = Tally(), random.Random(seed)
    reference = Run(folder / "reference")
    reference.root.mkdir()
    recording = Recording(reference.root)
    reference.note = recording.note
    with installed(recording):
        reference.do()
    newest = {name for name in names_of(reference) if name.startswith(f"{STEPS:016d}")}
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
                lost = [f"{name} is not there" for name in newest - names_of(run)]
                lost += [*run.problems(), *run.wrong_shards()]
                lost += [line for path in run.outputs for line in wrong_output(path)]
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


EXPERIMENTS = (
    Experiment("an error at every file operation", errors_at_every_operation, 0.004),
    Experiment("a kill or a loss of power at every file operation", crashes_at_every_operation, 0.015),
)
