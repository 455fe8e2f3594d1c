"""A module and its averaged copy: pairs of tensors by name, the arithmetic over them, and float32 accumulators.

Averages of bfloat16 (8 significant bits) and float16 (11) are accumulated in float32: an update by 2e-4 of a distance
is less than half of a weight's last bit, so that an average rounded after every update never leaves its start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from posthoc_cli.errors import InvalidValueError, ModelMismatchError
from posthoc_cli.tracker.model_tensors import check_model, named_tensors, unwrapped

ELEMENTS_AT_A_TIME = 2**24
"""An update copies half-precision tensors and sources on other devices: at most about 64 MiB at a time."""
_LISTED_NAMES = 5


class Pair(NamedTuple):
    """A tensor of the average, and the model's of the same name."""

    name: str
    average: torch.Tensor
    source: torch.Tensor


@torch.inference_mode(False)  # an update cannot write to tensors made in inference mode
def make_average(model: torch.nn.Module, device: torch.device | str | None = None) -> torch.nn.Module:
    """A copy of a model that needs no gradients, on `device`, or where the model's tensors are."""
    source = unwrapped(check_model(model))
    for name, parameter in source.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise InvalidValueError(f"parameter {name!r}", "has no shape yet", "run a batch through the model first")
    average = copy.deepcopy(source).requires_grad_(False)
    return average if device is None else average.to(device)


def paired(kind: str, average_module: torch.nn.Module, model: torch.nn.Module) -> list[Pair]:
    """The "parameters" or "buffers" of both, a tied one once; a ModelMismatchError lists what differs."""
    model = unwrapped(check_model(model))
    averages, sources = (dict(getattr(module, f"named_{kind}")()) for module in (average_module, model))
    if averages.keys() != sources.keys():
        # A submodule may have been compiled since: compare the names without wrappers, which is slower.
        averages, sources = _without_wrappers(averages, average_module), _without_wrappers(sources, model)
    if averages.keys() != sources.keys():
        missing, surplus = _listed(averages.keys() - sources.keys()), _listed(sources.keys() - averages.keys())
        reason = f"its {kind} are not the average's; only in the average: {missing}; only in the model: {surplus}"
        raise ModelMismatchError("model", reason)
    pairs = [Pair(name, average, sources[name]) for name, average in averages.items()]
    for name, average, source in pairs:
        if source.shape != average.shape:
            reason = f"has the shape {list(source.shape)} in the model, {list(average.shape)} in the average"
            raise ModelMismatchError(f"tensor {name!r}", reason)
    return pairs


def _without_wrappers(tensors: Mapping[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = {found.raw: found.name for found in named_tensors(module)}
    return {names.get(raw, raw): tensor for raw, tensor in tensors.items()}


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    shown = ", ".join(map(repr, found[:_LISTED_NAMES]))
    return f"{shown} and {len(found) - _LISTED_NAMES} more" if len(found) > _LISTED_NAMES else shown or "none"


def is_averaged(tensor: torch.Tensor) -> bool:
    """Whether averages of such tensors exist: not of integers and booleans."""
    return tensor.is_floating_point() or tensor.is_complex()


def copy_(pairs: Sequence[Pair]) -> None:
    """average <- source."""
    if pairs:
        torch._foreach_copy_([pair.average for pair in pairs], [pair.source for pair in pairs])


def average_(pairs: Iterable[Pair], accumulators: WideAverages, share: float) -> None:
    """average <- average + share (source - average) for `is_averaged` tensors, one fused pass a device and dtype."""
    for averages, sources in wide_averages(pairs, accumulators):
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for average, source in zip(averages, sources, strict=True):
            group = groups.setdefault((average.device, average.dtype), ([], []))
            group[0].append(average)
            group[1].append(source)
        for group in groups.values():
            torch._foreach_lerp_(*group, share)


def average_unless_equal_(pairs: Iterable[Pair], accumulators: WideAverages, share: float) -> None:
    """The same, but equal elements stay: the average of two infinities in a mask would be nan."""
    for averages, sources in wide_averages(pairs, accumulators):
        for average, source in zip(averages, sources, strict=True):
            average.copy_(torch.where(average == source, source, torch.lerp(average, source, share)))


def wide_averages(
    pairs: Iterable[Pair], accumulators: WideAverages
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Averages to be changed in place, and sources on their devices and in their dtypes, some pairs at a time.

    A half-precision average comes as its float32 accumulator, and is rounded from it after each turn of the loop.
    """
    for batch in _batches(pairs):
        narrow = {pair.name: pair.average for pair in batch if is_narrow(pair.average.dtype)}
        wide = accumulators.behind(narrow)
        averages = [wide.get(pair.name, pair.average) for pair in batch]
        unlike = {
            pair.name: (pair.source, average.device, average.dtype)
            for pair, average in zip(batch, averages, strict=True)
            if pair.source.dtype != average.dtype or pair.source.device != average.device
        }
        copies = dict(zip(unlike, copies_like([*unlike.values()]), strict=True))
        yield averages, [copies.get(pair.name, pair.source) for pair in batch]
        if narrow:
            torch._foreach_copy_(list(narrow.values()), [wide[name] for name in narrow])


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Batches that keep both the overhead and the copies of tensors small."""
    batch: list[Pair] = []
    elements = 0
    for pair in pairs:
        batch.append(pair)
        elements += pair.average.numel()
        if elements >= ELEMENTS_AT_A_TIME:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether averages in this dtype would stop moving: floating point of fewer than 32 bits."""
    return dtype.is_floating_point and torch.finfo(dtype).bits < 32


def _kept_wide(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """`after`, which is `before` moved or cast; on its device in the old dtype where it became narrow."""
    return before.to(after.device) if is_narrow(after.dtype) and not is_narrow(before.dtype) else after


def copies_like(wanted: Sequence[tuple[torch.Tensor, torch.device, torch.dtype]]) -> list[torch.Tensor]:
    """Copies of tensors on the given devices and in the given dtypes, in one fused pass."""
    copies = [torch.empty_like(tensor, device=device, dtype=dtype) for tensor, device, dtype in wanted]
    if copies:
        torch._foreach_copy_(copies, [tensor for tensor, _, _ in wanted])
    return copies


class WideBuffers(torch.nn.Module):
    """A module whose own buffers move between devices, but keep their precision under `half()` and `bfloat16()`."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> WideBuffers:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, new in dict(self.named_buffers(recurse=False)).items():
            setattr(self, name, _kept_wide(before[name], new))
        return self


class WideAverages(torch.nn.Module):
    """The float32 averages of half-precision tensors by name; part of the state dict, one key a tensor.

    An element is valid while it rounds to the tensor's element. Otherwise the tensor was written to since (a swap, a
    `load_state_dict` without accumulators), and its value is taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, torch.Tensor] = {}

    def behind(self, rounded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The accumulators of named tensors, to be changed in place; the caller rounds them into the tensors."""
        known = {
            name: self.values[name].to(tensor.device)
            for name, tensor in rounded.items()
            if name in self.values and self.values[name].shape == tensor.shape
        }
        again = copies_like([(value, value.device, rounded[name].dtype) for name, value in known.items()])
        for (name, value), same in zip(known.items(), again, strict=True):
            torch.where(same == rounded[name], value, rounded[name], out=value)
        new = {name: tensor for name, tensor in rounded.items() if name not in known}
        made = copies_like([(tensor, tensor.device, torch.float32) for tensor in new.values()])
        known.update(zip(new, made, strict=True))
        self.values.update(known)
        return known

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> WideAverages:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.values = {name: _kept_wide(value, fn(value)) for name, value in self.values.items()}
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self.values.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Accept a state without accumulators: of another class, or of a float32 model."""
        loaded = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        self.values = {name: value.detach().clone() for name, value in loaded.items()}


class HostNumber:
    """The number in a scalar buffer, cached on the host: reading it from a GPU waits for all work in the queue.

    The buffer is saved, loaded, moved and broadcast; it is read again after others have written to it.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._version = -1
        self._value = 0.0

    def read(self, buffer: torch.Tensor) -> float:
        """The number in `buffer`."""
        if buffer is not self._buffer or buffer._version != self._version:
            self._buffer, self._version, self._value = buffer, buffer._version, float(buffer.item())
        return self._value

    def write_(self, buffer: torch.Tensor, value: float) -> None:
        """Put `value` into `buffer`, and cache it as rounded there, so that a resumed run sees the same."""
        buffer.fill_(value)
        self._buffer, self._version = buffer, buffer._version
        self._value = float(torch.tensor(value, dtype=buffer.dtype))
