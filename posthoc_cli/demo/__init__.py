"""The training of `ema demo`, and its use of the snapshots. Printing is up to functions that the caller passes."""

from posthoc_cli.demo.walkthrough import Result, run

__all__ = ["Result", "run"]
