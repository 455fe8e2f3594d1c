"""The mark of outputs that have no header of this package: .pt files, and copies of checkpoints.

It is a JSON object with the fields of `OutputMark`, by which `ema` does not take its own outputs
for a training's checkpoints. No loader minds where it is:

- in a safetensors file it is a string of the metadata, `ema.output`;
- in an archive of `torch.save` it is the comment of the archive, which torch's reader skips if it
  has less than 4,000 bytes;
- in a pickle, such as `.metadata` of torch.distributed.checkpoint, it follows the last opcode.

The latter two are followed by the length of the JSON and `_END`, by which the end of a file shows
them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli.errors import FileFormatError
from posthoc_cli.files import PendingFile
from posthoc_cli.snapshots.decoding import convert
from posthoc_cli.snapshots.opened_file import OpenedFile
from posthoc_cli.snapshots.strict_json import compact, parse_object

MARK = "ema.output"  # its name in the metadata of safetensors
_END = struct.Struct("<I8s")
_MAGIC = b"EMA MARK"
_MOST = 4000  # bytes
_LONGEST = 200  # characters of the name of a profile, which may be any


@dataclass(frozen=True)
class OutputMark:
    """What an output is; the fields of an average are empty for a conversion of other tensors."""

    kind: str = ""  # "output", an average
    profile: str = ""
    t: float = 0.0
    t_unit: str = ""
    run_id: str = ""
    copied: str = ""  # the path of this file in the folder that was copied; empty for a file alone
    was_moved: bool = False  # out of the folder that was copied

    def __str__(self) -> str:
        if self.kind != "output":
            return "an export of ema"
        return f"an output of ema: {self.profile} at t = {self.t:,.12g} {self.t_unit}"

    def at(self, path: Path) -> OutputMark:
        """Return the mark of a file at a path: one that was taken out of its folder is a file
        alone."""
        is_in_place = path.as_posix().endswith(f"/{self.copied}")
        return self if is_in_place else replace(self, copied="", was_moved=bool(self.copied))


def encode_mark(header: Mapping[str, Any], copied: str = "") -> str:
    """Make the mark of an output from the header that its safetensors form has."""
    known = {name: header[name] for name in ("kind", "t", "t_unit", "run_id") if name in header}
    profile = str(header.get("profile", ""))[:_LONGEST]
    return compact({**known, "profile": profile, "copied": copied})


def decode_mark(text: object, path: Path) -> OutputMark | None:
    """Read the mark of a file at a path; None for anything else under its name."""
    if not isinstance(text, str):
        return None
    with suppress(FileFormatError, ValueError):
        mark: OutputMark = convert(parse_object(path, text, "mark"), OutputMark)
        return mark.at(path)
    return None


# --- the end of archives and pickles


def find_mark(file: OpenedFile) -> tuple[int, str]:
    """Find where a mark at the end of a file begins, and the mark; the end and an empty text if
    there is none."""
    end = file.size - _END.size
    if end < 0:
        return file.size, ""
    length, magic = _END.unpack(file.read_at(_END.size, end))
    if magic != _MAGIC or length > min(end, _MOST):
        return file.size, ""
    begin = end - length
    return begin, file.read_at(length, begin).decode(errors="replace")


def mark_pickle(out: PendingFile, end: int, text: str) -> None:
    """Add a mark to a pickle that ends at a place."""
    out.write_at(_encode_end(text), end)


def mark_archive(out: PendingFile, end: int, text: str, comment: int = 0) -> None:
    """Add a mark to an archive that ends at a place, with so many bytes of comment."""
    added = _encode_end(text)
    out.write_at(added, end)
    size = comment + len(added)
    out.write_at(size.to_bytes(2, "little"), end - comment - 2)


def _encode_end(text: str) -> bytes:
    content = text.encode()
    return content + _END.pack(len(content), _MAGIC)


# --- safetensors


def mark_header(file: OpenedFile, text: str) -> tuple[int, bytes]:
    """Make the header of a safetensors file with a mark; return the length of its own one, too."""
    length = 8 + int.from_bytes(file.read_at(8, 0), "little")
    header = parse_object(file.path, file.read_at(length - 8, 8), "header")
    # libraries that find metadata want to find the format in it
    header["__metadata__"] = {"format": "pt", **header.get("__metadata__", {}), MARK: text}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return length, len(encoded).to_bytes(8, "little") + encoded
