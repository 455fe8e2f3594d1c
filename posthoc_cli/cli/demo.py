"""`ema demo`: the whole job on a small real training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = "Example:  ema demo --out ema-demo"


def demo(
    out: Annotated[Path, typer.Option(help="The folder for everything that the demo makes; it must not exist.")] = Path(
        "ema-demo"
    ),
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 10_000,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo in that folder.")] = False,
) -> None:
    """Train a small network and do the whole job on it.

    Needs scikit-learn (pip install posthoc-cli[demo]); downloads nothing. Prints every ema command that it runs.
    """
    from posthoc_cli.demo import run

    run(out, steps, force)


COMMAND = demo
