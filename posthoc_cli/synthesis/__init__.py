"""Coefficients times snapshots: any average of a run, tensor by tensor.

Two steps. `plan_synthesis` chooses snapshots and coefficients from headers alone; `synthesize` streams the
tensors. Every snapshot is read once for all targets together, and what is held at a time is one tensor of one
snapshot and one tensor a target. Sums are float32 (float64 for float64 parameters), whatever is stored.
"""

from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.synthesis.sources import DiskSource, Source, disk_sources, source_prior
from posthoc_cli.synthesis.streaming import Progress, parse_device, synthesize

__all__ = [
    "DiskSource",
    "Plan",
    "Progress",
    "Source",
    "disk_sources",
    "parse_device",
    "plan_synthesis",
    "source_prior",
    "synthesize",
]
