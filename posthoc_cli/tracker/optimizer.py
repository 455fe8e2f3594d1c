"""A tracker that follows an optimizer by itself."""

from __future__ import annotations

import logging
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.tracker.names import unwrapped
from posthoc_cli.tracker.settings import Settings

log = logging.getLogger(__name__)

_followers: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakSet[Attachable]] = weakref.WeakKeyDictionary()
"""The trackers that were attached to an optimizer."""

_HOOKED_STEP = torch.optim.Optimizer.profile_hook_step(torch.optim.Optimizer.step).__code__
"""What runs around `step` of every optimizer and calls its hooks."""


class Attachment:
    """One optimizer that a tracker follows, until `remove`.

    A step counts when it has changed the parameters: not one that a GradScaler skips, nor one that only makes the
    optimizer's state for a checkpoint; and once however often it calls its closure, or `step` of the class that its
    own derives from. An error of the update leaves `optimizer.step()` after the parameters have been changed.

    Arguments:
        optimizer: the one to follow, which makes the steps itself.
        model: what is updated with; held weakly.
        update: called with the model and the time of the step.
        t: gives the training time; None for steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: weakref.ref[torch.nn.Module],
        update: Callable[[torch.nn.Module, float | None], object],
        t: Callable[[], float] | None = None,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._model = model
        self._update = update
        self._t = t
        self._is_updating = False
        # Where the step is compiled, files and counters are no part of that.
        hook = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._handles = [optimizer.register_step_post_hook(hook)]

    def remove(self) -> None:
        """Follow the optimizer no longer. Nothing happens the second time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check_alone(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise an InvalidValueError where another optimizer than `optimizer` is followed."""
        followed = self._optimizer()
        if self._handles and followed is not None and followed is not optimizer:
            raise InvalidValueError(
                "attach",
                f"this tracker follows another optimizer ({type(followed).__name__}); of several that train "
                "one model, attach to the one that steps last in an iteration, or detach() first to change",
            )

    def follows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer's steps are counted now."""
        return bool(self._handles) and self._optimizer() is optimizer

    def check_caller(self) -> None:
        """Raise a NotReadyError where `update_` is called by somebody else: each step would be counted twice."""
        if self._handles and self._optimizer() is not None and not self._is_updating:
            raise NotReadyError(
                "update_",
                "this tracker follows an optimizer and is updated by its steps",
                "leave out either this call or attach(), or detach() first",
            )

    def _after_step(self, optimizer: torch.optim.Optimizer, _: object, keywords: Mapping[str, Any]) -> None:
        if _is_within_another(optimizer):
            return
        try:
            if not (_was_skipped(optimizer, keywords) or _only_made_state(optimizer)):
                self._follow()
        except BaseException:
            _forget_scale(optimizer)
            raise

    def _follow(self) -> None:
        model = self._model()
        if model is None:
            raise NotReadyError("attach", "the model that this tracker was made with is gone")
        self._is_updating = True
        try:
            self._update(model, None if self._t is None else self._t())
        finally:
            self._is_updating = False


class Attachable(ABC):
    """A tracker that can follow an optimizer; see `PostHocEMA`."""

    checkpoint_dir: Path
    settings: Settings
    _model: weakref.ref[torch.nn.Module] | None
    _attachment: Attachment | None = None

    @abstractmethod
    def close(self) -> None:
        """Finish, and follow no optimizer any more."""

    @abstractmethod
    def update_(self, model: torch.nn.Module, t: float | None = None) -> None:
        """Take in a step of the model."""

    def attach(self, optimizer: torch.optim.Optimizer, t: Callable[[], float] | None = None) -> Attachment:
        """Call `update_` after every step of `optimizer`, with the model that this tracker was made with.

        A step that a GradScaler skips does not count. What `update_` raises, `optimizer.step()` then does. Attaching
        to the same optimizer again changes nothing but `t`. Another tracker that follows the optimizer for the same
        model is closed, with a warning: where a notebook's cell runs again, nothing else can close the tracker of its
        last run. To have two of one model, call `update_` of one of them by hand.

        Arguments:
            optimizer: the one that trains the model; of several, the one that steps last in an iteration. It may be
                accelerate's `AcceleratedOptimizer`; another wrapper may make steps that are none of the training's.
            t: gives the training time on a clock of your own, such as `lambda: images_seen`; None for steps.

        Returns:
            A handle whose `remove()` undoes it, as `detach()` does.

        Raises:
            InvalidValueError: not an optimizer, a second one, no model to follow, or no `t` for this run's clock.
            others: what closing the other tracker raises. This one is not attached then; the next try will be.
        """
        if t is not None and not callable(t):
            raise InvalidValueError("attach", f"t {t!r}: must be a function that gives the training time, or None")
        if t is None and self.settings.t_unit != "steps":
            raise InvalidValueError(
                "attach", f"this run counts {self.settings.t_unit}", "give it the clock: attach(optimizer, t=function)"
            )
        if self._model is None:
            raise InvalidValueError(
                "attach", "this tracker was made without a model", "give it to from_model or from_path"
            )
        stepping = _stepping(optimizer)
        if self._attachment is not None:
            self._attachment.check_alone(stepping)
        self._close_predecessors(stepping)
        self.detach()
        self._attachment = Attachment(stepping, self._model, self.update_, t)
        _followers.setdefault(stepping, weakref.WeakSet()).add(self)
        return self._attachment

    def detach(self) -> None:
        """Follow no optimizer any more. Nothing happens where none was attached."""
        if self._attachment is not None:
            self._attachment.remove()

    def _close_predecessors(self, optimizer: torch.optim.Optimizer) -> None:
        """Close other trackers that follow an optimizer for this one's model."""
        for other in [*_followers.get(optimizer, ())]:
            if other is self or other._attachment is None or not other._attachment.follows(optimizer):
                continue
            if _same_model(other._model, self._model):
                log.warning(
                    "attach: the tracker of %s followed this optimizer for the same model; it is closed, and that of "
                    "%s follows in its place",
                    other.checkpoint_dir,
                    self.checkpoint_dir,
                )
                other.close()

    def _check_caller(self) -> None:
        if self._attachment is not None:
            self._attachment.check_caller()


def _stepping(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer that makes the steps and calls its hooks: itself, or what accelerate has wrapped.

    Raises:
        InvalidValueError: it is none; says what to do with it.
    """
    # Who does not use accelerate has not imported it.
    accelerated = getattr(sys.modules.get("accelerate.optimizer"), "AcceleratedOptimizer", ())
    while isinstance(optimizer, accelerated):
        optimizer = optimizer.optimizer
    kind = type(optimizer).__name__
    # Not `hasattr`: wrappers may hand on what they wrap.
    if isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_post_hooks" in vars(optimizer):
        return optimizer
    if isinstance(optimizer, torch.optim.lr_scheduler.LRScheduler):
        raise InvalidValueError(
            "attach", f"{kind} is a scheduler of learning rates; attach to the optimizer that it has"
        )
    if isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        raise InvalidValueError(
            "attach",
            f"{kind} is a wrapper around an optimizer, which may make other steps than the training",
            "leave attach out, and call ema.update_(model) after each step that was taken",
        )
    raise InvalidValueError("attach", f"must be given a torch.optim.Optimizer, not {kind}")


def _same_model(one: weakref.ref[torch.nn.Module] | None, other: weakref.ref[torch.nn.Module] | None) -> bool:
    """Whether both are one model, in whatever wrappers."""
    models = [None if model is None else model() for model in (one, other)]
    bare = [model if model is None else unwrapped(model) for model in models]
    return bare[0] is not None and bare[0] is bare[1]


def _is_within_another(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that has just ended is a part of another one of the same optimizer.

    A `step` that calls the one it overrides has its hooks called at the end of both. Who is at work is asked of the
    stack: a count of steps begun and ended would be wrong for good after the first step that raises.
    """
    calls = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None and calls < 2:
        if frame.f_code is _HOOKED_STEP and any(one is optimizer for one in frame.f_locals.get("args", ())):
            calls += 1
        frame = frame.f_back
    return calls > 1


def _was_skipped(optimizer: torch.optim.Optimizer, keywords: Mapping[str, Any]) -> bool:
    """Whether a GradScaler's step has left the parameters as they were, for infinities in their gradients.

    Of most optimizers it then calls no step at all. Those that do the scaling themselves (`fused=True`) are called,
    with the attribute `found_inf`; some of other libraries get the scaler itself instead.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is not None:
        return bool(found)
    scaler = keywords.get("grad_scaler")
    if scaler is None:
        return False
    return any(bool(found) for found in scaler._found_inf_per_device(optimizer).values())


def _only_made_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step had no other purpose than to make the optimizer's state: rates of 0, and gradients of 0.

    `get_optimizer_state_dict` and `set_state_dict` of torch.distributed.checkpoint.state_dict make such a step where an
    optimizer has no state yet; plain SGD never has one. The first step of a warm-up may have a rate of 0, too, but
    its gradients are not 0.
    """
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    if not all(map(_is_zero, rates)):
        return False
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return not any(
        gradient.layout != torch.strided or bool(gradient.any()) for gradient in gradients if gradient is not None
    )


def _is_zero(rate: float | torch.Tensor) -> bool:
    if isinstance(rate, torch.Tensor) and rate.device.type != "cpu":
        return False  # torch puts its 0 on the CPU; to look at this one would wait for the device, at every step
    return bool(rate == 0)


def _forget_scale(optimizer: torch.optim.Optimizer) -> None:
    """Take the attributes away that a GradScaler gives an optimizer for one step.

    It does so itself when `step` returns, but not when it raises, and would multiply the next scale by a left one.
    """
    if getattr(optimizer, "found_inf", None) is not None:
        for name in ("grad_scale", "found_inf"):
            if hasattr(optimizer, name):
                delattr(optimizer, name)
