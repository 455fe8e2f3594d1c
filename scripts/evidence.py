"""Measure what averaging gains in three trainings that people know, against what they do today.

    python scripts/evidence.py [--out evidence] [--processes 2] [--quick] [--record] [--tables]

- A language model on the source text of Python's standard library: a decoder of 3.4 M parameters,
AdamW in bfloat16,
  with a constant learning rate, with one that falls over the last fifth, and cosine.
- A diffusion model on scikit-learn's digits: the denoiser of `ema demo`, larger and longer.
- A classifier of digits with BatchNorm, SGD with momentum, constant rate and cosine.

Each is trained with three seeds. What is compared averages the same training, so that differences
are taken seed by seed; the length of ours is searched by the loss on validation data, and all are
measured on test data. Where the rate falls to zero, lengths from 0.002 are measured, too, of
averages that are tracked at every step.

Trainings and measurements are kept in the folder `--out`, some 4 GB; a call that was stopped goes
on with what is not there. `--record` keeps the result for the guide, `--tables` prints the kept one
and draws its pictures."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import shutil
import sys
import sysconfig
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compare_peers import markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from trajectories import CLASSES, SIDE, digits, one_thread

from posthoc_cli import PostHocEMA, Run, demo, plots
from posthoc_cli.sweep import sweep
from posthoc_cli.targets import Decay

F = nn.functional
SEEDS = 3
TICKS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)
RECORD = Path(__file__).with_name("evidence.json")
PICTURES = Path(__file__).parent.parent / ".assets"

ROWS = {
    "last": "last weights",
    "mean-5": "mean of the last 5 checkpoints",
    "0.999": "EMA of decay 0.999",
    "0.05": "ours, `sigma_rel` 0.05",
    "best": "ours, best length by a sweep",
}
SCHEDULES = {"constant": "constant rate", "decayed": "warm-up, stable, decay", "cosine": "cosine"}

WEIGHTS = "weights.pt"
MEASURED = "measured.json"
"""Written last, when the records and the measurements of a folder are complete."""

CHECKPOINTS = 40
"""Evenly spaced checkpoints of a training; snapshots are written at the same steps."""

LAST = 5
"""Checkpoints of the weights themselves, whose mean is measured."""

LENGTHS = (0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25)
"""Lengths that are measured in every training."""

SHORT = (0.002, 0.003, 0.005, 0.007, 0.01, 0.014, 0.02)
"""Lengths that are also measured where the learning rate falls to zero."""

TRACKED = (0.002, 0.005, 0.01, 0.05, 0.28)
"""There, at every step; elsewhere the default."""

BUDGET = 12
"""Lengths that a search may measure."""

Tensors = dict[str, torch.Tensor]

Measured = dict[str, Any]
"""The measurements of one training."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("evidence"), help="folder for all records (evidence)"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="trainings at a time, a thread each (2)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny trainings of one seed: does everything run?"
    )
    parser.add_argument(
        "--record", action="store_true", help="keep the result and its pictures in the repository"
    )
    parser.add_argument(
        "--tables", action="store_true", help="print and draw the kept result, and train nothing"
    )
    options = parser.parse_args(arguments)
    if options.tables:
        found = json.loads(RECORD.read_text())
        folders = [PICTURES]
    else:
        folder = options.out / "quick" if options.quick else options.out
        found = run(folder, options.processes, options.quick)
        folders = [folder, PICTURES] if options.record else [folder]
        text = json.dumps(_rounded(found))
        (folder / RECORD.name).write_text(text)
        if options.record:
            RECORD.write_text(text)
    drawing = plots.as_file(lambda: picture(found), ".svg")
    for folder in folders:
        (folder / "gain-language.svg").write_bytes(drawing)
    print("\n\n".join(tables(found)))


def _rounded(value: Any) -> Any:
    """Return measurements with numbers rounded to six digits."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- what is trained
# ---------------------------------------------------------------------------------


class Task:
    """A network, its data and its measures; made from a folder for cached data, and `quick`.

    Each has `model()`, weights drawn from torch's global random numbers; `optimizer(model)`, at the
    highest learning rate; `loss(model, random)`, on a batch that is drawn; and `measure(model,
    part)`: measures on the held-out part "validation" or "test", each lower the better, of which
    `loss` is searched by.

    Attributes:
        steps: of one training.
        schedules: of the learning rate, each a training.
        max_checkpoints: of the tracker.
    """

    steps: int
    schedules: tuple[str, ...]
    warm_up = 100
    max_checkpoints: int | None = 20

    def batches(self) -> list[torch.Tensor]:
        """Return inputs to measure the averaged weights' BatchNorm statistics on; none without
        BatchNorm."""
        return []

    def rate(self, schedule: str, step: int) -> float:
        """Return the learning rate of step 1, 2, ..., relative to the highest."""
        fraction = (step - 1) / self.steps
        warm = min(1.0, step / self.warm_up)
        if schedule == "cosine":
            return warm * (1 + math.cos(math.pi * fraction)) / 2
        if schedule == "decayed":
            return warm * (1 - math.sqrt(max(0.0, (fraction - STABLE) / (1 - STABLE))))
        if schedule == "inverse-sqrt":
            return warm / math.sqrt(max(fraction / 0.3, 1.0))
        return warm


QUICK = 50
"""Steps of a training with `quick`."""

STABLE = 0.8
"""The fraction of training at which the rate of the decayed run begins to fall."""


# --- a language model
# --------------------------------------------------------------------------------


class Language(Task):
    """Predict the next token of the standard library's source text: byte pairs, contexts of 128."""

    steps = 1600
    schedules = ("constant", "decayed", "cosine")
    vocabulary = 1024
    width = 256
    depth = 4
    context = 128
    batch = 8
    # of the test part to measure on, evenly over it; half as many of the validation part
    contexts = 512

    def __init__(self, cache: Path, quick: bool = False) -> None:
        if quick:
            self.steps = QUICK
            self.width = 64
            self.depth = 1
            self.vocabulary = 300
            self.contexts = 8
        self.tokens = tokens(cache, self.vocabulary, 4 if quick else None)

    def model(self) -> nn.Module:
        """Make a decoder of 3.4 M parameters."""
        return Decoder(self.vocabulary, self.width, self.depth)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make AdamW without weight decay of the norms."""
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        scales = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": scales, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1.5e-3, betas=(0.9, 0.95), fused=True)

    def loss(self, model: nn.Module, random: torch.Generator) -> torch.Tensor:
        """Return the cross-entropy in nats a token."""
        text = self.tokens["training"]
        starts = torch.randint(len(text) - self.context - 1, (self.batch, 1), generator=random)
        return self._loss(model, text[starts + torch.arange(self.context + 1)])

    @torch.no_grad()
    def measure(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return the loss on contexts of modules that training never saw."""
        text = self.tokens[part]
        count = self.contexts if part == "test" else self.contexts // 2
        starts = torch.linspace(0, len(text) - self.context - 1, count).long()
        batches = (starts[:, None] + torch.arange(self.context + 1)).split(32)
        losses = [float(self._loss(model, text[places])) * len(places) for places in batches]
        return {"loss": sum(losses) / len(starts)}

    def _loss(self, model: nn.Module, text: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(text[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())


def sources() -> dict[str, list[Path]]:
    """Return the standard library's modules by part, without tests, tables and code generated for
    other programs.

    The name of a module or package decides, so that no part of a package is trained on and another
    held out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {
        "test",
        "tests",
        "site-packages",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "encodings",
        "pydoc_data",
    }
    parts: dict[str, list[Path]] = {"training": [], "validation": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        names = path.relative_to(root).parts
        if not left_out & set(names):
            place = zlib.crc32(names[0].removesuffix(".py").encode()) % 20
            parts[{0: "validation", 1: "test"}.get(place, "training")].append(path)
    return parts


def tokens(cache: Path, vocabulary: int, most: int | None = None) -> dict[str, torch.Tensor]:
    """Return the tokens by part, of so many modules; cached in the folder `cache`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # comes with peft

    file = cache / f"tokens-{sys.version_info.major}.{sys.version_info.minor}-{vocabulary}.pt"
    if not file.exists():
        texts = {
            part: [path.read_text("utf-8", "replace") for path in paths[:most]]
            for part, paths in sources().items()
        }
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts["training"], trainer)
        found = {
            part: torch.cat(
                [torch.tensor(one.ids, dtype=torch.int64) for one in tokenizer.encode_batch(text)]
            )
            for part, text in texts.items()
        }
        torch.save(found, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
    tokens: dict[str, torch.Tensor] = torch.load(file)
    return tokens


class Decoder(nn.Module):
    """Rotary positions, RMSNorm, embeddings tied to the last layer. [batch, tokens] -> [batch,
    tokens, words]."""

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                into_the_sum = name.endswith(("mixed.weight", "outward.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / math.sqrt(2 * depth) if into_the_sum else 0.02
                )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the logits at all positions; none depends on a later token."""
        states = self.token(tokens)
        rotation = _rotation(tokens.shape[1])
        for block in self.blocks:
            states = block(states, rotation)
        return F.linear(self.norm(states), self.token.weight)


HEAD = 64
"""Width of an attention head."""


def _rotation(count: int) -> torch.Tensor:
    """Return cosine and sine of each pair of channels of a head at each position: [2, places, HEAD
    / 2]."""
    angles = torch.arange(count)[:, None] * 10_000.0 ** -torch.linspace(0, 1, HEAD // 2)
    return torch.stack([angles.cos(), angles.sin()])


def _rotated(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Return the states with each pair of channels rotated: [batch, heads, places, HEAD]."""
    (first, second), (cosine, sine) = heads.chunk(2, dim=-1), rotation.to(heads.dtype)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.mlp_norm = nn.RMSNorm(width)
        self.split = nn.Linear(width, 3 * width, bias=False)
        self.mixed = nn.Linear(width, width, bias=False)
        self.inward = nn.Linear(width, 4 * width, bias=False)
        self.outward = nn.Linear(4 * width, width, bias=False)

    def forward(self, states: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        parts = self.split(self.attention_norm(states)).unflatten(2, (3, -1, HEAD))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        query = _rotated(query, rotation)
        key = _rotated(key, rotation)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.mixed(seen.transpose(1, 2).flatten(2))
        changed: torch.Tensor = states + self.outward(F.silu(self.inward(self.mlp_norm(states))))
        return changed


# --- a diffusion model
# -------------------------------------------------------------------------------


def shifted(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return each image shifted by up to a pixel in both directions, with empty edges: [images,
    64]."""
    padded = F.pad(images.reshape(-1, SIDE, SIDE), (1, 1, 1, 1), value=float(images.min()))
    down, right = torch.randint(3, (2, len(images), 1, 1), generator=random)
    rows = down + torch.arange(SIDE)[:, None]
    columns = right + torch.arange(SIDE)
    return padded[torch.arange(len(images))[:, None, None], rows, columns].flatten(1)


class Diffusion(Task):
    """Denoise shifted digits with the demo's denoiser, larger and longer."""

    steps = 12_000
    schedules = ("inverse-sqrt",)
    max_checkpoints = None
    width = 192
    depth = 4
    batch = 128
    count = 2000

    def __init__(self, _: Path, quick: bool = False) -> None:
        if quick:
            self.steps = QUICK
            self.width = 16
            self.depth = 1
            self.count = 100
        images, labels = digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held = 360
        images, labels = (6 * images[order] + 4.9).round() / 8 - 1, labels[order]  # from 0 .. 16
        self.training = demo.Images(images[held:], labels[held:])
        random = torch.Generator().manual_seed(0)
        self.real = shifted(images[:held].repeat(6, 1), random)
        half = held // 2
        self.validations = {
            part: demo.Validation(
                demo.Images(self.real[: 2 * half][rows], labels[:held][rows]), seed=0
            )
            for part, rows in {"validation": slice(half), "test": slice(half, None)}.items()
        }

    def model(self) -> nn.Module:
        """Make a denoiser of 0.48 M parameters."""
        return demo.Denoiser(self.width, self.depth)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make the demo's optimizer."""
        return torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.99), fused=True)

    def loss(self, model: nn.Module, random: torch.Generator) -> torch.Tensor:
        """Return the demo's loss."""
        chosen = torch.randint(len(self.training.images), (self.batch,), generator=random)
        sigma = demo.random_noise_levels(self.batch, random)
        images = demo.Images(
            shifted(self.training.images[chosen], random), self.training.labels[chosen]
        )
        return demo.losses(
            model, images, sigma, torch.randn(images.images.shape, generator=random)
        ).mean()

    @torch.no_grad()
    def measure(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return the loss on unseen images, and for "test" the Frechet distance of samples from all
        of them."""
        found = {"loss": float(self.validations[part](model).mean())}
        if part == "test":
            labels = torch.arange(self.count) % demo.CLASSES
            found["frechet"] = frechet(
                self.features(self.real), self.features(sample(model, labels))
            )
        return found

    @cached_property
    def features(self) -> nn.Module:
        """Return the features of a classifier before its last layer: [images, 64] -> [images,
        32]."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random = torch.Generator().manual_seed(0)
            model = nn.Sequential(nn.Unflatten(1, (1, SIDE, SIDE)), *network())
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
            with torch.enable_grad():
                for _ in range(min(600, self.steps)):
                    chosen = torch.randint(len(self.training.images), (64,))
                    images = shifted(self.training.images[chosen], random)
                    loss = F.cross_entropy(
                        model(images + 0.2 * torch.randn_like(images)), self.training.labels[chosen]
                    )
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
        return model[:-1].eval()


SAMPLING_STEPS = 24


@torch.no_grad()
def sample(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Return an image for each label by Heun's method, noise from 40 to 0.01 (algorithm 1 of arXiv
    2206.00364)."""
    levels = torch.linspace(40.0 ** (1 / 7), 0.01 ** (1 / 7), SAMPLING_STEPS).pow(7).tolist()
    images = levels[0] * torch.randn(
        len(labels), demo.PIXELS, generator=torch.Generator().manual_seed(0)
    )

    def slope(images: torch.Tensor, level: float) -> torch.Tensor:
        return (images - model(images, torch.full((len(labels), 1), level), labels)) / level

    for level, following in itertools.pairwise(levels):
        first = slope(images, level)
        ahead = images + (following - level) * first
        images = images + (following - level) * (first + slope(ahead, following)) / 2
    return images


def frechet(real: torch.Tensor, made: torch.Tensor) -> float:
    """Return the Frechet distance of two normal distributions with the means and covariances of the
    features."""
    (mean, covariance), (other_mean, other) = (
        (features.double().mean(dim=0), torch.cov(features.double().T)) for features in (real, made)
    )
    root = torch.linalg.eigvals(covariance @ other).real.clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + covariance.trace() + other.trace() - 2 * root)


# --- a classifier
# ------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """Make three convolutions with BatchNorm, 14,458 parameters: [batch, 1, 8, 8] -> [batch,
    10]."""
    layers: list[nn.Module] = []
    for channels, wider in ((1, 16), (16, 32), (32, 32)):
        layers.append(nn.Conv2d(channels, wider, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(wider), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


class Classifier(Task):
    """Classify digits under noise and shifts with three convolutions with BatchNorm and SGD with
    momentum."""

    steps = 4000
    schedules = ("constant", "cosine")
    batch = 64
    draws = 20
    renewing = 10

    def __init__(self, _: Path, quick: bool = False) -> None:
        if quick:
            self.steps = QUICK
            self.draws = 1
            self.renewing = 1
        images, labels = digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        parts = {"validation": order[:360], "test": order[360:720], "training": order[720:]}
        self.parts = {part: (images[rows], labels[rows]) for part, rows in parts.items()}

    def model(self) -> nn.Module:
        """Make a network of 14,458 parameters."""
        return network()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make SGD with momentum."""
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def loss(self, model: nn.Module, random: torch.Generator) -> torch.Tensor:
        """Return the cross-entropy."""
        images, labels = self._drawn("training", self.batch, random)
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def measure(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return the cross-entropy, and the share of wrong classes."""
        images, labels = self._drawn(part, None, torch.Generator().manual_seed(0))
        logits = model.eval()(images).double()
        model.train()
        error = float((logits.argmax(dim=1) != labels).double().mean())
        return {"loss": float(F.cross_entropy(logits, labels)), "error": error}

    def batches(self) -> list[torch.Tensor]:
        """Return batches as in training."""
        random = torch.Generator().manual_seed(0)
        return [self._drawn("training", 512, random)[0] for _ in range(self.renewing)]

    def _drawn(
        self,
        part: str,
        count: int | None,
        random: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images, each shifted by up to a pixel and noisy: a number of random ones, or each
        `draws` times."""
        images, labels = self.parts[part]
        chosen = (
            torch.arange(len(labels)).repeat(self.draws)
            if count is None
            else torch.randint(len(labels), (count,), generator=random)
        )
        moved = shifted(images[chosen], random)
        return (moved + 0.8 * torch.randn(moved.shape, generator=random)).reshape(
            -1, 1, SIDE, SIDE
        ), labels[chosen]


TASKS = {"language": Language, "diffusion": Diffusion, "classifier": Classifier}


# --- one training
# ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """One training of a task, recorded in its folder."""

    task: str
    schedule: str
    seed: int

    @property
    def falls(self) -> bool:
        """Whether the learning rate falls to zero."""
        return self.schedule in ("decayed", "cosine")

    def folder(self, root: Path) -> Path:
        """The folder of the records."""
        return root / f"{self.task}-{self.schedule}-{self.seed}"


def copied(model: nn.Module) -> Tensors:
    """Return copies of the current weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train(task: Task, training: Training, root: Path) -> None:
    """Train and record, unless that is done."""
    folder = training.folder(root)
    if (folder / WEIGHTS).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(training.seed)
    model = task.model()
    optimizer = task.optimizer(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    classical = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    checkpoints: deque[Tensors] = deque(maxlen=LAST)
    every = max(10, task.steps // CHECKPOINTS)
    ema = tracker(model, folder / "ema", task, training, every)
    random = torch.Generator()
    for step in range(1, task.steps + 1):
        share = task.rate(training.schedule, step)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        random.manual_seed(1_000_003 * training.seed + step)
        loss = task.loss(model, random)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        ema.update_(model)
        classical.update_parameters(model)
        if step % every == 0:
            checkpoints.append(copied(model))
            now = float(loss.detach())
            print(f"{folder.name}: {step} of {task.steps}, loss {now:.4f}", flush=True)
    ema.close()
    weights = {
        "last": copied(model),
        "0.999": copied(classical.module),
        f"mean-{LAST}": mean(checkpoints),
    }
    torch.save(weights, folder / WEIGHTS)


def tracker(
    model: nn.Module,
    folder: Path,
    task: Task,
    training: Training,
    every: int,
) -> PostHocEMA:
    """Return the tracker of a training, which also tracks short averages where the rate falls."""
    settings: dict[str, Any] = {"max_checkpoints": task.max_checkpoints}
    if training.falls:
        settings |= {"sigma_rels": TRACKED, "update_every": 1}
    return PostHocEMA.from_model(model, folder, checkpoint_every=every, **settings)


def mean(checkpoints: Sequence[Tensors]) -> Tensors:
    """Return the mean of each tensor; of integer tensors the last."""
    means = {}
    for name, last in checkpoints[-1].items():
        means[name] = last
        if last.is_floating_point():
            stacked = torch.stack([one[name] for one in checkpoints])
            means[name] = stacked.mean(dim=0)
    return means


def measure(task: Task, training: Training, root: Path) -> None:
    """Measure every average of a training on the test data, unless that is done."""
    folder = training.folder(root)
    model = task.model()
    batches = task.batches()
    if (folder / MEASURED).exists():
        return

    def measured(
        weights: Mapping[str, torch.Tensor],
        part: str = "test",
        renew: bool = True,
    ) -> dict[str, float]:
        model.load_state_dict(weights)
        if renew:
            update_bn(batches, model)
        return task.measure(model, part)

    run = Run(folder / "ema")
    weights = torch.load(folder / WEIGHTS)
    rows = {name: measured(one, renew=name != "last") for name, one in weights.items()}
    lengths = LENGTHS
    low = 0.02
    if training.falls:
        lengths = SHORT + LENGTHS
        low = min(SHORT)

    def loss(averaged: Mapping[str, torch.Tensor]) -> float:
        return measured(averaged, "validation")["loss"]

    report = sweep(run, loss, low=low, high=0.28, budget=BUDGET)
    best = report.found.best
    rows["best"] = measured(run.average(best))
    for length in lengths:
        rows[f"{length:g}"] = measured(run.average(length))
    if "decayed" in task.schedules and training.schedule == "constant":
        rows["linear"] = measured(run.average(Decay("linear", over=0.2)))
    (folder / MEASURED).write_text(json.dumps({**asdict(training), "rows": rows, "best": best}))
    print(f"{folder.name}: measured", flush=True)


# --- all trainings
# -----------------------------------------------------------------------------------


def run(root: Path, processes: int, quick: bool) -> dict[str, Any]:
    """Make what is missing in the folder `root`; return all measurements."""
    root.mkdir(parents=True, exist_ok=True)
    Language(root, quick)  # makes the text once, before the processes need it
    trainings = []
    for seed in range(1 if quick else SEEDS):
        for name, task in TASKS.items():
            trainings += [Training(name, schedule, seed) for schedule in task.schedules]
    work = partial(_work, root, quick)
    if processes == 1:
        for training in trainings:
            work(training)
    else:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            for _ in pool.map(work, trainings):
                pass
    measured = []
    for training in trainings:
        file = training.folder(root) / MEASURED
        measured.append(json.loads(file.read_text()))
    return {"python": platform.python_version(), "torch": torch.__version__, "trainings": measured}


def _work(root: Path, quick: bool, training: Training) -> None:
    with one_thread():
        task = TASKS[training.task](root, quick)
        train(task, training, root)
        measure(task, training, root)


def _of(found: dict[str, Any], task: str, schedule: str) -> list[Measured]:
    of_task = [one for one in found["trainings"] if one["task"] == task]
    return [one for one in of_task if one["schedule"] == schedule]


# --- tables
# ------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[str]:
    """Return Markdown: a table of averages for each task, and one of differences for the language
    model."""
    language = {}
    for schedule, title in SCHEDULES.items():
        language[title] = Column(_of(found, "language", schedule), "loss", 1, 3)
    diffusion = _of(found, "diffusion", "inverse-sqrt")
    denoiser = {
        "test loss, 1e-3": Column(diffusion, "loss", 1e3, 1),
        "Frechet distance": Column(diffusion, "frechet", 1, 3),
    }
    classifier = {
        "constant rate": Column(_of(found, "classifier", "constant"), "error", 100, 2),
        "cosine": Column(_of(found, "classifier", "cosine"), "error", 100, 2),
    }
    constant = _of(found, "language", "constant")
    return [
        _table("test loss, nats a token", language),
        _differences(constant, _of(found, "language", "decayed")),
        _table("denoiser", denoiser),
        _table("error, %", classifier),
    ]


class Column(NamedTuple):
    """Trainings, one a seed; a measure, its factor in the table, and its decimals."""

    runs: list[Measured]
    metric: str
    scale: float
    digits: int

    def cell(self, row: str) -> str:
        """Return the mean of a row; in parentheses its difference from the last weights."""
        values = self.values(row)
        mean = _mean(values, self.digits)
        if row == "last":
            return mean
        return f"{mean} ({_paired(values, self.values('last'), self.digits)})"

    def values(self, row: str) -> list[float]:
        """Return the scaled measure of a row, by seed."""
        return [self.scale * run["rows"][row][self.metric] for run in self.runs]


def _table(corner: str, columns: dict[str, Column]) -> str:
    """Return means with standard errors over seeds; in parentheses the difference from the last
    weights, by seed."""
    lines = [(corner, *columns)]
    for row, title in ROWS.items():
        cells = [column.cell(row) for column in columns.values()]
        lines.append((title, *cells))
    lengths = []
    for column in columns.values():
        best = [f"{run['best']:.3g}" for run in column.runs]
        lengths.append(" ".join(best))
    lines.append(("best length, by seed", *lengths))
    return markdown(lines)


def _differences(constant: list[Measured], decayed: list[Measured]) -> str:
    """Return what another average of the language model gains or loses at a constant rate."""

    def less(row: str, others: list[Measured], other: str) -> str:
        losses = Column(constant, "loss", 1, 4).values(row)
        return _paired(losses, Column(others, "loss", 1, 4).values(other), 4)

    return markdown(
        [
            ("constant rate", "difference of test losses"),
            ("best length minus the mean of 5 checkpoints", less("best", constant, "mean-5")),
            ("best length minus `sigma_rel` 0.05", less("best", constant, "0.05")),
            ("best length minus the decayed run", less("best", decayed, "last")),
            ("`decay:linear:20%` minus the decayed run", less("linear", decayed, "last")),
        ]
    )


def _paired(values: Sequence[float], others: Sequence[float], digits: int) -> str:
    differences = np.subtract(values, others)
    return _mean(differences.tolist(), digits, sign="+")


def _mean(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return the mean and its standard error."""
    error = f" ± {_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{error}"


def _error(values: Any) -> Any:
    """Return the standard error of the mean over the first axis; 0 for a single value."""
    count = len(values)
    if count == 1:
        return np.zeros(np.shape(values)[1:])
    return np.std(values, axis=0, ddof=1) / math.sqrt(count)


# --- the picture
# ----------------------------------------------------------------------------------------


def picture(found: dict[str, Any]) -> Figure:
    """Draw the language model's loss less that of the last weights, seed by seed, against the
    length."""
    figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
    panels = list(figure.subplots(1, len(SCHEDULES)))
    for axes, schedule in zip(panels, SCHEDULES, strict=True):
        runs = [one["rows"] for one in _of(found, "language", schedule)]
        _draw_gains(axes, runs)
        axes.set_title(SCHEDULES[schedule], fontsize=9)
    panels[0].set_ylabel("loss less the last weights', nats a token", fontsize=9)
    panels[0].legend(fontsize=6, loc="upper left")
    return figure


def _draw_gains(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    """Draw the gains of our averages and of the mean of checkpoints, each with its error."""
    ours = {}
    for length in SHORT + LENGTHS:
        gains = _gains(runs, f"{length:g}")
        if gains:
            ours[length] = gains
    axes.set_xscale("log")
    ticks = TICKS if min(ours) < min(LENGTHS) else LENGTHS
    axes.set_xticks(ticks, [f"{length:g}" for length in ticks], fontsize=6)
    axes.minorticks_off()
    axes.set_xlabel("sigma_rel")
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.errorbar(
        [*ours],
        [*map(np.mean, ours.values())],
        [*map(_error, ours.values())],
        color=plots.COLOURS[0],
        linestyle=plots.STYLES[0],
        marker=plots.MARKERS[0],
        markersize=3.5,
        capsize=2,
        label="ours",
    )
    _draw_mean_of_checkpoints(axes, _gains(runs, "mean-5"))
    axes.axhline(0, color="0.5", linewidth=0.8)


def _draw_mean_of_checkpoints(axes: Axes, gains: Sequence[float]) -> None:
    mean = np.mean(gains)
    error = _error(gains)
    colour = plots.COLOURS[1]
    axes.axhline(mean, color=colour, linestyle=plots.STYLES[1], label=ROWS["mean-5"])
    axes.axhspan(mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


def _gains(runs: Sequence[dict[str, Any]], row: str) -> list[float]:
    """Return the loss of a row less that of the last weights, of each run that has the row."""
    measured = [rows for rows in runs if row in rows]
    return [rows[row]["loss"] - rows["last"]["loss"] for rows in measured]


if __name__ == "__main__":
    main()
