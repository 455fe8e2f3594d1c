"""The exponential moving average of a model's weights with one decay, compatible with mmengine's class."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from posthoc_cli.averages.pairing import (
    Accumulators,
    HostNumber,
    Pair,
    average_,
    average_unless_equal_,
    check_number,
    copy_,
    is_averaged,
    make_average,
    pair_buffers,
    pair_parameters,
    with_wide_averages,
)
from posthoc_cli.tracker.names import named_tensors
from posthoc_cli.tracker.settings import check_count

SUSPICIOUS_MOMENTUM = 0.5


class ExponentialMovingAverage(torch.nn.Module):
    """An average of a model's parameters with exponentially decaying weights.

    The first `update_parameters` copies the model. Later ones average at every `interval`-th call:

        average <- (1 - momentum) average + momentum parameter

    `forward` runs the averaged module. The interface and the names in the state dict (`module.*`, `steps`) are those
    of `mmengine.model.ExponentialMovingAverage` (also of mmedit's and mmagic's), so that a state saved by mmengine
    loads. A state from before mmengine 1.0 (names without `module.`, no `steps`) loads as the state after one update.

    Half-precision parameters are averaged in float32, since an average rounded after every small update never leaves
    its start. `module` holds them rounded; the exact averages are in the state dict as `accumulators.*`.

    A model wrapped by torch.compile or DistributedDataParallel is unwrapped. Tensors are matched by name, tied
    parameters are averaged once, integer parameters are copied. Non-finite values pass into the average, as in
    mmengine.

    Arguments:
        model: its weights are copied at once, but have no share in the average.
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
        self.momentum = _check_momentum(momentum)
        self.interval = check_count("interval", interval, 1)
        self.update_buffers = update_buffers
        self.warmup = warmup
        self.module = make_average(model, device)
        self.accumulators = Accumulators()
        with torch.inference_mode(False):
            self.register_buffer("steps", torch.tensor(0, device=device))
        self._steps = HostNumber()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged module."""
        return self.module(*args, **kwargs)

    def avg_func(self, averaged_param: torch.Tensor, source_param: torch.Tensor, steps: int) -> torch.Tensor | None:
        """Average one tensor in place. The override of a subclass is called for every averaged tensor.

        Arguments:
            averaged_param: the average, changed in place (float32 for a half-precision tensor).
            source_param: the model's tensor, of the same shape, device and dtype.
            steps: calls of `update_parameters` before this one.

        Returns:
            None, or a tensor that replaces the average, as in mmengine's first releases.
        """
        averaged_param.lerp_(source_param.to(averaged_param), self.momentum_at(steps))
        return None

    def momentum_at(self, steps: int) -> float:
        """The share of the new value after `steps` calls."""
        return max(self.momentum, 9.0 / (10.0 + steps)) if self.warmup else self.momentum

    @torch.inference_mode(False)
    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Take the model's weights into the average. Call it after every optimizer step.

        Raises:
            ModelMismatchError: names or shapes of tensors are not those of the average; lists them.
        """
        steps = int(self._steps.read(self.steps))
        parameters, buffers = pair_parameters(self.module, model), pair_buffers(self.module, model)
        if steps == 0:
            self._copy(parameters + buffers)
        else:
            names = self._averaged_buffers() if self.update_buffers else set()
            averaged = [pair for pair in buffers if pair.name in names]
            copy_(pair for pair in buffers if pair.name not in names)
            if steps % self.interval == 0:
                self._average(parameters, averaged, steps)
        self._steps.write_(self.steps, steps + 1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def sync_buffers(self, model: torch.nn.Module) -> None:
        """Copy the model's buffers. With `update_buffers=True` that replaces their averages, and warns.

        Raises:
            ModelMismatchError: names or shapes of tensors are not those of the average; lists them.
        """
        if self.update_buffers:
            warnings.warn(
                "sync_buffers: this average has update_buffers=True; the model's buffers now replace their averages",
                stacklevel=4,  # past the two decorators
            )
        copy_(pair_buffers(self.module, model))

    @torch.inference_mode(False)
    @torch.no_grad()
    def sync_parameters(self, model: torch.nn.Module) -> None:
        """Copy the model's parameters and buffers and restart the average from them; `steps` is kept.

        Raises:
            ModelMismatchError: names or shapes of tensors are not those of the average; lists them.
        """
        self._copy(pair_parameters(self.module, model) + pair_buffers(self.module, model))

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"momentum={self.momentum}, interval={self.interval}, update_buffers={self.update_buffers}, "
            f"warmup={self.warmup}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Accept the names of mmengine 0.x, too; `state_dict` is the loader's own copy."""
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
        copy_(pair for pair in parameters if not is_averaged(pair.average))
        if type(self).avg_func is ExponentialMovingAverage.avg_func:
            share = self.momentum_at(steps)
            average_(averaged, self.accumulators, share)
            average_unless_equal_(buffers, self.accumulators, share)
        else:
            with_wide_averages(averaged + buffers, self.accumulators, lambda a, s: self._average_singly(a, s, steps))

    def _average_singly(self, averages: list[torch.Tensor], sources: list[torch.Tensor], steps: int) -> None:
        for average, source in zip(averages, sources, strict=True):
            result = self.avg_func(average, source, steps)
            if result is not None and result is not average:
                average.copy_(result)


def _check_momentum(momentum: float) -> float:
    value = check_number("momentum", momentum, lambda m: 0 < m < 1, "lie in (0, 1); usual values are 0.0001 to 0.1")
    if value > SUSPICIOUS_MOMENTUM:
        warnings.warn(
            f"momentum {value:g}: is the share of the new value and usually small; for a decay of {value:g} pass "
            f"{1 - value:.4g}",
            stacklevel=3,
        )
    return value
