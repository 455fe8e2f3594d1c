"""Durable writing of safetensors files with checksums.

What holds, whatever happens in between:

1. A file is absent or whole. It is written under a temporary name in its own directory, fsynced, put under its
   final name in one step, and the directory is fsynced.
2. Nothing is written in place. A reader that has an older file open keeps it.
3. What was not committed leaves nothing behind: neither an error nor Ctrl-C finalizes a file.
4. Every tensor is written exactly once, and every byte has a checksum.

Memory: the header and one tensor. Tensors go to their places as they come, in any order; the header, which
holds their checksums, is laid out first and filled in last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.files import PendingFile
from posthoc_cli.snapshots import format as fmt


class TensorFileWriter:
    """Writes one safetensors file. Use it as a context manager and end with `commit`.

    Arguments:
        path: the final name.
        specs: every tensor that will be written.
        metadata: strings for the header; the checksums are added.
        overwrite: replace a file of that name, in the moment of `commit`.
    """

    def __init__(
        self,
        path: Path,
        specs: Sequence[fmt.TensorSpec],
        metadata: Mapping[str, str],
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self._metadata = metadata
        self._entries = fmt.lay_out(specs)
        self._missing = set(self._entries)
        self._checksums = {name: fmt.blank_checksums(entry.nbytes) for name, entry in self._entries.items()}
        self._payload_start = len(fmt.encode_header(self._entries, metadata, self._checksums))
        self._file = PendingFile(path, overwrite)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write the bytes of one tensor to its place, once."""
        if name not in self._missing:
            problem = "written twice" if name in self._entries else "not one of those announced"
            raise InvalidValueError(f"{self.path}: tensor {name!r}: {problem}")
        entry = self._entries[name]
        view = memoryview(data).cast("B")
        if len(view) != entry.nbytes:
            raise InvalidValueError(
                f"{self.path}: tensor {name!r}: {len(view):,} bytes where {entry.nbytes:,} were due"
            )
        self._checksums[name] = "".join(fmt.block_checksums(view))
        self._file.write_at(view, self._payload_start + entry.begin)
        self._missing.remove(name)

    def commit(self) -> str:
        """Fill in the header, make everything durable, and give the file its name; returns the header's checksum."""
        if self._missing:
            raise InvalidValueError(f"{self.path}: tensor {min(self._missing)!r} was never written")
        header = fmt.encode_header(self._entries, self._metadata, self._checksums)
        self._file.write_at(header, 0)
        self._file.publish()
        return fmt.header_checksum(header)

    def discard(self) -> None:
        """Remove what was written; nothing happens after `commit`."""
        self._file.discard()

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()
