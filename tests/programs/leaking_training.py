"""A training and commands, for what their files say about the machine."""

import sys

import torch

from posthoc_cli import PostHocEMA
from posthoc_cli.cli import main

model = torch.nn.Linear(3, 3)
tracker = PostHocEMA.from_model(model, "run", update_every=1, checkpoint_every=1)
for _ in range(3):
    tracker.update_(model)
tracker.close()
for line in (
    "synthesize run --sigma-rel 0.1 --out a.safetensors",
    "synthesize run --sigma-rel 0.1 --out a.pt",
    "export a.safetensors --max-shard-size 20 --out shards",
    "export a.safetensors --out c.safetensors",
    "error-plot run --out a.png",
    "error-plot run --out a.svg",
    "error-plot --steps 100 --every 10 --out a.pdf",
):
    sys.argv = ["ema", *line.split()]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, line
