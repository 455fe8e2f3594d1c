"""A training in a child of multiprocessing, whose end writes the last snapshot."""

import multiprocessing
import sys

import torch

from posthoc_cli import PostHocEMA


def train():
    model = torch.nn.Linear(2, 2)
    tracker = PostHocEMA.from_model(model, sys.argv[1], update_every=1, checkpoint_every=3)
    for _ in range(10):
        tracker.update_(model)


child = multiprocessing.get_context("fork").Process(target=train)
child.start()
child.join()
sys.exit(child.exitcode)
