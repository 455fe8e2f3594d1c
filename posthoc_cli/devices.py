"""Accelerators: their names, and the streams that order work on them.

torch has a module for each kind: torch.cuda, also with ROCm; torch.xpu; torch.npu and others that
plug-ins register. All have streams of the same shape. The rest of the package asks here, and names
no kind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def streams_of(device: torch.device) -> Any:
    """Find the module of torch that has a device's streams; None if copies are waited for, as on
    the CPU and on Apple's GPU."""
    if device.type in ("cpu", "mps"):
        return None
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "Stream") else None


@contextmanager
def in_stream(stream: Any) -> Iterator[None]:
    """Work in a stream.

    Its device is made current first: entering a stream of another device, and leaving it, sets the
    current device, and setting the first one makes a context on it of some hundred megabytes.
    """
    module = streams_of(stream.device)
    with module.device(stream.device), module.stream(stream):
        yield


def record_end(device: torch.device) -> Any:
    """Record an event in the current stream of a device. With CUDA a thread that waits for it
    sleeps, and takes no core from the training."""
    module = streams_of(device)
    event = module.Event(blocking=True) if module is torch.cuda else module.Event()
    module.current_stream(device).record_event(event)
    return event


def copy_to_host(target: Tensor, values: Tensor) -> None:
    """Copy values into memory of the host: complete when the current stream of their device is.

    Apple's GPU copies only between places at multiples of 4 bytes, where whole tensors begin.
    """
    if values.device.type != "cpu" and streams_of(values.device) is None:
        values = values.clone().cpu()
    target.copy_(values, non_blocking=True)


def is_capturing() -> bool:
    """Return whether the current stream's work is captured by a CUDA graph."""
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())


def count_devices(kind: str) -> int:
    """Count the accelerators of a kind, such as "cuda"; 0 of one that torch does not know."""
    module: Any = getattr(torch, kind, None)
    if kind == "cpu" or not hasattr(module, "device_count"):
        return 0
    return int(module.device_count())


def visible_cuda_devices() -> list[str]:
    """List the CUDA devices of this process, each as CUDA_VISIBLE_DEVICES would name it alone."""
    count = count_devices("cuda")
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if given is None else given.split(",")
    return names[:count]


def list_devices() -> list[str]:
    """List the names of the devices of this machine, from the CPU on."""
    names = ["cpu"]
    plugged: Any = torch._C._get_privateuse1_backend_name()
    for kind in ("cuda", "xpu", "mps", plugged):
        names += [f"{kind}:{index}" for index in range(count_devices(kind))]
    return names
