"""What an earlier run says about one that is planned like it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from posthoc_cli.reconstruction import Motion, Prior
from posthoc_cli.reconstruction.prior import ASSUMED
from posthoc_cli.snapshots.chosen import chosen_up_to
from posthoc_cli.snapshots.priors import snapshot_prior
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.segments import of_newest_segment

DTYPE_WORDS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""What a plan calls the dtypes that snapshots are stored in."""


@dataclass(frozen=True)
class Likeness:
    """A run, relative to its norm and stretched to another length.

    Attributes:
        motion: how its network moved; None where too little is known.
        rounding: root mean square error of its stored averages by dtype, relative to their norm, where it was measured
            or estimated from their values.
    """

    motion: Motion | None
    rounding: dict[str, float]


def likeness(snapshots: Sequence[Snapshot], steps: float) -> Likeness:
    """What the snapshots of one run say about a run of `steps`.

    Raises:
        FileFormatError, NonFiniteError: while reading a sample, where headers have no measurements.
    """
    snapshots = of_newest_segment(snapshots)
    snapshots, _ = chosen_up_to(snapshots, max(snapshot.info.t for snapshot in snapshots))
    prior = snapshot_prior(snapshots)
    times = np.array([snapshot.info.t for snapshot in snapshots])
    norm = float(prior.norm[times == times.max()].mean())
    known = prior.source != ASSUMED and norm > 0
    motion = stretched(prior, steps, float(times.max()), norm) if known else None
    found = defaultdict(list)
    for snapshot, rounding, squared in zip(snapshots, prior.rounding, prior.norm, strict=True):
        stored = {
            snapshot.header.tensors[name].dtype
            for name, tensor in snapshot.info.tensors.items()
            if tensor.role == "average"
        }
        name = DTYPE_WORDS.get(stored.pop()) if len(stored) == 1 else None
        if prior.source != ASSUMED and name is not None and rounding > 0 and squared > 0:
            found[name].append(float(rounding / squared))
    return Likeness(motion, {name: sqrt(float(np.mean(values))) for name, values in found.items()})


def stretched(prior: Prior, steps: float, t: float, norm: float) -> Motion:
    """How a run moved up to `t`, as one of `steps` steps would on the same path, relative to a squared norm.

    A piece's increments have the variance v dn over dn steps, so that v shrinks as steps grow in number; densities
    shrink, too, and with them integral w p^2 dn, so that w grows.
    """
    motion = prior.motion
    edges = motion.edges if prior.steps is None else prior.steps.clock.step_at(motion.edges)
    factor = steps / (t if prior.steps is None else float(prior.steps.clock.step_at(t)))
    # The new run moves from its start, whenever the earlier one's averages began.
    edges = np.concatenate(([0.0], edges[1:] * factor))
    return Motion(edges, motion.walk / (factor * norm), motion.noise * factor / norm)
