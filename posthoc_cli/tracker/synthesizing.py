"""The averages that a tracker gives at any time, of any length: from its snapshots and its live averages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from posthoc_cli.errors import NotReadyError
from posthoc_cli.profiles import Profile
from posthoc_cli.synthesis import Plan, Source, plan_synthesis, synthesize
from posthoc_cli.targets import Target
from posthoc_cli.tracker.filling import fill_model
from posthoc_cli.tracker.live import reconstruction_figure
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.weights import Weights, swapped_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Module = TypeVar("Module", bound=torch.nn.Module)


class Synthesizing(ABC):
    """Averages of any length, for whatever has sources of them; see `PostHocEMA`."""

    settings: Settings

    @abstractmethod
    def _sources(self) -> Sequence[Source]:
        """Snapshots and live averages, as they are now."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Calls of `update_` so far in this run."""

    @contextmanager
    def model(
        self,
        model: Module,
        sigma_rel: float | Target | Profile,
        t: float | None = None,
        step: int | None = None,
        dtype: torch.dtype | str | None = None,
        method: str | None = None,
    ) -> Iterator[Module]:
        """The model itself with averaged weights, in eval mode, for the `with` block.

        Afterwards weights, buffers, train or eval mode and device are as they were, also when the block raises;
        parameters that are not tracked are left alone. Arguments as in `state_dict`, except that without `dtype`
        the weights take the dtypes that the model has.
        """
        weights = self._synthesized(sigma_rel, t, step, dtype, method)
        with swapped_in(model, weights, own_dtypes=dtype is None):
            yield model

    def load_into(
        self,
        model: torch.nn.Module,
        sigma_rel: float | Target | Profile,
        t: float | None = None,
        step: int | None = None,
        dtype: torch.dtype | str | None = None,
        method: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Fill a model with averaged weights in place, for good, wherever its tensors are.

        Tensors are filled as they are made, so that no second copy of the model is held; so that nothing changes
        unless everything can be made, all is made twice, and dropped the first time. A tensor on `meta` that is
        filled comes to be on `device`; those that stay there are named in a warning.

        Arguments:
            device: for tensors on `meta`.
            others: as in `model`.
        """
        plan = self._plan(sigma_rel, t, step, dtype, method)
        fill_model(model, plan, dtype, device)

    def reconstruction_error(
        self, sigma_range: tuple[float, float] = (0.05, 0.28), method: str | None = None
    ) -> Figure:
        """Reconstruction error against sigma_rel, for what is there now; for the plan, where nothing is.

        Arguments:
            sigma_range: lowest and highest sigma_rel.
            method: the solver; None for the default one.
        """
        return reconstruction_figure(self._sources(), self.settings, sigma_range, method)

    def _synthesized(
        self,
        sigma_rel: float | Target | Profile,
        t: float | None,
        step: int | None,
        dtype: torch.dtype | str | None,
        method: str | None,
    ) -> Weights:
        plan = self._plan(sigma_rel, t, step, dtype, method)
        made = {name: tensors[0] for name, tensors in synthesize(plan, dtype)}
        weights = Weights((spec.name, made[spec.name]) for spec in plan.specs())
        weights.predicted_error = plan.predicted_error(0)
        return weights

    def _plan(
        self,
        sigma_rel: float | Target | Profile,
        t: float | None,
        step: int | None,
        dtype: torch.dtype | str | None,
        method: str | None,
    ) -> Plan:
        sources = self._sources()
        if not sources:
            schedule = self.settings.schedule
            first = (schedule.update_after_step // schedule.update_every + 1) * schedule.update_every
            raise NotReadyError(
                f"no average yet: the first update is at call {first} of update_, this is after {self.step}"
            )
        return plan_synthesis(sources, [sigma_rel], t, step, method, dtype=dtype)
