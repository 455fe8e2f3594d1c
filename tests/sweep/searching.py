"""Searches of metrics that are formulas, as a sweep makes them; and sweeps of runs."""

import math
from dataclasses import replace

from posthoc_cli.request import SweepRequest
from posthoc_cli.sweep import Sweep
from posthoc_cli.sweep.search import Lengths, Search
from posthoc_cli.sweep.trial import Trial

LAST = 10_000.0
LISTED = (0.05, 0.1, 0.2)
BOWL = "awk 'BEGIN { print log({sigma_rel} / 0.1) ^ 2 }' {weights}"


def make_search(lengths=None, minimize=True, t=LAST, **options):
    return Search(lengths or Lengths(0.02, 0.28), minimize, t, **options)


def measure(spot, seed, value, **fields):
    made = Trial(spot.title, spot.sigma_rel, seed, value, t=spot.t, base_share=spot.base_share)
    return replace(made, **fields)


def search_all(search, metric, jobs=99):
    """Measure until the search has ended, `jobs` trials of a batch at a time; the metric is a
    function of the spot and the seed."""
    while batch := search.next_measurements()[:jobs]:
        trials = [measure(spot, seed, metric(spot, seed)) for spot, seed in batch]
        search = replace(search, trials=(*search.trials, *trials))
    return search


# --- of a run


def distance_from(best):
    """Return an evaluation of a training that overfits after twice the best mean time."""
    return lambda weights: math.log(float(weights["a"].mean()) / best) ** 2


def swept(run, out, command=BOWL, metric=None, **options):
    """Sweep over three lengths, or over those of the options, for the lowest metric."""
    lengths = {} if "sigma_range" in options else {"sigma_rels": LISTED}
    direction = {"minimize": not options.get("look")}
    request = SweepRequest(command, metric=metric, out=out, **lengths | direction | options)
    return Sweep(run.sources, request).run()


def shell(script):
    """Return a command that runs a script; $1 is the weights, $2 sigma_rel, $3 the seed, $4 the
    folder."""
    return f"sh -c '{script}' sh {{weights}} {{sigma_rel}} {{seed}} {{dir}}"
