"""Durable writing of safetensors files with checksums.

A file is absent or complete, see `files.PendingFile`: a write that was not committed leaves nothing. Every byte of
every tensor is written exactly once, in any order and from any number of threads, and has a checksum. The header, which
holds the checksums, is laid out first and filled in last. Memory: the header and what is being written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import xxhash

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.files import PendingFile
from posthoc_cli.snapshots import format as fmt


class TensorFileWriter:
    """Writes one safetensors file. Use it as a context manager and end with `commit`.

    `specs` are all tensors that will be written; checksums are added to `metadata`.
    """

    def __init__(
        self, path: Path, specs: Sequence[fmt.TensorSpec], metadata: Mapping[str, str], overwrite: bool = False
    ) -> None:
        self.path, self._metadata = path, metadata
        self._entries = fmt.lay_out(specs)
        self._blocks: dict[str, list[str | None]] = {
            name: [None] * -(-entry.nbytes // fmt.BLOCK_BYTES) for name, entry in self._entries.items()
        }
        blank = {name: fmt.blank_checksums(entry.nbytes) for name, entry in self._entries.items()}
        self._payload_start = len(fmt.encode_header(self._entries, metadata, blank))
        self._file = PendingFile(path, overwrite)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write the bytes of one tensor to its place, once."""
        self.write_many([name], memoryview(data))

    def write_many(self, names: Sequence[str], data: memoryview) -> None:
        """Write the bytes of several tensors, which follow each other in `data`; neighbours go in one write."""
        view = data.cast("B")
        ends = list(accumulate(self._entries[name].nbytes for name in names))
        if len(view) != ends[-1]:
            raise InvalidValueError(self.path, f"tensor {names[-1]!r}: {len(view):,} bytes where {ends[-1]:,} were due")
        begin = run = 0
        for name, end, following in zip(names, ends, [*names[1:], None], strict=True):
            for index, checksum in enumerate(fmt.block_checksums(view[begin:end])):
                self._blocks[name][index] = checksum
            stop = self._position(name) + end - begin
            if following is None or self._position(following) != stop:
                self._file.write_at(view[run:end], stop - (end - run))
                run = end
            begin = end

    def write_range(self, name: str, begin: int) -> RangeWriter:
        """Write the bytes of a tensor from `begin` on, the start of a block, in order and in parts."""
        return RangeWriter(self._file, self._blocks[name], begin, self._position(name))

    def commit(self) -> str:
        """Fill in the header, make everything durable, and give the file its name; returns the header's checksum."""
        checksums = {name: "".join(block or "" for block in blocks) for name, blocks in self._blocks.items()}
        for name, entry in self._entries.items():
            if len(checksums[name]) != len(fmt.blank_checksums(entry.nbytes)):
                raise InvalidValueError(self.path, f"tensor {name!r} was never written")
        header = fmt.encode_header(self._entries, self._metadata, checksums)
        self._file.write_at(header, 0)
        self._file.publish()
        return fmt.header_checksum(header)

    def _position(self, name: str) -> int:
        return self._payload_start + self._entries[name].begin

    def discard(self) -> None:
        """Remove what was written; does nothing after `commit`."""
        self._file.discard()

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


class RangeWriter:
    """Some blocks of one tensor, written in order, in parts of any size; checksums run along."""

    def __init__(self, file: PendingFile, blocks: list[str | None], begin: int, start: int) -> None:
        self._file, self._blocks, self._position, self._start = file, blocks, begin, start
        self._hash = xxhash.xxh3_64()

    def write(self, data: memoryview) -> None:
        """Write the bytes that come next."""
        view = data.cast("B")
        self._file.write_at(view, self._start + self._position)
        while view:
            index = self._position // fmt.BLOCK_BYTES
            left = fmt.BLOCK_BYTES - self._position % fmt.BLOCK_BYTES
            part, view = view[:left], view[left:]
            self._hash.update(part)
            self._position += len(part)
            if len(part) == left:
                self._finish_block(index)

    def close(self) -> None:
        """Finish the last block, which may be shorter than the others."""
        if self._position % fmt.BLOCK_BYTES:
            self._finish_block(self._position // fmt.BLOCK_BYTES)

    def _finish_block(self, index: int) -> None:
        self._blocks[index] = self._hash.hexdigest()
        self._hash.reset()
