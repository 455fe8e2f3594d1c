"""Sums that a synthesis makes of the tensors in snapshots, in NumPy float64, and their errors."""

from functools import lru_cache

import numpy as np
import torch
from safetensors.torch import load_file

from posthoc_cli import synthesize

UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Unit roundoff."""


@lru_cache(maxsize=8)
def _loaded(path):
    return load_file(path)


def exact_sums(plan, name):
    """For each target, sum_i c_i x_i and sum_i |c_i x_i| in float64, over the stored values x_i."""
    stored = []
    for source in plan.sources:
        tensors = _loaded(source.path)
        stored.append(tensors[source.aliases.get(name, name)].double().numpy())
    values = np.stack(stored)
    columns = plan.reconstruction.coefficients.T
    sums = np.tensordot(columns, values, axes=1)
    sizes = np.tensordot(np.abs(columns), np.abs(values), axes=1)
    return sums, sizes


def error_share(plan, dtype):
    """The largest error of a sum in `dtype`, as a share of sum |c_i x_i|: m u / (1 - m u) for m
    consecutive roundings.

    A term is rounded as a value, as a coefficient and as a product, then in each of the sums.
    """
    roundings = len(plan.sources) + 3
    error = roundings * UNIT[dtype]
    return error / (1 - error)


def assert_sums(plan, wide, rounding=0.0, device="cpu"):
    """Assert that results are sums in the dtype `wide`, within the errors of these and of the exact
    ones, and rounded once more by the unit `rounding`."""
    share = error_share(plan, wide) + error_share(plan, torch.float64)
    for name, values in synthesize(plan, device):
        if plan.entries[name].dtype == "I64":
            continue
        sums, sizes = exact_sums(plan, name)
        for value, exact, size in zip(values, sums, sizes, strict=True):
            of_sum = share * size
            of_result = rounding * (np.abs(exact) + of_sum)
            error = np.abs(value.cpu().double().numpy() - exact)
            smallest = torch.finfo(value.dtype).tiny
            assert np.all(error <= of_sum + of_result + smallest), name
