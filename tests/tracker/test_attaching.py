"""A tracker attached to an optimizer: which steps count, which optimizers are refused, and which
tracker holds one."""

import gc
from functools import partial

import pytest
import torch
from checking import refused
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.optim.lr_scheduler import StepLR
from tracker.runs import track

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import RefusedCallError


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def sgd_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def sgd():
    """A model and its optimizer."""
    model = network()
    return model, sgd_of(model)


def attached(model, folder, optimizer, **settings):
    tracker = track(model, folder, **settings)
    tracker.attach(optimizer)
    return tracker


def loss_of(model):
    return model(torch.ones(4, 3)).square().mean()


def step(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("fused", "unscaled"),
    [
        (False, False),
        (True, False),
        (True, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
def test_steps_that_a_grad_scaler_skips_do_not_count(tmp_path, fused, unscaled):
    """The scaler calls a fused optimizer's `step` even then."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    with attached(model, tmp_path, optimizer) as tracker:
        for number in range(6):
            optimizer.zero_grad()
            loss = loss_of(model)
            if number in (1, 2):
                loss *= float("inf")
            scaler.scale(loss).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            counts.append(tracker.step)
    assert counts == [1, 1, 1, 2, 3, 4]


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("wrap", [Wrapper, partial(StepLR, step_size=1)])
def test_attach_takes_nothing_but_an_optimizer(tmp_path, wrap):
    model, optimizer = sgd()
    with refused("attach"):
        PostHocEMA.from_model(model, tmp_path).attach(wrap(optimizer))


class Renamed(torch.optim.AdamW):
    """Inherits the step of Adam, which torch may wrap in its hooks once more for each class."""


ON_TENSOR = partial(
    torch.optim.AdamW, lr=torch.tensor(0.1), capturable=False, foreach=False
)  # fmt: skip


@pytest.mark.parametrize(
    "make", [torch.optim.SGD, Renamed, Renamed, ON_TENSOR, torch.optim.Adafactor]
)
def test_steps_that_only_make_state_for_a_checkpoint_do_not_count(tmp_path, make):
    """torch takes such a step at every checkpoint of an optimizer without state, and when it loads
    a checkpoint."""
    model = network()
    optimizer = make(model.parameters())
    with attached(model, tmp_path, optimizer) as tracker:
        get_optimizer_state_dict(model, optimizer)
        for _ in range(6):
            step(model, optimizer)
        optimizer.zero_grad()
        stored = get_optimizer_state_dict(model, optimizer)
        weights = get_model_state_dict(model)
        fresh = make(model.parameters())
        tracker.detach()
        tracker.attach(fresh)
        set_state_dict(model, fresh, model_state_dict=weights, optim_state_dict=stored)
        assert tracker.step == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it compiles
def test_a_compiled_step_counts_on_the_users_own_clock_and_the_tracker_is_not_compiled(tmp_path):
    model, optimizer = sgd()
    compiled = torch.compile(optimizer.step, backend="eager")
    compiling = []

    def images():
        compiling.append(torch.compiler.is_compiling())
        return 64 * len(compiling)

    with track(model, tmp_path, t_unit="images") as tracker:
        with refused("attach", "images"):
            tracker.attach(optimizer)
        tracker.attach(optimizer, t=images)
        for _ in range(4):
            loss_of(model).backward()
            compiled()
        assert compiling == [False] * 4
        assert tracker.t == 256


def test_a_detached_tracker_counts_no_steps_and_may_be_attached_to_another_optimizer(tmp_path):
    model, first = sgd()
    second = sgd_of(model)
    with attached(model, tmp_path, first) as tracker:
        step(model, first)
        tracker.detach()
        tracker.detach()
        step(model, first)
        assert tracker.step == 1
        handle = tracker.attach(second)
        step(model, first)
        step(model, second)
        assert tracker.step == 2
        handle.remove()
        step(model, second)
        tracker.attach(sgd_of(model))
        gc.collect()  # that optimizer no longer exists
        for _ in range(2):  # as a notebook's cell that runs again
            tracker.attach(first)
        step(model, first)
        assert tracker.step == 3
        with refused("attach", "another optimizer"):
            tracker.attach(second)


def test_a_call_of_update_of_an_attached_tracker_is_refused_and_not_counted(tmp_path):
    """Trackers of several directories may be attached to one optimizer."""
    model, optimizer = sgd()
    with (
        attached(model, tmp_path / "one", optimizer) as tracker,
        attached(model, tmp_path / "two", optimizer) as other,
    ):
        step(model, optimizer)
        with refused("update_", kind=RefusedCallError):
            tracker.update_(model)
        step(model, optimizer)
        step(model, sgd_of(model))
        assert tracker.step == 2
        assert other.step == 2
    step(model, optimizer)  # a closed tracker is detached
    with refused(tmp_path / "one", "closed", kind=RefusedCallError):
        tracker.attach(optimizer)


def test_an_attached_tracker_needs_its_model_which_it_does_not_keep_alive(tmp_path):
    model, optimizer = sgd()
    with track(model, tmp_path, checkpoint_every=1) as tracker:
        tracker.update_(model)
    with refused("attach"):
        PostHocEMA.from_path(tmp_path).attach(optimizer)
    attached(nn.Linear(1, 1), tmp_path / "other", optimizer)
    with refused("attach", kind=RefusedCallError):
        optimizer.step()


class WithoutRates(torch.optim.Optimizer):
    """Has no `lr`, and frees the gradients in its step."""

    def __init__(self, parameters):
        super().__init__(parameters, {"size": 0.1})

    def step(self, closure=None):  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(group["size"] * parameter.grad)
                parameter.grad = None


def test_steps_of_an_optimizer_without_rates_that_frees_its_gradients_count(tmp_path):
    model = network()
    optimizer = WithoutRates(model.parameters())
    with attached(model, tmp_path, optimizer) as tracker:
        step(model, optimizer)
        assert tracker.step == 1
