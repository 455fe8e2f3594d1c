"""A claim about other libraries' averages: how often they were updated, compared with their distances."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import Discrete, StoredProfile
from posthoc_cli.reconstruction import Distance, DistanceTo, misfit
from posthoc_cli.snapshots.measurements import sample_measurements
from posthoc_cli.snapshots.sources import FileSource

log = logging.getLogger(__name__)

_EVERY = (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, 128, 200, 250, 500, 1000)
"""Values of update_every that a claim is compared with."""

_TIMES = 24
"""Newest times that a claim is checked at; with 8 of them values half as large as the true one often passed."""

_WORSE, _MUCH_WORSE = 1.25, 0.1
"""A claim is wrong if it fits worse than another value by more than this factor and this difference. In 18 runs (six
recorded trainings, updates every 1, 10 and 100 steps) the true value was at most 1.06 times and 0.006 worse than the
best one; values half or twice as large were refused, but for some at 100."""

_POOR = 1.0
"""A claim that fits worse than this is doubted, also if no other fits better. In recorded trainings the true value had
at most 0.42; widths in the wrong order, and two sessions of which one has replaced files of the other, 1.2 or more."""


def check_update_every(
    sources: Sequence[FileSource], claimed: int, profile: Callable[[FileSource, int], Discrete]
) -> dict[int, float]:
    """Compare the distances between another library's averages with those that its update_every would make.

    Averages of two profiles or more are needed: of one profile any value explains the distances.

    Arguments:
        sources: averages of one run.
        claimed: the value that is claimed.
        profile: the profile of a source if update_every had this value.

    Returns:
        For each value that was tried, how badly it fits (see `misfit`), the best one first; empty where the averages
        cannot tell.

    Raises:
        InvalidValueError: another value fits much better; it is named.
    """
    # After the first update all averages are equal: any distance is a rounding error.
    sources = [source for source in sources if profile(source, claimed).times.size > 1]
    times = sorted({source.info.t for source in sources})[-_TIMES:]
    sources = [source for source in sources if source.info.t in times]
    if len(times) < 2 or len(sources) < 2 * len(times):
        return {}
    measured = sample_measurements(sources)
    shortest = min(source.info.step for source in sources)
    found = {}
    for every in sorted({claimed, *(value for value in _EVERY if value <= shortest)}):
        profiles = {source.profile: profile(source, every) for source in sources}
        averages = [
            replace(
                source.info.average(profiles[source.profile]),
                measurements=replace(own, distances=tuple(_claimed(one, profiles) for one in own.distances)),
            )
            for source, own in zip(sources, measured, strict=True)
        ]
        if not math.isnan(fit := misfit(averages)):
            found[every] = fit
    if not found:  # nothing moved
        return {}
    best = min(found, key=lambda value: found[value])
    hint = "check the widths, update_after_step, and that one session of the training wrote all files"
    if found[claimed] > max(_WORSE * found[best], found[best] + _MUCH_WORSE):
        other, hint = (f"those of {best} do", "") if found[best] < _POOR else ("no other value fits them either", hint)
        reason = f"the distances between the averages do not fit it; {other}"
        raise InvalidValueError("update_every", reason, hint, value=claimed)
    if found[claimed] > _POOR:
        log.warning("the distances between the averages fit no update_every; %s", hint)
    return dict(sorted(found.items(), key=lambda one: one[1]))


def _claimed(distance: Distance, profiles: Mapping[StoredProfile, Discrete]) -> Distance:
    return DistanceTo(**{**vars(distance), "profile": profiles[distance.other]})
