"""Verification finds whatever is not as it was written, says which file it is, and finds nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import OTHER_RUN_ID, RUN_ID, make_info, read_snapshot, rewrite_snapshot, write_sharded, write_snapshot
from safetensors.torch import load_file, save_file

from posthoc_cli import PostHocEMA, files
from posthoc_cli.errors import DirectoryError, FileFormatError, InvalidValueError
from posthoc_cli.export.convert import export_file
from posthoc_cli.export.outputs import write_synthesis
from posthoc_cli.snapshots import check
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.check import and_more, list_contents, shortened, verify
from posthoc_cli.snapshots.directory import find_snapshots, inspect_directory
from posthoc_cli.snapshots.format import TensorSpec, TrackedTensor, TrackingSchedule, snapshot_metadata
from posthoc_cli.snapshots.measurements import decode_values
from posthoc_cli.snapshots.models import INDEX_NAME, read_index
from posthoc_cli.snapshots.payload import check_payload, holds_nonfinite, verify_payload
from posthoc_cli.snapshots.reader import TensorFile, read_header
from posthoc_cli.snapshots.reports import Verification
from posthoc_cli.snapshots.tensors import stored_name, tensor_bytes
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.plan import plan_synthesis
from posthoc_cli.synthesis.sources import disk_sources


@pytest.fixture(scope="session")
def _recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "run"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20))
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=10, max_checkpoints=None) as tracker:
        for _ in range(60):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            tracker.update_(model)
        tracker.save_state(folder / "state.safetensors")
    return folder


@pytest.fixture
def run(_recorded: Path, tmp_path: Path) -> Path:
    """A directory of 6 times x 2 profiles, up to step 60, and a state; a copy that may be harmed."""
    return Path(shutil.copytree(_recorded, tmp_path / "run"))


@pytest.fixture
def output(run: Path, tmp_path: Path) -> Path:
    """A synthesis from it."""
    write_synthesis(plan_synthesis(disk_sources(run), [0.1]), [tmp_path / "output.safetensors"])
    return tmp_path / "output.safetensors"


@pytest.fixture
def shards(output: Path, tmp_path: Path) -> Path:
    """The same in three shards."""
    export_file(output, tmp_path / "shards", max_shard_size="1KB")
    return tmp_path / "shards"


def verified(path: Path) -> Verification:
    return verify(list_contents(path))


def wrong(path: Path) -> dict[str, tuple[str, str]]:
    """State and detail of what is not fine, by name."""
    found = verified(path)
    assert found.is_fine == (not found.broken) or found.problems
    return {report.path.name: (report.state, report.detail) for report in found.files if not report.is_fine}


def snapshots(run: Path) -> list[Path]:
    return sorted(run.glob("0*.safetensors"))


def flip(path: Path, position: int, bit: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


# --- what is whole ---------------------------------------------------------------------------------


def test_a_run_is_whole_and_each_file_has_its_line(run: Path) -> None:
    found = verified(run)
    assert found.is_fine
    assert found.notes == ()
    assert [report.path for report in found.files] == sorted(run.glob("*.safetensors"))
    assert found.files[0].what == "snapshot sigma_rel 0.05 at t = 10"
    assert found.files[-1].what == "state at t = 60"
    assert {report.run_id for report in found.files} == {read_snapshot(found.files[0].path).info.run_id}
    assert {(report.state, report.detail, report.notes) for report in found.files} == {("whole", "", ())}
    assert found.nbytes == sum(
        entry.nbytes for path in run.glob("*.safetensors") for entry in read_header(path).tensors.values()
    )
    assert [s.path for s in found.snapshots] == [s.path for s in find_snapshots(run)]


def test_outputs_in_any_layout_and_foreign_files(run: Path, output: Path, shards: Path, tmp_path: Path) -> None:
    for path in (output, shards, shards / INDEX_NAME, next(shards.glob("*.safetensors")), run / "state.safetensors"):
        found = verified(path)
        assert found.is_fine, found
        assert {report.state for report in found.files} == {"whole"}
    assert verified(shards).files[0].what == "index of output sigma_rel 0.1 at t = 60"
    assert len(verified(shards / INDEX_NAME).files) == len(list(shards.iterdir())) > 2
    save_file({"w": torch.full((3,), torch.nan)}, tmp_path / "foreign.safetensors")
    found = verified(tmp_path / "foreign.safetensors")
    assert (found.files[0].what, found.files[0].state, found.is_fine) == ("foreign", "unchecked", True)
    assert found.notes == ("foreign.safetensors: tensor 'w' holds nan or infinity",)
    assert verified(tmp_path).is_fine  # all of it, the folder of shards too
    assert len(verified(tmp_path).files) == 2 + len(list(shards.iterdir()))


def test_progress_is_told_all_bytes(run: Path, shards: Path) -> None:
    for path in (run, shards):
        told: list[int] = []
        found = verify(list_contents(path), told.append)
        assert sum(told) == found.nbytes > 0


def test_a_payload_is_read_once_from_beginning_to_end_whatever_its_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 3, 1_000_000, 2**21, 2**21 + 1, 5_000_000, *[7] * 2000, 1_048_575]
    values = {f"{k}": torch.randn(size, generator=generator).half() for k, size in enumerate(sizes)}
    values |= {"wide": torch.randn(300_001, generator=generator), "n": torch.tensor(3)}
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, values)
    header = read_header(path)
    told: list[int] = []
    verify_payload(path, header, told.append)
    assert sum(told) == sum(value.nbytes for value in values.values())
    assert max(told) <= fmt.BLOCK_BYTES
    harmed = ["5", "6", "1500", "wide"]
    data = bytearray(path.read_bytes())
    for name in harmed:
        data[header.payload_start + header.tensors[name].begin + header.tensors[name].nbytes - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"is damaged: its checksum"):
        verify_payload(path, header)
    with TensorFile(path) as file:
        assert {name for found in check_payload(file) for name in found.damaged} == set(harmed)
    assert "(and 3 tensors more)" in wrong(path)[path.name][1]


def test_a_file_that_shrinks_while_it_is_read_is_damaged_from_there_on(tmp_path: Path) -> None:
    values = {name: torch.ones(1_000_000) for name in "abc"}
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, values)
    header = read_header(path)
    with TensorFile(path) as file:
        os.truncate(path, header.payload_start + header.tensors["b"].begin + 8)
        found = list(check_payload(file))
    assert sum(checked.nbytes for checked in found) == 12_000_000
    assert {name for checked in found for name in checked.damaged} == {"b", "c"}
    assert all(str(path) in checked.reason for checked in found if checked.damaged)
    assert not any(checked.reason for checked in found if not checked.damaged)


# --- every byte ------------------------------------------------------------------------------------


def _found_at_every_byte(path: Path, place: Path, strides: int = 1) -> None:
    data = path.read_bytes()
    for position in range(0, len(data), strides):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position * 5 % 8)
        path.write_bytes(flipped)
        found = verified(place)
        assert not found.is_fine, position
        assert path.name in {report.path.name for report in found.files if not report.is_fine}, position
    path.write_bytes(data)
    assert verified(place).is_fine


def test_a_flip_anywhere_is_found(run: Path, output: Path) -> None:
    for path in (snapshots(run)[0], output, run / "state.safetensors"):
        _found_at_every_byte(path, path, strides=11)


def test_a_flip_in_a_shard_or_in_the_index_is_found(shards: Path) -> None:
    _found_at_every_byte(next(shards.glob("*.safetensors")), shards, strides=7)
    index = shards / INDEX_NAME
    data = index.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 7)
        index.write_bytes(flipped)
        assert not verified(shards).is_fine or json.loads(flipped) == json.loads(data), (position, bytes(flipped))


@pytest.mark.parametrize("which", ["snapshot", "output", "state", "index"])
def test_a_truncation_anywhere_and_bytes_behind_are_found(run: Path, output: Path, shards: Path, which: str) -> None:
    paths = {"snapshot": snapshots(run)[3], "output": output, "state": run / "state.safetensors"}
    path = paths.get(which, shards / INDEX_NAME)
    data = path.read_bytes()
    for length in range(0, len(data) - 1, max(1, len(data) // 150)):
        path.write_bytes(data[:length])
        assert path.name in wrong(path), length
    path.write_bytes(data + b"x")
    assert path.name in wrong(path)


def test_a_truncated_file_still_says_what_it_was(run: Path) -> None:
    path = snapshots(run)[0]
    os.truncate(path, path.stat().st_size - 1)
    (report,) = (r for r in verified(run).files if not r.is_fine)
    assert report.what == "snapshot sigma_rel 0.05 at t = 10"
    assert report.detail.startswith("truncated: has ")
    os.truncate(path, 100)
    (report,) = (r for r in verified(run).files if not r.is_fine)
    assert report.what == "snapshot, by its name"


# --- headers against content, and each other -------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_named_with_its_average(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    values = {"a": torch.ones(5, dtype=dtype), "b": torch.ones(3, 7, dtype=dtype), "n": torch.ones(2)}
    values["b"][1, 3] = value
    values["n"][0] = np.nan
    tensors = {"a": "average", "b": "average", "n": "copy"}
    roles = {name: TrackedTensor(role, stored_name(values[name].dtype)) for name, role in tensors.items()}
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, values, tensors=roles)
    assert wrong(path) == {path.name: ("nonfinite", "average 'b' holds nan or infinity")}
    values["b"][1, 3] = -torch.finfo(dtype).max
    other = write_snapshot(tmp_path, 20, 0.05, RUN_ID, values, tensors=roles)
    found = verified(other)
    assert found.is_fine
    assert found.notes == (f"{other.name}: copy 'n' holds nan or infinity",)


@pytest.mark.parametrize("size", [3, 2_000_000])
def test_all_that_is_wrong_is_counted_wherever_it_lies(tmp_path: Path, size: int) -> None:
    """In one block and in several; a file that is damaged and holds nan is damaged."""
    values = {name: torch.full((size,), torch.nan if name in "bcd" else 1.0) for name in "abcde"}
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, values)
    assert wrong(path) == {path.name: ("nonfinite", "average 'b' holds nan or infinity (and 2 averages more)")}
    data = bytearray(path.read_bytes())
    header = read_header(path)
    for name in "ae":
        data[header.payload_start + header.tensors[name].begin + 2] ^= 1
    path.write_bytes(data)
    ((state, detail),) = wrong(path).values()
    assert (state, detail.endswith(" (and 1 tensor more)")) == ("damaged", True)
    assert detail.startswith("tensor 'a' is damaged: ")
    (report,) = verified(path).files
    assert (report.what, report.kind, report.nbytes) == ("snapshot sigma_rel 0.05 at t = 10", "snapshot", 20 * size)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_what_is_finite_is_told_from_the_bits(dtype: str) -> None:
    """Against numbers that were decoded: all of 8 and 16 bits, many of the others, the edges among them."""
    item = fmt.ITEM_BYTES[dtype]
    if item <= 2:
        bits = np.arange(2 ** (8 * item), dtype=f"<u{item}")
    else:
        edge = {8: 0x7FF << 52, 4: 0xFF << 23}[item]
        sign = 1 << (8 * item - 1)
        edges = [edge - 1, edge, edge + 1, sign | (edge - 1), sign | edge, 2 * sign - 1, sign - 1, 0, sign]
        random = np.random.default_rng(0).integers(0, 2**63, 3000, dtype=np.uint64) * 2 + 1
        bits = np.concatenate([np.array(edges, dtype=np.uint64), random]).astype(f"<u{item}")
    finite = np.isfinite(decode_values(bits.view(np.uint8), dtype))
    found = [holds_nonfinite(memoryview(one.tobytes()), dtype) for one in bits]
    assert found == list(~finite)
    assert 0 < sum(found) < len(found)
    assert not holds_nonfinite(memoryview(bits[finite].tobytes()), dtype)
    assert not holds_nonfinite(memoryview(b"\xff" * 8), "I64")
    assert not holds_nonfinite(memoryview(b""), dtype)


def write_anew(path: Path, values: dict[str, torch.Tensor], **changed: str) -> None:
    """Write a file of any kind anew, with right checksums and other values or metadata."""
    metadata = read_header(path).metadata | {f"ema.{key}": text for key, text in changed.items()}
    metadata = {k: v for k, v in metadata.items() if k not in ("ema.checksum", "ema.checksums")}
    specs = [TensorSpec(key, stored_name(value.dtype), tuple(value.shape)) for key, value in values.items()]
    with TensorFileWriter(path, specs, metadata, overwrite=True) as writer:
        for key, value in values.items():
            writer.write(key, tensor_bytes(value))
        writer.commit()


def test_nan_in_an_output_and_in_a_state_is_named(run: Path, output: Path) -> None:
    for path, name in ((output, "0.weight"), (run / "state.safetensors", "0.05/0.weight")):
        values = load_file(path)
        values[name][2, 2] = np.nan
        write_anew(path, values)
        assert wrong(path) == {path.name: ("nonfinite", f"average {name!r} holds nan or infinity")}


def test_nan_in_copies_is_noted(run: Path, output: Path) -> None:
    for path in (output, run / "state.safetensors"):
        values = load_file(path)
        first, second = sorted(name for name in values if "running" in name)
        values[first][2] = values[second][3] = np.nan
        write_anew(path, values)
        found = verified(path)
        assert found.is_fine
        assert found.notes == (f"{path.name}: copy {first!r} holds nan or infinity (and 1 tensor more)",)


def test_a_state_whose_profiles_differ_contradicts_itself(run: Path) -> None:
    path = run / "state.safetensors"
    values = load_file(path)
    for change, said in (
        ({"0.05/0.bias": torch.zeros(4)}, "tensor '0.bias' is not the same in 0.05 and 0.28"),
        ({"0.07/0.bias": torch.zeros(4)}, "tensor '0.07/0.bias' is of no profile that the state has"),
    ):
        write_anew(path, values | change)
        assert wrong(path) == {path.name: ("damaged", said)}


@pytest.mark.parametrize(
    ("kind", "key", "text", "said"),
    [
        ("snapshot", "t", "-1.0", "t -1, first update 1, step 10: not a time of training"),
        ("output", "t", "-1.0", "ema.t: -1 is not a time of training"),
        ("output", "t", "1e300", "ema.t: 1e+300 is not a time of training"),
        ("output", "sigma_rel", "0", "ema.sigma_rel: 0 is not above 0"),
        ("output", "profile_error", "-0.1", "ema.profile_error: -0.1 is below 0"),
        ("output", "predicted_error", "-1e-9", "ema.predicted_error: -1e-09 is below 0"),
        ("state", "t", "-1.0", "t -1.0, step 60, averages at 60.0 since 1.0: not times of one training"),
        ("state", "averages_step", "61", "t 60.0, step 60, averages at 60.0 since 1.0: not times of one training"),
        ("state", "step", "61", "clock: ends at step 60, t 60.0; the training is at step 61, t 60.0"),
    ],
)
def test_numbers_that_no_training_has_are_told_without_the_files_own_name(
    run: Path, output: Path, kind: str, key: str, text: str, said: str
) -> None:
    path = {"snapshot": snapshots(run)[0], "output": output, "state": run / "state.safetensors"}[kind]
    write_anew(path, load_file(path), **{key: text})
    assert wrong(path) == {path.name: ("damaged", said)}


def test_the_fewer_ones_are_the_strangers(run: Path) -> None:
    first = snapshots(run)[0]
    rewrite_snapshot(first, run_id=OTHER_RUN_ID)
    last = snapshots(run)[-1]
    rewrite_snapshot(last, lambda values: values.update({"0.weight": values["0.weight"].T.contiguous()}))
    found = wrong(run)
    assert set(found) == {first.name, last.name}
    assert found[first.name] == (
        "mismatched",
        f"it and {snapshots(run)[1].name} are of different runs ({OTHER_RUN_ID[:8]} and "
        f"{read_snapshot(last).info.run_id[:8]}); keep one run a directory",
    )
    assert found[last.name][0] == "mismatched"
    assert "'0.weight' has the shapes [20, 30] and [30, 20]" in found[last.name][1]


HARMS: dict[str, Callable[[Path], object]] = {
    "unit": lambda path: rewrite_snapshot(path, t_unit="images"),
    "profiles": lambda path: rewrite_snapshot(
        path, sigma_rels=tuple(sorted({0.07, read_snapshot(path).info.sigma_rel})), measurements=None
    ),
    "names": lambda path: rewrite_snapshot(
        path,
        lambda values: values.update({"more": torch.ones(2)}),
        tensors=read_snapshot(path).info.tensors | {"more": TrackedTensor("average", "F32")},
    ),
    "own dtype": lambda path: rewrite_snapshot(
        path, tensors=read_snapshot(path).info.tensors | {"0.bias": TrackedTensor("average", "F64")}
    ),
    "tied": lambda path: rewrite_snapshot(path, aliases={"tied": "0.bias"}),
    "segment": lambda path: rewrite_snapshot(path, segment=1),
}


@pytest.mark.parametrize("which", [0, 5, -1])
@pytest.mark.parametrize("harm", HARMS)
def test_what_no_reader_would_take_together_is_told_apart(run: Path, harm: str, which: int) -> None:
    path = snapshots(run)[which]
    HARMS[harm](path)
    assert {name: state for name, (state, _) in wrong(run).items()} == {path.name: "mismatched"}
    assert [s.path for s in verified(run).snapshots] == [p for p in snapshots(run) if p != path]
    path.unlink()
    assert len(find_snapshots(run)) == 11


def test_halves_of_two_runs_the_older_one_is_the_stranger(tmp_path: Path) -> None:
    for t, run_id in ((10, RUN_ID), (20, RUN_ID), (30, OTHER_RUN_ID), (40, OTHER_RUN_ID)):
        write_snapshot(tmp_path, t, 0.05, run_id, {"w": torch.ones(3)})
    assert [name[:16].lstrip("0") for name in wrong(tmp_path)] == ["10", "20"]


def test_a_run_that_went_on_without_a_profile_is_one(tmp_path: Path) -> None:
    """Profiles may be left behind, one after the other; another one may not come."""
    tracked = {10: (0.05, 0.1, 0.28), 20: (0.05, 0.1, 0.28), 30: (0.05, 0.28), 40: (0.28,)}
    for t, sigma_rels in tracked.items():
        for sigma_rel in sigma_rels:
            write_snapshot(tmp_path, t, sigma_rel, RUN_ID, {"w": torch.ones(3)}, sigma_rels=sigma_rels)
    assert verified(tmp_path).is_fine
    stranger = write_snapshot(tmp_path, 50, 0.28, RUN_ID, {"w": torch.ones(3)}, sigma_rels=(0.07, 0.28))
    assert {name: state for name, (state, _) in wrong(tmp_path).items()} == {stranger.name: "mismatched"}
    assert "0.07" in wrong(tmp_path)[stranger.name][1]


def test_of_segments_out_of_order_the_smaller_ones_are_the_strangers(tmp_path: Path) -> None:
    at = {}
    for t, segment in ((10, 0), (20, 0), (30, 0), (40, 0), (25, 1), (45, 1), (35, 2), (50, 3), (60, 3)):
        at[t] = write_snapshot(tmp_path, t, 0.05, RUN_ID, {"w": torch.ones(3)}, segment=segment).name
    assert wrong(tmp_path) == {
        at[t]: ("mismatched", f"{names} do not match: the segments {segment} and 0 do not follow each other in time")
        for t, segment, names in (
            (25, 1, f"it and {at[40]}"),
            (45, 1, f"{at[25]} and {at[40]}"),
            (35, 2, f"it and {at[40]}"),
        )
    }


def test_what_is_there_a_second_time_or_of_another_run_is_not_lost(run: Path, tmp_path: Path) -> None:
    first = snapshots(run)[0]
    again = shutil.copy(first, run / "again.safetensors")
    stranger = write_snapshot(tmp_path / "other", 5, 0.05, OTHER_RUN_ID, {"w": torch.ones(300)})
    stranger = Path(shutil.copy(stranger, run))
    for path in (again, stranger):
        flip(path, -1)
    assert verified(run).lost == ()
    flip(first, -1)
    assert [s.path for s in verified(run).lost] == [first, again]


def test_a_file_is_no_directory(run: Path, shards: Path) -> None:
    for path in (snapshots(run)[0], shards / INDEX_NAME):
        assert list_contents(path).is_directory is False
    (shards / "loose.safetensors").write_text("x")
    loose = next(unit for unit in list_contents(shards).units if unit.path.name == "loose.safetensors")
    assert (loose.files, loose.index) == ((loose.path,), None)


def test_contradicting_clocks_are_a_problem_of_all(tmp_path: Path) -> None:
    for t, step in ((10.0, 3), (20.0, 2)):
        info = {"t_unit": "images", "step": step, "clock": ((step, t),)}
        write_snapshot(tmp_path, t, 0.05, RUN_ID, {"w": torch.ones(3)}, **info)
    found = verified(tmp_path)
    assert not found.broken
    assert not found.is_fine
    assert "not of one training" in found.problems[0]


def test_copies_and_rivals_of_a_snapshot(run: Path) -> None:
    first, second = snapshots(run)[:2]
    shutil.copy(first, run / "a-backup.safetensors")
    (run / "link.safetensors").symlink_to(first)
    assert wrong(run) == {
        "a-backup.safetensors": ("duplicate", f"a copy of {first.name}"),
        "link.safetensors": ("duplicate", f"a copy of {first.name}"),
    }
    newest = shutil.copy(snapshots(run)[-1], run / "newest.safetensors")
    rewrite_snapshot(newest, lambda values: values["0.bias"].add_(1))
    found = verified(run)
    assert found.notes == ()  # none is missing at the newest time
    assert len(found.snapshots) == 11
    newest.unlink()
    shutil.copy(second, run / "rival.safetensors")
    rewrite_snapshot(run / "rival.safetensors", lambda values: values["0.bias"].add_(1))
    found = wrong(run)
    assert found["rival.safetensors"] == (
        "conflicting", f"{second.name} holds other values of the same profile and time; remove one of them",
    )  # fmt: skip
    assert found[second.name] == (
        "conflicting", "rival.safetensors holds other values of the same profile and time; remove one of them",
    )  # fmt: skip


def test_swapped_names_are_noted_since_headers_are_believed(run: Path) -> None:
    first, other = snapshots(run)[0], snapshots(run)[4]
    first.rename(run / "x")
    other.rename(first)
    (run / "x").rename(other)
    found = verified(run)
    assert found.is_fine
    assert found.notes == (
        f"{first.name}: its name says otherwise: it holds sigma_rel 0.05 at t = 30",
        f"{other.name}: its name says otherwise: it holds sigma_rel 0.05 at t = 10",
    )


def test_kinds_and_versions_of_the_future_are_not_called_damaged(tmp_path: Path) -> None:
    for key, value in (("ema.version", "2"), ("ema.format", "hologram")):
        path = tmp_path / f"{key}.safetensors"
        metadata = snapshot_metadata(make_info({"w": torch.ones(2)})) | {key: value}
        with TensorFileWriter(path, [TensorSpec("w", "F32", (2,))], metadata) as writer:
            writer.write("w", tensor_bytes(torch.ones(2)))
            writer.commit()
        ((state, detail),) = wrong(path).values()
        assert state == "unsupported"
        assert value in detail


# --- gaps ------------------------------------------------------------------------------------------


def test_times_that_were_due_are_noted(run: Path) -> None:
    for path in snapshots(run)[2:6:2]:  # sigma_rel 0.05 at 20 and 30
        path.unlink()
    snapshots(run)[-1].unlink()
    found = verified(run)
    assert found.is_fine
    assert found.notes == (
        "t = 60, the newest: no snapshot of sigma_rel 0.28",
        "sigma_rel 0.05: no snapshot at 2 times from step 20 to 30, where the schedule had one",
    )


def test_fewer_than_thinning_leaves_are_noted(tmp_path: Path) -> None:
    schedule = TrackingSchedule(update_every=1, checkpoint_every=10, max_checkpoints=3)
    for t in (30, 60):
        write_snapshot(tmp_path, t, 0.05, RUN_ID, {"w": torch.ones(3)}, schedule=schedule)
    write_snapshot(tmp_path, 65, 0.05, RUN_ID, {"w": torch.ones(3)}, schedule=schedule, off_schedule=True)
    assert verified(tmp_path).notes == ("sigma_rel 0.05: 2 snapshots of the 3 that thinning would have left",)
    write_snapshot(tmp_path, 50, 0.05, RUN_ID, {"w": torch.ones(3)}, schedule=schedule)
    assert verified(tmp_path).notes == ()
    other = replace(schedule, max_checkpoints=20)  # raised in mid-run: nobody knows how many were due then
    write_snapshot(tmp_path, 70, 0.05, RUN_ID, {"w": torch.ones(3)}, schedule=other)
    assert verified(tmp_path).notes == ()


@pytest.mark.parametrize(
    ("after", "times", "missing"),
    [
        (0, [50], "1 snapshot of the 5"), (25, [50], "1 snapshot of the 3"), (30, [50], "1 snapshot of the 2"),
        (39, [50], "1 snapshot of the 2"), (40, [50], None), (0, [55], "1 snapshot of the 5"), (30, [45, 59], None),
    ],
)  # fmt: skip
def test_what_was_due_begins_with_the_first_update(
    tmp_path: Path, after: int, times: list[int], missing: str | None
) -> None:
    schedule = TrackingSchedule(update_every=1, checkpoint_every=10, max_checkpoints=9, update_after_step=after)
    for t in times:
        write_snapshot(tmp_path, t, 0.05, RUN_ID, {"w": torch.ones(3)}, schedule=schedule, t_first=40.0)
    expected = () if missing is None else (f"sigma_rel 0.05: {missing} that thinning would have left",)
    assert verified(tmp_path).notes == expected


def test_a_limit_that_was_lifted_or_set_in_mid_run_tells_nothing_of_what_was_due(tmp_path: Path) -> None:
    schedule = TrackingSchedule(update_every=1, checkpoint_every=10, max_checkpoints=None)
    for folder, limits in (("lifted", (9, None)), ("set", (None, 9))):
        for t, most in zip((10, 40), limits, strict=True):
            own = replace(schedule, max_checkpoints=most)
            write_snapshot(tmp_path / folder, t, 0.05, RUN_ID, {"w": torch.ones(3)}, schedule=own)
        assert verified(tmp_path / folder).notes == ()


def test_a_schedule_of_a_stranger_costs_no_time(tmp_path: Path) -> None:
    schedule = TrackingSchedule(update_every=1, checkpoint_every=1, max_checkpoints=None)
    for step in (1, 10**17):
        write_snapshot(tmp_path, step, 0.05, RUN_ID, {"w": torch.ones(3)}, schedule=schedule)
    assert "at 99,999,999,999,999,998 times" in verified(tmp_path).notes[0]


# --- shards ----------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two snapshots in two files each."""
    values = {"a": torch.arange(6.0), "b": torch.ones(4)}
    for t in (10, 20):
        info = make_info(values, t, sigma_rels=(0.05,))
        write_sharded(tmp_path / f"sharded/{t}", info, [{name: value} for name, value in values.items()])
    return tmp_path / "sharded"


def test_sharded_snapshots(sharded: Path) -> None:
    found = verified(sharded)
    assert found.is_fine
    assert [report.what for report in found.files[:2]] == [
        "index of snapshot sigma_rel 0.05 at t = 10", "shard of snapshot sigma_rel 0.05 at t = 10",
    ]  # fmt: skip
    assert len(found.snapshots) == 2
    assert verified(sharded / "10").is_fine
    second = sorted((sharded / "10").glob("*.safetensors"))[1]
    flip(second, -1)
    found = verified(sharded)
    assert found.broken == (sharded / "10",)
    assert [s.path.name for s in found.snapshots] == ["20"]
    assert [s.path.name for s in found.lost] == ["10"]
    second.unlink()
    assert wrong(sharded) == {second.name: ("missing", f"{INDEX_NAME} names it")}


def test_shards_of_two_snapshots_and_an_index_that_lies(sharded: Path) -> None:
    first, second = sorted((sharded / "10").glob("*.safetensors"))
    kept = second.read_bytes()
    shutil.copy(sharded / "20" / second.name, second)
    ((state, detail),) = wrong(sharded).values()
    assert state == "mismatched"
    assert "are not of one snapshot: their t are 10.0 and 20.0" in detail
    second.write_bytes(kept)
    index = sharded / "10" / INDEX_NAME
    changed = json.loads(index.read_text())
    changed["weight_map"]["b"] = first.name
    index.write_text(json.dumps(changed))
    assert wrong(sharded)[first.name] == ("mismatched", f"tensor 'b' is not in it, as {INDEX_NAME} says")
    changed["weight_map"]["b"] = second.name
    changed["metadata"]["total_size"] += 1
    index.write_text(json.dumps(changed))
    assert wrong(sharded) == {INDEX_NAME: ("damaged", "its total_size is 41; the shards hold 40 bytes")}
    changed["metadata"]["total_size"] = 10**4000
    index.write_text(json.dumps(changed))
    told = "its total_size is an int of many digits; the shards hold 40 bytes"
    assert wrong(sharded) == {INDEX_NAME: ("damaged", told)}
    del changed["metadata"]["total_size"]
    index.write_text(json.dumps(changed))
    assert wrong(sharded) == {INDEX_NAME: ("damaged", "its total_size is missing; the shards hold 40 bytes")}
    index.write_text("{}")
    assert wrong(sharded)[INDEX_NAME] == ("damaged", "is not an index of shards: it has no weight_map")
    index.write_text('{"weight_map": {}}')
    assert wrong(sharded)[INDEX_NAME] == ("damaged", "names no shard")
    index.write_text("{}")
    assert len(verified(sharded).files) == 6


def test_a_shard_may_not_hold_more_than_its_index_names(sharded: Path) -> None:
    values = {"a": torch.arange(6.0), "b": torch.ones(4), "c": torch.ones(2)}
    folder = write_sharded(sharded / "30", make_info(values, 30), [{"a": values["a"]}, {n: values[n] for n in "bc"}])
    index = folder / INDEX_NAME
    changed = json.loads(index.read_text())
    last = changed["weight_map"].pop("c")
    index.write_text(json.dumps(changed))
    assert wrong(folder) == {last: ("mismatched", f"tensor 'c' is in it, and not in {INDEX_NAME}")}


def test_an_index_is_of_the_kind_and_the_run_of_its_shards(sharded: Path, shards: Path, run: Path) -> None:
    for folder, kind, run_id in ((sharded / "10", "snapshot", RUN_ID), (shards, "output", None)):
        found = verified(folder)
        assert found.files[0].path == folder / INDEX_NAME
        assert {report.kind for report in found.files} == {kind}
        assert len({report.run_id for report in found.files}) == 1
        assert run_id is None or found.files[0].run_id == run_id
    for shard in (sharded / "10").glob("*.safetensors"):
        shard.unlink()
    report = next(report for report in verified(sharded / "10").files if report.path.name == INDEX_NAME)
    assert (report.what, report.kind) == ("index", None)


def test_an_index_that_goes_while_it_is_looked_for_is_passed_over(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(index: Path) -> dict[str, list[str]]:
        if index.parent.name == "10":
            index.unlink()
        return read_index(index)

    monkeypatch.setattr(check, "read_index", gone)
    found = verify(list_contents(sharded))
    assert found.is_fine
    assert {report.unit.name for report in found.files} == {"20"}


def test_shards_of_two_outputs(run: Path, shards: Path, tmp_path: Path) -> None:
    write_synthesis(plan_synthesis(disk_sources(run), [0.2]), [tmp_path / "other.safetensors"])
    export_file(tmp_path / "other.safetensors", tmp_path / "others", max_shard_size="1KB")
    name = min(path.name for path in shards.glob("*.safetensors"))
    shutil.copy(tmp_path / "others" / name, shards / name)
    ((state, detail),) = wrong(shards).values()
    assert state == "mismatched"
    assert "their ema.profile are sigma_rel 0.2 and sigma_rel 0.1" in detail


def test_the_last_shard_is_of_another_output(run: Path, shards: Path, tmp_path: Path) -> None:
    """The message names the two, and what differs."""
    write_synthesis(plan_synthesis(disk_sources(run), [0.2]), [tmp_path / "other.safetensors"])
    export_file(tmp_path / "other.safetensors", tmp_path / "others", max_shard_size="1KB")
    first, *_, last = sorted(path.name for path in shards.glob("*.safetensors"))
    shutil.copy(tmp_path / "others" / last, shards / last)
    assert wrong(shards) == {
        INDEX_NAME: (
            "mismatched",
            f"{first} and {last} are not of one output: their ema.profile are sigma_rel 0.1 and sigma_rel 0.2",
        )
    }


def test_shards_of_two_kinds(run: Path, shards: Path) -> None:
    """A snapshot's values under the name of a shard that has the same tensors."""
    first, *_, last = sorted(shards.glob("*.safetensors"))
    names = set(load_file(last))
    info, values = read_snapshot(snapshots(run)[0]).info, load_file(snapshots(run)[0])
    tensors = {name: tensor for name, tensor in info.tensors.items() if name in names}
    folder = write_sharded(shards.parent / "part", replace(info, tensors=tensors), [{n: values[n] for n in tensors}])
    shutil.copy(next(folder.glob("*.safetensors")), last)
    ((state, detail),) = wrong(shards).values()
    assert state == "mismatched"
    assert detail.startswith(f"{first.name} and {last.name} are not of one model: output sigma_rel 0.1")
    assert detail.endswith(", and snapshot sigma_rel 0.05 at t = 10")


def test_shards_of_other_libraries_are_told_apart_from_checked_ones(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"w{number}": torch.ones(3)}, tmp_path / f"model-{number:05d}-of-00002.safetensors")
    names = {f"w{number}": f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": names}))
    found = verified(tmp_path)
    assert found.is_fine
    assert [(report.path.name, report.what, report.state, report.detail) for report in found.files] == [
        (INDEX_NAME, "index", "unchecked", ""),
        *((name, "foreign", "unchecked", "") for name in names.values()),
    ]
    (tmp_path / names["w2"]).unlink()
    assert wrong(tmp_path) == {names["w2"]: ("missing", f"{INDEX_NAME} names it")}


def test_an_index_that_went_with_all_its_shards_is_passed_over(sharded: Path) -> None:
    listed = list_contents(sharded)
    (sharded / "10" / INDEX_NAME).unlink()
    found = verify(listed)
    assert found.is_fine
    assert {report.unit.name for report in found.files} == {"20"}


# --- what the system says --------------------------------------------------------------------------


def test_a_file_that_may_not_be_read_is_said_so_and_the_others_go_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, broken = snapshots(run)[:2]
    own = files.system.open

    def refuse(path: Path) -> int:
        if path in (refused, broken):
            code = errno.EACCES if path == refused else errno.EIO
            raise OSError(code, os.strerror(code))
        return own(path)

    monkeypatch.setattr(files.system, "open", refuse)
    assert wrong(run) == {
        refused.name: ("unreadable", "cannot be opened: permission denied"),
        broken.name: ("damaged", "cannot be opened: input/output error"),
    }


def out_of_reach(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Folders that may not be entered; whoever runs the tests may enter any."""
    lstat, stat, own = Path.lstat, Path.stat, files.system.list

    def refuse(path: Path) -> None:
        if any(folder in path.parents for folder in folders):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def list_(path: Path) -> list[Path]:
        refuse(path / "x")
        return own(path)

    monkeypatch.setattr(Path, "lstat", lambda path: (refuse(path), lstat(path))[1])
    monkeypatch.setattr(Path, "stat", lambda path, **options: (refuse(path), stat(path, **options))[1])
    monkeypatch.setattr(files.system, "list", list_)


def test_folders_that_cannot_be_entered_are_noted_and_the_rest_is_verified(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("closed", "superseded", "quarantine"):
        (run / name).mkdir()
    out_of_reach(monkeypatch, run / "closed", run / "superseded")
    found = verified(run)
    assert found.is_fine
    assert len(found.files) == 13
    said = "closed/ cannot be entered; whether it is a snapshot is not known"
    assert found.notes == ("superseded/ cannot be read; not looked at", said)
    assert len(find_snapshots(run)) == 12
    assert caplog.messages == [f"{run}: {said}"]
    assert inspect_directory(run).superseded == 0


def test_what_cannot_be_reached_has_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.is_gone(tmp_path / "x")
    (tmp_path / "x").write_text("x")
    assert not files.is_gone(tmp_path / "x")
    assert files.is_gone(tmp_path / "x" / "y")
    out_of_reach(monkeypatch, tmp_path)
    assert not files.is_gone(tmp_path / "x")
    assert not files.is_gone(tmp_path / "z")


def test_what_is_no_regular_file_is_said_so(run: Path, tmp_path: Path) -> None:
    os.mkfifo(run / "fifo.safetensors")
    (run / "folder.safetensors").mkdir()
    (run / "zero.safetensors").symlink_to("/dev/zero")
    (run / "nowhere.safetensors").symlink_to(tmp_path / "nowhere")
    (run / "loop.safetensors").symlink_to("loop.safetensors")
    found = wrong(run)
    assert {state for state, _ in found.values()} == {"damaged"}
    assert found["fifo.safetensors"][1] == found["zero.safetensors"][1] == "is not a regular file"
    assert set(found) == {f"{name}.safetensors" for name in ("fifo", "folder", "zero", "nowhere", "loop")}


def test_links_to_snapshots_elsewhere_are_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    for path in snapshots(run):
        (tmp_path / "linked" / path.name).symlink_to(path)
    assert verified(tmp_path / "linked").is_fine


def test_folders_of_others_are_passed_over(run: Path) -> None:
    (run / "theirs").mkdir()
    (run / "theirs" / "x.safetensors").write_text("not ours")
    (run / "up").symlink_to(run)
    assert verified(run).is_fine


def test_what_a_training_thins_away_meanwhile_is_no_error(run: Path, sharded: Path) -> None:
    for folder in (run, sharded):
        listed = list_contents(folder)
        gone = sorted(folder.iterdir())[0]
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        found = verify(listed)
        assert found.is_fine
        assert gone not in {report.unit for report in found.files}


def test_superseded_snapshots_are_read_and_do_not_mix(run: Path) -> None:
    (run / "superseded").mkdir()
    shutil.copy(snapshots(run)[0], run / "superseded")
    shutil.copy(snapshots(run)[0], run / "superseded" / "again.safetensors")
    found = verified(run)
    assert found.is_fine
    assert found.superseded == 2
    assert found.files[-1].what == "superseded snapshot sigma_rel 0.05 at t = 10"
    flip(run / "superseded" / "again.safetensors", -1)
    assert verified(run).broken == (run / "superseded" / "again.safetensors",)


def test_of_another_run_beside_the_snapshots_is_noted(run: Path, tmp_path: Path) -> None:
    write_snapshot(tmp_path / "other", 10, 0.05, OTHER_RUN_ID, {"w": torch.ones(3)})
    write_synthesis(plan_synthesis(disk_sources(tmp_path / "other"), [0.05]), [run / "model.safetensors"])
    found = verified(run)
    assert found.is_fine
    run_id = found.snapshots[0].info.run_id
    assert found.notes == (f"model.safetensors: is of run {OTHER_RUN_ID[:8]}; the snapshots are of {run_id[:8]}",)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl"])
def test_no_pickle_is_opened(run: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(InvalidValueError, match=r"has no checksums, and no pickle is opened here; name a snapshot dir"):
        list_contents(path)
    (tmp_path / "only").mkdir()
    path.rename(tmp_path / "only" / path.name)
    with pytest.raises(DirectoryError, match="no pickle is opened here"):
        list_contents(tmp_path / "only")
    shutil.copy(tmp_path / "only" / path.name, run)
    assert "1 pickled files (.pt and the like)" in verified(run).notes[0]


def test_a_damaged_file_is_what_its_name_says_if_anything(run: Path) -> None:
    for name in ("0000000000000010-0.3.safetensors", "mine.safetensors", "1-2-3.safetensors", "x-0.05.safetensors"):
        (run / name).write_bytes(b"\0")
    found = {report.path.name: report.what for report in verified(run).files if not report.is_fine}
    assert found == {
        "0000000000000010-0.3.safetensors": "snapshot, by its name", "mine.safetensors": "unknown",
        "1-2-3.safetensors": "unknown", "x-0.05.safetensors": "unknown",
    }  # fmt: skip


def test_long_texts_are_cut_and_numbers_agree() -> None:
    assert shortened("x" * 60) == "x" * 60
    assert shortened("x" * 61) == "x" * 57 + "..."
    assert [and_more(count, "tensor") for count in (0, 1, 2, 1000)] == [
        "", " (and 1 tensor more)", " (and 2 tensors more)", " (and 1,000 tensors more)",
    ]  # fmt: skip


def test_nothing_to_verify(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DirectoryError, match="holds no snapshots, outputs or states; name"):
        list_contents(tmp_path / "empty")
    with pytest.raises(DirectoryError, match="no such file or directory; name"):
        list_contents(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    assert wrong(tmp_path / "text")["text"][0] == "damaged"


def test_an_interrupt_does_not_wait_for_a_large_file(tmp_path: Path) -> None:
    nbytes = 2**38
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            verified(tmp_path)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert time.monotonic() - started < 5
