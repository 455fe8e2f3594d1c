"""What there is to verify in a path, before any of it is read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import DirectoryError, FileFormatError, InvalidValueError, VanishedError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.index import INDEX_NAME, read_index
from posthoc_cli.snapshots.lock import LOCK_NAME
from posthoc_cli.snapshots.sharded import is_sharded
from posthoc_cli.snapshots.store import QUARANTINE, SUPERSEDED, candidates, closed_folders, closed_text

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""What files are called that only a pickle's reader could check. None is opened."""

ACCEPTED = "name a snapshot directory, a folder of outputs, a .safetensors file, or the index of a sharded model"


@dataclass(frozen=True)
class Unit:
    """What is good or bad as one: a file, or the shards of an index.

    Attributes:
        path: the file, or the folder of the shards.
        files: the safetensors files; those that the index names need not be there.
        index: that of the shards.
        tensors: what the index says is in each file, by the file's name; None where it cannot be read.
        problem: what is wrong with the index.
        superseded: whether it was set aside, as not on the way of the training.
    """

    path: Path
    files: tuple[Path, ...]
    index: Path | None = None
    tensors: dict[str, list[str]] | None = None
    problem: FileFormatError | None = None
    superseded: bool = False


@dataclass(frozen=True)
class Contents:
    """What there is to verify.

    Attributes:
        path: as it was given.
        is_directory: whether it is one.
        units: in the order of their names.
        leftovers: temporaries of interrupted writes, or of writes that go on.
        superseded: how many snapshots were set aside by a training that went back.
        quarantined: how many things were set aside as broken.
        pickles: how many files cannot be checked.
        notes: what is not looked at, and why.
    """

    path: Path
    is_directory: bool
    units: tuple[Unit, ...]
    leftovers: tuple[Path, ...] = ()
    superseded: int = 0
    quarantined: int = 0
    pickles: int = 0
    notes: tuple[str, ...] = ()

    @property
    def holds_a_run(self) -> bool:
        """Whether the files in it are looked at as snapshots of one run: not as shards whose index is damaged."""
        shards = any(unit.path == self.path and unit.problem for unit in self.units)
        return self.is_directory and (not shards or (self.path / LOCK_NAME).exists())

    @property
    def nbytes(self) -> int:
        """About how much there is to read."""
        return sum(_size(file) for unit in self.units for file in unit.files)


def list_contents(path: Path) -> Contents:
    """What there is to verify in a directory, or that a file is. Reads indexes, and no other file.

    Raises:
        InvalidValueError: a file that has no checksums and could only be unpickled.
        DirectoryError: there is no such path, it cannot be read, or holds nothing of the kind.
    """
    if path.is_dir():
        return _of_directory(path)
    if not os.path.lexists(path):
        raise DirectoryError(path, f"no such file or directory; {ACCEPTED}")
    if path.suffix in PICKLES:
        raise InvalidValueError(path, f"has no checksums, and no pickle is opened here; {ACCEPTED}")
    if path.name.endswith(".safetensors.index.json"):
        return Contents(path, False, (_sharded(path),))
    return Contents(path, False, (Unit(path, (path,)),))


def _of_directory(directory: Path) -> Contents:
    aside, broken = directory / SUPERSEDED, directory / QUARANTINE
    units = _units(directory)
    superseded, notes = _superseded(aside)
    folders = {directory, *(unit.path for unit in units if unit.index is not None and not unit.path.is_symlink())}
    folders |= {aside} if superseded else set()
    found = Contents(
        path=directory,
        is_directory=True,
        units=(*units, *(replace(unit, superseded=True) for unit in superseded)),
        leftovers=tuple(path for folder in sorted(folders) for path in _leftovers(folder)),
        superseded=sum(unit.path.parent == aside for unit in superseded),
        quarantined=len(_listed(broken)) if broken.is_dir() else 0,
        pickles=sum(path.suffix in PICKLES for path in _listed(directory)),
        notes=(*notes, *map(closed_text, closed_folders(_listed(directory)))),
    )
    if not (found.units or found.leftovers or found.quarantined):
        hint = "; no pickle is opened here" if found.pickles else ""
        raise DirectoryError(directory, f"holds no snapshots, outputs or states{hint}; {ACCEPTED}")
    return found


def _superseded(aside: Path) -> tuple[list[Unit], list[str]]:
    """What was set aside, and a note where that cannot be looked at: a link would lead out of the directory."""
    if aside.is_symlink():
        return [], [f"{aside.name}/ is a symbolic link, which no training follows; not looked at"]
    try:
        return (_units(aside) if aside.is_dir() else []), []
    except DirectoryError:
        return [], [f"{aside.name}/ cannot be read; not looked at"]


def _units(directory: Path) -> list[Unit]:
    """What is in a directory: its own shards, the sharded models in it, and files."""
    try:
        paths = candidates(directory)
    except FileNotFoundError:
        raise DirectoryError(directory, f"no such directory; {ACCEPTED}") from None
    folders = [directory, *(path for path in paths if is_sharded(path))]
    units = []
    for folder in folders:
        own = paths if folder is directory else _listed(folder)
        units += _units_of_folder(folder, (path for path in own if path not in folders), directory)
    return sorted(units, key=lambda unit: unit.index or unit.path)


def _units_of_folder(folder: Path, paths: Iterable[Path], directory: Path) -> list[Unit]:
    """The shards in a folder of a directory, where it has an index, and files that are none of them."""
    found = sorted(path for path in paths if path.suffix == fmt.SUFFIX and not path.name.startswith("."))
    if not is_sharded(folder):
        return [Unit(path, (path,)) for path in found]
    try:
        shards = _sharded(folder / INDEX_NAME)
    except VanishedError:
        return []
    if folder.is_symlink() and folder != directory:
        return [shards]  # what else is in it is of another directory
    loose = [path for path in found if path not in shards.files]
    return [shards, *(Unit(path, (path,)) for path in loose)]


def _sharded(index: Path) -> Unit:
    """The shards of an index; none where it cannot be read, so that files beside it are judged by themselves.

    Raises:
        VanishedError: the index is gone.
    """
    try:
        tensors = read_index(index)
    except FileFormatError as error:
        if isinstance(error, VanishedError) and files.is_gone(index):
            raise
        return Unit(index.parent, (), index, problem=error)
    return Unit(index.parent, tuple(index.parent / name for name in tensors), index, tensors)


def _leftovers(folder: Path) -> list[Path]:
    try:
        return files.leftovers(folder)
    except OSError:
        return []  # a folder that can be entered and not be listed, or that has gone


def _listed(folder: Path) -> list[Path]:
    try:
        return files.system.list(folder)
    except OSError:
        return []


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
