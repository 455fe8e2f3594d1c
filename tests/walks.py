"""A small model whose weights walk at random, an EMA of them, and what both were at some steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
Decay = Callable[[int], float]
"""What the n-th update of an average keeps."""

STEPS = 400
EVERY = 40


class Net(nn.Module):
    """A model whose tensors have pairs of equal shapes, so that shapes do not tell which is
    which."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24))
        self.head = nn.Linear(
            24,
            24,
            bias=False,
        )


def new_net():
    torch.manual_seed(0)
    return Net()


def walk(net):
    """Move the parameters of a model at random, and yield the number of each step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for parameter in net.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.004 * noise
        yield step


def copied(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


def weights_of(net):
    return copied(dict(net.named_parameters()))


@functools.cache
def history():
    """Return the weights after every step."""
    net = new_net()
    return [weights_of(net) for _ in walk(net)]


@dataclass(frozen=True)
class Save:
    """What a training has when it saves."""

    step: int
    epoch: int  # from 1, of `EVERY` steps
    weights: Tensors
    average: Tensors


def constant(_):
    return 0.95


def ratio(n):
    return min(0.95, (1 + n) / (10 + n))


@functools.cache
def saves(decay=constant):
    """Return what there is every `EVERY` steps, the average in float32 from the first weights."""
    average = copied(dict(new_net().named_parameters()))
    saved = []
    for step, weights in enumerate(history(), 1):
        for name, value in average.items():
            value.lerp_(weights[name], 1 - decay(step))
        if step % EVERY == 0:
            saved.append(Save(step, step // EVERY, weights, copied(average)))
    return saved
