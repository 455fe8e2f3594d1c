"""Averages of sharded models: the owners of chunks, the parts of snapshots, and agreement with one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from groups import SETTINGS, Net, alone, check_group, move, run_group, train, truth, value
from tracker.runs import assert_near

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.snapshots.snapshot import decode_snapshot
from posthoc_cli.snapshots.tensorfile import Box, cover_problem, read_file

SPREAD = [("fsdp", 3), ("hsdp", 4), ("tp", 2), ("fsdp-tp", 4)]

TRAIN = """
model = spread(Net(), arguments[0])
with PostHocEMA.from_model(model, folder / "run", **SETTINGS) as ema:
    train(model, 1, 8, ema)
"""


def parts_of(snapshot: Path) -> list[tuple[dict[str, torch.Tensor], dict[str, Box]]]:
    """Return the tensors of each part of a snapshot, and their boxes."""
    found = []
    for path in sorted(snapshot.iterdir()):
        info = decode_snapshot(read_file(path))
        values = {name: info.tensor(name) for name in info.entries}
        found.append((values, {name: info.chunks[name].box(tuple(one.shape)) for name, one in values.items()}))
    return found


@pytest.mark.parametrize(("kind", "ranks"), SPREAD)
def test_the_parts_of_a_snapshot_are_the_average_of_one_process_bit_for_bit(
    kind: str, ranks: int, tmp_path: Path
) -> None:
    check_group(TRAIN, ranks, tmp_path, kind)
    alone(tmp_path / "single", 8)
    files = sorted((tmp_path / "single").glob("*.safetensors"))
    folders = sorted(path for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert [path.name for path in folders] == [path.stem for path in files]
    for folder, file in zip(folders, files, strict=True):
        with read_file(file) as complete:
            expected = {name: complete.tensor(name) for name in complete.entries}
        parts = parts_of(folder)
        for name, tensor in expected.items():
            boxes = [boxes[name] for _, boxes in parts if name in boxes]
            assert cover_problem(tuple(tensor.shape), boxes) is None
            for values, boxes in parts:
                if name in values:
                    own = tensor[tuple(map(slice, boxes[name].offset, boxes[name].end))]
                    assert torch.equal(values[name], own), name
    for method in ("minvar", "paper"):
        synthesized, wanted = (Run(tmp_path / where).average(0.15, t=8, method=method) for where in ("run", "single"))
        assert all(torch.equal(value, synthesized[name]) for name, value in wanted.items()), method
    last = {name: tensor for name, tensor in expected.items() if not name.startswith(("mean", "count"))}
    exact = truth(0.2, [2, 4, 6, 8])
    assert last.keys() == exact.keys()
    assert_near(last, exact)
    assert torch.equal(expected["mean"], value("mean", 8, Net().mean))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not report peak memory")
def test_a_process_holds_its_share_and_no_complete_tensor_set(tmp_path: Path) -> None:
    """Memory in units of a process's share of the float32 parameters; a complete set would be one unit more, of two.

    Tracking holds the averages, their staged copies for snapshots, and a copy of the parameters. An evaluation holds
    the two live averages, the result, and the model's own values. Resuming holds the averages.
    """
    code = """
import gc
from torch import nn
from torch.distributed.fsdp import fully_shard
from posthoc_cli.tracker.processes import held_part
def memory(key):
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
def measure(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    work()
    return (memory("VmHWM") - before) / share
def change():
    for _ in range(4):
        for parameter in model.parameters():
            held_part(parameter).data.add_(1)
        ema.update_(model)
    ema.flush()
def evaluate():
    with ema.model(model, sigma_rel=0.15):
        pass
def go_on():
    global ema
    ema = PostHocEMA.from_path(directory, model)
    ema.update_(model)
for rows in (8, 2048):  # the first, small model loads modules and makes caches
    model = fully_shard(nn.Sequential(*(nn.Linear(1024, rows, bias=False) for _ in range(16))))
    share = sum(4 * held_part(parameter).numel() for parameter in model.parameters())
    directory = folder / str(rows)
    ema = PostHocEMA.from_model(model, directory, update_every=1, checkpoint_every=2)
    found = [measure(change), measure(evaluate)]
    ema.close()
    del ema
    found.append(measure(go_on))
    ema.close()
print(*found)
"""
    for out in check_group(code, 2, tmp_path):
        for found, derived in zip(map(float, out.split()), (9, 4, 6), strict=True):
            assert found < derived + 0.5, out


def test_one_process_after_the_other_updates_writes_and_thins(tmp_path: Path) -> None:
    """A collective operation in any thread would wait forever."""
    code = """
import time
model = spread(Net(), "fsdp")
with PostHocEMA.from_model(model, folder / "run", **SETTINGS, max_checkpoints=2) as ema:
    train(model, 1, 1, ema)
    dist.barrier()
    while not all((folder / f"done-{other}").exists() for other in range(rank + 1, world)):
        time.sleep(0.01)
    train(model, 2, 24, ema)
    ema.flush()
    (folder / f"done-{rank}").touch()
"""
    check_group(code, 3, tmp_path)
    assert sorted({snapshot.t for snapshot in Run(tmp_path / "run").snapshots})[-1] == 24
    assert len(Run(tmp_path / "run").snapshots) == 4


def test_a_complete_snapshot_stays_until_another_process_has_written_the_next(tmp_path: Path) -> None:
    code = """
import time
from posthoc_cli import files
model = spread(Net(), "fsdp")
def held_up(descriptor):
    while not (folder / "go").exists():
        time.sleep(0.01)
    own(descriptor)
own = files.system.fsync
with PostHocEMA.from_model(model, folder / "run", **SETTINGS, max_checkpoints=1) as ema:
    train(model, 1, 4, ema)
    ema.flush()
    dist.barrier()
    if rank == 1:
        files.system.fsync = held_up
    train(model, 5, 8, ema)
    if rank == 0:
        ema.flush()
        print([snapshot.t for snapshot in Run(folder / "run").snapshots])
        (folder / "go").touch()
    ema.flush()
    dist.barrier()
    train(model, 9, 12, ema)
"""
    first, _ = check_group(code, 2, tmp_path)
    assert first.strip() == "[4.0, 4.0]"
    left = {snapshot.t for snapshot in Run(tmp_path / "run").snapshots}
    assert 12 in left
    assert 4 not in left


def test_a_nan_in_one_process_makes_all_skip_the_update(tmp_path: Path) -> None:
    code = """
model = spread(Net(), "fsdp")
with PostHocEMA.from_model(model, folder / "run", **SETTINGS, on_nonfinite="skip") as ema:
    for step in range(1, 13):
        move(model, step)
        if step in (2, 8) and rank == 1:
            with torch.no_grad():
                model.odd.to_local()[0, 0] = torch.nan
        ema.update_(model)
"""
    check_group(code, 2, tmp_path)
    for updates, snapshot in zip((1, 2, 4), Run(tmp_path / "run").snapshots[::2], strict=True):
        for path in snapshot.path.iterdir():
            assert decode_snapshot(read_file(path)).updates == updates
    assert_near(Run(tmp_path / "run").average(0.2), truth(0.2, [4, 6, 10, 12]))


def test_processes_with_other_options_are_named(tmp_path: Path) -> None:
    code = """
model = spread(Net(), "fsdp")
for change in ({"sigma_rels": (0.1,)}, {"checkpoint_dir": folder / "other"}, {"include": "first*"}):
    refused(lambda: PostHocEMA.from_model(model, **({"checkpoint_dir": folder / "run"} | (change if rank else {}))))
"""
    for out in check_group(code, 2, tmp_path):
        widths, directory, include = out.splitlines()
        assert widths == "RankError rank 1: has sigma_rels (0.1,), and rank 0 has (0.05, 0.28)"
        assert directory.startswith("RankError rank 1: has checkpoint_dir ")
        assert include == "RankError rank 1: has include ('first*',), and rank 0 has ()"


def test_placements_that_cannot_be_averaged_are_refused_by_name(tmp_path: Path) -> None:
    code = """
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
mesh, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
partial, strided, uneven = (nn.Linear(4, rows, bias=False) for rows in (4, 8, 7))
partial.weight = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh, [Partial()]))
strided.weight = nn.Parameter(DTensor.from_local(
    torch.zeros(4, 4), mesh, [_StridedShard(0, split_factor=2)], shape=torch.Size((8, 4)), stride=(4, 1)))
parallelize_module(uneven, grid["tp"], ColwiseParallel())
fully_shard(uneven, mesh=grid["dp"])
for model in (partial, strided, uneven):
    refused(lambda: PostHocEMA.from_model(model, folder / "run"))
"""
    for out in check_group(code, 2, tmp_path):
        partial, strided, uneven = out.splitlines()
        assert "tensor 'weight': has the placement P" in partial
        assert "tensor 'weight': has 8 rows in dimension 0, of which _S" in strided
        assert "tensor 'weight': has 7 rows in dimension 0, of which _S" in uneven


def test_a_second_job_on_a_directory_is_refused_in_all_its_processes(tmp_path: Path) -> None:
    single = Net()
    with PostHocEMA.from_model(single, tmp_path / "run", update_every=1, checkpoint_every=1) as ema:
        train(single, 1, 1, ema)
        results = run_group(TRAIN, 4, tmp_path, "hsdp")  # two of the processes have nothing to write
    assert all(result.code != 0 and "holds snapshots of run" in result.err for result in results)


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="no path that is another directory in each process")
def test_processes_that_write_to_different_disks_are_refused(tmp_path: Path) -> None:
    code = """
import os
from posthoc_cli.tracker import snapshotter
snapshotter.PATIENCE = 0.5
(folder / str(rank)).mkdir()
os.chdir(folder / str(rank))
model = spread(Net(), "fsdp")
ema = PostHocEMA.from_model(model, "/proc/self/cwd/run", **SETTINGS)
refused(lambda: ema.update_(model))
"""
    first, second = check_group(code, 2, tmp_path)
    own = "/proc/self/cwd/run: is not the directory of that name in which rank 0 writes; all pro"
    assert own in second
    assert f"rank 1: {own}" in first
    assert not list(tmp_path.rglob("part-*"))


LATE = """
import shutil
from posthoc_cli.snapshots.directory import inspect_directory
model = spread(Net(), "fsdp")
late = [f"0000000000000008-{sigma_rel}/part-00002-of-00002.safetensors" for sigma_rel in (0.1, 0.2)]
if int(arguments[0]):
    move(model, 4)
with PostHocEMA.from_model(model, folder / "run", **SETTINGS, resume=4 if int(arguments[0]) else None) as ema:
    for step in range(ema.step + 1, 9):
        move(model, step if step <= 4 else step + int(arguments[0]))
        if step == 8 and int(arguments[0]) and rank == 1:
            dist.barrier()
            for part in late:  # written by a process that has outlived the first training
                shutil.copy(folder / "late" / part, folder / "run" / part)
            print(*inspect_directory(folder / "run").notes, sep="\\n")
        ema.update_(model)
        if step == 8 and int(arguments[0]) and rank == 0:
            ema.flush()
            dist.barrier()
"""


def test_a_late_part_of_a_process_that_has_outlived_its_training_is_named_and_never_mixed(tmp_path: Path) -> None:
    check_group(LATE, 2, tmp_path, 0)
    for part in (tmp_path / "run").glob("*8-*/*2-of*"):
        (late := tmp_path / "late" / part.parent.name).mkdir(parents=True)
        part.rename(late / part.name)
    _, notes = check_group(LATE, 2, tmp_path, 50)
    assert notes.splitlines() == [
        f"0000000000000008-{sigma_rel}/: has 1 of 2 parts, 1 of 2 parts, of different sessions of the training"
        for sigma_rel in (0.1, 0.2)
    ]
    net = Net()
    with PostHocEMA.from_model(net, tmp_path / "single", **SETTINGS) as ema:
        for step in range(1, 9):
            move(net, step if step <= 4 else step + 50)
            ema.update_(net)
    made, right = (Run(tmp_path / name).average(0.2) for name in ("run", "single"))
    assert_near(made, {name: tensor.double() for name, tensor in right.items()})


def test_a_model_that_is_sharded_after_its_tracker_was_made_is_refused(tmp_path: Path) -> None:
    code = """
from posthoc_cli.errors import ModelMismatchError
model = Net()
ema = PostHocEMA.from_model(model, folder / "run", update_every=1, checkpoint_every=1)
ema.update_(model)
ema.flush()
dist.barrier()
spread(model, "fsdp")
for use in (ema.update_, lambda model: PostHocEMA.from_path(folder / "run").load_into(model, 0.28)):
    refused(lambda: use(model), ModelMismatchError)
ema.close()
"""
    for out in check_group(code, 2, tmp_path):
        updated, filled = out.splitlines()
        assert "was not when this tracker was made; shard the model first; then make the tracker in every" in updated
        assert "is sharded over processes, and this tracker was made before that, or without the model" in filled
    assert [snapshot.t for snapshot in Run(tmp_path / "run").snapshots] == [1, 1]


def test_a_tracker_in_one_process_only_names_the_others(tmp_path: Path) -> None:
    code = """
from posthoc_cli.tracker import processes
processes.WARNING = processes.LIMIT = 0.5
model = spread(Net(), "fsdp")
if rank == 1:
    refused(lambda: PostHocEMA.from_model(model, folder / "run"))
"""
    _, out = check_group(code, 2, tmp_path)
    assert out.startswith("RankError rank 0: did not make this call")
    assert "from_model" in out


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_averages_with_nccl_are_those_of_one_process(tmp_path: Path) -> None:
    """As many processes as accelerators, at most two, make every exchange of tensors or flags."""
    code = """
import torch.distributed.checkpoint as dcp
backend, device = arguments
dist.destroy_process_group()
if device == "cuda":
    torch.cuda.set_device(rank)
dist.init_process_group(backend, init_method=f"file://{folder}/again", rank=rank, world_size=world)
model = spread(Net().to(device), "hsdp" if world == 4 else "fsdp")
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS, on_nonfinite="skip")
exact = torch.load(folder / "truth.pt")
train(model, 1, 8, ema)
dcp.save({"ema": ema}, checkpoint_id=folder / "dcp")
dcp.load({"ema": ema}, checkpoint_id=folder / "dcp")
with ema.model(model, 0.2):
    found = held(model)
    for name, right in exact.items():
        own = groups.local(dict(model.named_parameters())[name], right)
        assert torch.allclose(found[name].cpu().double(), own, rtol=1e-6, atol=1e-6), name
with ema.model(model, sigma_rel=0.15):
    assert model(torch.ones(2, 6, device=device)).isfinite()
ema.close()
"""
    torch.save(dict(truth(0.2, [2, 4, 6, 8])), tmp_path / "truth.pt")
    check_group(code, min(torch.cuda.device_count(), 2), tmp_path, "nccl", "cuda")
