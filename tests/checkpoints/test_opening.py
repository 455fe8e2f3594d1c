"""Checkpoints of other programs as runs: what is found, and that averages are those of the weights
in them."""

from __future__ import annotations

import os
import pickle
import re
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_layouts import LAYOUTS, STEPS, Weights, check_average, distributed, filled
from ema_command import Ema
from factories import contents
from groups import Net, check_group, move
from safetensors.torch import save_file

from posthoc_cli import Mean, Run, errors, import_checkpoints
from posthoc_cli.profiles import Point

Write = Callable[[str], Path]
Imported = Callable[..., Run]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_a_run(
    layout: str,
    write: Write,
    weights: dict[int, Weights],
    tmp_path: Path,
) -> None:
    """An import is the same run, and leaves the files as they were."""
    run = Run(write(layout))
    assert [source.profile for source in run.sources] == [Point(float(step)) for step in STEPS]
    assert repr(run).endswith("4 checkpoints up to 200 steps)")
    check_average(run, weights, strip="net." if layout == "lightning" else "")
    described = run.info()
    assert described["kind"] == "checkpoints"
    assert [one["t"] for one in described["checkpoints"]] == list(STEPS)
    assert (described["averaged"], described["copied"]) == (6, 3)
    before = contents(tmp_path)
    import_checkpoints(tmp_path / "run", tmp_path / "new")
    (manifest,) = contents(tmp_path).keys() - before.keys()
    assert manifest == "new/ema-import.json"
    assert (tmp_path / manifest).stat().st_size < 10_000
    assert {name: contents(tmp_path)[name] for name in before} == before
    new = Run(tmp_path / "new")
    assert new.sources == run.sources
    assert new.info()["refers_to"] == str(tmp_path / "run")


def test_a_glob_names_some_checkpoints(write: Write, weights: dict[int, Weights]) -> None:
    folder = write("transformers")
    assert Run(folder / "checkpoint-*0").step == 200
    assert [source.step for source in Run(folder / "checkpoint-[12]00").sources] == [100, 200]
    with pytest.raises(errors.DirectoryError, match="no file or folder has such a name"):
        _ = Run(folder / "other-*").sources
    for step in STEPS:  # a model of several parts, as pipelines have it
        (folder / f"step-{step}").mkdir()
        (folder / f"checkpoint-{step}").rename(folder / f"step-{step}" / "unet")
        (folder / f"step-{step}" / "unet" / "trainer_state.json").unlink()
    check_average(Run(folder / "step-*" / "unet"), weights)


def test_steps_come_from_the_metadata_of_trainers_of_lora(tmp_path: Path) -> None:
    filled(tmp_path, 9, 100)
    metadata = {"ss_steps": "55", "ss_epoch": "1"}
    save_file({"w": torch.ones(3)}, tmp_path / "lora-000001.safetensors", metadata)
    assert [source.step for source in Run(tmp_path).sources] == [9, 55, 100]


@pytest.mark.parametrize(
    ("weights", "steps"), [([9.0] * 3, [9, 10]), ([9.0, 9, 2], None), ([9.0, 9], [9, 10])]
)
def test_two_files_of_one_step_are_the_same_or_of_another_model(
    weights: list[float],
    steps: list[int] | None,
    tmp_path: Path,
    imported: Imported,
) -> None:
    filled(tmp_path, 9, 10)
    save_file({"w": torch.tensor(weights)}, tmp_path / "x-9.safetensors")
    pattern = r"(?:step|x-)(\d+)"
    if steps is None:
        with pytest.raises(errors.MismatchError, match=r"step9.pt and .*: are both of step 9"):
            imported(tmp_path, step_from=pattern)
    else:
        run = imported(tmp_path, step_from=pattern)
        assert [source.step for source in run.sources] == steps


def test_a_file_can_be_described_without_its_step(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3, 2)}, tmp_path / "best.pt")
    described = Run(tmp_path / "best.pt").info()
    assert (described["kind"], described["tensors"], described["parameters"]) == (
        "checkpoint",
        1,
        6,
    )


@pytest.mark.parametrize(
    "step", [0.5, 10**400, float("inf"), torch.tensor(float("inf")), 10**16], ids=range(5)
)
def test_a_step_that_is_none_is_one_line(step: object, tmp_path: Path) -> None:
    for text in ("9" * 400, "²"):  # the name tells it
        torch.save({"model": {"w": torch.ones(3)}, "step": text}, tmp_path / "run7.pt")
        assert Run(tmp_path).step == 7
    torch.save({"model": {"w": torch.ones(3)}, "step": step}, tmp_path / "run7.pt")
    with pytest.raises(
        errors.InvalidValueError, match=r"run7.pt: its step is .*; must be a whole number up to"
    ):
        _ = Run(tmp_path).sources


def test_a_step_in_a_name_costs_no_memory(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "initted": torch.tensor(True)}, tmp_path / "0.999999999999.pt")
    with pytest.raises(errors.InvalidValueError, match="makes more than 20,000,000 updates"):
        import_checkpoints(
            tmp_path, None, dry_run=True, sigma_rels=(0.05,), update_every=1, update_after_step=1
        )
    averaged = {"decay": 0.9, "num_updates": 10**12, "shadow_params": [torch.ones(3)]}
    torch.save(
        {"model": {"a": torch.ones(3)}, "ema": averaged, "step": 10**12}, tmp_path / "ordinary.pt"
    )
    with pytest.raises(errors.InvalidValueError, match="makes more than 20,000,000 updates"):
        _ = Run(tmp_path / "ordinary.pt").sources


def test_outputs_in_a_folder_of_checkpoints_are_none(tmp_path: Path) -> None:
    """A command can be repeated although its output exists."""
    filled(tmp_path, 1, 2)
    for _ in range(2):
        Run(tmp_path).write(0.2, tmp_path / "average-3.safetensors", overwrite=True)
        Run(tmp_path).write(0.2, tmp_path / "averages", overwrite=True, layout="sharded")
        assert [one["file"] for one in Run(tmp_path).info()["checkpoints"]] == [
            "step1.pt",
            "step2.pt",
        ]
    assert Run(tmp_path / "*[0-9].*").step == 2
    with pytest.raises(errors.DirectoryError, match="holds no checkpoints"):
        _ = Run(tmp_path / "average-*").sources


def test_tensors_can_be_chosen(tmp_path: Path, imported: Imported) -> None:
    for step in (1, 2):
        tied = torch.full((4,), float(step))
        model = {
            "model.a": tied,
            "model.b": tied,
            "model.c": torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1) * step,
        }
        content = {"state_dict": model | {"loss.w": torch.ones(2)}, "hyper": {"lr": 0.1}}
        torch.save(content, tmp_path / f"step{step}.ckpt")
    assert set(Run(tmp_path).tensors) == {"model.a", "model.b", "model.c", "loss.w"}
    run = imported(tmp_path, prefix="model.")
    assert set(run.tensors) == {"a", "b", "c"}
    assert run.sources[0].aliases == {"b": "a"}
    assert (
        run.average(0.2, t=1)["c"].tolist()
        == torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1).tolist()
    )
    assert set(imported(tmp_path, include="model.*", exclude=["*.b"]).tensors) == {
        "model.a",
        "model.c",
    }
    assert set(imported(tmp_path, prefix="state_dict.loss.").tensors) == {"w"}
    with pytest.raises(errors.InvalidValueError, match=r"include 'x\.\*': matches no tensor"):
        _ = imported(tmp_path, include="x.*").tensors
    with pytest.raises(errors.InvalidValueError, match="include and exclude: leave no tensor"):
        _ = imported(tmp_path, exclude="*").tensors
    with pytest.raises(
        errors.FileFormatError, match=r"name begins with 'x\.'; it has 'state_dict.model.a'"
    ):
        _ = imported(tmp_path, prefix="x.").tensors


UNREADABLE: list[tuple[dict[str, Any], str]] = [
    (
        {"state_dict": {"s": torch.ones(2).to_sparse()}, "x": torch.ones(2)},
        r"tensor 'state_dict\.s': is of a kind that is not read \('sparse_t",
    ),
    (
        {"state_dict": {"c": torch.ones(2, dtype=torch.complex128)}},
        "of ComplexDoubleStorage, which is not read",
    ),
    (
        {"actor": {"w": torch.ones(2)}, "critic": {"w": torch.ones(2)}},
        "it has tensors under 'actor', 'critic'",
    ),
]


@pytest.mark.parametrize(("content", "reason"), UNREADABLE, ids=["sparse", "complex", "two models"])
def test_tensors_that_are_not_read_are_named(
    content: dict[str, Any],
    reason: str,
    tmp_path: Path,
) -> None:
    torch.save(content, tmp_path / "step3.ckpt")
    with pytest.raises(errors.FileFormatError, match=reason):
        _ = Run(tmp_path).tensors


class AmbiguousNames(torch.nn.Module):
    """A module whose parts have names that checkpoints use for something else."""

    def __init__(self, fill: int) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        self.head = torch.nn.ModuleDict({"x": torch.nn.Linear(2, 1)})
        self.scale = torch.nn.Parameter(torch.full((1,), float(fill)))
        self.register_buffer("table", torch.ones(3), persistent=False)


def trainer_state(step: int) -> dict[str, Any]:
    """Return the state of a trainer, as Composer and torch's own tutorial store it."""
    adam = {"Adam": {"state": {"w": {"exp_avg": torch.ones(3)}}}}
    return {"model": {"w": torch.full((3,), float(step))}, "optimizers": adam}


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_module_is_read(is_alone: bool, tmp_path: Path) -> None:
    for step in (1, 2):
        module = AmbiguousNames(step)
        content = module if is_alone else {"epoch": 9, "model": module, "optimizer": {"a": 1}}
        torch.save(content, tmp_path / f"step{step}.pt")
    made = Run(tmp_path).average(0.2, t=1)
    assert made.keys() == module.state_dict().keys()
    assert made["scale"] == 1


def test_a_traced_module_is_read(tmp_path: Path) -> None:
    torch.save(torch.fx.symbolic_trace(torch.nn.Linear(2, 1)), tmp_path / "step1.pt")
    assert Run(tmp_path).tensors.keys() == {"weight", "bias"}


def test_the_model_is_found_in_the_state_of_a_trainer(tmp_path: Path) -> None:
    for step in (1, 2):
        content = {"state": trainer_state(step), "rng": [{"cuda": torch.ones(5)}]}
        torch.save(content, tmp_path / f"step{step}.pt")
    assert Run(tmp_path).average("last:2").keys() == {"w"}


def test_the_model_is_found_in_a_distributed_state_of_a_trainer(tmp_path: Path) -> None:
    for step in (1, 2):
        distributed(tmp_path / f"step-{step}", {"app": trainer_state(step)})
    assert Run(tmp_path).average("last:2")["w"].tolist() == [1.5] * 3


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
def test_objects_of_any_class_may_accompany_the_weights(protocol: int, tmp_path: Path) -> None:
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
    for zipped in (True, False)[: 2 if protocol > 2 else 1]:  # before, a pickle has bytes as text
        model = {
            "w": torch.arange(5.0),
            "v": torch.ones(2, 2)[1],
            "n": torch.tensor([1, 2], dtype=torch.uint16),
        }
        content = {"args": objects, "step": 7, "state_dict": model}
        if zipped:
            torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
        else:
            (tmp_path / "x.pt").write_bytes(pickle.dumps(content, protocol))
        run = Run(tmp_path / "x.pt")
        assert run.step == 7
        assert {name: value.tolist() for name, value in run.average(0.2).items()} == {
            "w": [*range(5)],
            "v": [1, 1],
            "n": [1, 2],
        }


ONES = torch.ones(2, 3)
DIFFERENCES: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]] = [
    ({"a": ONES}, {"a": ONES, "b": ONES + 1}, "tensor 'b' is missing in step1.pt"),
    ({"a": ONES}, {"a": ONES.T}, r"tensor 'a' has the shapes \[2, 3\] and \[3, 2\]"),
    ({"a": ONES}, {"a": ONES.long()}, "tensor 'a' is average of F32 and copy of I64"),
    ({"a": ONES, "b": ONES}, {"a": ONES, "b": ONES + 1}, "they tie different names together"),
]


@pytest.mark.parametrize(("first", "second", "difference"), DIFFERENCES)
def test_two_models_never_mix(
    first: dict[str, torch.Tensor],
    second: dict[str, torch.Tensor],
    difference: str,
    tmp_path: Path,
) -> None:
    for step, tensors in enumerate((first, second), 1):
        torch.save(tensors, tmp_path / f"step{step}.pt")
    with pytest.raises(errors.MismatchError, match=f"step1.pt and .*step2.pt.* {difference}"):
        _ = Run(tmp_path).sources


def test_dtypes_may_differ(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save({"a": ONES.half() if step == 2 else ONES}, tmp_path / f"step{step}.pt")
    assert Run(tmp_path / "step*").average(0.2)["a"].dtype == torch.float16


def test_a_file_that_changes_or_shrinks_is_an_error(tmp_path: Path) -> None:
    run = Run(filled(tmp_path, 1, 2, 3, size=1000))
    source = run.sources[0]
    path = tmp_path / "step1.pt"
    torch.save({"w": torch.full((1000,), 7.0)}, path)
    with (
        pytest.raises(errors.FileFormatError, match="was replaced while it was being used"),
        source,
    ):
        pass
    with (
        pytest.raises(errors.FileFormatError, match="was changed while it was being read"),
        run.sources[0],
    ):
        path.write_bytes(path.read_bytes())
    source = run.sources[0]
    with pytest.raises(errors.FileFormatError, match="became shorter while it was read"), source:
        os.truncate(path, 3000)
        source.tensor("w")
    path.unlink()
    with pytest.raises(errors.VanishedError), source:
        pass
    assert [one.t for one in run.sources] == [2, 3]


def test_each_checkpoint_has_a_name_of_its_own(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / f"step{step}").mkdir()
        save_file(
            {"a": torch.full((3,), float(step))}, tmp_path / f"step{step}" / "model.safetensors"
        )
        averages = {"state.a.ema_params": torch.zeros(3)}
        distributed(
            tmp_path / f"iter-{step}",
            {"a": torch.full((3,), float(step)), "ema_optimizer": averages},
        )
    run = Run(tmp_path / "step*" / "model.safetensors")
    assert [source.name for source in run.sources] == [
        "step10/model.safetensors",
        "step20/model.safetensors",
    ]
    run = Run(tmp_path / "iter-*")
    assert [source.name for source in run.sources] == [
        "iter-10",
        "iter-10 (average)",
        "iter-20",
        "iter-20 (average)",
    ]
    assert run.average("last:2")["a"].tolist() == [15.0] * 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_average_is_written_for_torch_distributed(tmp_path: Path, ema: Ema) -> None:
    out = tmp_path / "out"
    command = (
        "synthesize",
        filled(tmp_path / "ck", 1, 2, 3),
        "--layout",
        "dcp",
        "--out",
        out,
        "--sigma-rel",
    )
    for width, option in (("0.2", "--dtype=keep"), ("0.1", "--overwrite")):
        assert ema(*command, width, option).code == 0
        found = {"w": torch.zeros(3)}
        dcp.load(found, checkpoint_id=str(out), no_dist=True)
        assert torch.equal(found["w"], Run(tmp_path / "ck").average(float(width))["w"])
    assert "already exists, and holds '.metadata'" in ema(*command, "0.2").error
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_file_of_a_nan_is_named_wherever_it_is(tmp_path: Path) -> None:
    """The file is named even if no sample has the element."""
    for step in (1, 2):
        tensors = {name: torch.full((1_200_000,), float(step)) for name in ("v", "w", "x")}
        if step == 1:
            tensors["w"][3] = float("nan")
        save_file(tensors, tmp_path / f"step{step}.safetensors")
    with pytest.raises(
        errors.NonFiniteError, match=r"step1.safetensors: tensor 'w': holds nan or infinity"
    ):
        Run(tmp_path).average(0.2)


# --- steps in names: plain digits are read, numbers that may mean something else are refused

READ = {
    "checkpoint-500": 500, "global_step1000": 1000, "iter_0005000": 5000, "s400": 400,
    "epoch=3-step=1500-v1": 1500, "step_1000_loss_0.25": 1000, "model-7b-step-1000": 1000,
    "ckpt_5": 5, "ddpm-timesteps-1000-ckpt-500": 500, "checkpoint-5-step-1000": 1000,
    "1000_steps": 1000, "step-20240105": 20240105, "run-2024-01-05-step-7": 7,
}  # fmt: skip
"""Names with a step."""

REFUSED = {
    "step_1_000": "'1_000' may be something else", "1_000_steps": "'1_000' may",
    "step-1.5k": "'1.5' may", "step-1,000": "'1,000' may", "v1.5": "'v1.5' may",
    "model-fp16": "'fp16' may", "100kimg": "'100kimg' may", "model-1M-steps": "'1M' may",
    "step_1e5": "'1e' may", "llama-7B": "'7B' may", "checkpoint-7b": "'7b' may",
    "20240105": "'20240105' may be a date", "checkpoint-20240105": "'20240105' may be a date",
    "checkpoint-2024-01-05": "'2024-01-05' may", "llama-1B-600k": "or several",
    "00010-of-00020": "or several", "step²": "it has no number, or several",
}  # fmt: skip
"""Names that may mean something else, and parts of their errors."""


def save_step(folder: Path, *names: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        save_file({"w": torch.full((3,), float(number))}, folder / f"{name}.safetensors")
    return Run(folder)


@pytest.mark.parametrize("name", READ)
def test_a_name_tells_its_step(tmp_path: Path, name: str) -> None:
    assert save_step(tmp_path / "files", name).step == READ[name]
    save_step(tmp_path / "folders" / name, "model")
    assert Run(tmp_path / "folders").step == READ[name]
    if re.search("step|checkpoint-|iter|ckpt", name):  # the folder of a file, only with such a word
        assert Run(tmp_path / "folders" / name / "model.safetensors").step == READ[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_may_mean_something_else_is_refused(tmp_path: Path, name: str) -> None:
    reason = f"{name}.safetensors: .*{REFUSED[name]}.*import with `step_from`"
    with pytest.raises(errors.InvalidValueError, match=reason):
        _ = save_step(tmp_path, name).step


def test_a_number_of_another_folder_is_no_step(tmp_path: Path) -> None:
    with pytest.raises(
        errors.InvalidValueError, match=r"best.safetensors: neither .* import with `step_from`"
    ):
        _ = save_step(tmp_path / "exp2024", "best").step


def test_a_number_without_a_word_is_left_out_next_to_those_with_a_word(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = save_step(tmp_path, "step100", "step200", "best-2")
    assert [source.step for source in run.sources] == [100, 200]
    assert "left out: best-2.safetensors (another kind of number)" in caplog.text


def test_a_pattern_finds_numbers_as_people_write_them(tmp_path: Path) -> None:
    """The remedy for every name that is refused."""
    save_step(tmp_path, "step_1_000", "step_2_000", "step_3.5k", "step_4,000")
    run = Run(
        import_checkpoints(tmp_path, tmp_path / "run", step_from=r"step_([\d._,k]+)\.").out or ""
    )
    assert [source.step for source in run.sources] == [1000, 2000, 3500, 4000]
    for pattern in (r"step(_1_000)", r"(st)ep"):
        with pytest.raises(errors.InvalidValueError, match="finds no number in"):
            import_checkpoints(tmp_path, None, dry_run=True, step_from=pattern)


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
    ("kind", "ranks", "writer"), [("fsdp", 3, "own"), ("fsdp-tp", 4, "safetensors")]
)
def test_chunks_of_processes_make_the_tensors(
    kind: str,
    ranks: int,
    writer: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    check_group(TRAIN, ranks, tmp_path, kind, writer)
    run = Run(tmp_path / "run")
    single = Net()
    states = {}
    for step in range(1, 4):
        move(single, step)
        states[step] = {name: value.clone() for name, value in single.state_dict().items()}
    check_average(run, states, 0.25, exact=1e-6)
    last = run.average(Mean(1))
    assert all(torch.equal(last[name], value) for name, value in single.state_dict().items())
