"""Run every experiment on the guarantees of snapshots and outputs at full count; print a table of
the results.

cd tests
python -m torture                     # all of them, long
python -m torture --only kill         # those with "kill" in their names
"""

import argparse
import logging
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

from torture.test_torture import EXPERIMENTS


def main():
    """Run the experiments; print the table and every failure. Return 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="experiments with this in their names")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of random choices")
    options = parser.parse_args()
    # thousands of messages that say what is wrong
    logging.getLogger("posthoc_cli").setLevel(logging.CRITICAL)
    print(f"seed {options.seed}\n")
    print("| experiment | tried | lost | missed | executed | time |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    failures = []
    for name, (experiment, _) in EXPERIMENTS.items():
        if options.only not in name:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            tally = experiment(Path(folder), 1.0, options.seed)
        found = (tally.lost, tally.missed, tally.executed)
        counts = " | ".join(str(len(lines)) for lines in found)
        seconds = time.monotonic() - started
        print(f"| {name} | {tally.tried:,} | {counts} | {seconds:,.0f} s |", flush=True)
        failures += [f"{name}: {line}" for line in chain(*found)]
    print("", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
