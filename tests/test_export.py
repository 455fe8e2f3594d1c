"""Exports in layouts that other libraries read; each is complete or absent."""

import errno
import json
import os
import resource
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from checking import assert_same_tensors, load_output, refused
from factories import (
    INDEX,
    RUN_ID,
    contents,
    read_output,
    split_snapshot,
    write_output,
    write_snapshot,
)
from safetensors.torch import load_file, save_file
from snapshots.recorded import call_number, failing
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from posthoc_cli import Run, export_file
from posthoc_cli.errors import (
    FileFormatError,
    InexactError,
    InvalidValueError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    WriteError,
)
from posthoc_cli.export.writing import OutputOptions
from posthoc_cli.snapshots.snapshot import Used

Tensors = dict[str, torch.Tensor]

WEIGHTS: Tensors = {
    "a": torch.arange(10) / 3,
    "b": torch.arange(20).reshape(4, 5) / 7,
    "var": torch.tensor([1 / 3, 2 / 3]),  # a buffer, which is never cast
    "count": torch.tensor(7),
}
COPIES = ("var", "count")


def exported(
    tmp_path: Path,
    tensors: Tensors = WEIGHTS,
    copies: tuple[str, ...] = COPIES,
    **options: Any,
) -> Tensors:
    source = write_output(tmp_path / "in.safetensors", tensors, copies)
    export_file(source, tmp_path / "out.safetensors", overwrite=True, **options)
    return load_output(tmp_path / "out.safetensors")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_output(tmp_path / "in.safetensors", WEIGHTS, COPIES)


OUTPUTS = {"safetensors": "out.safetensors", "sharded": "out", "pt": "out.pt"}
SIZE = {"sharded": "100"}
"""Largest size of a shard in the layouts with shards."""


# --- layouts
# ---------------------------------------------------------------------------------------


def size_of(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("layout", "dtype", "own"),
    [
        ("safetensors", None, torch.float32),
        ("sharded", "bf16", torch.bfloat16),
        ("pt", torch.float64, torch.float64),
    ],
)
def test_every_layout_holds_averages_in_the_dtype_and_copies_in_their_own(
    tmp_path,
    layout,
    dtype,
    own,
    source,
):
    expected = dict(WEIGHTS)
    for name in ("a", "b"):
        expected[name] = WEIGHTS[name].to(own)
    out = tmp_path / OUTPUTS[layout]
    written = list[int]()

    def bar(*_: object) -> Any:
        return nullcontext(written.append)

    size = SIZE.get(layout)
    made = export_file(source, out, dtype=dtype, max_shard_size=size, prefix="n.", progress=bar)
    renamed = {f"n.{name}": value for name, value in expected.items()}
    assert_same_tensors(load_output(out), renamed)
    assert made.tensors == 4
    assert made.from_base == 0
    assert sum(written) == size_of(WEIGHTS)
    assert made.nbytes == size_of(expected)


def test_a_prefix_is_added_after_another_is_removed(tmp_path):
    state = {"model.w": torch.ones(1), "b": torch.ones(2)}
    renamed = exported(tmp_path, state, (), prefix="n.", strip_prefix="model.")
    assert renamed.keys() == {"n.w", "n.b"}
    with refused("strip_prefix", "make no two alike"):
        exported(tmp_path, state | {"w": torch.ones(1)}, (), strip_prefix="model.")


def test_a_folder_of_shards_is_laid_out_as_the_hugging_face_libraries_do(tmp_path, source):
    export_file(source, tmp_path / "out", max_shard_size="100")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count > 1
    assert shards == [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    assert index["metadata"]["total_size"] == 40 + 80 + 8 + 8
    assert index["weight_map"].keys() == WEIGHTS.keys()
    for shard in shards:
        with safetensors.safe_open(tmp_path / "out" / shard, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
        assert size_of(load_file(tmp_path / "out" / shard)) <= 100
    export_file(source, tmp_path / "one")
    assert contents(tmp_path / "one").keys() == {"model.safetensors"}


def test_the_name_decides_the_layout_unless_it_is_given_and_must_not_have_the_ending_of_another(
    tmp_path,
):
    def layout_of(name: str, layout: str | None = None) -> str:
        return OutputOptions(layout=layout).layout_of(tmp_path / name)

    assert layout_of("x.safetensors") == "safetensors"
    assert layout_of("x.pth") == "pt"
    assert layout_of("x") == "sharded"
    assert layout_of("x.y", "pt") == "pt"
    for name, layout in (("x.pt", "safetensors"), ("x.bin", "sharded")):
        with refused(f"{tmp_path}/{name}", layout):
            layout_of(name, layout)
        (tmp_path / name).mkdir()  # a folder may have any name
        assert layout_of(name, layout) == layout
    (tmp_path / "v1.5").mkdir()
    assert layout_of("v1.5") == "sharded"


SIZES = {
    "5GB": 5_000_000_000,
    "1.5 tb": 1_500_000_000_000,
    "500MiB": 500 << 20,
    "123456": 123_456,
    **dict.fromkeys(("", "0", "-1GB", "5 G", "nan", "1e30TB"), None),
}


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_a_number_with_a_unit(size):
    with refused("max_shard_size") if SIZES[size] is None else nullcontext():
        assert OutputOptions(max_shard_size=size).shard_bytes == SIZES[size]


# --- dtypes
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "stored", "dtype", "message"),
    [
        (70_000.0, torch.float32, "float16", "tensor 'bad': torch.float16 cannot hold .* 70000"),
        (1e300, torch.float64, "float32", "tensor 'bad': torch.float32 cannot hold .* 1e.300"),
        (float("nan"), torch.float32, None, "{source}: tensor 'bad': holds nan or infinity"),
        (float("-inf"), torch.bfloat16, "float64", "{source}: tensor 'bad': holds nan or inf"),
    ],
)
def test_an_average_that_is_not_finite_is_refused_by_name_and_nothing_is_written(
    tmp_path,
    value,
    stored,
    dtype,
    message,
):
    values = {
        "w": torch.ones(2),
        "bad": torch.tensor([value], dtype=stored),
    }
    snapshot = write_snapshot(tmp_path, 10, 0.05, RUN_ID, values)
    for source in (snapshot, write_output(tmp_path / "in.safetensors", values)):
        before = contents(tmp_path)
        with pytest.raises(NonFiniteError, match=message.format(source=source)):
            export_file(source, tmp_path / "out.safetensors", dtype=dtype)
        assert contents(tmp_path) == before


def test_infinity_in_a_buffer_or_in_the_file_of_another_program_is_kept(tmp_path):
    """Attention masks hold infinity."""
    mask = {"mask": torch.tensor([0.0, float("-inf")])}
    codes = torch.tensor([1.0, -0.5]).to(torch.float8_e4m3fn)
    assert_same_tensors(exported(tmp_path, mask, ("mask",), dtype="fp16"), mask)
    foreign = tmp_path / "foreign.safetensors"
    out = tmp_path / "b.safetensors"
    save_file({**mask, "codes": codes}, foreign)
    export_file(foreign, out, dtype="fp16")
    expected = {"mask": mask["mask"].half(), "codes": codes.half()}
    assert_same_tensors(load_output(out), expected)


# --- snapshots
# -------------------------------------------------------------------------------------


def test_a_snapshot_is_exported_in_the_models_own_dtypes_under_all_names(tmp_path):
    w = torch.tensor([1 / 3, -2.0]).half()
    var = torch.tensor([0.1])
    fields = {
        "tensors": {"w": "average F32", "var": "copy F32"},
        "aliases": {"tied": "w", "var too": "var"},
    }
    source = write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, {"w": w, "var": var}, **fields)
    shutil.copytree(tmp_path / "run", tmp_path / "split")
    folder = split_snapshot(tmp_path / "split" / source.name, 2)
    out = tmp_path / "out.safetensors"
    wide = w.float()
    expected = {"w": wide, "tied": wide, "var": var, "var too": var}
    for path in (source, folder):
        export_file(path, out, overwrite=True)
        assert_same_tensors(load_output(out), expected)
        info = read_output(out)
        assert info.sigma_rel == 0.05
        assert info.t == 10
        assert info.method == "tracked"
        assert info.profile_error == 0
        assert info.snapshots == (Used(path.name, 1.0),)
        assert sorted(info.copies) == ["var", "var too"]
    export_file(source, tmp_path / "half.pt", dtype="float16")
    expected |= {"w": w, "tied": w}
    assert_same_tensors(load_output(tmp_path / "half.pt"), expected)


# --- a base
# ----------------------------------------------------------------------------------------

BASE: Tensors = {
    "a": torch.zeros(10),
    "frozen": torch.arange(3) / 4,
    "ids": torch.arange(4),
}


def test_a_pt_file_has_a_renamed_tensor_beside_one_of_the_base_with_its_old_name(tmp_path):
    ones = torch.ones(2)
    source = write_output(tmp_path / "in.safetensors", {"w": ones}, ())
    base = tmp_path / "base.safetensors"
    out = tmp_path / "out.pt"
    save_file({"ema.w": 0 * ones, "w": 3 * ones}, base)
    export_file(source, out, base=base, prefix="ema.")
    assert_same_tensors(load_output(out), {"ema.w": ones, "w": 3 * ones})


def write_base(tmp_path: Path) -> Path:
    base = tmp_path / "base.safetensors"
    save_file(BASE, base)
    return base


def with_an_index(tmp_path: Path) -> Path:
    """Return a folder with a file for each tensor of the base."""
    base = tmp_path / "base"
    base.mkdir()
    for name, tensor in BASE.items():
        save_file({name: tensor}, base / f"{name}.safetensors")
    index = json.dumps({"weight_map": {name: f"{name}.safetensors" for name in BASE}})
    (base / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    return base


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (write_base, "pt"),
        (with_an_index, "sharded"),
    ],
)
def test_a_base_adds_the_tensors_that_were_not_averaged(
    tmp_path,
    make,
    layout,
    source,
):
    """The base can be exported itself; a dtype is that of its floating-point tensors, too."""
    out = tmp_path / OUTPUTS[layout]
    base = make(tmp_path)
    made = export_file(source, out, base=base, max_shard_size=SIZE.get(layout))
    assert_same_tensors(load_output(out), {**BASE, **WEIGHTS})
    assert made.tensors == 6
    assert made.from_base == 2
    export_file(base, out, dtype="bf16", overwrite=True)
    cast = {name: tensor.bfloat16() for name, tensor in BASE.items()}
    assert_same_tensors(load_output(out), {**cast, "ids": BASE["ids"]})


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"a": BASE["a"]}, "'ids' is not in it, as the index says"),
        (BASE, r"is in .* too"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, tensors, fault):
    base = with_an_index(tmp_path)
    save_file(tensors, base / "ids.safetensors")
    with pytest.raises(FileFormatError, match=fault):
        export_file(base, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(5, 2)}, r"tensor 'a' has the shape \[10\], the average \[5, 2\]"),
        (
            {"model.a": torch.ones(10)},
            "none of the averaged tensors is in it.*'a'.*'model.a'.*rename",
        ),
    ],
)
def test_a_base_of_another_model_is_refused(tmp_path, tensors, message):
    source = write_output(tmp_path / "in.safetensors", tensors)
    base = write_base(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(MismatchError, match=message) as caught:
        export_file(source, tmp_path / "out", base=base)
    assert str(base) in str(caught.value)
    assert contents(tmp_path) == before


# --- existing outputs
# ------------------------------------------------------------------------------


def test_a_replaced_folder_holds_the_new_model_and_no_file_of_the_old_one(tmp_path):
    """Some libraries look for model.safetensors before an index, others for the index first."""
    out = tmp_path / "out"
    new = write_output(tmp_path / "new.safetensors", WEIGHTS, COPIES)
    others = {f"old{k}": torch.full((10,), float(k)) for k in range(6)}
    old = write_output(tmp_path / "old.safetensors", others)
    for old_size, new_size in (
        ("60", "100"),
        ("100", "5GB"),
        ("5GB", "60"),
    ):
        export_file(old, out, max_shard_size=old_size, overwrite=True)
        export_file(new, out, max_shard_size=new_size, overwrite=True)
        export_file(new, tmp_path / new_size, max_shard_size=new_size)
        assert contents(out) == contents(tmp_path / new_size)
        assert_same_tensors(load_output(out), WEIGHTS)


@pytest.mark.parametrize("layout", ["sharded", "dcp"])
def test_a_folder_that_holds_other_files_is_not_replaced(
    tmp_path,
    monkeypatch,
    layout,
    source,
):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    (tmp_path / "folder" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for out in ("config", "folder", "link", "."):
        with pytest.raises(
            OutputExistsError,
            match=r"config\.json|model\.safetensors|is a file or a link|working",
        ):
            export_file(source, Path(out), layout, overwrite=True)
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    export_file(source, Path("empty"), layout)
    assert contents(tmp_path / "empty")


@pytest.mark.parametrize("at", [0, 2])
def test_an_interruption_of_a_pt_file_stays_an_interruption_and_leaves_nothing(tmp_path, at):
    """torch's writer itself raises an error about unexpected positions."""
    source = write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, {"w": torch.ones(100_000)})
    with failing("write", KeyboardInterrupt(), call_number(at)), pytest.raises(KeyboardInterrupt):
        export_file(source, tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_for_torch_distributed_that_cannot_be_written_is_named(tmp_path, run):
    refused = pytest.raises(WriteError, match=f"{tmp_path}/out: cannot be written: no space left")
    with failing("make_directory", errno.ENOSPC), refused:
        run.write(0.2, tmp_path / "out", layout="dcp")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_for_torch_distributed_is_written_with_the_function_of_older_releases(
    tmp_path,
    run,
    monkeypatch,
):
    """The `save` of torch 2.4 to 2.6 has no argument that leaves a process group alone."""

    def save_of_26(state_dict: object, *, checkpoint_id: object = None) -> None:
        pytest.fail("would wait for all processes of a group")

    run.write(0.1, tmp_path / "new", layout="dcp")
    with pytest.raises(OutputExistsError, match=r"already exists, and holds '\.metadata'"):
        run.write(0.2, tmp_path / "new", layout="dcp")
    run.write(0.2, tmp_path / "new", layout="dcp", overwrite=True)
    monkeypatch.setattr(state_dict_saver, "save", save_of_26)
    run.write(0.2, tmp_path / "old", layout="dcp")
    for name in ("new", "old"):
        dcp_to_torch_save(tmp_path / name, tmp_path / f"{name}.pt")
    new = load_output(tmp_path / "new.pt")
    old = load_output(tmp_path / "old.pt")
    assert_same_tensors(new, old)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("name", "layout", "limit"),
    [
        ("out", "dcp", 0),
        ("out", "dcp", 600),
        ("out", "dcp", 100_000),
        ("out.pt", None, 100_000),
    ],
)
def test_a_disk_that_is_full_is_named_and_nothing_is_left(tmp_path, name, layout, limit):
    """At the first bytes, or within a tensor: torch's writer itself raises an error about
    unexpected positions."""
    source = write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, {"w": torch.ones(100_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(WriteError, match=f"{name}: cannot be written: file too large"):
            export_file(source, tmp_path / name, layout=layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- files of a model folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        weights = torch.full((3,), float(step))
        save_file({"w": weights}, tmp_path / f"run/step{step}.safetensors")
    return Run(tmp_path / "run")


def make_folder(folder: Path) -> Path:
    (folder / "assets").mkdir(parents=True)
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "assets/merges.txt", ".gitattributes"):
        (folder / name).write_text(f'"{name}"')
    return folder


def as_in_cache(folder: Path, repository: Path) -> Path:
    """The same folder as it is in the Hub's cache: links to blobs."""
    revision = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for number, name in enumerate(sorted(contents(folder))):
        blob = repository / "blobs" / f"{number:064x}"
        (folder / name).rename(blob)
        link = revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return revision


CACHED = f"models--a--b/snapshots/{'0' * 40}"


def texts(folder: Path) -> dict[str, bytes]:
    found = contents(folder)
    return {name: found[name] for name in found if name.endswith((".json", ".txt"))}


def test_a_folder_of_the_hubs_cache_is_copied_as_files(tmp_path, run):
    """So are a folder with links to its own files, and a link to a folder."""
    wanted = texts(make_folder(tmp_path / "plain"))
    (tmp_path / "plain/.git").mkdir()
    for name in (".git/config", "pytorch_model.bin"):  # neither is copied
        (tmp_path / "plain" / name).symlink_to("/dev/zero")
    like = as_in_cache(make_folder(tmp_path / "made"), tmp_path / "hub" / "models--a--b")
    (tmp_path / "plain/vocab.json").symlink_to("tokenizer.json")
    (tmp_path / "link").symlink_to("plain")
    state = {"w": torch.zeros(3), "frozen": torch.ones(2)}
    save_file(state, tmp_path / "plain/model.safetensors")
    for source, kept, more in (
        (like, [], {}),
        (tmp_path / "link", ["frozen"], {"vocab.json": b'"tokenizer.json"'}),
    ):
        out = tmp_path / f"copy of {source.name}"
        report = run.write(0.2, out, like=source)
        assert report.copied.kept == kept
        assert texts(out) == wanted | more
        for path in out.rglob("*"):
            assert not path.is_symlink()
            assert path.name != ".git"
        made = load_file(out / "model.safetensors")
        assert torch.equal(made["w"], run.average(0.2)["w"])


def test_the_rounding_to_a_folders_dtype_is_part_of_the_error(tmp_path, run):
    like = make_folder(tmp_path / "like")
    save_file({"w": torch.zeros(3, dtype=torch.bfloat16)}, like / "model.safetensors")
    inexact = r"the predicted error is 0\.15\d* %, above the accepted 0\.1 %"
    with pytest.raises(InexactError, match=inexact):
        run.write(0.28, tmp_path / "new", max_error=1e-3, like=like)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "target", "like"),
    [
        ("extra.json", "../outside/secret.json", "plain"),
        ("extra.json", "/dev/zero", "plain"),
        ("extra.json", "extra.json", "plain"),
        ("extra.json", "assets", "plain"),
        ("assets/a.json", "../../outside/secret.json", "plain"),
        ("extra.json", "nowhere", CACHED),
        ("model.safetensors", "../../../outside/model.safetensors", CACHED),
    ],
)
def test_no_link_out_of_the_folder_is_followed(
    tmp_path,
    run,
    name,
    target,
    like,
):
    """A secret would be in a folder that is uploaded; a device would fill the disk or block."""
    as_in_cache(make_folder(tmp_path / "made"), tmp_path / "models--a--b")
    make_folder(tmp_path / "plain")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text("a token")
    save_file({"w": torch.zeros(3)}, outside / "model.safetensors")
    path = tmp_path / like / name
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    check_refused(tmp_path, run, tmp_path / like, name)


def check_refused(tmp_path: Path, run: Run, like: Path, name: str) -> None:
    leads_out = f"like {like}: {name} is not a file of this folder, or leads out"
    with pytest.raises(InvalidValueError, match=leads_out):
        run.write(0.2, tmp_path / "new", like=like)
    assert not (tmp_path / "new").exists()
    assert not [*tmp_path.glob(".*")]


@pytest.mark.timeout(60)
def test_a_pipe_in_the_folder_is_not_read(tmp_path, run):
    like = make_folder(tmp_path / "like")
    os.mkfifo(like / "a pipe.json")
    check_refused(tmp_path, run, like, "a pipe.json")


def test_paths_may_be_texts(tmp_path):
    source = write_output(tmp_path / "part.safetensors", {"a": BASE["a"]})
    base = write_base(tmp_path)
    out = f"{tmp_path}/out.safetensors"
    export_file(str(source), out, base=str(base))
    assert_same_tensors(load_file(out), BASE)
    with refused("source", "3: must be a path"):
        export_file(3, out, overwrite=True)  # type: ignore[arg-type]
