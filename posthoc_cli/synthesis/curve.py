"""The error curve of a run."""

from __future__ import annotations

from collections.abc import Sequence

from posthoc_cli.planning import ErrorCurve, error_curve
from posthoc_cli.request import Wanted
from posthoc_cli.snapshots.sources import Sources, count_sources
from posthoc_cli.synthesis.plan import check_known, check_steps
from posthoc_cli.targets import as_targets


def run_curve(
    sources: Sources,
    sigma_range: tuple[float, float] = (0.01, 0.2886),
    t: float | None = None,
    method: str | None = None,
    others: Wanted | Sequence[Wanted] = (),
) -> ErrorCurve:
    """Compute the errors of averages of a run at `t`, see `Run.error_curve`."""
    check_known(sources)
    t = sources.time(t)
    wished = as_targets(others)
    check_steps(wished, sources, t)
    choice = sources.choose(t)
    last = choice.usable_sources[-1].t
    counts = count_sources(choice.usable_sources, total=choice.available)
    label = f"{sources.place}: {counts} up to {last:,.12g} {sources.t_unit}"
    named_profiles = {}
    for target in wished:
        named_profiles[target.title] = target.profile(t, sources.clock, sources.t_first)
    return error_curve(
        label,
        choice.known_profiles,
        choice.known_prior,
        sigma_range,
        t,
        method,
        named_profiles,
    )
