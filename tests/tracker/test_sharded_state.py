"""Going on exactly with sharded models: by torch.distributed.checkpoint, and from a folder of a state's parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from groups import Net, check_group, move, run_group, truth

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import FileFormatError, MismatchError
from posthoc_cli.profiles import gamma_from_sigma_rel
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.states import read_state
from posthoc_cli.tracker.state import open_state

SETTINGS = "sigma_rels=(0.1, 0.2), update_every=2, checkpoint_every=4, checkpoint_dtype=None"

BEGIN = f"""
import torch
import torch.distributed.checkpoint as dcp
from posthoc_cli import PostHocEMA, PostHocError
model = groups.spread(groups.Net(), arguments[0])
def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, {SETTINGS}, **options)
def train(first, last, *trackers):
    for step in range(first, last + 1):
        groups.move(model, step)
        for one in trackers:
            one.update_(model)
"""

STOP = (
    BEGIN
    + """
ema = tracker("run")
assert ema.state_dict()["averages_t"] == 0
train(1, 7, ema)
dcp.save({"ema": ema}, checkpoint_id=folder / "dcp")
ema.save_state(folder / "state")
ema.save_state(folder / "state")
train(8, 8, ema)
ema.close()
"""
)

GO_ON = (
    BEGIN
    + """
ema, other = tracker("run"), tracker("other")
dcp.load({"ema": ema}, checkpoint_id=folder / "dcp")
other.load_state(folder / "state")
assert ema.step == other.step == 7 and ema.run_id == other.run_id
train(8, 12, ema, other)
ema.save_state(folder / "end")
other.save_state(folder / "end-other")
ema.close()
other.close()
"""
)


def single_run(folder: Path) -> None:
    """The same training in one process, without interruption; its state at the end is in `whole`."""
    net = Net()
    with PostHocEMA.from_model(
        net, folder / "single", (0.1, 0.2), update_every=2, checkpoint_every=4, checkpoint_dtype=None
    ) as ema:
        for step in range(1, 13):
            move(net, step)
            ema.update_(net)
        ema.save_state(folder / "whole")


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with open_state(path) as state:
        found: dict[str, Mapping[str, torch.Tensor]] = {"copies": state["copies"]}
        for kind in ("totals", "recent"):
            found |= {f"{kind}/{key}": own for key, own in state[kind].items()}
        return {f"{kind}/{name}": own[name].clone() for kind, own in found.items() for name in own}


@pytest.mark.parametrize(
    ("kinds", "ranks"),
    [
        (("fsdp", "fsdp"), (3, 2)),
        (("fsdp", "hsdp"), (2, 4)),
        (("hsdp", "tp"), (4, 2)),
        (("fsdp", "single"), (2, 1)),
        (("single", "fsdp"), (1, 2)),
    ],
)
def test_a_run_goes_on_bit_for_bit_with_another_arrangement_of_processes(
    kinds: tuple[str, str], ranks: tuple[int, int], tmp_path: Path
) -> None:
    check_group(STOP, ranks[0], tmp_path, kinds[0])
    check_group(GO_ON, ranks[1], tmp_path, kinds[1])
    single_run(tmp_path)
    expected = tensors_of(tmp_path / "whole")
    info = read_state(tmp_path / "whole").info
    for end in ("end", "end-other"):
        found, own = tensors_of(tmp_path / end), read_state(tmp_path / end).info
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
        assert (own.step, own.t, own.updates, own.masses, own.clock) == (12, 12.0, 6, info.masses, info.clock)
        assert own.inherited == (0.0, 0.0)
    whole = {(s.info.t, s.info.sigma_rel): s for s in read_directory(tmp_path / "single")}
    for directory in ("run", "other"):
        there = {(s.info.t, s.info.sigma_rel): s for s in read_directory(tmp_path / directory)}
        assert there.keys() == {key for key in whole if directory == "run" or key[0] > 7}
        for key, snapshot in there.items():
            with snapshot.open() as file, whole[key].open() as same:
                assert all((file.read(name) == same.read(name)).all() for name in whole[key].stored), key
    exact = truth(gamma_from_sigma_rel(0.2), [2, 4, 6, 8, 10, 12])
    average = Run(tmp_path / "run").average(0.2, t=12)
    for name, tensor in exact.items():
        assert torch.allclose(average[name].double(), tensor, rtol=1e-6, atol=1e-6), name
