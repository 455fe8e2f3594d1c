"""Find checkpoints that lie below numbered folders, such as `000100/pretrained_model`, or say where
a user has to look for them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from posthoc_cli.checkpoints.clock import named_time, time_in_name
from posthoc_cli.checkpoints.content import (
    ENDINGS,
    FOREIGN,
    NO_MODEL,
    READ,
    glob_of,
    holds_model,
    names_in,
    open_checkpoint,
    places_below,
)
from posthoc_cli.errors import DirectoryError, FileFormatError, InvalidValueError

_ORBAX = "_CHECKPOINT_METADATA"


def nested_in(
    folder: Path,
    entries: Sequence[Path],
) -> list[Path]:
    """Return the numbered folders that each hold one model, at the same place in each; none if
    nothing below holds one.

    Raise InvalidValueError if the places of models differ, the numbers may be those of experiments,
    or only a glob can name files; DirectoryError if a folder within holds checkpoints.
    """
    numbered = []
    places = Counter[str]()
    for entry in entries:
        below = _places_in(entry)
        if below:
            numbered.append(entry)
            last = below[-1]
        places.update(str(path.relative_to(entry)) for path in below)
    # a number in the place may be another one than that of the outer folder
    is_other = any(re.search("[1-9]", path) for path in places)
    if len(places) == 1 and not is_other and all(map(_has_step, numbered)):
        return numbered
    if places:
        _ask_which(folder, places, last)
    if endings := _without_endings(entries):
        _ask(folder, "its files of tensors are named as shards, or have no usual endings", endings)
    foreign = []
    for entry in entries:
        if FOREIGN.search(entry.name) or (entry / _ORBAX).is_file():
            foreign.append(entry.name)
    if foreign:
        reason = f"its files are of kinds that are not read: {names_in(foreign)}"
        raise InvalidValueError(folder, reason, READ)
    inner = [entry.name for entry in entries if _holds_checkpoints(entry)]
    if inner:
        raise DirectoryError(folder, "holds no checkpoints itself", f"name its folder {inner[0]}")
    return []


def _has_step(entry: Path) -> bool:
    """Return whether the number of a folder is that of a file within."""
    with suppress(InvalidValueError):
        return named_time(entry / "model").is_of_folder
    return False


def _ask_which(
    folder: Path,
    places: Counter[str],
    last: Path,
) -> None:
    globs = dict[str, None]()
    for path, count in places.items():
        # numbers of the parts of a model are the same in all folders
        name = path if count > 1 else glob_of(path)
        globs[f"*/{name}"] = None
    readings = map(time_in_name, last.iterdir())
    if any(reading is not None and reading.is_marked for reading in readings):
        globs = {f"{pattern}/*": None for pattern in globs}
    else:
        open_checkpoint(last)  # its error says more
    _ask(folder, f"its folders hold models in {names_in([*places])}", [*globs])


def _ask(
    folder: Path,
    what: str,
    globs: Sequence[str],
) -> None:
    choices = " or ".join(f"'{folder / pattern}'" for pattern in globs[:3])
    hint = f"name those of one model by a glob, such as {choices}, perhaps with `step_from`"
    raise InvalidValueError(folder, what, hint)


def _places_in(entry: Path) -> list[Path]:
    has_number = re.search("[0-9]", entry.name)
    if not has_number or NO_MODEL.search(entry.name) or not entry.is_dir():
        return []
    return places_below(entry)


def _holds_checkpoints(entry: Path) -> bool:
    with suppress(OSError, FileFormatError):
        return entry.is_dir() and any(map(_is_checkpoint, entry.iterdir()))
    return False


def _is_checkpoint(entry: Path) -> bool:
    """Return whether an entry has a number, and is a file or folder of weights."""
    if not re.search("[0-9]", entry.name) or NO_MODEL.search(entry.name):
        return False
    if entry.is_dir():
        return holds_model(entry) or bool(places_below(entry))
    return entry.name.endswith(ENDINGS)


def _without_endings(entries: Sequence[Path]) -> list[str]:
    """Return globs of the numbered files that hold tensors, whatever their names end in."""
    first = dict[str, Path]()
    for entry in entries:
        if re.search("[0-9]", entry.name) and entry.is_file():
            first.setdefault(glob_of(entry.name), entry)
    names = []
    for pattern, entry in first.items():
        with suppress(FileFormatError):
            if open_checkpoint(entry).tensors:
                names.append(pattern)
    return names
