"""One call for averaged weights: from snapshots and live averages, in one process or in all that make the call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from posthoc_cli.errors import NotReadyError
from posthoc_cli.run import Wanted, Weights, make_weights
from posthoc_cli.synthesis.plan import Plan, Source, plan_synthesis, with_consistent_plan
from posthoc_cli.targets import as_target
from posthoc_cli.tracker.model_weights import check_weights
from posthoc_cli.tracker.pipeline import Pipeline
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.sharded_weights import (
    SharedPlan,
    from_first,
    from_keeper,
    join_live,
    make_chunks,
    together,
)
from posthoc_cli.tracker.sharding import Group, reshard
from posthoc_cli.tracker.snapshotter import (
    LiveSource,
    current_sources,
    live_sources,
    measured,
    run_snapshots,
    with_older,
)

Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """Which average is wanted; the arguments of `PostHocEMA.state_dict`."""

    wanted: Wanted
    t: float | None = None
    step: int | None = None
    dtype: torch.dtype | str | None = None
    method: str | None = None

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if name != "wanted" and value is not None}
        return ", ".join([as_target(self.wanted).title, *(f"{name}={value}" for name, value in given.items())])


@dataclass(frozen=True)
class Evaluation:
    """What a tracker's averages are at one call.

    Attributes:
        directory: of the snapshots.
        settings, pipeline: of the tracker.
        flush: returns when all updates are in the averages, and all due snapshots durable.
        keeps: whether this process keeps averages.
        from_step: the call of `update_` that the run goes on from, until it does; None for the newest snapshots.
        group: the processes that make this call together; None for this one alone.
    """

    directory: Path
    settings: Settings
    pipeline: Pipeline
    flush: Callable[[], None]
    keeps: bool
    from_step: int | None
    group: Group | None

    def weights(self, model: torch.nn.Module | None, query: Query) -> Weights:
        """An average, or of a sharded model the chunks of it that this process holds; all of the group call it."""
        if self._is_spread:
            return self._chunks(model, query)
        make = partial(with_consistent_plan, partial(self.plan, query), make_weights)
        return make() if self.group is None else from_keeper(self.group, make)

    def live_weights(self, model: torch.nn.Module, index: int) -> Weights:
        """The same of the live average of the tracked profile of this index, as it is."""
        if self._is_spread:
            return self._live_chunks(model, index)
        make = partial(self._complete_live, index)
        return make() if self.group is None else from_keeper(self.group, make)

    def check(
        self, model: torch.nn.Module, weights: Weights, own_dtypes: bool = True, accept_meta: bool = False
    ) -> None:
        """Raise in all processes if the weights do not fit the model in one. Alone, whoever fills the model checks."""
        if self.group is not None:
            together(self.group, lambda: check_weights(model, weights, own_dtypes, accept_meta))

    def plan(self, query: Query) -> Plan:
        """How complete tensors of an average are made, from what this process keeps or what is on disk."""
        return self._plan_from(self.sources(), query)

    def of_sources(self, work: Callable[[list[Source]], Result]) -> Result:
        """The result of work on snapshots and live averages; of a sharded model that of rank 0, in every process."""
        if not self._is_spread:
            return work(self.sources())
        joined = self._joined_live()[1]
        return from_first(self._processes, lambda: work(self._joined_sources(joined)))

    # --- complete tensors

    def sources(self) -> list[Source]:
        """The snapshots and live averages of complete tensors that there are now."""
        if not self.pipeline.now.resumes:  # else the writer, too, has only what is on disk
            self._check_keeps()
        self.flush()
        return self._going_on(current_sources(self.directory, self.pipeline.now.run_id, self.live()))

    def _going_on(self, sources: list[Source]) -> list[Source]:
        """Without those that are later than where the run goes on from."""
        if self.pipeline.now.resumes and self.from_step is not None:
            return [source for source in sources if source.info.step <= self.from_step]
        return sources

    def live(self) -> list[LiveSource]:
        """The live averages that this process keeps."""
        return live_sources(self.settings, self.pipeline.read())

    def _complete_live(self, index: int) -> Weights:
        self._check_keeps()
        self.flush()
        sources = self.live()
        if not sources:
            raise self._not_yet("live average")
        tensors, info = sources[index].tensors, sources[index].info
        log.info("live average of sigma_rel %g at t = %.12g: exact", info.sigma_rel, info.t)
        return Weights({**tensors, **{alias: tensors[name] for alias, name in info.aliases.items()}})

    # --- chunks, of which every process keeps some

    @property
    def _is_spread(self) -> bool:
        return self.pipeline.now.tracked.members is not None

    @property
    def _processes(self) -> Group:
        assert self.group is not None  # those of chunks are never evaluated alone
        return self.group

    def _chunks(self, model: torch.nn.Module | None, query: Query) -> Weights:
        assert model is not None
        target = as_target(query.wanted)
        own, joined = self._joined_live()

        def plan() -> SharedPlan:
            return SharedPlan.of(self._plan_from(self._joined_sources(joined), query))

        reshard(model)
        tracked = self.pipeline.now.tracked
        return with_consistent_plan(
            lambda: from_first(self._processes, plan),
            lambda shared: make_chunks(self._processes, shared, target, own, tracked, model, self.directory),
        )

    def _live_chunks(self, model: torch.nn.Module, index: int) -> Weights:
        own, joined = self._joined_live()

        def live() -> SharedPlan:
            if not joined:
                raise self._not_yet("live average")
            return SharedPlan.of_live(joined[index])

        reshard(model)
        shared = from_first(self._processes, live)
        return make_chunks(self._processes, shared, None, own, self.pipeline.now.tracked, model, self.directory)

    def _joined_sources(self, joined: Sequence[LiveSource]) -> list[Source]:
        """In rank 0 the snapshots and live averages of complete tensors."""
        return self._going_on(with_older(joined, run_snapshots(self.directory, self.pipeline.now.run_id)))

    def _joined_live(self) -> tuple[list[LiveSource], list[LiveSource]]:
        """The live averages here, and in rank 0 those of complete tensors, measured by all processes together."""

        def measure_own() -> list[LiveSource]:
            self.flush()
            snapshotter = self.pipeline.snapshotter
            return measured(self.live(), [] if snapshotter is None else snapshotter.stored())

        own = together(self._processes, measure_own)
        progress = self.pipeline.progress
        return own, join_live(self._processes, own, (progress.step, progress.t))

    # --- plans and refusals

    def _plan_from(self, sources: Sequence[Source], query: Query) -> Plan:
        if not sources:
            raise self._not_yet("average")
        plan = plan_synthesis(sources, [query.wanted], query.t, query.step, query.method, dtype=query.dtype)
        error = plan.predicted_error(0)
        predicted = "unknown" if error is None else f"{error:.2g}"
        log.info("average of %s at t = %.12g: predicted error %s", plan.targets[0].title, plan.t, predicted)
        if plan.choice is not None:
            log.info("made from %s", plan.choice)
        return plan

    def _not_yet(self, what: str) -> NotReadyError:
        schedule, step = self.settings.schedule, self.pipeline.progress.step
        every = schedule.update_every
        first = (max(schedule.update_after_step, step) // every + 1) * every
        reason = f"the first update is at call {first:,} of update_, so far {step:,}"
        hint = "model(model, sigma_rel=...) reads the snapshots"
        return NotReadyError(f"no {what} yet", reason, hint * (what == "live average" and self.pipeline.now.resumes))

    def _check_keeps(self) -> None:
        if not self.keeps:
            raise NotReadyError(
                "this process keeps no averages, the first one of its group does, or one made with writer=True",
                "make the call in all processes of the group, without alone=True; or read the snapshots on disk with a "
                "new PostHocEMA.from_path(directory), before any update_ of it",
            )
