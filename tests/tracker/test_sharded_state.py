"""Exact resumption of sharded models through torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from groups import alone, check_group, truth
from tracker.runs import assert_near

from posthoc_cli import Run
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.path import decode_path

BEGIN = """
import torch.distributed.checkpoint as dcp
model = spread(Net(), arguments[0])
def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, **SETTINGS, resume="auto", **options)
"""

STAGE = (
    BEGIN
    + """
before, after = int(arguments[1]), int(arguments[2])
ema = tracker("run")
if before:
    move(model, before)
    dcp.load({"ema": ema}, checkpoint_id=folder / f"dcp-{before}")
    assert ema.step == before
else:
    assert ema.state_dict()["standing"]["t"] == 0
train(model, before + 1, after, ema)
saved = (dcp.save if arguments[0] == "hsdp" else dcp.async_save)({"ema": ema}, checkpoint_id=folder / f"dcp-{after}")
if arguments[0] != "hsdp":
    saved.result()
ema.close()
dcp.save({"ema": ema}, checkpoint_id=folder / f"closed-{after}")
"""
)


def tensors_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    found = {"copies": state["copies"]}
    for kind in ("high", "mean"):
        found |= {f"{kind}/{key}": own for key, own in state[kind].items()}
    return {f"{kind}/{name}": tensor for kind, own in found.items() for name, tensor in own.items()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_resumes_bit_for_bit_on_one_arrangement_of_processes_after_the_other(tmp_path: Path) -> None:
    """From one process to FSDP, HSDP, tensor parallelism and back."""
    for kind, ranks, before, after in (
        ("single", 1, 0, 3), ("fsdp", 3, 3, 7), ("hsdp", 4, 7, 8), ("fsdp-tp", 4, 8, 9), ("tp", 2, 9, 11),
        ("single", 1, 11, 12),
    ):  # fmt: skip
        check_group(STAGE, ranks, tmp_path, kind, before, after)
    single = alone(tmp_path / "single", 12)
    expected = single.state_dict()
    for end in ("dcp-12", "closed-12"):
        found = single.state_dict()
        for tensor in tensors_of(found).values():
            tensor.zero_()
        dcp.load({"ema": found}, checkpoint_id=tmp_path / end)
        loaded, right = tensors_of(found), tensors_of(expected)
        assert loaded.keys() == right.keys()
        assert [name for name, tensor in right.items() if not torch.equal(loaded[name], tensor)] == []
        assert found["clock"] == expected["clock"]
        assert found["standing"] == expected["standing"] | {"inherited": [0.0, 0.0]}
    single_run, run = ({(s.t, s.sigma_rel): s for s in read_directory(tmp_path / name)} for name in ("single", "run"))
    # Each stage of `run` has ended with a snapshot off the schedule, of the averages that the next resumes from.
    assert run.keys() == single_run.keys() | {(t, sigma_rel) for t in (2, 6, 10) for sigma_rel in (0.1, 0.2)}
    assert len(list((tmp_path / "run" / "superseded").glob("*"))) == 0
    for key, snapshot in single_run.items():
        assert all(torch.equal(run[key].tensor(name), snapshot.tensor(name)) for name in snapshot.entries), key
        measured, true = run[key].measurements, snapshot.measurements
        assert measured is not None
        assert true is not None
        assert measured.norm == pytest.approx(true.norm)
        assert measured.rounding == pytest.approx(true.rounding)
    assert_near(Run(tmp_path / "run").average(0.2, t=12), truth(0.2, [2, 4, 6, 8, 10, 12]))


def test_each_process_resumes_the_path_of_its_part(tmp_path: Path) -> None:
    found = {}
    for name, stages in (("straight", ((0, 8),)), ("resumed", ((0, 5), (5, 8)))):
        for before, after in stages:
            check_group(STAGE, 2, tmp_path / name, "fsdp", before, after)
        found[name] = read_directory(tmp_path / name / "run")[-1]
    assert found["resumed"].t == 8
    assert decode_path(found["straight"].sketch).sketch.folds.sum() > 2
    assert found["resumed"].sketch == found["straight"].sketch


TRAINED = (
    BEGIN
    + """
ema = tracker("run")
train(model, 1, 5, ema)
ema.flush()
dist.barrier()
"""
)


def test_a_state_of_complete_or_equally_sharded_tensors_is_loaded_and_others_are_named(tmp_path: Path) -> None:
    torch.save(alone(tmp_path / "one", 5).state_dict(), tmp_path / "state.pt")
    code = """
import copy
from torch.distributed.tensor import DTensor, distribute_tensor, Shard
own = ema.state_dict()
ema.load_state_dict(own)
complete = torch.load(folder / "state.pt") | {key: own[key] for key in ("run_id", "snapshots")}
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
"""
    for out in check_group(TRAINED + code, 2, tmp_path, "fsdp"):
        lines = out.splitlines()
        assert "tensor 'more.weight': is in the state or in the model, but not in both" in lines[0]
        assert "tensor 'odd': is torch.float32 of shape [7, 3] in the state, not " in lines[1]
        assert "tensor 'odd': is sharded over the processes in another way in the state than in the model" in lines[2]
        assert "state: " in lines[3]
        assert lines[4].startswith("RankError rank 1: is at step 6, t = 6, and rank 0 at step 5")
        assert lines[5] == "4 averages up to t = 6"
        assert all("their group was destroyed" in line for line in lines[6:])
