"""What the scripts train: small networks on scikit-learn's digits, and on source text.

The first half is what `trajectories` records: networks of a few thousand parameters and their
losses, which draw a batch from torch's global random numbers. The second half are the tasks of
`evidence`, with optimizers, schedules of the learning rate and measures on held-out data. Recorded
figures depend on every random number that is drawn here, and on their order.
"""

from __future__ import annotations

import math
import sysconfig
import zlib
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import denoising
import torch
import torch.nn.functional as F  # noqa: N812
from denoising import Images
from torch import Generator, Tensor, nn
from torch.nn import Module, init
from torch.optim import Adam, Optimizer

SIDE = 8
"""Pixels in a row, and rows in an image."""

CLASSES = 10


@cache
def digits() -> Images:
    """Return the standardised images, [images, 64], and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    standardised = torch.from_numpy((images - 4.9) / 6.0)
    return Images(standardised.float(), torch.from_numpy(labels))


def rows_of(data: Images, rows: Tensor | slice) -> Images:
    """Return some of the images and labels."""
    return Images(data.images[rows], data.labels[rows])


def drawn(data: Images, count: int, random: Generator | None = None) -> Images:
    """Return some images and labels, drawn with replacement."""
    rows = torch.randint(len(data.labels), (count,), generator=random)
    return rows_of(data, rows)


def pixels(images: Tensor) -> Tensor:
    """Return the whole numbers from 0 to 16 that were standardised."""
    return (images * 6.0 + 4.9).round()


def half_wave(fraction: float) -> float:
    """Fall from 1 to 0 as half a cosine wave."""
    wave = 1 + math.cos(math.pi * fraction)
    return wave / 2


def descend(optimizer: Optimizer, loss: Tensor, rate: float = 1.0) -> None:
    """Take a step; the learning rate is relative to that which the optimizer was made with."""
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * rate
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


class Block(Module):
    """Causal attention, then an MLP, each with a norm before and a residual connection."""

    def __init__(
        self,
        width: int,
        heads: int,
        norm: type[Module] = nn.LayerNorm,
        activation: type[Module] = nn.GELU,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = norm(width)
        self.mlp_norm = norm(width)
        self.split = nn.Linear(width, 3 * width, bias)
        self.mixed = nn.Linear(width, width, bias)
        self.inward = nn.Linear(width, 4 * width, bias)
        self.activation = activation()
        self.outward = nn.Linear(4 * width, width, bias)

    def forward(self, states: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Map states, [batch, tokens, width], to states of the same shape."""
        parts = self.split(self.attention_norm(states))
        of_heads = parts.unflatten(2, (3, self.heads, -1))
        query, key, value = of_heads.permute(2, 0, 3, 1, 4)
        if rotation is not None:
            query = rotated(query, rotation)
            key = rotated(key, rotation)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        joined = seen.transpose(1, 2).flatten(2)
        states = states + self.mixed(joined)
        inner = self.inward(self.mlp_norm(states))
        change: Tensor = self.outward(self.activation(inner))
        return states + change


# --- recorded: a denoiser, two classifiers, a transformer
# ------------------------------------------------------------------------------


def denoiser(width: int = 32) -> Module:
    """Make a network from a scaled noisy image and its noise level, [batch, 65], to [batch, 64]:
    5,280 parameters at width 32."""
    return nn.Sequential(
        nn.Linear(SIDE * SIDE + 1, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, SIDE * SIDE),
    )


def denoising_loss(model: Module, size: int) -> Tensor:
    """Return the loss at log-normal noise levels; input, target and weighting have variance 1 at
    every level."""
    clean, _ = drawn(digits(), size)
    normal = torch.randn(size, 1)
    level = torch.exp(1.2 * normal - 0.8)
    noisy = clean + level * torch.randn_like(clean)
    scale = torch.sqrt(level**2 + 1)
    condition = torch.log(level) / 4
    given = torch.cat([noisy / scale, condition], dim=1)
    guess = model(given)
    # The best linear guess is noisy / scale**2; the network learns what is left of it, in units of
    # its size.
    left = clean - noisy / scale**2
    target = left * scale / level
    return F.mse_loss(guess, target)


def classifier(width: int) -> Module:
    """Make a network from an image, [batch, 64], to the logits of 10 classes: 3,610 parameters at
    width 48."""
    return nn.Sequential(
        nn.Linear(SIDE * SIDE, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def convolutional_classifier() -> Module:
    """Make one with two convolutions and batch norm: 4,942 parameters with its weights and
    biases."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, CLASSES),
    )


def classification_loss(model: Module, size: int) -> Tensor:
    """Return the cross-entropy on noisy images. Without noise the gradient would soon vanish."""
    clean, labels = drawn(digits(), size)
    noisy = clean + 0.7 * torch.randn_like(clean)
    return F.cross_entropy(model(noisy), labels)


PAIRS = 16
"""Tokens that stand for two neighbouring pixels of four levels each; those from here on stand for a
label."""


@cache
def digit_sequences() -> Tensor:
    """Return each digit as tokens, [images, 33]: its label, then its pixels in reading order, two
    to a token.

    Two to a token because the time of a step grows with the length; four levels keep the vocabulary
    at 16.
    """
    images, labels = digits()
    levels = (pixels(images) / 17 * 4).long()
    left = levels[:, ::2]
    right = levels[:, 1::2]
    first = PAIRS + labels[:, None]
    return torch.cat([first, 4 * left + right], dim=1)


class Transformer(Module):
    """A transformer of 7,792 parameters from tokens, [batch, 32], to the logits of the next tokens,
    [batch, 32, 16]."""

    def __init__(self) -> None:
        super().__init__()
        width = 16
        self.token = nn.Embedding(PAIRS + CLASSES, width)
        length = SIDE * SIDE // 2
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.Sequential(
            Block(width, heads=2),
            Block(width, heads=2),
        )
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, PAIRS)
        init.normal_(self.token.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits at all positions; none depends on a later token."""
        states = self.token(tokens) + self.place
        changed = self.blocks(states)
        logits: Tensor = self.logits(self.norm(changed))
        return logits


def next_token_loss(model: Module, size: int) -> Tensor:
    """Return the cross-entropy of each pair of pixels given the label and all earlier pairs."""
    sequences = digit_sequences()
    indices = torch.randint(len(sequences), (size,))
    chosen = sequences[indices]
    return loss_of_next(model(chosen[:, :-1]), chosen)


def loss_of_next(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of logits, [batch, tokens - 1, words], of each token but the
    first."""
    following = tokens[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1), following)


# --- a language model
# --------------------------------------------------------------------------------


LEFT_OUT = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "pydoc_data",
}
"""Tests, tables, and code generated for other programs."""


def sources() -> dict[str, list[Path]]:
    """Return the standard library's modules by part.

    The name of a module or package decides, so that no part of a package is trained on and another
    held out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = {0: "validation", 1: "test"}
    parts = defaultdict[str, list[Path]](list)
    for path in sorted(root.rglob("*.py")):
        names = path.relative_to(root).parts
        if LEFT_OUT.isdisjoint(names):
            name = names[0].removesuffix(".py")
            number = zlib.crc32(name.encode())
            part = held_out.get(number % 20, "training")
            parts[part].append(path)
    return parts


VOCABULARY = 1024


def tokens(folder: Path) -> dict[str, Tensor]:
    """Return the tokens by part, kept in a folder."""
    version = sysconfig.get_python_version()
    file = folder / f"tokens-{version}-{VOCABULARY}.pt"
    if not file.exists():
        texts = {}
        for part, paths in sources().items():
            texts[part] = [path.read_text("utf-8", "replace") for path in paths]
        tokenizer = trained_tokenizer(texts["training"])
        numbers = {}
        for part, modules in texts.items():
            ids = []
            for module in tokenizer.encode_batch(modules):
                ids += module.ids
            numbers[part] = torch.tensor(ids)
        temporary = file.with_suffix(".tmp")
        torch.save(numbers, temporary)
        temporary.rename(file)
    tokens: dict[str, Tensor] = torch.load(file)
    return tokens


def trained_tokenizer(texts: list[str]) -> Any:
    """Return a tokenizer of byte pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # comes with peft

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


HEAD = 64
"""Width of an attention head."""


class Decoder(Module):
    """Rotary positions, RMSNorm, embeddings tied to the last layer. [batch, tokens] -> [batch,
    tokens, words]."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList()
        heads = width // HEAD
        for _ in range(depth):
            block = Block(width, heads, nn.RMSNorm, nn.SiLU, bias=False)
            self.blocks.append(block)
        self.norm = nn.RMSNorm(width)
        for name, parameter in self.named_parameters():
            deviation = 0.02
            if name.endswith(("mixed.weight", "outward.weight")):
                deviation = 0.02 / math.sqrt(2 * depth)
            if parameter.ndim > 1:
                init.normal_(parameter, std=deviation)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits at all positions; none depends on a later token."""
        states = self.token(tokens)
        angles = rotation(tokens.shape[1])
        for block in self.blocks:
            states = block(states, angles)
        return F.linear(self.norm(states), self.token.weight)


def rotation(count: int) -> Tensor:
    """Return cosine and sine of each pair of channels of a head at each position: [2, places, HEAD
    / 2]."""
    speeds = 10_000.0 ** -torch.linspace(0, 1, HEAD // 2)
    angles = torch.arange(count)[:, None] * speeds
    return torch.stack([angles.cos(), angles.sin()])


def rotated(heads: Tensor, rotation: Tensor) -> Tensor:
    """Return the states with each pair of channels rotated: [batch, heads, places, HEAD]."""
    first, second = heads.chunk(2, dim=-1)
    cosine, sine = rotation.to(heads.dtype)
    across = first * cosine - second * sine
    along = first * sine + second * cosine
    return torch.cat([across, along], dim=-1)


# --- a diffusion model
# -------------------------------------------------------------------------------


HELD_OUT = 360
"""Images that the diffusion model is measured on."""


def shuffled_digits() -> Images:
    """Return images and labels in the order in which they are held out."""
    data = digits()
    order = torch.randperm(len(data.labels), generator=seeded())
    return rows_of(data, order)


def seeded() -> Generator:
    """Return random numbers that are always the same."""
    return Generator().manual_seed(0)


def shifted(images: Tensor, random: Generator) -> Tensor:
    """Return each image shifted by up to a pixel in both directions, with empty edges: [images,
    64]."""
    count = len(images)
    empty = float(images.min())
    squares = images.reshape(-1, SIDE, SIDE)
    padded = F.pad(squares, (1, 1, 1, 1), value=empty)
    down, right = torch.randint(3, (2, count, 1, 1), generator=random)
    side = torch.arange(SIDE)
    rows = down + side[:, None]
    columns = right + side
    numbers = torch.arange(count)
    return padded[numbers[:, None, None], rows, columns].flatten(1)


class Diffusion:
    """Denoise shifted digits."""

    def __init__(self) -> None:
        standardised, labels = shuffled_digits()
        images = pixels(standardised) / 8 - 1
        self.training = Images(images[HELD_OUT:], labels[HELD_OUT:])
        held_out = Images(shifted(images[:HELD_OUT], seeded()), labels[:HELD_OUT])
        self.validation = denoising.Validation(held_out, seed=0, draws=8)

    def optimizer(self, model: Module) -> Optimizer:
        """Make Adam with a short memory."""
        betas = (0.9, 0.99)
        return Adam(model.parameters(), lr=4e-3, betas=betas, fused=True)

    def loss(self, model: Module, random: Generator) -> Tensor:
        """Return the weighted loss of a random batch."""
        clean, labels = drawn(self.training, 64, random)
        sigma = denoising.random_noise_levels(64, random)
        images = shifted(clean, random)
        batch = Images(images, labels)
        noise = torch.randn(images.shape, generator=random)
        return denoising.losses(model, batch, sigma, noise).mean()
