"""The error curve of a run."""

from __future__ import annotations

from dataclasses import replace

from posthoc_cli.planning import CurveRequest, ErrorCurve, error_curve
from posthoc_cli.snapshots.sources import Sources, count_sources
from posthoc_cli.synthesis.plan import check_known, check_steps


def run_curve(sources: Sources, request: CurveRequest) -> ErrorCurve:
    """Compute the errors of averages of a run, see `Run.error_curve`."""
    check_known(sources)
    t = sources.time(request.t)
    check_steps(request.wished, sources, t)
    choice = sources.choose(t)
    last = choice.usable_sources[-1].t
    counts = count_sources(choice.usable_sources, total=choice.available)
    label = f"{sources.place}: {counts} up to {last:,.12g} {sources.t_unit}"
    profiles = {}
    for target in request.wished:
        profiles[target.title] = target.profile(t, sources.clock, sources.t_first)
    request = replace(request, t=t)
    return error_curve(label, choice.known_profiles, choice.known_prior, request, profiles)
