"""Searches of metrics that are formulas, as a sweep makes them."""

from dataclasses import replace

from posthoc_cli.sweep.search import Lengths, Search
from posthoc_cli.sweep.trial import Trial

LAST = 10_000.0


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
