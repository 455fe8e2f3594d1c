"""A tracker that follows an optimizer: which steps count, which do not, and whose optimizer it is."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from factories import exact_average, refuse_for_space
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_state_dict
from tracker.runs import wait_for_writers

from posthoc_cli import PostHocEMA, files
from posthoc_cli.errors import InvalidValueError, NotReadyError, WriteError
from posthoc_cli.snapshots.directory import read_directory

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 2, generator=torch.Generator().manual_seed(2))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def sgd(**options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and what trains it."""
    model = network()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, **options)


def attached(model: torch.nn.Module, folder: Path, optimizer: torch.optim.Optimizer, **settings: object) -> PostHocEMA:
    defaults: dict = {"update_every": 1, "checkpoint_every": 10, "checkpoint_dtype": None, "sigma_rels": (0.05, 0.28)}
    tracker = PostHocEMA.from_model(model, folder, **(defaults | settings))
    tracker.attach(optimizer)
    return tracker


def backward(model: torch.nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    (model(X.to(dtype)) - Y.to(dtype)).square().mean().backward()


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def test_a_closure_that_is_called_often_makes_one_step(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        backward(model)
        return (model(X) - Y).square().mean()

    with attached(model, tmp_path, optimizer) as tracker:
        for _ in range(3):
            optimizer.step(closure)
        assert tracker.step == 3
        assert len(calls) > 3


class ScaledSGD(torch.optim.Optimizer):
    """Takes the scaler itself, as fused optimizers of other libraries do."""

    _step_supports_amp_scaling = True

    def __init__(self, parameters, lr: float) -> None:  # type: ignore[no-untyped-def]
        super().__init__(parameters, {"lr": lr})

    def step(self, grad_scaler):  # type: ignore[no-untyped-def, override]
        raise AssertionError(grad_scaler)


SCALED = {
    "plain": torch.optim.Adam,
    "fused": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True),
}


@pytest.mark.parametrize("make", SCALED)
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
def test_steps_that_a_grad_scaler_skips_do_not_count(tmp_path: Path, make: str, unscaled: bool) -> None:
    """Of an optimizer that is fused `step` is called even then."""
    model = network()
    optimizer = SCALED[make](model.parameters(), lr=0.01)
    scaler, counts = torch.amp.GradScaler("cpu", init_scale=4.0), []
    with attached(model, tmp_path, optimizer) as tracker:
        for number in range(6):
            optimizer.zero_grad()
            loss = (model(X) - Y).square().mean() * (float("inf") if number in (1, 2) else 1.0)
            scaler.scale(loss).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            counts.append(tracker.step)
    assert counts == [1, 1, 1, 2, 3, 4]


def test_an_optimizer_that_takes_the_scaler_is_refused(tmp_path: Path) -> None:
    model = network()
    tracker = PostHocEMA.from_model(model, tmp_path)
    with pytest.raises(InvalidValueError, match=r"ScaledSGD takes the GradScaler.*update_\(model\)"):
        tracker.attach(ScaledSGD(model.parameters(), lr=0.01))


def test_the_wrapper_of_accelerate_is_looked_through(tmp_path: Path) -> None:
    """With accumulated gradients it makes a step at every other call, and a scheduler makes none."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, plain = sgd()
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1)
    prepared, optimizer = accelerator.prepare(model, plain)
    assert type(optimizer) is AcceleratedOptimizer
    with attached(prepared, tmp_path, optimizer) as tracker:
        for _ in range(6):
            with accelerator.accumulate(prepared):
                accelerator.backward((prepared(X) - Y).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
        assert tracker.step == 3


class Wrapper(torch.optim.Optimizer):
    """Steps as often as it likes: DeepSpeed's of ZeRO-1 and 2 does once for each group of parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for _ in range(2):
            self.optimizer.step(closure)


class Sharing(torch.optim.Optimizer):
    """Has what an optimizer has, as Lookahead does, but torch has put no hooks around its step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults
        self.state, self.param_groups = inner.state, inner.param_groups


class Handing(Sharing):
    """Has also the methods that take hooks, which are those of the optimizer within."""

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


class Clipped(torch.optim.Adam):
    """Changes weights after the step that it overrides, whose hooks may be called before."""

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(-0.1, 0.1)
        return loss


class PlainWrapper:
    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> object:
        return getattr(self.optimizer, name)


IS_A_WRAPPER = r"Wrapper is a wrapper.*call ema\.update_\(model\) after each step"
REFUSED: list[tuple[Any, str]] = [
    (Wrapper, IS_A_WRAPPER),
    (PlainWrapper, IS_A_WRAPPER),
    (Sharing, "Sharing is a wrapper"),
    (Handing, "Handing is a wrapper"),
    (lambda optimizer: AcceleratedOptimizer(Wrapper(optimizer), device_placement=False), IS_A_WRAPPER),
    (
        lambda optimizer: Clipped(optimizer.param_groups),
        r"Clipped overrides a step.*call ema\.update_\(model\) after each",
    ),
    (lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1), r"a torch\.optim\.Optimizer, not StepLR"),
    (lambda _: network(), r"a torch\.optim\.Optimizer, not Linear"),
]


@pytest.mark.parametrize(("wrap", "message"), REFUSED)
def test_other_wrappers_are_refused_with_the_line_to_write(tmp_path: Path, wrap: Any, message: str) -> None:
    Accelerator(cpu=True)
    model, optimizer = sgd()
    with pytest.raises(InvalidValueError, match=message):
        PostHocEMA.from_model(model, tmp_path).attach(wrap(optimizer))


class Renamed(torch.optim.AdamW):
    """Its step is that of Adam, around which torch may put its hooks for each class anew."""


OPTIMIZERS = [
    torch.optim.SGD,
    Renamed,
    torch.optim.AdamW,
    torch.optim.Adam,
    Renamed,
    lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    lambda parameters, lr: torch.optim.AdamW(parameters, lr=torch.tensor(lr), capturable=False, foreach=False),
    torch.optim.Adafactor,
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_steps_that_only_make_state_for_a_checkpoint_do_not_count(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    """torch makes one at every checkpoint of an optimizer without state, and when one is loaded."""
    model = network().double()
    optimizer = make(model.parameters(), lr=0.1)
    values = []
    with attached(model, tmp_path, optimizer) as tracker:
        stored = get_optimizer_state_dict(model, optimizer)
        for _ in range(3):
            for _ in range(2):
                step(model, optimizer)
                optimizer.zero_grad()
                values.append(model.weight.detach().clone().numpy())
            stored = get_optimizer_state_dict(model, optimizer)
        weights = get_model_state_dict(model)
        fresh = make(model.parameters(), lr=0.1)
        tracker.detach()
        tracker.attach(fresh)
        set_state_dict(model, fresh, model_state_dict=weights, optim_state_dict=stored)
        assert (tracker.step, tracker.t) == (6, 6)
        with tracker.averaged(model, tracked=0.28):
            # Six updates in float64: each rounds by at most half a unit in the last place of values below 2.
            assert abs(model.weight.detach().numpy() - exact_average(values, 0.28, range(1, 7))).max() < 6 * 2**-52


def test_a_first_step_of_a_warm_up_counts(tmp_path: Path) -> None:
    """Its rate is 0, its gradients are not."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: number / 10)
    with attached(model, tmp_path, optimizer) as tracker:
        for _ in range(3):
            step(model, optimizer)
            scheduler.step()
        assert tracker.step == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it compiles
def test_a_compiled_step_is_followed_and_the_tracker_not_compiled(tmp_path: Path) -> None:
    model, optimizer = sgd()
    compiled = torch.compile(optimizer.step, backend="eager")
    with attached(model, tmp_path, optimizer) as tracker:
        compiling = []
        tracker.attach(optimizer, t=lambda: compiling.append(torch.compiler.is_compiling()) or len(compiling))
        for _ in range(4):
            backward(model)
            compiled()
        assert compiling == [False] * 4
        assert tracker.step == 4


def test_a_clock_of_ones_own(tmp_path: Path) -> None:
    model, optimizer = sgd()
    with PostHocEMA.from_model(model, tmp_path, update_every=1, t_unit="images") as tracker:
        with pytest.raises(
            InvalidValueError, match=r"t None: must be a function that gives the training time in images"
        ):
            tracker.attach(optimizer)
        seen = 0
        tracker.attach(optimizer, t=lambda: seen)
        for _ in range(3):
            seen += 64
            step(model, optimizer)
        assert (tracker.step, tracker.t) == (3, 192)


def test_detached_it_counts_no_more_and_may_follow_another(tmp_path: Path) -> None:
    model, first = sgd()
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    with attached(model, tmp_path, first) as tracker:
        step(model, first)
        tracker.detach()
        tracker.detach()
        step(model, first)
        assert tracker.step == 1
        tracker.update_(model)  # by hand again
        handle = tracker.attach(second)
        step(model, first)
        step(model, second)
        assert tracker.step == 3
        handle.remove()
        step(model, second)
        tracker.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        gc.collect()  # it is gone, and followed no more
        tracker.update_(model)
        tracker.attach(first)
        step(model, first)
        assert tracker.step == 5


def test_the_same_optimizer_twice_counts_once_and_another_one_is_refused(tmp_path: Path) -> None:
    """A notebook's cell that runs again."""
    model, optimizer = sgd()
    with attached(model, tmp_path, optimizer) as tracker:
        tracker.attach(optimizer)
        with pytest.raises(InvalidValueError, match="t 1: must be a function"):
            tracker.attach(optimizer, t=1)  # type: ignore[arg-type]
        with pytest.raises(InvalidValueError, match=r"attached to another optimizer \(SGD\)"):
            tracker.attach(torch.optim.Adam([model.bias]))
        step(model, optimizer)
        assert tracker.step == 1


def test_a_call_by_hand_beside_the_optimizer_is_refused_not_counted_twice(tmp_path: Path) -> None:
    model, optimizer = sgd()
    with attached(model, tmp_path, optimizer) as tracker:
        step(model, optimizer)
        with pytest.raises(NotReadyError, match="leave out either this call or attach"):
            tracker.update_(model)
        step(model, optimizer)
        assert tracker.step == 2
    step(model, optimizer)  # a closed tracker follows nothing
    with pytest.raises(NotReadyError, match="was closed"):
        tracker.attach(optimizer)


def test_it_needs_a_model_that_is_there(tmp_path: Path) -> None:
    model, optimizer = sgd()
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1) as tracker:
        tracker.update_(model)
    with pytest.raises(InvalidValueError, match="made without a model"):
        PostHocEMA.from_path(tmp_path).attach(optimizer)
    gone = PostHocEMA.from_model(torch.nn.Linear(1, 1), tmp_path / "other")
    gone.attach(optimizer)  # which does not keep the model alive
    with pytest.raises(NotReadyError, match="gone"):
        optimizer.step()


@pytest.mark.parametrize("again", ["one", "other"])
@pytest.mark.parametrize("before", [0, 3])
def test_a_cell_run_again_closes_its_first_tracker(
    tmp_path: Path, again: str, before: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = sgd()
    first = attached(model, tmp_path / "one", optimizer)
    for _ in range(before):
        step(model, optimizer)
    wrapped = torch.nn.DataParallel(model)
    second = attached(wrapped, tmp_path / again, optimizer)
    assert (
        f"the tracker of {tmp_path / 'one'} was attached to this optimizer for the same model; it is closed"
        in caplog.text
    )
    with pytest.raises(NotReadyError, match="was closed"):
        first.update_(model)
    with second:
        for _ in range(2):
            step(model, optimizer)
    assert second.step == (2 + before if again == "one" else 2)  # the same model in the same directory goes on
    assert first.step == before
    assert {snapshot.info.run_id for snapshot in read_directory(tmp_path / again)} == {second.run_id}


def test_a_cell_that_makes_everything_anew_waits_for_no_garbage_collector(tmp_path: Path) -> None:
    """A scheduler and its optimizer hold each other, and the optimizer the tracker, which holds the directory."""
    gc.disable()
    try:
        for _ in range(2):
            model, optimizer = sgd()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            tracker = attached(model, tmp_path, optimizer, resume="auto")
            step(model, optimizer)
            scheduler.step()
    finally:
        gc.enable()
    assert tracker.step == 2


def test_trackers_of_another_model_or_of_another_optimizer_by_now_are_left_alone(tmp_path: Path) -> None:
    one, two = network(), network()
    both = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1)
    other = torch.optim.SGD(one.parameters(), lr=0.1)
    with attached(one, tmp_path / "1", both) as first, attached(two, tmp_path / "2", both) as second:
        both.zero_grad()
        backward(one)
        step(two, both)
        assert (first.step, second.step) == (1, 1)
        first.detach()
        first.attach(other)
        with attached(one, tmp_path / "3", both) as third:
            step(one, other)
            step(one, both)
            assert (first.step, second.step, third.step) == (2, 2, 1)


def test_after_an_error_of_the_update_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fused optimizer and a scaler: what the scaler leaves there must not scale the next gradients."""

    def train(tracker: PostHocEMA | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for number in range(4):
            optimizer.zero_grad()
            scaler.scale((model(X) - Y).square().mean()).backward()
            with monkeypatch.context() as fault:
                if tracker is not None and number == 1:
                    fault.setattr(files.system, "fsync", refuse_for_space)
                with pytest.raises(WriteError, match="no space") if tracker and number == 2 else nullcontext():
                    scaler.step(optimizer)
                if tracker is not None:
                    wait_for_writers(tmp_path)
            scaler.update()

    plain, its = sgd(fused=True)
    train(None, plain, its)
    model, optimizer = sgd(fused=True)
    with attached(model, tmp_path, optimizer, checkpoint_every=2) as tracker:
        train(tracker, model, optimizer)
        assert tracker.step == 4
    assert torch.equal(model.weight, plain.weight)


def test_a_warning_of_a_step_names_the_users_own_line(tmp_path: Path) -> None:
    """Between the step and the hook stand torch's own frames."""
    model, optimizer = sgd()
    with attached(model, tmp_path, optimizer, on_nonfinite="skip"):
        step(model, optimizer)
        model.bias.data[0] = torch.nan
        with pytest.warns(RuntimeWarning, match=r"^posthoc_cli: update skipped: parameter 'bias'") as seen:
            optimizer.step()
        assert seen[0].filename == __file__


# --- another optimizer takes over ---

GONE = r"the averages stand at step 10: .* is gone, and 2 later steps .* say ema\.attach\(new_optimizer\)"
STILL = r"stand at step 10: .* stands still, and 50 later steps .* ema\.detach\(\), ema\.attach\("
NEVER = r"stand at step 0: .* stands still, and 50 later steps .* ema\.detach\(\), ema\.attach\("


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "the averages stand at step" in text]


def use(tracker: PostHocEMA, model: torch.nn.Module, kind: str) -> None:
    """A call that ends with averages of a training."""
    if kind == "model":
        with tracker.model(model, 0.15):
            pass
    elif kind == "load_into":
        tracker.load_into(network(), 0.15)
    else:
        {"close": tracker.close, "weights": lambda: tracker.state_dict(0.15), "state": tracker.state_dict}[kind]()


@pytest.mark.parametrize(
    ("kind", "own", "message"),
    [("close", 10, STILL), ("model", 10, STILL), ("weights", 10, STILL), ("state", 10, STILL), ("load_into", 10, STILL),
     ("close", 0, NEVER)],
)  # fmt: skip
def test_an_optimizer_that_another_one_replaces_is_told_once(
    tmp_path: Path, kind: str, own: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After 60 steps t would be 10 without a word; or 0, as where a wrapper copies it, or parameters."""
    model, optimizer = sgd()
    if not own:
        optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    tracker = attached(model, tmp_path, optimizer)
    for _ in range(own):
        step(model, optimizer)
    old, optimizer = optimizer, torch.optim.Adam(model.parameters())  # a list, a scheduler or a frame keeps the old one
    for _ in range(50):
        step(model, optimizer)
    assert not warned(caplog)  # the old one might go on, as after a search for a learning rate
    use(tracker, model, kind)
    tracker.close()
    (text,) = warned(caplog)
    assert re.search(message, text)
    assert (tracker.step, len(old.param_groups)) == (own, 1)


def test_an_optimizer_that_is_gone_is_told_while_there_is_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = sgd()
    with attached(model, tmp_path, optimizer) as tracker:
        for _ in range(10):
            step(model, optimizer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gc.collect()
        step(model, optimizer)
        assert not warned(caplog)
        for _ in range(3):
            step(model, optimizer)
        (text,) = warned(caplog)
        assert re.search(GONE, text)
        tracker.attach(optimizer)  # what the message says
        step(model, optimizer)
        assert tracker.step == 11
        optimizer = torch.optim.SGD([model.bias], lr=0.1)  # any of the model's parameters
        gc.collect()
        for _ in range(2):
            step(model, optimizer)
    assert len(warned(caplog)) == 2


def test_a_process_that_closes_no_tracker_is_told_at_its_end(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from tracker.test_attaching import attached, sgd, step\n"
        "model, first = sgd(); tracker = attached(model, Path(sys.argv[1]), first); step(model, first)\n"
        "second = torch.optim.Adam(model.parameters())\nfor _ in range(4): step(model, second)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", program, str(tmp_path)]
    told = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stderr
    assert told.count("posthoc_cli: ") == 1
    assert "stand at step 1: the optimizer that the tracker is attached to stands still, and 4 later steps" in told


def of_two_models(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    other = network()
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(9):
        step(other, theirs)


def in_turns(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Each of several optimizers of the same parameters, one of them more often; stopped within an iteration."""
    others = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(3)]
    for number in range(4):
        for one in [*others, others[0]]:
            step(model, one)
        if number < 3:
            step(model, optimizer)


def on_parts(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As Muon for the matrices and Adam for the rest, or a generator and its critic in phases."""
    assert isinstance(model, torch.nn.Linear)
    optimizer.param_groups[0]["params"] = [model.weight]
    step(model, optimizer)
    rest = torch.optim.SGD([model.bias], lr=0.1)
    for _ in range(9):
        step(model, rest)


def by_hand(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tracker: PostHocEMA | None = None) -> None:
    tracker.detach()  # type: ignore[union-attr]
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(9):
        step(model, other)
        tracker.update_(model)  # type: ignore[union-attr]


def searched(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A search for a learning rate, with an optimizer of its own and the weights put back."""
    before, trial = {name: one.clone() for name, one in model.state_dict().items()}, torch.optim.SGD(model.parameters())
    for _ in range(20):
        step(model, trial)
    model.load_state_dict(before)
    step(model, optimizer)


def skipped(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Infinite gradients: a scaler leaves out the steps of another one, which is called all the same."""
    other = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(9):
        other.zero_grad()
        scaler.scale((model(X) - Y).square().mean() * float("inf")).backward()
        scaler.step(other)
        scaler.update()


def made_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(4):
        get_optimizer_state_dict(model, torch.optim.Adam(model.parameters()))


class Averaging(torch.optim.Optimizer):
    """Steps by an inner optimizer of the same parameters, as sharpness-aware ones do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups[0]["params"], {"lr": 0.1})
        self.inner = inner

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for _ in range(5):
            self.inner.step(closure)


ORDINARY = [of_two_models, in_turns, on_parts, by_hand, searched, skipped, made_state]


@pytest.mark.parametrize("do", ORDINARY)
@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
def test_ordinary_trainings_are_told_nothing(tmp_path: Path, do: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = sgd()
    with attached(model, tmp_path, optimizer) as tracker:
        step(model, optimizer)
        do(model, optimizer, tracker) if do is by_hand else do(model, optimizer)
        with tracker.model(model, 0.15):
            pass
        del optimizer
        gc.collect()
    assert not warned(caplog)


@pytest.mark.parametrize("outer", [False, True])
def test_an_optimizer_within_another_one_is_no_other(
    tmp_path: Path, outer: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, inner = sgd()
    wrapper = Averaging(inner)
    with attached(model, tmp_path, wrapper if outer else inner) as tracker:
        for _ in range(4):
            step(model, wrapper)
        assert tracker.step == (4 if outer else 20)
    assert not warned(caplog)


def test_going_on_by_hand_after_an_optimizer_that_is_gone_is_told_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = sgd()
    with attached(model, tmp_path, optimizer) as tracker:
        step(model, optimizer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gc.collect()
        for _ in range(5):
            step(model, optimizer)
            tracker.update_(model)
        assert tracker.step == 6
    assert not warned(caplog)
