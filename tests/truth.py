"""The exact averages: float64 sums over weights that the test has recorded."""

import torch
from factories import exact_weights

EVERY = {
    "update_every": 1,
    "checkpoint_every": 4,
    "sigma_rels": (0.1, 0.2),
}
"""The options of every tracker here."""


def recorded(model):
    """Return copies of the trainable parameters, complete and in float64, in every process of a
    sharded model."""
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            complete = getattr(value, "full_tensor", value.clone)
            weights[name] = complete().double()
    return weights


def exact(history, sigma_rel, every=1):
    """Return the power-function average: an update at t has the profile's mass since the last
    update."""
    times = range(every, len(history) + 1, every)
    shares = torch.tensor(exact_weights(sigma_rel, times))
    averages = {}
    for name in history[0]:
        values = torch.stack([history[t - 1][name].double() for t in times])
        averages[name] = torch.tensordot(shares, values, dims=1)
    return averages


def distance(found, truth):
    """Return the relative L2 distance of weights from the exact ones, over all tensors of those."""
    off = 0.0
    norm = 0.0
    for name, value in truth.items():
        error = found[name].double() - value
        off += float(error.square().sum())
        norm += float(value.square().sum())
    return (off / norm) ** 0.5


def live(ema, model, sigma_rel):
    with ema.model(model, sigma_rel):
        return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_exact(ema, model, weights, every=1):
    """Assert that every step has counted once and that each tracked average is exact."""
    assert ema.step == len(weights)
    for sigma_rel in ema.settings.sigma_rels:
        found = live(ema, model, sigma_rel)
        assert distance(found, exact(weights, sigma_rel, every)) < 1e-6
