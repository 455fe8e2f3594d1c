"""A model with its shadow: TensorFlow's exponential moving average of trained variables, as one module."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from posthoc_cli.averages.pairing import (
    Accumulators,
    HostNumber,
    WideBuffers,
    average_,
    check_number,
    copy_,
    is_averaged,
    make_average,
    pair_buffers,
    pair_parameters,
)
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.tracker.model_tensors import check_model
from posthoc_cli.tracker.settings import check_count


class ShadowModel(WideBuffers):
    """A model and its shadow: `forward` runs the model in train mode and the shadow in eval mode.

    Call `update()` after every optimizer step. It averages the parameters with the formula of
    `tf.train.ExponentialMovingAverage` and copies the buffers:

        shadow <- shadow - (1 - decay) (shadow - variable)

    Both are submodules: they move, cast, save and load together. Every floating-point parameter is averaged, also one
    that requires no gradients at that moment, since adversarial training switches that off and on around each step.
    The shadow needs no gradients and is always in eval mode. Half-precision parameters are averaged in float32 and
    held rounded; the exact averages are in the state dict as `accumulators.*`.

    Arguments:
        model: the model to train; held, not copied. The shadow of a model wrapped by torch.compile or
            DistributedDataParallel is a copy of the wrapped module.
        decay: share of the shadow that an update keeps, in [0, 1); in practice 0.99 to 0.9999.
        num_updates: limits the decay to (1 + num_updates) / (10 + num_updates). A number is the count to start from,
            usually 0, and part of the state. A tensor is the caller's own counter, such as the training step: read at
            every update, never written to.
        zero_debias: start the shadow at zero and divide by the sum of the weights given so far (Kingma and Ba, arXiv
            1412.6980, section 3): the model's initial parameters have no share, and the first update copies the model.
            TensorFlow divides by 1 - decay**updates, which is that sum for a constant decay; here it holds for any.

    Attributes:
        model, shadow: the two.
        num_updates: as above; an int64 buffer where a number was given.

    Raises:
        InvalidValueError: (a ValueError) names the argument and its range.

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
        self.accumulators = Accumulators()
        self._counts = num_updates is not None and not isinstance(num_updates, torch.Tensor)
        if isinstance(num_updates, torch.Tensor):
            self.num_updates = _check_counter(num_updates)
        elif num_updates is None:
            self.num_updates = None
        else:
            self.register_buffer("num_updates", torch.tensor(check_count("num_updates", num_updates, 0)))
        if zero_debias:
            self.register_buffer("debias_mass", torch.tensor(0.0, dtype=torch.float32))
        self._read_updates, self._read_mass = HostNumber(), HostNumber()
        self._warned = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model in train mode, the shadow in eval mode."""
        return self.model(*args, **kwargs) if self.training else self.shadow(*args, **kwargs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self) -> None:
        """Take the model's parameters into the shadow. In eval mode it does nothing, and warns once.

        Raises:
            ModelMismatchError: names or shapes of the model's tensors are no longer the shadow's; lists them.
        """
        if not self.training:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "update: the module is in eval mode, and the shadow stays; call train() before training",
                    stacklevel=4,  # past this method and its two decorators
                )
            return
        parameters = pair_parameters(self.shadow, self.model)
        buffers = pair_buffers(self.shadow, self.model)
        share = self._next_share()
        average_([pair for pair in parameters if is_averaged(pair.average)], self.accumulators, share)
        copy_([pair for pair in parameters if not is_averaged(pair.average)] + buffers)

    def train(self, mode: bool = True) -> ShadowModel:
        """Set the mode; the shadow stays in eval mode."""
        super().train(mode)
        self.shadow.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ShadowModel:
        """For the model's parameters; the shadow's never require gradients."""
        self.model.requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        """The settings."""
        return f"decay={self.decay}, num_updates={self.num_updates}, zero_debias={self.zero_debias}"

    def _next_share(self) -> float:
        """The share of the new value at this update; counts it."""
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


def _check_counter(counter: torch.Tensor) -> torch.Tensor:
    if counter.numel() != 1 or counter.is_complex() or counter.dtype == torch.bool:
        found = f"the shape {list(counter.shape)} and dtype {counter.dtype}"
        raise InvalidValueError("num_updates", f"must be a whole number, or a tensor of one, not of {found}")
    return counter
