"""The checksums in the zip archives that `torch.save` writes, for changes of members in place.

A file holds one archive, or several end to end (torch.distributed.checkpoint). An archive is

    for each member a local header of 30 bytes, name and extra field; the content; and, if bit 3 of
        its flags is set, a descriptor, which begins with a signature and the CRC-32 of the content
    for each member an entry of the central directory: 46 bytes, name, extra field and comment
    in newer ones a record of 56 bytes and its locator of 20, for sizes of 64 bits
    the end, of 22 bytes

Without a descriptor the CRC-32 is in the local header; it is always in the entry, too. torch's
`.data/serialization_id`, a hash of all of them, identifies what was saved, and stays.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots.tensorfile import OpenedFile

_LOCAL = struct.Struct("<4s2xH18xHH")  # signature, flags, lengths of name and extra field
# signature, size, lengths of name, extra field and comment, place of the local header
_ENTRY = struct.Struct("<4s20xL3H8xL")
_RECORD = struct.Struct("<4s36xQQ")  # signature, size and place of the central directory
_END = struct.Struct("<4s8xLL2x")  # the same
_LOCATOR_BYTES = 20
_LOCAL_CRC = 14
_ENTRY_CRC = 16
_DESCRIPTOR_CRC = 4
_HAS_DESCRIPTOR = 8
_IN_EXTRA = 0xFFFFFFFF  # a size or place that takes 64 bits
_EXTRA_64 = 1  # the kind of the extra field that holds these


class Member(NamedTuple):
    """The content of a member, and the places of its CRC-32."""

    begin: int
    end: int
    checksums: tuple[int, ...]


class _Entry(NamedTuple):
    header: int  # the place of the local header
    size: int
    checksum: int


def is_archive(file: OpenedFile) -> bool:
    """Return whether a file begins with an archive."""
    return file.read_at(4, 0) == b"PK\3\4"


def members_at(file: OpenedFile, places: Iterable[int]) -> list[Member]:
    """Return the members that hold the bytes at these places of a file of archives."""
    left = sorted(set(places))
    members = dict[int, Member]()
    end = file.size
    while left:
        begin, entries = _read_directory(file, end)
        _require(file, bool(entries))
        while left and left[-1] >= begin:
            place = left.pop()
            entry = entries[bisect_right(entries, (place,)) - 1]
            if entry.header not in members:
                members[entry.header] = _member(file, entry)
            found = members[entry.header]
            _require(file, found.begin <= place < found.end)
        end = begin
    return [*members.values()]


def _require(file: OpenedFile, is_right: bool) -> None:
    if not is_right:
        reason = "its tensors cannot be replaced in place: not an archive as torch.save writes it"
        raise FileFormatError(file.path, reason)


def _read_directory(file: OpenedFile, end: int) -> tuple[int, list[_Entry]]:
    """Return where the archive begins that ends at `end`, and its entries by their places."""
    at = end - _END.size
    _require(file, at >= 0)
    signature, size, place = _END.unpack(file.read_at(_END.size, at))
    _require(file, signature == b"PK\5\6")
    record = at - _LOCATOR_BYTES - _RECORD.size
    if record >= 0:
        start, *of_record = _RECORD.unpack(file.read_at(_RECORD.size, record))
        if start == b"PK\6\6":
            size, place = of_record
            at = record
    begin = at - size - place
    _require(file, begin >= 0)
    return begin, sorted(_read_entries(file, begin, begin + place, size))


def _read_entries(file: OpenedFile, begin: int, place: int, size: int) -> Iterable[_Entry]:
    directory = file.read_at(size, place)
    at = 0
    while at < size:
        _require(file, at + _ENTRY.size <= len(directory))
        signature, nbytes, *lengths, header = _ENTRY.unpack_from(directory, at)
        _require(file, signature == b"PK\1\2")
        extra = at + _ENTRY.size + lengths[0]
        wide = _wide_numbers(directory[extra : extra + lengths[1]])
        if nbytes == _IN_EXTRA:
            nbytes = wide[0]
        if header == _IN_EXTRA:
            header = wide[-1]
        yield _Entry(begin + header, nbytes, place + at + _ENTRY_CRC)
        at += _ENTRY.size + sum(lengths)


def _wide_numbers(extra: bytes) -> tuple[int, ...]:
    """Return the numbers of 64 bits in an extra field: the size first, the place last."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == _EXTRA_64 and length >= 8:
            return struct.unpack_from(f"<{length // 8}Q", extra, 4)
        extra = extra[4 + length :]
    return (_IN_EXTRA,)


def _member(file: OpenedFile, entry: _Entry) -> Member:
    _require(file, entry.header + _LOCAL.size <= file.size)
    signature, flags, *lengths = _LOCAL.unpack(file.read_at(_LOCAL.size, entry.header))
    _require(file, signature == b"PK\3\4")
    begin = entry.header + _LOCAL.size + sum(lengths)
    end = begin + entry.size
    checksum = entry.header + _LOCAL_CRC
    if flags & _HAS_DESCRIPTOR:
        _require(file, file.read_at(4, end) == b"PK\7\x08")
        checksum = end + _DESCRIPTOR_CRC
    return Member(begin, end, (checksum, entry.checksum))
