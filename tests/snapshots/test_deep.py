"""Values against what was measured: whole checksums do not hide other values, and honest runs are never blamed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
import torch
from factories import read_snapshot, rewrite_snapshot, snapshot_files
from safetensors.torch import load_file
from snapshots.recorded import Walk, record

from posthoc_cli import PostHocEMA
from posthoc_cli.snapshots import measurements as deep
from posthoc_cli.snapshots.check import Verification, list_contents, verify, verify_measurements
from posthoc_cli.snapshots.measurements import deep_bytes


@pytest.fixture(scope="session")
def _stored_in_float16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded") / "run", checkpoint_dtype="float16")


@pytest.fixture
def run(_stored_in_float16: Path, tmp_path: Path) -> Path:
    """A directory of 6 times x 2 profiles, up to step 60."""
    return Path(shutil.copytree(_stored_in_float16, tmp_path / "run"))


def measured(folder: Path) -> Verification:
    found, told = verify(list_contents(folder)), []
    assert found.is_fine, found
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


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"checkpoint_dtype": "float16"}), (torch.float32, {"checkpoint_dtype": "bfloat16"}),
        (torch.float32, {"checkpoint_dtype": None}), (torch.float64, {"checkpoint_dtype": None}),
        (torch.float64, {"checkpoint_dtype": "float32"}), (torch.bfloat16, {"checkpoint_dtype": None}),
        (torch.float16, {"checkpoint_dtype": "float32"}), (torch.float32, {"max_checkpoints": 3}),
        (torch.float32, {"sigma_rels": (0.05, 0.1, 0.28)}),
        (torch.float32, {"sigma_rels": (0.1,), "checkpoint_dtype": None}),
    ],
)  # fmt: skip
def test_honest_runs_are_not_blamed(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And memory is that of tiles."""
    monkeypatch.setattr(deep, "TILE", 64)
    own, sizes = deep.decode_values, []
    monkeypatch.setattr(deep, "decode_values", lambda data, dtype: sizes.append(data.nbytes) or own(data, dtype))
    run = record(tmp_path / "run", dtype=dtype, **options)
    assert blamed(run) == {}
    assert max(sizes) <= 64 * 8
    assert sum(sizes) == deep_bytes(verify(list_contents(run)).snapshots)


def test_a_resumed_run_is_not_blamed(run: Path) -> None:
    walk = Walk()
    with PostHocEMA.from_path(run, walk.model, step=60) as tracker:
        walk.train(tracker, 30)
    assert len(snapshot_files(run)) == 18
    assert blamed(run) == {}


def test_without_measurements_nothing_is_blamed(run: Path) -> None:
    for path in snapshot_files(run)[::2]:
        rewrite_snapshot(path, measurements=None)
    assert blamed(run) == {}


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "scaled": lambda values: values["0.weight"].mul_(1.01),
    "one value": lambda values: values["0.weight"][7, 7].add_(3),
    "zeroed": lambda values: values["0.weight"].zero_(),
}


@pytest.mark.parametrize("which", [0, 5, 6, -1])
@pytest.mark.parametrize("change", CHANGES)
def test_other_values_with_right_checksums_are_blamed(run: Path, change: str, which: int) -> None:
    path = snapshot_files(run)[which]
    rewrite_snapshot(path, CHANGES[change])
    ((name, detail),) = blamed(run).items()
    assert name == path.name
    assert re.fullmatch(r"its norm is [\d.]+, and [\d.]+ as measured", detail)


@pytest.mark.parametrize("which", [0, 5, 6, -1])
def test_values_of_the_same_norm_are_told_by_their_distances(run: Path, which: int) -> None:
    path = snapshot_files(run)[which]
    rewrite_snapshot(path, lambda values: values.update({"0.weight": values["0.weight"].flip(0).contiguous()}))
    found = measured(run)
    assert not found.broken
    assert found.problems
    assert all(path.name in problem for problem in found.problems)


def test_what_is_thinned_away_meanwhile_hides_nothing_that_follows(run: Path) -> None:
    first, last = snapshot_files(run)[0], snapshot_files(run)[-1]
    rewrite_snapshot(last, CHANGES["scaled"])
    found = verify(list_contents(run))
    first.unlink()
    found = verify_measurements(found)
    assert [report.path for report in found.files if not report.is_fine] == [last]


def test_swapped_values_of_two_snapshots(run: Path) -> None:
    first, second = snapshot_files(run)[2], snapshot_files(run)[6]
    values = [load_file(path) for path in (first, second)]
    rewrite_snapshot(first, lambda own: own.update(values[1]))
    rewrite_snapshot(second, lambda own: own.update(values[0]))
    assert set(blamed(run)) == {first.name, second.name}


@pytest.mark.parametrize(("share", "fine"), [(0.999, True), (1.001, False)])
def test_what_rounding_allows_is_allowed_and_a_little_more_is_not(tmp_path: Path, share: float, fine: bool) -> None:
    """Along the average itself the norm moves by all of the change: the bound is met, then missed by a hair."""
    run = record(tmp_path / "run", dtype=torch.float64, checkpoint_dtype=None)
    path = snapshot_files(run)[-1]
    info = read_snapshot(path).info
    assert info.measurements.rounding == 0

    def scale(values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            if info.tensors[name].role == "average":
                value.mul_(1 + share * 1e-6)

    rewrite_snapshot(path, scale, measurements=replace(info.measurements, rounding=1e-12 * info.measurements.norm))
    assert (path.name not in blamed(run)) == fine


def test_distances_to_earlier_ones_are_to_their_stored_copies(run: Path) -> None:
    """A distance that is off by half of the partner's rounding is no mistake of an exact one, but of a stored one."""
    path = snapshot_files(run)[-1]
    info = read_snapshot(path).info
    own = sqrt(info.measurements.rounding)
    for distance in info.measurements.distances:
        off = replace(distance, squared=(sqrt(distance.squared) + 1.5 * own) ** 2)
        others = tuple(off if one is distance else one for one in info.measurements.distances)
        rewrite_snapshot(path, measurements=replace(info.measurements, distances=others))
        partner = read_snapshot(run / f"{int(distance.t):016d}-{distance.sigma_rel}.safetensors").info
        assert partner.measurements is not None
        allowed = own + (sqrt(partner.measurements.rounding) if distance.t == info.t else 0)
        assert (blamed(run) == {}) == (1.5 * own < allowed)


def test_values_too_large_to_be_squared_were_not_measured(tmp_path: Path) -> None:
    run = record(tmp_path / "run", dtype=torch.float64, checkpoint_dtype=None)
    path = snapshot_files(run)[-1]
    rewrite_snapshot(path, lambda values: values["0.weight"].fill_(1e300))
    assert set(blamed(run)) == {path.name}
    # The difference of two finite values may be infinite.
    rewrite_snapshot(snapshot_files(run)[-2], lambda values: values["0.weight"].fill_(-1.7e308))
    rewrite_snapshot(path, lambda values: values["0.weight"].fill_(1.7e308))
    assert set(blamed(run)) == {path.name, snapshot_files(run)[-2].name}
    for large in snapshot_files(run)[-2:]:
        rewrite_snapshot(large, measurements=None)
    assert blamed(run) == {}
