"""What the callbacks for training frameworks cost: the share of a step that the tracker's calls take.

    python scripts/bench_integrations.py [--repeats 5] [--quick]

A language model of 10 M parameters trains on the CPU in each framework that is installed, with torch's own number of
threads and two averages at update_every=10. What counts are the steps 16 to 35, as a callback of the framework's own
sees them, with two updates in their midst: neither the first update, which makes the averages, nor snapshots, nor what
comes before and after the training. Medians of several trainings.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

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
    """The shares of the time from one step's end to another's that calls of the tracker take."""

    shares: list[float] = field(default_factory=list)
    _step: int = 0
    _within: float = 0.0
    _started: float = 0.0

    def tick(self) -> None:
        """Count a step of the current run."""
        self._step += 1
        if self._step == FIRST:
            self._started, self._within = time.perf_counter(), 0.0
        elif self._step == LAST:
            self.shares.append(self._within / (time.perf_counter() - self._started))
            self._step = 0

    def timed(self) -> Callable[..., None]:
        """`update_`, which adds the time that it takes."""

        def update_(tracker: PostHocEMA, *arguments: Any, **options: Any) -> None:
            started = time.perf_counter()
            UPDATE(tracker, *arguments, **options)
            self._within += time.perf_counter() - started

        return update_


UPDATE = PostHocEMA.update_


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


def run_transformers(size: Size, watch: Stopwatch, folder: Path) -> None:
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
    PostHocCallback(folder / "ema", update_every=EVERY, final_snapshot=False).install(trainer)
    trainer.add_callback(Watching())
    trainer.train()


def run_lightning(size: Size, watch: Stopwatch, folder: Path) -> None:
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

    averaging = PostHocWeightAveraging(folder / "ema", update_every_n_steps=EVERY, final_snapshot=False)
    trainer = Trainer(
        max_steps=LAST, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[averaging, Watching()], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(batches(size), batch_size=None))  # type: ignore[arg-type]


def run_accelerate(size: Size, watch: Stopwatch, folder: Path, diffusers: bool = False) -> None:
    """A loop with accelerate; with `diffusers` its EMAModel's stand-in."""
    from accelerate import Accelerator

    from posthoc_cli.integrations.accelerate import prepare
    from posthoc_cli.integrations.diffusers import PostHocEMAModel

    accelerator, bare = Accelerator(cpu=True), network(size)
    model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters()))
    options: dict[str, Any] = {"update_every": EVERY, "final_snapshot": False}
    ema: Any = (
        PostHocEMAModel(bare, folder / "ema", **options)
        if diffusers
        else prepare(accelerator, model, folder / "ema", optimizer, **options)
    )
    for batch in batches(size):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        if diffusers:
            ema.step(model.parameters())
        watch.tick()
    ema.close()


RUNS: dict[str, Callable[[Size, Stopwatch, Path], None]] = {
    "transformers": run_transformers,
    "lightning": run_lightning,
    "accelerate": run_accelerate,
    "diffusers": partial(run_accelerate, diffusers=True),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="trainings")
    parser.add_argument("--quick", action="store_true", help="tiny, once: whether it runs")
    options = parser.parse_args(arguments)
    size, repeats = (QUICK, 1) if options.quick else (Size(), options.repeats)
    warnings.simplefilter("ignore")
    for name, run in RUNS.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed")
            continue
        watch = Stopwatch()
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder, mock.patch.object(PostHocEMA, "update_", watch.timed()):
                run(size, watch, Path(folder))
        print(f"{name}: {100 * statistics.median(watch.shares):.2f} % of a step", flush=True)


if __name__ == "__main__":
    main()
