"""The work: tensors read, summed and cast, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from posthoc_cli.errors import InvalidValueError, NonFiniteError
from posthoc_cli.synthesis.plan import Plan, names_by_tensor, output_dtype
from posthoc_cli.synthesis.sources import OpenSource

if TYPE_CHECKING:
    import torch

Progress = Callable[[int], None]
"""Called with the number of bytes that were just read."""


def synthesize(
    plan: Plan,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Stream the targets' tensors: (name, one tensor a target), on `device`.

    Arguments:
        plan: from `plan_synthesis`.
        dtype: of the averages; None for each parameter's own. Copies (buffers) keep their own.
        device: where the sums are made.
        progress: told the bytes read so far.

    Raises:
        FileFormatError: a snapshot is damaged, naming it and the tensor.
        NonFiniteError: a result is not finite, or `dtype` cannot hold it, naming the tensor.
    """
    from posthoc_cli.snapshots.tensors import torch_dtype

    info = plan.newest.info
    names = names_by_tensor(info)
    with ExitStack() as stack:
        opened = [stack.enter_context(source.open()) for source in plan.sources]
        newest = opened[plan.sources.index(plan.newest)]
        for name, tensor in info.tensors.items():
            if tensor.role == "copy":
                values = [newest.read(name).to(device)] * len(plan.targets)
                if progress is not None:
                    progress(_read_bytes(plan, values[0]))
            else:
                values = _combine(plan, opened, name, device, progress)
                stored = torch_dtype(output_dtype(tensor.role, tensor.dtype, dtype))
                for index, value in enumerate(values):
                    values[index] = _cast(name, value, stored)
            for alias in names[name]:
                yield alias, values
            del values  # not held while the next tensor is made


def _read_bytes(plan: Plan, value: torch.Tensor) -> int:
    """Progress for a copy: it is read from one source, but counted for all in `Plan.read_bytes`."""
    return len(plan.sources) * value.nbytes


def _combine(
    plan: Plan, opened: Sequence[OpenSource], name: str, device: torch.device | str, progress: Progress | None
) -> list[torch.Tensor]:
    """The sums over all sources, one a target. Each is a tensor of its own: callers keep them."""
    import torch

    wide = torch.float64 if plan.newest.info.tensors[name].dtype == "F64" else torch.float32
    sums = [torch.zeros(plan.newest.shapes[name], dtype=wide, device=device) for _ in plan.targets]
    for source, row in zip(opened, plan.reconstruction.coefficients, strict=True):
        value = source.read(name)
        nbytes = value.nbytes
        value = value.to(device, wide)
        for total, coefficient in zip(sums, row, strict=True):
            total.add_(value, alpha=float(coefficient))
        if progress is not None:
            progress(nbytes)
    return sums


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    import torch

    result = value.to(dtype)
    if not bool(torch.isfinite(result).all()):
        if bool(torch.isfinite(value).all()):
            largest = float(value.abs().max())
            raise NonFiniteError(
                f"tensor {name!r}: {dtype} cannot hold its largest value, {largest:.6g}; take float32 or bfloat16"
            )
        raise NonFiniteError(f"tensor {name!r}: the result is not finite; a snapshot holds nan or infinity")
    return result


def parse_device(device: str) -> str:
    """The device to make sums on. "auto" is the CPU: for a few targets the bus would be the limit.

    Raises:
        InvalidValueError: not a device, or not there; says what is.
    """
    import torch

    available = ["cpu"]
    available += [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    if device == "auto":
        return "cpu"
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in available:
        raise InvalidValueError(f"device {device!r}: is not there; choose from auto, {', '.join(available)}")
    return wanted
