"""Checkpoints of a random walk, in the layouts of other programs."""

import json
import operator
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from posthoc_cli import Run

Weights = dict[str, torch.Tensor]
STEPS = (20, 40, 100, 200)


def walk() -> dict[int, Weights]:
    generator = torch.Generator().manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(40, 30), torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
    )
    state = {name: value.clone() for name, value in layers.state_dict().items()}
    found = {}
    for step in STEPS:
        for value in state.values():
            if value.is_floating_point():
                value += 0.01 * step**0.5 * torch.randn(value.shape, generator=generator)
            else:
                value += step
        found[step] = {name: value.clone() for name, value in state.items()}
    return found


def filled(folder: Path, *steps: int, size: int = 3) -> Path:
    """Write files of one tensor whose elements equal the step; return the folder."""
    folder.mkdir(exist_ok=True)
    for step in steps:
        torch.save({"w": torch.full((size,), float(step))}, folder / f"step{step}.pt")
    return folder


def check_average(
    run: Run,
    states: Mapping[Any, Weights],
    target: float = 0.2,
    strip: str = "",
    at: str = "step",
    exact: float = 1e-12,
) -> None:
    """Check that an average is the planned combination of weights, with the newest values of all
    other tensors."""
    plan = run.plan(target)
    made = run.average(target, dtype="float64")
    key = operator.attrgetter(*at.split())
    terms = [
        (states[key(one)], c)
        for one, c in zip(plan.sources, plan.reconstruction.coefficients[:, 0], strict=True)
    ]
    newest = states[key(run.sources[-1])]
    values = {name.removeprefix(strip): value for name, value in made.items()}
    assert values.keys() == newest.keys()
    for name, value in values.items():
        expected = newest[name]
        if expected.is_floating_point() and not name.endswith(("running_mean", "running_var")):
            expected = torch.stack([c * state[name].double() for state, c in terms]).sum(0)
        torch.testing.assert_close(value, expected, rtol=exact, atol=exact, check_dtype=False)


def shards(run: Path, step: int, weights: Weights, ending: str) -> None:
    """Write two shards and their index, as transformers does."""
    folder = run / f"checkpoint-{step}"
    names = sorted(weights)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    files = {
        name: f"{stem}-0000{1 + index % 2}-of-00002.{ending}" for index, name in enumerate(names)
    }
    folder.mkdir(parents=True)
    for file in set(files.values()):
        held = {name: weights[name] for name in names if files[name] == file}
        save_file(held, folder / file) if ending == "safetensors" else torch.save(
            held, folder / file
        )
    (folder / f"{stem}.{ending}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
    trainer(folder, step)


def trainer(folder: Path, step: int) -> None:
    """Write what a Trainer writes next to the weights."""
    torch.save({"state": {}}, folder / "optimizer.pt")
    torch.save({"x": torch.ones(3)}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))


def distributed(folder: Path, content: Mapping[str, object], in_chunks: bool = False) -> None:
    """Write a folder of torch.distributed.checkpoint, by one process; `in_chunks` as safetensors
    files of chunks."""
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True) if in_chunks else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            dict(content), storage_writer=writer, checkpoint_id=None if writer else str(folder)
        )


def pickled_folder(run: Path, step: int, weights: Weights) -> None:
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    for name in ("training_args.bin", "scheduler.pt", "scaler.pt", "random_states_0.pkl"):
        torch.save({"x": torch.ones(2)}, folder / name)
    trainer(folder, step)


def lightning(run: Path, step: int, weights: Weights) -> None:
    named = {f"net.{name}": value for name, value in weights.items()}
    # an average, which is not to be read
    zeros = {name: torch.zeros_like(value) for name, value in named.items()}
    content = {
        "state_dict": zeros,
        "current_model_state": named,
        "global_step": step,
        "optimizer_states": [zeros],
    }
    torch.save(content, run / f"epoch=3-step={step + 1}.ckpt")


LAYOUTS: dict[str, Callable[[Path, int, Weights], object]] = {
    "safetensors": lambda run, step, weights: save_file(weights, run / f"step{step}.safetensors"),
    "archives": lambda run, step, weights: torch.save(weights, run / f"model-{step:08}.pt"),
    "pickles": lambda run, step, weights: (run / f"{step}.pth").write_bytes(
        pickle.dumps({"model": weights, "optimizer": weights, "step": step})
    ),
    "modules": lambda run, step, weights: torch.save(
        {"module": weights, "iteration": step}, run / f"rank_{step}.pt"
    ),
    "lightning": lightning,
    "transformers": lambda run, step, weights: shards(run, step, weights, "safetensors"),
    "bins": lambda run, step, weights: shards(run, step, weights, "bin"),
    "pickled folders": pickled_folder,
    "distributed": lambda run, step, weights: distributed(
        run / f"step-{step}", {"model": weights, "optimizer": {"x": torch.ones(3)}, "step": step}
    ),
    "distributed flat": lambda run, step, weights: distributed(run / f"step-{step}", weights),
    "chunks": lambda run, step, weights: distributed(run / f"iter_{step}", weights, in_chunks=True),
}
"""A function for each layout that writes the weights of a step into the folder of a run."""
