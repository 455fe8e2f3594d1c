"""Moving averages through which `backward` works, and graphs that outlive the next optimizer step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from posthoc_cli.averages.pairing import WideBuffers
from posthoc_cli.errors import InvalidValueError, NotReadyError, check_count, check_number, check_word, warn

MODES = ("truncated", "window", "carried", "full")
_ACCUMULATORS = (torch.float32, torch.float64)
"""At a decay of 0.9999 an average in half precision never moves."""
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
    `backward` adds g^T J_t (first derivatives only). Pass the leaves with every value, `ema(x, leaves=[w])`; no other
    tensor gets a gradient. An update takes a backward pass per element of the average, and memory of (elements of the
    average) x (elements of the leaves).

    Detach a value that is built from an earlier result: it brings that graph along in every mode but "carried". Eval
    mode returns the average without a graph and takes no value in. A state dict and a copy hold the average and the
    number of updates; graphs and J start empty, with the average so far as a constant.

    Arguments:
        shape: of the values.
        decay: in [0, 1).
        mode: "truncated", "window", "carried" or "full".
        window: number of values kept in mode "window".
        device, dtype: of the average; float32 or float64, as the values are. `half()` leaves it as it is.

    Attributes:
        average: without a graph; zeros before the first value.
        num_updates: values taken in, an int64 tensor.

    Raises:
        InvalidValueError: (a ValueError) names the argument; such a value is not taken in.
        NotReadyError: (in eval mode) there is no average yet.

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
    _has_average: bool

    def __init__(
        self,
        shape: int | Sequence[int],
        decay: float,
        mode: str = "truncated",
        window: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        check_word("dtype", dtype, _ACCUMULATORS)
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
        """Take a value in; returns the current average, with the graph that the mode gives it.

        In mode "carried", `leaves` are those that gradients shall reach, the same at every update.
        """
        if (found := _described(value)) != (own := _described(self.average)):
            raise InvalidValueError("value", f"is {found}; must be {own} as the average is")
        if not self.training:
            if not self._has_average:
                raise NotReadyError("DifferentiableEMA", "no value was taken in yet, and eval mode takes none in")
            return self.average.clone()
        if leaves is not None and self.mode != "carried":
            raise InvalidValueError("leaves", "only mode 'carried' takes them; others follow the value's own graph")
        average = self.average if self._has_average else None
        if self._history is None:
            result = _next(average, value, self.decay)
        else:
            result = self._history.take_in(average, value, self.decay, leaves)
        self.average = result.detach().clone()  # the caller may change the result in place
        self.num_updates += 1
        self._has_average = True
        return result

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A block in which the graphs of values are made so that they outlive the next optimizer step.

        They keep copies of the tensors that autograd saves, one a block for each tensor. In modes "truncated" and
        "carried", which keep no graph, it does nothing. Not covered: what a custom `torch.autograd.Function` keeps
        without `save_for_backward`. Of nested hooks on saved tensors torch calls only the innermost.
        """
        copies: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(saved: torch.Tensor) -> torch.Tensor:
            value = saved.detach()
            if value.layout != torch.strided:
                return value.clone()
            place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.device, value.dtype)
            view = (*place, value.shape, value.stride(), saved._version)
            if view not in copies:
                # Held until the block ends: the address of a freed tensor could be given to another one.
                copies[view] = value, value.clone()
            return copies[view][1]

        try:
            with saved_tensors_hooks(keep, lambda kept: kept) if self.mode in ("window", "full") else nullcontext():
                yield
        finally:
            copies.clear()

    def reset(self) -> None:
        """Forget everything: the next value is the first."""
        self.average = torch.zeros_like(self.average)
        self.num_updates.zero_()
        self._start_anew()

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"{list(self.average.shape)}, decay={self.decay:g}, mode={self.mode!r}"

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles cannot hold a graph.
        return {**self.__dict__, "_history": self._new_history()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._start_anew()

    def _start_anew(self) -> None:
        self._history = self._new_history()
        self._has_average = int(self.num_updates) > 0  # read here, since every read waits for an accelerator

    def _new_history(self) -> _Window | _Carried | None:
        """What this mode keeps between updates in addition to the average."""
        if self.mode == "carried":
            return _Carried()
        return None if self.mode == "truncated" else _Window(self._window)


class _Window:
    """The last `length` values (None: all) with their graphs, and the average of all earlier ones without a graph."""

    def __init__(self, length: int | None) -> None:
        self._length = length
        self._before: torch.Tensor | None = None
        self._kept: deque[torch.Tensor] = deque()

    def take_in(self, average: torch.Tensor | None, value: torch.Tensor, decay: float, _: object) -> torch.Tensor:
        if not self._kept:
            self._before = average
        elif len(self._kept) == self._length:
            with torch.no_grad():
                self._before = _next(self._before, self._kept.popleft(), decay)
        # A copy, since the value may be a view of a parameter, which the optimizer changes.
        self._kept.append(value.clone())
        if self._length is None and len(self._kept) > _LONGEST_QUIET_GRAPH:
            text = f"mode 'full' holds the graphs of {len(self._kept)} values, and one more with each"
            hint = "use 'window' or 'carried' for training, or call reset()"
            warn(f"{text}; {hint}")
        running = self._before
        for kept in self._kept:
            running = _next(running, kept.to(value), decay)
        return cast(torch.Tensor, running)


class _Carried:
    """The derivatives J of the average with respect to the leaves, see `DifferentiableEMA`.

    J of a leaf has the shape [elements of the average, *leaf].
    """

    def __init__(self) -> None:
        self._leaves: tuple[torch.Tensor, ...] = ()
        self._jacobians: list[torch.Tensor] = []

    def take_in(
        self, average: torch.Tensor | None, value: torch.Tensor, decay: float, leaves: Iterable[torch.Tensor] | None
    ) -> torch.Tensor:
        found = self._check_leaves(leaves)
        if not value.requires_grad:
            raise InvalidValueError("value", "has no graph to take the derivative from", "make it outside of no_grad")
        jacobians, unreached = _jacobians(value, found)
        if unreached and not self._jacobians:  # a module that is skipped at a later update is no mistake
            first = f"leaves[{unreached[0]}] of the shape {list(found[unreached[0]].shape)}"
            text = f"the value does not depend on {len(unreached)} of the leaves, such as {first}"
            hint = "they get no gradient; leave them out, or look for a detach()"
            warn(f"{text}: {hint}")
        kept = 0.0 if average is None else decay
        for index, jacobian in enumerate(jacobians):
            jacobian.mul_(1 - kept)
            if self._jacobians:
                jacobian.add_(self._jacobians[index].to(jacobian), alpha=kept)
        self._leaves, self._jacobians = found, jacobians
        result = _next(average, value.detach(), decay)
        return cast(torch.Tensor, _Attached.apply(result, len(found), *jacobians, *found))  # type: ignore[no-untyped-call]

    def _check_leaves(self, leaves: Iterable[torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
        found = tuple(leaves or ()) if not isinstance(leaves, torch.Tensor) else ()
        good = [leaf for leaf in found if isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.requires_grad]
        if not found or len({id(leaf) for leaf in good}) < len(found):
            reason = "must be different leaves that require gradients, at every update in mode 'carried', such as [w]"
            raise InvalidValueError("leaves", reason)
        if self._leaves and [*map(id, found)] != [*map(id, self._leaves)]:
            raise InvalidValueError("leaves", "must be the same tensors at every update", "call reset() to take others")
        return found


def _next(average: torch.Tensor | None, value: torch.Tensor, decay: float) -> torch.Tensor:
    """decay average + (1 - decay) value; the first value is its own average."""
    if average is None:
        return value.clone()
    return average.to(value) * decay + value * (1 - decay)


def _jacobians(value: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> tuple[list[torch.Tensor], list[int]]:
    """d value / d leaf for each leaf, in float32 at least, and the indices of leaves that the value ignores."""
    rows = value.numel()
    jacobians = [
        torch.zeros(rows, *leaf.shape, device=leaf.device, dtype=torch.promote_types(leaf.dtype, torch.float32))
        for leaf in leaves
    ]
    unreached = set(range(len(leaves)))
    for row in range(rows):
        direction = torch.zeros_like(value, memory_format=torch.contiguous_format)
        direction.view(-1)[row] = 1
        # The caller may want gradients of the value itself, from the same graph.
        gradients = torch.autograd.grad(value, leaves, direction, retain_graph=True, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                jacobians[index][row] = gradient
                unreached.discard(index)
    return jacobians, sorted(unreached)


class _Attached(torch.autograd.Function):
    """A tensor, unchanged, with a given derivative with respect to leaves."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, count: int, *tensors: Any) -> Any:
        """`tensors` are `count` Jacobians, then the `count` leaves that they belong to."""
        ctx.save_for_backward(*tensors[:count])
        ctx.dtypes = [leaf.dtype for leaf in tensors[count:]]
        return result.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """g^T J for each leaf."""
        pulled = [
            torch.tensordot(gradient.flatten().to(jacobian), jacobian, dims=1).to(dtype)
            for jacobian, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (None, None, *[None] * len(pulled), *pulled)


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
