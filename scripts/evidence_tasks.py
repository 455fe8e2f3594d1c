"""What `evidence` trains: networks, their data, losses and measures. Nothing is downloaded."""

from __future__ import annotations

import itertools
import math
import sys
import sysconfig
import zlib
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from trained_networks import CLASSES, SIDE, digits

from posthoc_cli import demo

F = nn.functional


class Task:
    """A network, its data and its measures; made from a folder for cached data, and `quick`.

    Each has `model()`, weights drawn from torch's global random numbers; `optimizer(model)`, at the highest learning
    rate; `loss(model, random)`, on a batch that is drawn; and `measure(model, part)`: measures on the held-out part
    "validation" or "test", each lower the better, of which `loss` is searched by.

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
        """Return inputs to measure the averaged weights' BatchNorm statistics on; none without BatchNorm."""
        return []

    def rate(self, schedule: str, step: int) -> float:
        """Return the learning rate of step 1, 2, ..., relative to the highest."""
        fraction, warm = (step - 1) / self.steps, min(1.0, step / self.warm_up)
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


# --- a language model --------------------------------------------------------------------------------


class Language(Task):
    """Predict the next token of the standard library's source text: byte pairs, contexts of 128."""

    steps, schedules = 1600, ("constant", "decayed", "cosine")
    vocabulary, width, depth, context, batch = 1024, 256, 4, 128, 8
    contexts = 512  # of the test part to measure on, evenly over it; half as many of the validation part

    def __init__(self, cache: Path, quick: bool = False) -> None:
        if quick:
            self.steps, self.width, self.depth, self.vocabulary, self.contexts = QUICK, 64, 1, 300, 8
        self.tokens = tokens(cache, self.vocabulary, 4 if quick else None)

    def model(self) -> nn.Module:
        """Make a decoder of 3.4 M parameters."""
        return Decoder(self.vocabulary, self.width, self.depth)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make AdamW without weight decay of the norms."""
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        scales = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
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
    """Return the standard library's modules by part, without tests, tables and code generated for other programs.

    The name of a module or package decides, so that no part of a package is trained on and another held out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
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
            part: [path.read_text("utf-8", "replace") for path in paths[:most]] for part, paths in sources().items()
        }
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts["training"], trainer)
        found = {
            part: torch.cat([torch.tensor(one.ids, dtype=torch.int64) for one in tokenizer.encode_batch(text)])
            for part, text in texts.items()
        }
        torch.save(found, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
    tokens: dict[str, torch.Tensor] = torch.load(file)
    return tokens


class Decoder(nn.Module):
    """Rotary positions, RMSNorm, embeddings tied to the last layer. [batch, tokens] -> [batch, tokens, words]."""

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                into_the_sum = name.endswith(("mixed.weight", "outward.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if into_the_sum else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the logits at all positions; none depends on a later token."""
        states, rotation = self.token(tokens), _rotation(tokens.shape[1])
        for block in self.blocks:
            states = block(states, rotation)
        return F.linear(self.norm(states), self.token.weight)


HEAD = 64
"""Width of an attention head."""


def _rotation(count: int) -> torch.Tensor:
    """Return cosine and sine of each pair of channels of a head at each position: [2, places, HEAD / 2]."""
    angles = torch.arange(count)[:, None] * 10_000.0 ** -torch.linspace(0, 1, HEAD // 2)
    return torch.stack([angles.cos(), angles.sin()])


def _rotated(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Return the states with each pair of channels rotated: [batch, heads, places, HEAD]."""
    (first, second), (cosine, sine) = heads.chunk(2, dim=-1), rotation.to(heads.dtype)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.split = nn.Linear(width, 3 * width, bias=False)
        self.mixed = nn.Linear(width, width, bias=False)
        self.inward = nn.Linear(width, 4 * width, bias=False)
        self.outward = nn.Linear(4 * width, width, bias=False)

    def forward(self, states: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        parts = self.split(self.attention_norm(states)).unflatten(2, (3, -1, HEAD))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        query, key = _rotated(query, rotation), _rotated(key, rotation)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.mixed(seen.transpose(1, 2).flatten(2))
        changed: torch.Tensor = states + self.outward(F.silu(self.inward(self.mlp_norm(states))))
        return changed


# --- a diffusion model -------------------------------------------------------------------------------


def shifted(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return each image shifted by up to a pixel in both directions, with empty edges: [images, 64]."""
    padded = F.pad(images.reshape(-1, SIDE, SIDE), (1, 1, 1, 1), value=float(images.min()))
    down, right = torch.randint(3, (2, len(images), 1, 1), generator=random)
    rows, columns = down + torch.arange(SIDE)[:, None], right + torch.arange(SIDE)
    return padded[torch.arange(len(images))[:, None, None], rows, columns].flatten(1)


class Diffusion(Task):
    """Denoise shifted digits with the demo's denoiser, larger and longer."""

    steps, schedules, max_checkpoints = 12_000, ("inverse-sqrt",), None
    width, depth, batch, count = 192, 4, 128, 2000

    def __init__(self, _: Path, quick: bool = False) -> None:
        if quick:
            self.steps, self.width, self.depth, self.count = QUICK, 16, 1, 100
        images, labels = digits()
        order, held = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)), 360
        images, labels = (6 * images[order] + 4.9).round() / 8 - 1, labels[order]  # from 0 .. 16
        self.training, random = demo.Images(images[held:], labels[held:]), torch.Generator().manual_seed(0)
        self.real = shifted(images[:held].repeat(6, 1), random)
        half = held // 2
        self.validations = {
            part: demo.Validation(demo.Images(self.real[: 2 * half][rows], labels[:held][rows]), seed=0)
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
        images = demo.Images(shifted(self.training.images[chosen], random), self.training.labels[chosen])
        return demo.losses(model, images, sigma, torch.randn(images.images.shape, generator=random)).mean()

    @torch.no_grad()
    def measure(self, model: nn.Module, part: str) -> dict[str, float]:
        """Return the loss on unseen images, and for "test" the Frechet distance of samples from all of them."""
        found = {"loss": float(self.validations[part](model).mean())}
        if part == "test":
            labels = torch.arange(self.count) % demo.CLASSES
            found["frechet"] = frechet(self.features(self.real), self.features(sample(model, labels)))
        return found

    @cached_property
    def features(self) -> nn.Module:
        """Return the features of a classifier before its last layer: [images, 64] -> [images, 32]."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random = torch.Generator().manual_seed(0)
            model = nn.Sequential(nn.Unflatten(1, (1, SIDE, SIDE)), *network())
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
            with torch.enable_grad():
                for _ in range(min(600, self.steps)):
                    chosen = torch.randint(len(self.training.images), (64,))
                    images = shifted(self.training.images[chosen], random)
                    loss = F.cross_entropy(model(images + 0.2 * torch.randn_like(images)), self.training.labels[chosen])
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
        return model[:-1].eval()


SAMPLING_STEPS = 24


@torch.no_grad()
def sample(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Return an image for each label by Heun's method, noise from 40 to 0.01 (algorithm 1 of arXiv 2206.00364)."""
    levels = torch.linspace(40.0 ** (1 / 7), 0.01 ** (1 / 7), SAMPLING_STEPS).pow(7).tolist()
    images = levels[0] * torch.randn(len(labels), demo.PIXELS, generator=torch.Generator().manual_seed(0))

    def slope(images: torch.Tensor, level: float) -> torch.Tensor:
        return (images - model(images, torch.full((len(labels), 1), level), labels)) / level

    for level, following in itertools.pairwise(levels):
        first = slope(images, level)
        ahead = images + (following - level) * first
        images = images + (following - level) * (first + slope(ahead, following)) / 2
    return images


def frechet(real: torch.Tensor, made: torch.Tensor) -> float:
    """Return the Frechet distance of two normal distributions with the means and covariances of the features."""
    (mean, covariance), (other_mean, other) = (
        (features.double().mean(dim=0), torch.cov(features.double().T)) for features in (real, made)
    )
    root = torch.linalg.eigvals(covariance @ other).real.clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + covariance.trace() + other.trace() - 2 * root)


# --- a classifier ------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """Make three convolutions with BatchNorm, 14,458 parameters: [batch, 1, 8, 8] -> [batch, 10]."""
    layers: list[nn.Module] = []
    for channels, wider in ((1, 16), (16, 32), (32, 32)):
        layers.append(nn.Conv2d(channels, wider, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(wider), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


class Classifier(Task):
    """Classify digits under noise and shifts with three convolutions with BatchNorm and SGD with momentum."""

    steps, schedules = 4000, ("constant", "cosine")
    batch, draws, renewing = 64, 20, 10

    def __init__(self, _: Path, quick: bool = False) -> None:
        if quick:
            self.steps, self.draws, self.renewing = QUICK, 1, 1
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

    def _drawn(self, part: str, count: int | None, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images, each shifted by up to a pixel and noisy: a number of random ones, or each `draws` times."""
        images, labels = self.parts[part]
        chosen = (
            torch.arange(len(labels)).repeat(self.draws)
            if count is None
            else torch.randint(len(labels), (count,), generator=random)
        )
        moved = shifted(images[chosen], random)
        return (moved + 0.8 * torch.randn(moved.shape, generator=random)).reshape(-1, 1, SIDE, SIDE), labels[chosen]


TASKS = {"language": Language, "diffusion": Diffusion, "classifier": Classifier}
