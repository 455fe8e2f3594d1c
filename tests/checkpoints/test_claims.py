"""Files of other libraries: what their distances say of a claimed update_every, and what a sample of them measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import refused
from factories import RUN_ID, read_snapshot, write_snapshot

from posthoc_cli.checkpoints.formats import check_update_every
from posthoc_cli.profiles import Discrete, Point, StoredProfile, Uniform, gamma_from_sigma_rel
from posthoc_cli.profiles.other_libraries import ema_pytorch_profile
from posthoc_cli.reconstruction import DistanceTo, reconstruct
from posthoc_cli.snapshots.format import TrackedTensor
from posthoc_cli.snapshots.sources import FileSource, sample_measurements, source_prior

WIDTHS = (0.05, 0.28)
STEPS, EVERY = 4000, 400


@dataclass(frozen=True)
class Foreign(FileSource):
    """A file of any profile."""

    of: StoredProfile = field(kw_only=True)

    @property
    def profile(self) -> StoredProfile:
        return self.of


def walk() -> torch.Tensor:
    """Weights after each step, of a rate that falls: [steps, elements]."""
    increments = torch.randn(STEPS, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 100 + (increments * torch.linspace(1, 0.1, STEPS, dtype=torch.float64)[:, None]).cumsum(0)


def foreign(folder: Path, path: torch.Tensor, profile: StoredProfile, width: float, dtype: torch.dtype) -> Foreign:
    masses = torch.from_numpy(-np.diff(profile.tail(np.arange(STEPS + 1))))
    values, own = {"w": (masses @ path).to(dtype)}, {"w": TrackedTensor("average", "F32")}
    file = write_snapshot(folder, profile.t, width, RUN_ID, values, tensors=own, sigma_rels=WIDTHS)
    return Foreign(**vars(read_snapshot(file)), of=profile)


def profile_of(source: FileSource, every: int) -> Discrete:
    return ema_pytorch_profile(gamma_from_sigma_rel(source.info.sigma_rel), source.info.step, every)


@pytest.fixture(params=[1, 10, 50])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[int, list[Foreign]]:
    path = walk()
    return request.param, [
        foreign(
            tmp_path, path, ema_pytorch_profile(gamma_from_sigma_rel(width), step, request.param), width, torch.float16
        )
        for step in range(EVERY, STEPS + 1, EVERY)
        for width in WIDTHS
    ]


def test_a_true_claim_fits_and_a_wrong_one_is_refused(stored: tuple[int, list[Foreign]]) -> None:
    every, sources = stored
    assert next(iter(check_update_every(sources, every, profile_of))) == every
    for wrong in {1: (5, 10, 100), 10: (1, 5, 20, 100), 50: (1, 10)}[every]:
        with refused("update_every", f"{wrong}: the distances between the averages do not fit it; those of {every} do"):
            check_update_every(sources, wrong, profile_of)


def test_one_profile_or_one_time_cannot_tell(tmp_path: Path) -> None:
    path, gamma = walk(), gamma_from_sigma_rel(0.05)
    files = [
        foreign(tmp_path, path, ema_pytorch_profile(gamma, t, 10), 0.05, torch.float32) for t in (1000, 2000, 3000)
    ]
    assert check_update_every(files, 1, profile_of) == {}
    both = [files[0], foreign(tmp_path, path, profile_of(files[0], 10), 0.28, torch.float32)]
    assert check_update_every(both, 1, profile_of) == {}


def test_checkpoints_are_measured_by_a_sample(tmp_path: Path) -> None:
    """Against the values themselves; a checkpoint in the model's dtype has no rounding error."""
    path = walk()
    files = [foreign(tmp_path, path, Point(t), 0.05, torch.bfloat16) for t in (1000, 2000, 3000, 4000)]
    values = [path[t - 1].bfloat16().double() for t in (1000, 2000, 3000)]
    found = sample_measurements(files)
    assert found[0].norm == pytest.approx(float((values[0] ** 2).sum()), rel=1e-12)
    assert [one.rounding for one in found] == [0, 0, 0, 0]
    (back, next_to) = found[2].distances
    assert isinstance(back, DistanceTo)
    assert (back.other, next_to.other) == (Point(1000), Point(2000))
    assert back.squared == pytest.approx(float(((values[2] - values[0]) ** 2).sum()), rel=1e-12)
    prior = source_prior(files)
    assert prior.source == "sampled"
    made = reconstruct([file.profile for file in files], [Uniform(3000, 4000)], None, prior, 4000.0)
    assert made.coefficients[2:, 0] == pytest.approx([0.5, 0.5], abs=0.02)
