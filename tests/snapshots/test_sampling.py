"""Measurements from a sample are exact for small models and unbiased for large ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import RUN_ID, read_snapshot, write_snapshot

from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.sources import expected_roundings, sample_measurements

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def write(
    folder: Path,
    t: float,
    sigma_rel: float,
    values: dict[str, torch.Tensor],
) -> Snapshot:
    """Write a snapshot of a float32 model, or of float64 if that is the stored dtype."""
    tensors = {}
    for name, value in values.items():
        if value.dtype not in (torch.int64, torch.float64):
            tensors[name] = "average F32"
    widths = (0.05, 0.28)
    path = write_snapshot(folder, t, sigma_rel, RUN_ID, values, tensors=tensors, sigma_rels=widths)
    return read_snapshot(path)


def squared(values: torch.Tensor) -> float:
    return float((values.double() ** 2).sum())


def squared_distance(
    one: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor],
    names: str,
) -> float:
    distance = 0.0
    for name in names:
        distance += squared(one[name].double() - other[name].double())
    return distance


# --- small models


def partners_of(measured: Measurements) -> list[tuple[float, float]]:
    """Return the time and the width of the other average of each distance."""
    partners = []
    for distance in measured.distances:
        other: Any = distance.other
        partners.append((other.t, round(other.sigma_rel, 9)))
    return partners


FIRST = [(10, 0.05), (10, 0.28)]
PARTNERS = {
    (10, 0.05): [(10, 0.28)],
    (10, 0.28): [(10, 0.05)],
    (20, 0.05): [(20, 0.28), *FIRST],
    (20, 0.28): [(20, 0.05), *FIRST],
}
"""Of each average those from which its distance is measured."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_smaller_than_the_sample_is_measured_exactly(
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    values = {}
    snapshots = []
    for key in PARTNERS:
        values[key] = {
            "w": draw(300, 7).to(dtype),
            "b": draw(11).to(dtype),
            "n": torch.tensor([10**9]),
        }
        snapshots.append(write(tmp_path, *key, values[key]))
    found = dict(zip(values, sample_measurements(snapshots), strict=True))
    for key, partners in PARTNERS.items():
        exact = values[key]
        measured = found[key]
        norm = squared(exact["w"]) + squared(exact["b"])
        assert measured.norm == pytest.approx(norm, rel=1e-12)
        assert partners_of(measured) == partners
        for distance, partner in zip(measured.distances, partners, strict=True):
            expected = squared_distance(exact, values[partner], "wb")
            assert distance.squared == pytest.approx(expected, rel=1e-12)
            both = measured.rounding + found[partner].rounding
            assert distance.rounding == pytest.approx(both, rel=0.01)  # some are equal by chance


# --- rounding


@pytest.mark.parametrize(
    ("own", "dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2e-7])
def test_the_expected_rounding_is_that_of_values_that_are_rounded(
    own: torch.dtype,
    dtype: torch.dtype,
    scale: float,
) -> None:
    """This includes subnormal numbers of float16; 200,000 errors average to within 2 %."""
    exact = (draw(200_000) * scale).to(own)
    stored = exact.to(dtype)
    expected = expected_roundings(stored.double().numpy(), DTYPES[dtype], DTYPES[own])
    errors = exact.double() - stored.double()
    errors[stored == 0] = 0
    assert expected.sum() == pytest.approx(squared(errors), rel=0.02)


# --- large models


def test_estimates_of_a_large_model_are_within_their_statistical_error(tmp_path: Path) -> None:
    """The model has 3,000,000 elements of two scales. With a relative variance of 1.6, 1,000 runs
    leave about 4 %."""
    shapes = {
        "a": (1000, 1000),
        "b": (2_000_000,),
        "c": (777,),
    }
    scales = {"a": 3.0, "b": 1.0, "c": 10.0}
    models = []
    snapshots = []
    for t in (10, 20):
        tensors = {}
        for name, shape in shapes.items():
            values = scales[name] * draw(*shape)
            tensors[name] = values.half()
        models.append(tensors)
        snapshots.append(write(tmp_path, t, 0.05, tensors))
    found = sample_measurements(snapshots)
    for tensors, measured in zip(models, found, strict=True):
        flat = [values.double().reshape(-1) for values in tensors.values()]
        everything = torch.cat(flat)
        assert measured.norm == pytest.approx(squared(everything), rel=0.15)
        rounding = expected_roundings(everything.numpy(), "F16", "F32")
        assert measured.rounding == pytest.approx(rounding.sum(), rel=0.15)
    exact = squared_distance(*models, "abc")
    assert found[1].distances[0].squared == pytest.approx(exact, rel=0.15)


# --- values that cannot be measured


def test_values_too_large_to_be_squared_are_not_measured(tmp_path: Path) -> None:
    large = torch.tensor([1e200], dtype=torch.float64)
    snapshot = write(tmp_path, 10, 0.05, {"w": large})
    assert sample_measurements([snapshot]) == [None]
