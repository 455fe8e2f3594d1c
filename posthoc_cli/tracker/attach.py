"""The steps that optimizers take: those after which an attached tracker updates, and whether one
was not counted.

A GradScaler calls a fused optimizer also where it finds infinities, with the attribute `found_inf`,
1 for a step that changes nothing. Reading it waits for the accelerator: it is passed on, and read
when an update may be due, or when somebody asks."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo as not_compiled
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.tracker.clock import TrainingProgress

Update = Callable[[float | None, Tensor | None], None]
"""Counts a step at a time, unless a tensor says that it was skipped."""


class Attachment:
    """A tracker's attachment to one optimizer, until `remove`.

    A step counts when it has changed the parameters: not one that a GradScaler skips, nor one that
    only makes the optimizer's state for a checkpoint; and once, however often it calls its closure.
    `optimizer.step()` raises an error of the update after it has changed the parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        update: Update,
        t: Callable[[], float] | None,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._update: Update | None = update  # while attached
        self._t = t
        # A compiled step must not trace file operations and counters.
        hook = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._handle = optimizer.register_step_post_hook(hook)

    def remove(self) -> None:
        """Detach the tracker. A second call does nothing."""
        self._handle.remove()
        self._update = None  # which holds the tracker

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, or None once the tracker is detached or the optimizer no longer exists."""
        return None if self._update is None else self._optimizer()

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        try:
            if self._update is not None and changes_weights(optimizer):
                time = None if self._t is None else self._t()
                self._update(time, getattr(optimizer, "found_inf", None))
        except BaseException:
            # If a step raises, a GradScaler leaves these attributes set, and would multiply the
            # next scale by them.
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
            raise


def stepping_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer that takes the steps, such as the one inside accelerate's, whose hooks
    see every step exactly once; else raise an InvalidValueError."""
    # A program that has not imported accelerate holds none of its optimizers.
    accelerated = getattr(sys.modules.get("accelerate.optimizer"), "AcceleratedOptimizer", ())
    while isinstance(optimizer, accelerated):
        optimizer = optimizer.optimizer
    if reason := _refusal(optimizer):
        hint = "leave attach out, and call ema.update_(model) after each step that was taken"
        raise InvalidValueError("attach", reason, hint)
    checked: Optimizer = optimizer
    return checked


def _refusal(optimizer: Any) -> str:
    """Say why hooks of an optimizer do not see every step exactly once; "" if they do."""
    kind = type(optimizer)
    if isinstance(optimizer, Optimizer):
        # Not `hasattr`: a wrapper may forward attributes, and the registration of hooks, to the
        # optimizer it wraps.
        wraps = "_optimizer_step_post_hooks" not in vars(optimizer)
    else:
        wraps = hasattr(optimizer, "optimizer") and not isinstance(
            optimizer, torch.optim.lr_scheduler.LRScheduler
        )
        if not wraps:
            return f"must be given a torch.optim.Optimizer, not {kind.__name__}"
    # torch wraps the `step` of a class in its hooks; `unwrap` returns the method as it was written.
    steps = set()
    for base in kind.__mro__:
        if "step" in vars(base):
            steps.add(inspect.unwrap(vars(base)["step"]))
    if wraps:
        return f"{kind.__name__} wraps an optimizer, whose steps it may skip"
    if len(steps) > 2:  # with that of torch.optim.Optimizer
        return (
            f"{kind.__name__} overrides a step, and torch calls the hooks of both where one "
            f"calls the other"
        )
    if "grad_scaler" in inspect.signature(optimizer.step).parameters:
        return f"{kind.__name__} takes the GradScaler, and may skip a step unnoticed"
    return ""


def changes_weights(optimizer: Optimizer) -> bool:
    """Return whether the step that ends or begins now counts, unless a GradScaler skips it: see
    `Attachment`.

    An optimizer's state is made by a step with rates and gradients of 0; the first step of a
    warm-up may have a rate of 0, too. Some optimizers have no rates.
    """
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    # torch's 0 is on the CPU. Reading a rate on an accelerator would synchronise with it at every
    # step.
    if not all(
        (not isinstance(rate, Tensor) or rate.device.type == "cpu") and bool(rate == 0)
        for rate in rates
    ):
        return True
    gradients = [
        parameter.grad for group in optimizer.param_groups for parameter in group["params"]
    ]
    kept = [grad for grad in gradients if grad is not None]
    if not kept:  # an optimizer may free them in its step
        return not rates
    return any(grad.layout != torch.strided or bool(grad.any()) for grad in kept)


# --- steps that nobody counts


class LastCount:
    """The last counted call of a run.

    It is kept as long as the model: a tracker that takes an earlier one's place in the same
    process, as where a notebook's cell runs again, continues from that step.
    """

    def __init__(self) -> None:
        self.run_id = ""
        self.progress = TrainingProgress()  # another object after each call
        self._parameters = frozenset[int]()  # the ids of the model's
        self._optimizers: WeakKeyDictionary[Optimizer, _Stepping] = WeakKeyDictionary()
        self._stepping = list[_Stepping]()  # of the model's, also if an optimizer is gone

    @property
    def steps(self) -> int:
        """The most steps that an optimizer has taken since. After a single one a call may be about
        to come."""
        return max((own.steps_after(self.progress) for own in self._stepping), default=0)

    def watch(self, model: nn.Module) -> None:
        """Look at the steps that are taken of a model's parameters from now on."""
        self._parameters = frozenset(map(id, model.parameters()))
        self._optimizers.clear()
        self._stepping.clear()
        _watching.add(self)

    def begin_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Note that an optimizer is about to step; a closure may compute gradients."""
        known = self._optimizers.setdefault(optimizer, _Stepping())
        if not changes_weights(optimizer):
            return
        # a step may be of other parts of the network, or of a phase in which the model is frozen
        if any(has_closure or parameter.grad is not None for parameter in self._own(optimizer)):
            if known not in self._stepping:
                self._stepping.append(known)
            known.add(self.progress, getattr(optimizer, "found_inf", None))

    def _own(self, optimizer: Optimizer) -> Iterator[Tensor]:
        """Yield those of an optimizer's parameters that are the model's."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._parameters:
                    yield parameter


class _Stepping:
    """The last steps of an optimizer after one counted call."""

    def __init__(self) -> None:
        self._call: TrainingProgress | None = None
        # 1 for a step that a GradScaler has skipped, of which few follow each other; None if it may
        # skip none
        self._found_inf: deque[Tensor | None] = deque(maxlen=8)

    def add(self, call: TrainingProgress, found_inf: Tensor | None) -> None:
        if self._call is not call:
            self._found_inf.clear()
        self._call = call
        self._found_inf.append(found_inf)

    def steps_after(self, call: TrainingProgress) -> int:
        """Return the number of steps that changed the weights."""
        if self._call is not call:
            return 0
        return sum(found_inf is None or not bool(found_inf) for found_inf in self._found_inf)


last_counts: WeakKeyDictionary[nn.Module, dict[Path, LastCount]] = WeakKeyDictionary()
"""By the bare model and the directory."""

_watching: WeakSet[LastCount] = WeakSet()


@not_compiled
def _before_step(
    optimizer: Optimizer,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Let those that watch know of a step: before it, since a hook after it may count it."""
    has_closure = len(arguments) > 1 or bool(options)  # after the optimizer itself
    for last in [*_watching]:
        last.begin_step(optimizer, has_closure)


register_optimizer_step_pre_hook(_before_step)
