"""Recipes that train with an average: it is copied back into the model now and then.

Both work over a `PostHocEMA` tracker and over any module that holds an averaged copy of a model and is told of every
step by `update_parameters`, such as `torch.optim.swa_utils.AveragedModel`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Protocol

import torch

from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.profiles import Profile
from posthoc_cli.targets import Target
from posthoc_cli.tracker import PostHocEMA
from posthoc_cli.tracker.model_weights import load_weights


class AveragedModule(Protocol):
    """A module with an average of a model's weights in it."""

    @property
    def module(self) -> torch.nn.Module:
        """The model with averaged weights."""
        ...

    def update_parameters(self, model: torch.nn.Module) -> None:
        """Take in the model's weights as they are now."""
        ...


class _CopiedBack:
    """What the recipes share: an average that takes in every step, and a count of the steps.

    Attributes:
        step: calls of `update` so far.
    """

    def __init__(self, average: _Average, every: int | None) -> None:
        self._average = average
        self._every = every
        self.step = 0

    def update(self, model: torch.nn.Module) -> bool:
        """Tell the average that the model has made a step, and copy it into the model where that is due.

        Returns:
            Whether the model now has the averaged weights. Where that is due and a tracker has no average yet
            (`update_after_step`), it keeps its own.
        """
        self._average.update(model)
        self.step += 1
        if self._every is None or self.step % self._every:
            return False
        try:
            self._copy_into(model)
        except NotReadyError:
            return False
        return True

    def state_dict(self) -> dict[str, int]:
        """The number of calls; average and optimizer have states of their own."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting from a state."""
        self.step = state["step"]

    def _copy_into(self, model: torch.nn.Module) -> None:
        self._average.copy_into(model)


class SwitchEMA(_CopiedBack):
    """Training that goes on from its own average: Switch EMA (arXiv 2402.09240).

    The average takes in the model after every step; at the end of every epoch, or each `switch_every` steps, the
    averaged weights are copied into the model, from where training goes on. The optimizer keeps its state, and the
    average itself is not touched: it goes on over weights that jump at the switches. In the end take the average, as
    without switches.

    Copied are, in place, the parameters that are averaged and the buffers that the average has. `update` calls a
    tracker's `update_`; where the tracker is attached to the optimizer, call `switch` alone. A tracker's snapshots and
    its averages of other lengths stay what they are: averages of the weights that the model really had.

    Arguments:
        average: a `PostHocEMA`, or a module with `module` and `update_parameters`.
        switch_every: steps between switches, counted in calls of `update`; None leaves it to you to call `switch`, such
            as at the end of an epoch. With a tracker a multiple of its `update_every`, so that the average is that of
            the moment.
        sigma_rel: with a tracker, the length of the average to switch to, or any other target that it takes.

    Attributes:
        step: calls of `update` so far.

    Raises:
        InvalidValueError: (a ValueError) naming the argument and what would be accepted.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        >>> recipe = SwitchEMA(average, switch_every=2)
        >>> for weight in (1.0, 3.0):  # stands for two steps of an optimizer
        ...     _ = torch.nn.init.constant_(model.weight, weight)
        ...     print(recipe.update(model), model.weight.item())
        False 1.0
        True 2.0
    """

    def __init__(
        self,
        average: PostHocEMA | AveragedModule,
        switch_every: int | None = None,
        sigma_rel: float | Target | Profile | None = None,
    ) -> None:
        known = _as_average("average", average, sigma_rel)
        super().__init__(known, _check_every("switch_every", switch_every, known.update_every))

    def switch(self, model: torch.nn.Module) -> None:
        """Copy the averaged weights into the model now.

        Raises:
            NotReadyError: there is no average yet.
            ModelMismatchError: the model has no such tensor, or of another shape; nothing is changed.
        """
        self._copy_into(model)


class HareAndTortoise(_CopiedBack):
    """A fast learner that is set back to its own slow average: Hare & Tortoise (arXiv 2406.02596).

    The hare is the model that is trained. The tortoise, an average of it, takes in each of its steps. At every
    `reset_every`-th the hare's weights and buffers become the tortoise's, and the optimizer's state is cleared, so that
    momenta of the weights that were given up do not push the new ones. In the end take the tortoise.

    The resets are to keep a network able to learn from data that changes. In the authors' experiments with images the
    decay is 0.999 a step, and a reset comes every 10 epochs. A tracker's average lengthens with training, where theirs
    has one length.

    Arguments:
        tortoise: a `PostHocEMA`, or a module with `module` and `update_parameters`.
        reset_every: calls of `update` between resets; None leaves it to you to call `reset`. With a tracker a multiple
            of its `update_every`.
        optimizer: whose state is cleared at a reset. None keeps it, as the authors' code for images does: there a new
            optimizer comes with each new part of the data.
        sigma_rel: with a tracker, the length of the average that is the tortoise, or any other target that it takes.

    Attributes:
        step: calls of `update` so far.

    Raises:
        InvalidValueError: (a ValueError) naming the argument and what would be accepted.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> hare = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(hare.parameters(), lr=0.1, momentum=0.9)
        >>> tortoise = AveragedModel(hare, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        >>> recipe = HareAndTortoise(tortoise, reset_every=2, optimizer=optimizer)
        >>> for _ in range(2):
        ...     hare(torch.ones(1)).square().sum().backward()
        ...     optimizer.step()
        ...     print(recipe.update(hare), len(optimizer.state))
        False 1
        True 0
        >>> torch.equal(hare.weight, tortoise.module.weight)
        True
    """

    def __init__(
        self,
        tortoise: PostHocEMA | AveragedModule,
        reset_every: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        sigma_rel: float | Target | Profile | None = None,
    ) -> None:
        known = _as_average("tortoise", tortoise, sigma_rel)
        super().__init__(known, _check_every("reset_every", reset_every, known.update_every))
        self._optimizer = _check_optimizer(optimizer)

    def reset(self, hare: torch.nn.Module) -> None:
        """Set the hare to the tortoise and clear the optimizer's state now.

        Raises:
            NotReadyError: there is no average yet.
            ModelMismatchError: the hare has no such tensor, or of another shape; nothing is changed.
        """
        self._copy_into(hare)

    def _copy_into(self, model: torch.nn.Module) -> None:
        super()._copy_into(model)
        if self._optimizer is not None:
            self._optimizer.state.clear()


# --- the two kinds of averages ---------------------------------------------------------------------


class _Average(Protocol):
    update_every: int

    def update(self, model: torch.nn.Module) -> None: ...

    def copy_into(self, model: torch.nn.Module) -> None: ...


class _OfTracker:
    def __init__(self, tracker: PostHocEMA, target: float | Target | Profile) -> None:
        self._tracker = tracker
        self._target = target
        self.update_every = tracker.settings.schedule.update_every

    def update(self, model: torch.nn.Module) -> None:
        self._tracker.update_(model)
        if not self._tracker.keeps_averages:
            raise InvalidValueError(
                "this process keeps no averages to train from, so that its model would become another than "
                "the writer's",
                "give each process a tracker with writer=True and a directory of its own",
            )

    def copy_into(self, model: torch.nn.Module) -> None:
        self._tracker.load_into(model, self._target)


class _OfModule:
    update_every = 1

    def __init__(self, averaged: AveragedModule) -> None:
        self._averaged = averaged

    def update(self, model: torch.nn.Module) -> None:
        self._averaged.update_parameters(model)

    def copy_into(self, model: torch.nn.Module) -> None:
        module = self._averaged.module
        load_weights(model, dict([*module.named_parameters(), *module.named_buffers()]))


def _as_average(
    name: str, average: PostHocEMA | AveragedModule, sigma_rel: float | Target | Profile | None
) -> _Average:
    if isinstance(average, PostHocEMA):
        if sigma_rel is None:
            raise InvalidValueError(
                "sigma_rel", "must be given with a PostHocEMA, such as 0.05: which of its averages?"
            )
        return _OfTracker(average, sigma_rel)
    if not isinstance(getattr(average, "module", None), torch.nn.Module) or not hasattr(average, "update_parameters"):
        raise InvalidValueError(
            name,
            "must be a PostHocEMA, or have `module` and `update_parameters` as "
            f"torch.optim.swa_utils.AveragedModel has, not {type(average).__name__}",
        )
    if sigma_rel is not None:
        raise InvalidValueError("sigma_rel", f"is for a PostHocEMA; {type(average).__name__} has a single average")
    return _OfModule(average)


def _check_every(name: str, every: int | None, update_every: int) -> int | None:
    if every is None:
        return None
    try:
        count = -1 if isinstance(every, bool) else operator.index(every)
    except TypeError:
        count = -1
    if count < 1:
        raise InvalidValueError(f"{name} {every!r}", "must be a whole number, at least 1, or None")
    if count % update_every:
        raise InvalidValueError(f"{name} {every}", f"must be a multiple of the tracker's update_every {update_every}")
    return count


def _check_optimizer(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidValueError("optimizer", f"must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.Adagrad):
        raise InvalidValueError(
            "optimizer", "Adagrad makes its state only once, when it is made", "leave it out, or use Adam"
        )
    return optimizer
