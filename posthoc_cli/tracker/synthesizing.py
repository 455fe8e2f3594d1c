"""The averages that a tracker gives at any time, of any length: from its snapshots and its live averages."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.profiles import Profile, check_sigma_rel
from posthoc_cli.synthesis import Plan, Source, plan_synthesis, synthesize, with_consistent_plan
from posthoc_cli.targets import Target
from posthoc_cli.tracker import batch_norm
from posthoc_cli.tracker.filling import fill_model
from posthoc_cli.tracker.live import LiveSource, reconstruction_figure
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.weights import Weights, in_block, swapped_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Module = TypeVar("Module", bound=torch.nn.Module)

log = logging.getLogger(__name__)


class Synthesizing(ABC):
    """Averages of any length, for whatever has sources of them; see `PostHocEMA`."""

    settings: Settings

    @abstractmethod
    def _sources(self) -> Sequence[Source]:
        """Snapshots and live averages, as they are now."""

    @abstractmethod
    def _live_sources(self) -> Sequence[LiveSource]:
        """The live averages, as they are now."""

    @abstractmethod
    def flush(self) -> None:
        """Return when every update that was asked for is taken in, and every snapshot durable."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Calls of `update_` so far in this run."""

    @in_block
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
        parameters that are not tracked are left alone. The model's own weights wait on the host meanwhile. Blocks
        may be nested. The predicted error is logged. Arguments as in `state_dict`, except that without `dtype` the
        weights take the dtypes that the model has.

        What the block gives is the model itself: `averaged.state_dict()` refers to its tensors, which hold its own
        weights again after the block. To keep the averaged ones, save them within the block, or take
        `ema.state_dict(sigma_rel=...)`.

        Raises:
            NotReadyError: the block is used without `with`; or no average exists yet.
            InvalidValueError: an argument, or a tensor of the model is on the meta device; `load_into` fills those.
            ModelMismatchError: the model has no such tensor, or in another shape.
        """
        weights = self._synthesized(sigma_rel, t, step, dtype, method)
        with swapped_in(model, weights, own_dtypes=dtype is None):
            yield model

    @in_block
    def averaged(self, model: Module, tracked: float) -> Iterator[Module]:
        """The same with the live average of a tracked profile, which is exact and needs no snapshot: none is read.

        Arguments:
            model: as in `model`.
            tracked: sigma_rel of the profile.

        Raises:
            InvalidValueError: not one of the tracked profiles, which are listed.
            NotReadyError: there was no update yet, or none since `from_path`.
            ModelMismatchError: as in `model`.
        """
        source = self._tracked_source(tracked)
        stored = {**source.averages, **source.copies}
        names = {name: name for name in stored} | source.info.aliases
        log.info("live average of sigma_rel %g at t = %.12g: exact", source.info.sigma_rel, source.info.t)
        with swapped_in(model, {alias: stored[name] for alias, name in names.items()}):
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

        Between two steps of a training this is the switch of Switch EMA: parameters stay the objects that they are,
        the optimizer keeps them and its state, and averages take in the weights as they are from then on.

        Arguments:
            device: for tensors on `meta`.
            others: as in `model`.
        """
        with_consistent_plan(
            lambda: self._plan(sigma_rel, t, step, dtype, method),
            lambda plan: fill_model(model, plan, dtype, device),
        )

    copy_to = load_into
    """What other EMA classes call it (diffusers, torch-ema); the same function."""

    def update_bn(self, model: torch.nn.Module, loader: Iterable[Any]) -> None:
        """Measure a model's BatchNorm statistics anew, for the weights that it has now.

        A snapshot copies those of the training, which belong to its raw weights. Within `with ema.model(...)` or
        `ema.averaged(...)` the measured ones last as long as the averaged weights; after `copy_to`, for good.

        Arguments:
            model: in any mode, on any device; without BatchNorm layers it is left alone.
            loader: gives the model's inputs, or lists or tuples that begin with them.

        Raises:
            InvalidValueError: a loader that gives nothing. The statistics are as before, as after any other error.
        """
        batch_norm.update_bn(model, loader)

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
        def make(plan: Plan) -> Weights:
            made = {name: tensors[0] for name, tensors in synthesize(plan, dtype)}
            weights = Weights((spec.name, made[spec.name]) for spec in plan.specs())
            weights.predicted_error = plan.predicted_error(0)
            return weights

        return with_consistent_plan(lambda: self._plan(sigma_rel, t, step, dtype, method), make)

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
            raise self._not_yet("average")
        plan = plan_synthesis(sources, [sigma_rel], t, step, method, dtype=dtype)
        error = plan.predicted_error(0)
        predicted = "unknown" if error is None else f"{error:.2g}"
        log.info("average of %s at t = %.12g: predicted error %s", plan.targets[0].title, plan.t, predicted)
        if plan.choice is not None:
            log.info("made from %s", plan.choice)
        return plan

    def _tracked_source(self, tracked: float) -> LiveSource:
        """The live average of the profile `tracked`."""
        try:
            wanted = check_sigma_rel(tracked)
        except InvalidValueError as error:
            raise InvalidValueError(f"tracked: {error}") from error
        known = self.settings.sigma_rels
        if not any(math.isclose(wanted, sigma_rel, rel_tol=1e-6) for sigma_rel in known):
            raise InvalidValueError(
                f"tracked {tracked:g}: must be one of the tracked profiles, {', '.join(f'{s:g}' for s in known)}; "
                f"for any other, model(model, sigma_rel={tracked:g})"
            )
        self.flush()
        for source in self._live_sources():
            if math.isclose(wanted, source.info.sigma_rel, rel_tol=1e-6):  # 0.05 of float32 is the same profile
                return source
        raise self._not_yet("live average")

    def _not_yet(self, what: str) -> NotReadyError:
        schedule = self.settings.schedule
        every = schedule.update_every
        first = (max(schedule.update_after_step, self.step) // every + 1) * every
        return NotReadyError(
            f"no {what} yet: the first update is at call {first} of update_, this is after {self.step}"
        )
