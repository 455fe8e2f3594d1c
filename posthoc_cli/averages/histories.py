"""What each mode of `DifferentiableEMA` keeps of the past, so that gradients reach it."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from posthoc_cli.errors import InvalidValueError

Decay = float | torch.Tensor
"""A number, or a tensor of no dimensions that may be part of a graph."""

LONGEST_QUIET_GRAPH = 99
"""Values in a growing graph without a warning."""


class History(Protocol):
    """What is kept between updates beside the average itself."""

    def take_in(
        self, average: torch.Tensor | None, value: torch.Tensor, decay: Decay, leaves: Iterable[torch.Tensor] | None
    ) -> torch.Tensor:
        """The new average, with whatever graph this mode gives it; a tensor of its own.

        Arguments:
            average: the average before, without a graph; None at the first value.
            value: the new value, of the same shape, dtype and device.
            decay: of this update.
            leaves: what derivatives are carried for; None where none were given.
        """
        ...

    def fresh(self) -> History:
        """One like this that has seen nothing."""
        ...


def blend(average: torch.Tensor, value: torch.Tensor, decay: Decay) -> torch.Tensor:
    """decay average + (1 - decay) value."""
    return average * decay + value * (1 - decay)


def refuse_leaves(leaves: Iterable[torch.Tensor] | None) -> None:
    """Raise an InvalidValueError where leaves were given to a mode that finds them by itself."""
    if leaves is not None:
        raise InvalidValueError(
            "leaves", "only mode 'carried' takes them; the other modes follow the value's own graph"
        )


class Truncated:
    """Nothing: gradients reach the newest value only."""

    def take_in(
        self, average: torch.Tensor | None, value: torch.Tensor, decay: Decay, leaves: Iterable[torch.Tensor] | None
    ) -> torch.Tensor:
        """See `History`."""
        refuse_leaves(leaves)
        return value.clone() if average is None else blend(average, value, decay)

    def fresh(self) -> Truncated:
        """See `History`."""
        return Truncated()


class Window:
    """The last `length` values with their graphs, and the average of everything before them, without one.

    Attributes:
        length: how many values are kept.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._before: torch.Tensor | None = None
        self._kept: deque[tuple[torch.Tensor, Decay]] = deque()

    def take_in(
        self, average: torch.Tensor | None, value: torch.Tensor, decay: Decay, leaves: Iterable[torch.Tensor] | None
    ) -> torch.Tensor:
        """See `History`."""
        refuse_leaves(leaves)
        if not self._kept:
            self._before = average
        elif len(self._kept) == self.length:
            self._drop_oldest()
        # A copy: the value may be a view of a parameter, which the optimizer is going to change.
        self._kept.append((value.clone(), decay))
        running = None if self._before is None else self._before.to(value)
        for kept, decay_then in self._kept:
            running = _next(running, kept.to(value), decay_then)
        assert running is not None
        return running

    def fresh(self) -> Window:
        """See `History`."""
        return Window(self.length)

    def _drop_oldest(self) -> None:
        value, decay = self._kept.popleft()
        with torch.no_grad():
            before = None if self._before is None else self._before.to(value)
            self._before = _next(before, value, decay)


class Full:
    """The whole graph, which grows with every value."""

    def __init__(self) -> None:
        self._average: torch.Tensor | None = None
        self._length = 0

    def take_in(
        self, average: torch.Tensor | None, value: torch.Tensor, decay: Decay, leaves: Iterable[torch.Tensor] | None
    ) -> torch.Tensor:
        """See `History`."""
        refuse_leaves(leaves)
        before = average if self._average is None else self._average.to(value)
        self._average = _next(before, value, decay)
        self._length += 1
        if self._length > LONGEST_QUIET_GRAPH:
            warnings.warn(
                f"mode 'full' holds the graphs of {self._length} values, and one more with each; use 'window' or "
                "'carried' for training, or call reset()",
                RuntimeWarning,
                stacklevel=CALLER,
            )
        return self._average.clone()

    def fresh(self) -> Full:
        """See `History`."""
        return Full()


CALLER = 5
"""Frames from a warning in `take_in` to the call of the module: take_in, forward, two of torch.nn.Module."""


def _next(average: torch.Tensor | None, value: torch.Tensor, decay: Decay) -> torch.Tensor:
    """The average after `value`; the first value is its own average."""
    if average is None:
        return value.clone()
    if isinstance(decay, torch.Tensor):
        decay = decay.to(average.device)
    return blend(average, value, decay)


# --- The mode that carries the average's derivative along instead of a graph -----------------------


class Carried:
    """The derivative J of the average with respect to leaves, itself averaged: see `DifferentiableEMA`.

    Arguments:
        cotangent: the one direction in which derivatives are kept, of the average's shape and of length 1; None for
            all of them.
    """

    def __init__(self, cotangent: torch.Tensor | None = None) -> None:
        self._cotangent = cotangent
        self._leaves: tuple[torch.Tensor, ...] = ()
        self._jacobians: tuple[torch.Tensor, ...] = ()

    def take_in(
        self, average: torch.Tensor | None, value: torch.Tensor, decay: Decay, leaves: Iterable[torch.Tensor] | None
    ) -> torch.Tensor:
        """See `History`. A J of a leaf has the shape [elements of the average, *leaf]; [1, *leaf] with a cotangent."""
        found = self._check_leaves(leaves)
        if isinstance(decay, torch.Tensor) and decay.requires_grad:
            raise InvalidValueError(
                "decay", "requires gradients, which mode 'carried' does not give it", "use 'window'"
            )
        if not value.requires_grad:
            raise InvalidValueError("value", "has no graph to take the derivative from", "make it outside of no_grad")
        cotangent = None if self._cotangent is None else self._cotangent.to(value)
        jacobians, unreached = _jacobians(value, found, cotangent)
        if unreached and not self._jacobians:  # later on a part that is skipped now and then is no mistake
            _warn_of_unreached(unreached, found)
        kept = 0.0 if average is None else float(decay)
        for index, jacobian in enumerate(jacobians):
            jacobian.mul_(1 - kept)
            if self._jacobians:
                jacobian.add_(self._jacobians[index].to(jacobian), alpha=kept)
        self._leaves, self._jacobians = found, jacobians
        newest = value.detach()
        result = newest.clone() if average is None else blend(average, newest, decay)
        attached: torch.Tensor = _Attached.apply(result, cotangent, len(found), *jacobians, *found)  # type: ignore[no-untyped-call]
        return attached

    def fresh(self) -> Carried:
        """See `History`."""
        return Carried(self._cotangent)

    def _check_leaves(self, leaves: Iterable[torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
        if leaves is None or isinstance(leaves, torch.Tensor):
            raise InvalidValueError("leaves", "mode 'carried' needs a sequence of tensors at every update, such as [w]")
        found = tuple(leaves)
        if not found or len({id(leaf) for leaf in found}) < len(found):
            raise InvalidValueError("leaves", "must be one tensor at least, and none of them twice")
        for index, leaf in enumerate(found):
            if not (isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.requires_grad):
                raise InvalidValueError(
                    f"leaves[{index}]", "must be a leaf that requires gradients, such as a parameter"
                )
        same = len(found) == len(self._leaves) and all(a is b for a, b in zip(found, self._leaves, strict=True))
        if self._leaves and not same:
            raise InvalidValueError("leaves", "must be the same tensors at every update", "call reset() to take others")
        return found


def check_cotangent(cotangent: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A cotangent of this shape, scaled to length 1, since only its direction matters; None of None."""
    if cotangent is None:
        return None
    if not isinstance(cotangent, torch.Tensor) or tuple(cotangent.shape) != shape:
        found = list(cotangent.shape) if isinstance(cotangent, torch.Tensor) else type(cotangent).__name__
        raise InvalidValueError("cotangent", f"must be a tensor of the average's shape {list(shape)}, not {found}")
    length = float(cotangent.detach().double().norm())
    if not math.isfinite(length) or length == 0:
        raise InvalidValueError("cotangent", "must be finite, and not all zero")
    return cotangent.detach().double() / length


def _jacobians(
    value: torch.Tensor, leaves: tuple[torch.Tensor, ...], cotangent: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, ...], list[int]]:
    """d value / d leaf for each leaf, one backward pass a row, in float32 at least; and which leaves have none."""
    rows = value.numel() if cotangent is None else 1
    jacobians = tuple(
        torch.zeros(rows, *leaf.shape, device=leaf.device, dtype=torch.promote_types(leaf.dtype, torch.float32))
        for leaf in leaves
    )
    unreached = set(range(len(leaves))) if rows else set()
    for row, direction in enumerate(_directions(value, cotangent)):
        # The graph is the caller's, who may want gradients of the value itself.
        gradients = torch.autograd.grad(value, leaves, direction, retain_graph=True, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                jacobians[index][row] = gradient
                unreached.discard(index)
    return jacobians, sorted(unreached)


def _warn_of_unreached(unreached: Sequence[int], leaves: Sequence[torch.Tensor]) -> None:
    listed = ", ".join(f"leaves[{index}] of the shape {list(leaves[index].shape)}" for index in unreached[:5])
    more = f" and {len(unreached) - 5} more" if len(unreached) > 5 else ""
    warnings.warn(
        f"the value does not depend on {listed}{more}: no gradient will reach these leaves; leave them out, or look "
        "for a detach() on the way",
        RuntimeWarning,
        stacklevel=CALLER + 1,
    )


def _directions(value: torch.Tensor, cotangent: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The rows of the identity, each of the value's shape; or the cotangent alone."""
    if cotangent is not None:
        yield cotangent
        return
    for index in range(value.numel()):
        direction = torch.zeros(value.numel(), dtype=value.dtype, device=value.device)
        direction[index] = 1
        yield direction.reshape(value.shape)


class _Attached(torch.autograd.Function):
    """A tensor, unchanged, whose derivative with respect to leaves is given."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, cotangent: torch.Tensor | None, count: int, *tensors: Any) -> Any:
        """`tensors` are `count` Jacobians, then the `count` leaves that they belong to."""
        ctx.cotangent = cotangent
        ctx.save_for_backward(*tensors[:count])
        ctx.dtypes = [leaf.dtype for leaf in tensors[count:]]
        return result.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """g^T J for each leaf."""
        weights = _weights(gradient, ctx.cotangent)
        pulled = []
        for jacobian, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            share = weights.to(jacobian)
            pulled.append(torch.tensordot(share, jacobian, dims=1).to(dtype))
        return (None, None, None, *[None] * len(pulled), *pulled)


def _weights(gradient: torch.Tensor, cotangent: torch.Tensor | None) -> torch.Tensor:
    """How much of each row of a Jacobian is in a gradient: shape [rows].

    Raises:
        InvalidValueError: the gradient does not point along the cotangent.
    """
    if cotangent is None:
        return gradient.flatten()
    scale = (gradient * cotangent).sum()
    off, size = float((gradient - scale * cotangent).norm()), float(gradient.norm())
    # A gradient that is not finite passes, as it does everywhere else: a GradScaler looks for it later.
    if off > torch.finfo(gradient.dtype).eps ** 0.5 * size:
        raise InvalidValueError(
            "backward",
            f"the gradient of the average does not point along the cotangent ({100 * off / size:.2g} % "
            "of it is across)",
            "use the loss that the cotangent was made for, or no cotangent",
        )
    return scale.reshape(1)
