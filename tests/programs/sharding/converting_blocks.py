"""Blocks that convert or replace the chunks of a sharded model."""

import torch
from groups import SETTINGS, Net, equal, held, move, process, spread, train
from torch import nn

from posthoc_cli import PostHocEMA
from posthoc_cli.tracker.processes import reshard

_, _, folder, _ = process()

x = torch.arange(12.0).reshape(2, 6)


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
