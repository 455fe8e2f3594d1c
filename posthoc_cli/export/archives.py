"""The checksums in the zip archives that `torch.save` writes, for changes of members in place.

A file is one archive, or several end to end (torch.distributed.checkpoint). The CRC-32 of a member
is in its entry in the central directory, at the end of the archive, and either in the descriptor
after its content, if bit 3 of its flags is set, or in the local header before it. torch's
`.data/serialization_id`, a hash of all of them, says which save a file is of, and stays.
"""

from __future__ import annotations

import io
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from posthoc_cli.checkpoints.pickles import FileRange, member_begin
from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots.tensorfile import OpenedFile

_LOCAL_CRC = 14
_DESCRIPTOR_CRC = 4
_ENTRY_CRC = 16
_ENTRY_BYTES = 46  # of an entry of the central directory, without name, extra field and comment
_HAS_DESCRIPTOR = 8
_IS_UTF8 = 0x800


class Member(NamedTuple):
    """The content of a member, and the places of its CRC-32."""

    begin: int
    end: int
    checksums: tuple[int, int]


def members_at(file: OpenedFile, places: Iterable[int]) -> set[Member]:
    """Return the members that hold the bytes at these places of a file of archives."""
    left = sorted(places)
    members = set[Member]()
    end = file.size
    try:
        while left:
            archive = zipfile.ZipFile(io.BufferedReader(FileRange(file, 0, end)))
            entries = _entries(archive)
            headers = sorted(entries)
            end = headers[0]
            while left and left[-1] >= end:
                place = left.pop()
                header = headers[bisect_right(headers, place) - 1]
                members.add(_member(file, *entries[header], place))
    except (zipfile.BadZipFile, ValueError, LookupError, struct.error) as error:
        reason = "its tensors cannot be replaced in place: not an archive as torch.save writes it"
        raise FileFormatError(file.path, reason) from error
    return members


def _entries(archive: zipfile.ZipFile) -> dict[int, tuple[zipfile.ZipInfo, int]]:
    """Return members, and the places of their entries, by the places of their local headers."""
    entries = dict[int, tuple[zipfile.ZipInfo, int]]()
    at = archive.start_dir
    for info in archive.infolist():
        entries[info.header_offset] = info, at
        encoding = "utf-8" if info.flag_bits & _IS_UTF8 else "cp437"
        at += _ENTRY_BYTES
        at += len(info.orig_filename.encode(encoding))
        at += len(info.extra)
        at += len(info.comment)
    return entries


def _member(
    file: OpenedFile,
    info: zipfile.ZipInfo,
    entry: int,
    place: int,
) -> Member:
    begin = member_begin(file, info)
    end = begin + info.file_size
    checksum = info.header_offset + _LOCAL_CRC
    if info.flag_bits & _HAS_DESCRIPTOR:
        checksum = end + _DESCRIPTOR_CRC
    if not begin <= place < end:
        raise ValueError("a tensor is outside the members")
    return Member(begin, end, (checksum, entry + _ENTRY_CRC))
