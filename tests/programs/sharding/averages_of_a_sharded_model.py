"""Averages of a sharded model in a block, beside and after it, on each kind of mesh of the
arguments."""

from unittest import TestCase

import torch
from groups import SETTINGS, Net, close, equal, filled, held, move, process, spread, train
from torch.distributed.tensor.debug import CommDebugMode

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.tracker.processes import reshard

rank, _, folder, arguments = process()


def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, **SETTINGS | options)


x = torch.arange(12.0).reshape(2, 6)

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
