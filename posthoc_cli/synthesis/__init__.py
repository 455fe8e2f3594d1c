"""Coefficients times snapshots: any average of a run, tensor by tensor.

Two steps. `plan_synthesis` chooses snapshots and coefficients from headers alone; `synthesize` streams the
tensors, tile by tile on all cores. Every snapshot is read once for all targets together, in constant memory. Sums are
float32 (float64 for float64 parameters, or on request), whatever is stored.
"""

from posthoc_cli.synthesis.consistent import with_consistent_plan
from posthoc_cli.synthesis.devices import device_reason, parse_device
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.synthesis.sources import DiskSource, Source, disk_sources, source_prior
from posthoc_cli.synthesis.streaming import Progress, parse_accumulate, place_synthesis, synthesize

__all__ = [
    "DiskSource",
    "Plan",
    "Progress",
    "Source",
    "device_reason",
    "disk_sources",
    "parse_accumulate",
    "parse_device",
    "place_synthesis",
    "plan_synthesis",
    "source_prior",
    "synthesize",
    "with_consistent_plan",
]
