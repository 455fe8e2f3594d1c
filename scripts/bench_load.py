"""What the choice of some of very many snapshots costs.

    python scripts/bench_load.py [--quick]

Predicted errors of reconstructions from 1,000 and from 200 of 2,000 snapshots, as multiples of those from all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from posthoc_cli import PowerFunction, reconstruct
from posthoc_cli.planning import relative_rounding
from posthoc_cli.reconstruction import assumed_prior, thinned_subset


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100 snapshots: does everything run?")
    compare_choices(100 if parser.parse_args(arguments).quick else 2_000)


def compare_choices(count: int) -> None:
    """Predicted errors of choices among so many snapshots of two profiles, relative to those from all of them."""
    lengths = (0.02, 0.05, 0.10, 0.15, 0.20, 0.25, 0.28)
    t = float(count // 2)
    snapshots = [PowerFunction.from_sigma_rel(one, time + 1.0) for time in range(int(t)) for one in (0.05, 0.28)]
    targets = [PowerFunction.from_sigma_rel(one, t) for one in lengths]
    prior = assumed_prior(snapshots, relative_rounding("float16"))
    everything = reconstruct(snapshots, targets, prior=prior, t=t).predicted_error
    print(f"| sigma_rel | {' | '.join(f'{one:g}' for one in lengths)} |")
    print(f"| --- | {' | '.join(['---:'] * len(lengths))} |", flush=True)
    for most in (count // 2, count // 10):
        chosen = thinned_subset(snapshots, most)
        found = reconstruct([snapshots[i] for i in chosen], targets, prior=prior.of(chosen), t=t).predicted_error
        cells = [f"{ratio:.2f}" for ratio in (found / everything).tolist()]
        print(f"| {len(chosen):,} of {count:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
