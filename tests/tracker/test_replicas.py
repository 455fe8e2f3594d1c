"""Averaged weights in replicas, which one process keeps for all or each a part of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checking import refused
from groups import averages, check_group, run_group, truth

from posthoc_cli import Run
from posthoc_cli.tracker.sharding import check_torch, share_out

TRAINED = """
from posthoc_cli.errors import ModelMismatchError, NotReadyError, RankError
from posthoc_cli.tracker import sharding
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


@pytest.mark.parametrize(("kind", "ranks", "shared"), [("ddp", 2, False), ("replicas", 3, True)])
def test_every_replica_gets_the_same_weights(kind: str, ranks: int, shared: bool, tmp_path: Path) -> None:
    averages(tmp_path, 10)
    code = """
model = spread(Net(), arguments[0])
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS, shard_averages=arguments[1] == "True")
refused(ema.averaged(model, tracked=0.2).__enter__, NotReadyError)
go(ema, 1, 10)
raw = held(model)
with ema.averaged(model, tracked=0.2):
    close(model, folder / "truth-10.pt")
    same_in_all(model)
assert model.training and equal(held(model), raw)
single = torch.load(folder / "average-10.pt")
with ema.model(model, sigma_rel=0.15):
    assert not model.training
    close(model, folder / "average-10.pt")
    same_in_all(model)
assert model.training and equal(held(model), raw)
weights = ema.state_dict(0.15, dtype="float64")
assert weights.keys() == single.keys() and weights.predicted_error is not None
assert all(torch.allclose(one.double(), single[name].double(), atol=1e-6) for name, one in weights.items())
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
if arguments[1] == "False":
    state = ema.state_dict()
    ema.close()
    dist.barrier()
    ema = PostHocEMA.from_path(folder / "run", model)
    ema.load_state_dict(state)
    with ema.averaged(model, tracked=0.2):
        close(model, folder / "truth-10.pt")
else:
    tiny = torch.nn.Linear(1, 1)
    with PostHocEMA.from_model(tiny, folder / "tiny", update_every=1, shard_averages=True) as other:
        other.update_(tiny)
        assert other.keeps_averages == (rank < 2)
        assert other.state_dict(0.15).keys() == {"weight", "bias"}
        tiny.new = torch.nn.Parameter(torch.zeros(2))
        try:
            other.update_(tiny)
            assert not other.keeps_averages
        except ModelMismatchError as error:
            assert "'new': is in the model, but was not when tracking began" in str(error)
ema.close()
"""
    for out in check_group(TRAINED + code, ranks, tmp_path, kind, shared):
        assert "no live average yet" in out


def test_a_process_that_does_not_make_the_call_or_fails_in_it_is_named(tmp_path: Path) -> None:
    averages(tmp_path, 8)
    code = """
sharding.GRACE, sharding.WARNING, sharding.LIMIT = 0.1, 0.3, 2.0
model = spread(Net(), "ddp")
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
go(ema, 1, 8)
raw = held(model)
dist.barrier()
refused(ema.model(torch.nn.Linear(2, 2) if rank == 1 else model, sigma_rel=0.15).__enter__)
assert model.training and equal(held(model), raw)
dist.barrier()
if rank == 0:
    with ema.averaged(model, tracked=0.2, alone=True):
        close(model, folder / "truth-8.pt")
if rank != 2:
    refused(lambda: ema.state_dict(0.15), RankError)
if rank == 1:
    refused(lambda: ema.state_dict(0.15, alone=True), NotReadyError)
dist.barrier()
if rank != 2:
    two = PostHocEMA.from_model(model, folder / "two", **SETTINGS)
if rank == 0:
    one = PostHocEMA.from_model(model, folder / "one", **SETTINGS)
dist.barrier()
if rank != 2:
    go(two, 1, 8)
    with two.averaged(model, tracked=0.2):
        close(model, folder / "truth-8.pt")
if rank == 0:
    go(one, 1, 8)
    with one.averaged(model, tracked=0.2):
        close(model, folder / "truth-8.pt")
"""
    results = run_group(TRAINED + code, 3, tmp_path)
    assert all(result.code == 0 for result in results), results
    lines = [result.out.splitlines() for result in results]
    hint = f"make it in every process, with a tracker of {tmp_path / 'run'}; or"
    missing = f"RankError rank 2: did not make this call within 2 s; {hint}"
    lacks = "tensor 'odd': is in the averaged weights, but the model has no such tensor"
    assert lines[0][0] == lines[2][0] == f"RankError rank 1: {lacks}"
    assert lines[1][0] == f"ModelMismatchError {lacks}"
    assert lines[0][1].startswith(missing)
    assert lines[1][1].startswith(missing)
    assert lines[1][2].startswith("NotReadyError this process keeps no averages")
    assert "waiting for rank 2: make it in every process, with a tracker of " in results[0].err


def test_averages_that_replicas_share_out_are_those_of_one_process_bit_for_bit(tmp_path: Path) -> None:
    averages(tmp_path, 8)
    code = """
import json
from torch.distributed.tensor.debug import CommDebugMode
model = spread(Net(), "ddp")
mode = CommDebugMode()
with PostHocEMA.from_model(model, folder / "run", **SETTINGS, shard_averages=True) as ema:
    go(ema, 1, 6)
    with mode:
        go(ema, 7, 8)
        ema.flush()
    kept = ema._pipeline.now.averages.accumulators.recent
    print(json.dumps([mode.get_total_counts(), sum(flat.nbytes for flats in kept for flat in flats.flats)]))
"""
    counts = [json.loads(out) for out in check_group(TRAINED + code, 3, tmp_path)]
    assert [collectives for collectives, _ in counts] == [0, 0, 0]
    # 131 averaged elements, two profiles of float32: a third each, and at most one small tensor more.
    assert sum(nbytes for _, nbytes in counts) == 131 * 2 * 4
    assert max(nbytes for _, nbytes in counts) <= (131 / 3 + 12) * 2 * 4
    files = sorted((tmp_path / "single").glob("*.safetensors"))
    folders = sorted(path for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert [path.name for path in folders] == [path.stem for path in files]
    whole, parts = Run(tmp_path / "single"), Run(tmp_path / "run")
    for width, t in ((0.1, 4), (0.2, 8), (0.15, 8)):
        expected, found = (run.average(width, t=t, method="paper") for run in (whole, parts))
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    exact = torch.load(tmp_path / "truth-8.pt")
    found = Run(tmp_path / "run").average(0.2)
    assert all(torch.allclose(found[name].double(), value, rtol=1e-6, atol=1e-6) for name, value in exact.items())


def test_replicas_that_share_averages_out_go_on_in_another_number(tmp_path: Path) -> None:
    code = """
model = spread(Net(), "replicas")
first, last = int(arguments[0]), int(arguments[1])
if first == 5:
    ema = PostHocEMA.from_path(folder / "run", model, shard_averages=True)
else:
    ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS, resume="auto", shard_averages=True)
with ema:
    assert ema.step == first - 1
    go(ema, first, last)
if world > 1:
    refused(lambda: ema.state_dict(0.15, alone=True))
"""
    code = TRAINED + code
    for out in check_group(code, 2, tmp_path, 1, 4):
        assert out.startswith("InvalidValueError alone True: each process keeps a part of the averages only")
    check_group(code, 3, tmp_path, 5, 8)
    check_group(code, 1, tmp_path, 9, 12)
    found, exact = Run(tmp_path / "run").average(0.2), truth(0.2, [2, 4, 6, 8, 10, 12])
    assert all(torch.allclose(found[name].double(), value, rtol=2e-6, atol=2e-6) for name, value in exact.items())


def test_shares_are_rows_as_torch_cuts_them_and_small_tensors_where_least_is() -> None:
    shapes = {"large": (10, 4), "short": (2, 5), "scalar": (), "wide": (3, 30), "empty": (0, 4), "statistics": (8,)}
    tensors = {name: torch.arange(torch.Size(shape).numel()).reshape(shape) for name, shape in shapes.items()}
    shares = share_out(tensors, {"statistics"}, 4)
    cut = [tensors["large"][rows] for _, rows in shares["large"]]
    assert [rank for rank, _ in shares["large"]] == [0, 1, 2, 3]
    assert all(map(torch.equal, cut, torch.chunk(tensors["large"], 4)))
    assert shares["statistics"] == [(0, ...)]
    # Rows of `large`, and the statistics: 20, 12, 12, 4.
    assert shares["wide"] == [(3, ...)]
    assert shares["short"] == [(1, ...)]
    assert shares["scalar"] == [(2, ...)]
    assert shares["empty"] == [(2, ...)]
    assert share_out({"five": torch.zeros(5, 2)}, set(), 4)["five"] == [
        (0, slice(0, 2)),
        (1, slice(2, 4)),
        (2, slice(4, 5)),
    ]


def test_a_torch_without_public_dtensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.distributed.tensor.DTensor")
    with refused("torch", "too old for sharded models"):
        check_torch()
