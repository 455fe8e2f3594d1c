"""The usage example in the README of pytorch-posthoc-ema, with the import changed and the results
checked."""

import copy

import torch

from posthoc_cli import PostHocEMA

model, data = torch.nn.Linear(64, 64), torch.randn(1, 64)
posthoc_ema = PostHocEMA.from_model(model, "posthoc-ema")
for _ in range(1000):
    torch.nn.init.normal_(model.weight)
    posthoc_ema.update_(model)
raw = copy.deepcopy(model.state_dict())
with posthoc_ema.model(model, sigma_rel=0.15) as ema_model:
    first = ema_model(data)
assert all(torch.equal(raw[name], tensor) for name, tensor in model.state_dict().items())
reopened = PostHocEMA.from_path("posthoc-ema", model)
with reopened.model(model, sigma_rel=0.15) as ema_model:
    second = ema_model(data)
with PostHocEMA.from_path("posthoc-ema").state_dict(sigma_rel=0.15) as ema_state_dict:
    model.load_state_dict(ema_state_dict, strict=False)
assert torch.equal(second, model(data))
# The snapshots differ from the live averages by the rounding to float16, 2**-11 per value.
assert (second - first).norm() / first.norm() < 2**-10
posthoc_ema.reconstruction_error().savefig("error.png")
