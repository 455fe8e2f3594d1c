"""What the callbacks for training frameworks cost: a step with each beside the same framework's bare one.

    python scripts/bench_integrations.py [--repeats 5] [--quick]

A language model of 10 M parameters trains on the CPU in each framework that is installed, with torch's own number of
threads and two averages at update_every=10. What counts are the steps 16 to 35, as a callback of the framework's own
sees them, with two updates in their midst: neither the first update, which makes the averages, nor snapshots, nor what
comes before and after the training. The goal is for the share of that time that the tracker's calls take. The
difference of runs with and without, which take turns, is printed, too; it varies more than the goal.
See `quiet_timing`.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from quiet_timing import Report, load_text

from posthoc_cli import PostHocEMA

EVERY = 10
FIRST, LAST = EVERY + EVERY // 2, 3 * EVERY + EVERY // 2


@dataclass(frozen=True)
class Size:
    """The model and its batches."""

    width: int = 320
    layers: int = 6
    batch: int = 16
    tokens: int = 64


QUICK = Size(16, 1, 2, 4)


@dataclass
class Stopwatch:
    """The seconds from one step's end to another's, and those of them in calls of the tracker."""

    step: int = 0
    seconds: list[float] = field(default_factory=list)
    called: list[float] = field(default_factory=list)
    _within: float = 0.0
    _started: float = 0.0

    def tick(self) -> None:
        """Count a step of the current run."""
        self.step += 1
        if self.step == FIRST:
            self._started, self._within = time.perf_counter(), 0.0
        elif self.step == LAST:
            self.seconds.append(time.perf_counter() - self._started)
            self.called.append(self._within)
            self.step = 0

    @contextmanager
    def timing_calls(self) -> Iterator[None]:
        """Time the calls of `update_` within the block."""
        update = PostHocEMA.update_

        def timed(tracker: PostHocEMA, *arguments: Any, **options: Any) -> None:
            started = time.perf_counter()
            try:
                update(tracker, *arguments, **options)
            finally:
                self._within += time.perf_counter() - started

        with mock.patch.object(PostHocEMA, "update_", timed):
            yield


def network(size: Size) -> Any:
    """A Llama, without weights of anybody's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, size.width // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=size.width, intermediate_size=3 * size.width, num_hidden_layers=size.layers,
            num_attention_heads=heads, num_key_value_heads=heads,
        )
    )  # fmt: skip


def batches(size: Size) -> list[dict[str, torch.Tensor]]:
    """One for each step."""
    rows = torch.randint(0, 4096, (LAST, size.batch, size.tokens), generator=torch.manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def run_transformers(size: Size, watch: Stopwatch, folder: Path, tracks: bool) -> None:
    """The Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from posthoc_cli.integrations.transformers import PostHocCallback

    class Watching(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.tick()

    data = [{name: row[i] for name, row in batch.items()} for batch in batches(size) for i in range(size.batch)]
    args = TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=size.batch, max_steps=LAST, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(network(size), args, train_dataset=data)
    if tracks:
        PostHocCallback(folder / "ema", update_every=EVERY).install(trainer)
    trainer.add_callback(Watching())
    trainer.train()


def run_lightning(size: Size, watch: Stopwatch, folder: Path, tracks: bool) -> None:
    """Lightning's Trainer."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    from posthoc_cli.integrations.lightning import PostHocWeightAveraging

    class Watching(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *_: Any) -> None:
            watch.tick()

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network(size)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.net(**batch).loss  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    callbacks = [PostHocWeightAveraging(folder / "ema", update_every_n_steps=EVERY)]
    trainer = Trainer(
        max_steps=LAST, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[*(callbacks if tracks else []), Watching()], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(batches(size), batch_size=None))  # type: ignore[arg-type]


def run_accelerate(size: Size, watch: Stopwatch, folder: Path, tracks: bool, diffusers: bool = False) -> None:
    """A loop with accelerate; with `diffusers` its EMAModel's stand-in."""
    from accelerate import Accelerator

    from posthoc_cli.integrations.accelerate import prepare
    from posthoc_cli.integrations.diffusers import PostHocEMAModel

    accelerator, bare = Accelerator(cpu=True), network(size)
    model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters()))
    options: dict[str, Any] = {"update_every": EVERY}
    stand_in = PostHocEMAModel(bare, folder / "ema", **options) if tracks and diffusers else None
    ema = prepare(accelerator, model, folder / "ema", optimizer, **options) if tracks and not diffusers else None
    for batch in batches(size):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        if stand_in is not None:
            stand_in.step(model.parameters())
        watch.tick()
    for made in (stand_in, ema):
        if made is not None:
            made.close()


RUNS: dict[str, Callable[[Size, Stopwatch, Path, bool], None]] = {
    "transformers": run_transformers,
    "lightning": run_lightning,
    "accelerate": run_accelerate,
    "diffusers": partial(run_accelerate, diffusers=True),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print the table and the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--quick", action="store_true", help="tiny, once: whether it runs")
    options = parser.parse_args(arguments)
    size, report = (QUICK, Report(1)) if options.quick else (Size(), Report(options.repeats))
    warnings.simplefilter("ignore")
    parameters = sum(one.numel() for one in network(size).parameters())
    print(
        f"{parameters:,} parameters, batches of {size.batch} x {size.tokens}, torch {torch.__version__}, {load_text()}"
    )
    for name, run in RUNS.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed")
            continue
        watches = Stopwatch(), Stopwatch()

        def one(tracks: bool, run: Any = run, watches: Any = watches) -> None:
            folder = Path(tempfile.mkdtemp())
            try:
                with watches[tracks].timing_calls():
                    run(size, watches[tracks], folder, tracks)
            finally:
                shutil.rmtree(folder)

        print(f"{name}, whole runs:")
        times = report.times({"bare": partial(one, False), "with averages": partial(one, True)})
        bare, tracking = (watch.seconds for watch in watches)
        difference = 100 * statistics.median(ours / theirs - 1 for ours, theirs in zip(tracking, bare, strict=True))
        calls = zip(watches[True].called, tracking, strict=True)
        share = 100 * statistics.median(within / seconds for within, seconds in calls)
        step = 1000 * statistics.median(bare) / (LAST - FIRST)
        print(f"  a step takes {step:.1f} ms, with averages {difference:+.1f} %; in the tracker's calls {share:.2f} %")
        report.goal(f"{name}: % of a step", share, 1, times)
    print("\nGoals:")
    print("\n".join(report.goals))


if __name__ == "__main__":
    main()
