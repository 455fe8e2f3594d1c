"""Recipes that copy an average back into the model during training.

Both take a `PostHocEMA` tracker, or a module with `module` and `update_parameters` such as
`torch.optim.swa_utils.AveragedModel`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.optim.swa_utils import AveragedModel

from posthoc_cli.averages.weights import ExponentialMovingAverage
from posthoc_cli.errors import InvalidValueError, check_count
from posthoc_cli.run import Wanted
from posthoc_cli.tracker import PostHocEMA
from posthoc_cli.tracker.filling import load_weights

Average = PostHocEMA | ExponentialMovingAverage | AveragedModel


class SwitchEMA:
    """Training that continues from its own average: Switch EMA (arXiv 2402.09240).

    The average takes in the model after every step. At the end of every epoch, or every `switch_every` steps, its
    parameters and buffers are copied into the model, in place, and training continues from there. The optimizer keeps
    its state; the average continues over weights that jump at the switches. Use the average in the end.

    `update` calls a tracker's `update_`; with a tracker that is attached to the optimizer, call only `switch`.

    Arguments:
        average: a tracker, or any module with `module` and `update_parameters`.
        switch_every: calls of `update` between switches; None to call `switch` yourself. With a tracker a multiple of
            its `update_every`, so that the average is up to date.
        sigma_rel: with a tracker, the target (such as a sigma_rel) to switch to.

    A model that lacks a tensor, or has another shape, is a ModelMismatchError, and unchanged.
    """

    _names = ("average", "switch_every")

    def __init__(self, average: Average, switch_every: int | None = None, sigma_rel: Wanted | None = None) -> None:
        interval, is_tracker = 1, isinstance(average, PostHocEMA)
        if isinstance(average, PostHocEMA):
            interval = average.settings.schedule.update_every
        elif not (
            isinstance(getattr(average, "module", None), torch.nn.Module) and hasattr(average, "update_parameters")
        ):
            accepted = "have `module` and `update_parameters` as torch.optim.swa_utils.AveragedModel has"
            raise InvalidValueError(
                self._names[0], f"must be a PostHocEMA, or {accepted}, not {type(average).__name__}"
            )
        if is_tracker != (sigma_rel is not None):
            raise InvalidValueError("sigma_rel", "must be given with a PostHocEMA, such as 0.05, and only with one")
        if switch_every is not None and check_count(self._names[1], switch_every) % interval:
            reason = f"must be a multiple of the tracker's update_every {interval}"
            raise InvalidValueError(self._names[1], reason, value=switch_every)
        self._average, self._every, self._sigma_rel = average, switch_every, sigma_rel
        self.step = 0

    def update(self, model: torch.nn.Module) -> bool:
        """Average the model's weights; if it is due, copy the average into the model.

        Returns whether the model now has the averaged weights; it keeps its own while a tracker has no average yet.
        """
        average = self._average
        average.update_(model) if isinstance(average, PostHocEMA) else average.update_parameters(model)
        self.step += 1
        due = self._every is not None and self.step % self._every == 0
        if due and (not isinstance(average, PostHocEMA) or average.has_average):
            self.switch(model)
            return True
        return False

    def switch(self, model: torch.nn.Module) -> None:
        """Copy the averaged weights into the model now."""
        if isinstance(self._average, PostHocEMA):
            assert self._sigma_rel is not None
            self._average.load_into(model, self._sigma_rel)
        else:
            module = self._average.module
            load_weights(model, dict([*module.named_parameters(), *module.named_buffers()]))

    def state_dict(self) -> dict[str, int]:
        """Return the number of calls; the average and the optimizer have their own states."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting from a state."""
        self.step = state["step"]


class HareAndTortoise(SwitchEMA):
    """A fast learner that is reset to its own slow average: Hare & Tortoise (arXiv 2406.02596).

    The hare is the trained model; the tortoise is an average that takes in each of its steps. Every `reset_every` steps
    the hare gets the tortoise's weights and buffers, and the optimizer's state is cleared, so that no momenta of the
    old weights push the new ones. Use the tortoise in the end.

    The resets keep a network able to learn from changing data. A tracker's average lengthens with training; the
    authors' has one length, a decay of 0.999 a step for images, with a reset every 10 epochs.

    Arguments and methods as in `SwitchEMA`, with `reset` for `switch`, and:
        optimizer: its state is cleared at a reset; None keeps the state.
    """

    _names = ("tortoise", "reset_every")

    def __init__(
        self, tortoise: Average, reset_every: int | None = None,
        optimizer: torch.optim.Optimizer | None = None, sigma_rel: Wanted | None = None,
    ) -> None:  # fmt: skip
        super().__init__(tortoise, reset_every, sigma_rel)
        if isinstance(optimizer, torch.optim.Adagrad):
            raise InvalidValueError(
                "optimizer", "Adagrad cannot make a cleared state again", "leave it out, or use Adam"
            )
        self._optimizer = optimizer

    def switch(self, model: torch.nn.Module) -> None:
        """Copy the tortoise into the hare and clear the optimizer's state now."""
        super().switch(model)
        if self._optimizer is not None:
            self._optimizer.state.clear()

    reset = switch
