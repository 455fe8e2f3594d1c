"""Steps that a tracker does not count, and weights that do not move, are said in one warning: by a
comparison of sampled weights at each snapshot and at the end."""

from copy import deepcopy

import forked
import torch
from torch import nn
from tracker.runs import EITHER_DEVICE, track

MOVED = "the weights have moved since step "
SAME = "the weights have not changed from step "


def network():
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
    return nn.Sequential(*layers)


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 3)
        model(x).square().mean().backward()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_replaced_optimizer_is_noticed_at_the_end(tmp_path, caplog):
    """As where phases of a training have an optimizer each."""
    model = network()
    ema = track(model, tmp_path, checkpoint_every=100)
    optimizer = sgd(model)
    ema.attach(optimizer)
    train(model, optimizer, 5)
    train(model, sgd(model), 3)
    ema.close()
    ema.close()
    assert caplog.text.count(f"{MOVED}5") == 1


def test_the_end_of_the_process_warns_of_uncounted_steps_too(tmp_path):
    code = """
import sys, torch
from posthoc_cli import PostHocEMA
model = torch.nn.Linear(2, 2)
ema = PostHocEMA.from_model(model, sys.argv[1], update_every=1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(4):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    if step < 3:
        ema.update_(model)
"""
    assert f"{MOVED}3" in forked.run(code, tmp_path).err


def test_evaluations_and_the_average_that_a_model_is_given_at_the_end_are_no_steps(
    tmp_path,
    caplog,
):
    model = network()
    ema = track(model, tmp_path, checkpoint_every=100)
    for _ in range(5):
        train(model, sgd(model))
        ema.update_(model)
    with ema.model(model, 0.05):
        pass
    ema.load_into(model, 0.05)
    ema.close()
    assert not caplog.text


@EITHER_DEVICE
def test_weights_that_never_change_are_said_at_each_snapshot(tmp_path, device, caplog):
    """As where the optimizer is that of another model."""
    other = network()
    optimizer = sgd(other)
    model = network()
    ema = track(model, tmp_path, device=device, update_every=2, checkpoint_every=10)
    ema.attach(optimizer)
    train(other, optimizer, 20)
    ema.close()
    assert caplog.text.count(f"{SAME}10 to 20") == 1


def test_a_copy_that_the_optimizer_does_not_know_is_noticed(tmp_path, caplog):
    """It takes the model's place."""
    model = network()
    optimizer = sgd(model)
    ema = track(model, tmp_path, update_every=2, checkpoint_every=40)
    for step in range(1, 121):
        if step == 50:
            model = deepcopy(model)
        train(model, optimizer)
        ema.update_(model)
    ema.close()
    assert f"{SAME}80 to 120" in caplog.text
    assert caplog.text.count(SAME) == 1


def test_an_attached_tracker_that_never_counted_says_so_at_its_end(tmp_path, caplog):
    model = network()
    ema = track(model, tmp_path, update_every=10)
    optimizer = sgd(model)
    ema.attach(optimizer)
    train(model, sgd(model))
    ema.close()
    assert "no snapshot: the first update is at call 10 " in caplog.text
