"""A run that refers to other programs' files: its content, files that change, hostile manifests."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from checking import assert_same_tensors
from checkpoint_layouts import STEPS, Weights, filled
from ema_command import Ema
from factories import contents
from trained import TIMES, train
from trained import ema as averaged
from trained import write as write_trained

from posthoc_cli import Run, errors, files, import_checkpoints
from posthoc_cli.checkpoints import KINDS
from posthoc_cli.checkpoints.layouts import FIXED, LIBRARIES, TAKES

Write = Callable[[str], Path]
MANIFEST = "ema-import.json"


def test_the_kinds_that_the_command_names_are_those_of_the_table() -> None:
    listed = {library.kind for library in (*LIBRARIES, *FIXED)} | set(TAKES)
    assert listed < set(KINDS)


def test_an_import_and_its_files_can_be_moved_together_only(
    write: Write,
    tmp_path: Path,
    ema: Ema,
) -> None:
    """A copy, whose files have other dates, works too; the steps are those that the import
    found."""
    write("safetensors")
    (tmp_path / "both").mkdir()
    (tmp_path / "run").rename(tmp_path / "both" / "walk7")
    done = import_checkpoints(
        tmp_path / "both" / "walk7", tmp_path / "both" / "new", step_from=r"both/.*step(\d+)"
    )
    assert repr(done) == f"Import({str(done.out)!r}: {len(done.checkpoints)} x weights)"
    wanted = Run(done.out or "").average(0.2)
    shutil.copytree(tmp_path / "both", tmp_path / "copied")
    shutil.rmtree(tmp_path / "both")
    (tmp_path / "link").symlink_to(tmp_path / "copied" / "new")
    for place in (
        tmp_path / "copied" / "new",
        tmp_path / "link",
        Path(os.path.relpath(tmp_path / "link")),
    ):
        assert_same_tensors(Run(place).average(0.2), wanted)
    (tmp_path / "copied" / "new").rename(tmp_path / "apart")
    (tmp_path / "walk8").mkdir()
    reason = (
        f"{tmp_path / 'walk7' / 'step100.safetensors'}: is missing, and "
        f"{tmp_path / 'apart'} refers to it"
    )
    refused = ema(
        "synthesize", tmp_path / "apart", "--sigma-rel", "0.2", "--out", tmp_path / "o.pt"
    )
    assert refused.error == f"{reason}; move both together, or import again"


def _replace(path: Path) -> None:
    torch.save({"w": torch.full((3000,), -1.0)}, path)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "is missing": (lambda path: path.unlink(), "is missing, and"),
    "is shorter": (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        "was replaced, or has changed, since",
    ),
    "is replaced": (_replace, "was replaced, or has changed, since"),
    "is a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is not a regular file"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_not_the_one_imported_is_named(
    change: str,
    tmp_path: Path,
    ema: Ema,
) -> None:
    filled(tmp_path / "ck", 1, 2, 3, size=3000)
    new = tmp_path / "new"
    path = tmp_path / "ck" / "step2.pt"
    assert ema("import", tmp_path / "ck", "--out", new).code == 0
    change_it, reason = CHANGES[change]
    change_it(path)
    for command in (["synthesize", new, "--sigma-rel", "0.2", "--dry-run"], ["info", new]):
        refused = ema(*command)
        assert refused.code == 1
        assert refused.error.startswith(f"{path}: ")
        assert reason in refused.error
    verified = ema("verify", new, "--json")
    assert verified.code == 1
    assert [one["path"] for one in verified.json["files"] if one["state"] == "damaged"] == [
        str(path)
    ]
    path.unlink(missing_ok=True)
    _replace(path)
    # without --overwrite
    assert "wrote a run that refers" in ema("import", tmp_path / "ck", "--out", new).out
    assert Run(new).average("last:1", t=2)["w"].tolist() == [-1.0] * 3000


def test_an_index_that_was_replaced_is_found(write: Write, tmp_path: Path) -> None:
    """An index holds the places of the tensors in the other files."""
    for layout, name in (
        ("transformers", "model.safetensors.index.json"),
        ("distributed", ".metadata"),
    ):
        folder = write(layout)
        import_checkpoints(folder, tmp_path / layout)
        path = next(folder.rglob(name))
        path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
        with pytest.raises(
            errors.FileFormatError, match=f"{name}: was replaced, or has changed, since"
        ):
            _ = Run(tmp_path / layout).sources
        shutil.rmtree(folder)


def test_the_same_import_again_does_nothing_and_others_ask(
    write: Write,
    tmp_path: Path,
    ema: Ema,
) -> None:
    folder = write("safetensors")
    new = tmp_path / "new"
    first = ("import", folder, "--exclude", "*.bias", "--out", new)
    assert ema(*first, "--json").json["written"] is True
    before = contents(new)
    again = ema(*first, "--json").json
    assert (again["written"], len(again["checkpoints"])) == (False, len(STEPS))
    assert contents(new) == before
    other = ema("import", folder, "--out", new)
    reason = (
        f"{new}: is an import of {folder} with other settings; choose another name, or "
        f"--overwrite to replace it"
    )
    assert other.error == reason
    (tmp_path / "else").mkdir()
    shutil.copy(folder / "step20.safetensors", tmp_path / "else")
    other = ema("import", tmp_path / "else", "--exclude", "*.bias", "--out", new)
    assert f"{new}: is an import of {folder}; choose another name" in other.error
    assert contents(new) == before
    assert ema("import", folder, "--out", new, "--overwrite").code == 0
    assert any(name.endswith("bias") for name in Run(new).tensors)
    shutil.copy(folder / "step20.safetensors", folder / "step300.safetensors")
    for _ in range(2):  # adds the new file; then an output in the folder is no obstacle
        assert ema("import", folder, "--out", new).code == 0
        assert Run(new).step == 300
        Run(new).write(0.2, new / "average.safetensors", overwrite=True)
    for place in (folder, folder / "step20.safetensors"):
        assert "holds something else" in ema("import", folder, "--out", place, "--overwrite").error
    assert "its folder does not exist" in ema("import", folder, "--out", tmp_path / "x" / "y").error


def test_a_dry_run_writes_nothing_and_nothing_that_an_import_refers_to_is_deleted(
    write: Write,
    tmp_path: Path,
    ema: Ema,
) -> None:
    folder = write("safetensors")
    new = tmp_path / "new"
    assert ema("import", folder, "--dry-run", "--out", new).out.endswith("nothing was written\n")
    assert ema("import", folder, "--out", new, "--dry-run", "--json").json["written"] is False
    assert not new.exists()
    assert "--out: is missing" in ema("import", folder).error
    import_checkpoints(folder, new)
    before = contents(tmp_path)
    refused = ema("prune", new, "--keep", "2", "--yes")
    assert (refused.code, refused.error) == (
        2,
        f"{new}: refers to files of other programs, which are never deleted",
    )
    checked = ema("verify", new)
    assert checked.code == 0
    assert f"{len(STEPS)} without checksums" in checked.out
    assert contents(tmp_path) == before


def test_files_behind_links_are_read(weights: dict[int, Weights], tmp_path: Path) -> None:
    """As in a cache of models, where their names have no ending."""
    folder = tmp_path / "a b'ü"
    folder.mkdir()
    for step, state in weights.items():
        torch.save(state, tmp_path / f"{step * 7:x}")
        (folder / f"step{step}.pt").symlink_to(tmp_path / f"{step * 7:x}")
    assert [one.step for one in Run(folder).sources] == [*STEPS]


def test_a_run_may_lie_in_the_folder_or_behind_a_link(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = filled(tmp_path / "ck", 20, 40)
    monkeypatch.chdir(folder)
    import_checkpoints("step?0*.pt", "run")
    monkeypatch.chdir(tmp_path)
    assert Run(folder / "run").step == 40
    assert not import_checkpoints(folder / "step?0*.pt", folder / "run").written
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    import_checkpoints(folder / "step20.pt", tmp_path / "link/run")
    assert Run(tmp_path / "link/run").step == 20
    with pytest.raises(errors.DirectoryError, match="holds a run already"):
        import_checkpoints(folder / "run", tmp_path / "two")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = filled(tmp_path / "ck", 40)
    (folder / "step40.pt").rename(folder / os.fsdecode(b"step40-\xff.pt"))
    with pytest.raises(errors.InvalidValueError, match="its name is no valid text"):
        import_checkpoints(folder / "step40*", tmp_path / "run")


WRONG: list[tuple[str, Any, str]] = [
    ("kind", "nothing", " 'nothing': must be one of edm2, ema-pytorch, "), ("prefix", 5, ""),
    ("step_from", r"a-\d+", ".* with one group"), ("step_from", "(", ".* a regular expression"),
    ("include", [5], ""), ("exclude", "", ""), ("sigma_rels", 0.1, ""), ("update_every", True, ""),
    ("update_after_step", -1, ""), ("ema_decay", "much", " .* or a half-life such as"),
    ("ema_decay", [0.9], ""), ("ema_decay", 1.5, r" 1\.5: must be in \(0, 1\)"),
    ("ema_restarts", [0], ""), ("ema_warmup", "x", " 'x': must be one of none, ratio, power"),
    ("ema_uncertainty", -0.1, ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "reason"), WRONG)
def test_a_setting_that_cannot_be_used_is_named(
    name: str,
    value: Any,
    reason: str,
    tmp_path: Path,
) -> None:
    filled(tmp_path / "ck", 1)
    with pytest.raises(errors.InvalidValueError, match=f"^{name}{reason}"):
        import_checkpoints(tmp_path / "ck", tmp_path / "new", **{name: value})
    assert not (tmp_path / "new").exists()


# --- hostile manifests


def rewritten(path: Path, **changed: Any) -> None:
    """Change values of a manifest, or remove those that are None; with a correct checksum."""
    values = {**json.loads(path.read_text()), **changed}
    values = {
        key: value for key, value in values.items() if value is not None and key != "checksum"
    }
    digest = xxhash.xxh3_64_hexdigest(json.dumps(values, separators=(",", ":")).encode())
    path.write_text(json.dumps({**values, "checksum": digest}))


def listed(place: str) -> dict[str, Any]:
    """Return changes that make a manifest refer to one file, as if it were empty."""
    return {"checkpoints": [[place, "checkpoints", 1]], "files": {place: [0, "0" * 16]}}


FIRST = "../ck/step1.pt"


def first(kind: Any = "checkpoints", step: Any = 1) -> dict[str, Any]:
    return {"checkpoints": [[FIRST, kind, step]]}


HOSTILE: dict[str, dict[str, Any]] = {
    "a file of the system": listed("/etc/passwd"),
    "itself": listed("."),
    "a pipe": listed("pipe"),
    "a loop": listed("loop"),
    "a zero": listed("a\0b"),
    "a url": listed("s3://bucket/x.pt"),
    "no files": {"files": {}},
    "a kind that is a list": first([]),
    "a text for a step": first(step="1"),
    "a far step": first(step=10**300),
    "settings that are a list": {"settings": []},
    "an unknown setting": {"settings": {"x": 1}},
    "no pattern": {"settings": {"step_from": "("}},
    "files that are a list": {"files": [FIRST]},
    "keys of more": {"files": {FIRST: [1, "x", 2]}},
    "a far version": {"version": 3},
    "a place that is a number": {"from": 5},
    "a checkpoint many times": {"checkpoints": [[FIRST, "checkpoints", 1]] * 50_000},
}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Return the manifest of an import of two checkpoints, in a folder with a pipe and a loop of
    links."""
    filled(tmp_path / "ck", 1, 2)
    import_checkpoints(tmp_path / "ck", tmp_path / "new")
    os.mkfifo(tmp_path / "new" / "pipe")
    (tmp_path / "new" / "loop").symlink_to("loop")
    return tmp_path / "new" / MANIFEST


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_one_line(what: str, manifest: Path, ema: Ema) -> None:
    rewritten(manifest, **HOSTILE[what])
    for command in ("info", "verify"):
        found = ema(command, manifest.parent)
        assert found.code in (1, 2) or (command, found.code) == ("verify", 0)
        assert command == "verify" or (found.error and "root:" not in found.error)
        assert "Traceback" not in found.err


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b"{}"])
def test_a_malformed_manifest_is_one_line(content: bytes, manifest: Path, ema: Ema) -> None:
    manifest.write_bytes(content)
    assert ema("info", manifest.parent).error.startswith(f"{manifest}: damaged import: ")
    # replaces it
    assert ema("import", manifest.parent.parent / "ck", "--out", manifest.parent).code == 0
    assert Run(manifest.parent).step == 2


def test_a_flipped_digit_of_a_manifest_is_found(manifest: Path) -> None:
    content = manifest.read_bytes()
    for place, byte in enumerate(content):
        if chr(byte).isalnum() and place % 5 == 0:
            manifest.write_bytes(content[:place] + bytes([byte ^ 1]) + content[place + 1 :])
            with pytest.raises(errors.FileFormatError):
                _ = Run(manifest.parent).sources


def test_a_manifest_is_a_regular_file_of_limited_size(manifest: Path) -> None:
    os.truncate(manifest, 10**9)
    with pytest.raises(errors.FileFormatError, match="at most 100,000,000 are allowed"):
        _ = Run(manifest.parent).sources
    for make in (
        lambda: os.mkfifo(manifest),
        lambda: manifest.symlink_to("/dev/zero"),
        manifest.mkdir,
    ):
        manifest.unlink()
        make()
        with pytest.raises(errors.FileFormatError, match="is not a regular file"):
            _ = Run(manifest.parent).sources


def test_a_file_is_opened_once_for_its_index_and_once_for_its_values(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By an import that checks a decay, and by one that finds it; an opened run needs the index."""
    folder = write_trained(tmp_path / "x", train(), averaged(0.99))
    opens = Counter[Path]()

    def opened(path: Path) -> int:
        opens[path] += 1
        return system_open(path)

    system_open = files.system.open
    monkeypatch.setattr(files.system, "open", opened)
    for settings in ({"ema_decay": 0.99}, {}):
        opens.clear()
        import_checkpoints(folder, tmp_path / "run", overwrite=True, **settings)
        assert {opens[path] for path in folder.iterdir()} == {2}
    opens.clear()
    assert len(Run(tmp_path / "run").sources) == 2 * len(TIMES)
    assert {opens[path] for path in folder.iterdir()} == {1}
