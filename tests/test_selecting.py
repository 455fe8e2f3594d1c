"""A synthesis of some tensors: by globs on their names, in every layout."""

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused
from factories import exact_average, random_walk, write_run
from safetensors.torch import load_file, save_file

from posthoc_cli import Request, Run
from posthoc_cli.errors import at_most_one

SHAPES = {"encoder.a": (30, 10), "encoder.b": (7,), "decoder.a": (5, 4), "head": (3,)}


@pytest.fixture(scope="module")
def walk():
    return random_walk(10, SHAPES)


@pytest.fixture(scope="module")
def run(tmp_path_factory, walk):
    folder = tmp_path_factory.mktemp("selected") / "run"
    write_run(folder, walk, range(1, 11))
    return Run(folder)


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({"include": "encoder.*"}, {"encoder.a", "encoder.b"}),
        ({"include": ["encoder.*", "head"]}, {"encoder.a", "encoder.b", "head"}),
        ({"exclude": "*.a"}, {"encoder.b", "head"}),
        ({"include": "encoder.*", "exclude": ["*.b"]}, {"encoder.a"}),
        ({}, {*SHAPES}),
    ],
)
def test_only_selected_tensors_are_made_and_each_as_without_a_selection(run, walk, chosen, names):
    made = run.average(0.28, **chosen)
    assert made.keys() == names
    for name in names:
        exact = exact_average([weights[name] for weights in walk], 0.28, range(1, 11))
        np.testing.assert_allclose(made[name].numpy(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["out.safetensors", "out.pt", "folder"])
def test_files_of_every_layout_have_the_selected_tensors_alone(run, tmp_path, layout):
    out = tmp_path / layout
    options = {"layout": "sharded", "max_shard_size": "500B"} if layout == "folder" else {}
    report = run.write(0.1, out, exclude="decoder.*", **options)
    if layout == "folder":
        written = {}
        for file in out.glob("*.safetensors"):
            written |= load_file(file)
    elif layout == "out.pt":
        written = torch.load(out, weights_only=True)
    else:
        written = load_file(out)
    assert_same_tensors(written, run.average(0.1, exclude="decoder.*"))
    assert "decoder.a" not in written
    assert report.to_dict()["targets"][0]["bytes"] == sum(each.nbytes for each in written.values())
    assert report.plan.read_bytes < run.plan(0.1).read_bytes


@pytest.mark.parametrize(
    ("chosen", "subject", "words"),
    [
        ({"exclude": "encode.*"}, "exclude 'encode.*'", ("encoder.a",)),
        ({"include": "nothing"}, "include 'nothing'", ("encoder.a",)),
        ({"exclude": "*"}, "exclude", ("leaves no tensor",)),
        ({"include": ["head", ""]}, "include", ("glob",)),
    ],
)
def test_a_selection_of_nothing_is_refused(run, chosen, subject, words):
    with refused(subject, *words):
        run.average(0.1, **chosen)


def test_a_copy_has_all_tensors(run, tmp_path):
    like = tmp_path / "like.safetensors"
    save_file(dict(run.average(0.1)), like)
    with refused("like", "`like`, `include`"):
        run.write(0.1, tmp_path / "out.safetensors", like=like, include="head")


def test_a_tied_tensor_is_selected_by_any_of_its_names(tmp_path):
    from posthoc_cli import PostHocEMA

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=1) as ema:
        ema.update_(model)
    made = Run(tmp_path / "run").average(0.1, include="b.weight")
    assert made.keys() == {"a.weight", "b.weight"}


def test_of_arguments_that_exclude_each_other_a_given_one_is_the_subject():
    at_most_one(t=None, step=1, last=False)
    with refused("step", "`t`, `step`, `last`"):
        at_most_one(t=None, step=1, last=True)


def test_a_request_is_checked_when_it_is_made():
    with refused("t", "`t`, `step`"):
        Request(0.1, t=1, step=1)
    with refused("max_error 2"):
        Request(0.1, max_error=2)
    with pytest.raises(TypeError, match="exlude"):
        Request(0.1, exlude="x")
