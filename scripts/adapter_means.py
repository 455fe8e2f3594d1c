"""Measure what averaging a LoRA adapter's factors loses against averaging their products (guide `checkpoints`).

A denoiser of digits is trained, then a PEFT adapter of it on upside-down digits. Errors are relative L2 distances of
the change of the weights from the float64 average of B A over every step; losses use fixed noise.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from trained_networks import denoising

from posthoc_cli import PostHocEMA, Run, gamma_from_sigma_rel

RANKS, LENGTHS, LAYERS, ALPHA, SEEDS = (2, 8, 32), (0.05, 0.1, 0.2), ("0", "2", "4"), 16, 3
RUNS = {"checkpoint-*00": "20 checkpoints", "checkpoint-*": "100 checkpoints", "ema": "snapshots"}
TASK = denoising(128)


class UpsideDown(nn.Module):
    """The task of a denoiser whose images are upside down."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn the images, but not the noise level, and turn the result back."""
        return self.model(torch.cat([x[:, :64].flip(1), x[:, 64:]], dim=1)).flip(1)


def train(model: nn.Module, steps: int) -> Iterator[int]:
    """Train all parameters that require gradients at a constant learning rate; yield after each step."""
    loss, optimizer = TASK.loss(), torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(model, 64).backward()
        optimizer.step()
        yield step


def measure(rank: int, steps: int, seed: int, folder: Path) -> list[list[float]]:
    """Return errors of averaged factors and of `--merge` by length, and raw, averaged and merged losses."""
    torch.manual_seed(seed)
    base = TASK.model()
    assert [*train(base, steps)]
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    save_file(weights, folder / "base.safetensors")
    model = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=[*LAYERS]))
    own, history = peft.get_peft_model_state_dict(model), {}
    with PostHocEMA.from_model(model, folder / "ema", update_every=1, checkpoint_every=steps // 20) as ema:
        for step in train(UpsideDown(model), steps):
            ema.update_(model)
            for name, value in own.items():  # its tensors are the model's
                history.setdefault(name, []).append(value.double().numpy().copy())
            if step % (steps // 100) == 0:
                model.save_pretrained(folder / f"checkpoint-{step}")
    shutil.copy(folder / f"checkpoint-{steps}/adapter_config.json", folder / "ema")
    past, names = {name: np.stack(values) for name, values in history.items()}, "base_model.model.{}.lora_{}.weight"
    downs, ups = ([past[names.format(layer, part)] for layer in LAYERS] for part in "AB")
    rows = []
    for sigma_rel in LENGTHS:
        shares = np.diff(np.linspace(0, 1, steps + 1) ** (gamma_from_sigma_rel(sigma_rel) + 1))
        exact = [
            np.einsum("t,tor,tri->oi", shares, up, down, optimize=True) for up, down in zip(ups, downs, strict=True)
        ]
        mean = [
            np.tensordot(shares, up, 1) @ np.tensordot(shares, down, 1) for up, down in zip(ups, downs, strict=True)
        ]
        changes = [[ALPHA / rank * one for one in each] for each in (exact, mean)]
        for run in RUNS:
            Run(folder / run).merge(sigma_rel, folder / "base.safetensors", folder / "out.safetensors", overwrite=True)
            made = load_file(folder / "out.safetensors")
            changes.append([(made[f"{o}.weight"] - weights[f"{o}.weight"]).double().numpy() for o in LAYERS])
        flat = [np.concatenate([one.ravel() for one in each]) for each in changes]
        errors = [np.linalg.norm(one - flat[0]) / np.linalg.norm(flat[0]) for one in flat[1:]]
        last = [ALPHA / rank * up[-1] @ down[-1] for up, down in zip(ups, downs, strict=True)]
        rows.append([*errors, *(loss_of(weights, change) for change in (last, changes[1], changes[0]))])
    return rows


def loss_of(weights: dict[str, torch.Tensor], change: list[np.ndarray]) -> float:
    """Return the loss of the model with changed weights."""
    model = TASK.model()
    changed = {f"{o}.weight": weights[f"{o}.weight"] + torch.tensor(one) for o, one in zip(LAYERS, change, strict=True)}
    model.load_state_dict(weights | changed)
    torch.manual_seed(12345)
    with torch.no_grad():
        return float(TASK.loss()(UpsideDown(model), 50_000))


def main(steps: int = 2000) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"Mean of {SEEDS} trainings of {steps} steps; errors of the change of the weights, then losses.\n")
    print(f"| rank | sigma_rel | mean of factors | {' | '.join(RUNS.values())} | raw | mean of factors | exact |")
    print("|---|---|" + "---:|" * (len(RUNS) + 4))
    for rank in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            places = [Path(folder) / str(seed) for seed in range(SEEDS)]
            found = [(place.mkdir(), measure(rank, steps, seed, place))[1] for seed, place in enumerate(places)]
        for sigma_rel, row in zip(LENGTHS, np.mean(found, axis=0), strict=True):
            errors, losses = (f"{100 * one:.2f} %" for one in row[:-3]), (f"{one:.4f}" for one in row[-3:])
            print(f"| {rank} | {sigma_rel} | {' | '.join([*errors, *losses])} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
