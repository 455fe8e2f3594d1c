"""The training side: `PostHocEMA` keeps power-function averages of a model and writes snapshots of them."""

from posthoc_cli.tracker.posthoc_ema import PostHocEMA

__all__ = ["PostHocEMA"]
