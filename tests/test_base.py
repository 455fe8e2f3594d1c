"""A share of pretrained weights in averages, compared with direct mixes in float64."""

import json
import math

import fsspec
import numpy as np
import pytest
import torch
from checking import refused
from factories import exact_average, random_walk, read_output, relative_distance, write_run
from safetensors.torch import load_file, save_file

from posthoc_cli import Run
from posthoc_cli.errors import InexactError, MismatchError
from posthoc_cli.snapshots.tensorfile import read_file

STEPS = 40
SHAPES = {"layers.0.w": (30, 10), "layers.1.w": (40,), "head.w": (7, 3)}
UNIT = 2.0**-24  # rounding to float32


@pytest.fixture(scope="module")
def walk():
    """The weights of a fine-tuning: near those that it started from, which are at 0 of the walk."""
    steps = random_walk(STEPS, SHAPES)
    start = starts()
    return [{name: start[name] + 0.1 * step[name] for name in SHAPES} for step in steps]


def starts():
    random = np.random.default_rng(7)
    return {name: 3 * random.normal(size=shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def run(walk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "run"
    write_run(folder, walk, range(4, STEPS + 1, 4))
    return Run(folder)


def save(path, tensors=None, dtype=torch.float32):
    made = {name: torch.tensor(value).to(dtype) for name, value in (tensors or starts()).items()}
    save_file(made, path)
    return path


def flat(tensors, names=tuple(SHAPES)):
    return np.concatenate([np.asarray(tensors[name], np.float64).ravel() for name in names])


def exact(walk, sigma_rel, share, start=None):
    """Mix the exact average with what was saved as float32."""
    start = starts() if start is None else start
    mixed = {}
    for name in SHAPES:
        average = exact_average([step[name] for step in walk], sigma_rel, range(1, STEPS + 1))
        mixed[name] = average
        if name in start:
            mixed[name] = (1 - share) * average + share * start[name].astype(np.float32)
    return flat(mixed)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_mix_is_the_exact_one_in_memory_and_in_a_file(run, walk, tmp_path, share):
    """Of a tracked length, whose snapshot has the error of one rounding to float32; the result has
    another one, and the sums are in float64."""
    base = save(tmp_path / "base.safetensors")
    truth = exact(walk, 0.05, share)
    options = {"base": base, "base_share": share}
    weights = run.average(0.05, **options)
    assert relative_distance(flat(weights), truth) < 2 * UNIT
    run.write([0.05, 0.1], tmp_path / "out", **options)
    first, second = (load_file(tmp_path / f"out/sigma_rel-{x}.safetensors") for x in (0.05, 0.1))
    assert relative_distance(flat(first), truth) < 2 * UNIT
    error = run.plan(0.1, **options).predicted_error(0)
    assert relative_distance(flat(second), exact(walk, 0.1, share)) < 3 * error


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.2])
def test_the_predicted_error_is_that_of_the_average_in_the_mix(run, walk, tmp_path, sigma_rel):
    """a x error x |average| / |mix|, from all elements: no tensor is larger than the sample. The
    average is nearly the base of a fine-tuning, and far from another one, whose mix is shorter."""
    own = run.plan(sigma_rel).reconstruction.predicted_error[0]
    average = exact(walk, sigma_rel, 0.0)
    for factor in (1.0, -0.9):
        start = {name: factor * value for name, value in starts().items()}
        base = save(tmp_path / "base.safetensors", start)
        plan = run.plan(sigma_rel, base=base, base_share=0.4)
        mix = exact(walk, sigma_rel, 0.4, start)
        scale = 0.6 * np.linalg.norm(average) / np.linalg.norm(mix)
        assert plan.predicted_error(0) == pytest.approx(scale * own, rel=0.02)
    with refused(f"sigma_rel {sigma_rel}", kind=InexactError):
        run.plan(sigma_rel, base=base, base_share=0.4, max_error=0.9 * scale * own)


def test_the_rounding_of_the_base_counts(run, walk, tmp_path):
    """Of bfloat16, within half a spacing: u ** 2 / 12 of 2 ** -8 in the mean over mantissas."""
    base = save(tmp_path / "base.safetensors", dtype=torch.bfloat16)
    weights = run.average(0.05, base=base, base_share=0.9)
    measured = relative_distance(flat(weights), exact(walk, 0.05, 0.9))
    assert weights.predicted_error == pytest.approx(measured, rel=0.2)
    assert measured > 1e-3


@pytest.mark.parametrize("prefix", ["model.", "base_model.model."])
def test_names_fit_under_a_prefix_and_an_alias(run, walk, tmp_path, prefix):
    base = tmp_path / "base.pt"
    state = {f"{prefix}{name}": torch.tensor(value).float() for name, value in starts().items()}
    torch.save({"state_dict": state, "step": 0}, base)
    weights = run.average(0.05, base=base, base_share=0.25)
    assert relative_distance(flat(weights), exact(walk, 0.05, 0.25)) < 2 * UNIT


def test_a_base_may_be_a_model_folder_or_a_url(run, walk, tmp_path):
    folder = tmp_path / "pretrained"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    start = starts()
    parts = (("head.w",), ("layers.0.w", "layers.1.w"))
    places = {}
    for number, names in enumerate(parts, 1):
        path = folder / f"model-{number:05}-of-00002.safetensors"
        save(path, {name: start[name] for name in names})
        places |= dict.fromkeys(names, path.name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    memory = fsspec.filesystem("memory")
    memory.pipe("/pretrained/base.safetensors", save(tmp_path / "a.safetensors").read_bytes())
    for base in (folder, "memory://pretrained/base.safetensors"):
        weights = run.average(0.05, base=base, base_share=0.25)
        assert relative_distance(flat(weights), exact(walk, 0.05, 0.25)) < 2 * UNIT


def test_a_new_head_stays_the_averages_and_is_counted_aloud(run, walk, tmp_path, ema):
    start = starts()
    del start["head.w"]
    base = save(tmp_path / "base.safetensors", start)
    truth = exact(walk, 0.05, 0.5, start)
    weights = run.average(0.05, base=base, base_share=0.5)
    assert relative_distance(flat(weights), truth) < 2 * UNIT
    out = tmp_path / "out.safetensors"
    words = ("--base", base, "--base-share", "50%", "--out", out)
    done = ema("synthesize", run.directory, "--sigma-rel", "0.05", *words)
    assert done.code == 0, done.err
    assert "lacks 1 of 3 tensors, which stay the average's: head.w" in done.out + done.err
    assert relative_distance(flat(load_file(out)), truth) < 2 * UNIT


def test_another_shape_and_no_common_tensor_are_errors(run, tmp_path):
    start = starts()
    start["head.w"] = start["head.w"].T.copy()
    base = save(tmp_path / "base.safetensors", start)
    with refused(base, "'head.w' has the shape [3, 7], the average [7, 3]", kind=MismatchError):
        run.average(0.05, base=base, base_share=0.5)
    base = save(tmp_path / "other.safetensors", {"x.y": np.ones(3)})
    with refused(base, "none of the averages' tensors", kind=MismatchError):
        run.average(0.05, base=base, base_share=0.5)
    two = {f"{part}.{name}": value for part in "ab" for name, value in starts().items()}
    base = save(tmp_path / "two.safetensors", two)
    with refused(base, "fit under a. and b.", kind=MismatchError):
        run.average(0.05, base=base, base_share=0.5)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan, "much"])
def test_a_share_is_above_0_and_below_1(run, tmp_path, share):
    base = save(tmp_path / "base.safetensors")
    with refused("base_share", "must lie in (0, 1)"):
        run.plan(0.05, base=base, base_share=share)


def test_a_base_needs_its_share_and_the_other_way_round(run, tmp_path, ema):
    with refused("base", "needs `base_share`"):
        run.plan(0.05, base=save(tmp_path / "base.safetensors"))
    done = ema("synthesize", run.directory, "--sigma-rel", "0.05", "--base-share", "0.2")
    assert done.code == 2
    assert done.error == "--base-share: needs --base"


def test_the_header_names_base_hash_and_share_and_others_have_none(run, tmp_path, ema):
    base = save(tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    run.write(0.1, out, base=base, base_share=0.25)
    info = read_output(out)
    assert (info.base, info.base_share) == (str(base), 0.25)
    save(tmp_path / "other.safetensors", {name: value + 1 for name, value in starts().items()})
    other = run.plan(0.1, base=tmp_path / "other.safetensors", base_share=0.25)
    assert info.base_hash != other.output_info(0).base_hash
    assert len(info.base_hash) == 16
    shown = ema("info", out).out
    for text in (str(base), info.base_hash, "0.25"):
        assert text in shown, shown
    run.write(0.1, tmp_path / "plain.safetensors")
    plain = read_file(tmp_path / "plain.safetensors").content
    assert not [name for name in plain if "base" in name]


def test_statistics_of_batch_norm_are_the_averages_own(tmp_path):
    shapes = {"n.weight": (5,), "n.running_mean": (5,), "n.running_var": (5,)}
    shapes["n.num_batches_tracked"] = (1,)
    walk = [
        {name: abs(value) + 1 for name, value in step.items()} for step in random_walk(20, shapes)
    ]
    write_run(tmp_path / "run", walk, range(2, 21, 2))
    run = Run(tmp_path / "run")
    start = {name: np.full(shape, 9.0) for name, shape in shapes.items()}
    base = save(tmp_path / "base.safetensors", start)
    plain = run.average(0.1)
    mixed = run.average(0.1, base=base, base_share=0.5)
    for name in ("n.running_mean", "n.running_var"):
        assert torch.equal(mixed[name], plain[name])
    expected = plain["n.weight"].double() / 2 + 4.5
    assert torch.allclose(mixed["n.weight"].double(), expected, rtol=2 * UNIT)


def test_a_copy_of_a_checkpoint_has_the_mix_in_it(run, walk, tmp_path):
    base = save(tmp_path / "base.safetensors")
    like = tmp_path / "last.pt"
    model = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    torch.save({"model": model, "step": 40}, like)
    out = tmp_path / "tuned.pt"
    run.write(0.05, out, like=like, base=base, base_share=0.25)
    found = torch.load(out, weights_only=True)
    assert found["step"] == 40
    assert relative_distance(flat(found["model"]), exact(walk, 0.05, 0.25)) < 2 * UNIT
