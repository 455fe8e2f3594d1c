"""The output of an import: a manifest that refers to other programs' files in their place.

It is `ema-import.json` in the folder of the run, one JSON object. Paths are URLs, or relative to
the folder of the run, so that both may be moved or copied together. If a file is missing, has
another size or was replaced, an error names the first such file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from posthoc_cli import files
from posthoc_cli.checkpoints.clock import check_whole_number
from posthoc_cli.checkpoints.content import Values, identify
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.decay_rules import DecayRule
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    OutputExistsError,
    VanishedError,
    argument,
    quote,
)
from posthoc_cli.profiles import Point
from posthoc_cli.snapshots.decoding import convert
from posthoc_cli.snapshots.directory import MANIFEST, is_import
from posthoc_cli.snapshots.opened_file import read_small_file
from posthoc_cli.snapshots.strict_json import parse_object
from posthoc_cli.snapshots.tensorfile import TensorFile

_FORMAT = {"format": "ema import", "version": 3}
_UNITS = ("steps", "epochs", "images")
_AGAIN = "import again"
_MOST_BYTES = 100_000_000  # of a manifest


@dataclass(frozen=True)
class Listed:
    """A checkpoint as the import has found it: what is in which file, in which role, at which time.
    A file with an average and the weights is listed twice."""

    path: Path  # of a file or folder
    step: int
    is_average: bool
    names: dict[str, str]  # in the file, by the names of the model's tensors
    updates: Updates | None  # of an ordinary EMA


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest by key, with absolute paths; and "format" and "version", which are
    `_FORMAT`."""

    folder: Path  # of the run; no key
    origin: Path  # "from": what was imported: a folder, a file or a glob
    settings: ImportSettings  # given, or found, by name
    # what times count, and whether files or the user said so
    unit: tuple[str, bool]
    # each an object with the fields of `Listed`, but with the position of its names in "names",
    # a list of objects: most checkpoints have the same
    checkpoints: tuple[Listed, ...]
    # bytes, and 16 hexadecimal digits: a hash of its size and a sample of content
    files: dict[Path, tuple[int, str]]
    # "checksum": XXH3 (64 bits, seed 0) of the object as compact JSON without this key, 16
    # hexadecimal digits

    def check_file(self, path: Path) -> None:
        """Raise FileFormatError unless a file is the one that was imported."""
        try:
            self.check_identity(identify(path))
        except VanishedError:  # a caller would try again, as for a directory that a tracker writes
            reason = f"is missing, and {self.folder} refers to it"
            raise FileFormatError(path, reason, f"move both together, or {_AGAIN}") from None

    def check_identity(self, file: TensorFile) -> None:
        """Raise FileFormatError unless an opened file is the one that was imported."""
        if self.files.get(file.path) != (file.nbytes, file.checksum):
            reason = f"was replaced, or has changed, since {self.folder} was imported"
            raise FileFormatError(file.path, reason, _AGAIN)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest in a folder, without opening the files; raise FileFormatError if it is
    damaged."""
    path = folder / MANIFEST
    raw = parse_object(path, read_small_file(path, _MOST_BYTES), "import")
    try:
        if any(raw.get(key) != value for key, value in _FORMAT.items()):
            raise ValueError("is of another format or version")
        if raw.pop("checksum") != _checksum(raw):
            raise ValueError("its checksum does not match")
        return _decode(folder, raw)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise FileFormatError(path, f"damaged import: {quote(str(error))[1:-1]}", _AGAIN) from error


def _decode(folder: Path, raw: Values) -> Manifest:
    base = folder if files.is_url(folder) else Path(os.path.realpath(folder))
    names = [convert(each, dict[str, str]) for each in raw["names"]]
    checkpoints = tuple(_decode_listed(row, names, base) for row in raw["checkpoints"])
    if len({(listed.path, listed.is_average) for listed in checkpoints}) < len(checkpoints):
        raise ValueError("lists a checkpoint twice")
    identities = {}
    for text, (nbytes, sample) in raw["files"].items():
        identities[_absolute(text, base)] = (nbytes, sample)
    unit, is_stated = raw["unit"]
    if not (checkpoints and identities and unit in _UNITS and type(is_stated) is bool):
        raise ValueError("holds no checkpoints, or no unit of their times")
    settings = ImportSettings(**raw["settings"])
    origin = _absolute(raw["from"], base)
    return Manifest(folder, origin, settings, (unit, is_stated), checkpoints, identities)


def _decode_listed(row: Values, names: Sequence[dict[str, str]], base: Path) -> Listed:
    path = _absolute(row["path"], base)
    step = check_whole_number(path, row["step"])
    updates = _decode_updates(row["updates"])
    return Listed(path, step, bool(row["is_average"]), names[row["names"]], updates)


def _decode_updates(values: Values | None) -> Updates | None:
    if values is None:
        return None
    updates = Updates(**values)
    DecayRule(**updates.rule)  # which has fields of these names
    for value in updates.rule.values():
        if not isinstance(value, str):
            convert(value, float)
    return updates


def _absolute(place: str | Path, base: Path) -> Path:
    """Return a URL as it is, and any other path as an absolute one; a relative path begins at
    `base`."""
    path = files.check_path("path", place)
    return path if files.is_url(path) else files.as_path(os.path.normpath(str(base / path)))


def _checksum(values: Values) -> str:
    text = json.dumps(values, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(text.encode())


def write_manifest(
    out: Path,
    origin: Path,
    settings: ImportSettings,
    checkpoints: Sequence[Checkpoint],
    overwrite: bool,
) -> bool:
    """Write the manifest of checkpoints that were found at `origin`; return False if `out` holds an
    equal one already.

    Raise OutputExistsError if it holds something else, or, without `overwrite`, another import.
    """
    path = out / MANIFEST
    values = _encode(out, origin, settings, checkpoints)
    content = (json.dumps(values, indent=1) + "\n").encode()
    exists = is_import(out)
    if exists:
        with suppress(FileFormatError):
            if read_small_file(path, _MOST_BYTES) == content:
                return False
    check_target(out, origin, settings, overwrite)
    with files.new_directory(out):
        files.write_atomically(path, content, overwrite=exists)
    return True


def check_target(out: Path, origin: Path, settings: ImportSettings, overwrite: bool) -> None:
    """Raise OutputExistsError if `out` holds something else than an import, or, without
    `overwrite`, another one."""
    if is_import(out):
        if not overwrite:
            with suppress(FileFormatError):  # a damaged manifest is replaced
                _check_same(read_manifest(out), origin, settings)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        reason = "already exists, and holds something else"
        raise OutputExistsError(out, reason, "choose another name")


def _encode(
    out: Path,
    origin: Path,
    settings: ImportSettings,
    checkpoints: Sequence[Checkpoint],
) -> Values:
    names = list[dict[str, str]]()
    rows = []
    identities = {}
    for checkpoint in checkpoints:
        stored = dict(checkpoint.stored)
        if stored not in names:
            names.append(stored)
        row = {
            "path": _relative(checkpoint.path, out),
            "step": checkpoint.step,
            "is_average": not isinstance(checkpoint.profile, Point),
            "names": names.index(stored),
            "updates": vars(checkpoint.updates) if checkpoint.updates else None,
        }
        rows.append(row)
        for path, file in checkpoint.opened.items():
            identities[_relative(path, out)] = (file.nbytes, file.checksum)
    first = checkpoints[0]
    values = {
        **_FORMAT,
        "from": _relative(origin, out),
        "settings": settings.given,
        "unit": (first.t_unit, first.is_stated),
        "checkpoints": rows,
        "names": names,
        "files": dict(sorted(identities.items())),
    }
    return {**values, "checksum": _checksum(values)}


def _check_same(present: Manifest, origin: Path, settings: ImportSettings) -> None:
    """Raise OutputExistsError if the present import is of something else, or has other settings."""
    hint = f"choose another name, or {argument('overwrite')} to replace it"
    reason = f"is an import of {present.origin}"
    if present.settings.without_findings != settings.without_findings:
        raise OutputExistsError(present.folder, f"{reason} with other settings", hint)
    if present.origin != _absolute(origin, Path.cwd()):
        raise OutputExistsError(present.folder, reason, hint)


def _relative(path: Path, folder: Path) -> str:
    """Return a path relative to a folder, or a URL."""
    text = str(path)
    if not files.is_url(path):
        text = os.path.relpath(path, os.path.realpath(folder))
    if text.encode(errors="ignore").decode() != text:
        raise InvalidValueError(repr(text), "its name is not valid text", "rename it")
    return text
