"""The end of a process with three trackers, interrupted by Ctrl-C."""

import os
import signal
import sys
import threading
import time

import torch

from posthoc_cli import PostHocEMA, files

folder, interrupts = sys.argv[1], int(sys.argv[2])
trackers = []
for name in ("one", "two", "three"):
    model = torch.nn.Linear(2, 2)
    trackers.append(PostHocEMA.from_model(model, f"{folder}/{name}", update_every=1))
    trackers[-1].update_(model)
own, sent, disk = files.system.fsync, [], threading.Lock()


def slow(descriptor):  # one after the other, each until its interrupt is answered
    with disk:
        if len(sent) < interrupts:
            said = os.fstat(2).st_size
            sent.append(os.kill(os.getpid(), signal.SIGINT))
            while os.fstat(2).st_size == said:
                time.sleep(0.01)
    own(descriptor)


files.system.fsync = slow
