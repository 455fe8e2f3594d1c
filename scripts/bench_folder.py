"""Measure the first commands on a folder of checkpoints against a plain loop over the same files.

    python scripts/bench_folder.py [--only TEXT] [--repeats 3]

Each row is a folder that torch or safetensors has written, which lies in the system's folder for
temporary files (`TMPDIR`; up to 9 GB). A small model has 144 tensors of 64 elements at most; a
training with Adam saves its average and the state of the optimizer, too: 720 tensors a file. Each
time is that of a process from its start to its end, the median of repeated runs in turns: seconds
by the clock, and of the processor in brackets. The plain loop reads each file once, adds its
weights with a factor, and saves the sum as safetensors; for a sweep it keeps the files open
(mapped), and makes twelve sums. A sweep of ours evaluates nothing: its metric is one weight. Of
files with an EMA the decay is found, and the EMA is used, too.

One run of each, seconds by the clock (DCP: folders of `torch.distributed.checkpoint`):

    files                                    loop  info  synthesize  loop of 12  sweep of 12
    20 of torch.save: 144 tensors, an EMA
      and Adam's state                        3.2   1.7         3.4         3.4          3.8
    100 of them                              10.1   3.5         6.0        10.9          7.8
    500 of them                              42.5  12.0        19.4        47.2         29.3
    20 of safetensors, 144 tensors            1.8   0.6         2.5         2.0          2.7
    100 of them                               2.1   0.9         2.7         3.1          3.5
    20 of DCP, 144 tensors                    3.8   1.3         3.3         4.1          3.7
    20 of torch.save, 24 M parameters         2.1   0.5         3.7         5.7         11.6
    20 of safetensors, 24 M parameters        1.9   0.5         3.5         4.8         10.1
    20 of torch.save, 24 M parameters, an
      EMA and Adam's state                    2.2   1.4         5.0         5.6         18.4
    20 of DCP, 24 M parameters                3.7   0.6         3.5         8.6         11.2"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from tables import markdown
from torch import Tensor, nn

DECAY = 0.95
EVERY = 5  # steps between files
LENGTHS = 12


@dataclass(frozen=True)
class Row:
    """A folder of checkpoints: how many of which kind, and the size of the model."""

    kind: str
    files: int
    is_small: bool = True

    @property
    def name(self) -> str:
        size = "144 tensors" if self.is_small else "24 M parameters"
        return f"{self.files} x {self.kind}, {size}"


ROWS = (
    Row(".pt with EMA and Adam", 20),
    Row(".pt with EMA and Adam", 100),
    Row(".pt with EMA and Adam", 500),
    Row(".safetensors", 20),
    Row(".safetensors", 100),
    Row("DCP", 20),
    Row(".pt", 20, is_small=False),
    Row(".safetensors", 20, is_small=False),
    Row(".pt with EMA and Adam", 20, is_small=False),
    Row("DCP", 20, is_small=False),
)


def main() -> None:
    """Measure all rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    commands = ("loop", "info", "synthesize", "loop of 12", "sweep of 12")
    rows = [("", *commands)]
    for row in ROWS:
        if asked.only not in row.name:
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "files"
            folder.mkdir()
            write(row, folder)
            os.sync()  # writing back would compete for the disk
            found = measure(folder, asked.repeats)
        rows.append((row.name, *(found[command] for command in commands)))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(markdown(rows))


# --- files


def write(row: Row, folder: Path) -> None:
    """Write the files of a training whose weights walk at random."""
    torch.manual_seed(0)
    widths = [64] * 144 if row.is_small else [1_000_000] * 24
    weights = {f"layers.{n}.weight": nn.Parameter(torch.randn(w)) for n, w in enumerate(widths)}
    average = {name: value.detach().clone() for name, value in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), 1e-3)
    state = {name: value.detach() for name, value in weights.items()}
    for step in range(1, EVERY * row.files + 1):
        for value in weights.values():
            value.grad = torch.randn_like(value)
        optimizer.step()
        for name, value in state.items():
            average[name].lerp_(value, 1 - DECAY)
        if step % EVERY:
            continue
        if row.kind == "DCP":
            import torch.distributed.checkpoint as dcp

            dcp.save({"model": state}, checkpoint_id=folder / f"step-{step}", no_dist=True)
        elif row.kind == ".safetensors":
            save_file(state, folder / f"step{step}.safetensors")
        else:
            content = {"step": step, "model": state}
            if row.kind != ".pt":
                content |= {"ema": average, "optimizer": optimizer.state_dict()}
            torch.save(content, folder / f"step{step}.pt")


# --- the plain loop


def read(path: Path) -> dict[str, Tensor]:
    """Read the weights of a file or folder as one does by hand."""
    if path.is_dir():
        import torch.distributed.checkpoint as dcp  # late: the other loops do without

        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        sizes = {name.removeprefix("model."): each.size for name, each in metadata.items()}
        tensors = {name: torch.empty(size) for name, size in sizes.items()}
        dcp.load({"model": tensors}, checkpoint_id=path, no_dist=True)
        return tensors
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found: dict[str, Tensor] = torch.load(path, weights_only=True, mmap=True)["model"]
    return found


def loop(folder: Path, out: Path, count: int) -> None:
    """Make so many sums of the weights in all files, and save each."""
    paths = sorted(folder.iterdir())
    files: Iterator[dict[str, Tensor]] | list[dict[str, Tensor]] = map(read, paths)
    if count > 1:
        files = [*files]
    for number in range(count):
        sums: dict[str, Tensor] = {}
        for file in files:
            for name, value in file.items():
                total = sums.setdefault(name, torch.zeros_like(value))
                total.add_(value, alpha=1 / len(paths))
        save_file(sums, out.with_suffix(f".{number}.safetensors"))


def sweep(folder: Path) -> None:
    """Search the best length by a metric that costs nothing."""
    from posthoc_cli import Run

    def metric(tensors: dict[str, Tensor]) -> float:
        return float(next(iter(tensors.values()))[0])

    lengths = [0.03 + 0.02 * number for number in range(LENGTHS)]
    Run(folder).sweep(metric, minimize=True, sigma_rels=lengths)


# --- times


def measure(folder: Path, repeats: int) -> dict[str, str]:
    """Measure the commands on a folder in turns."""
    out = folder.with_name("out.safetensors")
    ema = [sys.executable, "-m", "posthoc_cli"]
    own = [sys.executable, __file__]
    averaged = [*ema, "synthesize", str(folder), "--sigma-rel", "0.1", "--out", str(out), "-f"]
    commands = {
        "loop": [*own, "loop", str(folder), str(out), "1"],
        "info": [*ema, "info", str(folder)],
        "synthesize": averaged,
        "loop of 12": [*own, "loop", str(folder), str(out), str(LENGTHS)],
        "sweep of 12": [*own, "sweep", str(folder)],
    }
    found = dict[str, list[tuple[float, float]]]()
    for _ in range(repeats):
        for name, command in commands.items():
            found.setdefault(name, []).append(time_process(command))
    texts = {}
    for name, measured in found.items():
        seconds, busy = (median(column) for column in zip(*measured, strict=True))
        texts[name] = f"{seconds:.1f} ({busy:.1f})"
    return texts


def time_process(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds, and those of the processor."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(errors.decode())
    return time.perf_counter() - begin, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    own: dict[str, Callable[[], None]] = {
        "loop": lambda: loop(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])),
        "sweep": lambda: sweep(Path(sys.argv[2])),
    }
    own.get(next(iter(sys.argv[1:]), ""), main)()
