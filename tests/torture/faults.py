"""A fault, a kill, or a loss of power at every operation of a user's run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import PostHocError
from posthoc_cli.snapshots.directory import SUPERSEDED, find_snapshots
from torture.scenario import STEPS, Run, alike, contents, problems_of, tensors_of, wrong_output, wrong_snapshots
from torture.simulated import HALVED, KINDS, Disk, Faulty, Recording, installed
from torture.tally import Experiment, Tally

CRASHES = ("kill", "nothing", "names", "some")
"""What `Disk.leave` takes."""


# --- errors


def errors_at_every_operation(folder: Path, share: float, seed: int) -> Tally:
    """Each kind of error at each operation of reading and writing; the user does again what has failed."""
    tally = Tally()
    reference = Run(folder / "reference")
    reference.root.mkdir()
    counting = Faulty()
    with installed(counting):
        reference.do()
    kept = snapshots_of(reference.directory)
    chance = random.Random(seed)
    for kind in KINDS:
        able = [at for at, name in enumerate(counting.operations) if name in HALVED.get(kind, (name,))]
        for at in sorted(chance.sample(able, max(2, round(share * len(able))))):
            root = folder / "faulty"
            root.mkdir()
            system = Faulty(at, kind)
            run = Run(root, make_room=system.make_room)
            try:
                with installed(system):
                    run.do()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
                tally.missed.append(f"{system.failed}: ended with {type(error).__name__}: {error}")
            if system.failed is not None:
                tally.tried += 1
                _judge(tally, run, system.failed, kept)
            shutil.rmtree(root)
    return tally


def _judge(tally: Tally, run: Run, failed: str, kept: Mapping[str, Mapping[str, bytes]]) -> None:
    """After everything has been repeated: all is there and right, nothing partial is left, and the user was told."""
    now = snapshots_of(run.directory)
    tally.lost += [f"{failed}: {line}" for line in (*problems_of(run.directory), *wrong_snapshots(run.directory))]
    tally.lost += [f"{failed}: {line}" for path in run.outputs for line in _wrong_output(path)]
    tally.lost += [f"{failed}: {line}" for line in _wrong_shards(run.shards)]
    tally.lost += [
        f"{failed}: {name} has other tensors" for name in kept.keys() & now if not alike(kept[name], now[name])
    ]
    tally.lost += [f"{failed}: {path.name} is left over" for path in run.root.rglob(f"{files.TEMPORARY_PREFIX}*.tmp")]
    if not run.errors and now.keys() != kept.keys():
        tally.missed.append(f"{failed}: nobody was told, and snapshots differ: {sorted(kept.keys() ^ now.keys())}")


def snapshots_of(directory: Path) -> dict[str, dict[str, bytes]]:
    """The tensors of each snapshot, by the file's name."""
    return {snapshot.path.name: tensors_of(snapshot.path) for snapshot in find_snapshots(directory)}


def _wrong_output(path: Path) -> list[str]:
    try:
        return wrong_output(path)
    except PostHocError as error:
        return [str(error)]


def _wrong_shards(folder: Path) -> list[str]:
    paths = sorted(folder.glob("model*.safetensors"))
    if len(paths) != 2 or not (folder / "model.safetensors.index.json").exists():
        return [f"{folder.name}: holds {[path.name for path in paths]}"]
    return [line for path in paths for line in _wrong_output(path)]


# --- crashes


def crashes_at_every_operation(folder: Path, share: float, seed: int) -> Tally:
    """The process is killed, or the machine loses its power, between any two operations; the user starts again."""
    tally = Tally()
    reference = Run(folder / "reference")
    reference.root.mkdir()
    recording = Recording(reference.root)
    reference.note = recording.note
    with installed(recording):
        reference.do()
    kept = snapshots_of(reference.directory)
    chance = random.Random(seed)
    disk, durable, done = Disk(), dict[str, bytes](), set[str]()
    for number, operation in enumerate(recording.operations):
        disk.apply(operation)
        _follow(operation, durable, done)
        for crash in CRASHES:
            if chance.random() > share:
                continue
            root = folder / "crashed"
            disk.leave(root, crash, chance)
            tally.tried += 1
            where = f"{crash} after operation {number}, {operation[0]} {operation[1]}"
            try:
                _look(tally, Run(root), where, durable, done)
                _go_on(tally, Run(root), where, kept)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
                tally.missed.append(f"{where}: {type(error).__name__}: {error}")
            shutil.rmtree(root)
    return tally


def _follow(operation: tuple[object, ...], durable: dict[str, bytes], done: set[str]) -> None:
    """What has been reported durable by now, and not been removed since."""
    kind, *rest = operation
    if kind == "note" and rest[0] == "durable":
        durable.clear()
        durable |= rest[1]  # type: ignore[operator]
    elif kind == "note":
        done |= {str(name) for name in rest[1:]}
    elif kind == "unlink":
        durable.pop(str(rest[0]).removeprefix("run/"), None)
    elif kind == "rename":  # a state that is replaced by a newer one
        durable.pop(str(rest[1]).removeprefix("run/"), None)


def _look(tally: Tally, run: Run, where: str, durable: Mapping[str, bytes], done: set[str]) -> None:
    """Before anybody does anything: what was durable is there, all that has a name is whole."""
    if not run.directory.exists():
        tally.lost += [f"{where}: {name} is gone" for name in durable]
        return
    tally.lost += [f"{where}: {line}" for line in (*problems_of(run.directory), *wrong_snapshots(run.directory))]
    there = contents(run.directory)
    aside = contents(run.directory / SUPERSEDED)
    for name, content in durable.items():
        if there.get(name) != content and aside.get(name) != content:
            tally.lost.append(f"{where}: {name}, which was durable, is gone or different")
    for path in run.outputs:
        if path.exists() or path.relative_to(run.root).as_posix() in done:
            tally.lost += [f"{where}: {line}" for line in _wrong_output(path)]
    if (run.shards / "model.safetensors.index.json").exists() or "shards" in done:
        tally.lost += [f"{where}: {line}" for line in _wrong_shards(run.shards)]


def _go_on(tally: Tally, run: Run, where: str, kept: Mapping[str, Mapping[str, bytes]]) -> None:
    run.do()
    now = snapshots_of(run.directory)
    tally.missed += [f"{where}: going on: {error}" for error in run.errors]
    tally.lost += [f"{where}: going on: {line}" for line in wrong_snapshots(run.directory)]
    tally.lost += [
        f"{where}: going on: {name} differs" for name in kept.keys() & now if not alike(kept[name], now[name])
    ]
    newest = {name for name in kept if name.startswith(f"{STEPS:016d}")}
    tally.lost += [f"{where}: going on: {name} is not there" for name in newest - now.keys()]
    tally.lost += [f"{where}: going on: {line}" for path in run.outputs for line in _wrong_output(path)]
    tally.lost += [f"{where}: going on: {line}" for line in _wrong_shards(run.shards)]


EXPERIMENTS = (
    Experiment("an error at every file operation", errors_at_every_operation, 0.004),
    Experiment("a kill or a loss of power at every file operation", crashes_at_every_operation, 0.015),
)
