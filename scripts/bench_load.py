"""Very many snapshots, very many tensors, very many updates: how long, how much memory, and what is left open.

    python scripts/bench_load.py [--repeats 3] [--quick]

Four tables. Of a training of 100,000 updates with a snapshot of two profiles every 10: memory and open files on the
way, with thinning to 20 and, half as long, with 10,000 snapshots kept, of 2 and of 100 tensors. Of the commands on
10,000 snapshots: processor time of a fresh process with one thread, the least of several, and its peak memory; also
without measurements in the headers, as of files that another tool wrote. Of a model of 100,000 tensors: time and memory
of every step. Networks are as small as they may be. And what the choice of some of very many snapshots costs: predicted
errors, as multiples of those from all. Times are those of the processor: where nothing else runs nobody waits longer.
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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli import PostHocEMA, PowerFunction, reconstruct
from posthoc_cli.planning import relative_rounding
from posthoc_cli.reconstruction import MOST_SOLVED, Prior, assumed_prior, thinned_subset
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.format import TensorSpec, snapshot_metadata
from posthoc_cli.snapshots.tensor_file import TensorFile, TensorFileWriter

EVERY = 10
"""Updates from one snapshot to the next."""


ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""So that a neighbour makes no difference."""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    updates: int = 100_000
    kept_updates: int = 50_000
    tensors: int = 100_000
    solved: int = 2_000
    repeats: int = 3


QUICK = Sizes(400, 300, 500, 100, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--quick", action="store_true", help="small numbers: whether it runs, no measurement")
    parser.add_argument("--job", nargs=3, metavar=("NAME", "COUNT", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.job:
        name, count, folder = asked.job
        JOBS[name](int(count), Path(folder))
        return
    sizes = QUICK if asked.quick else Sizes()
    with tempfile.TemporaryDirectory() as folder:
        measure(replace(sizes, repeats=asked.repeats or sizes.repeats), Path(folder))


def measure(sizes: Sizes, folder: Path) -> None:
    """All tables."""
    print("| updates | snapshots in the directory | memory | open files | processor time so far |")
    print("| ---: | ---: | ---: | ---: | ---: |", flush=True)
    run_job("thinned", sizes.updates, folder / "thinned")
    run_job("kept", sizes.kept_updates, folder / "kept")
    run_job("layers", sizes.kept_updates, folder / "layers")
    without_measurements(folder / "kept", folder / "plain")
    count = len(read_directory(folder / "kept"))
    print(f"\n| command on {count:,} snapshots | processor time | memory | without measurements | memory |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    for what in (
        ["info", "DIR"],
        ["error-plot", "DIR", "--out", str(folder / "error.png"), "--force"],
        ["synthesize", "DIR", "--sigma-rel", "0.15", "--dry-run"],
        ["synthesize", "DIR", "--sigma-rel", "0.15", "--out", str(folder / "m.safetensors"), "--force"],
        ["synthesize", "DIR", "--sigma-rel", "0.15", "--method", "paper", "--dry-run"],
        ["prune", "DIR", "--keep", "20", "--dry-run"],
    ):
        cells = [cell for run in ("kept", "plain") for cell in command(what, folder / run, sizes.repeats)]
        shown = [word for word in what if word != "DIR" and word != "--force"]
        print(f"| `ema {' '.join(Path(word).name for word in shown)}` | {' | '.join(cells)} |", flush=True)
    snapshots = read_directory(folder / "layers")
    said = f"`ema info` on {len(snapshots):,} snapshots of {len(snapshots[0].header.tensors)} tensors"
    print(f"| {said} | {' | '.join(command(['info', 'DIR'], folder / 'layers', sizes.repeats))} | | |", flush=True)
    print(f"\n| a model of {sizes.tensors:,} tensors | processor time | memory |")
    print("| --- | ---: | ---: |", flush=True)
    run_job("tensors", sizes.tensors, folder / "tensors")
    for what in (["info", "DIR"], ["synthesize", "DIR", "--sigma-rel", "0.15", "--out", str(folder / "t.safetensors")]):
        cells = command([*what, *["--force"] * (what[0] == "synthesize")], folder / "tensors", sizes.repeats)
        print(f"| `ema {what[0]}`, {len(read_directory(folder / 'tensors'))} snapshots | {' | '.join(cells)} |")
    cells = command(["export", str(folder / "t.safetensors"), "--out", str(folder / "t.pt"), "--force"], folder, 1)
    print(f"| `ema export` to a `.pt` | {' | '.join(cells)} |")
    compare_choices(sizes.solved)


# --- in processes of their own ---------------------------------------------------------------------


def run_job(name: str, count: int, folder: Path) -> None:
    """Run one of the jobs below, with one thread: it prints its rows."""
    job = [sys.executable, "-W", "ignore", __file__, "--job", name, str(count), str(folder)]
    subprocess.run(job, check=True, env=os.environ | ONE_THREAD)


def command(words: Sequence[str], directory: Path, repeats: int) -> list[str]:
    """Least processor time of a command, and its peak memory, as cells."""
    code = (
        "import json, resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True); "
        "assert not done.returncode, done.stderr; used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss]))"
    )
    call = [sys.executable, "-m", "posthoc_cli", *(str(directory) if word == "DIR" else word for word in words)]
    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code, *call], check=True, stdout=subprocess.PIPE, env=os.environ | ONE_THREAD
            ).stdout
        )
        for _ in range(repeats)
    ]
    return [f"{min(seconds for seconds, _ in found):.1f} s", f"{max(memory for _, memory in found) / 1000:.0f} MB"]


def without_measurements(source: Path, target: Path) -> None:
    """Copy a directory of snapshots, leaving out what their headers measured."""
    target.mkdir()
    for snapshot in read_directory(source):
        specs = [TensorSpec(name, entry.dtype, entry.shape) for name, entry in snapshot.header.tensors.items()]
        metadata = snapshot_metadata(replace(snapshot.info, measurements=None))
        with (
            TensorFile(snapshot.path) as file,
            TensorFileWriter(target / snapshot.path.name, specs, metadata) as writer,
        ):
            for spec in specs:
                writer.write(spec.name, file.read(spec.name).data)
            writer.commit()


# --- what a choice costs ---------------------------------------------------------------------------

SIGMA_RELS = (0.02, 0.05, 0.10, 0.15, 0.20, 0.25, 0.28)


def compare_choices(count: int) -> None:
    """Predicted errors of choices among so many snapshots of two profiles, relative to those from all of them."""
    t = float(count // 2)
    snapshots = [
        PowerFunction.from_sigma_rel(sigma_rel, time + 1.0) for time in range(int(t)) for sigma_rel in (0.05, 0.28)
    ]
    targets = [PowerFunction.from_sigma_rel(sigma_rel, t) for sigma_rel in SIGMA_RELS]
    print(f"\n| of {count:,} snapshots, {' | '.join(f'{sigma_rel:g}' for sigma_rel in SIGMA_RELS)} |")
    print(f"| --- | {' | '.join(['---:'] * len(SIGMA_RELS))} |", flush=True)
    for dtype in ("float16", "bfloat16"):
        prior = assumed_prior(snapshots, relative_rounding(dtype))

        def errors(chosen: Sequence[int], prior: Prior = prior) -> npt.NDArray[np.float64]:
            return reconstruct([snapshots[i] for i in chosen], targets, prior=prior.of(chosen), t=t).predicted_error

        everything = errors(range(count))
        cells = [f"{100 * error:.2g} %" for error in everything.tolist()]
        print(f"| all, in {dtype} | {' | '.join(cells)} |", flush=True)
        for most in (min(MOST_SOLVED, count // 2), count // 10):
            spaced = [count - 2 - 2 * round(i * count / most) + profile for i in range(most // 2) for profile in (0, 1)]
            for what, chosen in (("as chosen", thinned_subset(snapshots, most)), ("evenly spaced", sorted(spaced))):
                cells = [f"x {ratio:.2f}" for ratio in (errors(chosen) / everything).tolist()]
                print(f"| {len(chosen):,} of them, {what} | {' | '.join(cells)} |", flush=True)


# --- jobs ------------------------------------------------------------------------------------------


def memory() -> float:
    """Resident memory of this process in MB; nan where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    """Descriptors of this process; -1 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else -1


def train(updates: int, folder: Path, max_checkpoints: int | None, layers: int = 1) -> None:
    """A training of a tiny network that wanders; prints a row a few times on the way."""
    torch.set_num_threads(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(layers)))
    told = {updates // 100, updates // 10, updates // 2, updates}
    options = {"update_every": 1, "checkpoint_every": EVERY, "max_checkpoints": max_checkpoints}
    with PostHocEMA.from_model(model, folder, **options) as tracker:
        for update in range(1, updates + 1):
            with torch.no_grad():
                next(model.parameters()).add_(0.01 * torch.randn(16, 16))
            tracker.update_(model)
            if update in told:
                tracker.flush()
                there = len(list(folder.glob("*.safetensors")))
                cells = [f"{update:,}", f"{there:,}", f"{memory():.0f} MB", f"{open_files()}"]
                print(f"| {' | '.join(cells)} | {time.process_time():.0f} s |", flush=True)


def many_tensors(count: int, folder: Path) -> None:
    """Every step with a model of very many tensors."""
    torch.set_num_threads(1)

    def timed(what: str, step: Callable[[], object]) -> None:
        start = time.process_time()
        step()
        print(f"| {what} | {time.process_time() - start:.1f} s | {memory():.0f} MB |", flush=True)

    def swapped_in() -> None:
        with tracker.model(model, sigma_rel=0.15):
            pass

    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(8)) for _ in range(count)])
    print(f"| the model itself, and torch | | {memory():.0f} MB |", flush=True)
    tracker = PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=4)
    timed("first update", lambda: tracker.update_(model))
    timed("second update", lambda: tracker.update_(model))
    timed("third update", lambda: tracker.update_(model))
    timed("an update at which two snapshots are due", lambda: tracker.update_(model))
    timed("until they are durable", tracker.flush)
    timed("`state_dict(sigma_rel=0.15)`", lambda: tracker.state_dict(sigma_rel=0.15))
    timed("`model(model, sigma_rel=0.15)`", swapped_in)
    timed("`state_dict()`", tracker.state_dict)
    tracker.close()
    timed("`from_path`", lambda: PostHocEMA.from_path(folder, model))


JOBS: dict[str, Callable[[int, Path], None]] = {
    "thinned": lambda count, folder: train(count, folder, 20),
    "kept": lambda count, folder: train(count, folder, None),
    "layers": lambda count, folder: train(count, folder, None, 50),
    "tensors": many_tensors,
}


if __name__ == "__main__":
    main()
