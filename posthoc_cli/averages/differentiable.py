"""Averages of activations for a loss: moving averages through which `backward` works, running means and covariances."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from posthoc_cli.averages.weights import WideBuffers, is_narrow
from posthoc_cli.errors import InvalidValueError, NotReadyError, check_count, check_number, check_word, warn

MODES = ("truncated", "window", "carried", "full")
_LONGEST_QUIET_GRAPH = 99
"""Values that mode "full" holds without a warning."""


class DifferentiableEMA(WideBuffers):
    """An exponential moving average of tensors with a graph, for a loss on running statistics.

    The values x_i = f_i(w_i) are outputs of a graph, where w_i is what the leaf w (a parameter) held when x_i was
    made. The average is a_1 = x_1 and

        a_t = decay a_{t-1} + (1 - decay) x_t = sum_i c_i x_i,    c_i = (1 - decay) decay**(t-i),   c_1 = decay**(t-1).

    The modes differ in what `backward` on a_t adds to w.grad, where g is the gradient at a_t:

    - "truncated": g^T (1 - decay) dx_t/dw, the newest value only, as batch statistics do. Constant memory.
    - "window": g^T sum_i c_i df_i/dw(w_i) over the last `window` values, exactly. Holds `window` graphs.
    - "full": the same over all values, for checks. Graph and time grow without end; it warns from the 100th value on.
    - "carried": the same over all values without a graph.

    Kept graphs ("window", "full") serve more than one `backward`: call it with `retain_graph=True`. Optimizers change
    leaves in place, so make the values under `with ema.recording():`, which keeps copies of the leaves.

    "carried" averages the derivative, too: J_t = decay J_{t-1} + (1 - decay) dx_t/dw(w_t) with J_1 = dx_1/dw, and
    `backward` adds g^T J_t. Pass the leaves with every value, `ema(x, leaves=[w])`; no other tensor gets a gradient. An
    update takes a backward pass, and memory of the size of the leaves, for each element of the average.

    Detach a value that is built from an earlier result: it brings that graph along in every mode but "carried". Eval
    mode returns the average without a graph and takes no value in. A state dict and a copy hold the average and the
    number of updates; graphs and J start empty, with the average so far as a constant.

    Arguments:
        shape, device, dtype: of the values; dtype is float32 or float64, also after `half()`.
        decay: in [0, 1).
        window: number of values kept in mode "window".

    Attributes:
        average: without a graph; zeros before the first value.
        num_updates: values taken in, an int64 tensor.
    """

    average: torch.Tensor
    num_updates: torch.Tensor
    _before: torch.Tensor | None
    _kept: deque[torch.Tensor]
    _leaves: tuple[torch.Tensor, ...]
    _jacobians: list[torch.Tensor]
    _has_average: bool

    def __init__(
        self, shape: int | Sequence[int], decay: float, mode: str = "truncated", window: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        check_word("dtype", dtype, (torch.float32, torch.float64))  # others never move at a decay of 0.9999
        check_word("mode", mode, MODES)
        if (window is not None) != (mode == "window"):
            reason = "the number of values to keep, must be given in mode 'window' and only there"
            raise InvalidValueError("window", reason)
        accepted = "lie in [0, 1); 0.99 averages over about 100 values"
        self.decay = check_number("decay", decay, lambda d: 0 <= d < 1, accepted)
        self.mode, self._window = mode, None if window is None else check_count("window", window)
        self.register_buffer("average", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("num_updates", torch.zeros((), device=device, dtype=torch.int64))
        self._start_anew()

    def forward(self, value: torch.Tensor, leaves: Iterable[torch.Tensor] | None = None) -> torch.Tensor:
        """Average a value and return the current average, with the graph that the mode defines.

        In mode "carried", `leaves` are those that gradients shall reach, the same at every update.
        """
        if (found := _described(value)) != (own := _described(self.average)):
            raise InvalidValueError("value", f"is {found}; must be {own} as the average is")
        if not self.training:
            if not self._has_average:
                raise NotReadyError("DifferentiableEMA", "no value was taken in yet, and eval mode takes none in")
            return self.average.clone()
        if self.mode == "carried":
            result = self._carried(value, leaves)
        elif leaves is not None:
            raise InvalidValueError("leaves", "only mode 'carried' takes them; others follow the value's own graph")
        elif self.mode == "truncated":
            result = self._next(self.average if self._has_average else None, value)
        else:
            result = self._recomputed(value)
        self.average = result.detach().clone()  # the caller may change the result in place
        self.num_updates += 1
        self._has_average = True
        return result

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Make the graphs of values in this block so that they remain valid after the next optimizer step.

        They keep copies of the tensors that autograd saves. In modes "truncated" and "carried", which keep no graph, it
        does nothing. Of nested hooks on saved tensors torch calls only the innermost.
        """
        hooks = saved_tensors_hooks(lambda saved: saved.detach().clone(), lambda kept: kept)
        with hooks if self.mode in ("window", "full") else nullcontext():
            yield

    def reset(self) -> None:
        """Forget everything: the next value is the first."""
        self.average = torch.zeros_like(self.average)
        self.num_updates.zero_()
        self._start_anew()

    def _next(self, average: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        return value.clone() if average is None else average * self.decay + value * (1 - self.decay)

    def _recomputed(self, value: torch.Tensor) -> torch.Tensor:
        """Average the kept values with their graphs after `_before`, the average of all earlier ones without one."""
        if not self._kept:
            self._before = self.average if self._has_average else None
        elif len(self._kept) == self._window:
            self._before = self._next(self._before, self._kept.popleft()).detach()
        self._kept.append(value.clone())  # it may be a view of a parameter, which the optimizer changes
        if self.mode == "full" and len(self._kept) > _LONGEST_QUIET_GRAPH:
            text = f"mode 'full' holds the graphs of {len(self._kept)} values, and one more with each"
            warn(f"{text}; use 'window' or 'carried' for training, or call reset()")
        running = self._before
        for kept in self._kept:
            running = self._next(running, kept)
        assert running is not None
        return running

    def _carried(self, value: torch.Tensor, leaves: Iterable[torch.Tensor] | None) -> torch.Tensor:
        """Average the value, and J: for each leaf a tensor of the shape [elements of the average, *leaf]."""
        found = () if leaves is None or isinstance(leaves, torch.Tensor) else tuple(leaves)
        good = [leaf for leaf in found if isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.requires_grad]
        if not found or len({*map(id, good)}) < len(found):
            reason = "must be different leaves that require gradients, at every update in mode 'carried', such as [w]"
            raise InvalidValueError("leaves", reason)
        if self._leaves and [*map(id, found)] != [*map(id, self._leaves)]:
            raise InvalidValueError("leaves", "must be the same tensors at every update", "call reset() to take others")
        if not value.requires_grad:
            raise InvalidValueError("value", "has no graph to take the derivative from", "make it outside of no_grad")

        if not self._leaves:  # a module that is skipped at a later update is no mistake
            reached = torch.autograd.grad(value.sum(), found, retain_graph=True, allow_unused=True)
            for number in (number for number, gradient in enumerate(reached) if gradient is None):
                text = f"the value does not depend on leaves[{number}] of the shape {list(found[number].shape)}"
                warn(f"{text}: it gets no gradient; leave it out, or look for a detach()")
        rows = torch.eye(value.numel(), dtype=value.dtype, device=value.device).view(-1, *value.shape)
        ways = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}  # the caller may use the graph
        each = [torch.autograd.grad(value, found, row, **ways) for row in rows]
        average = self.average if self._has_average else None
        share = 1.0 if average is None else 1 - self.decay
        earlier = self._jacobians or [torch.zeros(())] * len(found)
        self._jacobians = [
            share * torch.stack(gradients).to(value.dtype) + self.decay * old
            for gradients, old in zip(zip(*each, strict=True), earlier, strict=True)
        ]
        self._leaves, result = found, self._next(average, value.detach())
        for leaf, jacobian in zip(found, self._jacobians, strict=True):
            # 0, with the derivative J with respect to the leaf.
            nothing = torch.tensordot(jacobian, (leaf - leaf.detach()).to(jacobian), dims=leaf.dim())
            result = result + nothing.view_as(result)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **_no_graphs()}  # which copies and pickles cannot hold

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._start_anew()

    def _start_anew(self) -> None:
        self.__dict__.update(_no_graphs())
        self._has_average = int(self.num_updates) > 0  # read here, since every read waits for an accelerator


def _no_graphs() -> dict[str, Any]:
    return {"_before": None, "_kept": deque(), "_leaves": (), "_jacobians": []}


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"


# --- statistics --------------------------------------------------------------------------------------

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
    `half()`. The output is the input; x has the shape [n, dim_x], y [n, dim_y].

    Arguments:
        dim_x, dim_y: columns of x and y; without `dim_y`, y has those of x and may be left out.
        momentum: share of the newest batch, in (0, 1].
        eps: variance added where `correlation` divides; at least 0.

    Attributes:
        num_features_x, num_features_y: dim_x and dim_y.
        mean_x, mean_y: [dim_x], [dim_y]; 0 before the first batch.
        cov_xx, cov_yy, cov_xy: [dim_x, dim_x], [dim_y, dim_y], [dim_x, dim_y]; 1, 1 and 0 before the first batch.
        num_batches_tracked: batches so far, a tensor of int64.
        The last six are buffers, in the state dict; a state of symm-learning's class (`running_mean_x`, ...) loads too.
    """

    mean_x: torch.Tensor
    mean_y: torch.Tensor
    cov_xx: torch.Tensor
    cov_yy: torch.Tensor
    cov_xy: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(
        self, dim_x: int, dim_y: int | None = None, momentum: float = 0.1, eps: float = 1e-6,
        center_with_running_mean: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_features_x = check_count("dim_x", dim_x)
        self.num_features_y = self.num_features_x if dim_y is None else check_count("dim_y", dim_y)
        self.momentum = check_number("momentum", momentum, lambda m: 0 < m <= 1, "lie in (0, 1]")
        self.eps = check_number("eps", eps, lambda e: 0 <= e < math.inf, "be finite and at least 0")
        self.center_with_running_mean = center_with_running_mean
        self._y_may_be_x = dim_y is None
        default = torch.get_default_dtype()
        for name in (*_STATISTICS, "num_batches_tracked"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32 if is_narrow(default) else default))
        self.reset()

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Update the statistics in train mode; return the batch unchanged, `(x, x)` without y."""
        if y is None:
            y = x if self._y_may_be_x else x.new_empty(0)
        own = self.cov_xx.dtype
        for name, batch, dim in (("x", x, self.num_features_x), ("y", y, self.num_features_y)):
            if batch.dim() != 2 or batch.shape[1] != dim or not len(x) == len(batch) > 0:
                wanted = f"[n, {dim}] with n at least 1, the same for x and y"
                raise InvalidValueError(name, f"has the shape {list(batch.shape)}; must be {wanted}")
            if not batch.is_floating_point() or torch.finfo(batch.dtype).bits > torch.finfo(own).bits:
                reason = f"is {batch.dtype}, the statistics are {own}; must be floating-point and no wider"
                raise InvalidValueError(name, reason, "double() makes the statistics float64")
        if self.training:
            kind = x.device.type  # autocast would multiply the centred batch in half precision
            with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
                self._update(x.to(own), y.to(own))
        return x, y

    def correlation(self) -> torch.Tensor:
        """Return Pearson correlations of x and y, [dim_x, dim_y]: cov_xy / sqrt((var_x + eps) (var_y + eps)).

        A constant column has correlation 0. The result is differentiable like the statistics.
        """
        if int(self.num_batches_tracked) == 0:
            raise NotReadyError("correlation", "no batch was tracked yet", "call the module in train mode first")
        scale_x, scale_y = ((cov.diagonal() + self.eps).rsqrt() for cov in (self.cov_xx, self.cov_yy))
        return self.cov_xy * torch.outer(scale_x, scale_y)

    def reset(self) -> None:
        """Forget all batches."""
        x, y, like = self.num_features_x, self.num_features_y, self.cov_xx
        empty = torch.zeros(x), torch.zeros(y), torch.eye(x), torch.eye(y), torch.zeros(x, y)
        for name, value in zip(_STATISTICS, empty, strict=True):
            setattr(self, name, value.to(like.device, like.dtype))
        self.num_batches_tracked = torch.tensor(0, device=like.device)

    def _update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        first = self.num_batches_tracked == 0  # on the device: reading the number would wait for a GPU at every batch
        means = x.mean(dim=0), y.mean(dim=0)
        own = first if self.center_with_running_mean else torch.ones_like(first)
        x = x - torch.where(own, means[0], self.mean_x.detach())
        y = y - torch.where(own, means[1], self.mean_y.detach())
        covariances = (product / max(1, len(x) - 1) for product in (x.mT @ x, y.mT @ y, x.mT @ y))
        for name, batch in zip(_STATISTICS, (*means, *covariances), strict=True):
            average = (1 - self.momentum) * getattr(self, name).detach() + self.momentum * batch
            setattr(self, name, torch.where(first, batch, average))
        self.num_batches_tracked = self.num_batches_tracked + 1

    def __getstate__(self) -> dict[str, Any]:
        buffers = {name: value.detach() for name, value in self.named_buffers()}  # copies cannot hold a graph
        return {**self.__dict__, "_buffers": buffers}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in _STATISTICS:
            if f"{prefix}running_{name}" in state_dict:  # symm-learning's names
                state_dict[prefix + name] = state_dict.pop(f"{prefix}running_{name}")
        # Values are loaded in place, which must not change tensors of a graph or of a saved state.
        for name, value in dict(self.named_buffers()).items():
            setattr(self, name, value.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)
