"""Averaged weights while a sharded model trains: swapped into the model, as a state dict, and gathered."""

from __future__ import annotations

from pathlib import Path

import pytest
from groups import alone, averages, check_group

SPREAD = [("fsdp", 3), ("hsdp", 4), ("tp", 2), ("fsdp-tp", 4)]

TRAINED = """
from torch.distributed.tensor.debug import CommDebugMode
model = spread(Net(), arguments[0])
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
x = torch.arange(12.0).reshape(2, 6)
"""


@pytest.mark.parametrize(("kind", "ranks"), SPREAD)
def test_a_sharded_model_holds_the_average_in_the_block_and_its_own_weights_after_it(
    kind: str, ranks: int, tmp_path: Path
) -> None:
    averages(tmp_path, 8, 10)
    code = """
train(model, 1, 8, ema)
raw = held(model)
model(x).detach()
before = model(x).detach()
mode = CommDebugMode()
with mode:
    block = ema.model(model, sigma_rel=0.15)
    averaged = block.__enter__()
assert not [str(call) for call in mode.get_comm_counts() if "allgather_base" in str(call) or "into_tensor" in str(call)]
complete = Run(folder / "run").average(0.15)
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
from posthoc_cli.tracker.processes import reshard
reshard(model)
train(model, 9, 10, ema)
with ema.model(model, 0.2):
    close(model, folder / "truth-10.pt")
with ema.model(model, sigma_rel=0.15, t=8):
    close(model, folder / "average-8.pt")
single = torch.load(folder / "average-10.pt")
blocks = ema.models(model, [0.15, 0.2, "window:1000"])
assert [*blocks] == ["0.15", "0.2"]
for label, block in blocks.items():
    model(x).detach()  # after which some parameters are complete
    with block:
        close(model, folder / {"0.2": "truth-10.pt", "0.15": "average-10.pt"}[label])
weights = ema.state_dict(0.15)
parameters = dict(model.named_parameters())
assert weights.keys() == single.keys() and weights.predicted_error is not None
for name, value in weights.items():
    assert value.shape == single[name].shape and type(value) is type(parameters.get(name, torch.empty(0)).data), name
if arguments[0] != "tp":
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    with ema.model(model, 0.15):
        complete = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for name, value in single.items() if rank == 0 else ():
        assert torch.allclose(complete[name].double(), value.double(), rtol=1e-5, atol=1e-6), name
ema.load_into(model, 0.15)
close(model, folder / "average-10.pt", 1e-5)
try:
    ema.load_into(model, 0.15, dtype=torch.float64)
except PostHocError as error:
    assert "a sharded model keeps the dtypes it has" in str(error)
ema.close()
"""
    check_group(TRAINED + code, ranks, tmp_path, kind)


def test_an_error_of_one_process_is_raised_in_all_and_each_model_keeps_its_weights(tmp_path: Path) -> None:
    """Also an error within the block, and an interrupt of a process that waits for the other one."""
    code = """
import signal, time
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
if rank == 0:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
else:
    time.sleep(1)
try:
    ema.state_dict(0.2)
except (KeyboardInterrupt, PostHocError) as error:
    print(error)
assert ema.state_dict(0.2)
ema.close()
"""
    (first, other, _), (second, another, left) = map(str.splitlines, check_group(TRAINED + code, 2, tmp_path, "fsdp"))
    assert first.startswith("RankError rank 1: ")
    assert "is damaged" in first
    assert second.startswith("FileFormatError ")
    for text in (other, another):
        assert "of another shape, or spread over the processes in another way than when tracked" in text
    assert left.startswith("rank 0: left this call by KeyboardInterrupt")


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_processes_that_ask_for_different_averages_are_named(kind: str, tmp_path: Path) -> None:
    code = """
train(model, 1, 8, ema)
for options in ({"sigma_rel": 0.15 + 0.05 * rank}, {"sigma_rel": 0.15, **({"t": 4} if rank else {})}):
    refused(ema.model(model, **options).__enter__)
with ema.model(model, sigma_rel=0.15):
    pass
ema.close()
"""
    hint = "make the same call in every process"
    for out in check_group(TRAINED + code, 2, tmp_path, kind):
        assert out.splitlines() == [
            f"RankError rank 1: asks for model(sigma_rel 0.2), and rank 0 for model(sigma_rel 0.15); {hint}",
            f"RankError rank 1: asks for model(sigma_rel 0.15, t=4), and rank 0 for model(sigma_rel 0.15); {hint}",
        ]


@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_a_run_of_one_process_loads_into_a_sharded_model_before_it_resumes(kind: str, tmp_path: Path) -> None:
    alone(tmp_path / "one", 8)
    code = """
ema = PostHocEMA.from_path(folder / "one", model)
move(model, 9)
raw = held(model)
for time in (4, 8):
    with ema.model(model, sigma_rel=0.15, t=time):
        assert filled(model, Run(folder / "one").average(0.15, t=time)), time
assert equal(held(model), raw)
ema.load_into(model, 0.15, t=4)
assert filled(model, Run(folder / "one").average(0.15, t=4))
ema.close()
"""
    check_group(TRAINED + code, 2, tmp_path, kind)


def test_tied_parameters_and_half_precision_of_a_sharded_model(tmp_path: Path) -> None:
    code = """
from torch import nn
from torch.distributed.fsdp import fully_shard
model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 5), nn.Linear(5, 7, bias=False)).bfloat16()
model[2].weight = model[0].weight
fully_shard(model)
other = PostHocEMA.from_model(
    model, folder / "tied", update_every=1, checkpoint_every=2, checkpoint_dtype="float32", device="cpu")
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
refused(lambda: other.load_into(model, 0.15, dtype=torch.float32))
other.close()
dist.barrier()
dist.destroy_process_group()
refused(lambda: other.state_dict(0.15))
"""
    for out in check_group(TRAINED + code, 2, tmp_path, "fsdp"):
        dtype, destroyed = out.splitlines()
        assert "keeps the dtypes it has" in dtype
        assert "their group was destroyed" in destroyed
