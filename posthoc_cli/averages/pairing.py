"""A module and its average: the copy, which tensor belongs to which, and the arithmetic over all of them.

Averages of half-precision tensors: where the bits are kept that the tensors have no room for.

bfloat16 has 8 significant bits, float16 has 11. An update by 2e-4 of a distance is smaller than half of a weight's last
bit unless the distance is larger than the weight: rounded to such a dtype after every update, an average never leaves
its start.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from posthoc_cli.errors import InvalidValueError, ModelMismatchError
from posthoc_cli.tracker.model_tensors import check_model
from posthoc_cli.tracker.names import named_tensors, unwrapped


def check_number(name: str, value: float, accepts: Callable[[float], bool], accepted: str) -> float:
    """`value` as a float, or an InvalidValueError that says what is `accepted`; `accepts` is False for nan."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan
    if not accepts(number):
        raise InvalidValueError(f"{name} {value!r}", f"must {accepted}")
    return number


# --- Numbers that live in a buffer and are read on the host ----------------------------------------


class HostNumber:
    """What a scalar buffer holds, known without asking its device.

    The buffer is what is saved, loaded, moved and broadcast. Reading it from a GPU would wait for all work that was
    queued before, in every training step; so it is read only after somebody else has written to it.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._version = -1
        self._value = 0.0

    def read(self, buffer: torch.Tensor) -> float:
        """The number in `buffer`."""
        if buffer is not self._buffer or buffer._version != self._version:
            self._note(buffer, float(buffer.item()))
        return self._value

    def write_(self, buffer: torch.Tensor, value: float) -> None:
        """Put `value` into `buffer`, and go on with it as rounded there, as a resumed run will."""
        buffer.fill_(value)
        self._note(buffer, float(torch.tensor(value, dtype=buffer.dtype)))

    def _note(self, buffer: torch.Tensor, value: float) -> None:
        self._buffer, self._version, self._value = buffer, buffer._version, value


# --- Averages of half-precision tensors: where the bits are kept that the tensors have no room for ---


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether averages in this dtype would stop moving: floating-point of fewer than 32 bits."""
    return dtype.is_floating_point and torch.finfo(dtype).bits < 32


def kept_wide(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What a module keeps of `before` when it was moved or cast to `after`: the new device, but no narrow dtype."""
    return before.to(after.device) if is_narrow(after.dtype) and not is_narrow(before.dtype) else after


def copies_like(wanted: Sequence[tuple[torch.Tensor, torch.device, torch.dtype]]) -> list[torch.Tensor]:
    """Copies of tensors on other devices and in other dtypes, in one fused pass."""
    copies = [torch.empty_like(tensor, device=device, dtype=dtype) for tensor, device, dtype in wanted]
    if copies:
        torch._foreach_copy_(copies, [tensor for tensor, _, _ in wanted])
    return copies


class WideBuffers(torch.nn.Module):
    """A module whose own buffers follow to another device, but keep their precision under `half()` and the like."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> WideBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None:
                self._buffers[name] = kept_wide(old, new)
        return self


class Accumulators(torch.nn.Module):
    """The float32 averages behind half-precision tensors, which hold them rounded.

    An element counts as long as it rounds to the tensor's: whoever wrote to the tensor since (a swap, a
    `load_state_dict` of a state without accumulators) has the last word. They are part of the state dict, one key a
    half-precision tensor; a model without such tensors has none.

    Attributes:
        values: name of the tensor -> float32 average.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, torch.Tensor] = {}

    def behind(self, names: Sequence[str], rounded: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The float32 averages behind tensors, to be changed in place; the caller then rounds them into the tensors."""
        wanted = dict(zip(names, rounded, strict=True))
        known = {}
        for name, tensor in wanted.items():
            value = self.values.get(name)
            if value is not None and value.shape == tensor.shape:
                known[name] = value.to(tensor.device)
        again = copies_like([(value, value.device, wanted[name].dtype) for name, value in known.items()])
        for (name, value), same in zip(known.items(), again, strict=True):
            torch.where(same == wanted[name], value, wanted[name], out=value)
        new = [name for name in names if name not in known]
        made = copies_like([(wanted[name], wanted[name].device, torch.float32) for name in new])
        self.values.update(known)
        self.values.update(zip(new, made, strict=True))
        return [self.values[name] for name in names]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Accumulators:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.values = {name: kept_wide(value, fn(value)) for name, value in self.values.items()}
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self.values.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Take what is there: a state of another class, or of a float32 model, has none."""
        self.values = {
            key.removeprefix(prefix): value.detach().clone()
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }


# --- A module and its average: the copy, which tensor belongs to which, and the arithmetic over all of th ---


LISTED_NAMES = 5

ELEMENTS_AT_A_TIME = 2**24
"""Half-precision tensors and sources on other devices are copied for an update: 64 MiB at a time, not a whole model."""


class Pair(NamedTuple):
    """A tensor of the average, and the model's of the same name."""

    name: str
    average: torch.Tensor
    source: torch.Tensor


@torch.inference_mode(False)  # made there, no later update could write to it
def make_average(model: torch.nn.Module, device: torch.device | str | None = None) -> torch.nn.Module:
    """A copy of a model that needs no gradients, on `device`, or where the model's tensors are.

    Raises:
        InvalidValueError: it is no module, or has parameters without a shape yet.
    """
    source = unwrapped(check_model(model))
    for name, parameter in source.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise InvalidValueError(
                "parameter", "has no shape yet", "run a batch through the model first", value=f"{name!r}"
            )
    average = copy.deepcopy(source).requires_grad_(False)
    return average if device is None else average.to(device)


def pair_parameters(average: torch.nn.Module, model: torch.nn.Module) -> list[Pair]:
    """The parameters of both, a tied one once.

    Raises:
        ModelMismatchError: names or shapes differ; lists them.
    """
    return _pair("parameters", average, unwrapped(check_model(model)), lambda module: module.named_parameters())


def pair_buffers(average: torch.nn.Module, model: torch.nn.Module) -> list[Pair]:
    """The buffers of both, those that are not in the state dict too.

    Raises:
        ModelMismatchError: names or shapes differ; lists them.
    """
    return _pair("buffers", average, unwrapped(check_model(model)), lambda module: module.named_buffers())


Named = Callable[[torch.nn.Module], Iterable[tuple[str, torch.Tensor]]]


def _pair(kind: str, average_module: torch.nn.Module, model: torch.nn.Module, named: Named) -> list[Pair]:
    averages, sources = dict(named(average_module)), dict(named(model))
    if averages.keys() != sources.keys():
        # A part of one of them may have been compiled since: slower, and the same name whatever wraps it.
        averages, sources = _without_wrappers(averages, average_module), _without_wrappers(sources, model)
    if averages.keys() != sources.keys():
        missing, surplus = _listed(averages.keys() - sources.keys()), _listed(sources.keys() - averages.keys())
        raise ModelMismatchError(
            "model", f"its {kind} are not the average's; only in the average: {missing}; only in the model: {surplus}"
        )
    pairs = []
    for name, average in averages.items():
        source = sources[name]
        if source.shape != average.shape:
            raise ModelMismatchError(
                f"tensor {name!r}",
                f"has the shape {list(source.shape)} in the model, {list(average.shape)} in the average",
            )
        pairs.append(Pair(name, average, source))
    return pairs


def _without_wrappers(tensors: Mapping[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = {found.raw: found.name for found in named_tensors(module)}
    return {names.get(raw, raw): tensor for raw, tensor in tensors.items()}


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    shown = ", ".join(map(repr, found[:LISTED_NAMES]))
    return f"{shown} and {len(found) - LISTED_NAMES} more" if len(found) > LISTED_NAMES else shown or "none"


# --- arithmetic ------------------------------------------------------------------------------------


def is_averaged(tensor: torch.Tensor) -> bool:
    """Whether an average of such tensors exists: of whole numbers and truth values it does not."""
    return tensor.is_floating_point() or tensor.is_complex()


def copy_(pairs: Iterable[Pair]) -> None:
    """average <- source."""
    chosen = list(pairs)
    if chosen:
        torch._foreach_copy_([pair.average for pair in chosen], [pair.source for pair in chosen])


def average_(pairs: Iterable[Pair], accumulators: Accumulators, share: float) -> None:
    """average <- average + share (source - average), one fused pass a device and dtype.

    Arguments:
        pairs: floating-point or complex tensors.
        accumulators: hold what averages of half-precision tensors are before they are rounded.
        share: of the new value, in (0, 1].
    """

    def update_(averages: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for average, source in zip(averages, sources, strict=True):
            groups.setdefault((average.device, average.dtype), []).append((average, source))
        for group in groups.values():
            torch._foreach_lerp_([average for average, _ in group], [source for _, source in group], share)

    with_wide_averages(pairs, accumulators, update_)


def average_unless_equal_(pairs: Iterable[Pair], accumulators: Accumulators, share: float) -> None:
    """The same, but an element that has not changed stays as it is: the mean of two infinities in a mask is no nan."""

    def update_(averages: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        for average, source in zip(averages, sources, strict=True):
            average.copy_(torch.where(average == source, source, torch.lerp(average, source, share)))

    with_wide_averages(pairs, accumulators, update_)


def with_wide_averages(
    pairs: Iterable[Pair],
    accumulators: Accumulators,
    update_: Callable[[list[torch.Tensor], list[torch.Tensor]], None],
) -> None:
    """Call `update_(averages, sources)` on tensors that average at full precision, and round what it has changed.

    A source comes on its average's device and in its dtype, which is float32 behind a half-precision tensor.
    """
    for run in _runs(pairs):
        narrow = [pair for pair in run if is_narrow(pair.average.dtype)]
        rounded = [pair.average for pair in narrow]
        exact = accumulators.behind([pair.name for pair in narrow], rounded)
        wide = dict(zip((pair.name for pair in narrow), exact, strict=True))
        averages = [wide.get(pair.name, pair.average) for pair in run]
        update_(averages, _sources_like(averages, [pair.source for pair in run]))
        if rounded:
            torch._foreach_copy_(rounded, exact)


def _runs(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """As many pairs at a time as make the work around the arithmetic small, and copies of their tensors too."""
    run: list[Pair] = []
    elements = 0
    for pair in pairs:
        run.append(pair)
        elements += pair.average.numel()
        if elements >= ELEMENTS_AT_A_TIME:
            yield run
            run, elements = [], 0
    if run:
        yield run


def _sources_like(averages: list[torch.Tensor], sources: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sources on their averages' devices and in their dtypes; as they are where they fit."""
    unlike = [
        index
        for index, (average, source) in enumerate(zip(averages, sources, strict=True))
        if source.dtype != average.dtype or source.device != average.device
    ]
    copies = copies_like([(sources[index], averages[index].device, averages[index].dtype) for index in unlike])
    for index, copied in zip(unlike, copies, strict=True):
        sources[index] = copied
    return sources
