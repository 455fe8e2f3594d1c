"""Every byte of a file against its checksums, on all cores and in constant memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.reader import TensorFile

THREADS = 8
"""Blocks that are read at a time: some devices need several requests in flight."""


def verify_payload(path: Path, header: fmt.FileHeader, progress: Callable[[int], object] | None = None) -> None:
    """Read a file and check each block of each tensor. Memory: a block a thread.

    Arguments:
        path: the file.
        header: what it must still have.
        progress: called with the bytes of each tensor that was read, in this thread.

    Raises:
        FileFormatError: the file was replaced, or naming it and the tensor that is damaged.
    """
    own = threading.local()

    def check(name: str) -> int:
        if not hasattr(own, "room"):
            own.room = memoryview(bytearray(fmt.BLOCK_BYTES))
        nbytes = header.tensors[name].nbytes
        reader = file.read_range(name, 0, nbytes)
        for begin in range(0, nbytes, fmt.BLOCK_BYTES):
            reader.read_into(own.room[: min(fmt.BLOCK_BYTES, nbytes - begin)])
        return nbytes

    with TensorFile(path, header) as file, ThreadPoolExecutor(THREADS, "ema-verify") as pool:
        try:
            for nbytes in pool.map(check, header.tensors):
                if progress is not None:
                    progress(nbytes)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
