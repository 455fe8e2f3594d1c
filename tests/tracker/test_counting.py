"""Steps that a tracker does not count, and weights that do not move, are said in one warning."""

import gc
import sys
from copy import deepcopy

import forked
import pytest
import torch
from torch import nn
from tracker.runs import EITHER_DEVICE, track

from posthoc_cli import PostHocEMA
from posthoc_cli.tracker.posthoc_ema import _note_uncounted_steps

MOVED = "the model has moved since step "
SAME = "the weights of step "


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


def made(folder, steps=5, **settings):
    """Return a model after some steps that were counted, and its tracker."""
    model = network()
    ema = track(model, folder, checkpoint_every=100, **settings)
    for _ in range(steps):
        train(model, sgd(model))
        ema.update_(model)
    return model, ema


def test_a_replaced_optimizer_is_noticed_when_averages_are_asked_for(tmp_path, caplog):
    """As where phases of a training have an optimizer each."""
    model = network()
    ema = track(model, tmp_path, checkpoint_every=100)
    optimizer = sgd(model)
    ema.attach(optimizer)
    train(model, optimizer, 5)
    ema.state_dict(0.15)
    assert MOVED not in caplog.text
    optimizer = sgd(model)
    gc.collect()
    train(model, optimizer, 3)
    ema.state_dict(0.15)
    assert f"{MOVED}5, the last that was counted" in caplog.text
    ema.close()
    assert caplog.text.count(MOVED) == 1


def test_an_average_between_a_step_and_its_call_is_no_forgotten_call(tmp_path, caplog):
    """Of one optimizer, or of several that step in turn. A call that does not follow is named."""
    model, ema = made(tmp_path)
    optimizer = sgd(model)
    other = torch.optim.Adam(model[2].parameters())
    for _ in range(3):
        train(model, optimizer)
        ema.state_dict(0.15)
        train(model, other)
        ema.state_dict(0.15)
        ema.update_(model)
    train(model, other)
    ema.state_dict(0.15)
    assert MOVED not in caplog.text
    train(model, other)
    ema.state_dict(0.15)
    assert f"{MOVED}8, the last that was counted" in caplog.text


def test_a_step_that_a_scaler_skips_is_no_forgotten_call(tmp_path, caplog):
    """Such as two skipped steps of a fused optimizer, whose third is taken."""
    model, ema = made(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.found_inf = torch.tensor(1.0)
    for _ in range(2):
        train(model, optimizer)
        ema.state_dict(0.15)
        assert MOVED not in caplog.text
    optimizer.found_inf.zero_()
    train(model, optimizer)
    ema.close()
    assert f"{MOVED}5," in caplog.text


def test_what_moves_no_weights_by_a_step_is_no_forgotten_call(tmp_path, caplog):
    model, ema = made(tmp_path)
    best = deepcopy(model.state_dict())
    with ema.model(model, 0.05):
        pass
    model(torch.randn(8, 3)).mean().backward()  # BatchNorm's statistics move, and gradients come
    model.load_state_dict(best)
    ema.load_into(model, 0.05)
    for parameter in model.parameters():
        parameter.data.clamp_(-5, 5)
    other = network()
    train(other, sgd(other))
    both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    for parameter in model.parameters():
        parameter.grad = None
    train(other, both, 3)
    ema.state_dict(0.15)
    ema.close()
    train(model, sgd(model))
    ema.state_dict(0.15)  # of a tracker that has ended
    assert MOVED not in caplog.text


def test_a_tracker_whose_steps_were_never_counted_says_so_at_its_end(tmp_path, caplog):
    model, ema = made(tmp_path / "run", steps=0)
    train(model, sgd(model))
    ema.close()
    assert f"run: {MOVED}0," in caplog.text


def test_the_end_of_the_process_says_it_too(tmp_path):
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
    assert f"{MOVED}3, the last that was counted" in forked.run(code, tmp_path).err


def test_an_interrupt_between_a_step_and_its_call_is_no_forgotten_call(
    tmp_path,
    caplog,
    monkeypatch,
):
    model, ema = made(tmp_path / "block")
    with pytest.raises(KeyboardInterrupt), ema:
        train(model, sgd(model))
        raise KeyboardInterrupt
    model, ema = made(tmp_path / "exit")
    train(model, sgd(model))
    monkeypatch.setattr(sys, "last_value", KeyboardInterrupt(), raising=False)
    _note_uncounted_steps()
    assert MOVED not in caplog.text
    monkeypatch.undo()
    _note_uncounted_steps()
    assert f"exit: {MOVED}5," in caplog.text


@EITHER_DEVICE
def test_weights_that_never_change_are_said_once(tmp_path, device, caplog):
    """As where the optimizer is that of another model."""
    other = network()
    optimizer = sgd(other)
    model = network()
    ema = PostHocEMA.from_model(model, tmp_path, update_every=2, device=device)
    ema.attach(optimizer)
    train(other, optimizer, 20)
    ema.flush()
    assert SAME not in caplog.text  # ten updates, of which nine had one before them
    train(other, optimizer, 40)
    ema.close()
    assert caplog.text.count(f"{SAME}22 are those of step 2: does an optimizer") == 1


def test_weights_that_stand_between_two_snapshots_are_said_once(tmp_path, caplog):
    """As those of a copy that the optimizer does not know, which takes the model's place."""
    model = network()
    optimizer = sgd(model)
    ema = PostHocEMA.from_model(model, tmp_path, update_every=2, checkpoint_every=40)
    for step in range(1, 201):
        if step == 50:
            model = deepcopy(model)
        train(model, optimizer)
        ema.update_(model)
    ema.close()
    # compared at the updates 1, 11, 31, 51, 71
    assert f"{SAME}102 are those of step 62: does an optimizer" in caplog.text
    assert caplog.text.count(SAME) == 1
