"""Run every experiment on the guarantees of snapshots and outputs at full count; print a table of the results.

python scripts/torture.py                     # all of them, long
python scripts/torture.py --only kill         # those with "kill" in their names
python scripts/torture.py --share 0.1         # a tenth of each
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from torture import Tally
from torture.experiments import EXPERIMENTS


def main() -> int:
    """Run the experiments; print the table and every failure. Return 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="experiments with this in their names")
    parser.add_argument("--share", type=float, default=1.0, help="of all that there is to try, above 0, up to 1")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of random choices; printed")
    options = parser.parse_args()
    chosen = [one for one in EXPERIMENTS if options.only in one.name]
    if not chosen or not 0 < options.share <= 1:
        parser.error(f"--only: one of {', '.join(one.name for one in EXPERIMENTS)}; --share: above 0, up to 1")
    logging.getLogger("posthoc_cli").setLevel(logging.CRITICAL)  # thousands of messages that say what is wrong
    print(f"seed {options.seed}\n")
    print("| experiment | tried | lost | missed | executed | time |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    failures = []
    for experiment in chosen:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            tally = experiment.run(Path(folder), options.share, options.seed)
        print(_row(experiment.name, tally, time.monotonic() - started), flush=True)
        failures += [f"{experiment.name}: {line}" for line in tally.failures]
    print("", *failures, sep="\n")
    return 1 if failures else 0


def _row(name: str, tally: Tally, seconds: float) -> str:
    counts = (tally.tried, len(tally.lost), len(tally.missed), len(tally.executed))
    return f"| {name} | {' | '.join(f'{count:,}' for count in counts)} | {seconds:,.0f} s |"


if __name__ == "__main__":
    sys.exit(main())
