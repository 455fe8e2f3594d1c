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
from typing import Any

import numpy as np
import pytest
import torch
from factories import OTHER_RUN_ID, RUN_ID, flip_bit, make_info, read_snapshot, rewrite_snapshot, write_snapshot
from safetensors.torch import load_file, save_file

from posthoc_cli import PostHocEMA, files
from posthoc_cli.errors import DirectoryError, FileFormatError, InvalidValueError
from posthoc_cli.export.convert import export_file
from posthoc_cli.export.outputs import write_synthesis
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.check import Verification, list_contents, verify
from posthoc_cli.snapshots.directory import find_snapshots, inspect_directory
from posthoc_cli.snapshots.format import TensorSpec, TrackedTensor, TrackingSchedule, snapshot_metadata
from posthoc_cli.snapshots.measurements import decode_values
from posthoc_cli.snapshots.outputs import INDEX_NAME
from posthoc_cli.snapshots.reader import TensorFile, check_payload, holds_nonfinite, read_header, verify_payload
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


# --- what is whole


def test_a_run_is_whole_and_each_file_has_its_line(run: Path) -> None:
    found = verified(run)
    assert found.is_fine
    assert found.notes == ()
    assert [report.path for report in found.files] == sorted(run.glob("*.safetensors"))
    assert found.files[0].what == "snapshot sigma_rel 0.05 at t = 10"
    assert found.files[-1].what == "state at t = 60"
    assert {report.run_id for report in found.files} == {read_snapshot(found.files[0].path).info.run_id}
    assert {(report.state, report.detail, report.notes) for report in found.files} == {("intact", "", ())}
    assert found.nbytes == sum(
        entry.nbytes for path in run.glob("*.safetensors") for entry in read_header(path).tensors.values()
    )
    assert [s.path for s in found.snapshots] == [s.path for s in find_snapshots(run)]


def test_outputs_in_any_layout_and_foreign_files(run: Path, output: Path, shards: Path, tmp_path: Path) -> None:
    for path in (output, shards, shards / INDEX_NAME, next(shards.glob("*.safetensors")), run / "state.safetensors"):
        found = verified(path)
        assert found.is_fine, found
        assert {report.state for report in found.files} == {"intact"}
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
    assert all(str(path) == checked.error.subject for checked in found if checked.error)
    assert not any(checked.error for checked in found if not checked.damaged)


# --- damage


@pytest.mark.parametrize("place", [3, 40, 0.5, -1])
def test_a_flip_anywhere_is_found(run: Path, output: Path, shards: Path, place: float) -> None:
    """And in no other file; `torture` flips every bit of small files."""
    for path in (snapshots(run)[3], output, run / "state.safetensors", min(shards.glob("*.safetensors"))):
        data = path.read_bytes()
        flip_bit(path, place if isinstance(place, int) else int(len(data) * place))
        assert {name: state for name, (state, _) in wrong(path.parent).items()} == {path.name: "damaged"}
        path.write_bytes(data)


def test_a_truncated_file_still_says_what_it_was(run: Path) -> None:
    path = snapshots(run)[0]
    os.truncate(path, path.stat().st_size - 1)
    (report,) = (r for r in verified(run).files if not r.is_fine)
    assert report.what == "snapshot sigma_rel 0.05 at t = 10"
    assert report.detail.startswith("truncated: has ")
    os.truncate(path, 100)
    (report,) = (r for r in verified(run).files if not r.is_fine)
    assert report.what == "snapshot, by its name"


# --- headers against content, and each other


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
        ({"0.07/0.bias": torch.zeros(4)}, "tensor '0.07/0.bias' is of no profile of the state"),
    ):
        write_anew(path, values | change)
        assert wrong(path) == {path.name: ("damaged", said)}


@pytest.mark.parametrize(
    ("kind", "key", "text", "said"),
    [
        ("snapshot", "t", "-1.0", "ema.t: -1, first update 1, step 10: not a time of training"),
        ("output", "t", "-1.0", "ema.t: -1 is not a time of training"),
        ("output", "t", "1e300", "ema.t: 1e+300 is not a time of training"),
        ("output", "sigma_rel", "0", "ema.sigma_rel: 0 is not above 0"),
        ("output", "profile_error", "-0.1", "ema.profile_error: -0.1 is below 0"),
        ("output", "predicted_error", "-1e-9", "ema.predicted_error: -1e-09 is below 0"),
        ("state", "t", "-1.0", "ema.t: must be a finite number, at least 0, not -1.0"),
        ("state", "averages_step", "61", "ema.t 60.0, step 60, averages at 60.0 since 1.0: not times of one training"),
        ("state", "step", "61", "ema.clock: ends at step 60, t 60.0; the training is at step 61, t 60.0"),
    ],
)
def test_numbers_that_no_training_has_are_told_without_the_files_own_name(
    run: Path, output: Path, kind: str, key: str, text: str, said: str
) -> None:
    path = {"snapshot": snapshots(run)[0], "output": output, "state": run / "state.safetensors"}[kind]
    write_anew(path, load_file(path), **{key: text})
    assert wrong(path) == {path.name: ("damaged", said)}


HARMS: dict[str, Callable[[Path], object]] = {
    "run": lambda path: rewrite_snapshot(path, run_id=OTHER_RUN_ID),
    "tensors": lambda path: rewrite_snapshot(path, lambda values: values.update({"0.bias": torch.ones(3)})),
    "copy": lambda path: shutil.copy(path, path.with_name("copy.safetensors")),
}


@pytest.mark.parametrize("harm", HARMS)
def test_snapshots_that_contradict_each_other_are_both_named(run: Path, harm: str) -> None:
    """All that never mix are in test_directory.py."""
    path = snapshots(run)[5]
    HARMS[harm](path)
    found = verified(run)
    assert not found.broken
    assert not found.is_fine
    assert found.problems == tuple(map(str, inspect_directory(run).problems))
    assert len([problem for problem in found.problems if str(path) in problem]) == 1
    assert found.snapshots == found.lost == ()


def test_what_is_there_a_second_time_or_of_another_run_is_not_lost(run: Path, tmp_path: Path) -> None:
    first = snapshots(run)[0]
    again = shutil.copy(first, run / "again.safetensors")
    stranger = write_snapshot(tmp_path / "other", 5, 0.05, OTHER_RUN_ID, {"w": torch.ones(300)})
    stranger = Path(shutil.copy(stranger, run))
    for path in (again, stranger):
        flip_bit(path)
    assert verified(run).lost == ()
    flip_bit(first)
    assert [s.path for s in verified(run).lost] == [first, again]


def test_contradicting_clocks_are_a_problem_of_all(tmp_path: Path) -> None:
    for t, step in ((10.0, 3), (20.0, 2)):
        info = {"t_unit": "images", "step": step, "clock": ((step, t),)}
        write_snapshot(tmp_path, t, 0.05, RUN_ID, {"w": torch.ones(3)}, **info)
    found = verified(tmp_path)
    assert not found.broken
    assert not found.is_fine
    assert "not of one training" in found.problems[0]


def test_swapped_names_are_noted_since_headers_are_believed(run: Path) -> None:
    first, other = snapshots(run)[0], snapshots(run)[4]
    first.rename(run / "x")
    other.rename(first)
    (run / "x").rename(other)
    found = verified(run)
    assert found.is_fine
    assert found.notes == (
        f"{first.name}: its name differs: it holds sigma_rel 0.05 at t = 30",
        f"{other.name}: its name differs: it holds sigma_rel 0.05 at t = 10",
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


# --- gaps


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


# --- shards


def changed(index: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def test_an_index_that_does_not_match_its_shards(shards: Path) -> None:
    index = shards / INDEX_NAME
    first, *_, last = sorted(path.name for path in shards.glob("*.safetensors"))
    text = index.read_text()
    names = json.loads(text)["weight_map"]
    moved = next(name for name, file in names.items() if file == last)
    total = json.loads(text)["metadata"]["total_size"]
    for change, state, detail in (
        (lambda c: c["weight_map"].update({moved: first}), "mismatched", f"tensor '{moved}' is in "),
        (lambda c: c["weight_map"].pop(moved), "mismatched", f"tensor '{moved}' is in {last} or named by"),
        (lambda c: c["metadata"].update(total_size=total + 1), "damaged", f"its total_size is {total + 1}; the shards"),
        (lambda c: c["metadata"].update(total_size=10**4000), "damaged", "its total_size is an int of many digits"),
        (lambda c: c["metadata"].clear(), "damaged", "its total_size is None; the shards hold"),
        (lambda c: c["weight_map"].clear(), "damaged", "names no shard"),
        (lambda c: c.clear(), "damaged", "it has no weight_map"),
    ):
        changed(index, change)
        found = wrong(shards)
        assert found[INDEX_NAME][0] == state
        assert detail in found[INDEX_NAME][1]
        index.write_text(text)
    assert verified(shards).is_fine


def test_a_missing_shard_and_an_index_of_the_run_of_its_shards(shards: Path) -> None:
    found = verified(shards)
    assert found.files[0].path == shards / INDEX_NAME
    assert {report.kind for report in found.files} == {"output"}
    assert len({report.run_id for report in found.files}) == 1
    gone = min(shards.glob("*.safetensors"))
    gone.unlink()
    assert wrong(shards) == {gone.name: ("missing", f"{INDEX_NAME} names it")}
    assert verified(shards).broken == (shards,)


def test_shards_of_two_outputs(run: Path, shards: Path, tmp_path: Path) -> None:
    write_synthesis(plan_synthesis(disk_sources(run), [0.2]), [tmp_path / "other.safetensors"])
    export_file(tmp_path / "other.safetensors", tmp_path / "others", max_shard_size="1KB")
    first, *_, last = sorted(path.name for path in shards.glob("*.safetensors"))
    for name in (first, last):
        kept = (shards / name).read_bytes()
        shutil.copy(tmp_path / "others" / name, shards / name)
        ((state, detail),) = wrong(shards).values()
        assert state == "mismatched"
        assert name in detail
        assert "its target is sigma_rel 0." in detail
        (shards / name).write_bytes(kept)
    values = {name: value for name, value in load_file(snapshots(run)[0]).items() if name in load_file(shards / last)}
    save_file(values, shards / last)
    ((state, detail),) = wrong(shards).values()
    assert (state, "only one of them is of a synthesis" in detail) == ("mismatched", True)


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


# --- what the system says


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


def test_folders_that_cannot_be_read_are_noted_or_passed_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("closed", "superseded", "quarantine"):
        (run / name).mkdir()
    own = files.system.list

    def refuse(path: Path) -> list[Path]:
        if path.parent == run:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return own(path)

    monkeypatch.setattr(files.system, "list", refuse)
    found = verified(run)
    assert found.is_fine
    assert len(found.files) == 13
    assert found.notes == ("superseded/ cannot be read",)
    assert len(find_snapshots(run)) == 12
    assert inspect_directory(run).superseded == 0


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


def test_what_a_training_thins_away_meanwhile_is_no_error(run: Path) -> None:
    listed = list_contents(run)
    gone = snapshots(run)[0]
    gone.unlink()
    found = verify(listed)
    assert found.is_fine
    assert gone not in {report.path for report in found.files}


def test_superseded_snapshots_are_read_and_do_not_mix(run: Path) -> None:
    (run / "superseded").mkdir()
    shutil.copy(snapshots(run)[0], run / "superseded")
    shutil.copy(snapshots(run)[0], run / "superseded" / "again.safetensors")
    found = verified(run)
    assert found.is_fine
    assert found.superseded == 2
    assert found.files[-1].what == "superseded snapshot sigma_rel 0.05 at t = 10"
    flip_bit(run / "superseded" / "again.safetensors")
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
