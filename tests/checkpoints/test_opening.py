"""Checkpoints of other programs as runs: what is found, and that averages are those of the weights
in them."""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_layouts import LAYOUTS, STEPS, check_average, distributed, filled
from factories import contents
from groups import Net, check_group, move
from safetensors.torch import save_file
from saved import read, store
from torch import nn

from posthoc_cli import Mean, Run, import_checkpoints
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    MismatchError,
    NonFiniteError,
    PostHocError,
    VanishedError,
)
from posthoc_cli.profiles import Point

Write = Callable[[str], Path]
Imported = Callable[..., Run]


def steps_of(run: Run) -> list[int]:
    return [source.step for source in run.sources]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_a_run(layout, write, weights):
    run = Run(write(layout))
    assert [source.profile for source in run.sources] == [Point(float(step)) for step in STEPS]
    assert repr(run).endswith("4 checkpoints up to 200 steps)")
    check_average(run, weights, strip="net." if layout == "lightning" else "")
    described = run.info()
    assert described["kind"] == "checkpoints"
    assert [one["t"] for one in described["checkpoints"]] == list(STEPS)
    assert described["averaged"] == 6
    assert described["copied"] == 3


@pytest.mark.parametrize("layout", ["safetensors", "transformers", "distributed", "chunks"])
def test_an_import_is_the_same_run_and_leaves_the_files_as_they_were(layout, write, tmp_path):
    folder = write(layout)
    run = Run(folder)
    before = contents(tmp_path)
    import_checkpoints(folder, tmp_path / "new")
    after = contents(tmp_path)
    manifest = after.pop("new/ema-import.json")
    assert len(manifest) < 10_000
    assert after == before
    new = Run(tmp_path / "new")
    assert new.sources == run.sources
    assert new.info()["refers_to"] == str(folder)


def test_a_glob_names_some_checkpoints(write):
    folder = write("transformers")
    assert Run(folder / "checkpoint-*0").step == 200
    assert steps_of(Run(folder / "checkpoint-[12]00")) == [100, 200]
    with pytest.raises(DirectoryError, match="no file or folder has such a name"):
        _ = Run(folder / "other-*").sources


def test_steps_come_from_the_metadata_of_trainers_of_lora(tmp_path):
    filled(tmp_path, 9, 100)
    metadata = {"ss_steps": "55", "ss_epoch": "1"}
    save_file({"w": torch.ones(3)}, tmp_path / "lora-000001.safetensors", metadata)
    assert steps_of(Run(tmp_path)) == [9, 55, 100]


EITHER = r"(?:step|x-)(\d+)"
"""A pattern of the step in either name."""


def test_two_files_of_one_step_are_of_two_models(tmp_path, imported):
    filled(tmp_path, 9, 10)
    save_file({"w": torch.tensor([9.0, 9, 2])}, tmp_path / "x-9.safetensors")
    with pytest.raises(MismatchError, match=r"step9.pt and .*: are both of step 9"):
        imported(tmp_path, step_from=EITHER)


@pytest.mark.parametrize("weights", [[9.0, 9, 9], [9.0, 9]])
def test_a_copy_or_another_model_of_one_step_is_left_out(weights, tmp_path, imported):
    filled(tmp_path, 9, 10)
    save_file({"w": torch.tensor(weights)}, tmp_path / "x-9.safetensors")
    assert steps_of(imported(tmp_path, step_from=EITHER)) == [9, 10]


def test_a_file_can_be_described_without_its_step(tmp_path):
    torch.save({"w": torch.ones(3, 2)}, tmp_path / "best.pt")
    described = Run(tmp_path / "best.pt").info()
    assert described["kind"] == "checkpoint"
    assert described["tensors"] == 1
    assert described["parameters"] == 6


def save_with_step(file: Path, step: object) -> None:
    torch.save({"model": {"w": torch.ones(3)}, "step": step}, file)


@pytest.mark.parametrize("step", ["9" * 400, "²", 0])
def test_the_name_tells_a_step_that_is_another_text_or_0(step, tmp_path):
    save_with_step(tmp_path / "run7.pt", step)
    assert Run(tmp_path).step == 7


INFINITE = torch.tensor(float("inf"))


@pytest.mark.parametrize("step", [0.5, 10**400, float("inf"), INFINITE, 10**16], ids=range(5))
def test_a_step_that_is_none_is_one_line(step, tmp_path):
    save_with_step(tmp_path / "run7.pt", step)
    reason = r"run7.pt: its step is .*; must be a whole number up to"
    with pytest.raises(InvalidValueError, match=reason):
        _ = Run(tmp_path).sources


ONES = torch.ones(3)
COUNTED = {"decay": 0.9, "num_updates": 10**12, "shadow_params": [ONES]}


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        (
            "0.999999999999.pt",
            {"w": ONES, "initted": torch.tensor(True)},
            {"sigma_rels": (0.05,), "update_every": 1, "update_after_step": 1},
        ),
        ("ordinary.pt", {"model": {"a": ONES}, "ema": COUNTED, "step": 10**12}, {}),
    ],
    ids=["of a name", "of a count"],
)
def test_a_far_step_costs_no_memory(name, content, settings, tmp_path):
    torch.save(content, tmp_path / name)
    with pytest.raises(InvalidValueError, match="makes more than 20,000,000 updates"):
        read(tmp_path / name, **settings)


def test_outputs_in_a_folder_of_checkpoints_are_none(tmp_path):
    """A command can be repeated although its output exists."""
    run = Run(filled(tmp_path, 1, 2))
    for _ in range(2):
        run.write(0.2, tmp_path / "average-3.safetensors", overwrite=True)
        run.write(0.2, tmp_path / "averages", overwrite=True, layout="sharded")
        described = Run(tmp_path).info()["checkpoints"]
        assert [one["file"] for one in described] == ["step1.pt", "step2.pt"]
    assert Run(tmp_path / "*[0-9].*").step == 2
    with pytest.raises(DirectoryError, match="holds no checkpoints"):
        _ = Run(tmp_path / "average-*").sources


STRIDED = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)


@pytest.fixture
def choice(tmp_path: Path) -> Path:
    """Return a folder of checkpoints of two modules, of which one has tied tensors."""
    for step in (1, 2):
        tied = torch.full((4,), float(step))
        state = {
            "model.a": tied,
            "model.b": tied,
            "model.c": STRIDED * step,
            "loss.w": torch.ones(2),
        }
        content = {"state_dict": state, "hyper": {"lr": 0.1}}
        torch.save(content, tmp_path / f"step{step}.ckpt")
    return tmp_path


def test_tensors_can_be_chosen_by_a_prefix(choice, imported):
    assert set(Run(choice).tensors) == {"model.a", "model.b", "model.c", "loss.w"}
    run = imported(choice, prefix="model.")
    assert set(run.tensors) == {"a", "b", "c"}
    assert run.sources[0].aliases == {"b": "a"}
    assert torch.equal(run.average(0.2, t=1)["c"], STRIDED)
    other = imported(choice, prefix="state_dict.loss.")
    assert set(other.tensors) == {"w"}


def test_tensors_can_be_chosen_by_patterns(choice, imported):
    run = imported(choice, include="model.*", exclude=["*.b"])
    assert set(run.tensors) == {"model.a", "model.c"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"include": "x.*"}, r"include 'x\.\*': matches no tensor"),
        ({"exclude": "*"}, "include and exclude: leave no tensor"),
        ({"prefix": "x."}, r"name begins with 'x\.'; it has 'state_dict.model.a'"),
    ],
)
def test_a_choice_of_no_tensor_is_refused(settings, reason, choice, imported):
    with pytest.raises(PostHocError, match=reason):
        imported(choice, **settings)


TWO = torch.ones(2)
SPARSE = {"state_dict": {"s": TWO.to_sparse()}, "x": TWO}
COMPLEX = {"state_dict": {"c": TWO.to(torch.complex128)}}
TWO_MODELS = {"actor": {"w": TWO}, "critic": {"w": TWO}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (SPARSE, r"tensor 'state_dict\.s': is of a kind that is not read \('sparse_t"),
        (COMPLEX, "of ComplexDoubleStorage, which is not read"),
        (TWO_MODELS, "it has tensors under 'actor', 'critic'"),
    ],
    ids=["sparse", "complex", "two models"],
)
def test_tensors_that_are_not_read_are_named(content, reason, tmp_path):
    torch.save(content, tmp_path / "step3.ckpt")
    with pytest.raises(FileFormatError, match=reason):
        _ = Run(tmp_path).tensors


class AmbiguousNames(torch.nn.Module):
    """A module whose parts have names that checkpoints use for something else."""

    def __init__(self, fill: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.head = nn.ModuleDict({"x": nn.Linear(2, 1)})
        self.scale = nn.Parameter(torch.tensor([float(fill)]))
        self.register_buffer("table", torch.ones(3), persistent=False)


def trainer_state(step: int) -> dict[str, Any]:
    """Return the state of a trainer, as Composer and torch's own tutorial store it."""
    weights = torch.full((3,), float(step))
    adam = {"Adam": {"state": {"w": {"exp_avg": torch.ones(3)}}}}
    return {"model": {"w": weights}, "optimizers": adam}


def test_a_module_is_read(tmp_path):
    module = AmbiguousNames(1)
    torch.save(module, tmp_path / "step1.pt")
    content = {"epoch": 9, "model": AmbiguousNames(2), "optimizer": {"a": 1}}
    torch.save(content, tmp_path / "step2.pt")
    made = Run(tmp_path).average("last:2")
    assert made.keys() == module.state_dict().keys()
    assert made["scale"] == 1.5


def test_a_traced_module_is_read(tmp_path):
    traced = torch.fx.symbolic_trace(nn.Linear(2, 1))
    torch.save(traced, tmp_path / "step1.pt")
    assert Run(tmp_path).tensors.keys() == {"weight", "bias"}


def test_the_model_is_found_in_the_state_of_a_trainer(tmp_path):
    content = {"state": trainer_state(1), "rng": [{"cuda": torch.ones(5)}]}
    torch.save(content, tmp_path / "step1.pt")
    distributed(tmp_path / "step-2", {"app": trainer_state(2)})
    assert Run(tmp_path / "*").average("last:2")["w"].tolist() == [1.5] * 3


class Keyed:
    """A class with keyword arguments, whose old pickles call the result of a call."""

    def __new__(cls, *_: int, **__: int) -> Keyed:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple[tuple[int, ...], dict[str, int]]:
        return (1,), {"k": 2}


class Listed(list[int]):
    """A subclass of list."""


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_objects_of_any_class_may_accompany_the_weights(protocol, tmp_path):
    """Pickles have frames (protocol 4) and bytes outside of frames (over 64 KiB)."""
    objects = [
        Keyed(),
        Listed([1, 2]),
        Pair(1, Keyed()),
        deque([1]),
        defaultdict(int, {1: 2}),
        OrderedDict(a=1),
        Counter("aab"),
        {1, 2},
        frozenset([3]),
        datetime.now(),
        Path("x"),
        np.arange(3),
        np.float64(2),
        bytearray(3),
        b"x" * 99,
        10**30,
        range(3),
        complex(1, 2),
        torch.float16,
        torch.device("cpu"),
        torch.Size([2]),
        print,
        Keyed,
        "\u20ac\n",
        None,
        b"x" * 100_000,
        np.arange(50_000),
        "\u20ac" * 50_000,
    ]
    model = {
        "w": torch.arange(5.0),
        "v": torch.ones(2, 2)[1],
        "n": torch.tensor([1, 2], dtype=torch.uint16),
    }
    content = {"args": objects, "step": 7, "state_dict": model}
    file = tmp_path / "x.pt"
    torch.save(content, file, pickle_protocol=protocol)
    check_model(file)
    if protocol > 2:  # before, a pickle has bytes as text
        file.write_bytes(pickle.dumps(content, protocol))
        check_model(file)


def check_model(file: Path) -> None:
    run = Run(file)
    assert run.step == 7
    made = run.average(0.2)
    assert made.keys() == {"w", "v", "n"}
    assert made["w"].tolist() == [*range(5)]
    assert made["v"].tolist() == [1, 1]
    assert made["n"].tolist() == [1, 2]


WIDE = torch.ones(2, 3)
DIFFERENCES = [
    ({"a": WIDE}, {"a": WIDE, "b": WIDE + 1}, "tensor 'b' is missing in step1.pt"),
    ({"a": WIDE}, {"a": WIDE.T}, r"tensor 'a' has the shapes \[2, 3\] and \[3, 2\]"),
    ({"a": WIDE}, {"a": WIDE.long()}, "tensor 'a' is average of F32 and copy of I64"),
    ({"a": WIDE, "b": WIDE}, {"a": WIDE, "b": WIDE + 1}, "they tie different names together"),
]


@pytest.mark.parametrize(("first", "second", "difference"), DIFFERENCES)
def test_two_models_never_mix(first, second, difference, tmp_path):
    for step, tensors in enumerate((first, second), 1):
        torch.save(tensors, tmp_path / f"step{step}.pt")
    with pytest.raises(MismatchError, match=f"step1.pt and .*step2.pt.* {difference}"):
        _ = Run(tmp_path).sources


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "_orig_mod."),
        ("module.", ""),
        ("_orig_mod.", "module._orig_mod."),
        ("0.", "0._checkpoint_wrapped_module."),
    ],
)
def test_names_are_those_of_the_newest_if_a_resume_has_wrapped_the_model(before, after, tmp_path):
    prefixes = {8: before, 9: before, 10: after}
    for step, prefix in prefixes.items():
        state = {
            f"{prefix}w": torch.full((3,), float(step)),
            f"{prefix}b": torch.ones(3),
        }
        torch.save({"model": state}, tmp_path / f"step{step}.pt")
    run = tmp_path / "run"
    import_checkpoints(tmp_path, run)
    for place in (tmp_path, run):
        made = Run(place).average("last:3")
        assert made.keys() == {f"{after}w", f"{after}b"}
        assert made[f"{after}w"].tolist() == [9] * 3


def test_dtypes_may_differ(tmp_path):
    torch.save({"a": WIDE}, tmp_path / "step1.pt")
    torch.save({"a": WIDE.half()}, tmp_path / "step2.pt")
    made = Run(tmp_path / "step*").average(0.2)
    assert made["a"].dtype == torch.float16


def test_a_file_that_changes_or_shrinks_is_an_error(tmp_path):
    run = Run(filled(tmp_path, 1, 2, 3, size=1000))
    source = run.sources[0]
    path = tmp_path / "step1.pt"
    torch.save({"w": torch.full((1000,), 7.0)}, path)
    with pytest.raises(FileFormatError, match="was replaced while it was being used"), source:
        pass
    source = run.sources[0]
    with pytest.raises(FileFormatError, match="was changed while it was being read"), source:
        path.write_bytes(path.read_bytes())
    source = run.sources[0]
    with pytest.raises(FileFormatError, match="became shorter while it was read"), source:
        os.truncate(path, 3000)
        source.tensor("w")
    path.unlink()
    with pytest.raises(VanishedError), source:
        pass
    assert steps_of(run) == [2, 3]


def test_a_checkpoint_has_the_name_of_its_folder_and_file(tmp_path):
    for step in (10, 20):
        store(tmp_path / f"step{step}" / "model.safetensors", {"a": torch.ones(3)})
    run = Run(tmp_path / "step*" / "model.safetensors")
    names = [source.name for source in run.sources]
    assert names == ["step10/model.safetensors", "step20/model.safetensors"]


def test_an_average_in_a_checkpoint_has_a_name_of_its_own(tmp_path):
    for step in (10, 20):
        content = {
            "a": torch.full((3,), float(step)),
            "ema_optimizer": {"state.a.ema_params": torch.zeros(3)},
        }
        distributed(tmp_path / f"iter-{step}", content)
    run = Run(tmp_path / "iter-*")
    names = [source.name for source in run.sources]
    assert names == ["iter-10", "iter-10 (average)", "iter-20", "iter-20 (average)"]
    assert run.average("last:2")["a"].tolist() == [15.0] * 3


def test_the_file_of_a_nan_is_named_wherever_it_is(tmp_path):
    """The file is named even if no sample has the element."""
    ones = torch.ones(1_200_000)
    with_nan = ones.clone()
    with_nan[3] = math.nan
    first = {"v": 1 * ones, "w": with_nan, "x": 3 * ones}
    second = {"v": 4 * ones, "w": 5 * ones, "x": 6 * ones}
    save_file(first, tmp_path / "step1.safetensors")
    save_file(second, tmp_path / "step2.safetensors")
    reason = r"step1.safetensors: tensor 'w': holds nan or infinity"
    with pytest.raises(NonFiniteError, match=reason):
        Run(tmp_path).average(0.2)


# --- steps in names: plain digits are read, numbers that may mean something else are refused

READ = {
    "checkpoint-500": 500,
    "global_step1000": 1000,
    "iter_0005000": 5000,
    "s400": 400,
    "epoch=3-step=1500-v1": 1500,
    "step_1000_loss_0.25": 1000,
    "model-7b-step-1000": 1000,
    "ckpt_5": 5,
    "ddpm-timesteps-1000-ckpt-500": 500,
    "checkpoint-5-step-1000": 1000,
    "1000_steps": 1000,
    "step-20240105": 20240105,
    "run-2024-01-05-step-7": 7,
}
"""Names with a step."""

REFUSED = {
    "step_1_000": "'1_000' may be something else",
    "1_000_steps": "'1_000' may",
    "step-1.5k": "'1.5' may",
    "step-1,000": "'1,000' may",
    "v1.5": "'v1.5' may",
    "model-fp16": "'fp16' may",
    "100kimg": "'100kimg' may",
    "model-1M-steps": "'1M' may",
    "step_1e5": "'1e' may",
    "llama-7B": "'7B' may",
    "checkpoint-7b": "'7b' may",
    "20240105": "'20240105' may be a date",
    "checkpoint-20240105": "'20240105' may be a date",
    "checkpoint-2024-01-05": "'2024-01-05' may",
    "llama-1B-600k": "or several",
    "00010-of-00020": "or several",
    "step²": "it has no number, or several",
}
"""Names that may mean something else, and parts of their errors."""


def save_step(folder: Path, *names: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        weights = torch.full((3,), float(number))
        save_file({"w": weights}, folder / f"{name}.safetensors")
    return Run(folder)


@pytest.mark.parametrize("name", READ)
def test_a_name_tells_its_step(tmp_path, name):
    run = save_step(tmp_path, name)
    assert run.step == READ[name]


@pytest.mark.parametrize("name", ["checkpoint-500", "s400", "step-20240105"])
def test_the_name_of_a_folder_tells_its_step(tmp_path, name):
    save_step(tmp_path / name, "model")
    assert Run(tmp_path).step == READ[name]


@pytest.mark.parametrize("name", ["checkpoint-500", "iter_0005000", "step-20240105", "ckpt_5"])
def test_the_name_of_the_folder_of_a_lone_file_does_so_by_a_word_for_steps(tmp_path, name):
    save_step(tmp_path / name, "model")
    assert Run(tmp_path / name / "model.safetensors").step == READ[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_may_mean_something_else_is_refused(tmp_path, name):
    reason = f"{name}.safetensors: .*{REFUSED[name]}.*import with `step_from`"
    with pytest.raises(InvalidValueError, match=reason):
        _ = save_step(tmp_path, name).step


def test_a_number_of_another_folder_is_no_step(tmp_path):
    run = save_step(tmp_path / "exp2024", "best")
    reason = r"best.safetensors: neither .* import with `step_from`"
    with pytest.raises(InvalidValueError, match=reason):
        _ = run.step


def test_a_number_without_a_word_is_left_out_next_to_those_with_a_word(tmp_path, caplog):
    run = save_step(tmp_path, "step100", "step200", "best-2")
    assert steps_of(run) == [100, 200]
    assert "left out: best-2.safetensors (another kind of number)" in caplog.text


def test_a_pattern_finds_numbers_as_people_write_them(tmp_path, imported):
    """The remedy for every name that is refused."""
    save_step(tmp_path, "step_1_000", "step_2_000", "step_3.5k", "step_4,000")
    run = imported(tmp_path, step_from=r"step_([\d._,k]+)\.")
    assert steps_of(run) == [1000, 2000, 3500, 4000]


@pytest.mark.parametrize("pattern", [r"step(_1_000)", r"(st)ep"])
def test_a_pattern_that_finds_no_number_is_refused(pattern, tmp_path, imported):
    save_step(tmp_path, "step_1_000", "step_2_000")
    with pytest.raises(InvalidValueError, match="finds no number in"):
        imported(tmp_path, step_from=pattern)


# --- checkpoints that a group of processes wrote in chunks

TRAIN = """
import warnings
import torch
import torch.distributed.checkpoint as dcp
warnings.simplefilter("ignore")
model = groups.spread(groups.Net(), arguments[0])
for step in range(1, 4):
    groups.move(model, step)
    state, out = dict(model.state_dict()), str(folder / "run" / f"step-{step}")
    if arguments[1] == "own":
        dcp.save({"model": state, "optimizer": {"x": torch.ones(3)}}, checkpoint_id=out)
    else:
        writer = dcp.HuggingFaceStorageWriter(out, save_distributed=True)
        dcp.save(state, storage_writer=writer)
"""


@pytest.mark.parametrize(
    ("kind", "ranks", "writer"),
    [
        ("fsdp", 2, "own"),
        ("fsdp-tp", 4, "safetensors"),
    ],
)
def test_chunks_of_processes_make_the_tensors(kind, ranks, writer, tmp_path):
    (tmp_path / "run").mkdir()
    check_group(TRAIN, ranks, tmp_path, kind, writer)
    run = Run(tmp_path / "run")
    single = Net()
    states = {}
    for step in range(1, 4):
        move(single, step)
        states[step] = copy.deepcopy(single.state_dict())
    check_average(run, states, 0.25, exact=1e-6)
    last = run.average(Mean(1))
    for name, value in single.state_dict().items():
        assert torch.equal(last[name], value)
