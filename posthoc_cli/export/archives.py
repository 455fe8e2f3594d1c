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
from typing import Any, NamedTuple

from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots.tensorfile import OpenedFile

_LOCAL = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
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


def is_archive(file: OpenedFile) -> bool:
    """Return whether a file begins with an archive."""
    return file.read_at(4, 0) == b"PK\3\4"


def members_at(file: OpenedFile, places: Iterable[int]) -> set[Member]:
    """Return the members that hold the bytes at these places of a file of archives."""
    left = sorted(places)
    members = set[Member]()
    end = file.size
    try:
        while left:
            archive = zipfile.ZipFile(io.BufferedReader(_Beginning(file, end)))
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
    header = info.header_offset
    _, *lengths = _LOCAL.unpack(file.read_at(_LOCAL.size, header))
    begin = header + _LOCAL.size + sum(lengths)
    end = begin + info.file_size
    checksum = header + _LOCAL_CRC
    if info.flag_bits & _HAS_DESCRIPTOR:
        checksum = end + _DESCRIPTOR_CRC
    if not begin <= place < end:
        raise ValueError("a tensor is outside the members")
    return Member(begin, end, (checksum, entry + _ENTRY_CRC))


class _Beginning(io.RawIOBase):
    """A file up to some place, as a standard stream."""

    def __init__(self, file: OpenedFile, end: int) -> None:
        self._file = file
        self._end = end
        self._at = 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._at
        elif whence == io.SEEK_END:
            offset += self._end
        self._at = max(0, offset)
        return self._at

    def readinto(self, view: Any) -> int:
        count = max(0, self._end - self._at)
        count = self._file.read_into(memoryview(view)[:count], self._at)
        self._at += count
        return count
