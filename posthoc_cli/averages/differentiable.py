"""Values whose graphs outlive the next optimizer step."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from posthoc_cli.averages.histories import Carried, Decay, Full, History, Truncated, Window, check_cotangent
from posthoc_cli.errors import InvalidValueError, NotReadyError


@contextmanager
def recording() -> Iterator[None]:
    """Within the block, graphs keep copies of the tensors that autograd saves, instead of the tensors themselves.

    An optimizer changes parameters in place. A graph that saved one is then unusable, since `backward` would multiply
    with the new value where the derivative has the old one, and torch raises an error. A copy stays as it was.

    Every saved tensor is copied once a block, however many operations save it, and the copy takes its place in the
    graph, so that a recorded graph holds what an ordinary one does, and a copy of each parameter in it. Not covered
    is what a custom `torch.autograd.Function` keeps without `save_for_backward`. Of nested hooks on saved tensors
    only the innermost is called: that is torch's rule.
    """
    copies: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        value = saved.detach()
        if value.layout != torch.strided:
            return value.clone()
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.device, value.dtype)
        view = (*place, value.shape, value.stride(), saved._version)
        if view not in copies:
            # The original is held until the block ends: freed, its address could become another tensor's.
            copies[view] = value, value.clone()
        return copies[view][1]

    def give(copy: torch.Tensor) -> torch.Tensor:
        return copy

    try:
        with saved_tensors_hooks(keep, give):
            yield
    finally:
        copies.clear()


# --- `DifferentiableEMA`: the module ---------------------------------------------------------------


MODES = ("truncated", "window", "carried", "full")

_ACCUMULATORS = (torch.float32, torch.float64)
"""At a decay of 0.9999 an average in half precision never moves."""


class DifferentiableEMA(torch.nn.Module):
    """An exponential moving average of tensors, on which `backward` works: for a loss on running statistics.

    The values are x_1, x_2, ..., each the output of a graph, x_i = f_i(w_i), where w_i is what the leaf w (a parameter)
    was worth when x_i was made. The average is a_1 = x_1 and

        a_t = decay a_{t-1} + (1 - decay) x_t = sum_i c_i x_i,    c_i = (1 - decay) decay**(t-i),   c_1 = decay**(t-1).

    The modes differ in what `backward` on a_t adds to w.grad, where g is the gradient that arrives at a_t:

    - "truncated": g^T (1 - decay) dx_t/dw. The newest value only, as batch statistics do. Memory is constant.
    - "window": g^T sum_i c_i df_i/dw(w_i) over the last `window` values, exactly. Memory is that of `window` graphs.
    - "full": the same over all values. The graph grows without end: for checks. From the 100th value on it warns.
    - "carried": the same over all values, without any graph. See below.

    **Graphs that are kept** ("window", "full") are used by more than one `backward`: call it with `retain_graph=True`.
    And since optimizers change leaves in place, make the values under `with ema.recording():`, so that the graphs keep
    copies of what the leaves were worth; without it torch raises an error that names the in-place operation.

    **Carried.** J_t = da_t/dw is itself averaged, J_t = decay J_{t-1} + (1 - decay) dx_t/dw with J_1 = dx_1/dw, and
    `backward` adds g^T J_t. Give the leaves with every value, `ema(x, leaves=[w])`; gradients reach these and nothing
    else. An update costs a backward pass for each element of the average and memory of (elements of the average) x
    (elements of the leaves): it is for an average of few values. Or give a fixed `cotangent` c: then only c^T J is
    carried, one pass and the memory of the leaves, and `backward` accepts gradients g that are a multiple of c. There
    are first derivatives only (no `create_graph`). Leaves that the first value does not depend on are named in a
    warning.

    What this derivative is: J_t = sum_i c_i df_i/dw(w_i), each term at the leaf's value *of then*. It is what moves a_t
    when one and the same shift is added to all of w_1, ..., w_t: d/ds sum_i c_i f_i(w_i + s) at s = 0. It equals the
    derivative of a graph over all values. What it is not, once the leaf moves: the derivative of the average that
    today's leaf would give, sum_i c_i df_i/dw(w_t), and the derivative through the optimizer, where w_i itself depends
    on w_1. Where the leaf stands still, or f_i is linear, the first of the two is the same as J_t.

    A value that is built from an earlier result brings that result's graph along in every mode but "carried"; detach
    it first. In eval mode a value is not taken in: the average comes back as it stands, without a graph.

    A state dict and a copy hold the average and the number of updates. Graphs, and J, begin anew: the average of
    before counts as a constant.

    Arguments:
        shape: of the values.
        decay: in [0, 1). Or a tensor of one element that requires gradients (not in mode "carried"); it gets them from
            the updates that the mode keeps. A Parameter becomes the module's own. It may be assigned before each
            update, such as `ema.decay = torch.sigmoid(logit)`, which keeps a learned one in range.
        mode: "truncated", "window", "carried" or "full".
        window: in mode "window", how many values are kept.
        cotangent: in mode "carried", the only direction in which gradients are wanted, of shape `shape`.
        device: of the average.
        dtype: of the average and the values, float32 or float64; torch's default when left out.

    Attributes:
        average: the average, without a graph; zeros before the first value.
        num_updates: values taken in, an int64 tensor.
        decay: as given.
        mode: as given.

    Raises:
        InvalidValueError: (a ValueError) naming the argument and what would be accepted.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> ema = DifferentiableEMA(2, decay=0.5, mode="carried")
        >>> for data in (torch.tensor([1.0, 1.0]), torch.tensor([3.0, 5.0])):
        ...     average = ema(weight * data, leaves=[weight])
        >>> average.detach()
        tensor([2., 6.])
        >>> average.sum().backward()
        >>> weight.grad  # 0.5 * 1 + 0.5 * 3, and 0.5 * 1 + 0.5 * 5
        tensor([2., 3.])
    """

    average: torch.Tensor
    num_updates: torch.Tensor
    decay: Decay

    def __init__(
        self,
        shape: int | Sequence[int],
        decay: Decay,
        mode: str = "truncated",
        window: int | None = None,
        cotangent: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if dtype not in _ACCUMULATORS:
            raise InvalidValueError("dtype", f"must be torch.float32 or torch.float64, not {dtype}")
        _check_decay(decay)
        self.decay = decay
        self.mode = mode
        size = _check_shape(shape)
        self.register_buffer("average", torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("num_updates", torch.zeros((), device=device, dtype=torch.int64))
        self._history = _make_history(mode, window, check_cotangent(cotangent, size))
        self._has_average = False

    def forward(self, value: torch.Tensor, leaves: Iterable[torch.Tensor] | None = None) -> torch.Tensor:
        """Take a value in; returns the current average, with the graph that the mode gives it.

        Arguments:
            value: of the average's shape, dtype and device.
            leaves: in mode "carried" what gradients shall reach: parameters or other leaves that require gradients,
                the same at every update.

        Raises:
            InvalidValueError: a value of another shape, dtype or device, a decay out of range, or wrong leaves.
                Nothing is taken in.
            NotReadyError: in eval mode, when there is no average yet.
        """
        self._check_value(value)
        if not self.training:
            if not self._has_average:
                raise NotReadyError("DifferentiableEMA", "no value was taken in yet, and eval mode takes none in")
            return self.average.clone()
        _check_decay(self.decay)
        # The decay of this update, which an optimizer may change in place before the graph is used.
        decay = self.decay.reshape(()).clone() if isinstance(self.decay, torch.Tensor) else self.decay
        result = self._history.take_in(self.average if self._has_average else None, value, decay, leaves)
        # A tensor of its own: the caller may change the result in place.
        self.average = result.detach().clone()
        self.num_updates += 1
        self._has_average = True
        return result

    def recording(self) -> AbstractContextManager[None]:
        """A block in which the graphs of values are made so that they outlive the next optimizer step.

        Within it every tensor that autograd saves is copied once. Modes "truncated" and "carried" keep no graph, so
        that there it does nothing.
        """
        return recording() if self.mode in ("window", "full") else nullcontext()

    def reset(self) -> None:
        """Forget everything: the next value is the first."""
        self.average = torch.zeros_like(self.average)
        self.num_updates.zero_()
        self._begin_anew()

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        decay = "learned" if isinstance(self.decay, torch.Tensor) else f"{self.decay:g}"
        return f"{list(self.average.shape)}, decay={decay}, mode={self.mode!r}"

    def __getstate__(self) -> dict[str, Any]:
        # For copies and pickles, which can hold no graph.
        state = {**self.__dict__, "_history": self._history.fresh()}
        if isinstance(state.get("decay"), torch.Tensor) and not state["decay"].is_leaf:
            state["decay"] = state["decay"].detach()
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._history = self._history.fresh()
        # Looked up here and not at every update, where an accelerator would have to be waited for.
        self._has_average = int(self.num_updates) > 0

    def _check_value(self, value: torch.Tensor) -> None:
        if not isinstance(value, torch.Tensor) or value.shape != self.average.shape:
            found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise InvalidValueError("value", f"must be a tensor of the shape {list(self.average.shape)}, not {found}")
        if self.average.dtype not in _ACCUMULATORS:
            raise InvalidValueError("average", f"is {self.average.dtype}", "keep it in torch.float32 with ema.float()")
        if value.dtype != self.average.dtype:
            raise InvalidValueError(
                "value", f"is {value.dtype}, the average {self.average.dtype}", "convert it with value.to(...)"
            )
        if value.device != self.average.device:
            raise InvalidValueError(
                "value",
                f"is on {value.device}, the average on {self.average.device}",
                "move the module with ema.to(...)",
            )


def _check_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    try:
        size = tuple(operator.index(n) for n in (shape if isinstance(shape, Iterable) else (shape,)))
    except TypeError:
        size = (-1,)
    if any(n < 0 for n in size):
        raise InvalidValueError(
            "shape", "must be a whole number or a sequence of them, none negative", value=f"{shape!r}"
        )
    return size


def _check_decay(decay: Decay) -> None:
    if isinstance(decay, torch.Tensor) and (decay.numel() != 1 or not decay.is_floating_point()):
        raise InvalidValueError("decay", f"a tensor must have one element of floating point, not {list(decay.shape)}")
    number = float(decay.detach()) if isinstance(decay, torch.Tensor) else decay
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < 1 or math.isnan(number):
        raise InvalidValueError("decay", "must lie in [0, 1); 0.99 averages over about 100 values", value=f"{number!r}")


def _make_history(mode: str, window: int | None, cotangent: torch.Tensor | None) -> History:
    if mode not in MODES:
        raise InvalidValueError("mode", f"must be one of {', '.join(MODES)}", value=f"{mode!r}")
    if (window is not None) != (mode == "window"):
        raise InvalidValueError("window", "the number of values to keep, to be given in mode 'window' and in no other")
    if cotangent is not None and mode != "carried":
        raise InvalidValueError("cotangent", "is for mode 'carried'; the other modes take any gradient")
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise InvalidValueError("window", "must be a whole number, at least 1", value=f"{window!r}")
        return Window(window)
    if mode == "carried":
        return Carried(cotangent)
    return Truncated() if mode == "truncated" else Full()
