"""A block that replaces a tensor which a forward pass has gathered."""

import torch
from groups import SETTINGS, Net, equal, held, process, spread, train

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import ModelMismatchError

_, _, folder, _ = process()

x = torch.arange(12.0).reshape(2, 6)


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
