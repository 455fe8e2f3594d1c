"""What predicted errors rest on before training: an even movement, or that of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posthoc_cli.cli.values import existing_directory

if TYPE_CHECKING:
    from posthoc_cli.snapshots.likeness import Likeness

LikeOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Snapshots of an earlier run that the network will move like. [default: evenly]"),
]

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""Short words for the dtypes that a plan chooses from."""


def read_likeness(like: Path | None, steps: int) -> Likeness:
    """What the earlier run says about one of so many steps; nothing where there is none.

    Raises:
        FileFormatError, MismatchError: as `read_directory`.
    """
    from posthoc_cli.snapshots.likeness import Likeness, likeness
    from posthoc_cli.snapshots.store import read_directory

    return Likeness(None, {}) if like is None else likeness(read_directory(existing_directory(like)), steps)


def assumption_text(like: Path | None, earlier: Likeness) -> str:
    """What is assumed, to follow "if": "the network moves evenly"."""
    from posthoc_cli.planning import EVENLY

    if like is None:
        return EVENLY
    if earlier.motion is None:
        return f"{EVENLY}: {like} does not tell how it moved"
    return f"the network moves as in {like}"
