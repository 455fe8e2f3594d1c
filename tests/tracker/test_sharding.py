"""Averages of sharded models: the parts of snapshots, averaged weights in the models, and how they
continue.

Each agrees with the averages of one process.
"""

from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors, heavy
from factories import sketch_of
from groups import alone, averages, check_group, run_group, truth
from tracker.runs import assert_near, steps, times

from posthoc_cli import Run
from posthoc_cli.errors import RankError, VanishedError
from posthoc_cli.group import Group

BEGIN = """
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor.debug import CommDebugMode
from posthoc_cli.tracker.processes import reshard
model = spread(Net(), "fsdp")
def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, **SETTINGS | options)
x = torch.arange(12.0).reshape(2, 6)
"""

AVERAGED = """
from unittest import TestCase
for kind in arguments:
    model = spread(Net(), kind)
    ema = PostHocEMA.from_path(folder / "single", model)  # a run of one process, before it resumes
    move(model, 9)
    raw = held(model)
    early = Run(folder / "single").average(0.15, t=4)
    with ema.model(model, sigma_rel=0.15, t=4):
        assert filled(model, early)
    assert equal(held(model), raw)
    ema.load_into(model, 0.15, t=4)
    assert filled(model, early)
    ema.close()

    ema = tracker(f"run-{kind}")
    train(model, 1, 8, ema)
    raw = held(model)
    model(x).detach()
    before = model(x).detach()
    mode = CommDebugMode()
    with mode:
        block = ema.model(model, sigma_rel=0.15)
        averaged = block.__enter__()
    assert not [
        str(call)
        for call in mode.get_comm_counts()
        if "allgather_base" in str(call) or "into_tensor" in str(call)
    ]
    complete = Run(folder / f"run-{kind}").average(0.15)
    assert filled(averaged, complete), "within the block"
    assert not model.training
    net = Net()
    net.load_state_dict(complete, strict=False)
    with torch.no_grad():
        found = model(x)
        assert torch.allclose(found, net(x), rtol=1e-5), (found, net(x))
    block.__exit__(None, None, None)
    assert model.training and equal(held(model), raw)
    assert torch.equal(model(x), before)
    reshard(model)
    train(model, 9, 10, ema)
    with ema.model(model, sigma_rel=0.15, t=8):
        close(model, folder / "average-8.pt")
    with ema.model(model, sigma_rel=0.15):  # of the newest snapshots
        close(model, folder / "average-8.pt")
    ema.snapshot()
    single = torch.load(folder / "average-10.pt")
    with TestCase().assertNoLogs("posthoc_cli", "WARNING"):
        ema.models(model, [0.28])
    blocks = ema.models(model, [0.15, 0.2, "window:1000"])
    assert [*blocks] == ["0.15", "0.2"]
    for label, block in blocks.items():
        model(x).detach()  # after which some parameters are complete
        with block:
            close(model, folder / {"0.2": "truth-10.pt", "0.15": "average-10.pt"}[label])
    weights = ema.state_dict(0.15)
    parameters = dict(model.named_parameters())
    assert ema.state_dict(0.2).keys() == single.keys()  # also of tensors without elements here
    assert weights.keys() == single.keys() and weights.predicted_error is not None
    for name, value in weights.items():
        assert value.shape == single[name].shape and type(value) is type(
            parameters.get(name, torch.empty(0)).data
        ), name
    if kind != "tp":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        with ema.model(model, 0.15):
            complete = get_model_state_dict(
                model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
        for name, value in single.items() if rank == 0 else ():
            found = complete[name].double()
            assert torch.allclose(found, value.double(), rtol=1e-5, atol=1e-6), name
    ema.load_into(model, 0.15)
    close(model, folder / "average-10.pt", 1e-5)
    ema.close()
"""


@heavy
@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        (4, ["hsdp", "fsdp-tp"]),
        (2, ["tp"]),
    ],
)
def test_averages_of_a_sharded_model_are_those_of_one_process(ranks, kinds, tmp_path):
    """The parts of snapshots are bit for bit; a model has them in a block, and its own weights
    after it."""
    averages(tmp_path, 8, 10)
    check_group(BEGIN + AVERAGED, ranks, tmp_path, *kinds)
    single = Run(tmp_path / "single")
    exact = truth(0.2, [2, 4, 6, 8, 10])
    assert_near(single.average(0.2), exact)
    for kind in kinds:
        run = Run(tmp_path / f"run-{kind}")
        for found, true in zip(run.snapshots, single.snapshots, strict=True):
            check_same_snapshot(found, true)
        assert_same_tensors(run.average(0.15), single.average(0.15))


def check_same_snapshot(found, true):
    assert found.t == true.t
    assert found.sigma_rel == true.sigma_rel
    for name in true.entries:
        assert torch.equal(found.tensor(name), true.tensor(name)), (true.path, name)
    measured = found.measurements
    assert measured.norm == pytest.approx(true.measurements.norm)
    assert measured.rounding == pytest.approx(true.measurements.rounding)


def test_a_block_restores_chunks_that_it_has_converted_or_replaced(tmp_path):
    """Of `fully_shard`, whose modules keep the memory, and of DTensors alone."""
    code = """
from torch import nn


def assign(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)


def empty(model):
    model.to_empty(device="cpu")


for kind in ("fsdp", "tp"):
    model = spread(Net(), kind)
    ema = PostHocEMA.from_model(model, folder / kind, **SETTINGS)
    train(model, 1, 2, ema)
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    for step, convert in enumerate((nn.Module.half, nn.Module.double, assign, empty), start=3):
        for undo in (nn.Module.float, nn.Module.eval):
            move(model, step)
            raw = held(model)
            output = model(x)
            output.backward()
            gradient = model.second.weight.grad
            with ema.model(model, 0.2):
                assert not equal(held(model), raw) and model.second.weight.grad is None
                model(x).detach()
                convert(model)
                undo(model)
            assert equal(held(model), raw), (kind, convert)
            assert model.second.weight.grad is gradient
            assert torch.equal(model(x).detach(), output)
            reshard(model)
            assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
        ema.update_(model)
    model(x).backward()
    ema.close()
"""
    check_group(BEGIN + code, 2, tmp_path)
    with alone(tmp_path / "alone", 6):
        pass
    for kind in ("fsdp", "tp"):
        pairs = zip(Run(tmp_path / kind).snapshots, Run(tmp_path / "alone").snapshots, strict=True)
        for found, true in pairs:
            check_same_snapshot(found, true)


def test_a_complete_tensor_that_a_block_has_replaced_is_an_error_with_the_raw_weights(tmp_path):
    """A forward pass gathers it; torch would use the other one in the next pass."""
    code = """
from posthoc_cli.errors import ModelMismatchError

model = spread(Net(), "fsdp")
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
train(model, 1, 2, ema)
raw = held(model)
with ema.model(model, 0.2):
    model(x)
try:
    with ema.model(model, 0.2):
        model(x)
        model.second.weight.data = torch.zeros(7, 8)
except ModelMismatchError as error:
    print(error.weights.keys() == raw.keys(), "second.weight" in str(error))
assert equal(held(model), raw)
"""
    for out in check_group(BEGIN + code, 2, tmp_path):
        assert out == "True True\n"


@heavy
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not report peak memory"
)
def test_a_process_holds_its_share_and_no_complete_tensor_set(tmp_path):
    """Memory in units of a process's share of the float32 parameters; a complete set would be one
    unit more, of two.

    Tracking holds the averages, their staged copies for snapshots, and a copy of the parameters. An
    evaluation holds the two live averages, the result, and the model's own values. Resuming holds
    the averages.
    """
    code = """
import gc
from torch import nn
from torch.distributed.fsdp import fully_shard
from posthoc_cli.tracker.processes import local_part
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
            local_part(parameter).data.add_(1)
        ema.update_(model)
    ema.flush()
def evaluate():
    with ema.model(model, sigma_rel=0.15):
        pass
def go_on():
    global ema
    ema = PostHocEMA.from_path(directory, model)
    ema.update_(model)
for rows in (8, 1536):  # the first, small model loads modules and makes caches
    model = fully_shard(nn.Sequential(*(nn.Linear(1024, rows, bias=False) for _ in range(16))))
    share = sum(4 * local_part(parameter).numel() for parameter in model.parameters())
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
        tracking, evaluation, resuming = map(float, out.split())
        assert tracking < 9.5, out
        assert evaluation < 4.5, out
        assert resuming < 6.5, out


@pytest.mark.parametrize("last", [24, 22, 21])
def test_a_training_that_ends_before_another_process_has_written_keeps_no_more(tmp_path, last):
    """At a snapshot, at an update, and between two."""
    code = """
import time
from posthoc_cli import files
from posthoc_cli.tracker.snapshotter import Snapshotter

own = files.system.fsync
thin = Snapshotter._thin


def held_up(descriptor):
    while not (folder / "thinned").exists():
        time.sleep(0.01)
    own(descriptor)


def noted(snapshotter):
    is_done = thin(snapshotter)
    if len(snapshotter._find_complete()) < len(snapshotter._stored):
        (folder / "thinned").touch()
    return is_done


last = int(arguments[0])
ema = tracker("run", max_checkpoints=4)
train(model, 1, 20, ema)
ema.flush()
dist.barrier()
if rank == 1:
    files.system.fsync = held_up
else:
    Snapshotter._thin = noted
train(model, 21, last, ema)
ema.close()
"""
    check_group(BEGIN + code, 2, tmp_path, str(last))
    assert len(times(tmp_path / "run")) == 4


def test_processes_write_and_thin_one_after_the_other(tmp_path):
    """A collective operation in any thread would wait forever. Nothing is thinned before all have
    written the next."""
    code = """
import time
from posthoc_cli import files
def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)
with tracker("one by one", max_checkpoints=2) as ema:
    train(model, 1, 1, ema)
    dist.barrier()
    if rank == 0:
        wait_for("done")
    train(model, 2, 24, ema)
    ema.flush()
    (folder / "done").touch()
own, calls = files.system.fsync, []
def held_up(descriptor):  # rank 1 between its two parts, of which rank 0 sees the first one
    calls.append(rank)
    if calls == [1, 1]:
        (folder / "first").touch()
        wait_for("go")
    elif rank == 0:
        wait_for("first")
    own(descriptor)
with tracker("late", max_checkpoints=1) as ema:
    train(model, 1, 4, ema)
    ema.flush()
    dist.barrier()
    files.system.fsync = held_up
    train(model, 5, 8, ema)
    if rank == 0:
        ema.flush()
        print([snapshot.t for snapshot in Run(folder / "late").snapshots])
        (folder / "go").touch()
    ema.flush()
    dist.barrier()
    train(model, 9, 12, ema)
"""
    first, _ = check_group(BEGIN + code, 2, tmp_path)
    assert first.strip() == "[4.0, 4.0, 8.0]"
    one_by_one = Run(tmp_path / "one by one").snapshots
    assert len(one_by_one) == 4
    assert one_by_one[-1].t == 24
    late = times(tmp_path / "late")
    assert 12 in late
    assert 4 not in late


def test_an_error_of_one_process_is_raised_in_all_and_each_model_keeps_its_weights(tmp_path):
    """Also an error within the block. A full disk is an error of its own process."""
    code = """
import errno
from posthoc_cli import files
ema = tracker("run")
train(model, 1, 8, ema)
ema.flush()
raw = held(model)
dist.barrier()
if rank == 1:
    for part in sorted((folder / "run").glob("*4-*/part-00002*")):
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
dist.barrier()
refused(ema.model(model, sigma_rel=0.15, t=4).__enter__)
assert equal(held(model), raw) and model.training
refused(ema.model(spread(Net(), "tp"), 0.2).__enter__)
try:
    with ema.model(model, 0.2):
        model(x)
        if rank == 1:
            raise KeyError("of the evaluation")
except KeyError:
    pass
assert equal(held(model), raw) and model.training
assert ema.state_dict(0.2)

def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left")
if rank == 0:
    train(model, 9, 12, ema)
dist.barrier()
if rank == 1:
    own, files.system.fsync = files.system.fsync, full
    train(model, 9, 12, ema)
    refused(ema.flush)
    files.system.fsync = own
dist.barrier()
ema.close()
"""
    one, other = check_group(BEGIN + code, 2, tmp_path)
    damaged, spread = one.splitlines()
    assert damaged.startswith("RankError rank 1: ")
    assert "is damaged" in damaged
    assert spread.startswith("ModelMismatchError tensor '")
    damaged, spread, full = other.splitlines()
    assert damaged.startswith("FileFormatError ")
    assert spread.startswith("ModelMismatchError tensor '")
    assert full.startswith("WriteError ")


def test_tied_parameters_and_half_precision_of_a_sharded_model(tmp_path):
    code = """
from torch import nn
from torch.distributed.fsdp import fully_shard

model = nn.Sequential(
    nn.Linear(5, 7, bias=False), nn.Linear(7, 5), nn.Linear(5, 7, bias=False)
).bfloat16()
model[2].weight = model[0].weight
fully_shard(model)
other = PostHocEMA.from_model(
    model,
    folder / "tied",
    update_every=1,
    checkpoint_every=2,
    checkpoint_dtype="float32",
    device="cpu",
)
train(model, 1, 3, other)
other.snapshot()
raw = held(model)
with other.model(model, sigma_rel=0.15):
    assert filled(model, Run(folder / "tied").average(0.15))
    assert model[0].weight is model[2].weight and model[0].weight.dtype == torch.bfloat16
assert equal(held(model), raw)
weights = other.state_dict(0.15, dtype=torch.float32)
assert weights["0.weight"].dtype == torch.float32
assert torch.equal(weights["0.weight"].full_tensor(), weights["2.weight"].full_tensor())
other.close()
dist.barrier()
dist.destroy_process_group()
refused(lambda: other.state_dict(0.15))
"""
    for out in check_group(BEGIN + code, 2, tmp_path):
        assert out.startswith(
            "RefusedCallError PostHocEMA: averages of which each process keeps a part need all "
        )


REFUSED = """
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from posthoc_cli.tracker import snapshotter

refused(lambda: tracker("taken"))
for change in ({"sigma_rels": (0.1,)}, {"checkpoint_dir": folder / "other"}, {"include": "first*"}):
    refused(
        lambda: PostHocEMA.from_model(
            model, **({"checkpoint_dir": folder / "run"} | (change if rank else {}))
        )
    )

mesh, grid = (
    init_device_mesh("cpu", (2,)),
    init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")),
)
partial, strided, uneven = (nn.Linear(4, rows, bias=False) for rows in (4, 8, 7))
partial.weight = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh, [Partial()]))
strided.weight = nn.Parameter(
    DTensor.from_local(
        torch.zeros(4, 4),
        mesh,
        [_StridedShard(0, split_factor=2)],
        shape=torch.Size((8, 4)),
        stride=(4, 1),
    )
)
parallelize_module(uneven, grid["tp"], ColwiseParallel())
fully_shard(uneven, mesh=grid["dp"])
for one in (partial, strided, uneven):
    refused(lambda: PostHocEMA.from_model(one, folder / "run"))

other = Net()
with PostHocEMA.from_model(other, folder / "other", update_every=1, checkpoint_every=1) as ema:
    dist.barrier()  # as a step of a training waits for all
    ema.update_(other)
    ema.flush()
    dist.barrier()
    spread(other, "fsdp")
    refused(lambda: ema.update_(other))
    refused(lambda: PostHocEMA.from_path(folder / "other").load_into(other, 0.28))

if Path("/proc/self/cwd").exists():  # a path that is another directory in each process
    import os

    snapshotter.PATIENCE = 0.5
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))
    ema = PostHocEMA.from_model(model, "/proc/self/cwd/run", **SETTINGS)
    refused(lambda: ema.update_(model))
"""


def test_what_processes_of_a_sharded_model_cannot_do_is_named_in_all(tmp_path):
    alone(tmp_path / "taken", 4)
    outs = check_group(BEGIN + REFUSED, 2, tmp_path)
    expected = [
        f"{tmp_path}/taken: ",
        "RankError rank 1: has sigma_rels (0.1,), and rank 0 has (0.05, 0.28)",
        "RankError rank 1: has checkpoint_dir ",
        "RankError rank 1: has include ('first*',), and rank 0 has ()",
        "tensor 'weight': has the placement P",
        "tensor 'weight': has 8 rows ",
        "tensor 'weight': has 7 rows ",
        "ModelMismatchError model: ",
        "is sharded over processes",
    ]
    if Path("/proc/self/cwd").exists():
        expected.append(f"{tmp_path}/1/run: ")
    for out in outs:
        for line, text in zip(out.splitlines(), expected, strict=True):
            assert text in line
    assert steps(tmp_path / "other") == [1, 1]
    assert not list(tmp_path.glob("[01]/**/part-*"))


CLOCKS = """
model = spread(Net(), "fsdp")
ema = PostHocEMA.from_model(model, folder / "run", t_unit="tokens", **SETTINGS)
last = int(arguments[0])
for step in range(1, last + 1):
    move(model, step)
    tokens = 10 * step - (rank == 1 and step > 5)  # its own, of sequences of any length
    if (rank, step) == (1, last):
        dist.barrier()
    ema.update_(model, t=tokens)
if rank == 0:
    ema.snapshot()
    dist.barrier()
    ema.flush()
else:
    refused(ema.snapshot)
"""


@heavy
@pytest.mark.parametrize("last", [8, 6])
def test_a_clock_that_differs_between_processes_is_named_at_a_snapshot(last, tmp_path):
    """Each process would write its part for another time, and none would be complete: of snapshots
    on the schedule, and off it."""
    _, second = check_group(CLOCKS, 2, tmp_path, last)
    own = f"a snapshot of step {last}, t = {10 * last - 1}"
    other = f"step {last}, t = {10 * last};"
    assert f"rank 1: has a part of {own}, and another process of {other} call update_" in second
    assert times(tmp_path / "run") == {40}


LATE = """
import shutil

model = spread(Net(), "fsdp")
late = [f"0000000000000008-{sigma_rel}/part-00002-of-00002.safetensors" for sigma_rel in (0.1, 0.2)]
if int(arguments[0]):
    move(model, 4)
with PostHocEMA.from_model(
    model, folder / "run", **SETTINGS, resume=4 if int(arguments[0]) else None
) as ema:
    for step in range(ema.step + 1, 9):
        move(model, step if step <= 4 else step + int(arguments[0]))
        if step == 8 and int(arguments[0]) and rank == 1:
            dist.barrier()
            for part in late:  # written by a process that has outlived the first training
                shutil.copy(folder / "late" / part, folder / "run" / part)
            print(*Run(folder / "run").info()["notes"], sep="\\n")
        ema.update_(model)
        if step == 8 and int(arguments[0]) and rank == 0:
            ema.flush()
            dist.barrier()
"""


def test_a_late_part_of_a_process_that_has_outlived_its_training_is_named(tmp_path):
    check_group(LATE, 2, tmp_path, 0)
    for part in (tmp_path / "run").glob("*8-*/*2-of*"):
        late = tmp_path / "late" / part.parent.name
        late.mkdir(parents=True)
        part.rename(late / part.name)
    _, notes = check_group(LATE, 2, tmp_path, 50)
    mixed = "has 1 of 2 parts, 1 of 2 parts, of different sessions of the training"
    assert notes.count(mixed) == 2


STAGE = """
def train_stages(kinds, name, *stages):
    global model
    for kind, before, after in zip(kinds, stages, stages[1:]):
        model = spread(Net(), kind)
        ema = tracker(name, resume="auto")
        if before:
            move(model, 1000 if kind == "fsdp-tp" else before)  # a state is exact whatever weights
            dcp.load({"ema": ema}, checkpoint_id=folder / f"{name}-{before}")
            assert ema.step == before
        else:
            assert not ema.has_average
        train(model, before + 1, after, ema)
        save = dcp.save if kind == "hsdp" else dcp.async_save
        saved = save({"ema": ema}, checkpoint_id=folder / f"{name}-{after}")
        if kind != "hsdp":
            saved.result()
        ema.close()
"""


@heavy
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_resumes_bit_for_bit_on_one_arrangement_of_processes_after_the_other(tmp_path):
    """From one process to FSDP, HSDP, tensor parallelism and back."""
    for ranks, stages in (
        (1, 'train_stages(["single"], "run", 0, 3)'),
        (4, 'train_stages(["fsdp", "hsdp", "fsdp-tp", "tp"], "run", 3, 7, 8, 9, 11)'),
        (1, 'train_stages(["single"], "run", 11, 12)'),
    ):
        check_group(BEGIN + STAGE + stages, ranks, tmp_path)
    alone(tmp_path / "single", 12)
    # Each stage of `run` has ended with a snapshot off the schedule.
    run = Run(tmp_path / "run")
    scheduled = [snapshot for snapshot in run.snapshots if snapshot.t % 4 == 0]
    for found, true in zip(scheduled, Run(tmp_path / "single").snapshots, strict=True):
        check_same_snapshot(found, true)
    assert len(run.snapshots) == len(scheduled) + 6
    assert_near(run.average(0.2, t=12), truth(0.2, [2, 4, 6, 8, 10, 12]))


def test_each_process_resumes_the_path_of_its_part(tmp_path):
    stages = """
train_stages(["fsdp", "fsdp"], "resumed", 0, 5, 8)
train_stages(["fsdp"], "straight", 0, 8)
"""
    check_group(BEGIN + STAGE + stages, 2, tmp_path)
    straight = Run(tmp_path / "straight").snapshots[-1]
    resumed = Run(tmp_path / "resumed").snapshots[-1]
    assert resumed.t == 8
    assert sketch_of(straight).folds.sum() > 2
    assert resumed.sketch == straight.sketch


def test_a_state_of_complete_or_equally_sharded_tensors_is_loaded_and_others_are_named(tmp_path):
    single = alone(tmp_path / "one", 5)
    torch.save(single.state_dict(), tmp_path / "state.pt")
    code = """
import copy
from torch.distributed.tensor import DTensor, distribute_tensor, Shard

ema = tracker("run")
train(model, 1, 5, ema)
ema.flush()
dist.barrier()
own = ema.state_dict()
ema.load_state_dict(own)
import json
info = json.loads(torch.load(folder / "state.pt")["info"])
info |= {"run_id": json.loads(own["info"])["run_id"]}
complete = torch.load(folder / "state.pt") | {"info": json.dumps(info)}
ema.load_state_dict(complete)
again = ema.state_dict()
assert again["high"].keys() == {"0.1", "0.2"}
for kind in ("high", "mean"):
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
changed["high"]["0.2"]["odd"] = distribute_tensor(
    torch.zeros(5, 3), model.odd.device_mesh, [Shard(1)]
)
refused(lambda: ema.load_state_dict(changed))
refused(lambda: ema.load_state_dict({}) if rank else ema.load_state_dict(complete))
ema.flush()
dist.barrier()
figure = ema.reconstruction_error()
print(*figure.axes[0].get_legend().get_texts()[0].get_text().split())
ema.close()
dist.destroy_process_group()
refused(ema.state_dict)
"""
    for out in check_group(BEGIN + code, 2, tmp_path):
        more, odd, apart, lacks, figure, *ended = out.splitlines()
        assert more.startswith("ModelMismatchError tensor 'more.weight': ")
        assert odd.startswith("ModelMismatchError tensor 'odd': ")
        assert "[7, 3]" in odd
        assert apart.startswith("ModelMismatchError tensor 'odd': is sharded")
        assert "state: " in lacks
        assert figure.endswith("; tracked: 0.1, 0.2")
        for line in ended:
            assert line.startswith(
                "RefusedCallError PostHocEMA: averages of which each process keeps a part need all "
            )


@pytest.mark.cuda(simulated=False)
def test_averages_with_nccl_are_those_of_one_process(tmp_path):
    """As many processes as accelerators, at most two, make every exchange of tensors."""
    ranks = min(torch.cuda.device_count(), 2)
    code = """
import torch.distributed.checkpoint as dcp
backend, device = arguments
dist.destroy_process_group()
if device == "cuda":
    torch.cuda.set_device(rank)
dist.init_process_group(backend, init_method=f"file://{folder}/again", rank=rank, world_size=world)
model = spread(Net().to(device), "hsdp" if world == 4 else "fsdp")
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
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
    exact = truth(0.2, [2, 4, 6, 8])
    torch.save(dict(exact), tmp_path / "truth.pt")
    check_group(code, ranks, tmp_path, "nccl", "cuda")


# --- averaged weights of replicas, which one process keeps for all of them

TRAINED = """
def same_in_all(model):
    for name, one in sorted(held(model).items()):
        first = one.clone()
        dist.broadcast(first, 0)
        assert torch.equal(one, first), name
def go(ema, first, last):
    for step in range(first, last + 1):
        move(model, step)
        getattr(model, "module", model).mean.add_(rank)  # statistics of other batches
        ema.update_(model)
"""


def test_every_replica_gets_the_same_weights_and_the_first_keeps_them(tmp_path):
    """The tracker may be made before the model is wrapped, as in the training scripts of
    diffusers."""
    averages(tmp_path, 10, 14)
    code = """
bare = Net()
ema = PostHocEMA.from_model(bare, folder / "run", **SETTINGS)
model = spread(bare, "ddp")
refused(ema.model(model, 0.2).__enter__)  # before the first update
go(ema, 1, 10)
ema.snapshot()
raw = held(model)
single = torch.load(folder / "average-10.pt")
for label, block in ema.models(model, [0.2, 0.15, "window:1000"]).items():
    with block:
        assert not model.training
        close(model, folder / {"0.2": "truth-10.pt", "0.15": "average-10.pt"}[label])
        same_in_all(model)
    assert model.training and equal(held(model), raw)
weights = ema.state_dict(0.15, dtype="float64")
assert weights.keys() == single.keys() and weights.predicted_error is not None
assert all(
    torch.allclose(one.double(), single[name].double(), atol=1e-6) for name, one in weights.items()
)
try:
    with ema.model(model, sigma_rel=0.15):
        if rank == 1:
            raise KeyError("of the evaluation")
except KeyError:
    pass
assert model.training and equal(held(model), raw)
ema.load_into(model, 0.15)
close(model, folder / "average-10.pt")
same_in_all(model)
state = ema.state_dict()
assert (state == {}) == (rank == 1)
ema.close()
dist.barrier()

move(model, 10)
ema = PostHocEMA.from_path(folder / "run", model)
read = ema.state_dict(
    sigma_rel=0.15
)  # every process may read the snapshots, until training continues
assert all(
    torch.allclose(one.double(), single[name].double(), atol=1e-6) for name, one in read.items()
)
ema.load_state_dict(state)
assert ema.step == 10
with ema.model(model, 0.2):
    close(model, folder / "truth-10.pt")
go(ema, 11, 14)
assert (ema.step, ema.t, ema.state_dict() == {}) == (14, 14.0, rank == 1)
with ema.model(model, 0.2):
    close(model, folder / "truth-14.pt")
    same_in_all(model)
ema.close()
"""
    for out in check_group(TRAINED + code, 2, tmp_path):
        assert out.startswith(f"NotReadyError {tmp_path / 'run'}: has no average yet: ")


@pytest.mark.parametrize("call", ["train(model, 1, 4, ema)", "ema.models(model, [0.2])"])
def test_a_replica_that_makes_its_tracker_late_is_waited_for(tmp_path, call):
    """No wrapper keeps these three in step. A due snapshot and a call for averages need all."""
    code = """
import time
from posthoc_cli.tracker.processes import Notes
has_note = Notes._has_note


def noted(notes, other):
    is_there = has_note(notes, other)
    if not is_there:
        (folder / f"{rank} waits").touch()
    return is_there


Notes._has_note = noted
model = Net()
waiting = [folder / f"{other} waits" for other in range(int(arguments[1]), rank)]
while not all(path.exists() for path in waiting):
    time.sleep(0.01)
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
exec(arguments[0])
train(model, ema.step + 1, 8, ema)
with ema.model(model, 0.2):
    close(model, folder / "truth-8.pt")
ema.close()
"""
    averages(tmp_path, 8)
    first_to_wait = int("train" in call)  # the writer waits for nobody
    check_group(code, 3, tmp_path, call, str(first_to_wait))


def test_a_process_that_fails_in_a_call_or_has_no_tracker_is_named(tmp_path):
    averages(tmp_path, 8)
    code = """
from posthoc_cli.tracker import processes

processes.PATIENCE = 0.5
model = spread(Net(), "ddp")
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
go(ema, 1, 8)
raw = held(model)
dist.barrier()
refused(ema.model(torch.nn.Linear(2, 2) if rank == 1 else model, sigma_rel=0.15).__enter__)
assert model.training and equal(held(model), raw)
dist.barrier()
alone = dist.new_group([0], use_local_synchronization=True) if rank == 0 else None
for group in (None, alone) if rank == 0 else ():
    one = PostHocEMA.from_model(model, folder / f"one-{group is None}", **SETTINGS, group=group)
    go(one, 1, 8)
    if group is None:
        refused(one.model(model, 0.2).__enter__)
        continue
    with one.model(model, 0.2):
        close(model, folder / "truth-8.pt")
dist.barrier()
"""
    first, second, third = run_group(TRAINED + code, 3, tmp_path)
    for result in (first, second, third):
        assert result.code == 0, result.err
    lacks, missing = first.out.splitlines()
    assert lacks.startswith("RankError rank 1: tensor 'odd': ")
    assert missing.startswith(f"RankError rank 1: has no tracker of {tmp_path / 'one-True'}")
    assert second.out.startswith("ModelMismatchError tensor 'odd': ")
    assert third.out.startswith("RankError rank 1: tensor 'odd': ")


def test_a_process_that_has_died_is_an_error_of_the_others(tmp_path):
    code = """
import os
model = spread(Net(), "ddp")
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
go(ema, 1, 8)
ema.flush()
dist.barrier()
if rank == 1:
    os._exit(0)
refused(ema.model(model, 0.2).__enter__)
sys.stdout.flush()
os._exit(0)
"""
    first, _ = run_group(TRAINED + code, 2, tmp_path)
    assert first.out == "RankError another process of this job: failed or died\n", first.err


GONE = VanishedError("a", "is gone")
BROKE = RankError("a", "broke")


@pytest.mark.parametrize(
    ("own", "other", "raised"),
    [
        (GONE, (False, 1, "b"), RankError),
        (GONE, (True, 1, "b"), VanishedError),
        (BROKE, (True, 1, "b"), RankError),
        (None, (True, 1, "b"), VanishedError),
    ],
)
def test_processes_try_again_only_if_snapshots_vanished_and_nothing_else_failed(own, other, raised):
    """All processes of a group must do the same."""

    class Two(Group):
        def from_all(self, value):
            assert value is None or value[0] == (own is GONE)  # what the others are told
            return [value, other]

    def work():
        if own is not None:
            raise own

    with pytest.raises(raised):
        Two(0, (0, 1)).together(work)


def test_an_own_error_says_more_than_that_another_process_has_died():
    class Two(Group):
        def from_all(self, value):
            raise RankError(f"another process than that of {value}", "died")

    def work():
        raise BROKE

    with pytest.raises(RankError, match="broke"):
        Two(0, (0, 1)).together(work)
