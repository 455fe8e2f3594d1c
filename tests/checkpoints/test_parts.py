"""Models in several files without an index: files that say in their headers where what they hold
belongs, as torch's HuggingFaceStorageWriter writes them, and files that their names count."""

import copy
import json
from itertools import accumulate

import pytest
import torch
from checking import assert_same_tensors, heavy, refused
from checkpoint_layouts import STEPS, check_average
from groups import Net, check_group, move
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved import check_last, store, times
from walks import saves

from posthoc_cli import Run, export_file
from posthoc_cli.errors import (
    PostHocError,
    UnsuitableError,
)

PART = "shard-{:05}-model-00001-of-00001.safetensors"
SAVE = """
import warnings
import torch.distributed.checkpoint as dcp
warnings.simplefilter("ignore")
model = spread(Net(), arguments[0])
for step in (1, 2, 3):
    move(model, step)
    place = str(folder / f"step_{step}" / "model")
    writer = dcp.HuggingFaceStorageWriter(place, save_distributed=True)
    dcp.save(model.state_dict(), storage_writer=writer)
"""


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 3), pytest.param("fsdp-tp", 4, marks=heavy)])
def test_what_processes_write_makes_the_model_of_one_process(kind, ranks, tmp_path):
    check_group(SAVE, ranks, tmp_path, kind)
    single = Net()
    states = {}
    for step in (1, 2, 3):
        move(single, step)
        states[step] = copy.deepcopy(single.state_dict())
    run = Run(tmp_path)
    check_average(run, states, 0.25, exact=1e-6)
    average = run.average(0.25)
    run.write(0.25, tmp_path / "new", like=tmp_path / "step_3" / "model")
    assert_same_tensors(gathered(tmp_path / "new"), average)


def gathered(folder):
    """Return the tensors that parts make, by their headers."""
    made = {}
    for path in folder.iterdir():
        with safe_open(path, "pt") as part:
            offsets = json.loads(part.metadata()["DCP_SHARDING_INFO"])
            for name in part.keys():  # noqa: SIM118 - of a file
                chunk = part.get_tensor(name)
                begin = offsets[name]["saved_offsets"]
                end = [first + length for first, length in zip(begin, chunk.shape, strict=True)]
                known = made.get(name, torch.empty((0,) * chunk.dim(), dtype=chunk.dtype))
                shape = map(max, zip(known.shape, end, strict=True))
                whole = torch.zeros([*shape], dtype=chunk.dtype)
                whole[tuple(map(slice, known.shape))] = known
                whole[tuple(map(slice, begin, end))] = chunk
                made[name] = whole
    return made


# --- parts as torch writes them, by hand


def split(weights, count):
    """Return what each of several processes holds of some weights, with the offsets: rows as evenly
    as they can, and tensors without axes in the last."""
    parts = [({}, {}) for _ in range(count)]
    for name, value in weights.items():
        chunks = value.tensor_split(count) if value.dim() else []
        first = [0, *accumulate(len(chunk) for chunk in chunks)]
        for (held, offsets), chunk, begin in zip(parts, chunks, first, strict=False):
            held[name] = chunk.contiguous()
            offsets[name] = {"saved_offsets": [begin] + [0] * (value.dim() - 1)}
        if not chunks:
            held, offsets = parts[-1]
            held[name] = value
            offsets[name] = {"saved_offsets": []}
    return parts


def write_parts(folder, weights, count=2, name=PART):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (held, offsets) in enumerate(split(weights, count), 1):
        about = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        save_file(held, folder / name.format(number), metadata=about)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "files"


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("where", ["step_{}", "step_{}/model", "{}/step_{}/model/weights"])
def test_parts_are_one_model_that_is_imported_and_exported(where, count, place, weights, caplog):
    for step, state in weights.items():
        write_parts(place / where.format(step, step), state, count)
    check_average(Run(place), weights)
    assert caplog.text.count("make sure that none is missing") == 1
    assert times(place) == [*STEPS]
    last = place / where.format(STEPS[-1], STEPS[-1])
    for source in (last, last / PART.format(count)):
        out = place / "all.safetensors"
        export_file(source, out, raw=True, overwrite=True)
        assert_same_tensors(load_file(out), weights[STEPS[-1]])


def test_each_process_may_write_several_files(place, weights):
    for step, state in weights.items():
        names = sorted(state)
        for number in (1, 2):
            held = {name: state[name] for name in names[number - 1 :: 2]}
            file = PART.replace("00001-of-00001", f"0000{number}-of-00002")
            write_parts(place / f"step_{step}", held, name=file)
    check_average(Run(place), weights)
    for path in place.glob("*/shard-*-model-00002-*"):
        path.unlink()
    assert "by its name; those that are missing have the numbers 2" in refusal(place)


def refusal(place):
    with pytest.raises(PostHocError) as raised:
        Run(place).plan(0.2)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def other_rows(folder, state):
    write_parts(folder, state, 3)
    (folder / PART.format(2)).unlink()


def rows_of_two_saves(folder, state):
    write_parts(folder, state, 3)
    write_parts(folder, state, 2)


def a_short_file(folder, state):
    write_parts(folder, state, 2)
    path = folder / PART.format(2)
    path.write_bytes(path.read_bytes()[:-4])


def without_offsets(folder, state):
    write_parts(folder, state, 2)
    path = folder / PART.format(2)
    save_file(load_file(path), path, metadata={"DCP_SHARDING_INFO": "{}"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (other_rows, ["shard-00001-", "shard-00003-", "each element exactly once"]),
        (rows_of_two_saves, ["shard-00003-", "each element exactly once", "two saves"]),
        (a_short_file, ["shard-00002-", "truncated"]),
        (without_offsets, ["shard-00002-", "DCP_SHARDING_INFO", "where it begins"]),
    ],
)
@pytest.mark.parametrize("steps", [[100], STEPS])
def test_what_does_not_make_a_model_is_named(damage, words, steps, place, weights):
    for step, state in weights.items():
        (damage if step in steps else write_parts)(place / f"step_{step}" / "model", state)
    message = refusal(place)
    for word in words:
        assert word in message


def test_a_last_part_that_is_missing_once_is_named(place, weights):
    """What it held, no other part says."""
    for step, state in weights.items():
        write_parts(place / f"step_{step}", state)
    (place / "step_100" / PART.format(2)).unlink()
    assert "step_100" in refusal(place)


@pytest.mark.parametrize("name", [PART.format(2), "model.safetensors", "a/b.safetensors"])
def test_a_file_whose_header_says_that_it_is_a_part_is_no_model(name, place, weights):
    """Alone, under whatever name, in any command."""
    for step, state in weights.items():
        write_parts(place / "parts", state)
        path = place / "files" / f"step_{step}" / name
        path.parent.mkdir(parents=True)
        (place / "parts" / PART.format(2)).rename(path)
    assert "each element exactly once" in refusal(place / "files")
    for raw in (False, True):
        with refused_part(path):
            export_file(path, place / "out.safetensors", raw=raw)
    store(place / "of.safetensors", state)
    with refused_part(path):
        export_file(place / "of.safetensors", place / "out.safetensors", like=path)


def refused_part(path):
    return pytest.raises(PostHocError, match=r"each element exactly once|is not one")


# --- beside the whole model


def with_consolidated(folder, state):
    write_parts(folder / "model", state)
    store(folder / "model" / "consolidated" / "model-00001-of-00001.safetensors", state)
    return folder / "model", folder / "model" / "consolidated"


def with_sharded(folder, state):
    write_parts(folder / "sharded", state)
    whole = folder / "model-00001-of-00001.safetensors"
    store(whole, state)
    return folder, whole


BOTH = [with_consolidated, with_sharded]


@pytest.mark.parametrize("write", BOTH)
def test_the_whole_model_is_taken_and_its_parts_are_named_once(write, place, weights, caplog):
    for step, state in weights.items():
        model, whole = write(place / f"step_{step}", state)
    check_average(Run(place), weights)
    notes = [record.getMessage() for record in caplog.records]
    assert sum(f"{whole.name} is the same model" in note for note in notes) == 1
    caplog.clear()
    export_file(model, place / "out.safetensors")
    assert_same_tensors(load_file(place / "out.safetensors"), state)
    assert "is left out" in caplog.text


@pytest.mark.parametrize("write", BOTH)
def test_an_average_is_not_put_beside_raw_parts(write, place, weights):
    for step, state in weights.items():
        model, whole = write(place / f"step_{step}", state)
    run = Run(place)
    with refused(f"like {model}", "twice", f"name {whole}"):
        run.write(0.2, place / "new", like=model)
    assert not (place / "new").exists()
    run.write(0.2, place / f"new{whole.suffix}", like=whole)


def test_a_run_may_have_the_whole_model_at_its_end_alone(place, weights):
    for step, state in weights.items():
        write_parts(place / f"step_{step}" / "model", state)
    with_consolidated(place / f"step_{STEPS[-1]}", state)
    check_average(Run(place), weights)


@pytest.mark.parametrize("change", ["other values", "a part is missing"])
@pytest.mark.parametrize("write", BOTH)
def test_parts_that_are_not_of_the_model_beside_them_are_named(write, change, place, weights):
    for step, state in weights.items():
        model, whole = write(place / f"step_{step}", state)
        if change == "other values":
            path = whole if whole.is_file() else next(whole.iterdir())
            store(path, {name: value + 1 for name, value in state.items()})
        else:
            next(model.rglob(PART.format(2))).unlink()
    message = refusal(place)
    assert f"holds the parts of a model, and another one in {whole.name}" in message


# --- beside an average


@pytest.mark.parametrize("where", ["ema", "model/ema"])
@pytest.mark.parametrize("is_split", [True, False])
def test_an_average_beside_parts_is_found(where, is_split, place):
    for save in saves():
        folder = place / f"step_{save.step}"
        write_parts(folder / "model", save.weights)
        if is_split:
            write_parts(folder / where, save.average)
        else:
            store(folder / f"{where}.safetensors", save.average)
    check_last(place)


# --- parts that names count


COUNTED = [
    "model-{:05}-of-00003.safetensors",
    "pytorch_model-{:05}-of-00003.bin",
    "shard_{}_of_3.pt",
    "rank{}-of-3.pt",
]


def write_counted(folder, state, name, first, skip=()):
    names = sorted(state)
    for number in range(3):
        if number not in skip:
            held = {each: state[each] for each in names[number::3]}
            store(folder / name.format(first + number), held)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", [*COUNTED, "step_{step}_part{}_of_3.pt"])
def test_parts_that_are_all_there_are_one_model(name, first, place, weights):
    for step, state in weights.items():
        folder = place if "step" in name else place / f"step_{step}"
        write_counted(folder, state, name.replace("{step}", str(step)), first)
    check_average(Run(place), weights)


@pytest.mark.parametrize("skip", [[1], [2], [1, 2]])
@pytest.mark.parametrize("name", COUNTED)
def test_parts_that_are_missing_are_named(name, skip, place, weights):
    for step, state in weights.items():
        write_counted(place / f"step_{step}", state, name, 1, skip)
    missing = ", ".join(str(1 + number) for number in skip)
    for where in (place, place / "*", place / "*" / name.format(1)):
        assert f"have the numbers {missing}; " in refusal(where)


@pytest.mark.parametrize("name", COUNTED)
def test_rows_of_tensors_without_a_header_are_no_model(name, place, weights):
    for step, state in weights.items():
        for number, (held, _) in enumerate(split(state, 3), 1):
            store(place / f"step_{step}" / name.format(number), held)
    for where in (place, place / "*" / name.format(1)):
        assert "partitions" in refusal(where)


def test_a_fold_of_several_is_no_part(place, weights):
    for step, state in weights.items():
        store(place / f"step_{step}" / "fold_1_of_5.pt", state)
    check_average(Run(place), weights)


@pytest.mark.parametrize("name", COUNTED[:2])
def test_a_copy_of_parts_without_an_index_is_read_as_they_are(name, place, weights):
    """It is left out of the folder of its training."""
    for step, state in weights.items():
        write_counted(place / f"step_{step}", state, name, 1)
    run = Run(place)
    average = run.average(0.25)
    for out in (place / "step_450", place.parent / "apart"):
        run.write(0.25, out, like=place / f"step_{STEPS[-1]}")
    (place.parent / "apart").rename(place.parent / "moved")
    check_average(Run(place), weights)
    for copy_ in (place / "step_450", place.parent / "moved"):
        export_file(copy_, place.parent / "out.safetensors", raw=True, overwrite=True)
        assert_same_tensors(load_file(place.parent / "out.safetensors"), average)


@pytest.mark.parametrize("named", [[1], [2, 3]])
def test_an_index_that_names_some_parts_is_of_half_a_model(named, place, weights):
    for step, state in weights.items():
        folder = place / f"step_{step}"
        write_counted(folder, state, COUNTED[0], 1)
        index = {}
        for number in named:
            file = COUNTED[0].format(number)
            index |= dict.fromkeys(load_file(folder / file), file)
        text = json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    missing = ", ".join(str(number) for number in {1, 2, 3}.difference(named))
    assert f"not those with the numbers {missing}" in refusal(place)


@pytest.mark.parametrize(
    "name", ["checkpoint_{step}-shard{number}.pt", "{step}/model-shard{number}.pt"]
)
@pytest.mark.parametrize("numbers", [(0, 1), (0,)])
def test_shards_of_a_process_each_are_partitions(name, numbers, place, weights):
    """fairseq's tensors are flat: where one file is left, nothing else shows it."""
    for step, state in weights.items():
        for number in numbers:
            held, _ = split(state, 2)[number]
            if len(numbers) == 1:
                held = {"flat_param_0": torch.cat([value.flatten() for value in held.values()])}
            store(place / name.format(step=step, number=number), {"model": held})
    for where in (place, place / name.format(step="*", number=0)):
        assert "holds partitions of the model" in refusal(where)


def test_parts_of_processes_in_one_folder_are_not_counted(place, weights, caplog):
    for step, state in weights.items():
        write_parts(place, state, name=f"step_{step}_{PART}")
    check_average(Run(place), weights)
    assert caplog.text.count("make sure that none is missing") == 1


def test_shards_of_an_output_without_its_index_are_named(place, weights):
    for step, state in weights.items():
        store(place / f"step_{step}.pt", state)
    run = Run(place)
    run.write(0.2, place.parent / "new", layout="sharded", max_shard_size="2kB")
    next((place.parent / "new").glob("*.json")).unlink()
    with pytest.raises(UnsuitableError, match=r"an output of `ema`, and its index .* is missing"):
        export_file(place.parent / "new", place.parent / "out.safetensors", raw=True)
