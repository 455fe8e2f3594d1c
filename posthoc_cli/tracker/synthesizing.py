"""Averages of any length that a tracker gives at any time, from its snapshots and its live averages."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.profiles import Profile, check_sigma_rel
from posthoc_cli.synthesis.engine import synthesize
from posthoc_cli.synthesis.plan import Plan, plan_synthesis, with_consistent_plan
from posthoc_cli.synthesis.sources import Source
from posthoc_cli.targets import Target
from posthoc_cli.tracker import model_weights
from posthoc_cli.tracker.live import LiveSource, reconstruction_figure
from posthoc_cli.tracker.model_weights import Weights, fill_model, in_block, swapped_in
from posthoc_cli.tracker.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Module = TypeVar("Module", bound=torch.nn.Module)

log = logging.getLogger(__name__)


class Synthesizing(ABC):
    """The part of `PostHocEMA` that gives averages of any length."""

    settings: Settings

    @abstractmethod
    def _sources(self) -> Sequence[Source]:
        """The snapshots and live averages that there are now."""

    @abstractmethod
    def _live_sources(self) -> Sequence[LiveSource]:
        """The live averages that there are now."""

    @abstractmethod
    def flush(self) -> None:
        """Wait until all updates so far are in the averages and all snapshots that are due are on disk."""

    @abstractmethod
    def _check_keeps(self) -> None:
        """Raise a NotReadyError in a process that keeps no averages."""

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

        After the block weights, buffers, train or eval mode and device are as before, also on an error; parameters
        that are not tracked do not change. The model's own weights are kept in host memory meanwhile. Blocks may be
        nested. The predicted error is logged. Arguments as in `state_dict`, except that without `dtype` the
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
        """As `model`, with the live average of a tracked profile: it is exact, and no snapshot is read.

        Arguments:
            model: as in `model`.
            tracked: sigma_rel of the profile.

        Raises:
            InvalidValueError: `tracked` is none of the tracked profiles, which are listed.
            NotReadyError: there was no update yet, or none since `from_path`; or there is no `with`.
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
        """Fill a model with averaged weights for good, on any device, also a model on `meta`.

        Memory for one tensor at a time is enough. Everything is computed twice: first only to check that it can be, so
        that an error leaves the model as it was. A tensor on `meta` that an average fills is created on `device`; a
        warning names those that stay on `meta`.

        Between two training steps this is the switch of Switch EMA: parameters stay the same objects, so that the
        optimizer keeps them and its state, and later updates average the new weights.

        Arguments:
            device: where tensors that are on `meta` are created.
            others: as in `model`.

        Raises:
            ModelMismatchError: the model has no such tensor, or in another shape.
            InvalidValueError, NotReadyError, FileFormatError, MismatchError, NonFiniteError: as `state_dict`.
        """
        with_consistent_plan(
            lambda: self._plan(sigma_rel, t, step, dtype, method),
            lambda plan: fill_model(model, plan, device),
        )

    copy_to = load_into
    """Another name of `load_into`, as in diffusers and torch-ema."""

    def update_bn(self, model: torch.nn.Module, loader: Iterable[Any]) -> None:
        """Recompute a model's BatchNorm statistics for the weights that it has now.

        A snapshot holds a copy of the training's statistics, which belong to the raw weights. Within `with
        ema.model(...)` or `ema.averaged(...)` the new statistics last until the end of the block; after `load_into`
        they stay.

        Arguments:
            model: in any mode, on any device; without BatchNorm layers nothing happens.
            loader: yields the model's inputs, or lists or tuples whose first item they are.

        Raises:
            InvalidValueError: the loader yields nothing. After any error the statistics are as before.
        """
        model_weights.update_bn(model, loader)

    def reconstruction_error(
        self, sigma_range: tuple[float, float] = (0.05, 0.28), method: str | None = None
    ) -> Figure:
        """A figure of the reconstruction error against sigma_rel, of the current averages; of the planned ones before.

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
            made = {name: tensors[0] for name, tensors in synthesize(plan)}
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
            raise InvalidValueError("tracked", str(error)) from error
        known = self.settings.sigma_rels
        if not any(math.isclose(wanted, sigma_rel, rel_tol=1e-6) for sigma_rel in known):
            raise InvalidValueError(
                "tracked",
                f"must be one of the tracked profiles, {', '.join(f'{s:g}' for s in known)}; for any "
                f"other, model(model, sigma_rel={tracked:g})",
                value=f"{tracked:g}",
            )
        self._check_keeps()
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
            f"no {what} yet", f"the first update is at call {first} of update_, this is after {self.step}"
        )
