"""Averages of a model's weights with one decay, compatible with mmengine's class and with TensorFlow's formula.

The averaged module of a bfloat16 model (8 significant bits) or a float16 model (11) is float32: an update by 2e-4 of a
distance is less than half of a weight's last bit, so that an average rounded after every update never leaves its start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from posthoc_cli.errors import InvalidValueError, ModelMismatchError, check_count, check_number, warn
from posthoc_cli.tracker.model import check_model, named_tensors, unwrapped

SUSPICIOUS_MOMENTUM = 0.5


class WideBuffers(torch.nn.Module):
    """A module whose own buffers move between devices, but keep their precision under `half()` and `bfloat16()`."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> WideBuffers:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, new in dict(self.named_buffers(recurse=False)).items():
            if is_narrow(new.dtype) and not is_narrow(before[name].dtype):
                setattr(self, name, before[name].to(new.device))
        return self


class ExponentialMovingAverage(torch.nn.Module):
    """An average of a model's parameters with exponentially decaying weights.

    The first `update_parameters` copies the model. Later ones average at every `interval`-th call:

        average <- (1 - momentum) average + momentum parameter

    `forward` runs the averaged module. The interface and the names in the state dict (`module.*`, `steps`) are those
    of `mmengine.model.ExponentialMovingAverage` (also of mmedit's and mmagic's), whose states load; one from before
    mmengine 1.0 (names without `module.`, no `steps`) as the state after one update.

    Half-precision tensors are float32 in `module`. A model wrapped by torch.compile or DistributedDataParallel is
    unwrapped. Tied parameters are averaged once, integers are copied. Non-finite values pass into the average.

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
        ModelMismatchError: (in `update_parameters`) lists names or shapes that are not the average's.
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
        with torch.inference_mode(False):
            self.register_buffer("steps", torch.tensor(0, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged module."""
        return self.module(*args, **kwargs)

    def momentum_at(self, steps: int) -> float:
        """Return the share of the new value after `steps` calls."""
        return max(self.momentum, 9.0 / (10.0 + steps)) if self.warmup else self.momentum

    @torch.inference_mode(False)
    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Average the model's weights. Call it after every optimizer step."""
        steps = int(self.steps)
        parameters, buffers = paired("parameters", self.module, model), paired("buffers", self.module, model)
        if steps == 0:
            copy_(parameters + buffers)
        else:
            names = self._averaged_buffers() if self.update_buffers else set()
            copy_([pair for pair in buffers if pair.name not in names])
            if steps % self.interval == 0:
                share = self.momentum_at(steps)
                average_(parameters, share)
                average_unless_equal_([pair for pair in buffers if pair.name in names], share)
        self.steps += 1

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

    def _averaged_buffers(self) -> set[str]:
        transient = {found.raw for found in named_tensors(self.module) if not found.in_state}
        return {name for name, buffer in self.module.named_buffers() if is_averaged(buffer)} - transient


class ShadowModel(WideBuffers):
    """A model and its shadow: `forward` runs the model in train mode and the shadow in eval mode.

    Call `update()` after every optimizer step. It averages the parameters with the formula of
    `tf.train.ExponentialMovingAverage` and copies the buffers:

        shadow <- shadow - (1 - decay) (shadow - variable)

    Both are submodules: they move, cast, save and load together. Every floating-point parameter is averaged, also one
    that requires no gradients at that moment, since adversarial training switches that off and on around each step.
    The shadow needs no gradients and is always in eval mode. That of a half-precision model is float32, and so are the
    inputs that it takes.

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
        if num_updates is None or isinstance(num_updates, torch.Tensor):
            self.num_updates = num_updates
        else:
            self.register_buffer("num_updates", torch.tensor(check_count("num_updates", num_updates, 0)))
        self._counts = "num_updates" in dict(self.named_buffers(recurse=False))
        if zero_debias:
            self.register_buffer("debias_mass", torch.tensor(0.0, dtype=torch.float32))

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
        average_(parameters, share)
        copy_(buffers)

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
            count = int(self.num_updates)
            decay = min(decay, (1 + count) / (10 + count))
            if self._counts:
                self.num_updates += 1
        share = 1 - decay
        if not self.zero_debias:
            return share
        # The sum of weights w follows the recursion of the biased average b: w <- decay w + (1 - decay). With b = w u
        # the debiased average u moves by share / w.
        self.debias_mass.fill_(decay * float(self.debias_mass) + share)
        return share / float(self.debias_mass)


# --- pairs of tensors ---------------------------------------------------------------------------------

_LISTED_NAMES = 5


class Pair(NamedTuple):
    """A tensor of the average, and the model's tensor of the same name."""

    name: str
    average: torch.Tensor
    source: torch.Tensor


@torch.inference_mode(False)  # an update cannot write to tensors made in inference mode
def make_average(model: torch.nn.Module, device: torch.device | str | None = None) -> torch.nn.Module:
    """Copy a model without gradients to `device`, by default where its tensors are; half precision becomes float32."""
    source = unwrapped(check_model(model))
    for name, parameter in source.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise InvalidValueError(f"parameter {name!r}", "has no shape yet", "run a batch through the model first")
    average = copy.deepcopy(source).requires_grad_(False)
    average._apply(lambda tensor: tensor.float() if is_narrow(tensor.dtype) else tensor)  # type: ignore[no-untyped-call]
    return average if device is None else average.to(device)


def paired(kind: str, average_module: torch.nn.Module, model: torch.nn.Module) -> list[Pair]:
    """Return the "parameters" or "buffers" of both, tied ones once; a ModelMismatchError lists differences."""
    model = unwrapped(check_model(model))
    averages, sources = (dict(getattr(module, f"named_{kind}")()) for module in (average_module, model))
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


def average_(pairs: Sequence[Pair], share: float) -> None:
    """Set average + share (source - average) for `is_averaged` tensors; copy the others."""
    copy_([pair for pair in pairs if not is_averaged(pair.average)])
    averaged = [pair for pair in pairs if is_averaged(pair.average)]
    if averaged:
        sources = [pair.source.to(pair.average) for pair in averaged]
        torch._foreach_lerp_([pair.average for pair in averaged], sources, share)


def average_unless_equal_(pairs: Iterable[Pair], share: float) -> None:
    """Average as `average_`, but keep equal elements: the average of two infinities in a mask would be nan."""
    for _, average, source in pairs:
        source = source.to(average)
        average.copy_(torch.where(average == source, source, torch.lerp(average, source, share)))


def is_narrow(dtype: torch.dtype) -> bool:
    """Return whether averages in this dtype would stop moving: floating point of fewer than 32 bits."""
    return dtype.is_floating_point and torch.finfo(dtype).bits < 32
