"""Averaged weights of replicas, which one process keeps for all of them."""

from __future__ import annotations

from pathlib import Path

from groups import averages, check_group, run_group

TRAINED = """
from posthoc_cli.errors import RankError
from posthoc_cli.tracker import processes
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


def test_every_replica_gets_the_same_weights_and_the_first_keeps_them(tmp_path: Path) -> None:
    """The tracker may be made before the model is wrapped, as in the training scripts of diffusers."""
    averages(tmp_path, 10, 14)
    code = """
bare = Net()
ema = PostHocEMA.from_model(bare, folder / "run", **SETTINGS)
model = spread(bare, "ddp")
raw = held(model)
with ema.model(model, 0.2):  # the weights themselves, in all processes
    assert equal(held(model), raw)
go(ema, 1, 10)
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
state = ema.state_dict()
assert (state == {}) == (rank == 1)
ema.close()
dist.barrier()

move(model, 10)
ema = PostHocEMA.from_path(folder / "run", model)
read = ema.state_dict(sigma_rel=0.15)  # every process may read the snapshots, until training continues
assert all(torch.allclose(one.double(), single[name].double(), atol=1e-6) for name, one in read.items())
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
    check_group(TRAINED + code, 2, tmp_path)


def test_a_process_that_does_not_make_the_call_or_fails_in_it_is_named(tmp_path: Path) -> None:
    averages(tmp_path, 8)
    code = """
processes.GRACE, processes.WARNING, processes.LIMIT = 0.1, 0.3, 2.0
model = spread(Net(), "ddp")
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
go(ema, 1, 8)
raw = held(model)
dist.barrier()
refused(ema.model(torch.nn.Linear(2, 2) if rank == 1 else model, sigma_rel=0.15).__enter__)
assert model.training and equal(held(model), raw)
dist.barrier()
if rank != 2:
    refused(lambda: ema.state_dict(0.15), RankError)
dist.barrier()
if rank == 0:
    one = PostHocEMA.from_model(model, folder / "one", **SETTINGS)
    go(one, 1, 8)
    with one.model(model, 0.2):
        close(model, folder / "truth-8.pt")
"""
    results = run_group(TRAINED + code, 3, tmp_path)
    assert all(result.code == 0 for result in results), results
    lines = [result.out.splitlines() for result in results]
    hint = f"make it in every process, with a tracker of {tmp_path / 'run'}"
    missing = f"RankError rank 2: did not make this call within 2 s; {hint}"
    lacks = "tensor 'odd': is in the averaged weights, but the model has no such tensor"
    assert lines[0][0] == lines[2][0] == f"RankError rank 1: {lacks}"
    assert lines[1][0] == f"ModelMismatchError {lacks}"
    assert lines[0][1].startswith(missing)
    assert lines[1][1].startswith(missing)
    assert "waiting for rank 2: make it in every process, with a tracker of " in results[0].err
