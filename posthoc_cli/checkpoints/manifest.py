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
from typing import Any

import xxhash

from posthoc_cli import files
from posthoc_cli.checkpoints.index import CONFIG, model_in, sets_in
from posthoc_cli.checkpoints.layouts import TABLE
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.checkpoints.steps import checked_step
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    OutputExistsError,
    VanishedError,
    shown,
)
from posthoc_cli.snapshots.directory import MANIFEST, is_import
from posthoc_cli.snapshots.tensorfile import (
    OpenedFile,
    parse_object,
    read_small_file,
    sampled_identity,
)

_FORMAT = {"format": "ema import", "version": 1}
_AGAIN = "import again"


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest by key, with absolute paths; and "format" and "version", which are
    `_FORMAT`."""

    folder: Path  # of the run; no key
    origin: Path  # "from": what was imported: a folder, a file or a glob
    settings: ImportSettings  # those that were given, or found, by name
    # each a list of the path of a file or folder, its kind, its step
    checkpoints: tuple[tuple[Path, str, int], ...]
    # bytes, and 16 hexadecimal digits: a hash of its size and a sample of content
    files: dict[Path, tuple[int, str]]
    # "checksum": XXH3 (64 bits, seed 0) of the object as compact JSON without this key, 16
    # hexadecimal digits

    def check_file(self, path: Path) -> None:
        """Raise FileFormatError unless a file is the one that was imported."""
        reason, hint = f"was replaced, or has changed, since {self.folder} was imported", _AGAIN
        try:
            if _identity(path) == self.files[path]:
                return
        # a caller would retry this error, as for a directory that a tracker writes
        except VanishedError:
            reason, hint = (
                f"is missing, and {self.folder} refers to it",
                f"move both together, or {_AGAIN}",
            )
        raise FileFormatError(path, reason, hint)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in a folder, without a look at the files; raise FileFormatError if it is
    damaged."""
    path = folder / MANIFEST
    raw = parse_object(path, read_small_file(path, 100_000_000), "import")
    try:
        is_whole = {key: raw.get(key) for key in _FORMAT} == _FORMAT and raw.pop(
            "checksum"
        ) == _checksum(raw)
        base = folder if files.is_url(folder) else Path(os.path.realpath(folder))
        listed = tuple(
            (_absolute(one, base), kind, checked_step(path, step))
            for one, kind, step in raw["checkpoints"]
        )
        identities = {
            _absolute(one, base): (nbytes, identity)
            for one, (nbytes, identity) in raw["files"].items()
        }
        if not (is_whole and listed and identities and all(kind in TABLE for _, kind, _ in listed)):
            raise ValueError("is of another format or version, or its checksum does not match")
        return Manifest(
            folder,
            _absolute(raw["from"], base),
            ImportSettings(**raw["settings"]),
            listed,
            identities,
        )
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise FileFormatError(path, f"damaged import: {shown(str(error))[1:-1]}", _AGAIN) from error


def _absolute(place: str | Path, base: Path | None = None) -> Path:
    """Return a URL, or an absolute path, of one that may be relative to a folder, by default the
    working directory."""
    path = files.given_path("path", place)
    return (
        path
        if files.is_url(path)
        else files.as_path(os.path.normpath(str((base or Path.cwd()) / path)))
    )


def _checksum(values: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, separators=(",", ":")).encode())


def _identity(path: Path) -> tuple[int, str]:
    with OpenedFile(path) as file:
        return file.size, sampled_identity(file)


def write_manifest(
    out: Path,
    origin: Path,
    settings: ImportSettings,
    checkpoints: Sequence[Checkpoint],
    overwrite: bool,
) -> bool:
    """Write the manifest of checkpoints that were found at `origin`; return False if `out` holds an
    equal one already.

    Raise OutputExistsError if it holds something else; without `overwrite` also if it is another
    import.
    """
    listed = {one.path: (_absolute(one.path), one.kind, one.step) for one in checkpoints}
    paths = {part.path for checkpoint in checkpoints for part in checkpoint.files}
    for path in listed:  # the index or configuration of a folder, too
        for place in [*sets_in(path).values()] or [path] if path.is_dir() else []:
            model = model_in(place) if place.is_dir() else place
            config = place / CONFIG if place != path else None
            paths |= {each for each in (model, config) if each and each.is_file()}
    identities = {_absolute(path): _identity(path) for path in sorted(paths)}
    manifest, reason = (
        Manifest(out, _absolute(origin), settings, tuple(listed.values()), identities),
        "",
    )
    if exists := is_import(out):
        with suppress(FileFormatError):  # a damaged manifest is replaced
            if (present := read_manifest(out)) == manifest:
                return False
            is_same = present.settings.without_findings == settings.without_findings
            if present.origin != manifest.origin or not is_same:
                reason = f"is an import of {present.origin}" + (
                    "" if is_same else " with other settings"
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        reason = "already exists, and holds something else"
    if reason and not (overwrite and exists):
        raise OutputExistsError(
            out, reason, "choose another name" + ", or `overwrite` to replace it" * exists
        )

    def relative(path: Path) -> str:
        text = str(path) if files.is_url(path) else os.path.relpath(path, os.path.realpath(out))
        if text.encode(errors="ignore").decode() != text:
            raise InvalidValueError(repr(text), "its name is no valid text", "rename it")
        return text

    values = {
        **_FORMAT,
        "from": relative(manifest.origin),
        "settings": settings.given,
        "checkpoints": [[relative(path), kind, step] for path, kind, step in manifest.checkpoints],
        "files": {relative(path): [*identity] for path, identity in identities.items()},
    }
    content = json.dumps(values | {"checksum": _checksum(values)}, indent=1) + "\n"
    with files.new_directory(out):
        files.write_atomically(out / MANIFEST, content.encode(), overwrite=exists)
    return True
