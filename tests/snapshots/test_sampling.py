"""Measurements from a sample are exact for small models and unbiased for large ones."""

import pytest
import torch
from factories import RUN_ID, read_snapshot, write_snapshot

from posthoc_cli.snapshots.sampling import sample_measurements
from posthoc_cli.snapshots.source import expected_roundings

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def write(folder, t, sigma_rel, values):
    """Write a snapshot of a float32 model, in the dtypes of the values."""
    averages = [name for name, value in values.items() if value.is_floating_point()]
    given = {"tensors": dict.fromkeys(averages, "average F32"), "sigma_rels": (0.05, 0.28)}
    return read_snapshot(write_snapshot(folder, t, sigma_rel, RUN_ID, values, **given))


def flat(values):
    """Return all averages of a snapshot as a vector."""
    averages = [value for value in values.values() if value.is_floating_point()]
    return torch.cat([value.double().reshape(-1) for value in averages])


def squared(values):
    return float(values.square().sum())


# --- small models


def test_a_model_smaller_than_the_sample_is_measured_exactly(tmp_path):
    """Distances are to the other average of the time, and to those of the time before."""
    vectors = []
    snapshots = []
    for t, sigma_rel in ((10, 0.05), (10, 0.28), (20, 0.05), (20, 0.28)):
        tensors = {
            "w": draw(300, 7).half(),
            "b": draw(11).half(),
            "n": torch.tensor([10**9]),
        }
        vectors.append(flat(tensors))
        snapshots.append(write(tmp_path, t, sigma_rel, tensors))
    *_, last = sample_measurements(snapshots)
    assert last.norm == pytest.approx(squared(vectors[3]), rel=1e-12)
    for distance, partner in zip(last.distances, (2, 0, 1), strict=True):
        assert distance.other == snapshots[partner].profile
        moved = squared(vectors[3] - vectors[partner])
        assert distance.squared == pytest.approx(moved, rel=1e-12)


# --- rounding


@pytest.mark.parametrize(
    ("own", "dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2e-7])
def test_the_expected_rounding_is_that_of_values_that_are_rounded(own, dtype, scale):
    """This includes subnormal numbers of float16; 200,000 errors average to within 2 %."""
    exact = (draw(200_000) * scale).to(own)
    stored = exact.to(dtype)
    expected = expected_roundings(stored.double().numpy(), DTYPES[dtype], DTYPES[own])
    errors = exact.double() - stored.double()
    errors[stored == 0] = 0
    assert expected.sum() == pytest.approx(squared(errors), rel=0.02)


# --- values that cannot be measured


def test_values_too_large_to_be_squared_are_not_measured(tmp_path):
    large = torch.tensor([1e200], dtype=torch.float64)
    snapshot = write(tmp_path, 10, 0.05, {"w": large})
    assert sample_measurements([snapshot]) == [None]
