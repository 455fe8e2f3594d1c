"""How long an update of `ExponentialMovingAverage` takes, beside torch's own.

    python scripts/bench_averages.py [--tensors 2000] [--updates 20] [--repeats 15] [--threads N] [--quick]

Models are of many small tensors (Linear layers of 16 x 16 with bias: two tensors a layer), where the work around the
arithmetic decides, and of a few large ones, where memory does. Both classes average the same model; torch's is
`torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`, the fused function that it offers. A run is several
updates; what is compared takes turns, each in a quiet moment (see `quiet_timing`). The printed time is that of one
update: the median of all runs, and in brackets their range.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence

import torch
from quiet_timing import Seconds, take_turns
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posthoc_cli.averages import ExponentialMovingAverage, ShadowModel

MOMENTUM = 2e-4
GOAL = 1.2


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the tables and the goal."""
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tensors, width, updates, repeats = options.tensors, 2048, options.updates, options.repeats
    if options.quick:
        tensors, width, updates, repeats = 20, 32, 2, 1
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    ours, theirs = measure(f"{tensors:,} tensors", layers(tensors // 2, 16), updates, repeats)
    measure("20 tensors", layers(10, width), updates, repeats)
    measure(f"{tensors:,} tensors in bfloat16", layers(tensors // 2, 16).bfloat16(), updates, repeats)
    ratio = ours.median / theirs.median
    judged = ours.decides and theirs.decides
    verdict = "NOT JUDGED" if not judged else "met" if ratio <= GOAL else "MISSED"
    print(f"\nGoal: {verdict}: {tensors:,} small tensors, in times of swa_utils: {ratio:.2f} (goal <= {GOAL})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="How long an update of an average takes, beside torch's own.")
    parser.add_argument("--tensors", type=int, default=2000, help="small tensors")
    parser.add_argument("--updates", type=int, default=20, help="updates in a run")
    parser.add_argument("--repeats", type=int, default=15, help="runs")
    parser.add_argument("--threads", type=int, help="torch's threads; by default its own choice")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    return parser


def layers(count: int, width: int) -> torch.nn.Module:
    """Linear layers, two tensors each."""
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(count)))


def measure(title: str, model: torch.nn.Module, updates: int, repeats: int) -> tuple[Seconds, Seconds]:
    """Print a table; return ours and torch's."""
    ours = ExponentialMovingAverage(model, MOMENTUM)
    shadow = ShadowModel(model, 1 - MOMENTUM)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - MOMENTUM))
    runs: dict[str, Callable[[], object]] = {
        "ExponentialMovingAverage": lambda: ours.update_parameters(model),
        "ShadowModel": shadow.update,
        "swa_utils.AveragedModel": lambda: theirs.update_parameters(model),
    }
    for run in runs.values():
        for _ in range(2):  # the first one copies
            run()
    found = [
        seconds_of_one(times, updates) for times in take_turns([_repeated(r, updates) for r in runs.values()], repeats)
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{title}, {parameters:,} parameters; one update")
    for label, seconds in zip(runs, found, strict=True):
        low, high = min(seconds.runs), max(seconds.runs)
        mark = f"  {seconds.contended} of {repeats} contended" if seconds.contended else ""
        ratio = seconds.median / found[-1].median
        print(
            f"  {label:<26}{1e3 * seconds.median:8.2f} ms  ({1e3 * low:.2f} to {1e3 * high:.2f})  {ratio:5.2f} x{mark}"
        )
    return found[0], found[-1]


def seconds_of_one(times: Seconds, updates: int) -> Seconds:
    """Times of runs of several updates as times of one."""
    return Seconds(tuple(run / updates for run in times.runs), times.contended)


def _repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated


if __name__ == "__main__":
    main()
