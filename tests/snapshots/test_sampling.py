"""Measurements from a sample are exact for small models and unbiased for large ones."""

from pathlib import Path

import pytest
import torch
from factories import RUN_ID, read_snapshot, write_snapshot

from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.sources import expected_roundings, sample_measurements

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def write(
    folder: Path,
    t: float,
    sigma_rel: float,
    values: dict[str, torch.Tensor],
    run_id: str = RUN_ID,
) -> Snapshot:
    """Write a snapshot of a float32 model, or of float64 if that is the stored dtype."""
    tensors = {
        n: "average F32" for n, v in values.items() if v.dtype not in (torch.int64, torch.float64)
    }
    path = write_snapshot(
        folder,
        t,
        sigma_rel,
        run_id,
        values,
        tensors=tensors,
        sigma_rels=(0.05, 0.28),
    )
    return read_snapshot(path)


def squares(*pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    return sum(float(((a.double() - b.double()) ** 2).sum()) for a, b in pairs)


# --- small models


def partners_of(measured: Measurements) -> list[tuple[float, float]]:
    """Return the time and the width of the other average of each distance."""
    powers = [distance.other for distance in measured.distances]
    return [(p.t, round(p.sigma_rel, 9)) for p in powers if isinstance(p, PowerFunction)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_smaller_than_the_sample_is_measured_exactly(
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    values = {
        (t, s): {
            "w": draw(k, 300, 7).to(dtype),
            "b": draw(k + 9, 11).to(dtype),
            "n": torch.tensor([10**9]),
        }
        for k, (t, s) in enumerate([(10, 0.05), (10, 0.28), (20, 0.05), (20, 0.28)])
    }
    snapshots = [write(tmp_path, t, s, tensors) for (t, s), tensors in values.items()]
    found = sample_measurements(snapshots)
    keys = list(values)
    partners = [[(10, 0.28)], [(10, 0.05)], [(20, 0.28), *keys[:2]], [(20, 0.05), *keys[:2]]]
    for key, measured, others in zip(keys, found, partners, strict=True):
        exact = values[key]
        assert measured.norm == pytest.approx(
            squares(*((exact[n], torch.zeros(1)) for n in "wb")), rel=1e-12
        )
        assert partners_of(measured) == others
        for distance, place in zip(measured.distances, others, strict=True):
            other = values[place]
            assert distance.squared == pytest.approx(
                squares(*((exact[n], other[n]) for n in "wb")), rel=1e-12
            )
            partner = found[keys.index(place)]
            both = measured.rounding + partner.rounding
            assert distance.rounding == pytest.approx(both, rel=0.01)  # some are equal by chance


# --- rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2e-7])
def test_the_expected_rounding_is_that_of_values_that_are_rounded(
    dtype: torch.dtype,
    scale: float,
) -> None:
    """This includes subnormal numbers of float16; 200,000 errors average to within 2 %."""
    exact = (
        (draw(1, 200_000) * scale)
        .float()
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
    )
    stored = exact.to(dtype)
    original = "F64" if dtype == torch.float64 else "F32"
    expected = expected_roundings(stored.double().numpy(), DTYPES[dtype], original).sum()
    zeros = stored == 0
    assert expected == pytest.approx(squares((exact[~zeros], stored[~zeros])), rel=0.02)


# --- large models


def test_estimates_of_a_large_model_are_within_their_statistical_error(tmp_path: Path) -> None:
    """The model has 3,000,000 elements of two scales. With a relative variance of 1.6, 1,000 runs
    leave about 4 %."""
    shapes = {"a": (1000, 1000), "b": (2_000_000,), "c": (777,)}
    scales = {"a": 3.0, "b": 1.0, "c": 10.0}
    values = {
        t: {
            name: (draw(t + k, *shape) * scales[name]).half()
            for k, (name, shape) in enumerate(shapes.items())
        }
        for t in (10, 20)
    }
    first, second = (write(tmp_path, t, 0.05, tensors) for t, tensors in values.items())
    found = sample_measurements([first, second])
    for t, measured in zip(values, found, strict=True):
        norm = squares(*((x, torch.zeros(1)) for x in values[t].values()))
        assert measured.norm == pytest.approx(norm, rel=0.15)
        rounding = sum(
            expected_roundings(x.double().reshape(-1).numpy(), "F16", "F32").sum()
            for x in values[t].values()
        )
        assert measured.rounding == pytest.approx(rounding, rel=0.15)
    exact = squares(*((values[20][n], values[10][n]) for n in shapes))
    assert found[1].distances[0].squared == pytest.approx(exact, rel=0.15)


# --- values that cannot be measured


def test_values_too_large_to_be_squared_are_not_measured(tmp_path: Path) -> None:
    snapshot = write(tmp_path, 10, 0.05, {"w": torch.tensor([1e200], dtype=torch.float64)})
    assert sample_measurements([snapshot]) == [None]
