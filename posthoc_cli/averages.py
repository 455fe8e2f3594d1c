"""The other averages, next to the post-hoc tracker, and recipes that train with an average.

The averaged module of a bfloat16 model (8 significant bits) or a float16 model (11) is float32: an
update by 2e-4 of a distance is less than half of a weight's last bit, so that an average rounded
after every update never leaves its start.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.swa_utils import AveragedModel

from posthoc_cli.errors import (
    InvalidValueError,
    Log,
    ModelMismatchError,
    NotReadyError,
    check_count,
    check_number,
    check_word,
)
from posthoc_cli.targets import Wanted
from posthoc_cli.tracker import PostHocEMA
from posthoc_cli.tracker.filling import check_weights, fill_in
from posthoc_cli.tracker.model import check_model, unwrap

__all__ = [
    "DifferentiableEMA",
    "EMAStats",
    "ExponentialMovingAverage",
    "HareAndTortoise",
    "ShadowModel",
    "SwitchEMA",
]

log = Log(__name__)

SUSPICIOUS_MOMENTUM = 0.5


class Wide(nn.Module):
    """A module that moves between devices, but keeps its precision under `half()` and `bfloat16()`,
    in which averages would stop moving."""

    def _apply(
        self,
        fn: Callable[[Tensor], Tensor],
        recurse: bool = True,
    ) -> Wide:
        def apply(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if is_narrow(new.dtype) else new

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self


class ExponentialMovingAverage(Wide):
    """An average of a model's parameters with exponentially decaying weights.

    The first `update_parameters` copies the model. Later ones average at every `interval`-th call:

        average <- (1 - momentum) average + momentum parameter

    `forward` runs the averaged module, in which half-precision tensors are float32, also after
    `half()`. The interface and the names in the state dict are those of
    `mmengine.model.ExponentialMovingAverage` since mmengine 1.0, whose states load.

    Arguments:
        model: its weights are copied, but have no share in the average.
        momentum: share of the new value, in (0, 1): 1 - decay.
        interval: calls of `update_parameters` between two averagings, at least 1.
        device: of the average; by default the model's.
        update_buffers: average floating-point buffers of the state dict, too. All others are copied
            at every call.
        warmup: limit the decay to (1 + t) / (10 + t) after t calls, TensorFlow's rule, to forget
            early weights sooner.

    Attributes:
        module: the averaged model; its parameters need no gradients.
        steps: calls of `update_parameters` so far, an int64 tensor.
    """

    steps: Tensor

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
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
            log.warning(
                f"momentum {momentum:g}: is the share of the new value and usually small; "
                f"for a decay of {momentum:g} pass {1 - momentum:.4g}"
            )
        self.interval = check_count("interval", interval)
        self.update_buffers = update_buffers
        self.warmup = warmup
        self.module = make_average(model).to(device)
        self.register_buffer("steps", torch.tensor(0, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average the model's weights. Call it after every optimizer step."""
        steps = int(self.steps)
        parameters, buffers = pair_tensors(self.module, model)
        share = self.momentum
        if self.warmup:
            share = max(share, 9 / (10 + steps))
        averaged: list[Pair] = []
        copied: list[Pair] = []
        for pair in buffers:
            takes_part = self.update_buffers and steps and is_averaged(pair[0])
            kind = averaged if takes_part else copied
            kind.append(pair)
        average_(copied)
        if steps == 0:
            average_(parameters)
        elif steps % self.interval == 0:
            average_(parameters, share)
            # equal elements stay: the mean of two infinities in a mask would be nan
            for average, source in averaged:
                value = source.to(average)
                moved = torch.lerp(average, value, share)
                average.copy_(torch.where(average == value, value, moved))
        self.steps += 1


class ShadowModel(Wide):
    """A model and its shadow: `forward` runs the model in train mode and the shadow in eval mode.

    Call `update()` after every optimizer step. It averages all floating-point parameters with the
    formula of `tf.train.ExponentialMovingAverage` and copies the buffers:

        shadow <- shadow - (1 - decay) (shadow - variable)

    Both are submodules: they move, save and load together. The shadow needs no gradients and is
    always in eval mode. The shadow of a half-precision model is float32, also if the model is cast
    later, and so are the inputs that it takes.

    Arguments:
        model: the model to train; held, not copied.
        decay: share of the shadow that an update keeps, in [0, 1); in practice 0.99 to 0.9999.
        num_updates: limits the decay to (1 + num_updates) / (10 + num_updates). A number is the
            count to start from, usually 0, and part of the state. A tensor is the caller's own
            counter, such as the training step: read at every update, never written to.
        zero_debias: start the shadow at zero and divide by the sum of the weights given so far
            (Kingma and Ba, arXiv 1412.6980, section 3), which is TensorFlow's 1 - decay**updates
            for a constant decay: the model's initial parameters have no share, and the first update
            copies the model.
    """

    num_updates: Tensor | None
    debias_mass: Tensor

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        decay: float,
        num_updates: int | Tensor | None = None,
        zero_debias: bool = False,
    ) -> None:
        super().__init__()
        self.decay = check_decay(decay, "usual values are 0.99 to 0.9999")
        self.zero_debias = zero_debias
        self.model = check_model(model)
        self.shadow = make_average(model).eval()
        if num_updates is None or isinstance(num_updates, Tensor):
            self.num_updates = num_updates
        else:
            self.register_buffer(
                "num_updates", torch.tensor(check_count("num_updates", num_updates, 0))
            )
        if zero_debias:
            self.register_buffer("debias_mass", torch.tensor(0.0, dtype=torch.float32))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model in train mode, the shadow in eval mode."""
        network = self.model if self.training else self.shadow
        return network(*args, **kwargs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self) -> None:
        """Average the model's parameters into the shadow. In eval mode only warn."""
        if not self.training:
            log.warning(
                "update: the module is in eval mode, and the shadow stays; call train() before "
                "training"
            )
            return
        parameters, buffers = pair_tensors(self.shadow, self.model)
        decay = self.decay
        if self.num_updates is not None:
            count = int(self.num_updates)
            decay = min(decay, (1 + count) / (10 + count))
            if "num_updates" in self._buffers:  # not the caller's own
                self.num_updates += 1
        share = 1 - decay
        if self.zero_debias:
            # The sum of weights w follows the recursion of the biased average b: w <- decay w + (1
            # - decay). With b = w u the debiased average u moves by share / w.
            self.debias_mass.fill_(decay * float(self.debias_mass) + share)
            share /= float(self.debias_mass)
        average_(parameters, share)
        average_(buffers)

    def _apply(
        self,
        fn: Callable[[Tensor], Tensor],
        recurse: bool = True,
    ) -> ShadowModel:
        self.model._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> ShadowModel:
        """Set the mode; the shadow stays in eval mode."""
        super().train(mode)
        self.shadow.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ShadowModel:
        """Set it for the model's parameters; the shadow's never require gradients."""
        self.model.requires_grad_(requires_grad)
        return self


def check_decay(decay: float, examples: str) -> float:
    """Raise an InvalidValueError unless a decay lies in [0, 1)."""
    return check_number("decay", decay, lambda d: 0 <= d < 1, f"lie in [0, 1); {examples}")


# --- pairs of tensors

# a tensor of the average, and the model's tensor of the same name
Named = tuple[str, Tensor]
Pair = tuple[Tensor, Tensor]


def make_average(model: nn.Module) -> nn.Module:
    """Copy a model without gradients; half precision becomes float32."""
    bare = unwrap(check_model(model))
    average = copy.deepcopy(bare).requires_grad_(False)
    average._apply(lambda tensor: tensor.float() if is_narrow(tensor.dtype) else tensor)  # type: ignore[no-untyped-call]
    return average


def pair_tensors(
    average: nn.Module,
    model: nn.Module,
) -> tuple[list[Pair], list[Pair]]:
    """Pair the parameters and the buffers of both by name, tied ones once.

    Raises a ModelMismatchError if names or shapes differ.
    """
    bare = unwrap(check_model(model))
    parameters = _pair_by_name("parameters", average.named_parameters(), bare.named_parameters())
    return parameters, _pair_by_name("buffers", average.named_buffers(), bare.named_buffers())


def _pair_by_name(
    kind: str,
    averages: Iterable[Named],
    others: Iterable[Named],
) -> list[Pair]:
    own = dict(averages)
    sources = dict(others)
    for name in sorted(own.keys() ^ sources.keys()):
        reason = f"its {kind} are not the average's: only one of the two has {name!r}"
        raise ModelMismatchError("model", reason)
    pairs = []
    for name, tensor in own.items():
        source = sources[name]
        if source.shape != tensor.shape:
            shapes = f"{list(source.shape)} in the model, {list(tensor.shape)} in the average"
            raise ModelMismatchError(f"tensor {name!r}", f"has the shape {shapes}")
        pairs.append((tensor, source))
    return pairs


def is_averaged(tensor: Tensor) -> bool:
    """Tell floating-point and complex tensors from integers and booleans, which are copied."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_narrow(dtype: torch.dtype) -> bool:
    """Tell dtypes in which averages would stop moving: floating point of fewer than 32 bits."""
    return dtype.is_floating_point and torch.finfo(dtype).bits < 32


def average_(pairs: list[Pair], share: float = 1.0) -> None:
    """Set average + share (source - average); with a share of 1 copy, as tensors that are not
    `is_averaged` always."""
    copied = []
    averaged = []
    for average, source in pairs:
        if share == 1 or not is_averaged(average):
            copied.append((average, source))
        else:
            averaged.append((average, source.to(average)))
    if copied:
        averages, sources = zip(*copied, strict=True)
        torch._foreach_copy_(averages, sources)
    if averaged:
        averages, sources = zip(*averaged, strict=True)
        torch._foreach_lerp_(averages, sources, share)


# --- recipes that copy an average back into the model during training

Average = PostHocEMA | ExponentialMovingAverage | AveragedModel


class SwitchEMA:
    """Training that continues from its own average: Switch EMA (arXiv 2402.09240).

    The average takes in the model after every step. At the end of every epoch, or every
    `switch_every` steps, its parameters and buffers are copied into the model, in place, and
    training continues from there. The optimizer keeps its state. Use the average in the end.

    Arguments:
        average: a tracker, or any module with `module` and `update_parameters`. With a tracker that
            is attached to the optimizer, call only `switch`.
        switch_every: calls of `update` between switches; None to call `switch` yourself. With a
            tracker a multiple of its `update_every`, so that the average is up to date.
        sigma_rel: with a tracker, the target (such as a sigma_rel) to switch to.
    """

    _period = "switch_every"

    def __init__(
        self,
        average: Average,
        switch_every: int | None = None,
        sigma_rel: Wanted | None = None,
    ) -> None:
        if isinstance(average, PostHocEMA) != (sigma_rel is not None):
            raise InvalidValueError(
                "sigma_rel", "must be given with a PostHocEMA, such as 0.05, and only with one"
            )
        interval = average.settings.schedule.update_every if isinstance(average, PostHocEMA) else 1
        if switch_every is not None and check_count(self._period, switch_every) % interval:
            reason = f"must be a multiple of the tracker's update_every {interval}"
            raise InvalidValueError(self._period, reason, value=switch_every)
        self._average = average
        self._every = switch_every
        self._sigma_rel = sigma_rel
        self.step = 0

    def update(self, model: nn.Module) -> bool:
        """Average the model's weights; if it is due, copy the average into the model.

        Returns whether the model now has the averaged weights; it keeps its own while a tracker has
        no average yet.
        """
        average = self._average
        if isinstance(average, PostHocEMA):
            average.update_(model)
        else:
            average.update_parameters(model)
        self.step += 1
        if (
            self._every is None
            or self.step % self._every
            or not getattr(average, "has_average", True)
        ):
            return False
        self.switch(model)
        return True

    def switch(self, model: nn.Module) -> None:
        """Copy the averaged weights into the model now."""
        if isinstance(self._average, PostHocEMA):
            assert self._sigma_rel is not None
            self._average.load_into(model, self._sigma_rel)
        else:
            module = self._average.module
            weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            fill_in(check_weights(model, weights), weights)

    def state_dict(self) -> dict[str, int]:
        """Save the number of calls; the average and the optimizer have their own states."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting from a state."""
        self.step = state["step"]


class HareAndTortoise(SwitchEMA):
    """A fast learner that is reset to its own slow average: Hare & Tortoise (arXiv 2406.02596).

    The hare is the trained model; the tortoise is an average that takes in each of its steps. Every
    `reset_every` steps the hare gets the tortoise's weights and buffers, and the optimizer's state
    is cleared, so that no momenta of the old weights push the new ones. That keeps a network able
    to learn from changing data. Use the tortoise in the end. The authors' has a decay of 0.999 a
    step for images, and a reset every 10 epochs.

    Arguments and methods as in `SwitchEMA`, with `reset` for `switch`, and:
        optimizer: its state is cleared at a reset; None keeps the state.
    """

    _period = "reset_every"

    def __init__(
        self,
        tortoise: Average,
        reset_every: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        sigma_rel: Wanted | None = None,
    ) -> None:
        super().__init__(tortoise, reset_every, sigma_rel)
        if isinstance(optimizer, torch.optim.Adagrad):
            reason = "Adagrad cannot make a cleared state again"
            raise InvalidValueError("optimizer", reason, "leave it out, or use Adam")
        self._optimizer = optimizer

    def switch(self, model: nn.Module) -> None:
        """Copy the tortoise into the hare and clear the optimizer's state now."""
        super().switch(model)
        if self._optimizer is not None:
            self._optimizer.state.clear()

    reset = switch


# --- averages of activations

MODES = ("truncated", "window", "carried", "full")
_LONGEST_QUIET_GRAPH = 99  # values that mode "full" holds without a warning


class DifferentiableEMA(Wide):
    """An exponential moving average of tensors with a graph, for a loss on running statistics.

    The values x_i = f_i(w_i) are outputs of a graph, where w_i is what the leaf w (a parameter)
    held when x_i was made. The average is a_1 = x_1 and

        a_t = decay a_{t-1} + (1 - decay) x_t = sum_i c_i x_i,    c_i = (1 - decay) decay**(t-i),
        c_1 = decay**(t-1).

    The modes differ in what `backward` on a_t adds to w.grad, where g is the gradient at a_t:

    - "truncated": g^T (1 - decay) dx_t/dw, the newest value only, as batch statistics do. Constant
    memory.
    - "window": g^T sum_i c_i df_i/dw(w_i) over the last `window` values, exactly. Holds `window`
    graphs.
    - "full": the same over all values, for checks. Graph and time grow without end; it warns from
    the 100th value on.
    - "carried": the same over all values without a graph.

    Kept graphs ("window", "full") serve more than one `backward`: call it with `retain_graph=True`.
    Optimizers change leaves in place, so make the values under `with ema.recording():`, which keeps
    copies of the leaves.

    "carried" averages the derivative, too: J_t = decay J_{t-1} + (1 - decay) dx_t/dw(w_t) with J_1
    = dx_1/dw, and `backward` adds g^T J_t. Pass the leaves with every value, `ema(x, leaves=[w])`;
    no other tensor gets a gradient. An update takes a backward pass, and memory of the size of the
    leaves, for each element of the average.

    Detach a value that is built from an earlier result: it brings that graph along in every mode
    but "carried". Eval mode returns the average without a graph and takes no value in. A state dict
    and a copy hold the average and the number of updates; graphs and J start empty, with the
    average so far as a constant.

    Arguments:
        shape, device, dtype: of the values; dtype is float32 or float64, also after `half()`.
        decay: in [0, 1).
        window: number of values kept in mode "window".

    Attributes:
        average: without a graph; zeros before the first value.
        num_updates: values taken in, an int64 tensor.
    """

    average: Tensor
    num_updates: Tensor
    _before: Tensor | None
    _kept: deque[Tensor]
    _leaves: tuple[Tensor, ...]
    _jacobians: list[Tensor]
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
        # others never move at a decay of 0.9999
        check_word("dtype", dtype, (torch.float32, torch.float64))
        check_word("mode", mode, MODES)
        if (window is not None) != (mode == "window"):
            raise InvalidValueError(
                "window", "the number of values to keep, must be given in mode 'window' only"
            )
        self.decay = check_decay(decay, "0.99 averages over about 100 values")
        self.mode = mode
        self._window = None if window is None else check_count("window", window)
        average = torch.zeros(shape, device=device, dtype=dtype)
        self.register_buffer("average", average)
        self.register_buffer("num_updates", torch.tensor(0, device=device))
        self._start_anew()

    def forward(
        self,
        value: Tensor,
        leaves: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Average a value and return the current average, with the graph that the mode defines.

        In mode "carried", `leaves` are the leaves that gradients shall reach, the same at every
        update.
        """
        actual = _describe(value)
        own = _describe(self.average)
        if actual != own:
            raise InvalidValueError("value", f"is {actual}; must be {own} as the average is")
        if not self.training:
            if not self._has_average:
                raise NotReadyError(
                    "DifferentiableEMA", "no value was taken in yet, and eval mode takes none in"
                )
            return self.average.clone()
        if self.mode == "carried":
            result = self._carry(value, leaves)
        elif leaves is not None:
            raise InvalidValueError(
                "leaves", "only mode 'carried' takes them; others follow the value's own graph"
            )
        elif self.mode == "truncated":
            result = self._next(self.average if self._has_average else None, value)
        else:
            result = self._recompute(value)
        self.average = result.detach().clone()  # the caller may change the result in place
        self.num_updates += 1
        self._has_average = True
        return result

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Make the graphs of values in this block so that they remain valid after the next
        optimizer step.

        They keep copies of the tensors that autograd saves. In modes "truncated" and "carried",
        which keep no graph, it does nothing. If hooks on saved tensors are nested, torch calls only
        the innermost.
        """
        hooks = saved_tensors_hooks(lambda saved: saved.detach().clone(), lambda kept: kept)
        with hooks if self.mode in ("window", "full") else nullcontext():
            yield

    def reset(self) -> None:
        """Forget everything: the next value is the first."""
        self.average = torch.zeros_like(self.average)
        self.num_updates.zero_()
        self._start_anew()

    def _next(self, average: Tensor | None, value: Tensor) -> Tensor:
        if average is None:
            return value.clone()
        return average * self.decay + value * (1 - self.decay)

    def _recompute(self, value: Tensor) -> Tensor:
        """Average the kept values with their graphs after `_before`, the average of all earlier
        ones without one."""
        if not self._kept:
            self._before = self.average if self._has_average else None
        elif len(self._kept) == self._window:
            oldest = self._kept.popleft()
            self._before = self._next(self._before, oldest).detach()
        # it may be a view of a parameter, which the optimizer changes
        self._kept.append(value.clone())
        if self.mode == "full" and len(self._kept) > _LONGEST_QUIET_GRAPH:
            log.warning(
                f"mode 'full' holds the graphs of {len(self._kept)} values, and one more with "
                f"each; use 'window' or 'carried' for training, or call reset()"
            )
        running = self._before
        for kept in self._kept:
            running = self._next(running, kept)
        assert running is not None
        return running

    def _carry(
        self,
        value: Tensor,
        leaves: Iterable[Tensor] | None,
    ) -> Tensor:
        """Average the value, and J: for each leaf a tensor of the shape [elements of the average,
        *leaf]."""
        chosen_leaves = self._check_leaves(leaves)
        if not value.requires_grad:
            raise InvalidValueError(
                "value", "has no graph to take the derivative from", "make it outside of no_grad"
            )
        if not self._leaves:
            _warn_of_unreached(value, chosen_leaves)
        average = self.average if self._has_average else None
        share = 1.0 if average is None else 1 - self.decay
        earlier = self._jacobians or [torch.zeros(())] * len(chosen_leaves)
        jacobians = []
        for gradients, old in zip(_derivatives(value, chosen_leaves), earlier, strict=True):
            jacobians.append(share * gradients + self.decay * old)
        self._leaves = chosen_leaves
        self._jacobians = jacobians
        result = self._next(average, value.detach())
        for leaf, jacobian in zip(chosen_leaves, jacobians, strict=True):
            # 0, with the derivative J with respect to the leaf
            zero = (leaf - leaf.detach()).to(jacobian)
            nothing = torch.tensordot(jacobian, zero, dims=leaf.dim())
            result = result + nothing.view_as(result)
        return result

    def _check_leaves(
        self,
        leaves: Iterable[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        chosen: tuple[Tensor, ...] = ()
        if leaves is not None and not isinstance(leaves, Tensor):
            chosen = tuple(leaves)
        ids = [*map(id, chosen)]
        is_same = not self._leaves or ids == [*map(id, self._leaves)]
        are_different = len({*ids}) == len(ids)
        if chosen and is_same and are_different and all(map(_is_trained_leaf, chosen)):
            return chosen
        reason = (
            "must be different leaves that require gradients, such as [w], and the same ones at "
            "every update in mode 'carried'"
        )
        raise InvalidValueError("leaves", reason, "call reset() to take others")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **_no_graphs()}  # which copies and pickles cannot hold

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._start_anew()

    def _start_anew(self) -> None:
        self.__dict__.update(_no_graphs())
        # read here, since every read waits for an accelerator
        self._has_average = int(self.num_updates) > 0


def _is_trained_leaf(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_leaf and leaf.requires_grad


def _warn_of_unreached(value: Tensor, leaves: Sequence[Tensor]) -> None:
    """Warn of leaves that the first value does not depend on. Later a module may be skipped at an
    update, which is no mistake."""
    reached = torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True)
    for number, gradient in enumerate(reached):
        if gradient is None:
            shape = list(leaves[number].shape)
            log.warning(
                f"the value does not depend on leaves[{number}] of the shape {shape}: it gets no "
                f"gradient; leave it out, or look for a detach()"
            )


def _derivatives(
    value: Tensor,
    leaves: Sequence[Tensor],
) -> list[Tensor]:
    """Differentiate by each leaf: shape [elements of the value, *leaf]."""
    elements = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
    gradients: list[list[Tensor]] = [[] for _ in leaves]
    for element in elements.view(-1, *value.shape):
        # the caller may use the graph
        row = torch.autograd.grad(
            value, leaves, element, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for gradient, own in zip(row, gradients, strict=True):
            own.append(gradient)
    return [torch.stack(rows).to(value.dtype) for rows in gradients]


def _no_graphs() -> dict[str, Any]:
    return {"_before": None, "_kept": deque(), "_leaves": (), "_jacobians": []}


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"


# --- statistics

_STATISTICS = ("mean_x", "mean_y", "cov_xx", "cov_yy", "cov_xy")


class EMAStats(Wide):
    """Exponential moving averages of the means and covariances of `x` and `y`, compatible with
    symm-learning's class.

    In train mode the first batch sets every statistic S = S_batch, and each later one updates

        S <- (1 - momentum) detach(S) + momentum S_batch,

    so that a loss on `cov_xy` and the others is differentiable in the newest batch, and no graph
    grows.

    Covariances of a batch of n rows are sums of (x - center_x)^T (y - center_y), divided by max(n -
    1, 1). The first batch is centred with its own mean, later ones with the detached running mean:
    its lag counts as covariance, and without lag the expected value is n / (n - 1) times the true
    one, as in symm-learning. With `center_with_running_mean=False` every batch is centred with its
    own mean, which is unbiased (one row adds 0).

    Statistics are float32, or float64 after `double()`, also for half-precision batches, under
    autocast and after `half()`. The output is the input; x has the shape [n, dim_x], y [n, dim_y].

    Arguments:
        dim_x, dim_y: columns of x and y; without `dim_y`, y has as many as x and may be left out.
        momentum: share of the newest batch, in (0, 1].
        eps: variance added where `correlation` divides; at least 0.

    Attributes:
        num_features_x, num_features_y: dim_x and dim_y.
        mean_x, mean_y: [dim_x], [dim_y]; 0 before the first batch.
        cov_xx, cov_yy, cov_xy: [dim_x, dim_x], [dim_y, dim_y], [dim_x, dim_y]; 1, 1 and 0 before
            the first batch.
        num_batches_tracked: batches so far, a tensor of int64. The last six are buffers, in the
        state dict; a state of symm-learning's class (`running_mean_x`, ...) loads too.
    """

    mean_x: Tensor
    mean_y: Tensor
    cov_xx: Tensor
    cov_yy: Tensor
    cov_xy: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        dim_x: int,
        dim_y: int | None = None,
        momentum: float = 0.1,
        eps: float = 1e-6,
        center_with_running_mean: bool = True,
    ) -> None:
        super().__init__()
        self.num_features_x = check_count("dim_x", dim_x)
        self.num_features_y = self.num_features_x
        if dim_y is not None:
            self.num_features_y = check_count("dim_y", dim_y)
        self.momentum = check_number("momentum", momentum, lambda m: 0 < m <= 1, "lie in (0, 1]")
        self.eps = check_number("eps", eps, lambda e: 0 <= e < math.inf, "be finite and at least 0")
        self.center_with_running_mean = center_with_running_mean
        self._y_may_be_x = dim_y is None
        dtype = torch.get_default_dtype()
        if is_narrow(dtype):
            dtype = torch.float32
        for name in (*_STATISTICS, "num_batches_tracked"):
            self.register_buffer(name, torch.zeros((), dtype=dtype))
        self.reset()

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Update the statistics in train mode; return the batch unchanged, `(x, x)` without y."""
        if y is None:
            y = x if self._y_may_be_x else x.new_empty(0)
        own = self.cov_xx.dtype
        rows = len(x) if x.dim() else 0
        self._check("x", x, (rows, self.num_features_x))
        self._check("y", y, (rows, self.num_features_y))
        if self.training:
            kind = x.device.type
            precise: AbstractContextManager[Any] = nullcontext()
            if torch.amp.is_autocast_available(kind):
                # autocast would multiply the centred batch in half precision
                precise = torch.autocast(kind, enabled=False)
            with precise:
                self._update(x.to(own), y.to(own))
        return x, y

    def _check(
        self,
        name: str,
        batch: Tensor,
        shape: tuple[int, int],
    ) -> None:
        own = self.cov_xx.dtype
        rows, dim = shape
        is_wide = True
        if batch.is_floating_point():
            is_wide = torch.finfo(batch.dtype).bits > torch.finfo(own).bits
        if rows and batch.shape == shape and not is_wide:
            return
        reason = (
            f"is {batch.dtype} of shape {list(batch.shape)}; must be floating-point, no wider than "
            f"the {own} of the statistics, and of shape [n, {dim}], n at least 1 and the same for "
            f"x and y"
        )
        raise InvalidValueError(name, reason, "double() makes the statistics float64")

    def correlation(self) -> Tensor:
        """Compute Pearson correlations of x and y, [dim_x, dim_y]: cov_xy / sqrt((var_x + eps)
        (var_y + eps)).

        A constant column has correlation 0. The result is differentiable like the statistics.
        """
        if int(self.num_batches_tracked) == 0:
            raise NotReadyError(
                "correlation", "no batch was tracked yet", "call the module in train mode first"
            )
        variances_x = self.cov_xx.diagonal() + self.eps
        variances_y = self.cov_yy.diagonal() + self.eps
        return self.cov_xy * torch.outer(variances_x.rsqrt(), variances_y.rsqrt())

    def reset(self) -> None:
        x = self.num_features_x
        y = self.num_features_y
        like = self.cov_xx
        empty = [
            torch.zeros(x),
            torch.zeros(y),
            torch.eye(x),
            torch.eye(y),
            torch.zeros(x, y),
        ]
        for name, value in zip(_STATISTICS, empty, strict=True):
            setattr(self, name, value.to(like.device, like.dtype))
        self.num_batches_tracked = torch.tensor(0, device=like.device)

    def _update(self, x: Tensor, y: Tensor) -> None:
        # on the device: reading the number would wait for a GPU at every batch
        first = self.num_batches_tracked == 0
        means = x.mean(dim=0), y.mean(dim=0)
        own = first if self.center_with_running_mean else torch.ones_like(first)
        x = x - torch.where(own, means[0], self.mean_x.detach())
        y = y - torch.where(own, means[1], self.mean_y.detach())
        products = x.mT @ x, y.mT @ y, x.mT @ y
        degrees = max(1, len(x) - 1)
        covariances = [product / degrees for product in products]
        for name, batch in zip(_STATISTICS, (*means, *covariances), strict=True):
            earlier = getattr(self, name).detach()
            average = (1 - self.momentum) * earlier + self.momentum * batch
            setattr(self, name, torch.where(first, batch, average))
        self.num_batches_tracked = self.num_batches_tracked + 1

    def __getstate__(self) -> dict[str, Any]:
        # copies cannot hold a graph
        buffers = {name: value.detach() for name, value in self.named_buffers()}
        return {**self.__dict__, "_buffers": buffers}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *rest: Any,
    ) -> None:
        for name in _STATISTICS:
            if f"{prefix}running_{name}" in state_dict:  # symm-learning's names
                state_dict[prefix + name] = state_dict.pop(f"{prefix}running_{name}")
        # Values are loaded in place, which must not change tensors of a graph or of a saved state.
        for name, value in dict(self.named_buffers()).items():
            setattr(self, name, value.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)
