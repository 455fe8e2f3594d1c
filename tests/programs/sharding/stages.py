"""Train in the stages of the arguments, each such as `fsdp,tp:run:0,3,7`: kinds of meshes, the name
of the run, and its steps."""

import torch.distributed.checkpoint as dcp
from groups import SETTINGS, Net, move, process, spread, train

from posthoc_cli import PostHocEMA

_, _, folder, arguments = process()


def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, **SETTINGS | options)


def train_stages(kinds, name, *stages):
    global model
    for kind, before, after in zip(kinds, stages[:-1], stages[1:], strict=True):
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


for argument in arguments:
    kinds, name, steps = argument.split(":")
    train_stages(kinds.split(","), name, *map(int, steps.split(",")))
