"""Everything that is checked of a file without making anything of it, behind one function."""

from __future__ import annotations

from pathlib import Path

from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots.check import list_contents, verify
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.outputs import INDEX_NAME, decode_output, read_index
from posthoc_cli.snapshots.reader import TensorFile
from posthoc_cli.snapshots.states import decode_state

Content = dict[str, object]
"""What a file holds: the bytes of each tensor by name, and what the file says about itself under ""."""


def examine(path: Path) -> Content:
    """Verify a snapshot, an output, a state, or the shards beside an index as `ema verify` does; returns the content.

    Raises:
        PostHocError: naming the file.
    """
    for report in verify(list_contents(path)).files:
        if not report.is_fine:
            raise FileFormatError(report.path, report.detail)
    if path.name != INDEX_NAME:
        return _content(path)
    content: Content = {}
    for shard in read_index(path):
        content |= _content(path.parent / shard)
    return content


def _content(path: Path) -> Content:
    decoders = {"snapshot": decode_snapshot, "output": decode_output, "state": decode_state}
    with TensorFile(path) as file:
        kind = file_kind(file.header)
        if kind not in decoders:
            raise FileFormatError(path, f"its ema.format is {str(kind)[:40]!r}")
        said = decoders[kind](path, file.header)
        return {"": said} | {name: file.read(name).tobytes() for name in file.header.tensors}
