"""What `ema` has written, in any layout, is not taken for a checkpoint; and the loaders of other
programs take it."""

import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checking import assert_same_tensors, refused
from checkpoint_layouts import LAYOUTS, STEPS, check_average, walk
from safetensors import safe_open
from safetensors.torch import load_file
from saved import store

from posthoc_cli import Run, export_file
from posthoc_cli.errors import DirectoryError

TARGET = 0.2


def write_run(folder, layout):
    """Write the checkpoints of a walk in a layout; return the weights by step."""
    folder.mkdir()
    weights = walk()
    for step, state in weights.items():
        LAYOUTS[layout](folder, step, state)
    return weights


def newest(folder):
    (path,) = folder.glob("*20[01]*")  # 200, or Lightning's 201
    return path


def later(path):
    """Name a copy as a checkpoint of a later step."""
    return path.with_name(path.name.replace("200", "2050").replace("201", "2050"))


def load_pickle(path):
    with path.open("rb") as file:
        return pickle.load(file)


def find_weights(content):
    for key in ("current_model_state", "model", "module"):
        if key in content:
            return content[key]
    return content


def load_shards(folder, index_name, load):
    index = json.loads((folder / index_name).read_text())
    found = {}
    for name in set(index["weight_map"].values()):
        found |= load(folder / name)
    return found


def load_archive(path):
    """Load a file as trainings do, also mapped into memory; the archive is whole."""
    mapped = find_weights(torch.load(path, weights_only=True, mmap=True))
    loaded = find_weights(torch.load(path, weights_only=True))
    assert_same_tensors(mapped, loaded)
    assert zipfile.ZipFile(path).testzip() is None
    return loaded


def load_distributed(path):
    weights = {name: torch.zeros_like(value) for name, value in walk()[200].items()}
    is_flat = "model" not in {key[0] for key in metadata_of(path).planner_data.values()}
    state = dict(weights) if is_flat else {"model": weights}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=str(path))
    return state if is_flat else state["model"]


def metadata_of(path):
    return load_pickle(path / ".metadata")


LOADERS = {
    "safetensors": load_file,
    "archives": load_archive,
    "pickles": lambda path: load_pickle(path)["model"],
    "modules": load_archive,
    "lightning": load_archive,
    "transformers": lambda path: load_shards(path, "model.safetensors.index.json", load_file),
    "bins": lambda path: load_shards(path, "pytorch_model.bin.index.json", load_archive),
    "pickled folders": lambda path: load_archive(path / "pytorch_model.bin"),
    "distributed": load_distributed,
    "distributed flat": load_distributed,
}
"""The other programs' own loaders, by layout."""


def without_prefix(tensors):
    return {name.removeprefix("net."): value for name, value in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_in_the_folder_of_its_training_is_left_out(tmp_path, layout):
    folder = tmp_path / "run"
    weights = write_run(folder, layout)
    run = Run(folder)
    average = run.average(TARGET)
    copy = later(newest(folder))
    run.write(TARGET, copy, like=newest(folder))
    assert_same_tensors(without_prefix(LOADERS[layout](copy)), without_prefix(average))
    assert [source.t for source in run.sources] == [*map(float, STEPS)]
    check_average(run, weights, TARGET, strip="net.")
    assert f"left out: {copy.name} (an output of ema)" in run.info()["notes"]
    with refused(copy, "outputs of ema", kind=DirectoryError):
        Run(copy).plan(TARGET)
    # a copy of the copy, which replaces the mark
    again = copy.with_name(copy.name.replace("2050", "2060"))
    run.write(TARGET, again, like=copy)
    assert_same_tensors(without_prefix(LOADERS[layout](again)), without_prefix(average))
    assert sum(file.stat().st_size for file in files_of(again)) == sum(
        file.stat().st_size for file in files_of(copy)
    )
    check_average(run, weights, TARGET, strip="net.")


def files_of(path):
    return [path] if path.is_file() else [*filter(Path.is_file, path.rglob("*"))]


def export(run, out, **options):
    """Write an average by way of a plain output."""
    plain = run.directory.parent / "plain.safetensors"
    run.write(TARGET, plain, overwrite=True)
    export_file(plain, out, **options)


def synthesize(run, out):
    run.write(TARGET, out)


def export_weights(run, out):
    export_file(newest(run.directory), out, raw=True, dtype="bfloat16")


OUTPUTS = {
    "pt": ("step2050.pt", synthesize),
    "safetensors": ("step2050.safetensors", synthesize),
    "another ending": ("step2050.ckpt", lambda run, out: export(run, out, layout="pt")),
    "shards": ("step2050", lambda run, out: export(run, out, max_shard_size="2kB")),
    "exported": ("step2050.pt", export),
    "exported weights": ("step2050.pt", export_weights),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_in_the_folder_of_the_checkpoints_is_left_out(tmp_path, kind):
    folder = tmp_path / "run"
    weights = write_run(folder, "archives")
    name, write = OUTPUTS[kind]
    run = Run(folder)
    write(run, folder / name)
    word = "an export of ema" if kind == "exported weights" else "an output of ema"
    assert f"left out: {name} ({word})" in run.info()["notes"]
    check_average(run, weights, TARGET)
    elsewhere = folder / "model-2060.pt"  # moved and renamed, it is still known
    shutil.move(folder / name, elsewhere)
    assert f"left out: {elsewhere.name} ({word})" in run.info()["notes"]
    check_average(run, weights, TARGET)


def test_an_output_beside_a_model_is_no_part_of_its_checkpoint(tmp_path):
    folder = tmp_path / "run"
    weights = write_run(folder, "pickled folders")
    run = Run(folder)
    average = run.average(TARGET)
    run.write(TARGET, tmp_path / "avg.safetensors")
    run.write(TARGET, tmp_path / "checkpoint-9", like=newest(folder))
    for step in STEPS:
        inside = folder / f"checkpoint-{step}"
        shutil.copy(tmp_path / "avg.safetensors", inside / "ema.safetensors")
        shutil.copy(tmp_path / "checkpoint-9/pytorch_model.bin", inside / "averaged.bin")
    check_average(run, weights, TARGET)
    assert_same_tensors(run.average(TARGET), average)
    (note,) = [note for note in run.info()["notes"] if "left out" in note]
    assert "checkpoint-20/averaged.bin (an output of ema)" in note
    assert "checkpoint-20/ema.safetensors (an output of ema)" in note


def test_a_copy_with_two_models_is_left_out_as_a_whole(tmp_path):
    """Its raw weights are those of the checkpoint that it is a copy of."""
    weights = walk()
    folder = tmp_path / "run"
    for step, state in weights.items():
        average = {name: value - value // 9 for name, value in state.items()}
        store(folder / f"step{step}/unet/model.safetensors", state)
        store(folder / f"step{step}/unet_ema/model.safetensors", average)
    run = Run(folder)
    source = tmp_path / "avg.safetensors"
    store(source, weights[100])
    export_file(source, folder / "step2050", like=folder / "step200")
    copied = load_file(folder / "step2050/unet_ema/model.safetensors")
    assert_same_tensors(copied, weights[100])
    described = run.info()
    assert {row["t"] for row in described["checkpoints"]} == {*map(float, STEPS)}
    assert "left out: step2050 (an export of ema)" in described["notes"]


def test_a_training_goes_on_from_a_copy_with_checkpoints_of_its_own(tmp_path):
    folder = tmp_path / "run"
    weights = write_run(folder, "archives")
    run = Run(folder)
    copy = tmp_path / "start.pt"
    run.write(TARGET, copy, like=newest(folder))
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(copy, new / "model-00000001.pt")
    state = torch.load(copy, weights_only=True)
    later_weights = {}
    for step in (10, 20, 30):
        for value in state.values():
            value += 1
        torch.save(state, new / f"model-{step:08}.pt")
        later_weights[step] = {name: value.clone() for name, value in state.items()}
    check_average(Run(new), later_weights, TARGET)
    assert weights.keys() == {*STEPS}


def test_a_training_that_was_converted_by_exports_is_a_run(tmp_path):
    write_run(tmp_path / "run", "modules")
    weights = {}
    folder = tmp_path / "converted"
    folder.mkdir()
    for path in (tmp_path / "run").iterdir():
        out = folder / f"{path.stem}.pt"
        export_file(path, out, raw=True)
        weights[int(path.stem.removeprefix("rank_"))] = torch.load(out, weights_only=True)
    check_average(Run(folder), weights, TARGET)


def test_info_says_what_outputs_are(tmp_path, ema):
    folder = tmp_path / "run"
    write_run(folder, "safetensors")
    run = Run(folder)
    run.write(TARGET, tmp_path / "made.pt")
    run.write(TARGET, tmp_path / "copied.safetensors", like=newest(folder))
    for name in ("made.pt", "copied.safetensors"):
        done = ema("info", tmp_path / name)
        assert done.code == 0
        assert "an output of ema: sigma_rel 0.2 at t = 200 steps" in done.out


def test_a_copy_keeps_the_metadata_and_has_the_format_that_loaders_want(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, "safetensors")
    like = newest(folder)
    Run(folder).write(TARGET, tmp_path / "copied.safetensors", like=like)
    with safe_open(tmp_path / "copied.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("format") == "pt"
    assert metadata.keys() == {"ema.output"}
    described = json.loads(metadata["ema.output"])
    assert described["kind"] == "output"
    assert described["t"] == 200


@pytest.mark.parametrize("text", ["", "{}x", '{"kind": 3}', '["output"]'])
def test_metadata_of_another_program_under_the_name_of_the_mark_say_nothing(tmp_path, text):
    from safetensors.torch import save_file

    for step, state in walk().items():
        save_file(state, tmp_path / f"step{step}.safetensors", {"ema.output": text})
    assert len(Run(tmp_path).sources) == len(STEPS)


def test_a_copy_of_an_archive_with_a_comment_keeps_it(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, "archives")
    like = newest(folder)
    with zipfile.ZipFile(like, "a") as archive:
        archive.comment = b"of another program"
    out = tmp_path / "copied.pt"
    run = Run(folder)
    run.write(TARGET, out, like=like)
    assert zipfile.ZipFile(out).comment.startswith(b"of another program{")
    assert_same_tensors(load_archive(out), run.average(TARGET))
    with refused(out, "outputs of ema", kind=DirectoryError):
        Run(out).plan(TARGET)


def test_an_average_of_ours_is_exported_without_a_key(tmp_path):
    for step, weights in walk().items():
        store(tmp_path / f"step{step}.pt", {"model": weights})
    run = Run(tmp_path)
    run.write(0.2, tmp_path / "average.pt")
    export_file(tmp_path / "average.pt", tmp_path / "average.safetensors")
    made = run.average(0.2)
    assert_same_tensors(load_file(tmp_path / "average.safetensors"), made)
