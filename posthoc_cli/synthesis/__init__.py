"""Coefficients times snapshots: any average of a run, tensor by tensor.

`plan_synthesis` chooses snapshots and coefficients from headers alone; `synthesize` yields the
tensors, made tile by tile on all cores. Every snapshot is read once for all targets together, in
constant memory. Sums are float32, or float64 for parameters in float64 and for snapshots stored in
float32 or wider.
"""
