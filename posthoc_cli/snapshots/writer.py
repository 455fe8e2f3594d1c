"""The writing of one file of tensors, durably, in the format that `tensorfile` specifies."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.snapshots.entry import BLOCK, Entry
from posthoc_cli.snapshots.strict_json import check_text, compact, require
from posthoc_cli.snapshots.tensorfile import (
    MAX_HEADER_BYTES,
    SUMS_AT,
    TensorFile,
    require_few,
    seal,
)


class TensorFileWriter:
    """A writer of one file, which is absent or complete, see `files.PendingFile`. Call `publish` at
    the end.

    Every byte of every tensor is written once, in any order and by any number of threads. The
    header, which holds the checksums, is laid out first and filled in last.

    Arguments:
        entries: dtype and shape of all tensors that will be written, by name.
        content: the JSON object of this package, without the checksums.
        metadata: further strings of the header.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        content: Mapping[str, Any],
        metadata: Mapping[str, str],
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self.entries = dict[str, Entry]()
        laid_out = lay_out(entries)
        self._header = encode_header(laid_out, content, metadata)
        self._sums = dict[str, bytearray]()
        for name, entry in laid_out.items():
            begin = len(self._header) + entry.begin
            self.entries[name] = replace(entry, begin=begin)
            self._sums[name] = bytearray(16 * entry.blocks)
        self._file = files.PendingFile(path, overwrite)

    def write(
        self,
        name: str,
        parts: Iterable[memoryview],
        begin: int = 0,
    ) -> None:
        """Write complete blocks of a tensor, from byte `begin` on, in consecutive parts of any
        size."""
        entry = self.entries[name]
        digest = xxhash.xxh3_64()
        at = begin
        block = entry.block_bytes
        for part in parts:
            view = part.cast("B")
            self._file.write_at(view, entry.begin + at)
            while view:
                taken = view[: block - at % block]
                digest.update(taken)
                view = view[len(taken) :]
                at = at + len(taken)
                if at % block == 0 or at == entry.nbytes:
                    position = 16 * ((at - 1) // block)
                    self._sums[name][position : position + 16] = digest.hexdigest().encode()
                    digest.reset()

    def publish(self) -> TensorFile:
        """Fill in the header, make the file durable and give it its name; return the file."""
        sums = b"".join(self._sums.values())
        self._header[SUMS_AT : SUMS_AT + len(sums)] = sums
        checksum = seal(self._header)
        self._file.write_at(memoryview(self._header), 0)
        status = os.fstat(self._file.descriptor)
        self._file.publish()
        texts = {name: of_tensor.decode() for name, of_tensor in self._sums.items()}
        stamp = status.st_size, status.st_mtime_ns
        return TensorFile(self.path, self.entries, stamp, texts, checksum=checksum)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was written; do nothing after `publish`."""
        self._file.discard()


def encode_header(
    entries: Mapping[str, Entry],
    content: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> bytearray:
    """Lay out a file's bytes up to the payload, for tensors in its order, with zeros for all
    checksums.

    Raises InvalidValueError for a header that readers would refuse.
    """
    blocks = sum(entry.blocks for entry in entries.values())
    own = compact({"sums": "0" * (16 * blocks), **content})
    strings = {"ema.checksum": "0" * 16, "ema": own, "format": "pt", **metadata}
    header: dict[str, Any] = {"__metadata__": strings}
    try:
        require_few(len(entries))
        for name, entry in entries.items():
            problem = "no tensor in a safetensors file can be named '__metadata__'"
            require(name not in header, problem)
            offsets = [entry.begin, entry.begin + entry.nbytes]
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        written = compact(header)
        check_text(written)
        text = written.encode()
        text += b" " * (-len(text) % 8)
        problem = f"would take {len(text):,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
        require(len(text) <= MAX_HEADER_BYTES, problem)
    except ValueError as error:
        raise InvalidValueError("header", str(error)) from None
    return bytearray(len(text).to_bytes(8, "little") + text)


def lay_out(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Assign places in a payload: wide items first, so that every tensor is aligned to its item
    size.

    Among items of one width, tensors of one block come last, next to each other: a synthesis reads
    many of them at a time.
    """

    def place(name: str) -> tuple[int, bool]:
        return -ITEM_BYTES[entries[name].dtype], entries[name].size <= BLOCK

    placed: dict[str, Entry] = {}
    begin = 0
    for name in sorted(entries, key=place):
        entry = entries[name]
        placed[name] = Entry(entry.dtype, entry.shape, begin)
        begin += entry.nbytes
    return placed
