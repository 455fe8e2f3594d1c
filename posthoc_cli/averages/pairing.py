"""A module and its average: the copy, which tensor belongs to which, and the arithmetic over all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from posthoc_cli.averages.precision import Accumulators, copies_like, is_narrow
from posthoc_cli.errors import InvalidValueError, ModelMismatchError
from posthoc_cli.tracker.model_tensors import check_model
from posthoc_cli.tracker.naming import named_tensors, unwrapped

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
