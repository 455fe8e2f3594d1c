"""Groups of processes on gloo that train one model, and what their averages must be.

Parameters follow a walk that every process knows in full, so that the values of a sharded model
equal, bit for bit, those of the same model in one process, whatever the order in which gradients
would have been added.
"""

import os
import sys
import tempfile
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent

import torch
import torch.distributed as dist
from ema_command import Result
from factories import exact_weights, snapshots_in
from forked import Forked
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from posthoc_cli import PostHocEMA, PostHocError

SETTINGS = {
    "sigma_rels": (0.1, 0.2),
    "update_every": 2,
    "checkpoint_every": 4,
    "checkpoint_dtype": None,
}


def start_group(code, ranks, folder, *arguments):
    """Start processes that run `code` with `rank`, `world`, `folder` and `arguments`, in a gloo
    group.

    All names of this module, Path and Run are at hand. The group is left at the end of the code
    unless the code did so itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # a killed group leaves its own behind
    descriptor, meeting = tempfile.mkstemp(prefix="meeting-", dir=folder)
    os.close(descriptor)
    program = PROGRAM + indent(code, "    ")
    return [Forked(program, rank, ranks, meeting, folder, *arguments) for rank in range(ranks)]


def process():
    """Return what `start_group` has given: `rank`, `world`, `folder` and `arguments`."""
    rank, world, _, folder, *arguments = sys.argv[1:]
    return int(rank), int(world), Path(folder), arguments


PROGRAM = """
import sys, groups
from pathlib import Path
from groups import *
from posthoc_cli import Run
rank, world, meeting, folder, *arguments = sys.argv[1:]
with groups.joined(int(rank), int(world), meeting) as (rank, world):
    folder = Path(folder)
"""


def run_group(code, ranks, folder, *arguments):
    """Run processes as `start_group` does until they end; return the result of each."""
    processes = start_group(code, ranks, folder, *arguments)
    results = []
    try:
        for process in processes:
            exit_code = process.wait(120)
            out, err = process.communicate()
            results.append(Result(exit_code, out, err))
        return results
    finally:
        for process in processes:
            process.kill()


def check_group(code, ranks, folder, *arguments):
    results = run_group(code, ranks, folder, *arguments)
    errors = "\n".join(result.err for result in results)
    assert all(result.code == 0 for result in results), errors
    return [result.out for result in results]


@contextmanager
def joined(rank, world, meeting):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        yield rank, world
    except BaseException:
        sys.stdout.flush()
        raise
    else:
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


class Net(nn.Module):
    """A network of uneven shapes: 5 and 7 rows, fewer rows than processes, a frozen tensor,
    buffers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 7, bias=False)
        self.odd = nn.Parameter(torch.zeros(5, 3))
        self.short = nn.Parameter(torch.zeros(1, 4))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        hidden = self.first(x).relu()
        logits = self.second(hidden)
        return logits.sum() + self.odd.sum() + self.short.sum()


def spread(model, kind):
    """Return the model wrapped for a kind of parallel training: fsdp, hsdp, tp, fsdp-tp, ddp; else
    unchanged."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    of_two_rows = (2, world // 2)
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    if kind == "fsdp":
        fully_shard(model.first)
        return fully_shard(model)
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", of_two_rows, mesh_dim_names=("replicate", "shard"))
        return fully_shard(model, mesh=mesh)
    if kind == "tp":
        mesh = init_device_mesh("cpu", (world,))
        return parallelize_module(model, mesh, plan)
    if kind == "fsdp-tp":
        mesh = init_device_mesh("cpu", of_two_rows, mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        return fully_shard(model, mesh=mesh["dp"])
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return model


def own_part(tensor):
    """Return this process's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def value(name, step, like):
    """Return the complete value of a tensor after a step: a walk from a start that depends on the
    name."""
    total = _draw(f"{name}/0", like.shape)
    for number in range(1, step + 1):
        total += 0.05 * _draw(f"{name}/{number}", like.shape)
    if not like.is_floating_point():
        total *= 100
    return total.to(like.dtype)


def _draw(text, shape):
    seed = zlib.crc32(text.encode())
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def local(tensor, complete):
    """Return this process's part of a complete tensor that is distributed as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return complete
    (chunk,) = tensor.__create_chunk_list__()
    for axis, length in enumerate(chunk.sizes):
        first = chunk.offsets[axis] if length else 0
        complete = complete.narrow(axis, first, length)
    return complete


@torch.no_grad()
def move(model, step):
    bare = getattr(model, "module", model)
    for name, tensor in [*bare.named_parameters(), *bare.named_buffers()]:
        complete = value(name, step, tensor)
        part = local(tensor, complete)
        own_part(tensor).copy_(part)


def train(model, first, last, *trackers):
    for step in range(first, last + 1):
        move(model, step)
        for tracker in trackers:
            tracker.update_(model)


def restore(model, directory):
    """Move a model to the newest time that has all snapshots, as a training restores its own
    checkpoint."""
    stored = Counter(snapshot.step for snapshot in snapshots_in(directory))
    all_of_them = len(SETTINGS["sigma_rels"])
    complete = [step for step, count in stored.items() if count == all_of_them]
    move(model, max(complete, default=0))


def alone(folder, last, **options):
    """Return the closed tracker of the same training in one process, continued from the folder."""
    net = Net()
    restore(net, folder)
    with PostHocEMA.from_model(net, folder, **SETTINGS | options) as ema:
        train(net, ema.step + 1, last, ema)
    return ema


def averages(folder, *steps):
    """Return averages of one process at these steps: a synthesized one, a tracked one, and the true
    one."""
    net = Net()
    before = 0
    with PostHocEMA.from_model(net, folder / "single", **SETTINGS) as ema:
        for step in steps:
            train(net, before + 1, step, ema)
            before = step
            ema.snapshot()
            average = dict(ema.state_dict(0.15))
            torch.save(average, folder / f"average-{step}.pt")
            exact = truth(0.2, range(2, step + 1, 2))
            torch.save(exact, folder / f"truth-{step}.pt")


# --- what a process holds


def _tensors(model):
    bare = getattr(model, "module", model)
    parameters = dict(bare.named_parameters(remove_duplicate=False))
    buffers = dict(bare.named_buffers())
    return parameters | buffers


def held(model):
    return {name: own_part(tensor).clone() for name, tensor in _tensors(model).items()}


def equal(one, other):
    if one.keys() != other.keys():
        return False
    return all(torch.equal(one[name], other[name]) for name in one)


def filled(model, complete):
    tensors = _tensors(model)
    for name, value in complete.items():
        tensor = tensors[name]
        part = local(tensor, value)
        if not torch.equal(own_part(tensor), part):
            return False
    return True


def close(model, path, tolerance=1e-6):
    """Fail if a model's tensors differ from the complete tensors of a file."""
    tensors = _tensors(model)
    for name, value in torch.load(path).items():
        tensor = tensors[name]
        found = own_part(tensor).double()
        wanted = local(tensor, value).double()
        assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance), name


def same_in_all(model):
    """Fail if a process holds other values than the first one."""
    for name, one in sorted(held(model).items()):
        first = one.clone()
        dist.broadcast(first, 0)
        assert torch.equal(one, first), name


def go(ema, model, first, last):
    """Train replicas, whose statistics are of different batches."""
    for step in range(first, last + 1):
        move(model, step)
        getattr(model, "module", model).mean.add_(dist.get_rank())
        ema.update_(model)


def refused(work, kind=PostHocError):
    try:
        work()
    except kind as error:
        print(type(error).__name__, error)
    else:
        raise AssertionError("was done")


# --- what averages must be


def truth(sigma_rel, updates):
    """Return the float64 power-function average of each parameter over updates at these steps."""
    shares = exact_weights(sigma_rel, updates).tolist()
    averages = {}
    for name, parameter in Net().named_parameters():
        if not parameter.requires_grad:
            continue
        average = torch.zeros(parameter.shape, dtype=torch.float64)
        for share, step in zip(shares, updates, strict=True):
            weights = value(name, step, parameter)
            average += share * weights.double()
        averages[name] = average
    return averages
