"""How long `ema plan` and `ema prune --dry-run` take, whole commands, on a quiet machine and on a busy one.

    python scripts/bench_planning.py [--repeats 3] [--quick]

Each command is run as a user would, in a process of its own with no number of threads set; what importing takes counts.
First as the machine is, then beside twice as many busy processes as it has cores. Commands take turns; seconds are
medians, with the range. A goal holds for both; it is not judged quiet where other processes took more than a tenth of
the cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from quiet_timing import Report, busy_machine, load_text

from posthoc_cli import PostHocEMA

Command = tuple[str, list[str], float]
"""How a table calls it, its arguments, and the seconds that it may take."""

PLANS: list[Command] = [
    ("plan, tiny run", ["--steps", "3000", "--params", "100K", "--max-size", "100MB"], 5),
    (
        "plan, as in the README",
        ["--steps", "400000", "--params", "1.2e9", "--max-size", "60GB", "--sigma-range", "0.03:0.28"],
        5,
    ),
    ("plan, much disk", ["--steps", "400000", "--params", "1.2B", "--max-size", "600GB"], 8),
]
QUICK_PLANS: list[Command] = [
    (
        "plan",
        ["--steps", "100", "--params", "10", "--max-size", "1MB", "--sigma-rels", "0.1", "--dtype", "float16"],
        5,
    )
]
TIMES = 20
"""At which snapshots of two profiles are, for pruning: 40 in all."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print the table and the goals."""
    parser = argparse.ArgumentParser(description="How long planning and pruning take.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command")
    parser.add_argument("--quick", action="store_true", help="one small command of each kind: does everything run?")
    options = parser.parse_args(arguments)
    report = Report(1 if options.quick else options.repeats)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "run"
        write_run(directory, 3 if options.quick else TIMES)
        prune = (f"prune, {2 * TIMES} snapshots", ["prune", str(directory), "--keep", "2", "--dry-run"], 1.0)
        plans = QUICK_PLANS if options.quick else PLANS
        commands: list[Command] = [(label, ["plan", *words], limit) for label, words, limit in plans]
        run(prune[1])  # compiles the modules
        for busy in (False, True):
            processes = 1 if options.quick else None
            with busy_machine(processes) if busy else nullcontext():
                measure(report, [*commands, prune], busy)
    print("\nGoals:")
    print("\n".join(report.goals))


def write_run(directory: Path, times: int) -> None:
    """Snapshots of a tiny network that walks, all kept."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    with (
        PostHocEMA.from_model(model, directory, update_every=1, checkpoint_every=5, max_checkpoints=None) as tracker,
        torch.no_grad(),
    ):
        for _ in range(5 * times):
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
            tracker.update_(model)


def measure(report: Report, commands: Sequence[Command], busy: bool) -> None:
    """Run all commands in turns, and note the goals."""
    state = "busy" if busy else "quiet"
    print(f"\n{state} ({load_text()} before)")
    runs: dict[str, Callable[[], object]] = {label: partial(run, words) for label, words, _ in commands}
    found = report.times(runs, busy=busy)
    for (label, _, limit), seconds in zip(commands, found, strict=True):
        report.goal(f"{label}, {state}: seconds", seconds.median, limit, [seconds])


def run(words: Sequence[str]) -> None:
    """One command of `ema`; its threads are what its libraries take by themselves, its modules are compiled once."""
    left_out = ("_NUM_THREADS", "DONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if not name.endswith(left_out)}
    subprocess.run(
        [sys.executable, "-m", "posthoc_cli", *words], check=True, stdout=subprocess.DEVNULL, env=environment
    )


if __name__ == "__main__":
    main()
