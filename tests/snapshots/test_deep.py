"""Values against what was measured: whole checksums do not hide other values, and honest runs are never blamed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import read_snapshot, rewrite_snapshot
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots import deep
from posthoc_cli.snapshots.check import Verification, list_contents, verify, verify_measurements
from posthoc_cli.snapshots.deep import deep_bytes


def record(
    folder: Path, dtype: torch.dtype = torch.float32, checkpoint_dtype: str | None = "float16", **options: object
) -> Path:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30)).to(dtype)
    options = {"update_every": 1, "checkpoint_every": 10, "max_checkpoints": None, **options}
    with PostHocEMA.from_model(model, folder, checkpoint_dtype=checkpoint_dtype, **options) as tracker:
        for _ in range(60):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            tracker.update_(model)
    return folder


@pytest.fixture(scope="session")
def _recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded") / "run")


@pytest.fixture
def run(_recorded: Path, tmp_path: Path) -> Path:
    """A directory of 6 times x 2 profiles, up to step 60; a copy that may be harmed."""
    return Path(shutil.copytree(_recorded, tmp_path / "run"))


def measured(folder: Path) -> Verification:
    found = verify(list_contents(folder))
    assert found.is_fine, found
    told: list[int] = []
    result = verify_measurements(found, told.append)
    assert sum(told) == deep_bytes(found.snapshots)
    return result


def blamed(folder: Path) -> dict[str, str]:
    """Snapshots whose norm differs; where only distances do, both of a pair, with the last line about them."""
    found = measured(folder)
    wrong = {report.path.name: report.detail for report in found.files if not report.is_fine}
    assert {report.state for report in found.files} <= {"intact", "mismeasured"}
    assert {snapshot.path.name for snapshot in found.lost} == set(wrong)
    assert len(found.snapshots) + len(found.lost) == len(found.files)
    for problem in found.problems:
        told = re.fullmatch(r"the distance of (\S+) and (\S+) is (inf|[\d.e+]+), and [\d.]+ as measured", problem)
        assert told is not None, problem
        wrong |= dict.fromkeys(told.groups()[:2], problem)
    return wrong


def snapshots(run: Path) -> list[Path]:
    return sorted(run.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("dtype", "checkpoint_dtype"),
    [
        (torch.float32, "float16"), (torch.float32, "bfloat16"), (torch.float32, None), (torch.float64, None),
        (torch.float64, "float32"), (torch.bfloat16, None), (torch.float16, "float32"),
    ],
)  # fmt: skip
def test_honest_runs_are_not_blamed(tmp_path: Path, dtype: torch.dtype, checkpoint_dtype: str | None) -> None:
    assert blamed(record(tmp_path / "run", dtype, checkpoint_dtype)) == {}


def test_thinned_runs_and_other_profiles_are_not_blamed(tmp_path: Path) -> None:
    assert blamed(record(tmp_path / "thinned", max_checkpoints=3)) == {}
    assert blamed(record(tmp_path / "three", sigma_rels=(0.05, 0.1, 0.28))) == {}
    assert blamed(record(tmp_path / "one", sigma_rels=(0.1,), checkpoint_dtype=None)) == {}


def test_a_resumed_run_is_not_blamed(run: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30))
    with PostHocEMA.from_path(run, model) as tracker:
        for _ in range(30):
            tracker.update_(model)
    assert len(snapshots(run)) == 18
    assert blamed(run) == {}


def test_without_measurements_nothing_is_blamed(run: Path) -> None:
    for path in snapshots(run)[::2]:
        rewrite_snapshot(path, lambda _: None, measurements=None)
    assert blamed(run) == {}


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "scaled": lambda values: values["0.weight"].mul_(1.01),
    "one value": lambda values: values["0.weight"][7, 7].add_(1),
    "zeroed": lambda values: values["0.weight"].zero_(),
}


@pytest.mark.parametrize("which", [0, 5, 6, -1])
@pytest.mark.parametrize("change", CHANGES)
def test_other_values_with_right_checksums_are_blamed(run: Path, change: str, which: int) -> None:
    path = snapshots(run)[which]
    rewrite_snapshot(path, CHANGES[change])
    ((name, detail),) = blamed(run).items()
    assert name == path.name
    assert re.fullmatch(r"its norm is [\d.]+, and [\d.]+ as measured", detail)


@pytest.mark.parametrize("which", [0, 5, 6, -1])
def test_values_of_the_same_norm_are_told_by_their_distances(run: Path, which: int) -> None:
    path = snapshots(run)[which]
    rewrite_snapshot(path, lambda values: values.update({"0.weight": values["0.weight"].flip(0).contiguous()}))
    found = measured(run)
    assert not found.broken
    assert found.problems
    assert all(path.name in problem for problem in found.problems)


def test_what_is_thinned_away_meanwhile_hides_nothing_that_follows(run: Path) -> None:
    first, last = snapshots(run)[0], snapshots(run)[-1]
    rewrite_snapshot(last, CHANGES["scaled"])
    found = verify(list_contents(run))
    first.unlink()
    found = verify_measurements(found)
    assert [report.path for report in found.files if not report.is_fine] == [last]


def test_swapped_values_of_two_snapshots(run: Path) -> None:
    first, second = snapshots(run)[2], snapshots(run)[6]
    values = [load_file(path) for path in (first, second)]
    rewrite_snapshot(first, lambda own: own.update(values[1]))
    rewrite_snapshot(second, lambda own: own.update(values[0]))
    assert set(blamed(run)) == {first.name, second.name}


def test_what_rounding_allows_is_allowed_and_a_little_more_is_not(tmp_path: Path) -> None:
    """Along the average itself the norm moves by all of the change: the bound is met, then missed by a hair."""
    run = record(tmp_path / "run", torch.float64, None)
    path = snapshots(run)[-1]
    own = read_snapshot(path).info.measurements
    assert own is not None
    assert own.rounding == 0
    norm = sqrt(own.norm)
    for share, fine in ((0.999, True), (1.001, False)):
        rounding = (1e-6 * norm) ** 2
        change = 1 + share * 1e-6
        alone = Measurements(own.norm, rounding, own.distances)
        shutil.copytree(run, tmp_path / str(share))
        averages = read_snapshot(path).info.tensors

        def scale(values: dict[str, torch.Tensor], change: float = change, averages: object = averages) -> None:
            for name, value in values.items():
                if averages[name].role == "average":  # type: ignore[index]
                    value.mul_(change)

        rewrite_snapshot(tmp_path / str(share) / path.name, scale, measurements=alone)
        assert (path.name not in blamed(tmp_path / str(share))) == fine


def test_distances_to_earlier_ones_are_to_their_stored_copies(run: Path) -> None:
    """A distance that is off by half of the partner's rounding is no mistake of an exact one, but of a stored one."""
    path = snapshots(run)[-1]
    info = read_snapshot(path).info
    assert info.measurements is not None
    own = sqrt(info.measurements.rounding)
    for distance in info.measurements.distances:
        off = replace(distance, squared=(sqrt(distance.squared) + 1.5 * own) ** 2)
        others = tuple(off if one is distance else one for one in info.measurements.distances)
        rewrite_snapshot(path, lambda _: None, measurements=replace(info.measurements, distances=others))
        partner = read_snapshot(run / f"{int(distance.t):016d}-{distance.sigma_rel}.safetensors").info
        assert partner.measurements is not None
        allowed = own + (sqrt(partner.measurements.rounding) if distance.t == info.t else 0)
        assert (blamed(run) == {}) == (1.5 * own < allowed)


def test_values_too_large_to_be_squared_were_not_measured(tmp_path: Path) -> None:
    run = record(tmp_path / "run", torch.float64, None)
    path = snapshots(run)[-1]
    rewrite_snapshot(path, lambda values: values["0.weight"].fill_(1e300))
    assert set(blamed(run)) == {path.name}
    # The difference of two finite values may be infinite.
    rewrite_snapshot(snapshots(run)[-2], lambda values: values["0.weight"].fill_(-1.7e308))
    rewrite_snapshot(path, lambda values: values["0.weight"].fill_(1.7e308))
    assert set(blamed(run)) == {path.name, snapshots(run)[-2].name}
    for large in snapshots(run)[-2:]:
        rewrite_snapshot(large, lambda _: None, measurements=None)
    assert blamed(run) == {}


def test_memory_is_that_of_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run")
    monkeypatch.setattr(deep, "TILE", 64)
    sizes = []
    own = deep.decode_values
    monkeypatch.setattr(deep, "decode_values", lambda data, dtype: sizes.append(data.nbytes) or own(data, dtype))
    assert blamed(run) == {}
    assert max(sizes) <= 64 * 4
    assert np.sum(sizes) == deep_bytes(verify(list_contents(run)).snapshots)
