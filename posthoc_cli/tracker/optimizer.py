"""Updates after every step of an optimizer, by a step post-hook."""

from __future__ import annotations

import atexit
import inspect
import logging
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.tracker.model_tensors import unwrapped
from posthoc_cli.tracker.state import Settings

log = logging.getLogger(__name__)
_BY_HAND = "leave attach out, and call ema.update_(model) after each step that was taken"


class Tracker(Protocol):
    """What an attachment needs of a tracker."""

    checkpoint_dir: Path
    settings: Settings

    @property
    def step(self) -> int: ...  # noqa: D102

    def update_(self, model: torch.nn.Module, t: float | None = None) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class Attachment:
    """A tracker's attachment to one optimizer, until `remove`.

    A step counts when it has changed the parameters: not one that a GradScaler skips, nor one that only makes the
    optimizer's state for a checkpoint; and once however often it calls its closure. An error of the update leaves
    `optimizer.step()` after the parameters have been changed.

    Steps that other optimizers make with the same parameters instead are counted, too, for a warning: an optimizer that
    was replaced would stop the tracker in silence. Several optimizers that step in turns are no reason for one.

    The model is held weakly; `t` gives the training time, None for steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        tracker: Tracker,
        model: weakref.ref[torch.nn.Module],
        t: Callable[[], float] | None = None,
    ) -> None:
        self.tracker = tracker
        self._optimizer = weakref.ref(optimizer)
        self._model = model
        self._t = t
        self._is_updating = False
        self._has_stepped, self._warned = False, False
        self._missed, self._usually_missed = 0, 0  # steps of others since the last own one, and most before one
        # Where the step is compiled, files and counters must not be traced.
        hook = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._handle = optimizer.register_step_post_hook(hook)
        _attachments.add(self)
        _watch_all_steps()

    def remove(self) -> None:
        """Detach. Nothing happens the second time."""
        self._handle.remove()
        _attachments.discard(self)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The one that this is still attached to."""
        return self._optimizer() if self in _attachments else None

    def check_caller(self) -> None:
        """Raise a NotReadyError if the user calls `update_` himself: each step would be counted twice."""
        self._missed = 0  # also where the user goes on by hand
        if self.optimizer is not None and not self._is_updating:
            reason = "this tracker is attached to an optimizer and is updated by its steps"
            raise NotReadyError("update_", reason, "leave out either this call or attach(), or detach() first")

    def is_of(self, model: weakref.ref[torch.nn.Module]) -> bool:
        """Whether this is for a model, in any wrappers."""
        own, other = self._model(), model()
        return own is not None and other is not None and unwrapped(own) is unwrapped(other)

    def check_steps(self) -> None:
        """Warn, once, if other optimizers have gone on with the training without the one that this is attached to."""
        own = self.optimizer
        # In the middle of an iteration, or of the first one, others may have made some steps more.
        if self not in _attachments or self._warned or self._missed <= 2 * self._usually_missed + 1:
            return
        self._warned = True
        what = "is gone" if own is None else "stands still"
        log.warning(
            "%s: the averages stand at step %d: the optimizer that the tracker is attached to %s, and %d "
            "later steps of another one were not counted; when an optimizer is replaced, say "
            "%sema.attach(new_optimizer), or call ema.update_(model) after each step",
            self.tracker.checkpoint_dir, self.tracker.step, what, self._missed, "" if own is None else "ema.detach(), ",
        )  # fmt: skip

    def see_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count a step of any optimizer that the attached one should have made: with the same parameters.

        Until that has stepped, and when it is gone, any parameter of the model will do; when it is gone, there is no
        need to wait for a query.
        """
        own, model = self.optimizer, self._model()
        if optimizer is own or model is None:
            return
        trained = _parameters(own) if own is not None and self._has_stepped else {*map(id, model.parameters())}
        if trained.isdisjoint(_parameters(optimizer)) or not _has_changed_weights(optimizer):
            return
        self._missed += 1
        if own is None:
            self.check_steps()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        try:
            if _has_changed_weights(optimizer):
                model = self._model()
                if model is None:
                    raise NotReadyError("attach", "the model that this tracker was made with is gone")
                self._has_stepped, self._usually_missed = True, max(self._usually_missed, self._missed)
                self._is_updating = True
                self.tracker.update_(model, None if self._t is None else self._t())
        except BaseException:
            # If a step raises, a GradScaler leaves these there, and multiplies the next scale.
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
            raise
        finally:
            self._is_updating = False


_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


@cache
def _watch_all_steps() -> None:
    """From the first attachment on: a hook that came and went would change torch's hooks while torch calls them."""
    register_optimizer_step_post_hook(_after_any_step)
    atexit.register(_check_all)


def _after_any_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling():  # nothing of this must be traced
        return
    for one in [*_attachments]:
        one.see_step(optimizer)


def _check_all() -> None:
    """Warn at the end of the process, too, where nobody has closed the tracker."""
    for one in [*_attachments]:
        one.check_steps()


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def attach(
    tracker: Tracker,
    optimizer: object,
    model: weakref.ref[torch.nn.Module] | None,
    t: Callable[[], float] | None,
    before: Attachment | None,
) -> Attachment:
    """Attach a tracker to an optimizer in place of `before`; closes other trackers that are attached for its model."""
    unit = tracker.settings.t_unit
    if not callable(t) and (t is not None or unit != "steps"):
        reason = f"t {t!r}: must be a function that gives the training time in {unit}"
        raise InvalidValueError("attach", reason, "such as attach(optimizer, t=lambda: seen)")
    if model is None:
        reason = "this tracker was made without a model"
        raise InvalidValueError("attach", reason, "give it to from_model or from_path")
    stepping = _stepping_optimizer(optimizer)
    attached = None if before is None else before.optimizer
    if attached is not None and attached is not stepping:
        reason = f"this tracker is attached to another optimizer ({type(attached).__name__})"
        hint = "of several that train one model, attach to the one that steps last in an iteration, or detach() first"
        raise InvalidValueError("attach", reason, hint)
    for other in [*_attachments]:
        if other.optimizer is stepping and other.tracker is not tracker and other.is_of(model):
            log.warning(
                "attach: the tracker of %s was attached to this optimizer for the same model; it is closed, and "
                "the one of %s replaces it",
                other.tracker.checkpoint_dir, tracker.checkpoint_dir,
            )  # fmt: skip
            other.tracker.close()
    if before is not None:
        before.remove()
    return Attachment(stepping, tracker, model, t)


def _stepping_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer that makes the steps and calls its hooks: itself, or the one that accelerate has wrapped."""
    # Who does not use accelerate has not imported it.
    accelerated = getattr(sys.modules.get("accelerate.optimizer"), "AcceleratedOptimizer", ())
    while isinstance(optimizer, accelerated):
        optimizer = optimizer.optimizer
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.Optimizer) and _has_hooks(optimizer):
        # Of a class that torch has put its hooks around, `unwrap` gives the step as it was written.
        steps = {inspect.unwrap(vars(base)["step"]) for base in type(optimizer).__mro__ if "step" in vars(base)}
        if len(steps) > 2:  # with that of torch.optim.Optimizer
            reason = f"{kind} overrides a step, and torch calls the hooks of both where one calls the other"
            raise InvalidValueError("attach", reason, _BY_HAND)
        if "grad_scaler" in inspect.signature(optimizer.step).parameters:
            raise InvalidValueError("attach", f"{kind} takes the GradScaler, and may skip a step unseen", _BY_HAND)
        return optimizer
    is_scheduler = isinstance(optimizer, torch.optim.lr_scheduler.LRScheduler)
    if isinstance(optimizer, torch.optim.Optimizer) or (hasattr(optimizer, "optimizer") and not is_scheduler):
        reason = f"{kind} is a wrapper around an optimizer, which may make other steps than the training"
        raise InvalidValueError("attach", reason, _BY_HAND)
    raise InvalidValueError("attach", f"must be given a torch.optim.Optimizer, not {kind}")


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's own constructor has made it, and not only one of a wrapper around another optimizer."""
    # Not `hasattr`: wrappers may hand on the attributes of what they wrap, as also a hook that is registered.
    if not {"defaults", "state", "param_groups"} <= vars(optimizer).keys():
        return False
    try:
        hook = optimizer.register_step_post_hook(lambda *_: None)
    except AttributeError:
        return False
    hook.remove()
    own = hook.hooks_dict_ref()
    return any(held is own for held in vars(optimizer).values())


def _has_changed_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that ends now counts.

    A GradScaler that finds infinities in gradients does not call most optimizers. Those that do the scaling themselves
    (`fused=True`) it does, with the attribute `found_inf`, and they leave the parameters as they were.

    Where an optimizer has no state yet, torch.distributed.checkpoint.state_dict makes a step with rates and gradients
    of 0; plain SGD never has one. The first step of a warm-up may have a rate of 0, too, but its gradients are not 0.
    """
    if getattr(optimizer, "found_inf", None):
        return False
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    # torch puts its 0 on the CPU. To look at a rate on a device would wait for it, at every step.
    if not all((not isinstance(rate, torch.Tensor) or rate.device.type == "cpu") and bool(rate == 0) for rate in rates):
        return True
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return any(one.layout != torch.strided or bool(one.any()) for one in gradients if one is not None)
