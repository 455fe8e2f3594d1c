"""The tracker's own state: what `state_dict()` returns, and what a tracker continues from, exactly,
in all processes that keep averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from posthoc_cli.errors import ModelMismatchError
from posthoc_cli.group import Group
from posthoc_cli.snapshots.sketch_text import encode_path, join_paths
from posthoc_cli.snapshots.weights_sample import are_equal, places
from posthoc_cli.tracker.filling import is_swapped
from posthoc_cli.tracker.model import ModelWatch
from posthoc_cli.tracker.pipeline import Pipeline
from posthoc_cli.tracker.resume import Start, sample_of_all, warn_of_other_weights
from posthoc_cli.tracker.state import StateInfo, Tracking, pack_state, read_info, unpack_state


class OwnState:
    """Packs and loads a tracker's own state."""

    def __init__(self, start: Start, pipeline: Pipeline, watch: ModelWatch) -> None:
        self._start = start
        self._directory = start.directory
        self._settings = start.settings
        self._members = start.tracking.tracked.members
        self._pipeline = pipeline
        self._watch = watch

    @property
    def _exists(self) -> bool:
        return self._members.is_chunked or self._members.keeps

    def pack(self) -> dict[str, Any]:
        """Make the state; empty in processes that keep no averages."""
        if not self._exists:
            return {}
        group = self._members.keepers()

        def read() -> Tracking:
            self._pipeline.flush()
            if self._pipeline.tracking.resumes:
                return self._start.read(self._pipeline.tracking)
            return self._pipeline.read_exactly()

        tracking = group.together(read)
        averages = tracking.averages
        # Each process knows the path of its own part, and some processes have no average.
        own_path = encode_path(averages.known_path, exact=True)
        paths = group.from_all(own_path)
        weights = self._present_weights(group)

        def read_info() -> StateInfo:
            return StateInfo(
                run_id=tracking.run_id,
                t_unit=self._settings.t_unit,
                sigma_rels=averages.sigma_rels,
                standing=averages.standing,
                last=tracking.progress.last,
                sketch=join_paths([path for path in paths if path]),
                weights=weights,
                directory=str(self._directory),
            )

        model = self._watch.find_sharded_model("state_dict")
        return pack_state(tracking, group.from_first(read_info), model)

    def _present_weights(self, group: Group) -> tuple[float, ...]:
        """Read the network's sampled weights at the last call; empty if they are unknown."""
        now = self._pipeline.tracking
        model = self._watch.model
        if not self._pipeline.progress.updated:
            return ()
        own: dict[int, float] = {}
        if model is not None and not now.resumes and not is_swapped(model):
            with suppress(ModelMismatchError):
                own = self._watch.sample(model, now.tracked)
        values = sample_of_all(group, own)
        count = len(places(now.tracked.complete_shapes))
        if len(values) < count or not np.isfinite(values).all():
            return ()
        return tuple(values.tolist())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; an error changes nothing."""
        now = self._pipeline.tracking
        if not (self._exists or state):
            # The writer loads the state. This process only counts, and must not resume from disk
            # any more.
            progress = replace(now.progress, updated=max(1, self._pipeline.progress.step))
            self._pipeline.set(replace(now, progress=progress, resumes=False))
            return
        group = self._members.keepers()

        def unpack() -> tuple[Tracking, tuple[float, ...]]:
            self._pipeline.flush()
            return unpack_state(state, self._settings, now.tracked)

        loaded, weights = group.together(unpack)
        self._pipeline.begin(group, loaded.run_id, lambda: loaded)
        self._start.refusal = None
        if self._watch.model is not None and not self._fits(group, weights) and group.leads:
            warn_of_other_weights(self._directory, loaded.progress.step)

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Return whether the model has the weights that the network had when a state was taken."""
        return self._fits(self._members.keepers(), read_info(state).weights)

    def _fits(self, group: Group, weights: Sequence[float]) -> bool:
        if not weights:
            return True
        with np.errstate(over="ignore"):  # of a damaged state
            recorded = np.array(weights, np.float32)
        model = self._watch.find_model("fits")
        tracked = self._pipeline.tracking.tracked
        own = group.together(lambda: self._watch.sample(model, tracked))
        return are_equal(sample_of_all(group, own), recorded)
