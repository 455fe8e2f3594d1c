"""Count the package's files and functions that common calls pass through: a measure of how much a reader has to know.

    python scripts/trace_calls.py [--list]

Runs an update with a snapshot, `ema synthesize` and `ema error-plot` on a small model, and prints for each how many
files and functions of the package were entered, in any thread. `--list` names them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

PACKAGE = "posthoc_cli"
STEPS = 40


class Tracer:
    """Notes the file and the name of every function of the package that is entered, in threads begun later, too."""

    def __init__(self) -> None:
        self._root = f"{Path(importlib.import_module(PACKAGE).__file__ or '').parent}{os.sep}"
        self._entered: set[tuple[str, str]] | None = None
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if self._entered is None or event != "call" or not code.co_filename.startswith(self._root):
            return
        if not code.co_name.startswith("<"):
            self._entered.add((code.co_filename.removeprefix(self._root), getattr(code, "co_qualname", code.co_name)))

    def of(self, call: Callable[[], object]) -> set[tuple[str, str]]:
        """What a call enters."""
        self._entered = entered = set()
        try:
            call()
        finally:
            self._entered = None
        return entered


def ema(words: str) -> None:
    """Run the command line in this process."""
    main = importlib.import_module(f"{PACKAGE}.cli").main
    sys.argv = ["ema", *words.split()]
    with contextlib.suppress(SystemExit), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        main()


def measure(folder: Path) -> dict[str, set[tuple[str, str]]]:
    """What each call enters. Everything is run once before it is traced, so that imports do not count."""
    tracer = Tracer()
    tracker_type = importlib.import_module(PACKAGE).PostHocEMA
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    run = folder / "run"
    with tracker_type.from_model(model, run, update_every=1, checkpoint_every=10, max_checkpoints=2) as tracker:
        for _ in range(STEPS - 1):
            with torch.no_grad():
                model[0].weight.add_(torch.randn_like(model[0].weight))
            tracker.update_(model)

        def update() -> None:
            tracker.update_(model)
            tracker.flush()

        found = {"update_ with a snapshot": tracer.of(update)}
    for name, words in {
        "ema synthesize": f"synthesize {run} --sigma-rel 0.15 -q --overwrite --out {folder / 'average.safetensors'}",
        "ema error-plot": f"error-plot {run} --overwrite --out {folder / 'error.png'}",
    }.items():
        ema(words)
        found[name] = tracer.of(lambda words=words: ema(words))  # type: ignore[misc]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the functions")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    print(f"{'call':<26}{'files':>6}{'functions':>11}")
    for name, entered in found.items():
        print(f"{name:<26}{len({file for file, _ in entered}):>6}{len(entered):>11}")
        for file, function in sorted(entered) if options.list else []:
            print(f"    {file}  {function}")


if __name__ == "__main__":
    main()
