"""Describe checkpoints from their indexes alone, as a dict for JSON that begins with its kind, "checkpoints"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posthoc_cli.checkpoints.checkpoint import Checkpoint
from posthoc_cli.snapshots.description import describe_tensors


def describe_checkpoints(place: Path, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Their times, tensors and sizes, and what each holds in words."""
    newest = checkpoints[-1]
    return {
        "kind": "checkpoints",
        "path": str(place),
        "t_unit": newest.info.t_unit,
        "t": newest.info.t,
        "step": newest.info.step,
        **describe_tensors(newest),
        "bytes": sum(one.header.file_bytes for one in checkpoints),
        "checkpoints": [
            {
                "file": one.name,
                "t": one.info.t,
                "holds": one.holds,
                "bytes": one.header.file_bytes,
                "identity": one.header.metadata["ema.checksum"],
            }
            for one in checkpoints
        ],
    }
