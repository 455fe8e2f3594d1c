"""Very many snapshots, very many tensors, very many updates: how long, and how much memory.

    python scripts/bench_load.py [--repeats 3] [--quick]

Of trainings of a tiny network with a snapshot of two profiles every 10 updates, with thinning to 20 and with all kept;
of a model of 100,000 tensors; and of commands, the least of several runs. Times are processor times with one thread.
Last, what the choice of some of very many snapshots costs: predicted errors, as multiples of those from all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from posthoc_cli import PostHocEMA, PowerFunction, reconstruct
from posthoc_cli.planning import relative_rounding
from posthoc_cli.reconstruction import assumed_prior, thinned_subset
from posthoc_cli.snapshots.directory import read_directory

EVERY = 10
"""Updates from one snapshot to the next."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""So that a neighbour makes no difference."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command")
    parser.add_argument("--quick", action="store_true", help="small numbers: does everything run?")
    parser.add_argument("--job", nargs=3, metavar=("NAME", "COUNT", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.job:
        name, count, folder = asked.job
        JOBS[name](int(count), Path(folder))
        return
    updates, kept, tensors, solved = (400, 300, 500, 100) if asked.quick else (100_000, 50_000, 100_000, 2_000)
    repeats = 1 if asked.quick else asked.repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| | processor time | memory |\n| --- | ---: | ---: |", flush=True)
        for job, count in (("thinned", updates), ("kept", kept), ("tensors", tensors)):
            words = [sys.executable, "-W", "ignore", __file__, "--job", job, str(count), str(folder / job)]
            subprocess.run(words, check=True, env=os.environ | ONE_THREAD)
        for run, *words in (
            ["kept", "info", "DIR"],
            ["kept", "error-plot", "DIR", "--out", "NEW.png"],
            ["kept", "synthesize", "DIR", "--sigma-rel", "0.15", "--out", "NEW.safetensors"],
            ["kept", "prune", "DIR", "--keep", "20", "--dry-run"],
            ["tensors", "synthesize", "DIR", "--sigma-rel", "0.15", "--out", "NEW.safetensors"],
        ):
            label = f"`ema {words[0]}`, {len(read_directory(folder / run)):,} snapshots of `{run}`"
            print(f"| {label} | {command(words, folder / run, repeats)} |", flush=True)
    compare_choices(solved)


def command(words: Sequence[str], directory: Path, repeats: int) -> str:
    """Least processor time of a command, and its peak memory, as cells; DIR is the directory, NEW a new file."""
    code = (
        "import json, resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss]))"
    )
    call, found = [sys.executable, "-c", code, sys.executable, "-m", "posthoc_cli"], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            told = [word.replace("DIR", str(directory)).replace("NEW", f"{scratch}/new") for word in words]
            found.append(json.loads(subprocess.check_output([*call, *told], env=os.environ | ONE_THREAD)))
    return f"{min(seconds for seconds, _ in found):.1f} s | {max(memory for _, memory in found) / 1000:.0f} MB"


# --- jobs, in processes of their own ---------------------------------------------------------------


def tell(what: str, seconds: float) -> None:
    """Print a row, with what this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    print(f"| {what} | {seconds:.1f} s | {pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.0f} MB |", flush=True)


def train(updates: int, folder: Path, max_checkpoints: int | None) -> None:
    """A training of a tiny network that wanders; prints a row a few times on the way."""
    torch.set_num_threads(1)
    model = torch.nn.Linear(16, 16)
    with PostHocEMA.from_model(
        model, folder, update_every=1, checkpoint_every=EVERY, max_checkpoints=max_checkpoints
    ) as tracker:
        for update in range(1, updates + 1):
            with torch.no_grad():
                model.weight.add_(0.01 * torch.randn(16, 16))
            tracker.update_(model)
            if update in (updates // 100, updates):
                tracker.flush()
                there = len(list(folder.glob("*.safetensors")))
                tell(f"{update:,} updates, {there:,} snapshots in `{folder.name}`", time.process_time())


def many_tensors(count: int, folder: Path) -> None:
    """The steps of a training of very many tensors."""
    torch.set_num_threads(1)

    def timed(what: str, step: Callable[[], object]) -> None:
        start = time.process_time()
        step()
        tell(f"{count:,} tensors: {what}", time.process_time() - start)

    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(8)) for _ in range(count)])
    timed("the model itself, and torch", lambda: None)
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=4) as tracker:
        for update in ("first", "second", "third"):
            timed(f"{update} update", lambda: tracker.update_(model))
        timed("an update at which two snapshots are due", lambda: tracker.update_(model))
        timed("until they are durable", tracker.flush)


JOBS: dict[str, Callable[[int, Path], None]] = {
    "thinned": lambda count, folder: train(count, folder, 20),
    "kept": lambda count, folder: train(count, folder, None),
    "tensors": many_tensors,
}


# --- what a choice costs ---------------------------------------------------------------------------


def compare_choices(count: int) -> None:
    """Predicted errors of choices among so many snapshots of two profiles, relative to those from all of them."""
    lengths = (0.02, 0.05, 0.10, 0.15, 0.20, 0.25, 0.28)
    t = float(count // 2)
    snapshots = [PowerFunction.from_sigma_rel(one, time + 1.0) for time in range(int(t)) for one in (0.05, 0.28)]
    targets = [PowerFunction.from_sigma_rel(one, t) for one in lengths]
    prior = assumed_prior(snapshots, relative_rounding("float16"))
    everything = reconstruct(snapshots, targets, prior=prior, t=t).predicted_error
    print(f"\n| sigma_rel | {' | '.join(f'{one:g}' for one in lengths)} |")
    print(f"| --- | {' | '.join(['---:'] * len(lengths))} |", flush=True)
    for most in (count // 2, count // 10):
        chosen = thinned_subset(snapshots, most)
        found = reconstruct([snapshots[i] for i in chosen], targets, prior=prior.of(chosen), t=t).predicted_error
        cells = [f"{ratio:.2f}" for ratio in (found / everything).tolist()]
        print(f"| {len(chosen):,} of {count:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
