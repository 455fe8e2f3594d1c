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
    """Holds a model and its shadow: trains the one, evaluates with the other.

    Call `update()` after every optimizer step. It averages the parameters and copies the buffers,

        shadow <- shadow - (1 - decay) (shadow - variable),

    the formula of `tf.train.ExponentialMovingAverage`. In train mode `forward` runs the model, in eval mode the
    shadow, with whatever arguments come. Both are submodules: they move, cast, save and load together.

    Every floating-point parameter is averaged, whether or not it requires gradients at that moment: training loops of
    adversarial networks switch that off and on around each step. One that does not train equals its shadow, and stays.
    The shadow itself needs no gradients and is always in eval mode. Parameters of bfloat16 and float16 are averaged in
    float32 and held rounded; the exact averages are in the state dict as `accumulators.*`.

    Arguments:
        model: the model to train; held, not copied. Where torch.compile or DistributedDataParallel has wrapped it, the
            shadow is a copy of what they wrap.
        decay: share of the shadow that an update keeps, in [0, 1); in practice 0.99 to 0.9999.
        num_updates: with it, the decay is min(decay, (1 + num_updates) / (10 + num_updates)). A whole number is the
            count to begin with, 0 as a rule; it grows by one at every update and is part of the state. A tensor is the
            caller's own counter, such as the training step: it is read at every update, never written to.
        zero_debias: as if the shadow had started at zero and were divided by the sum of the weights given so far
            (Kingma and Ba, arXiv 1412.6980, section 3): the model's initial parameters have no part in it, and the
            first update copies the model. TensorFlow does so for tensors only, and divides by 1 - decay**updates, which
            is that sum as long as the decay stays the same; here it is the sum for any decay.

    Attributes:
        model, shadow: the two.
        num_updates: as above; a tensor of int64 in the state where a number was given.

    Raises:
        InvalidValueError: a ValueError that names the argument and its range.

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
        self.decay = check_number(
            "decay", decay, lambda d: 0 <= d < 1, "lie in [0, 1); usual values are 0.99 to 0.9999"
        )
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
        """Take the model's parameters into the shadow. In eval mode nothing happens, and the first time warns.

        Raises:
            ModelMismatchError: names or shapes of the model's tensors are no longer the shadow's; lists them.
        """
        if not self.training:
            self._warn_of_eval_mode()
            return
        parameters = pair_parameters(self.shadow, self.model)
        buffers = pair_buffers(self.shadow, self.model)
        share = self._next_share()
        average_([pair for pair in parameters if is_averaged(pair.average)], self.accumulators, share)
        copy_([pair for pair in parameters if not is_averaged(pair.average)] + buffers)

    def train(self, mode: bool = True) -> ShadowModel:
        """Set the mode; the shadow stays in eval mode, so that it may be called at any time."""
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
        # The sum of weights w follows the recursion of the biased average b: w <- decay w + (1 - decay). Put b = w u
        # into it, and the debiased average u itself moves by share / w.
        mass = decay * self._read_mass.read(self.debias_mass) + share
        self._read_mass.write_(self.debias_mass, mass)
        return share / mass

    def _warn_of_eval_mode(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "update: the module is in eval mode, so that the shadow stays as it is; call train() before training",
                stacklevel=5,  # past this method, update and its two decorators
            )


def _check_counter(counter: torch.Tensor) -> torch.Tensor:
    if counter.numel() != 1 or counter.is_complex() or counter.dtype == torch.bool:
        raise InvalidValueError(
            "num_updates",
            f"must be a whole number, or a tensor of one; this one has the shape {list(counter.shape)} "
            f"and dtype {counter.dtype}",
        )
    return counter
