"""Recipes that copy an average back into the model during training.

Both take a `PostHocEMA` tracker, or a module with `module` and `update_parameters` such as
`torch.optim.swa_utils.AveragedModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch

from posthoc_cli.errors import InvalidValueError, check_count
from posthoc_cli.run import Wanted
from posthoc_cli.tracker import PostHocEMA
from posthoc_cli.tracker.filling import load_weights


class AveragedModule(Protocol):
    """A module whose attribute `module` has a model's averaged weights."""

    @property
    def module(self) -> torch.nn.Module:
        """The model with averaged weights."""

    def update_parameters(self, model: torch.nn.Module) -> None:
        """Average the model's current weights."""


class _CopiedBack:
    """What both recipes share: an average that sees every step, and `step`, the number of calls of `update`."""

    _names: tuple[str, str]
    """The arguments for the average and for the period."""

    def __init__(self, average: PostHocEMA | AveragedModule, every: int | None, sigma_rel: Wanted | None) -> None:
        update_every = _check_average(self._names[0], average, sigma_rel)
        if every is not None and check_count(self._names[1], every) % update_every:
            reason = f"must be a multiple of the tracker's update_every {update_every}"
            raise InvalidValueError(self._names[1], reason, value=every)
        self._average, self._every, self._sigma_rel = average, every, sigma_rel
        self.step = 0

    def update(self, model: torch.nn.Module) -> bool:
        """Average the model's weights; if it is due, copy the average into the model.

        Returns whether the model now has the averaged weights; it keeps its own while a tracker has no average yet.
        """
        if isinstance(self._average, PostHocEMA):
            self._average.update_(model)
        else:
            self._average.update_parameters(model)
        self.step += 1
        if self._every is None or self.step % self._every:
            return False
        if isinstance(self._average, PostHocEMA) and not self._average.has_average:
            return False
        self._copy_into(model)
        return True

    def state_dict(self) -> dict[str, int]:
        """Return the number of calls; the average and the optimizer have their own states."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting from a state."""
        self.step = state["step"]

    def _copy_into(self, model: torch.nn.Module) -> None:
        if isinstance(self._average, PostHocEMA):
            self._average.load_into(model, cast(float, self._sigma_rel))
        else:
            module = self._average.module
            load_weights(model, dict([*module.named_parameters(), *module.named_buffers()]))


def _check_average(name: str, average: object, sigma_rel: object) -> int:
    """Check the average and return its update interval, of which a recipe's interval must be a multiple."""
    if isinstance(average, PostHocEMA):
        if sigma_rel is None:
            raise InvalidValueError("sigma_rel", "must be given with a PostHocEMA, such as 0.05")
        return average.settings.schedule.update_every
    kind = type(average).__name__
    if not isinstance(getattr(average, "module", None), torch.nn.Module) or not hasattr(average, "update_parameters"):
        accepted = "have `module` and `update_parameters` as torch.optim.swa_utils.AveragedModel has"
        raise InvalidValueError(name, f"must be a PostHocEMA, or {accepted}, not {kind}")
    if sigma_rel is not None:
        raise InvalidValueError("sigma_rel", f"is for a PostHocEMA; {kind} has a single average")
    return 1


class SwitchEMA(_CopiedBack):
    """Training that continues from its own average: Switch EMA (arXiv 2402.09240).

    The average takes in the model after every step. At the end of every epoch, or every `switch_every` steps, its
    parameters and buffers are copied into the model, in place, and training continues from there. The optimizer keeps
    its state; the average continues over weights that jump at the switches. Use the average in the end.

    `update` calls a tracker's `update_`; with a tracker that is attached to the optimizer, call only `switch`.

    Arguments:
        average: a `PostHocEMA`, or a module with `module` and `update_parameters`.
        switch_every: calls of `update` between switches; None to call `switch` yourself. With a tracker a multiple of
            its `update_every`, so that the average is up to date.
        sigma_rel: with a tracker, the target (such as a sigma_rel) to switch to.

    Raises:
        InvalidValueError: (a ValueError) names the argument and what would be accepted.
        ModelMismatchError: (in `update` and `switch`) the model lacks a tensor, or has another shape; it is unchanged.
    """

    _names = ("average", "switch_every")

    def __init__(
        self,
        average: PostHocEMA | AveragedModule,
        switch_every: int | None = None,
        sigma_rel: Wanted | None = None,
    ) -> None:
        super().__init__(average, switch_every, sigma_rel)

    def switch(self, model: torch.nn.Module) -> None:
        """Copy the averaged weights into the model now."""
        self._copy_into(model)


class HareAndTortoise(_CopiedBack):
    """A fast learner that is reset to its own slow average: Hare & Tortoise (arXiv 2406.02596).

    The hare is the trained model; the tortoise is an average that takes in each of its steps. Every `reset_every` steps
    the hare gets the tortoise's weights and buffers, and the optimizer's state is cleared, so that no momenta of the
    old weights push the new ones. Use the tortoise in the end.

    The resets keep a network able to learn from changing data. The authors' experiments with images use a decay of
    0.999 a step and a reset every 10 epochs. A tracker's average lengthens with training; theirs has one length.

    Arguments and errors as in `SwitchEMA` (`reset` in the place of `switch`), and:
        optimizer: its state is cleared at a reset. None keeps the state, as the authors' code for images does, which
            makes a new optimizer for each section of the data.
    """

    _names = ("tortoise", "reset_every")

    def __init__(
        self,
        tortoise: PostHocEMA | AveragedModule,
        reset_every: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        sigma_rel: Wanted | None = None,
    ) -> None:
        super().__init__(tortoise, reset_every, sigma_rel)
        if isinstance(optimizer, torch.optim.Adagrad):
            hint = "leave it out, or use Adam"
            raise InvalidValueError("optimizer", "Adagrad cannot make a cleared state again", hint)
        self._optimizer = optimizer

    def reset(self, hare: torch.nn.Module) -> None:
        """Copy the tortoise into the hare and clear the optimizer's state now."""
        self._copy_into(hare)

    def _copy_into(self, model: torch.nn.Module) -> None:
        super()._copy_into(model)
        if self._optimizer is not None:
            self._optimizer.state.clear()
