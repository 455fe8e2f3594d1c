"""Pinned memory on the host: what an accelerator copies to by itself, while everybody else goes on."""

from __future__ import annotations

import mmap
import os
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device."""


def pinned_empty(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor without values in pinned memory of the host, less than a page larger than they are.

    torch's own pinned memory comes in powers of two, up to twice as much. This is memory of the system's, registered
    as it is, and registered no longer when the last tensor that uses it is gone. What is copied to it must be waited
    for by an event: torch does not keep it until the copy is done.
    """
    nbytes = elements * dtype.itemsize
    if not nbytes:
        return torch.empty(0, dtype=dtype)
    # Shared with processes that are forked: of private pages, a copy that is written after a fork may miss ours.
    block = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    if not _register(block.ctypes.data, nbytes):
        return torch.empty(elements, dtype=dtype, pin_memory=True)
    # The tensor's storage holds `block`, which holds the memory: this is called between the ends of the two.
    weakref.finalize(block, _unregister, block.ctypes.data, os.getpid()).atexit = False
    return torch.from_numpy(block).view(dtype)


def _register(address: int, nbytes: int) -> bool:
    """Pin memory; False where the system does not pin memory that is there already."""
    cuda: Any = torch.cuda
    cudart = cuda.cudart()
    current = cuda.current_device()
    # As torch does: on a device that is not in use yet, this would make a context, which takes memory there.
    with cuda.device(next(iter(_devices_in_use()), current)):
        if int(cudart.cudaHostRegister(address, nbytes, _PORTABLE)) == 0:
            return True
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda").neg_()  # takes the error, which the training's next kernel would raise
    return False


def _unregister(address: int, process: int) -> None:
    """Undo `_register`; for what a forked process has copied there is nothing to undo."""
    if process != os.getpid():
        return
    cuda: Any = torch.cuda
    for device in _devices_in_use():
        cuda.synchronize(device)  # after an error nobody has waited for the copies that are on their way
    cuda.cudart().cudaHostUnregister(address)


def _devices_in_use() -> list[int]:
    """Devices that this process has a context on, the current one first."""
    count, current = torch.cuda.device_count(), torch.cuda.current_device()
    has_context: Any = torch._C._cuda_hasPrimaryContext  # type: ignore[attr-defined]
    return [device for device in sorted(range(count), key=lambda device: device != current) if has_context(device)]
