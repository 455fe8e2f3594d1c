"""The tensors of a model that are tracked, and averaged weights in a live model."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors

from posthoc_cli import PostHocEMA, PostHocError
from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NotReadyError


class Network(torch.nn.Module):
    """A model with tied and frozen parameters, float and integer buffers, and a transient
    buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4, dtype=dtype)
        self.norm = torch.nn.BatchNorm1d(4, dtype=dtype)
        self.frozen = torch.nn.Linear(4, 4, dtype=dtype).requires_grad_(False)
        self.head = torch.nn.Linear(4, 7, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.drop = torch.nn.Dropout(0.5)
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.cache: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(x).mean(dim=1))
        return self.head(self.drop(self.frozen(hidden)) + self.cache.sum())


def trained(
    folder: Path,
    steps: int = 10,
    dtype: torch.dtype = torch.float32,
    **settings: object,
) -> tuple:
    torch.manual_seed(0)
    model = Network(dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    defaults: dict = {"update_every": 1, "checkpoint_every": 5, "checkpoint_dtype": None}
    tracker = PostHocEMA.from_model(model, folder, **(defaults | settings))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(0, 7, (8, 3))).square().mean().backward()
        optimizer.step()
        tracker.update_(model)
    return model, tracker, optimizer


def snapshot_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    trainable = {
        f"trainable {name}": torch.tensor(p.requires_grad) for name, p in model.named_parameters()
    }
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    state |= {
        f"grad {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    state |= {f"buffer {name}": tensor.clone() for name, tensor in model.named_buffers()}
    return {f"{name} {tensor.dtype}": tensor for name, tensor in state.items()} | trainable


Run = tuple[Network, PostHocEMA]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model after 20 steps and its tracker; tests must not change them."""
    model, tracker, _ = trained(tmp_path_factory.mktemp("run"), 20)
    tracker.flush()
    return model, tracker


def test_parameters_and_statistics_are_averaged_counts_copied_tied_tensors_stored_once(
    run: Run,
) -> None:
    _, tracker = run
    info = tracker.run.snapshots[-1]
    assert {name: tensor.role for name, tensor in info.tensors.items()} == {
        **dict.fromkeys(("embed.weight", "norm.weight", "norm.bias"), "average"),
        **dict.fromkeys(("norm.running_mean", "norm.running_var"), "statistic"),
        "norm.num_batches_tracked": "copy",
    }
    assert info.aliases == {"head.weight": "embed.weight"}
    assert set(info.left_out) == {"frozen.weight", "frozen.bias"}
    weights = tracker.state_dict(sigma_rel=0.28)
    assert tracker.run.tensors.keys() == weights.keys()
    assert torch.equal(weights["head.weight"], weights["embed.weight"])
    assert torch.equal(weights["norm.num_batches_tracked"], torch.tensor(20))
    missing = Network().load_state_dict(weights, strict=False)
    assert (set(missing.missing_keys), missing.unexpected_keys) == (
        {"frozen.weight", "frozen.bias"},
        [],
    )


def test_the_state_dict_is_a_dict_a_context_and_pickles_plainly(run: Run, tmp_path: Path) -> None:
    model, tracker = run
    before = snapshot_of(model)
    with tracker.state_dict(sigma_rel=0.15) as weights:
        assert isinstance(weights, dict)
    assert type(pickle.loads(pickle.dumps(weights))) is OrderedDict
    torch.save(weights, tmp_path / "w.pt")
    loaded = torch.load(tmp_path / "w.pt", weights_only=True)
    assert type(loaded) is OrderedDict
    assert list(loaded) == list(weights)
    for tensor in weights.values():
        tensor.zero_()  # shares memory neither with the model nor with the averages
    assert_same_tensors(snapshot_of(model), before)
    assert_same_tensors(tracker.state_dict(sigma_rel=0.15), loaded)


def test_an_average_at_an_earlier_time_uses_only_snapshots_until_then(
    run: Run,
    tmp_path: Path,
) -> None:
    _, tracker = run
    _, early, _ = trained(tmp_path, steps=10)
    for when in ({"t": 10}, {"step": 10}):
        assert_same_tensors(
            tracker.state_dict(sigma_rel=0.28, **when), early.state_dict(sigma_rel=0.28)
        )


BAD: list[tuple[dict, str]] = [
    *(({"sigma_rel": sigma_rel}, "must") for sigma_rel in ("abc", [0.1], 0.4)),
    *(({"t": t}, "t ") for t in ("10", 4, 21)),
    *(({"step": step}, "step ") for step in ("5", 5.5, 4, 21)),
    *(
        ({"t": 10, "step": 10}, "t and step"),
        ({"dtype": "int8"}, "must"),
        ({"method": "magic"}, "must"),
    ),
]


def test_bad_arguments_are_value_errors(run: Run) -> None:
    for wrong, message in BAD:
        with pytest.raises(ValueError, match=message):
            run[1].state_dict(**{"sigma_rel": 0.1, **wrong})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_have_the_parameters_dtype_by_default(tmp_path: Path, dtype: torch.dtype) -> None:
    model = torch.nn.Linear(3, 3, dtype=dtype)
    tracker = PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1)
    tracker.update_(model)
    for source in (tracker, PostHocEMA.from_path(tmp_path)):
        for asked, expected in (
            (None, dtype),
            (torch.float64, torch.float64),
            ("bf16", torch.bfloat16),
        ):
            assert source.state_dict(sigma_rel=0.28, dtype=asked)["weight"].dtype == expected


def test_a_buffer_with_nan_is_copied_and_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, tracker, _ = trained(tmp_path, steps=4, buffers="copy")
    model.norm.running_mean.fill_(float("nan"))
    tracker.update_(model)
    tracker.flush()
    assert "tensor 'norm.running_mean' holds nan" in caplog.text
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(ModelMismatchError, match=r"'head\.weight'"):  # no longer tied
        tracker.update_(model)


class BodyError(Exception):
    pass


def train(model: torch.nn.Module) -> None:
    model.train()
    model(torch.randint(0, 7, (8, 3)))  # moves the batch statistics
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(1)


def fail(_: torch.nn.Module) -> None:
    raise BodyError


BODIES: dict[str, Callable[[torch.nn.Module], object]] = {
    "use": lambda model: model(torch.randint(0, 7, (8, 3))),
    "infer": lambda model: model,
    "train": train,
    "fail": fail,
    "move": lambda model: model.to("meta"),
    "narrow": lambda model: model.half(),
    "freeze": lambda model: model.requires_grad_(False),
    "fuse": lambda model: model.head.register_parameter("bias", torch.nn.Parameter(torch.ones(7))),
}


@pytest.mark.parametrize("body", BODIES)
def test_the_end_of_a_block_restores_everything(tmp_path: Path, body: str) -> None:
    """Also within inference mode, after which the model still trains."""
    model, tracker, optimizer = trained(tmp_path)
    model.train()
    model.norm.eval()
    before = snapshot_of(model)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    identities = [id(p) for p in model.parameters()]
    with (
        torch.inference_mode(body == "infer"),
        suppress(BodyError),
        tracker.model(model, sigma_rel=0.15) as averaged,
    ):
        assert averaged is model
        assert not any(module.training for module in model.modules())
        expected = tracker.state_dict(sigma_rel=0.15)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in expected:
                assert torch.equal(parameter, expected[name])
        BODIES[body](model)
    assert_same_tensors(snapshot_of(model), before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [id(p) for p in model.parameters()] == identities
    assert model.head.weight is model.embed.weight
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    model(torch.randint(0, 7, (8, 3))).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_whose_elements_share_memory_are_allowed(tmp_path: Path, persistent: bool) -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer(
        "wide", torch.full((1,), 0.0 if persistent else torch.nan).expand(4), persistent=persistent
    )
    model.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=False)
    tracker = PostHocEMA.from_model(model, tmp_path, update_every=1)
    tracker.update_(model)
    with tracker.model(model, sigma_rel=0.28):
        pass
    assert model.training
    assert model.wide.stride() == (0,)
    model.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(InvalidValueError, match="'table': is torch"):
        PostHocEMA.from_model(model, tmp_path)


def test_the_constructor_names_the_two_ways_to_make_a_tracker(tmp_path: Path) -> None:
    for arguments in ((Network(),), (Network(), tmp_path), ()):
        with pytest.raises(
            InvalidValueError,
            match=r"from_model\(model, checkpoint_dir, .*from_path\(checkpoint_dir\)",
        ):
            PostHocEMA(*arguments, sigma_rels=(0.05, 0.28))


OTHERS: list[tuple[Callable[[], torch.nn.Module], type[PostHocError], str]] = [
    (lambda: torch.nn.Linear(4, 7), ModelMismatchError, "the model has no such tensor"),
    (
        lambda: torch.nn.ModuleDict({"embed": torch.nn.Embedding(3, 3)}),
        ModelMismatchError,
        "'embed.weight': has the",
    ),
    (
        lambda: Network().to("meta"),
        InvalidValueError,
        r"'embed\.weight': is on the meta device .*assign=True",
    ),
]


@pytest.mark.parametrize(("make", "kind", "message"), OTHERS)
def test_a_model_that_cannot_hold_the_average_is_refused_and_not_changed(
    run: Run,
    make: Callable[[], torch.nn.Module],
    kind: type[PostHocError],
    message: str,
) -> None:
    _, tracker = run
    other = make()
    before = snapshot_of(other)
    for call in (
        lambda: tracker.model(other, sigma_rel=0.15).__enter__(),
        lambda: tracker.load_into(other, 0.15),
        lambda: PostHocEMA.from_path(tracker.checkpoint_dir).load_into(other, 0.15),
    ):
        with pytest.raises(kind, match=message):
            call()
    if "meta" not in message:
        assert_same_tensors(snapshot_of(other), before)
    with torch.inference_mode():
        read_only = Network()
    with pytest.raises(InvalidValueError, match="was made in inference mode"):
        tracker.model(read_only, sigma_rel=0.15).__enter__()


REFUSING = {
    "all": {"all", "0", "1", "2"},
    "0": {"all", "0", "2"},  # 2 has the same parameter
    "1": {"all", "1"},
}
"""The trackers that refuse an update, by the part of the model that holds averaged weights."""


@pytest.mark.parametrize("swapped", REFUSING)
def test_no_tracker_of_a_part_or_all_of_a_model_takes_averaged_weights_as_an_update(
    tmp_path: Path,
    swapped: str,
) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    model[2].weight = model[0].weight  # tied
    modules = {"all": model, "0": model[0], "1": model[1], "2": model[2]}
    trackers = {
        name: PostHocEMA.from_model(m, tmp_path / name, update_every=1)
        for name, m in modules.items()
    }
    for name, module in modules.items():
        trackers[name].update_(module)
    refusing = set()
    with trackers[swapped].model(modules[swapped], sigma_rel=0.28):
        if swapped == "1":  # the module is recognised even after its parameter was replaced
            model[1].weight = torch.nn.Parameter(model[1].weight.detach().clone())
        for name, module in modules.items():
            try:
                trackers[name].update_(module)
            except NotReadyError as error:
                assert "holds averaged weights" in str(error)
                refusing.add(name)
    assert refusing == REFUSING[swapped]
    for name, module in modules.items():
        trackers[name].update_(module)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator_the_swap_takes_no_second_copy(tmp_path: Path) -> None:
    model = torch.nn.Linear(4096, 4096, device="cuda")
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1) as tracker:
        tracker.update_(model)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with tracker.model(model, sigma_rel=0.15):
            assert next(model.parameters()).is_cuda
        assert torch.cuda.max_memory_allocated() - before < 0.1 * 4096 * 4096 * 4
