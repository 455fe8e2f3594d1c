"""Coefficients times snapshots: any average of a run, tensor by tensor.

`plan_synthesis` chooses snapshots and coefficients from headers alone; `synthesize` streams the tensors, tile by tile
on all cores. Every snapshot is read once for all targets together, in constant memory. Sums are float32 (float64 for
float64 parameters, or on request), for any stored dtype.
"""
