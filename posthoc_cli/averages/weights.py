"""Averages of a model's weights with one decay, compatible with mmengine's class and with TensorFlow's formula.

Averages of bfloat16 (8 significant bits) and float16 (11) are accumulated in float32: an update by 2e-4 of a distance
is less than half of a weight's last bit, so that an average rounded after every update never leaves its start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from posthoc_cli.errors import InvalidValueError, ModelMismatchError, check_count, check_number, warn
from posthoc_cli.tracker.model_tensors import check_model, named_tensors, unwrapped

SUSPICIOUS_MOMENTUM = 0.5


class WideBuffers(torch.nn.Module):
    """A module whose own buffers move between devices, but keep their precision under `half()` and `bfloat16()`."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> WideBuffers:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, new in dict(self.named_buffers(recurse=False)).items():
            setattr(self, name, _kept_wide(before[name], new))
        return self


class ExponentialMovingAverage(torch.nn.Module):
    """An average of a model's parameters with exponentially decaying weights.

    The first `update_parameters` copies the model. Later ones average at every `interval`-th call:

        average <- (1 - momentum) average + momentum parameter

    `forward` runs the averaged module. The interface and the names in the state dict (`module.*`, `steps`) are those
    of `mmengine.model.ExponentialMovingAverage` (also of mmedit's and mmagic's), whose states load; one from before
    mmengine 1.0 (names without `module.`, no `steps`) as the state after one update.

    Half-precision parameters are averaged in float32; `module` holds them rounded, and the exact averages are in the
    state dict as `accumulators.*`. A model wrapped by torch.compile or DistributedDataParallel is unwrapped. Tied
    parameters are averaged once, integer parameters are copied. Non-finite values pass into the average.

    Arguments:
        model: its weights are copied, but have no share in the average.
        momentum: share of the new value, in (0, 1): 1 - decay.
        interval: calls of `update_parameters` between two averagings, at least 1.
        device: of the average; by default the model's.
        update_buffers: average floating-point buffers of the state dict, too. All others are copied at every call.
        warmup: limit the decay to (1 + t) / (10 + t) after t calls, TensorFlow's rule, to forget early weights sooner.

    Attributes:
        module: the averaged model; its parameters need no gradients.
        steps: calls of `update_parameters` so far, an int64 tensor.

    Raises:
        InvalidValueError: (a ValueError) names the argument and its range.
        ModelMismatchError: (in `update_parameters` and `sync_*`) lists names or shapes that are not the average's.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ema = ExponentialMovingAverage(model, momentum=0.1)
        >>> for value in (0.0, 1.0, 1.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)  # an optimizer's step
        ...     ema.update_parameters(model)
        >>> ema.module.weight
        Parameter containing:
        tensor([[0.1900, 0.1900]])
        >>> ema(torch.ones(1, 2))
        tensor([[0.3800]])
    """

    steps: torch.Tensor

    def __init__(
        self,
        model: torch.nn.Module,
        momentum: float = 0.0002,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
        warmup: bool = False,
    ) -> None:
        super().__init__()
        accepted = "lie in (0, 1); usual values are 0.0001 to 0.1"
        self.momentum = check_number("momentum", momentum, lambda m: 0 < m < 1, accepted)
        if self.momentum > SUSPICIOUS_MOMENTUM:
            text = f"momentum {momentum:g}: is the share of the new value and usually small; for a decay of"
            warn(f"{text} {momentum:g} pass {1 - momentum:.4g}")
        self.interval = check_count("interval", interval)
        self.update_buffers = update_buffers
        self.warmup = warmup
        self.module = make_average(model, device)
        self.accumulators = WideAverages()
        with torch.inference_mode(False):
            self.register_buffer("steps", torch.tensor(0, device=device))
        self._steps = HostNumber()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged module."""
        return self.module(*args, **kwargs)

    def avg_func(self, averaged_param: torch.Tensor, source_param: torch.Tensor, steps: int) -> torch.Tensor | None:
        """Average one tensor in place; an override is called for every averaged tensor.

        `averaged_param` (float32 for a half-precision tensor) and `source_param` have the same shape, device and dtype;
        `steps` are the calls of `update_parameters` before. A tensor returned replaces the average, as in mmengine 0.x.
        """
        averaged_param.lerp_(source_param.to(averaged_param), self.momentum_at(steps))
        return None

    def momentum_at(self, steps: int) -> float:
        """Return the share of the new value after `steps` calls."""
        return max(self.momentum, 9.0 / (10.0 + steps)) if self.warmup else self.momentum

    @torch.inference_mode(False)
    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Average the model's weights. Call it after every optimizer step."""
        steps = int(self._steps.read(self.steps))
        parameters, buffers = paired("parameters", self.module, model), paired("buffers", self.module, model)
        if steps == 0:
            self._copy(parameters + buffers)
        else:
            names = self._averaged_buffers() if self.update_buffers else set()
            copy_([pair for pair in buffers if pair.name not in names])
            if steps % self.interval == 0:
                self._average(parameters, [pair for pair in buffers if pair.name in names], steps)
        self._steps.write_(self.steps, steps + 1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def sync_buffers(self, model: torch.nn.Module) -> None:
        """Copy the model's buffers. With `update_buffers=True` that replaces their averages, and warns."""
        if self.update_buffers:
            text = "this average has update_buffers=True; the model's buffers now replace their averages"
            warn(f"sync_buffers: {text}")
        copy_(paired("buffers", self.module, model))

    @torch.inference_mode(False)
    @torch.no_grad()
    def sync_parameters(self, model: torch.nn.Module) -> None:
        """Copy the model's parameters and buffers and restart the average from them; `steps` is kept."""
        self._copy(paired("parameters", self.module, model) + paired("buffers", self.module, model))

    def extra_repr(self) -> str:
        """Return the settings, for `print`."""
        names = ("momentum", "interval", "update_buffers", "warmup")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Accept the names of mmengine 0.x as well. `state_dict` is a copy that only the loader uses."""
        found = {name for name in self.module.state_dict() if f"{prefix}{name}" in state_dict} - {"steps"}
        if found and not any(f"{prefix}module.{name}" in state_dict for name in found):
            state_dict.update({f"{prefix}module.{name}": state_dict.pop(f"{prefix}{name}") for name in found})
            # After 0 steps the next update would replace the average by the model.
            state_dict.setdefault(f"{prefix}steps", torch.tensor(1))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _copy(self, pairs: list[Pair]) -> None:
        copy_(pairs)
        self.accumulators.values.clear()

    def _averaged_buffers(self) -> set[str]:
        transient = {found.raw for found in named_tensors(self.module) if not found.in_state}
        return {name for name, buffer in self.module.named_buffers() if is_averaged(buffer)} - transient

    def _average(self, parameters: list[Pair], buffers: list[Pair], steps: int) -> None:
        averaged = [pair for pair in parameters if is_averaged(pair.average)]
        copy_([pair for pair in parameters if not is_averaged(pair.average)])
        if type(self).avg_func is ExponentialMovingAverage.avg_func:
            share = self.momentum_at(steps)
            average_(averaged, self.accumulators, share)
            average_unless_equal_(buffers, self.accumulators, share)
            return
        for averages, sources in wide_averages(averaged + buffers, self.accumulators):
            for average, source in zip(averages, sources, strict=True):
                result = self.avg_func(average, source, steps)
                if result is not None and result is not average:
                    average.copy_(result)


class ShadowModel(WideBuffers):
    """A model and its shadow: `forward` runs the model in train mode and the shadow in eval mode.

    Call `update()` after every optimizer step. It averages the parameters with the formula of
    `tf.train.ExponentialMovingAverage` and copies the buffers:

        shadow <- shadow - (1 - decay) (shadow - variable)

    Both are submodules: they move, cast, save and load together. Every floating-point parameter is averaged, also one
    that requires no gradients at that moment, since adversarial training switches that off and on around each step.
    The shadow needs no gradients and is always in eval mode. Half-precision parameters are averaged as in
    `ExponentialMovingAverage`.

    Arguments:
        model: the model to train; held, not copied.
        decay: share of the shadow that an update keeps, in [0, 1); in practice 0.99 to 0.9999.
        num_updates: limits the decay to (1 + num_updates) / (10 + num_updates). A number is the count to start from,
            usually 0, and part of the state. A tensor is the caller's own counter, such as the training step: read at
            every update, never written to.
        zero_debias: start the shadow at zero and divide by the sum of the weights given so far (Kingma and Ba, arXiv
            1412.6980, section 3): the model's initial parameters have no share, and the first update copies the model.
            TensorFlow divides by 1 - decay**updates, which is that sum for a constant decay; here it holds for any.

    Raises:
        InvalidValueError: (a ValueError) names the argument and its range.
        ModelMismatchError: (in `update`) lists names or shapes of the model that are no longer the shadow's.

    Example:
        >>> net = ShadowModel(torch.nn.Linear(2, 1, bias=False), decay=0.9)
        >>> _ = torch.nn.init.zeros_(net.shadow.weight)
        >>> _ = torch.nn.init.ones_(net.model.weight)  # an optimizer's step
        >>> net.update()
        >>> net.train()(torch.ones(1, 2)).tolist()
        [[2.0]]
        >>> net.eval()(torch.ones(1, 2))
        tensor([[0.2000]])
    """

    num_updates: torch.Tensor | None
    debias_mass: torch.Tensor

    @torch.inference_mode(False)
    def __init__(
        self,
        model: torch.nn.Module,
        decay: float,
        num_updates: int | torch.Tensor | None = None,
        zero_debias: bool = False,
    ) -> None:
        super().__init__()
        accepted = "lie in [0, 1); usual values are 0.99 to 0.9999"
        self.decay = check_number("decay", decay, lambda d: 0 <= d < 1, accepted)
        self.zero_debias = zero_debias
        self.model = check_model(model)
        self.shadow = make_average(model).eval()
        self.accumulators = WideAverages()
        if num_updates is None or isinstance(num_updates, torch.Tensor):
            self.num_updates = num_updates
        else:
            self.register_buffer("num_updates", torch.tensor(check_count("num_updates", num_updates, 0)))
        self._counts = "num_updates" in dict(self.named_buffers(recurse=False))
        if zero_debias:
            self.register_buffer("debias_mass", torch.tensor(0.0, dtype=torch.float32))
        self._read_updates, self._read_mass = HostNumber(), HostNumber()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model in train mode, the shadow in eval mode."""
        return self.model(*args, **kwargs) if self.training else self.shadow(*args, **kwargs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self) -> None:
        """Average the model's parameters into the shadow. In eval mode only warn."""
        if not self.training:
            text = "the module is in eval mode, and the shadow stays; call train() before training"
            warn(f"update: {text}")
            return
        parameters, buffers = paired("parameters", self.shadow, self.model), paired("buffers", self.shadow, self.model)
        share = self._next_share()
        average_([pair for pair in parameters if is_averaged(pair.average)], self.accumulators, share)
        copy_([pair for pair in parameters if not is_averaged(pair.average)] + buffers)

    def train(self, mode: bool = True) -> ShadowModel:
        """Set the mode; the shadow stays in eval mode."""
        super().train(mode)
        self.shadow.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ShadowModel:
        """Set it for the model's parameters; the shadow's never require gradients."""
        self.model.requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        """Return the settings, for `print`."""
        return f"decay={self.decay}, num_updates={self.num_updates}, zero_debias={self.zero_debias}"

    def _next_share(self) -> float:
        """Count this update and return the share of its new value."""
        decay = self.decay
        if self.num_updates is not None:
            count = self._read_updates.read(self.num_updates)
            decay = min(decay, (1 + count) / (10 + count))
            if self._counts:
                self._read_updates.write_(self.num_updates, count + 1)
        share = 1 - decay
        if not self.zero_debias:
            return share
        # The sum of weights w follows the recursion of the biased average b: w <- decay w + (1 - decay). With b = w u
        # the debiased average u moves by share / w.
        mass = decay * self._read_mass.read(self.debias_mass) + share
        self._read_mass.write_(self.debias_mass, mass)
        return share / mass


# --- pairs of tensors, and float32 accumulators -------------------------------------------------------

ELEMENTS_AT_A_TIME = 2**24
"""An update copies half-precision tensors and sources on other devices: at most about 64 MiB at a time."""
_LISTED_NAMES = 5


class Pair(NamedTuple):
    """A tensor of the average, and the model's tensor of the same name."""

    name: str
    average: torch.Tensor
    source: torch.Tensor


@torch.inference_mode(False)  # an update cannot write to tensors made in inference mode
def make_average(model: torch.nn.Module, device: torch.device | str | None = None) -> torch.nn.Module:
    """Copy a model without gradients to `device`, by default where the model's tensors are."""
    source = unwrapped(check_model(model))
    for name, parameter in source.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise InvalidValueError(f"parameter {name!r}", "has no shape yet", "run a batch through the model first")
    average = copy.deepcopy(source).requires_grad_(False)
    return average if device is None else average.to(device)


def paired(kind: str, average_module: torch.nn.Module, model: torch.nn.Module) -> list[Pair]:
    """Return the "parameters" or "buffers" of both, tied ones once; a ModelMismatchError lists differences."""
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
    """Return whether such tensors are averaged: integers and booleans are not."""
    return tensor.is_floating_point() or tensor.is_complex()


def copy_(pairs: Sequence[Pair]) -> None:
    """Copy each source into its average."""
    if pairs:
        torch._foreach_copy_([pair.average for pair in pairs], [pair.source for pair in pairs])


def average_(pairs: Iterable[Pair], accumulators: WideAverages, share: float) -> None:
    """Set average + share (source - average) for `is_averaged` tensors, in one fused pass a device and dtype."""
    for averages, sources in wide_averages(pairs, accumulators):
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for average, source in zip(averages, sources, strict=True):
            group = groups.setdefault((average.device, average.dtype), ([], []))
            group[0].append(average)
            group[1].append(source)
        for group in groups.values():
            torch._foreach_lerp_(*group, share)


def average_unless_equal_(pairs: Iterable[Pair], accumulators: WideAverages, share: float) -> None:
    """Average as `average_`, but keep equal elements: the average of two infinities in a mask would be nan."""
    for averages, sources in wide_averages(pairs, accumulators):
        for average, source in zip(averages, sources, strict=True):
            average.copy_(torch.where(average == source, source, torch.lerp(average, source, share)))


def wide_averages(
    pairs: Iterable[Pair], accumulators: WideAverages
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Yield batches of averages to change in place, and their sources on the same devices and in the same dtypes.

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
    """Yield batches that limit both the overhead and the memory of copies."""
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
    """Return whether averages in this dtype would stop moving: floating point of fewer than 32 bits."""
    return dtype.is_floating_point and torch.finfo(dtype).bits < 32


def _kept_wide(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return `after`, which is `before` moved or cast; if it became narrow, `before` on its device."""
    return before.to(after.device) if is_narrow(after.dtype) and not is_narrow(before.dtype) else after


def copies_like(wanted: Sequence[tuple[torch.Tensor, torch.device, torch.dtype]]) -> list[torch.Tensor]:
    """Return copies of tensors on the given devices and in the given dtypes, made in one fused pass."""
    copies = [torch.empty_like(tensor, device=device, dtype=dtype) for tensor, device, dtype in wanted]
    if copies:
        torch._foreach_copy_(copies, [tensor for tensor, _, _ in wanted])
    return copies


class WideAverages(torch.nn.Module):
    """The float32 averages of half-precision tensors by name; part of the state dict, one key for each tensor.

    An element is valid while it rounds to the tensor's element. Otherwise the tensor was written to since (a swap, a
    `load_state_dict` without accumulators), and its value is taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, torch.Tensor] = {}

    def behind(self, rounded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the accumulators of named tensors, to change in place; the caller rounds them into the tensors."""
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
        """Load accumulators; a state without them, of another class or of a float32 model, is accepted."""
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
        """Return the number in `buffer`."""
        if buffer is not self._buffer or buffer._version != self._version:
            self._buffer, self._version, self._value = buffer, buffer._version, float(buffer.item())
        return self._value

    def write_(self, buffer: torch.Tensor, value: float) -> None:
        """Write `value` to `buffer`; cache it as rounded there, so that a resumed run reads the same."""
        buffer.fill_(value)
        self._buffer, self._version = buffer, buffer._version
        self._value = float(torch.tensor(value, dtype=buffer.dtype))
