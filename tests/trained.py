"""A small real training, all of its weights, and averages of them."""

import functools
import json
import shlex

import numpy as np
import torch
from ema_command import run_ema
from torch import nn

STEPS = 1500
EVERY = 100
TIMES = range(EVERY, STEPS + 1, EVERY)


def network():
    torch.manual_seed(0)
    layers = (
        nn.Linear(20, 40),
        nn.Tanh(),
        nn.Linear(40, 30),
        nn.Linear(30, 5),
    )
    return nn.Sequential(*layers)


@functools.cache
def train(rate=3e-3, falls=False, optimizer="Adam", seed=1):
    model = network()
    random = torch.Generator().manual_seed(seed)
    first = nn.Linear(20, 40)
    teacher = nn.Sequential(first, nn.ReLU(), nn.Linear(40, 5))
    parameters = list(model.parameters())
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    chosen = getattr(torch.optim, optimizer)(parameters, rate, **options)
    path = []
    for step in range(STEPS):
        if falls:
            for group in chosen.param_groups:
                group["lr"] = rate * (1 - step / STEPS)
        x = torch.randn(16, 20, generator=random)
        chosen.zero_grad()
        error = model(x) - teacher(x).detach()
        error.square().mean().backward()
        chosen.step()
        weights = nn.utils.parameters_to_vector(parameters)
        path.append(weights.detach().double().numpy())
    return np.array(path)


@functools.cache
def shapes():
    return {name: parameter.shape for name, parameter in network().named_parameters()}


def named(vector, dtype=torch.float32):
    """Return the tensors of a vector: of the network, or one `w` of another number of elements."""
    sizes = [shape.numel() for shape in shapes().values()]
    values = torch.tensor(vector, dtype=dtype)
    if len(vector) != sum(sizes):
        return {"w": values}
    parts = zip(shapes().items(), values.split(sizes), strict=True)
    return {name: part.reshape(shape).clone() for (name, shape), part in parts}


def by(decay):
    """Return an EMA whose n-th update keeps decay(n)."""

    def update(step, average, weights):
        kept = decay(step)
        return kept * average + (1 - kept) * weights

    return update


def ema(decay):
    return by(lambda _: decay)


def ratio(n):
    return (1 + n) / (10 + n)


def follow(update, weights=None):
    """Return an average that begins with the first weights after every step: [steps,
    elements]."""
    weights = train() if weights is None else weights
    averages = [weights[0].copy()]
    for step, now in enumerate(weights, 1):
        averages.append(update(step, averages[-1], now))
    return np.array(averages[1:])


def timm(step, weights, average):
    return {"state_dict": weights, "state_dict_ema": average, "step": step}


def write(
    folder,
    weights,
    update,
    dtype=torch.float32,
    form=timm,
    steps=TIMES,
    name="step{}.pt".format,
):
    """Write a file at each of these steps, with an average in this dtype; return the folder."""
    folder.mkdir(exist_ok=True)
    averages = follow(update, weights)
    for step in steps:
        now = named(weights[step - 1])
        average = named(averages[step - 1], dtype)
        torch.save(form(step, now, average), folder / name(step))
    return folder


def settings_of(run):
    """Return the settings in the manifest of an import."""
    manifest = run / "ema-import.json"
    return json.loads(manifest.read_text())["settings"]


def paste(error, run):
    """Run the command that an error ends with, into a folder."""
    *_, command = str(error).partition("ema import ")
    *words, _ = shlex.split(command)
    done = run_ema("import", *words, run)
    assert done.code == 0, done.err
