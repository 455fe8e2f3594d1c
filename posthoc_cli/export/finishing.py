"""From the parts of a synthesis to a model: everything is checked, then the index is written."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, NotReadyError, OutputExistsError
from posthoc_cli.export.part_file import PartFile, part_path
from posthoc_cli.export.parted import PartedSynthesis, part_counts
from posthoc_cli.export.sharded import MODEL_FILE, holds_snapshot
from posthoc_cli.snapshots.format import FileHeader
from posthoc_cli.snapshots.index import INDEX_NAME, encode_index
from posthoc_cli.snapshots.reader import read_header, read_small_file
from posthoc_cli.snapshots.verifying import verify_payload
from posthoc_cli.synthesis import Progress
from posthoc_cli.synthesis.division import Part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A model that is complete.

    Attributes:
        parts: how many it has.
        indexes: the index of each target.
        there: the targets, by index, whose index was there already, and the same.
        nbytes: bytes of all tensors.
    """

    parts: int
    indexes: tuple[Path, ...]
    there: frozenset[int]
    nbytes: int


def finish(
    parted: PartedSynthesis, verify: bool = True, progress: Progress | None = None, write: bool = True
) -> Finished:
    """Check that every part of every target is there and belongs together, then write the indexes.

    Parts are of this plan, and hold exactly the tensors that the plan gives them; so they are disjoint and complete.

    Arguments:
        parted: the plan that the parts must be of.
        verify: read all parts and check every block; else headers and sizes only.
        progress: told the bytes of parts that were verified.
        write: False to check only.

    Raises:
        NotReadyError: a part is missing; nothing was written.
        FileFormatError, MismatchError: a part is damaged, or of another plan; nothing was written.
        OutputExistsError: the folder holds another model, or parts of one, which may not be replaced.
    """
    contents = [_checked_index(parted, target, verify, progress) for target in range(len(parted.folders))]
    indexes = [folder / INDEX_NAME for folder in parted.folders]
    there = frozenset(i for i, index in enumerate(indexes) if _holds(index, contents[i][0]))
    for target, folder in enumerate(parted.folders):
        _check_alone(folder, parted, target in there)
    for target, (index, (text, _)) in enumerate(zip(indexes, contents, strict=True)):
        if write and target not in there:
            files.write_whole(index, text, parted.overwrite)
        if write:
            _remove(_strangers(index.parent, parted.parts))
            _warn_of_leftovers(index.parent)
    return Finished(parted.parts, tuple(indexes), there, sum(total for _, total in contents))


def parts_to_finish(folders: Sequence[Path], plan_ids: Callable[[int], Collection[str]]) -> int:
    """Into how many parts the model is divided whose parts are in the folders.

    Arguments:
        folders: one a target.
        plan_ids: digests of the plan that is to be finished, for a number of parts. Only asked where there are parts
            of several models.

    Raises:
        NotReadyError: there is no part, or it cannot be told which ones are meant.
    """
    counts = sorted({count for folder in folders for count in part_counts(folder)})
    if not counts:
        raise NotReadyError(folders[0], "no part is here", "make them with --shard 1/N to --shard N/N")
    if len(counts) > 1:
        found = {count: _found_plans(folders, count) for count in counts}
        matching = [count for count in counts if found[count] & set(plan_ids(count))]
        if len(matching) != 1:
            raise NotReadyError(
                folders[0],
                f"holds parts of models in {' and in '.join(map(str, counts))} parts",
                "remove those that are not wanted",
            )
        counts = matching
    return counts[0]


def _found_plans(folders: Sequence[Path], count: int) -> set[str]:
    """What the parts in folders that are of so many say of their plans."""
    found = set()
    for path in (part_path(folder, Part(number, count)) for folder in folders for number in range(1, count + 1)):
        if path.is_file():
            with suppress(FileFormatError):
                found.add(read_header(path).metadata.get("ema.plan", ""))
    return found


def _checked_index(parted: PartedSynthesis, target: int, verify: bool, progress: Progress | None) -> tuple[bytes, int]:
    """The content of a target's index, and the bytes of its tensors."""
    folder = parted.folders[target]
    wanted = [parted.file(target, Part(number, parted.parts)) for number in range(1, parted.parts + 1)]
    headers = [_header(file) for file in wanted]
    if verify:
        for file, header in zip(wanted, headers, strict=True):
            verify_payload(file.path, header, progress)
    weight_map = {name: part_path(folder, file.part).name for file in wanted for name in (s.name for s in file.specs)}
    total = sum(file.nbytes for file in wanted)
    return encode_index(weight_map, total), total


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file is there, and is that."""
    try:
        return read_small_file(path, len(content)) == content
    except FileFormatError:
        return False


def _header(file: PartFile) -> FileHeader:
    if not os.path.lexists(file.path):
        raise NotReadyError(file.path, "is missing", f"make it with --shard {file.part}")
    return file.read_header()


def _strangers(folder: Path, parts: int) -> list[Path]:
    """Files of other models in a folder: readers may take them for this one."""
    own = {part_path(folder, Part(number, parts)).name for number in range(1, parts + 1)}
    return sorted(
        path for path in files.system.list(folder) if MODEL_FILE.fullmatch(path.name) and path.name not in own
    )


def _check_alone(folder: Path, parted: PartedSynthesis, has_index: bool) -> None:
    if holds_snapshot(folder):
        raise OutputExistsError(folder, "is a snapshot of a run and is not replaced", "choose another name")
    if parted.overwrite:
        return
    index, others = folder / INDEX_NAME, _strangers(folder, parted.parts)
    if os.path.lexists(index) and not has_index:
        raise OutputExistsError(index, "is there already, and is of another model; overwrite=True to replace it")
    if others:
        raise OutputExistsError(others[0], "is of another model", "remove it, or overwrite=True to replace that model")


def _warn_of_leftovers(folder: Path) -> None:
    """Name what a process that was killed has left: nobody else would find it, and it may be large."""
    found = files.leftovers(folder)
    if not found:
        return
    nbytes = 0
    for path in found:
        with suppress(OSError):
            nbytes += path.stat().st_size
    which = str(found[0]) + f" and {len(found) - 1} more" * (len(found) > 1)
    log.warning(
        "%s: left by interrupted processes, %s bytes; remove unless one still writes here", which, f"{nbytes:,}"
    )


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with files.reported_as_write_error(path, "removed"):
            files.unlink_if_there(path)
            files.system.fsync_directory(path.parent)
