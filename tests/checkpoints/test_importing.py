"""A run that refers to other programs' files: its content, files that change, hostile manifests."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from checking import assert_same_tensors, refused
from checkpoint_layouts import STEPS, filled
from factories import contents
from safetensors.torch import save_file
from saved import write_each

from posthoc_cli import Run, files, import_checkpoints
from posthoc_cli.checkpoints.settings import UNSPECIFIED
from posthoc_cli.errors import (
    FileFormatError,
    OutputExistsError,
)

Write = Callable[[str], Path]
MANIFEST = "ema-import.json"


def test_an_import_and_its_files_can_be_moved_together_only(write, tmp_path, ema):
    """A copy, whose files have other dates, works too, also behind a link; the steps are those that
    the import found."""
    both = tmp_path / "both"
    both.mkdir()
    write("safetensors").rename(both / "walk7")
    done = import_checkpoints(both / "walk7", both / "new", step_from=r"both/.*step(\d+)")
    assert repr(done) == f"ImportReport({str(done.out)!r}: {len(done.checkpoints)} x weights)"
    wanted = Run(both / "new").average(0.2)
    copied = tmp_path / "copied"
    shutil.copytree(both, copied)
    shutil.rmtree(both)
    link = tmp_path / "link"
    link.symlink_to(copied / "new")
    assert_same_tensors(Run(os.path.relpath(link)).average(0.2), wanted)
    apart = tmp_path / "apart"
    (copied / "new").rename(apart)
    done = ema("synthesize", apart, "--sigma-rel", "0.2", "--out", tmp_path / "o.pt")
    assert done.error.startswith(f"{tmp_path / 'walk7' / 'step100.safetensors'}: is missing")


def replace(path):
    torch.save({"w": torch.full((3000,), -1.0)}, path)


def turn_into_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (Path.unlink, 1),
        (replace, 1),
        (turn_into_a_pipe, 2),
    ],
)
def test_a_file_that_is_not_the_one_imported_is_named(change, code, tmp_path, ema):
    new = tmp_path / "new"
    folder = filled(
        tmp_path / "ck",
        1,
        2,
        3,
        size=3000,
    )
    path = folder / "step2.pt"
    import_checkpoints(folder, new)
    change(path)
    done = ema("info", new)
    assert done.code == code
    assert done.error.startswith(f"{path}: ")
    verified = ema("verify", new)
    assert verified.code == 1
    assert str(path) in verified.out


def test_an_import_of_changed_files_is_written_without_overwrite(tmp_path):
    new = tmp_path / "new"
    folder = filled(tmp_path / "ck", 10, 20, 30, size=3000)
    import_checkpoints(folder, new)
    replace(folder / "step20.pt")
    assert import_checkpoints(folder, new).written
    made = Run(new).average("last:1", t=20)
    assert made["w"].tolist() == [-1.0] * 3000


def test_an_index_that_was_replaced_is_found(write, tmp_path):
    """An index holds the places of the tensors in the other files."""
    folder = write("distributed")
    import_checkpoints(folder, tmp_path / "new")
    path = next(folder.rglob(".metadata"))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0", b"1", 1))
    with refused(path, kind=FileFormatError):
        _ = Run(tmp_path / "new").sources


@pytest.fixture
def folder(write):
    return write("safetensors")


@pytest.fixture
def new(folder, tmp_path):
    """Return an import of the weights without their biases."""
    out = tmp_path / "new"
    import_checkpoints(folder, out, exclude="*.bias")
    return out


def test_the_same_import_again_does_nothing(folder, new, ema):
    before = contents(new)
    again = ema("import", folder, "--exclude", "*.bias", "--out", new, "--json").json
    assert again["written"] is False
    assert len(again["checkpoints"]) == len(STEPS)
    assert contents(new) == before


def test_an_import_with_other_settings_asks(folder, new, ema):
    before = contents(new)
    other = ema("import", folder, "--out", new)
    assert other.error.startswith(f"{new}: is an import of {folder} with other settings")
    assert contents(new) == before
    assert ema("import", folder, "--out", new, "--overwrite").code == 0
    assert any(name.endswith("bias") for name in Run(new).tensors)


def test_an_import_of_another_folder_asks(folder, new):
    with refused(new, str(folder), kind=OutputExistsError):
        import_checkpoints(folder / "step20.safetensors", new, exclude="*.bias")


def test_an_import_adds_new_files_also_beside_an_output(folder, tmp_path, ema):
    new = tmp_path / "new"
    import_checkpoints(folder, new)
    shutil.copy(folder / "step20.safetensors", folder / "step300.safetensors")
    for _ in range(2):
        assert ema("import", folder, "--out", new).code == 0
        run = Run(new)
        assert run.step == 300
        run.write(0.2, tmp_path / "average.safetensors", overwrite=True)
        shutil.copy(tmp_path / "average.safetensors", new)


def test_an_import_replaces_nothing_else(folder, tmp_path, ema):
    for place in (folder, folder / "step20.safetensors"):
        done = ema("import", folder, "--out", place, "--overwrite")
        assert done.error.startswith(f"{place}: ")


def test_a_proposed_import_goes_to_a_folder_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert UNSPECIFIED.command("old").endswith(" --out run")
    Path("run").mkdir()
    Path("run-2").touch()
    assert UNSPECIFIED.command("old").endswith(" --out run-3")


def test_names_without_a_number_are_to_be_changed(tmp_path):
    for name in "ab":
        save_file({"w": torch.ones(9)}, tmp_path / f"{name}.safetensors")
    with refused(tmp_path / "a.safetensors", "leave it out", "step1000.pt"):
        import_checkpoints(tmp_path, tmp_path / "new")


def test_a_dry_run_writes_nothing(folder, tmp_path, ema):
    new = tmp_path / "new"
    done = ema("import", folder, "--out", new, "--dry-run")
    assert done.out.endswith("nothing was written\n")
    assert not new.exists()
    assert ema("import", folder).error.startswith("--out: ")


def test_nothing_that_an_import_refers_to_is_deleted(new, tmp_path, ema):
    before = contents(tmp_path)
    done = ema("prune", new, "--keep", "2", "--yes")
    assert done.code == 2
    assert done.error.startswith(f"{new}: ")
    assert contents(tmp_path) == before


def test_files_behind_links_are_read(weights, tmp_path):
    """As in a cache of models, where their names have no ending."""
    folder = tmp_path / "a b'ü"
    folder.mkdir()
    for step, state in weights.items():
        blob = tmp_path / f"{step * 7:x}"
        torch.save(state, blob)
        (folder / f"step{step}.pt").symlink_to(blob)
    assert [one.step for one in Run(folder).sources] == [*STEPS]


def test_a_name_that_is_no_text_is_refused(tmp_path):
    folder = filled(tmp_path / "ck", 40)
    (folder / "step40.pt").rename(folder / os.fsdecode(b"step40-\xff.pt"))
    with refused(repr(os.fsdecode(b"../ck/step40-\xff.pt"))):
        import_checkpoints(folder / "step40*", tmp_path / "run")


WRONG = [
    ("step_from", r"a-\d+"),
    ("include", [5]),
    ("sigma_rels", 0.1),
    ("update_every", True),
    ("update_after_step", -1),
    ("ema_decay", "5%"),
    ("ema_decay", "half-life:"),
    ("ema_decay", [0.9]),
    ("ema_decay", 1.5),
    ("ema_warmup", "x"),
    ("ema_warmup", "exp:0"),
    ("ema_warmup", "unbiased:3"),
    ("ema_warmup", "cosine:1"),
    ("ema_uncertainty", -0.1),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_setting_that_cannot_be_used_is_named(name, value, tmp_path):
    filled(tmp_path / "ck", 1)
    with refused(name):
        import_checkpoints(tmp_path / "ck", tmp_path / "new", **{name: value})
    assert not (tmp_path / "new").exists()


# --- hostile manifests


def rewritten(path, **changed):
    """Change values of a manifest, or remove those that are None; with a correct checksum."""
    values = json.loads(path.read_text()) | changed
    del values["checksum"]
    values = {key: value for key, value in values.items() if value is not None}
    text = json.dumps(values, separators=(",", ":"))
    values["checksum"] = xxhash.xxh3_64_hexdigest(text.encode())
    path.write_text(json.dumps(values))


def listed(place):
    """Return changes that make a manifest refer to one file, as if it were empty."""
    empty = [0, "0" * 16]
    return {**first(path=place), "files": {place: empty}}


FIRST = "../ck/step1.pt"


def first(**changed):
    """Return changes that make a manifest refer to one checkpoint alone."""
    row = {"path": FIRST, "step": 1, "is_average": False, "names": 0}
    return {"checkpoints": [{**row, "updates": None, **changed}]}


HOSTILE = {
    "a file of the system": listed("/etc/passwd"),
    "a pipe": listed("pipe"),
    "a zero": listed("a\0b"),
    "a url": listed("s3://bucket/x.pt"),
    "no files": {"files": {}},
    "a far step": first(step=10**300),
    "names beyond the list": first(names=7),
    "names that are numbers": {"names": [{"w": 1}]},
    "names of no tensor": {"names": [{"w": "other"}]},
    "an average of no known profile": first(is_average=True),
    "updates by no known rule": first(is_average=True, updates={"rule": {"x": 1}}),
    "updates of a text": first(is_average=True, updates={"rule": {"decay": "x"}}),
    "updates of an infinite rule": first(is_average=True, updates={"rule": {"decay": 1e999}}),
    "no objects": {"checkpoints": [[FIRST, "checkpoints", 1]]},
    "an unknown setting": {"settings": {"x": 1}},
    "a far version": {"version": 4},
    "keys of more": {"files": {FIRST: [1, "x", 2]}},
    "a checkpoint many times": {"checkpoints": first()["checkpoints"] * 50_000},
}


@pytest.fixture
def manifest(tmp_path):
    """Return the manifest of an import of two checkpoints, in a folder with a pipe."""
    out = tmp_path / "new"
    import_checkpoints(filled(tmp_path / "ck", 1, 2), out)
    os.mkfifo(out / "pipe")
    return out / MANIFEST


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_one_line(what, manifest, ema):
    rewritten(manifest, **HOSTILE[what])
    described = ema("info", manifest.parent)
    assert described.code in (1, 2)
    assert described.error
    assert "root:" not in described.error
    verified = ema("verify", manifest.parent)
    assert verified.code in (0, 1, 2)
    assert "Traceback" not in verified.err


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": 1, "a": 2}', b"{}"])
def test_a_malformed_manifest_is_one_line(content, manifest, ema):
    """A new import replaces it."""
    run = manifest.parent
    manifest.write_bytes(content)
    assert ema("info", run).error.startswith(f"{manifest}: ")
    assert ema("import", run.with_name("ck"), "--out", run).code == 0
    assert Run(run).step == 2


def test_a_flipped_digit_of_a_manifest_is_found(manifest):
    content = bytearray(manifest.read_bytes())
    for place in range(0, len(content), 5):
        if chr(content[place]).isalnum():
            content[place] ^= 1
            manifest.write_bytes(content)
            with pytest.raises(FileFormatError):
                _ = Run(manifest.parent).sources
            content[place] ^= 1


def test_a_manifest_has_a_limited_size(manifest):
    os.truncate(manifest, 10**9)
    with refused(manifest, "100,000,000", kind=FileFormatError):
        _ = Run(manifest.parent).sources


@pytest.fixture
def opens(monkeypatch):
    """Return how often each file is opened."""
    counted = Counter[Path]()
    system_open = files.system.open

    def opened(path):
        counted[path] += 1
        return system_open(path)

    monkeypatch.setattr(files.system, "open", opened)
    return counted


@pytest.mark.parametrize("settings", [{"ema_decay": 0.95}, {"ema_warmup": "none"}])
def test_an_import_opens_each_file_once(settings, tmp_path, opens):
    """For its index and its values, where it checks a decay, and where it finds one. An opened run
    needs the index."""
    folder = tmp_path / "x"
    write_each(folder, "{save.step}.pt", lambda save: {"model": save.weights, "ema": save.average})
    import_checkpoints(folder, tmp_path / "run", **settings)
    assert {opens[path] for path in folder.iterdir()} == {1}
    opens.clear()
    _ = Run(tmp_path / "run").sources
    assert {opens[path] for path in folder.iterdir()} == {1}
