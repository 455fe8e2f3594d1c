"""Averages written back into a copy of a training's checkpoint: every other byte stays, and the
training's own loader takes it.

Each checkpoint is written by the library that a training uses, and loaded by it. The averages are
compared with a float64 sum, rounded once.
"""

import errno
import io
import json
import pickle
import shutil
import signal
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checking import assert_same_tensors
from checkpoint_layouts import distributed
from ema_command import Ema
from factories import contents, write_output
from forked import waiting
from groups import check_group
from safetensors.torch import load_file, save_file
from snapshots.recorded import call_number, failing

from posthoc_cli import PostHocEMA, Run, export_file, files
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    WriteError,
)

Tensors = dict[str, torch.Tensor]

SHAPES = {
    "conv.weight": (4, 3, 2, 2), "conv.bias": (4,), "head.weight": (700, 900), "scale": (),
    "empty": (0, 3),
}  # fmt: skip
"""A tensor of more than one tile, small ones, one without axes and one without elements."""


def values(seed: int) -> Tensors:
    """Return float32 tensors whose elements take 12 bits, so that sums of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        found[name] = torch.randint(-2000, 2000, shape, generator=generator).float() / 256
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of two checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (1, 2):
        save_file(values(step), folder / f"step{step}.safetensors")
    return Run(folder)


TARGET = "last:2"


def truth(
    name: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the mean of both checkpoints in float64, rounded once."""
    first = values(1)[name].double()
    second = values(2)[name].double()
    mean = (first + second) / 2
    return mean.to(dtype)


def other(
    seed: int,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    found = {}
    for name, value in values(seed).items():
        found[prefix + name] = value.to(dtype)
    return found


def load(path: Path) -> Any:
    """Load a checkpoint as a careful training does."""
    return torch.load(path, weights_only=True)


def saved(
    folder: Path,
    **content: Any,
) -> Path:
    """Write a checkpoint by torch.save; return its path."""
    path = folder / "last.pt"
    torch.save(content, path)
    return path


def check_replaced(
    tensors: Tensors,
    prefix: str = "",
) -> None:
    for name in SHAPES:
        tensor = tensors[prefix + name]
        assert torch.equal(tensor, truth(name, tensor.dtype)), name


def changed(
    before: bytes,
    after: bytes,
) -> np.ndarray:
    """Return the places of the bytes that differ; the lengths must be equal."""
    assert len(before) == len(after)
    old = np.frombuffer(before, np.uint8)
    new = np.frombuffer(after, np.uint8)
    return np.flatnonzero(old != new)


def check_archive(
    before: Path,
    after: Path,
    replaced: int,
) -> None:
    """Check that two archives differ in the contents of so many storages, and in their CRC-32, by
    the standard library's reader."""
    data = before.read_bytes()
    places = changed(data, after.read_bytes())
    inside = np.zeros(len(data), bool)
    members = 0
    with zipfile.ZipFile(before) as old, zipfile.ZipFile(after) as new:
        assert new.testzip() is None
        for info, now in zip(old.infolist(), new.infolist(), strict=True):
            content = old.read(info)
            assert info.filename == now.filename
            if content != new.read(now):
                assert "/data/" in info.filename
                begin = data.index(content, info.header_offset)
                inside[begin : begin + len(content)] = True
                inside[begin + len(content) + 4 : begin + len(content) + 8] = True
                name = data.rindex(info.filename.encode())  # in the central directory
                inside[name - 30 : name - 26] = True
                members += 1
    assert members == replaced
    assert inside[places].all()


def optimizer_state() -> dict[str, Any]:
    moments = {}
    for number, value in enumerate(values(9).values()):
        moments[number] = {"exp_avg": value}
    group = {"lr": 0.1, "params": [*moments]}
    return {"state": moments, "param_groups": [group]}


# --- files of torch.save


FILES: dict[str, Callable[[], tuple[dict[str, Any], str, str]]] = {
    "average beside weights": lambda: (
        {"model": other(5), "ema": other(6), "optimizer": optimizer_state(), "step": 7}, "ema", ""
    ),
    "weights alone": lambda: (
        {"model": other(5), "optimizer": optimizer_state(), "epoch": 3}, "model", ""
    ),
    "flat": lambda: (other(5), "", ""),
    "prefix of DDP": lambda: ({"model": other(5, "module.")}, "model", "module."),
    "two prefixes": lambda: (
        {"model": other(5, "module._orig_mod.")}, "model", "module._orig_mod."
    ),
    "half precision": lambda: (
        {"model": other(5), "ema": other(6, "", torch.bfloat16), "step": 1}, "ema", ""
    ),
    "float64": lambda: ({"model": other(5, "", torch.float64), "step": 1}, "model", ""),
    "lightning": lambda: (
        {
            "state_dict": other(6, "net."), "current_model_state": other(5, "net."),
            "averaging_state": {"n_averaged": 8}, "global_step": 8, "optimizer_states": [],
        },
        "state_dict", "net.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_torch_save_keeps_every_other_byte(
    tmp_path: Path,
    run: Run,
    kind: str,
) -> None:
    content, key, prefix = FILES[kind]()
    like = tmp_path / "last.pt"
    torch.save(content, like)
    out = tmp_path / "averaged.pt"
    report = run.write(TARGET, out, like=like)
    assert report is not None
    assert report.to_dict()["like"]["kept"] == []
    check_archive(like, out, sum(bool(value.numel()) for value in values(1).values()))
    loads = (
        load(out), torch.load(out, weights_only=True, mmap=True),
        torch.load(out, weights_only=False),
    )  # fmt: skip
    for loaded in loads:
        check_replaced(loaded[key] if key else loaded, prefix)
    assert like.read_bytes() != out.read_bytes()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_file_of_pickle_dump_keeps_every_other_byte(
    tmp_path: Path,
    run: Run,
    protocol: int,
) -> None:
    like = tmp_path / "last.pkl"
    out = tmp_path / "averaged.pkl"
    content = {"model": other(5), "ema": other(6), "step": 7}
    like.write_bytes(pickle.dumps(content, protocol))
    run.write(TARGET, out, like=like)
    places = changed(like.read_bytes(), out.read_bytes())
    first = like.read_bytes().rindex(b"ema", 0, -10)
    assert places.min() > first
    loaded = pickle.loads(out.read_bytes())
    check_replaced(loaded["ema"])
    assert_same_tensors(loaded["model"], other(5))
    assert loaded["step"] == 7


class Training:
    """A model and its optimizer."""

    def __init__(self) -> None:
        linear = torch.nn.Linear(6, 5)
        norm = torch.nn.BatchNorm1d(5)
        self.model = torch.nn.Sequential(linear, norm)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=0.01)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 6)).square().mean().backward()
        self.optimizer.step()

    @property
    def moments(self) -> Tensors:
        states = enumerate(self.optimizer.state.values())
        return {f"{k} {name}": state[name] for k, state in states for name in state}


@pytest.mark.parametrize(("replaced", "kept"), [("ema", "model"), ("model", "ema")])
def test_a_training_goes_on_from_the_copy_with_its_optimizer_as_it_was(
    tmp_path: Path,
    replaced: str,
    kept: str,
) -> None:
    training = Training()
    averaged = {name: value.clone() for name, value in training.model.state_dict().items()}
    options: dict[str, Any] = {"update_every": 1, "checkpoint_every": 5, "checkpoint_dtype": None}
    with PostHocEMA.from_model(training.model, tmp_path / "run", **options) as ema:
        for _ in range(20):
            training.step()
            ema.update_(training.model)
    content = {"model": training.model.state_dict(), "ema": averaged}
    like = saved(tmp_path, **content, optimizer=training.optimizer.state_dict(), epoch=20)
    run = Run(tmp_path / "run")
    run.write(0.1, tmp_path / "new.pt", like=like, weights=replaced == "model")
    loaded = load(tmp_path / "new.pt")
    assert_same_tensors(loaded[replaced], run.average(0.1))
    assert_same_tensors(loaded[kept], content[kept])
    again = Training()
    again.model.load_state_dict(loaded["model"])
    again.optimizer.load_state_dict(loaded["optimizer"])
    assert_same_tensors(again.moments, training.moments)
    again.step()


def test_tensors_in_other_orders_and_in_one_storage_are_written_in_place(
    tmp_path: Path, run: Run
) -> None:
    flat = torch.arange(4 + 4 * 12 + 2, dtype=torch.float32)  # also one element that is no tensor's
    matrix = torch.full((900, 1400), 7.0)
    state = {
        "conv.weight": flat[4:52].view(4, 2, 2, 3).permute(0, 3, 1, 2),  # channels_last
        "conv.bias": flat[:4],
        "head.weight": matrix[:, ::2].t(),  # every second column, transposed
        "scale": flat[52],
        "empty": torch.zeros(0, 3),
    }
    like = tmp_path / "last.pt"
    out = tmp_path / "averaged.pt"
    torch.save({"model": state, "flat": flat, "matrix": matrix}, like)
    run.write(TARGET, out, like=like)
    check_archive(like, out, 2)
    loaded = load(out)
    check_replaced(loaded["model"])
    for name, value in loaded["model"].items():
        assert value.stride() == state[name].stride()
    assert loaded["flat"][53] == 53
    assert (loaded["matrix"][:, 1::2] == 7).all()
    loaded["flat"].zero_()  # still one storage
    assert not loaded["model"]["conv.bias"].any()


def test_columns_of_one_matrix_are_not_mixed_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    parts = {"q": torch.full((50, 3), 1.0), "k": torch.full((50, 4), 2.0)}
    save_file(parts, run / "step1.safetensors")
    matrix = torch.zeros(50, 7)
    torch.save({"q": matrix[:, :3], "k": matrix[:, 3:]}, tmp_path / "last.pt")
    Run(run).write("last:1", tmp_path / "new.pt", like=tmp_path / "last.pt")
    loaded = load(tmp_path / "new.pt")
    assert_same_tensors(loaded, parts)


def test_a_tensor_that_repeats_its_elements_is_refused(tmp_path: Path, run: Run) -> None:
    """One byte cannot hold the values of several elements."""
    repeated = torch.zeros(1, 900).expand(700, 900)
    like = saved(tmp_path, model=other(5) | {"head.weight": repeated})
    with pytest.raises(MismatchError, match=r"elements of 'head\.weight' have bytes in common"):
        run.write(TARGET, tmp_path / "new.pt", like=like)
    assert not [*tmp_path.glob(".ema-*")]


def tied() -> Tensors:
    state = other(5)
    return state | {"tied.weight": state["head.weight"]}


def test_tied_tensors_are_one_place(tmp_path: Path, run: Run) -> None:
    like = saved(tmp_path, model=tied())
    run.write(TARGET, tmp_path / "a.pt", like=like)
    check_archive(like, tmp_path / "a.pt", 4)
    loaded = load(tmp_path / "a.pt")["model"]
    check_replaced(loaded)
    assert loaded["tied.weight"].data_ptr() == loaded["head.weight"].data_ptr()


def test_names_that_are_tied_in_the_checkpoint_must_have_equal_values(
    tmp_path: Path, run: Run
) -> None:
    state = tied()
    like = saved(tmp_path, model=state)
    both = {name: truth(name, torch.float32) for name in SHAPES}
    both["tied.weight"] = both["head.weight"].clone()
    source = write_output(tmp_path / "both.safetensors", both)
    export_file(source, tmp_path / "b.pt", like=like)
    check_replaced(load(tmp_path / "b.pt")["model"])
    both["tied.weight"][0] += 1
    source = write_output(tmp_path / "apart.safetensors", both)
    with pytest.raises(MismatchError, match=r"'head\.weight' and 'tied\.weight' are one in it"):
        export_file(source, tmp_path / "c.pt", like=like)
    state["conv.bias"] = state["head.weight"][0, 2:6]
    torch.save({"model": state}, like)
    with pytest.raises(MismatchError, match=r"'head\.weight' and 'conv\.bias' have bytes in comm"):
        run.write(TARGET, tmp_path / "d.pt", like=like)
    assert not [*tmp_path.glob("[cd].pt")]


def test_tensors_that_complete_the_average_are_not_replaced(tmp_path: Path) -> None:
    """An EMA of parameters has no buffers; those of the weights stay."""
    training = Training()
    options: dict[str, Any] = {"update_every": 1, "checkpoint_every": 1}
    with PostHocEMA.from_model(training.model, tmp_path / "run", **options) as ema:
        for _ in range(3):
            training.step()
            ema.update_(training.model)
    average = {}
    for name, value in training.model.named_parameters():
        average[name] = torch.zeros_like(value)
    fresh = Training().model.state_dict()
    like = saved(tmp_path, model=fresh, ema=average)
    report = Run(tmp_path / "run").write(0.1, tmp_path / "a.pt", like=like)
    assert report is not None
    assert report.copied is not None
    assert report.copied.kept == []
    loaded = load(tmp_path / "a.pt")
    assert_same_tensors(loaded["model"], fresh)
    for value in loaded["ema"].values():
        assert value.any()


def test_a_tensor_that_the_average_shares_with_the_weights_stays_and_is_named(
    tmp_path: Path,
    run: Run,
    ema: Ema,
) -> None:
    weights = other(5)
    average = other(6)
    average["conv.bias"] = weights["conv.bias"]
    like = saved(tmp_path, model=weights, ema=average)
    words = "synthesize", run.directory, "--target", TARGET, "--like", like
    done = ema(*words, "--out", tmp_path / "new.pt")
    assert "not written: 1 tensor (conv.bias), which the average does not have apart" in done.err
    loaded = load(tmp_path / "new.pt")
    assert_same_tensors(loaded["model"], weights)
    assert torch.equal(loaded["ema"]["conv.bias"], weights["conv.bias"])
    assert torch.equal(loaded["ema"]["conv.weight"], truth("conv.weight", torch.float32))


def test_an_average_in_the_bytes_of_the_weights_is_no_average(tmp_path: Path, run: Run) -> None:
    weights = other(5)
    like = saved(tmp_path, model=weights, ema=weights)
    report = run.write(TARGET, tmp_path / "new.pt", like=like)
    assert report is not None
    assert report.to_dict()["like"]["replaced"] == "weights"
    check_replaced(load(tmp_path / "new.pt")["model"])


def test_a_counter_of_another_dtype_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    state = {"w": torch.ones(2), "count": torch.tensor(5)}
    save_file(state, tmp_path / "run/step1.safetensors")
    like = saved(tmp_path, model={"w": torch.zeros(2), "count": torch.tensor(3).int()})
    report = Run(tmp_path / "run").write("last:1", tmp_path / "new.pt", like=like)
    assert report is not None
    assert report.copied is not None
    assert report.copied.kept == ["count"]
    loaded = load(tmp_path / "new.pt")["model"]
    assert loaded["count"] == 3
    assert loaded["w"].tolist() == [1, 1]


def test_one_of_several_averages_is_named(tmp_path: Path, run: Run) -> None:
    like = saved(tmp_path, model=other(4), ema1=other(5), ema2=other(6))
    with pytest.raises(FileFormatError, match="unclear: 'ema1', 'ema2'"):
        run.write(TARGET, tmp_path / "a.pt", like=like)
    run.write(TARGET, tmp_path / "a.pt", like=like, average="ema2")
    loaded = load(tmp_path / "a.pt")
    check_replaced(loaded["ema2"])
    for key, seed in (("model", 4), ("ema1", 5)):
        assert_same_tensors(loaded[key], other(seed))


# --- safetensors, folders


def test_a_safetensors_file_keeps_its_header(tmp_path: Path, run: Run) -> None:
    like = tmp_path / "model.safetensors"
    out = tmp_path / "new.safetensors"
    save_file(other(5, "model.", torch.float16) | {"model.frozen": torch.ones(2)}, like,
              {"format": "pt", "note": "mine"})  # fmt: skip
    report = run.write(TARGET, out, like=like)
    assert report is not None
    assert report.copied is not None
    assert report.copied.kept == ["model.frozen"]
    start = 8 + int.from_bytes(like.read_bytes()[:8], "little")
    assert out.read_bytes()[:start] == like.read_bytes()[:start]
    changed(like.read_bytes(), out.read_bytes())
    check_replaced(load_file(out), "model.")
    assert torch.equal(load_file(out)["model.frozen"], torch.ones(2))


@pytest.mark.parametrize(
    ("stem", "ending", "stale"),
    [("model", "safetensors", "pytorch_model.bin"), ("pytorch_model", "bin", "tf_model.h5")],
)
def test_the_output_of_a_trainer_is_copied_without_its_checkpoints(
    tmp_path: Path,
    run: Run,
    stem: str,
    ending: str,
    stale: str,
    ema: Ema,
) -> None:
    like = trainer_output(tmp_path / "out", stem, ending)
    kept = contents(like)
    for name in ("checkpoint-10", "checkpoint-20"):
        trainer_output(like / name, stem, ending)
    (like / "runs").mkdir()
    (like / "runs/events").write_text("e")
    (like / stale).write_bytes(b"old")
    words = "synthesize", run.directory, "--target", TARGET, "--like", like
    done = ema(*words, "--out", tmp_path / "new")
    assert done.code == 0, done.err
    left_out = sorted(["checkpoint-10", "checkpoint-20", "runs", stale])
    assert f"not copied: {', '.join(left_out[:3])}, ..." in done.err
    assert "replaced the weights in out" in done.err
    after = contents(tmp_path / "new")
    assert after.keys() == kept.keys()
    for name, data in after.items():
        assert name.startswith(f"{stem}-") or data == kept[name]
    check_replaced(merged(tmp_path / "new", f"{stem}-*.{ending}"))


def merged(
    folder: Path,
    pattern: str,
) -> Tensors:
    """Return the tensors of all shards."""
    tensors: Tensors = {}
    for path in folder.glob(pattern):
        is_pickle = path.suffix == ".bin"
        tensors |= load(path) if is_pickle else load_file(path)
    return tensors


def trainer_output(
    folder: Path,
    stem: str,
    ending: str,
) -> Path:
    folder.mkdir()
    write_shards(folder, stem, ending)
    for name in ("config.json", "tokenizer.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    torch.save({"state": 1}, folder / "training_args.bin")
    return folder


def changed_files(
    before: Path,
    after: Path,
) -> set[str]:
    """Return the names of the files that differ in two folders, which have the same names."""
    old = contents(before)
    new = contents(after)
    assert old.keys() == new.keys()
    return {name for name in old if old[name] != new[name]}


def write_shards(
    folder: Path,
    stem: str,
    ending: str,
) -> None:
    weights = other(5)
    shards = {name: f"{stem}-0000{1 + k % 2}-of-00002.{ending}" for k, name in enumerate(weights)}
    for shard in set(shards.values()):
        held = {name: value for name, value in weights.items() if shards[name] == shard}
        if ending == "bin":
            torch.save(held, folder / shard)
        else:
            save_file(held, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def test_a_checkpoint_of_accelerate_keeps_the_state_of_the_training(
    tmp_path: Path, run: Run
) -> None:
    like = tmp_path / "checkpoint_3"
    like.mkdir()
    save_file(other(5), like / "model.safetensors", {"format": "pt"})
    for name in (
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
        "custom_checkpoint_1.pkl",
    ):
        torch.save(optimizer_state(), like / name)
    run.write(TARGET, tmp_path / "new", like=like)
    assert changed_files(like, tmp_path / "new") == {"model.safetensors"}
    check_replaced(load_file(tmp_path / "new/model.safetensors"))


def test_the_average_of_diffusers_in_a_folder_of_its_own(tmp_path: Path, run: Run) -> None:
    like = tmp_path / "checkpoint-500"
    for number, name in enumerate(("unet", "unet_ema")):
        (like / name).mkdir(parents=True)
        save_file(other(number + 5), like / name / "diffusion_pytorch_model.safetensors")
        (like / name / "config.json").write_text("{}")
    torch.save(optimizer_state(), like / "optimizer.bin")
    for options, replaced in (({}, "unet_ema"), ({"weights": True}, "unet")):
        out = tmp_path / replaced
        run.write(TARGET, out, like=like, **options)
        name = f"{replaced}/diffusion_pytorch_model.safetensors"
        assert changed_files(like, out) == {name}
        check_replaced(load_file(out / name))


# --- torch.distributed.checkpoint


def empty(content: Any) -> Any:
    """Return the same with other values, as a training holds it before it loads."""
    if isinstance(content, dict):
        return {key: empty(value) for key, value in content.items()}
    if isinstance(content, torch.Tensor):
        return torch.full_like(content, 3)
    return content


def loaded_distributed(
    folder: Path,
    content: dict[str, Any],
) -> dict[str, Any]:
    state: dict[str, Any] = empty(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


def test_a_folder_of_torch_distributed_checkpoint_keeps_every_other_byte(
    tmp_path: Path, run: Run
) -> None:
    content = {"model": other(5), "ema": other(6), "optim": optimizer_state()["state"], "step": 4}
    like = tmp_path / "like"
    out = tmp_path / "new"
    distributed(like, content)
    run.write(TARGET, out, like=like)
    (name,) = changed_files(like, out)
    state = loaded_distributed(out, content)
    check_replaced(state["ema"])
    for key in ("model", "optim"):
        found = flattened(state[key])
        for each, value in flattened(content[key]).items():
            assert torch.equal(found[each], value)
    check_archives((like / name).read_bytes(), (out / name).read_bytes(), 4)


def flattened(content: dict[Any, Any]) -> dict[str, torch.Tensor]:
    found = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": inner for name, inner in flattened(value).items()}
        else:
            found[str(key)] = value
    return found


def check_archives(
    before: bytes,
    after: bytes,
    replaced: int,
) -> None:
    """Check that so many of the archives in a file have changed, and that all are sound."""
    assert len(before) == len(after)
    count = 0
    begin = 0
    while begin < len(before):
        end = before.index(b"PK\5\6", begin) + 22
        count += before[begin:end] != after[begin:end]
        with zipfile.ZipFile(io.BytesIO(after[begin:end])) as archive:
            assert archive.testzip() is None
        begin = end
    assert count == replaced


SHARDED = """
from torch.distributed.tensor import Shard, distribute_tensor
import torch.distributed.checkpoint as dcp
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
tensors = torch.load(arguments[0])
state = {}
for number, (name, tensor) in enumerate(tensors.items()):
    axis = min(number % 2, tensor.dim() - 1)
    state[name] = distribute_tensor(tensor, mesh, [Shard(axis)]) if axis >= 0 else tensor
dcp.save({"model": state, "step": 3}, checkpoint_id=arguments[1])
"""


def test_chunks_of_several_processes(tmp_path: Path, run: Run) -> None:
    torch.save(other(5), tmp_path / "tensors.pt")
    like = tmp_path / "like"
    out = tmp_path / "new"
    check_group(SHARDED, 3, tmp_path / "group", tmp_path / "tensors.pt", like)
    assert len([*like.glob("*.distcp")]) == 3
    run.write(TARGET, out, like=like)
    state = loaded_distributed(out, {"model": other(5)})
    check_replaced(state["model"])
    counts = 0
    for path in like.glob("*.distcp"):
        counts += path.read_bytes() != (out / path.name).read_bytes()
    assert counts == 3


# --- what does not fit


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Check that a block changes no file in a folder."""
    before = contents(folder)
    yield
    assert contents(folder) == before


def test_values_names_and_shapes_that_do_not_fit_are_errors_before_anything_is_written(
    tmp_path: Path, run: Run
) -> None:
    like = tmp_path / "last.pt"
    out = tmp_path / "new.pt"
    good = other(5)
    for change, kind, message in (
        (
            {"conv.bias": torch.zeros(5)},
            MismatchError,
            r"'conv\.bias' has the shape \[5\], .* \[4\]",
        ),
        (
            {"conv.bias": None},
            MismatchError,
            r"1 tensors of the run are not in it, such as 'conv\.b",
        ),
        ({"conv.bias": torch.zeros(4, dtype=torch.int32)}, MismatchError, "quantized"),
    ):
        torch.save({"model": {k: v for k, v in (good | change).items() if v is not None}}, like)
        with nothing_left(tmp_path), pytest.raises(kind, match=message):
            run.write(TARGET, out, like=like)
        with nothing_left(tmp_path), pytest.raises(kind, match=message):
            run.write(TARGET, None, like=like, dry_run=True)
    generator = {"a": {"net": other(5)}, "b": {"net": other(5)}}
    flat = {f"{one}.{name}": value for one in "ab" for name, value in generator[one]["net"].items()}
    torch.save({"model": flat}, like)
    with nothing_left(tmp_path), pytest.raises(MismatchError, match=r"fit under a\. and b\."):
        run.write(TARGET, out, like=like)


def test_a_value_that_the_dtype_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    large = {"a": torch.ones(2), "b": torch.tensor([7e4])}
    save_file(large, tmp_path / "run/step1.safetensors")
    like = tmp_path / "last.pt"
    torch.save({"model": {name: value.half() for name, value in large.items()}}, like)
    with (
        nothing_left(tmp_path),
        pytest.raises(NonFiniteError, match=r"'b': torch\.float16 cannot hold its largest value"),
    ):
        Run(tmp_path / "run").write("last:1", tmp_path / "new.pt", like=like)


@pytest.mark.parametrize(
    ("out", "options", "kind", "message"),
    [
        ("new.safetensors", {}, InvalidValueError, r"must end in \.pt, as the file"),
        ("new.pt", {"dtype": "float16"}, InvalidValueError, "determines the output"),
        ("new.pt", {"max_shard_size": "1GB"}, InvalidValueError, "determines the output"),
        ("new.pt", {"average": "none"}, FileFormatError, "has no set of tensors 'none'"),
        ("new.pt", {"average": "a", "weights": True}, InvalidValueError, "at most one of them"),
        ("new.pt", {"like": None, "weights": True}, InvalidValueError, "give that, too"),
        ("new.pt", {"like": "s3://bucket/last.pt"}, InvalidValueError, "is a URL"),
        ("last.pt", {}, OutputExistsError, "already exists"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path,
    run: Run,
    out: str,
    options: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    saved(tmp_path, model=other(5))
    with nothing_left(tmp_path), pytest.raises(kind, match=message):
        run.write(TARGET, tmp_path / out, **({"like": tmp_path / "last.pt"} | options))


def test_a_file_of_this_package_and_a_folder_to_replace_are_refused(
    tmp_path: Path, run: Run
) -> None:
    run.write(TARGET, tmp_path / "own.safetensors")
    with pytest.raises(InvalidValueError, match=r"own\.safetensors was written by this package"):
        run.write(TARGET, tmp_path / "new.safetensors", like=tmp_path / "own.safetensors")
    (tmp_path / "like").mkdir()
    save_file(other(5), tmp_path / "like/model.safetensors")
    with pytest.raises(InvalidValueError, match="a copy of a folder replaces no other"):
        run.write(TARGET, tmp_path / "like", like=tmp_path / "like", overwrite=True)


def test_a_checkpoint_may_be_replaced_by_its_copy_which_a_failure_leaves_alone(
    tmp_path: Path, run: Run
) -> None:
    like = saved(tmp_path, model=other(5), ema=other(6))
    run.write(TARGET, tmp_path / "new.pt", like=like)
    for at in range(12):
        for operation in ("write", "fsync", "rename"):
            fails = failing(operation, errno.ENOSPC, call_number(at))
            with nothing_left(tmp_path), fails, suppress(WriteError):
                run.write(TARGET, tmp_path / "other.pt", like=like)
                (tmp_path / "other.pt").unlink()
        with failing("write", KeyboardInterrupt(), call_number(at)), suppress(KeyboardInterrupt):
            run.write(TARGET, like, like=like, overwrite=True)
        assert load(like)["model"].keys() == SHAPES.keys()
    run.write(TARGET, like, like=like, overwrite=True)
    assert like.read_bytes() == (tmp_path / "new.pt").read_bytes()
    assert not [*tmp_path.glob(".ema-*")]


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy has the size of the checkpoint, not only that of the average."""
    like = tmp_path / "last.pt"
    torch.save({"model": other(5), "optimizer": {"m": torch.zeros(10**6)}}, like)
    size = like.stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with nothing_left(tmp_path), pytest.raises(WriteError, match=f"takes {size:,} bytes"):
        run.write(TARGET, tmp_path / "new.pt", like=like)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    run.write(TARGET, tmp_path / "new.pt", like=like)


@pytest.mark.parametrize("at", [0, 1])
def test_a_checkpoint_that_a_training_replaces_meanwhile_is_noticed(
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """Before the copy begins, and while it is made."""
    like = saved(tmp_path, model=other(5))
    name = ("open_new", "write")[at]
    original = getattr(files.system, name)

    def call(*arguments: Any) -> Any:
        with like.open("ab") as file:
            file.write(b" ")
        return original(*arguments)

    monkeypatch.setattr(files.system, name, call)
    with pytest.raises(FileFormatError, match=("was replaced", "was changed")[at]):
        run.write(TARGET, tmp_path / "new.pt", like=like)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "last.pt"}


def test_damaged_and_compressed_archives_are_refused(tmp_path: Path, run: Run) -> None:
    like = saved(tmp_path, model=other(5))
    data = like.read_bytes()
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(like) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with nothing_left(tmp_path), pytest.raises(FileFormatError, match="compressed"):
        run.write(TARGET, tmp_path / "new.pt", like=packed)
    for length in (10, len(data) // 2, len(data) - 1):
        like.write_bytes(data[:length])
        with nothing_left(tmp_path), pytest.raises(FileFormatError):
            run.write(TARGET, tmp_path / "new.pt", like=like)


def test_an_archive_of_another_writer_has_its_checksums_in_local_headers(
    tmp_path: Path, run: Run
) -> None:
    like = tmp_path / "last.pt"
    torch.save({"model": other(5)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(like, "w") as new:
        for info in old.infolist():
            with new.open(info.filename, "w", force_zip64="/data/1" in info.filename) as member:
                member.write(old.read(info))
    run.write(TARGET, tmp_path / "new.pt", like=like)
    check_replaced(load(tmp_path / "new.pt")["model"])
    after = (tmp_path / "new.pt").read_bytes()
    assert changed(like.read_bytes(), after).size
    with zipfile.ZipFile(tmp_path / "new.pt") as archive:
        assert archive.testzip() is None
        infos = archive.infolist()
    for info in infos:
        place = info.header_offset + 14
        stored = after[place : place + 4]
        assert int.from_bytes(stored, "little") == info.CRC


INTERRUPTED = """
import sys
from posthoc_cli import Run, files
write = files.system.write
def slowly(descriptor, view, offset):
    print("writing", flush=True)
    sys.stdin.readline()
    return write(descriptor, view, offset)
files.system.write = slowly
from posthoc_cli.cli import main
sys.argv = ["ema", *sys.argv[1:]]
main()
"""


def test_a_termination_leaves_nothing_half_written(tmp_path: Path, run: Run) -> None:
    like = saved(tmp_path, model=other(5))
    words = "synthesize", run.directory, "--target", TARGET, "--like", like
    with nothing_left(tmp_path), waiting(INTERRUPTED, *words, "--out", like, "--overwrite") as job:
        assert job.first_line() == "writing"
        assert [*tmp_path.glob(".ema-*")]
        job.send_signal(signal.SIGTERM)
        assert job.wait() == 143


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """The tensors are of 64 MB, and so is the state of the optimizer."""
    (tmp_path / "run").mkdir()
    state = {"w": torch.ones(16_000_000)}
    save_file(state, tmp_path / "run/step1.safetensors")
    torch.save({"model": state, "optimizer": {"m": torch.zeros(16_000_000)}}, tmp_path / "last.pt")
    Run(tmp_path / "run").write("last:1", tmp_path / "a.pt", like=tmp_path / "last.pt")
    tracemalloc.start()
    Run(tmp_path / "run").write("last:1", tmp_path / "new.pt", like=tmp_path / "last.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30_000_000


# --- the other commands


def test_an_export_writes_any_model_into_a_checkpoint(
    tmp_path: Path,
    run: Run,
    ema: Ema,
) -> None:
    like = tmp_path / "last.pt"
    torch.save({"model": other(5, "module."), "ema": other(6, "module."), "step": 3}, like)
    run.write(TARGET, tmp_path / "made.safetensors")
    run.write(TARGET, tmp_path / "a.pt", like=like)
    done = ema("export", tmp_path / "made.safetensors", "--like", like, "--out", tmp_path / "b.pt")
    assert done.code == 0, done.err
    assert "replaced the average in last.pt; its weights stay as they are" in done.err
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()
    words = "export", tmp_path / "b.pt", "--like", like, "--weights", "--out", tmp_path / "c.pt"
    report = ema(*words, "--json").json
    assert report["like"]["replaced"] == "weights"
    assert report["tensors"] == len(SHAPES)
    loaded = load(tmp_path / "c.pt")
    check_replaced(loaded["model"], "module.")
    assert torch.equal(loaded["ema"]["module.scale"], other(6)["scale"])


def test_several_targets_make_a_file_each(tmp_path: Path, run: Run) -> None:
    like = tmp_path / "last.ckpt"
    torch.save({"model": other(5), "step": 3}, like)
    run.write(["last:1", "last:2"], tmp_path / "made", like=like)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "last-1.ckpt", "last-2.ckpt",
    ]  # fmt: skip
    check_replaced(load(tmp_path / "made/last-2.ckpt")["model"])
    loaded = load(tmp_path / "made/last-1.ckpt")["model"]
    assert all(torch.equal(value, values(2)[name]) for name, value in loaded.items())
