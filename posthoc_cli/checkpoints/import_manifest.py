"""The manifest that an import leaves: it refers to other programs' files where they are.

The manifest holds the settings that the files lack. It is `ema-import.json` in the folder of the run, one JSON object:

    key          value
    format       "ema import"
    version      1
    from         what was imported: a folder, a file or a glob
    settings     those of `settings.Settings` that were given, or found
    checkpoints  a list of [path, kind, step]: a file or folder, what it is, the step of the training
    files        an object: path -> [bytes, 16 hexadecimal digits of its size and of a sample of its content]
    checksum     XXH3 (64 bits, seed 0) of all this as compact JSON without this key, 16 hexadecimal digits

Paths are URLs, or relative to the folder of the run, so that both may be moved or copied together. Files that stay
behind, that have another size or were replaced are an error that names the first one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from posthoc_cli import files
from posthoc_cli.checkpoints.formats import TABLE
from posthoc_cli.checkpoints.read_model import CONFIG, EMA_ENDING, index_checkpoint, model_in
from posthoc_cli.checkpoints.read_step import checked_step
from posthoc_cli.checkpoints.settings import Settings
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.errors import FileFormatError, InvalidValueError, VanishedError
from posthoc_cli.snapshots.headers import is_whole, parse_json
from posthoc_cli.snapshots.reading import BackingFile, sampled_identity
from posthoc_cli.snapshots.tensor_file import (
    OpenedFile,
    read_small_file,
)

NAME = "ema-import.json"
_FORMAT = {"format": "ema import", "version": 1}
_MOST_BYTES = 100_000_000
_AGAIN = "import again"


@dataclass(frozen=True)
class Manifest:
    """What a manifest says; `files` have their bytes and identities, `checkpoints` are paths with kinds and steps."""

    folder: Path
    origin: Path
    settings: Settings
    checkpoints: tuple[tuple[Path, str, int], ...]
    files: dict[Path, tuple[int, str]]

    @property
    def place(self) -> str:
        """What was imported, whatever the working directory is."""
        return str(self.origin) if files.is_url(self.origin) else os.path.realpath(self.origin)

    def check_file(self, path: Path) -> None:
        """A FileFormatError if a file is not there, or not the one that was imported."""
        nbytes, identity = self.files[path]
        try:
            with OpenedFile(path) as file:
                if file.size != nbytes:
                    reason = f"has {file.size:,} bytes, and had {nbytes:,} when {self.folder} was imported"
                    raise FileFormatError(path, reason, _AGAIN)
                if sampled_identity(file) != identity:
                    raise FileFormatError(path, f"was replaced since {self.folder} was imported", _AGAIN)
        except VanishedError as error:  # it does not help to look again, as in a directory that a tracker writes
            reason = f"is not there, and {self.folder} refers to it"
            raise FileFormatError(path, reason, f"move both together, or {_AGAIN}") from error

    def read(self) -> list[Checkpoint]:
        """The checkpoints; a FileFormatError if a file is not the one that was imported."""
        for path in self.files:
            self.check_file(path)
        made = []
        for path, kind, step in self.checkpoints:
            made += TABLE[kind].read(path, index_checkpoint(path), step, self.settings)
        for file, identity in ((part.path, part.identity) for one in made for part in foreign_parts(one)):
            if self.files.get(file, (0, ""))[1] != identity:
                raise FileFormatError(file, f"was replaced since {self.folder} was imported", _AGAIN)
        return made

    def describe(self) -> dict[str, Any]:
        """Where the files are, and the settings, for JSON."""
        return {"refers_to": str(self.origin), "files": len(self.files), "settings": self.settings.given}


def foreign_parts(checkpoint: Checkpoint) -> list[BackingFile]:
    """The files of a checkpoint, as far as they are other programs'."""
    return [part for part in checkpoint.parts if part.identity]


def is_import(path: str | Path) -> bool:
    """Whether a path is a folder with a manifest."""
    place = files.as_path(path) / NAME
    return place.is_file() if files.is_url(place) else os.path.lexists(place)


def make_manifest(folder: Path, origin: Path, settings: Settings, checkpoints: Sequence[Checkpoint]) -> Manifest:
    """The manifest for a folder of what was found at `origin`."""
    listed = {one.path: (one.path, one.kind, one.info.step) for one in checkpoints}
    paths = {part.path for one in checkpoints for part in foreign_parts(one)}
    # What says where the tensors are, in their files.
    for path in listed:
        model = model_in(path) if path.is_dir() else None
        if model and model.name.endswith(EMA_ENDING):
            model /= CONFIG
        paths |= {model} if model and model.is_file() else set()
    known = {}
    for path in sorted(paths):
        with OpenedFile(path) as file:
            known[path] = (file.size, sampled_identity(file))
    return Manifest(folder, origin, settings, tuple(listed.values()), known)


def encode_manifest(manifest: Manifest) -> bytes:
    """The content of the file."""
    base = os.path.realpath(manifest.folder)

    def relative(path: Path) -> str:
        text = str(path) if files.is_url(path) else os.path.relpath(path.absolute(), base)
        try:
            text.encode()
        except UnicodeError:
            raise InvalidValueError(repr(text), "its name is no valid text", "rename it") from None
        return text

    values = {
        **_FORMAT,
        "from": relative(manifest.origin),
        "settings": manifest.settings.given,
        "checkpoints": [[relative(path), kind, step] for path, kind, step in manifest.checkpoints],
        "files": {relative(path): known for path, known in manifest.files.items()},
    }
    return (json.dumps(values | {"checksum": _checksum(values)}, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder; a FileFormatError says what is wrong with it. Does not look at the files."""
    path = folder / NAME
    raw = parse_json(path, read_small_file(path, _MOST_BYTES), "import")
    try:
        if {key: raw.get(key) for key in _FORMAT} != _FORMAT:
            raise ValueError("is of another format or version")
        if raw.pop("checksum") != _checksum(raw):
            raise ValueError("its checksum does not match")
        is_real = files.is_url(folder) or os.path.realpath(folder) == str(folder.absolute())
        base = folder if is_real else Path(os.path.realpath(folder))
        settings = Settings(**raw["settings"])
        listed = tuple((_place(base, one), kind, checked_step(path, step)) for one, kind, step in raw["checkpoints"])
        known = {_place(base, one): (nbytes, identity) for one, (nbytes, identity) in raw["files"].items()}
        if not listed or not all(kind in TABLE for _, kind, _ in listed):
            raise ValueError("checkpoints must be of known kinds")
        if not all(is_whole(nbytes) and isinstance(identity, str) for nbytes, identity in known.values()):
            raise ValueError("files must have sizes and identities")
        return Manifest(folder, _place(base, raw["from"]), settings, listed, known)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        reason = f"lacks {error}" if isinstance(error, LookupError) else str(error)
        raise FileFormatError(path, f"damaged import: {reason}", _AGAIN) from error


def _place(base: Path, text: str) -> Path:
    """A path that the manifest has."""
    path = files.given_path("path", text)
    return path if files.is_url(path) else files.as_path(os.path.normpath(str(base / path)))


def _checksum(values: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, separators=(",", ":")).encode())
