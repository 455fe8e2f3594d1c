"""Going on exactly with sharded models: by torch.distributed.checkpoint, and from a folder of a state's parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from groups import alone, check_group, truth

from posthoc_cli import Run
from posthoc_cli.snapshots.check import list_contents, verify
from posthoc_cli.snapshots.description import describe
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.states import read_state
from posthoc_cli.tracker.state import open_state

BEGIN = """
import torch.distributed.checkpoint as dcp
model = spread(Net(), arguments[0])
def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, **SETTINGS, **options)
"""

STAGE = (
    BEGIN
    + """
before, after = int(arguments[1]), int(arguments[2])
ema, other = tracker("run"), tracker("other", final_snapshot=False)
assert ema.state_dict()["averages_t"] == 0
if before:
    dcp.load({"ema": ema}, checkpoint_id=folder / f"dcp-{before}")
    other.load_state(folder / f"state-{before}")
    assert ema.step == other.step == before
for _ in range(2):
    other.save_state(folder / f"state-{after}")
    train(model, ema.step + 1, after, ema, other)
other.save_state(folder / f"state-{after}")
saved = (dcp.save if arguments[0] == "hsdp" else dcp.async_save)({"ema": ema}, checkpoint_id=folder / f"dcp-{after}")
if arguments[0] != "hsdp":
    saved.result()
ema.close()
ema.save_state(folder / f"closed-{after}")
other.close()
"""
)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with open_state(path) as state:
        found: dict[str, Mapping[str, torch.Tensor]] = {"copies": state["copies"], "mean": state["mean"]}
        for kind in ("high", "low"):
            found |= {f"{kind}/{key}": own for key, own in state[kind].items()}
        return {f"{kind}/{name}": own[name].clone() for kind, own in found.items() for name in own}


def test_a_run_goes_on_bit_for_bit_on_one_arrangement_of_processes_after_the_other(tmp_path: Path) -> None:
    """By dcp in `run`, by a folder in `other`: from one process to FSDP, HSDP, tensor parallel and back."""
    for kind, ranks, before, after in (
        ("single", 1, 0, 3), ("fsdp", 3, 3, 7), ("hsdp", 4, 7, 8), ("fsdp-tp", 4, 8, 9), ("tp", 2, 9, 10),
        ("tp", 2, 10, 11), ("single", 1, 11, 12),
    ):  # fmt: skip
        check_group(STAGE, ranks, tmp_path, kind, before, after)
    assert sorted(path.name.partition("-")[2] for path in (tmp_path / "state-7").iterdir()) == [
        f"part-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    alone(tmp_path / "single", 12).save_state(tmp_path / "whole")
    expected, info = tensors_of(tmp_path / "whole"), read_state(tmp_path / "whole").info
    for end in ("state-12", "closed-12"):
        found, own = tensors_of(tmp_path / end), read_state(tmp_path / end).info
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
        assert (own.step, own.t, own.updates, own.folded_t, own.clock) == (12, 12.0, 6, info.folded_t, info.clock)
        assert own.inherited == (0.0, 0.0)
    whole = {(s.info.t, s.info.sigma_rel): s for s in read_directory(tmp_path / "single")}
    # Each stage of `run` has ended with a snapshot off the schedule, of the very averages that the next goes on from.
    ends = {(t, sigma_rel) for t in (2, 6, 10) for sigma_rel in (0.1, 0.2)}
    for directory, others in (("run", ends), ("other", set())):
        there = {(s.info.t, s.info.sigma_rel): s for s in read_directory(tmp_path / directory)}
        assert there.keys() == whole.keys() | others
        assert len(list((tmp_path / directory / "superseded").glob("*"))) == 0
        for key, snapshot in whole.items():
            with there[key].open() as file, snapshot.open() as same:
                assert all((file.read(name) == same.read(name)).all() for name in snapshot.stored), key
            measured, true = there[key].info.measurements, snapshot.info.measurements
            assert measured is not None
            assert true is not None
            assert measured.norm == pytest.approx(true.norm)
            partners = {(one.t, one.sigma_rel): one for one in measured.distances}
            assert partners.keys() == {(one.t, one.sigma_rel) for one in true.distances}
            for one in true.distances:
                assert partners[one.t, one.sigma_rel].squared == pytest.approx(one.squared)
                assert partners[one.t, one.sigma_rel].rounding == pytest.approx(one.rounding)
    exact = truth(0.2, [2, 4, 6, 8, 10, 12])
    average = Run(tmp_path / "run").average(0.2, t=12)
    for name, tensor in exact.items():
        assert torch.allclose(average[name].double(), tensor, rtol=1e-6, atol=1e-6), name


TRAINED = (
    BEGIN
    + """
ema = tracker("run")
train(model, 1, 5, ema)
ema.flush()
dist.barrier()
"""
)


def test_a_folder_that_is_no_complete_state_is_refused_in_all_processes(tmp_path: Path) -> None:
    code = """
import shutil
if rank == 0:
    (folder / "state").mkdir()
ema.save_state(folder / "state")
train(model, 6, 6, ema)
dist.barrier()
if rank == 0:
    shutil.copytree(folder / "state", folder / "damaged")
    shutil.copytree(folder / "state", folder / "twice")
    (part,) = (folder / "damaged").glob("*-part-00002-of-00002.safetensors")
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    shutil.copy(folder / "twice" / part.name, folder / "twice/a-copy.safetensors")
    shutil.copytree(folder / "state", folder / "incomplete")
    (folder / "incomplete" / part.name).unlink()
    (folder / "notes").mkdir()
    (folder / "notes/notes.txt").touch()
dist.barrier()
for name in ("damaged", "twice", "incomplete", "absent"):
    refused(lambda: ema.load_state(folder / name))
    assert ema.step == 6
refused(lambda: ema.save_state(folder / "notes"))
refused(lambda: ema.save_state(folder / "run"))
ema.load_state(folder / "state")
assert ema.step == 5
ema.close()
"""
    first, second = (out.splitlines() for out in check_group(TRAINED + code, 2, tmp_path, "fsdp"))
    assert first[0].startswith("RankError rank 1: ")
    assert second[0].startswith("FileFormatError ")
    for lines in (first, second):
        assert "part-00002-of-00002.safetensors" in lines[0]
        assert "is damaged" in lines[0]
        assert "are both part 2 of 2" in lines[1]
        assert "/incomplete: is no complete state: it has 1 of 2 parts" in lines[2]
        assert "/absent: cannot be opened" in lines[3]
        assert "/notes: is there already, and is no folder of a tracker's state" in lines[4]
        assert "/run: is there already, and is no folder of a tracker's state" in lines[5]
        assert len(lines) == 6
    told, found = describe(tmp_path / "state"), verify(list_contents(tmp_path / "state"))
    assert (told["kind"], told["parts"], told["t"], told["tensors"]) == ("state", 2, 5, 27)
    assert found.is_fine
    assert [report.what for report in found.files] == ["part 1/2 of state at t = 5", "part 2/2 of state at t = 5"]
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "state").iterdir())
    (report,) = verify(list_contents(tmp_path / "incomplete")).files
    assert report.detail == "is no complete state: it has 1 of 2 parts"


def test_a_process_that_cannot_write_its_part_leaves_the_state_that_was_there(tmp_path: Path) -> None:
    code = """
import errno, os
from posthoc_cli import files
ema.save_state(folder / "state")
before = {path: path.read_bytes() for path in (folder / "state").iterdir()}
train(model, 6, 6, ema)
def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
if rank == 1:
    own, files.system.fsync = files.system.fsync, full
refused(lambda: ema.save_state(folder / "state"))
if rank == 1:
    files.system.fsync = own
assert before == {path: path.read_bytes() for path in (folder / "state").iterdir()}
dist.barrier()
ema.save_state(folder / "state")
assert len(list((folder / "state").iterdir())) == 2
ema.close()
"""
    for out in check_group(TRAINED + code, 2, tmp_path, "fsdp"):
        assert "no space left" in out
    assert read_state(tmp_path / "state").info.step == 6


def test_complete_tensors_and_those_of_this_mesh_are_taken_and_others_are_named(tmp_path: Path) -> None:
    torch.save(alone(tmp_path / "one", 5, final_snapshot=False).state_dict(), tmp_path / "state.pt")
    code = """
import copy
from torch.distributed.tensor import DTensor, distribute_tensor, Shard
own = ema.state_dict()
ema.load_state_dict(own)
complete = torch.load(folder / "state.pt") | {key: own[key] for key in ("run_id", "snapshots")}
ema.load_state_dict(complete)
again = ema.state_dict()
assert again["high"].keys() == {"0.1", "0.2"}
for kind in ("high", "low"):
    for name, tensor in again[kind]["0.2"].items():
        parameter = dict(model.named_parameters())[name]
        assert isinstance(tensor, DTensor) and tensor.placements == parameter.placements
        assert tensor.shape == parameter.shape and tensor.stride() == parameter.stride()
        assert torch.equal(tensor.to_local(), groups.local(tensor, complete[kind]["0.2"][name]))
assert (again["copies"].keys() == {"mean", "count"}) == (rank == 0)
changed = copy.deepcopy(complete)
changed["high"]["0.1"]["more.weight"] = torch.zeros(2)
refused(lambda: ema.load_state_dict(changed))
changed = copy.deepcopy(complete)
changed["high"]["0.2"]["odd"] = torch.zeros(7, 3)
refused(lambda: ema.load_state_dict(changed))
changed = copy.deepcopy(complete)
changed["high"]["0.2"]["odd"] = distribute_tensor(torch.zeros(5, 3), model.odd.device_mesh, [Shard(1)])
refused(lambda: ema.load_state_dict(changed))
refused(lambda: ema.load_state_dict({}) if rank else ema.load_state_dict(complete))
move(model, 6)
if rank:
    ema.update_(model)
refused(ema.state_dict)
if not rank:
    ema.update_(model)
figure = ema.reconstruction_error()
print(figure.axes[0].get_legend().get_texts()[0].get_text())
ema.close()
dist.destroy_process_group()
refused(ema.state_dict)
refused(lambda: ema.save_state(folder / "state"))
"""
    for out in check_group(TRAINED + code, 2, tmp_path, "fsdp"):
        lines = out.splitlines()
        assert "tensor 'more.weight': is in the state or in the model, but not in both" in lines[0]
        assert "tensor 'odd': has the shape [7, 3] in the state, [5, 3] in the model" in lines[1]
        assert "tensor 'odd': is spread over the processes in another way in the state than in the model" in lines[2]
        assert "state: " in lines[3]
        assert lines[4].startswith("RankError rank 1: is at step 6 of update_, and rank 0 at step 5")
        assert lines[5] == "4 averages up to t = 6"
        assert all("their group was destroyed" in line for line in lines[6:])


def test_what_sharded_models_do_not_have_says_what_to_do_instead(tmp_path: Path) -> None:
    code = """
refused(lambda: tracker("run", keep_state=True))
"""
    for out in check_group(BEGIN + code, 2, tmp_path, "fsdp"):
        (kept,) = out.splitlines()
        assert kept.startswith("InvalidValueError keep_state True: must be False")
        assert "ema.state_dict() or ema.save_state()" in kept
