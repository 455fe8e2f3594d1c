"""Checkpoints of other programs as runs: what is found, and that averages are those of the weights
in them."""

import copy
import os
import pickle
from collections import defaultdict, namedtuple

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, heavy, refused
from checkpoint_layouts import LAYOUTS, STEPS, check_average, distributed, filled
from factories import contents
from groups import Net, check_group, move
from safetensors.torch import load_file
from saved import asked, exported, read, store, times
from torch import nn

from posthoc_cli import Run, export_file, import_checkpoints
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    MismatchError,
    NonFiniteError,
    VanishedError,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_a_run(layout, write, weights):
    run = Run(write(layout))
    assert [source.t for source in run.sources] == [*STEPS]
    assert {source.holds for source in run.sources} == {"weights"}
    assert repr(run).endswith("4 checkpoints up to 200 steps)")
    check_average(run, weights, strip="net." if layout == "lightning" else "")
    described = run.info()
    assert described["kind"] == "checkpoints"
    assert [one["t"] for one in described["checkpoints"]] == list(STEPS)
    assert described["averaged"] == 6
    assert described["copied"] == 3


def test_an_import_is_the_same_run_and_leaves_the_files_as_they_were(write, tmp_path):
    folder = write("distributed")
    run = Run(folder)
    before = contents(tmp_path)
    import_checkpoints(folder, tmp_path / "new")
    after = contents(tmp_path)
    manifest = after.pop("new/ema-import.json")
    assert len(manifest) < 10_000
    assert after == before
    assert Run(tmp_path / "new").sources == run.sources


def test_a_glob_names_some_checkpoints(write):
    folder = write("transformers")
    assert Run(folder / "checkpoint-*0").step == 200
    assert times(folder / "checkpoint-[12]00") == [100, 200]
    with refused(folder / "other-*", kind=DirectoryError):
        _ = Run(folder / "other-*").sources


def test_a_file_can_be_described_without_its_step(tmp_path):
    store(tmp_path / "best.pt", {"w": torch.ones(3, 2)})
    described = Run(tmp_path / "best.pt").info()
    assert described["kind"] == "checkpoint"
    assert described["tensors"] == 1
    assert described["parameters"] == 6


@pytest.mark.parametrize("step", ["9" * 400, "²", 0])
def test_a_step_that_is_no_positive_number_gives_way_to_the_name(step, tmp_path):
    store(
        tmp_path / "run7.pt",
        {
            "w": torch.ones(3),
            "step": step,
        },
    )
    assert Run(tmp_path).step == 7


def test_a_far_step_costs_no_memory(tmp_path):
    content = {
        "w": torch.ones(3),
        "initted": torch.tensor(True),
    }
    store(tmp_path / "0.999999999999.pt", content)
    settings = {
        "sigma_rels": (0.05,),
        "update_every": 1,
        "update_after_step": 1,
    }
    assert "20,000,000" in asked(tmp_path, **settings)


@pytest.fixture
def choice(tmp_path):
    """Return a checkpoint of two modules, of which one has tied tensors."""
    tied = torch.ones(4)
    state = {
        "model.a": tied,
        "model.b": tied,
        "model.c": torch.ones(3),
        "loss.w": torch.ones(2),
    }
    file = tmp_path / "step1.ckpt"
    torch.save({"state_dict": state}, file)
    return file


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"model.a", "model.b", "model.c", "loss.w"}),
        ({"weights": "state_dict.model"}, {"a", "b", "c"}),
        ({"include": "model.*", "exclude": ["*.b"]}, {"model.a", "model.c"}),
    ],
)
def test_tensors_can_be_chosen(settings, names, choice):
    (source,) = read(choice, **settings).checkpoints
    assert source.entries.keys() | source.aliases.keys() == names


@pytest.mark.parametrize(
    ("settings", "subject"),
    [
        ({"include": "x.*"}, "include 'x.*'"),
        ({"exclude": "*"}, "include and exclude"),
    ],
)
def test_a_choice_of_no_tensor_is_refused(settings, subject, choice):
    with refused(subject):
        read(choice, **settings)


@pytest.mark.parametrize("last", [2, 5])
def test_a_tensor_that_came_later_can_be_left_out(last, tmp_path):
    """The error about it names `exclude`, which was refused as it matched no name of a file."""
    for step in range(1, 6):
        state = {"body": torch.full((3,), float(step))}
        if step >= last:
            state["head"] = torch.ones(2)
        torch.save(state, tmp_path / f"step{step}.pt")
    assert times(tmp_path, exclude="head") == [1, 2, 3, 4, 5]


class AmbiguousNames(torch.nn.Module):
    """A module whose parts have names that checkpoints use for something else."""

    def __init__(self, fill):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.head = nn.ModuleDict({"x": nn.Linear(2, 1)})
        self.scale = nn.Parameter(torch.tensor([float(fill)]))
        self.register_buffer("table", torch.ones(3), persistent=False)


def test_a_module_is_read(tmp_path):
    module = AmbiguousNames(1)
    torch.save(module, tmp_path / "step1.pt")
    torch.save({"epoch": 9, "model": AmbiguousNames(2)}, tmp_path / "step2.pt")
    made = Run(tmp_path).average("last:2")
    assert made.keys() == module.state_dict().keys()
    assert made["scale"] == 1.5


def test_a_traced_module_is_read(tmp_path):
    traced = torch.fx.symbolic_trace(nn.Linear(2, 1))
    torch.save(traced, tmp_path / "step1.pt")
    assert Run(tmp_path).tensors.keys() == {"weight", "bias"}


def test_the_model_is_found_in_the_state_of_a_trainer(tmp_path):
    """As torch's own tutorial stores it."""
    adam = {"Adam": {"state": {"w": {"exp_avg": torch.ones(3)}}}}
    state = {
        "model": {"w": torch.ones(3)},
        "optimizers": adam,
    }
    distributed(tmp_path / "step-2", {"app": state, "rng": [{"cuda": torch.ones(5)}]})
    assert set(Run(tmp_path).tensors) == {"w"}


class Keyed:
    """A class with keyword arguments, whose old pickles call the result of a call."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
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
        defaultdict(int, {1: 2}),
        {1, 2},
        frozenset([3]),
        np.arange(3),
        np.float64(2),
        bytearray(3),
        10**30,
        torch.float16,
        print,
        Keyed,
        b"x" * 100_000,
        "\u20ac" * 50_000,
    ]
    model = {
        "w": torch.arange(6.0).view(2, 3).T,
        "v": torch.ones(2, 2)[1],
        "n": torch.tensor([1, 2], dtype=torch.uint16),
    }
    content = {
        "args": objects,
        "step": 7,
        "state_dict": model,
    }
    file = tmp_path / "x.pt"
    torch.save(content, file, pickle_protocol=protocol)
    check_model(file, model)
    if protocol > 2:  # before, a pickle has bytes as text
        file.write_bytes(pickle.dumps(content, protocol))
        check_model(file, model)


def check_model(file, model):
    assert Run(file).step == 7
    assert_same_tensors(exported(file, raw=True), model)


WIDE = torch.ones(2, 3)
DIFFERENCES = [
    ({"a": WIDE}, {"a": WIDE, "b": WIDE + 1}, "'b'"),
    ({"a": WIDE}, {"a": WIDE.T}, "'a' has the shapes [2, 3] and [3, 2]"),
    ({"a": WIDE}, {"a": WIDE.long()}, "I64"),
    ({"a": WIDE, "b": WIDE}, {"a": WIDE, "b": WIDE + 1}, "tie"),
]


@pytest.mark.parametrize(("first", "second", "difference"), DIFFERENCES)
def test_two_models_never_mix(first, second, difference, tmp_path):
    for step, tensors in enumerate((first, second), 1):
        torch.save(tensors, tmp_path / f"step{step}.pt")
    both = f"{tmp_path}/step1.pt and {tmp_path}/step2.pt"
    with refused(both, difference, kind=MismatchError):
        read(tmp_path)


def test_dtypes_may_differ(tmp_path):
    torch.save({"a": WIDE}, tmp_path / "step1.pt")
    torch.save({"a": WIDE.half()}, tmp_path / "step2.pt")
    made = Run(tmp_path / "step*").average(0.2)
    assert made["a"].dtype == torch.float16


def test_a_file_that_changes_or_shrinks_is_an_error(tmp_path):
    source, _ = Run(filled(tmp_path, 1, 2, size=1000)).sources
    path = source.path
    with refused(path, "changed", kind=FileFormatError), source:
        path.write_bytes(path.read_bytes())
    with refused(path, "replaced", kind=FileFormatError), source:
        pass
    source = Run(path).sources[0]
    with refused(path, "shorter", kind=FileFormatError), source:
        os.truncate(path, 3000)
        source.tensor("w")
    path.unlink()
    with pytest.raises(VanishedError), source:
        pass


def test_checkpoints_have_the_names_of_their_folders_and_files(tmp_path):
    for step in (10, 20):
        content = {
            "a": torch.full((3,), float(step)),
            "ema_optimizer": {"state.a.ema_params": torch.full((3,), 0.93 * step)},
        }
        distributed(tmp_path / f"iter-{step}" / "state", content)
    run = Run(tmp_path / "iter-*" / "state")
    first, average, *_ = run.sources
    assert first.name == "iter-10/state"
    assert average.name == "iter-10/state (average)"
    assert run.average("last:2")["a"].tolist() == [15.0] * 3


# --- steps in names: plain digits are read, numbers that may mean something else are refused

READ = {
    "checkpoint-500": 500,
    "global_step1000": 1000,
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
    "step-1.5k": 1500,
    "model-1M-steps": 1_000_000,
}
"""Names with a step."""

REFUSED = {
    "step_1_000": "'1_000'",
    "1_000_steps": "'1_000'",
    "model-1.5k": "'1.5k'",
    "step_1k5": "'1k'",
    "step-1,000": "'1,000'",
    "v1.5": "no number",
    "model-fp16": "'fp16'",
    "100kimg": "'100kimg'",
    "step_1e5": "'1e'",
    "checkpoint-7b": "'7b'",
    "20240105": "'20240105'",
    "checkpoint-2024-01-05": "'2024-01-05'",
    "model_1714560000": "'1714560000'",  # in seconds of Unix
    "model_fold3": "'fold3'",
    "best_acc=87": "'acc=87'",
    "00010-of-00020": "no number",
    "step²": "no number",
}
"""Names that may mean something else, and which part of them."""


def save_step(folder, *names):
    for name in names:
        store(folder / f"{name}.pt", {"w": torch.rand(3)})
    return folder


@pytest.mark.parametrize("name", READ)
def test_a_name_tells_its_step(tmp_path, name):
    assert times(save_step(tmp_path, name)) == [READ[name]]


@pytest.mark.parametrize("name", ["checkpoint-500", "step-20240105"])
def test_the_name_of_a_folder_tells_its_step_by_a_word_for_steps(tmp_path, name):
    save_step(tmp_path / name, "model")
    for place in (tmp_path, tmp_path / name / "model.pt"):
        assert times(place) == [READ[name]]


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_may_mean_something_else_is_refused(tmp_path, name):
    save_step(tmp_path, name)
    with refused(tmp_path / f"{name}.pt", REFUSED[name], "step"):
        read(tmp_path)


def test_a_pattern_finds_numbers_as_people_write_them(tmp_path):
    """The remedy for every name that is refused."""
    save_step(tmp_path, "step_1_000", "step_2_000", "step_3.5k", "step_4,000")
    found = times(tmp_path, step_from=r"step_([\d._,k]+)\.")
    assert found == [1000, 2000, 3500, 4000]


@pytest.mark.parametrize("pattern", [r"step(_1_000)", r"(st)ep"])
def test_a_pattern_that_finds_no_number_is_refused(pattern, tmp_path):
    save_step(tmp_path, "step_1_000", "step_2_000")
    with refused(f"step_from {pattern}"):
        read(tmp_path, step_from=pattern)


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
    dcp.save({"model": state, "optimizer": {"x": torch.ones(3)}}, checkpoint_id=out)
"""


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 2), pytest.param("fsdp-tp", 4, marks=heavy)])
def test_chunks_of_processes_make_the_tensors(kind, ranks, tmp_path):
    (tmp_path / "run").mkdir()
    check_group(TRAIN, ranks, tmp_path, kind)
    run = Run(tmp_path / "run")
    single = Net()
    states = {}
    for step in range(1, 4):
        move(single, step)
        states[step] = copy.deepcopy(single.state_dict())
    check_average(run, states, 0.25, exact=1e-6)


def test_a_mask_that_holds_infinity_is_kept_and_other_infinite_values_are_refused(tmp_path):
    mask = torch.full((4, 4), float("-inf")).triu(1)
    states = {step: {"w": torch.randn(30)} for step in (10, 20, 30)}
    for step, state in states.items():
        store(tmp_path / "plain" / f"{step}.pt", state)
        store(tmp_path / "masked" / f"{step}.pt", state | {"attn.mask": mask})
    check_average(Run(tmp_path / "plain"), states)
    run = Run(tmp_path / "masked")
    assert_same_tensors(
        run.average(0.2), Run(tmp_path / "plain").average(0.2) | {"attn.mask": mask}
    )
    out = tmp_path / "raw.safetensors"
    export_file(tmp_path / "masked" / "30.pt", out, raw=True, dtype="float16")
    assert torch.equal(load_file(out)["attn.mask"], mask.half())
    store(tmp_path / "masked" / "20.pt", states[20] | {"attn.mask": mask.T})
    with refused(tmp_path / "masked" / "20.pt", "'attn.mask'", kind=NonFiniteError):
        run.average(0.2)
