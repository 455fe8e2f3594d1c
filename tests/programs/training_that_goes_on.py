"""A training that goes on from the newest snapshots, and waits for another writer."""

import logging
import sys
import time
import warnings
from itertools import count
from pathlib import Path

from torture.training import Network, begin

from posthoc_cli.errors import LockedError

logging.getLogger("posthoc_cli").setLevel(
    logging.ERROR
)  # the warnings about taking over are expected
warnings.simplefilter("ignore")  # as are those that training waits for the disk
run, stop = map(Path, sys.argv[1:3])
first, pause, every, most = map(float, sys.argv[3:])
network = Network()
try:
    with begin(run, network, checkpoint_every=int(every), max_checkpoints=int(most)) as tracker:
        for number in count():
            if number == first:
                tracker.flush()
                print("trains", tracker.run_id, flush=True)
            if number >= first:
                time.sleep(pause)
                if stop.exists():
                    break
            network.go_to(tracker.step + 1)
            tracker.update_(network)
except LockedError as error:
    print("refused", error, flush=True)
