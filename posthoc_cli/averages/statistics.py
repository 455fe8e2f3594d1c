"""Differentiable running means and covariances of two batches of activations."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from posthoc_cli.averages.pairing import WideBuffers, is_narrow
from posthoc_cli.errors import InvalidValueError, NotReadyError, check_count, check_number

_STATISTICS = ("mean_x", "mean_y", "cov_xx", "cov_yy", "cov_xy")


class EMAStats(WideBuffers):
    """Exponential moving averages of the means and covariances of `x` and `y`, compatible with symm-learning's class.

    In train mode the first batch sets every statistic S = S_batch, and each later one updates

        S <- (1 - momentum) detach(S) + momentum S_batch,

    so that a loss on `cov_xy` and the others is differentiable in the newest batch, and no graph grows.

    Covariances of a batch of n rows are sums of (x - center_x)^T (y - center_y), divided by max(n - 1, 1). The first
    batch is centred with its own mean, later ones with the detached running mean: its lag counts as covariance, and
    without lag the expected value is n / (n - 1) times the true one, as in symm-learning. With
    `center_with_running_mean=False` every batch is centred with its own mean, which is unbiased (one row adds 0).

    Statistics are float32, or float64 after `double()`, also for half-precision batches, under autocast and after
    `half()` or `bfloat16()`. The output is the input; x has the shape [n, dim_x], y [n, dim_y].

    Arguments:
        dim_x, dim_y: columns of x and y; without `dim_y`, y has those of x and may be left out.
        momentum: share of the newest batch, in (0, 1].
        eps: variance added where `correlation` divides; at least 0.

    Attributes:
        mean_x, mean_y: [dim_x], [dim_y]; 0 before the first batch.
        cov_xx, cov_yy, cov_xy: [dim_x, dim_x], [dim_y, dim_y], [dim_x, dim_y]; 1, 1 and 0 before the first batch.
        num_batches_tracked: batches so far, a tensor of int64.
        All six are buffers, in the state dict; a state of symm-learning's class (`running_mean_x`, ...) loads too.

    Raises:
        InvalidValueError: (a ValueError) names the argument, or what is wrong with the batch.
        NotReadyError: (in the methods that read the statistics) no batch yet.

    Example:
        >>> stats = EMAStats(dim_x=1, dim_y=1, momentum=0.5)
        >>> x = torch.tensor([[0.0], [2.0]], requires_grad=True)
        >>> _ = stats(x, 3 * x)
        >>> stats.cov_xy.tolist()
        [[6.0]]
        >>> (-stats.cov_xy.sum()).backward()  # a loss that wants x and y to vary together
        >>> x.grad
        tensor([[ 6.],
                [-6.]])
    """

    mean_x: torch.Tensor
    mean_y: torch.Tensor
    cov_xx: torch.Tensor
    cov_yy: torch.Tensor
    cov_xy: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(
        self,
        dim_x: int,
        dim_y: int | None = None,
        momentum: float = 0.1,
        eps: float = 1e-6,
        center_with_running_mean: bool = True,
    ) -> None:
        super().__init__()
        self.dim_x = check_count("dim_x", dim_x)
        self.dim_y = self.dim_x if dim_y is None else check_count("dim_y", dim_y)
        self.momentum = check_number("momentum", momentum, lambda m: 0 < m <= 1, "lie in (0, 1]")
        self.eps = check_number("eps", eps, lambda e: 0 <= e < math.inf, "be finite and at least 0")
        self.center_with_running_mean = center_with_running_mean
        self._y_may_be_x = dim_y is None
        default = torch.get_default_dtype()
        for name, value in self._initial(torch.float32 if is_narrow(default) else default, None).items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a batch into the statistics in train mode; return it unchanged, `(x, x)` if y was left out."""
        if y is None:
            y = x if self._y_may_be_x else x.new_empty(0)
        self._check("x", x, self.dim_x)
        self._check("y", y, self.dim_y, x.shape[0])
        if self.training:
            with _without_autocast(x.device.type):
                self._update(x.to(self.cov_xx.dtype), y.to(self.cov_xx.dtype))
        return x, y

    def correlation(self) -> torch.Tensor:
        """Pearson correlations of x and y, [dim_x, dim_y]: cov_xy / sqrt((var_x + eps) (var_y + eps)).

        A constant column has correlation 0. The result is differentiable like the statistics.
        """
        if int(self.num_batches_tracked) == 0:
            raise NotReadyError("correlation", "no batch was tracked yet", "call the module in train mode first")
        scale_x, scale_y = ((cov.diagonal() + self.eps).rsqrt() for cov in (self.cov_xx, self.cov_yy))
        return self.cov_xy * torch.outer(scale_x, scale_y)

    def reset(self) -> None:
        """Forget all batches."""
        for name, value in self._initial(self.cov_xx.dtype, self.cov_xx.device).items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        """The settings."""
        names = ("dim_x", "dim_y", "momentum", "eps", "center_with_running_mean")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        # Compared on the device: reading the number would wait for a GPU at every batch.
        first = self.num_batches_tracked == 0
        for name, batch in zip(_STATISTICS, self._batch_statistics(x, y, first), strict=True):
            average = (1 - self.momentum) * getattr(self, name).detach() + self.momentum * batch
            setattr(self, name, torch.where(first, batch, average))
        self.num_batches_tracked = self.num_batches_tracked + 1

    def _batch_statistics(self, x: torch.Tensor, y: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The batch's own statistics, in the order of `_STATISTICS`."""
        mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
        center_x, center_y = mean_x, mean_y
        if self.center_with_running_mean:
            center_x = torch.where(first, mean_x, self.mean_x.detach())
            center_y = torch.where(first, mean_y, self.mean_y.detach())
        x, y = x - center_x, y - center_y
        degrees = max(1, x.shape[0] - 1)
        return mean_x, mean_y, *(scatter / degrees for scatter in (x.mT @ x, y.mT @ y, x.mT @ y))

    def _initial(self, dtype: torch.dtype, device: torch.device | None) -> dict[str, torch.Tensor]:
        x, y = self.dim_x, self.dim_y
        means = {"mean_x": torch.zeros(x), "mean_y": torch.zeros(y)}
        statistics = means | {"cov_xx": torch.eye(x), "cov_yy": torch.eye(y), "cov_xy": torch.zeros(x, y)}
        count = {"num_batches_tracked": torch.tensor(0, device=device)}
        return {name: value.to(device, dtype) for name, value in statistics.items()} | count

    def _check(self, name: str, batch: torch.Tensor, dim: int, rows: int | None = None) -> None:
        if batch.dim() != 2 or batch.shape[1] != dim or batch.shape[0] == 0 or rows not in (None, batch.shape[0]):
            wanted = f"[n, {dim}] with n at least 1" if rows is None else [rows, dim]
            raise InvalidValueError(name, f"has the shape {list(batch.shape)}; must be {wanted}")
        own = self.cov_xx.dtype
        if not batch.is_floating_point() or torch.finfo(batch.dtype).bits > torch.finfo(own).bits:
            reason = f"is {batch.dtype}, the statistics are {own}; must be floating-point and no wider"
            raise InvalidValueError(name, reason, "double() makes the statistics float64")

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles cannot hold a graph.
        buffers = {name: value.detach() for name, value in self.named_buffers()}
        return {**self.__dict__, "_buffers": buffers}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in _STATISTICS:
            if f"{prefix}running_{name}" in state_dict:  # symm-learning's names
                state_dict[prefix + name] = state_dict.pop(f"{prefix}running_{name}")
        # Values are loaded in place, which must not change tensors of a graph or of a saved state.
        for name, value in dict(self.named_buffers()).items():
            setattr(self, name, value.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Without this, autocast multiplies the centred batch in half precision."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
