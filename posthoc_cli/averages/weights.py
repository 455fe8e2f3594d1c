"""Averages of a model's weights with one decay, compatible with mmengine's class and with TensorFlow's formula.

The averaged module of a bfloat16 model (8 significant bits) or a float16 model (11) is float32: an update by 2e-4 of a
distance is less than half of a weight's last bit, so that an average rounded after every update never leaves its start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from posthoc_cli.errors import ModelMismatchError, check_count, check_number, warn
from posthoc_cli.tracker.model import check_model, unwrapped

SUSPICIOUS_MOMENTUM = 0.5


class ExponentialMovingAverage(torch.nn.Module):
    """An average of a model's parameters with exponentially decaying weights.

    The first `update_parameters` copies the model. Later ones average at every `interval`-th call:

        average <- (1 - momentum) average + momentum parameter

    `forward` runs the averaged module, in which half-precision tensors are float32. The interface and the names in the
    state dict are those of `mmengine.model.ExponentialMovingAverage` (also of mmedit's), whose states load; one from
    before mmengine 1.0 (names without `module.`, no `steps`) as the state after one update.

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
    """

    steps: torch.Tensor

    @torch.inference_mode(False)
    def __init__(
        self, model: torch.nn.Module, momentum: float = 0.0002, interval: int = 1,
        device: torch.device | str | None = None, update_buffers: bool = False, warmup: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        accepted = "lie in (0, 1); usual values are 0.0001 to 0.1"
        self.momentum = check_number("momentum", momentum, lambda m: 0 < m < 1, accepted)
        if self.momentum > SUSPICIOUS_MOMENTUM:
            text = f"momentum {momentum:g}: is the share of the new value and usually small; for a decay of"
            warn(f"{text} {momentum:g} pass {1 - momentum:.4g}")
        self.interval, self.update_buffers, self.warmup = check_count("interval", interval), update_buffers, warmup
        self.module = make_average(model).to(device)
        self.register_buffer("steps", torch.tensor(0, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged module."""
        return self.module(*args, **kwargs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Average the model's weights. Call it after every optimizer step."""
        steps = int(self.steps)
        parameters, buffers = paired(self.module, model)
        share = max(self.momentum, 9 / (10 + steps)) if self.warmup else self.momentum
        stored = self.module.state_dict() if self.update_buffers and steps else {}
        averaged = {pair.name for pair in buffers if pair.name in stored and is_averaged(pair.average)}
        copy_([pair for pair in buffers if pair.name not in averaged])
        if steps == 0:
            copy_(parameters)
        elif steps % self.interval == 0:
            average_(parameters, share)
            for name, average, source in buffers:
                if name in averaged:  # equal elements stay: the mean of two infinities in a mask would be nan
                    source = source.to(average)
                    average.copy_(torch.where(average == source, source, torch.lerp(average, source, share)))
        self.steps += 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Accept the names of mmengine 0.x as well. `state_dict` is a copy that only the loader uses."""
        found = {name for name in self.module.state_dict() if f"{prefix}{name}" in state_dict} - {"steps"}
        if found and not any(f"{prefix}module.{name}" in state_dict for name in found):
            state_dict.update({f"{prefix}module.{name}": state_dict.pop(f"{prefix}{name}") for name in found})
            # After 0 steps the next update would replace the average by the model.
            state_dict.setdefault(f"{prefix}steps", torch.tensor(1))
        super()._load_from_state_dict(state_dict, prefix, *others)


class WideBuffers(torch.nn.Module):
    """A module whose own buffers move between devices, but keep their precision under `half()` and `bfloat16()`."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> WideBuffers:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, new in dict(self.named_buffers(recurse=False)).items():
            if is_narrow(new.dtype) and not is_narrow(before[name].dtype):
                setattr(self, name, before[name].to(new.device))
        return self


class ShadowModel(WideBuffers):
    """A model and its shadow: `forward` runs the model in train mode and the shadow in eval mode.

    Call `update()` after every optimizer step. It averages the parameters with the formula of
    `tf.train.ExponentialMovingAverage` and copies the buffers:

        shadow <- shadow - (1 - decay) (shadow - variable)

    Both are submodules: they move, cast, save and load together. Every floating-point parameter is averaged, also one
    that requires no gradients at that moment. The shadow needs no gradients and is always in eval mode. That of a
    half-precision model is float32, and so are the inputs that it takes.

    Arguments:
        model: the model to train; held, not copied.
        decay: share of the shadow that an update keeps, in [0, 1); in practice 0.99 to 0.9999.
        num_updates: limits the decay to (1 + num_updates) / (10 + num_updates). A number is the count to start from,
            usually 0, and part of the state. A tensor is the caller's own counter, such as the training step: read at
            every update, never written to.
        zero_debias: start the shadow at zero and divide by the sum of the weights given so far (Kingma and Ba, arXiv
            1412.6980, section 3), which is TensorFlow's 1 - decay**updates for a constant decay: the model's initial
            parameters have no share, and the first update copies the model.
    """

    num_updates: torch.Tensor | None
    debias_mass: torch.Tensor

    @torch.inference_mode(False)
    def __init__(
        self, model: torch.nn.Module, decay: float, num_updates: int | torch.Tensor | None = None,
        zero_debias: bool = False,
    ) -> None:  # fmt: skip
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
            warn("update: the module is in eval mode, and the shadow stays; call train() before training")
            return
        parameters, buffers = paired(self.shadow, self.model)
        decay = self.decay
        if self.num_updates is not None:
            count = int(self.num_updates)
            decay = min(decay, (1 + count) / (10 + count))
            if "num_updates" in self._buffers:  # not the caller's own
                self.num_updates += 1
        share = 1 - decay
        if self.zero_debias:
            # The sum of weights w follows the recursion of the biased average b: w <- decay w + (1 - decay). With
            # b = w u the debiased average u moves by share / w.
            self.debias_mass.fill_(decay * float(self.debias_mass) + share)
            share /= float(self.debias_mass)
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


# --- pairs of tensors ---------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A tensor of the average, and the model's tensor of the same name."""

    name: str
    average: torch.Tensor
    source: torch.Tensor


def make_average(model: torch.nn.Module) -> torch.nn.Module:
    """Copy a model without gradients; half precision becomes float32."""
    average = copy.deepcopy(unwrapped(check_model(model))).requires_grad_(False)
    average._apply(lambda tensor: tensor.float() if is_narrow(tensor.dtype) else tensor)  # type: ignore[no-untyped-call]
    return average


def paired(average: torch.nn.Module, model: torch.nn.Module) -> tuple[list[Pair], list[Pair]]:
    """Return the parameters and the buffers of both, tied ones once; raise a ModelMismatchError if they differ."""
    found = []
    for kind in ("parameters", "buffers"):
        own, others = (dict(getattr(module, f"named_{kind}")()) for module in (average, unwrapped(check_model(model))))
        for name in sorted(own.keys() ^ others.keys()):
            raise ModelMismatchError("model", f"its {kind} are not the average's: only one of the two has {name!r}")
        found.append([Pair(name, tensor, others[name]) for name, tensor in own.items()])
        for name, tensor, source in found[-1]:
            if source.shape != tensor.shape:
                reason = f"has the shape {list(source.shape)} in the model, {list(tensor.shape)} in the average"
                raise ModelMismatchError(f"tensor {name!r}", reason)
    return found[0], found[1]


def is_averaged(tensor: torch.Tensor) -> bool:
    """Return whether such tensors are averaged: integers and booleans are not."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_narrow(dtype: torch.dtype) -> bool:
    """Return whether averages in this dtype would stop moving: floating point of fewer than 32 bits."""
    return dtype.is_floating_point and torch.finfo(dtype).bits < 32


def copy_(pairs: list[Pair]) -> None:
    """Copy each source into its average."""
    if pairs:
        torch._foreach_copy_([pair.average for pair in pairs], [pair.source for pair in pairs])


def average_(pairs: list[Pair], share: float) -> None:
    """Set average + share (source - average) for `is_averaged` tensors; copy the others."""
    copy_([pair for pair in pairs if not is_averaged(pair.average)])
    averaged = [pair for pair in pairs if is_averaged(pair.average)]
    if averaged:
        sources = [pair.source.to(pair.average) for pair in averaged]
        torch._foreach_lerp_([pair.average for pair in averaged], sources, share)
