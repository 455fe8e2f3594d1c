"""A training that forks a child, whose tracker refuses calls."""

import os
import signal
import sys

import torch

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import RefusedCallError

model = torch.nn.Linear(700, 700)
tracker = PostHocEMA.from_model(
    model, sys.argv[1], update_every=1, checkpoint_every=3, device=sys.argv[2]
)
for _ in range(7):
    tracker.update_(model)
for number in range(40):  # as a DataLoader forks its workers
    child = os.fork()
    if not child:
        signal.alarm(60)
        for call in (lambda: tracker.update_(model), tracker.flush, tracker.state_dict):
            try:
                call()
            except RefusedCallError:
                continue
            os._exit(1)
        if number % 2:
            tracker.close()
        sys.exit()
    if number % 8 == 0:
        tracker.update_(model)  # other children are alive
children = [os.wait()[1] for _ in range(40)]
assert children == [0] * 40, children
raise SystemExit(7)
