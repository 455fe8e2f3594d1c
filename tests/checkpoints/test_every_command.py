"""Every command that takes a run opens checkpoints and imports."""

import html
import re
import shlex
from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors, heavy, refused
from factories import contents, write_ema_checkpoints, write_run
from safetensors.torch import load_file
from saved import read, store

from posthoc_cli import Run, import_checkpoints

SETTINGS = {
    "step_from": r"at(\d+)",
    "exclude": "*skip.*",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return checkpoints of a random walk, and their import."""
    folder = tmp_path_factory.mktemp("walk")
    weights = torch.full((3000,), 4.0)
    for step in range(10, 401, 10):
        weights += 0.16 * torch.randn(3000)
        state = {
            "net.w": weights,
            "net.skip.b": torch.ones(2),
            "head.w": torch.ones(2),
        }
        store(folder / "ck" / f"v2-at{step}.pt", {"state_dict": state})
    import_checkpoints(
        folder / "ck",
        folder / "own",
        **SETTINGS,
    )
    return folder


def test_checkpoints_are_not_called_snapshots(ema, run):
    made = ema("synthesize", run / "own", "--sigma-rel", 0.001, "--t", 385, "--dry-run")
    assert made.out.startswith("file ")
    described = ema("info", run / "own", "--json").json
    assert len(described["checkpoints"]) == 40
    assert described["files"] == 40
    assert described["refers_to"] == str(run / "ck")
    assert described["settings"] == SETTINGS | {"exclude": ["*skip.*"]}
    assert re.search(r"predicted error \S+ % from the \d+ checkpoints up to t = 385", made.err)
    assert "snapshot" not in made.out + made.err


def test_a_file_of_weights_and_an_average_is_counted_as_one_checkpoint(ema, files, tmp_path):
    """By all commands, also where some have no coefficient."""
    files.mkdir()
    write_ema_checkpoints(files)  # 21 files, 20 of which have both
    out = tmp_path / "out.safetensors"
    run = Run(files)
    texts = [
        ema("synthesize", files, "--sigma-rel", 0.02, "--out", out).out,
        ema("synthesize", files, "--sigma-rel", 0.1, "--dry-run").out,
        ema("error-plot", files).out,
        repr(run),
        repr(run.plan(0.02)),
        repr(run.error_curve()),
    ]
    found = re.findall(r"(?:(\d+) of )?(\d+) checkpoints", "\n".join(texts))
    assert len(found) == len(texts)
    assert {total for _, total in found} == {"21"}
    used, _ = found[0]
    assert run.plan(0.02).to_dict()["solved_with"] == 21
    assert re.search(rf"^snapshots +{used}$", ema("info", out).out, re.MULTILINE)
    described = ema("info", files).out
    assert re.search(r"^number of checkpoints +21$", described, re.MULTILINE)
    assert "and 31 more rows" in described


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of weights with an EMA, which show its decay or say it, and of weights alone; and
    an import."""
    place = tmp_path_factory.mktemp("found")
    shown = place / "shown"
    shown.mkdir()
    write_ema_checkpoints(shown, steps=400)
    for file in shown.iterdir():
        content = torch.load(file)
        store(place / "alone" / file.name, {"model": content["model"]})
        if "ema" in content:
            content["ema"] = {"decay": 0.9, "w": content["ema"]["module.w"]}
            store(place / "stated" / file.name, content)
    (place / "measure.sh").write_text("cksum < $1 | cut -c 1-6")
    import_checkpoints(shown, place / "own", ema_decay=0.9)
    return place


OPENING = (
    "synthesize shown --sigma-rel 0.1,0.2 --dry-run",
    "synthesize shown --target last:2 --out new.pt --json",
    "error-plot shown shown",
    "sweep shown --eval 'sh measure.sh {weights}' --minimize --sigma-rel 0.1,0.2",
)
FOUND = re.compile(r"shown: 40 x EMA of decay 0.9, 41 x weights; found: decay .*; taken as 0.9")


@pytest.mark.parametrize("line", OPENING)
def test_a_command_says_first_and_once_what_it_has_found_in_foreign_files(
    line, folders, ema, monkeypatch
):
    monkeypatch.chdir(folders)
    done = ema(*shlex.split(line))
    assert done.code == 0, done.err
    said, *others = done.err.splitlines()
    assert FOUND.fullmatch(said)
    assert said not in others


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("stated", "40 x EMA of decay 0.9, 40 x weights; given: decay .*, as claimed"),
        ("alone", "41 x weights"),
    ],
)
def test_what_was_found_depends_on_what_files_say(name, finding, folders, ema, monkeypatch):
    monkeypatch.chdir(folders)
    said = ema("error-plot", name, "--json").err.strip()
    assert re.fullmatch(f"{name}: {finding}", said)


def test_an_import_has_said_what_it_found(folders, ema):
    assert ema("error-plot", folders / "own", "--json").err == ""


def test_an_audit_answers_without_the_notice(folders, ema, monkeypatch):
    monkeypatch.chdir(folders)
    audited = ema("audit", "shown")
    assert audited.err == ""
    assert "found: decay 0." in audited.out


@heavy
def test_a_sweep_and_its_page_name_what_to_repeat(ema, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation = "sh -c 'echo {sigma_rel} | sed s/raw/9/' {weights}"
    command = (
        "sweep",
        run / "own",
        "--eval",
        evaluation,
        "--minimize",
        "--out",
        "swept",
    )
    assert ema(*command, "--sigma-rel", "0.1,0.2").code == 0
    wanted = Run(run / "own").average(0.1)
    assert_same_tensors(load_file("swept/best.safetensors"), wanted)
    commands = re.findall("<pre>ema (.*?)</pre>", Path("swept/report.html").read_text(), re.DOTALL)
    make, again = map(html.unescape, commands)
    assert ema(*shlex.split(make)).code == 0
    assert_same_tensors(load_file("sigma_rel-0.1.safetensors"), wanted)
    assert ema(*shlex.split(again), "--sigma-rel", "0.1,0.2").code == 0


def test_a_run_of_a_tracker_is_not_imported(ema, tmp_path):
    write_run(tmp_path, [{"w": [1.0]}] * 2, [2])
    done = ema("import", tmp_path, "--exclude", "w", "--out", tmp_path / "new")
    assert done.code == 2
    assert done.error.startswith(f"{tmp_path}: ")


def test_checkpoints_beside_snapshots_are_audited_and_imported(ema, tmp_path):
    for step in (10, 20):
        store(tmp_path / f"step{step}.pt", {"w": torch.ones(9)})
    write_run(tmp_path / "ema", [{"w": [1.0]}], [1])
    assert f"{tmp_path}: holds no average" in ema("audit", tmp_path).err
    assert "2 x weights" in ema("import", tmp_path, "--out", tmp_path / "new").out


@pytest.mark.parametrize(
    "setting",
    [
        {"sigma_rels": (0.05, 0.28)},
        {"ema_decay": 0.99},
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(setting, run):
    (name,) = setting
    with refused(name):
        read(run / "ck", step_from=r"at(\d+)", **setting)


def test_files_without_checksums_are_counted_as_not_intact(write, ema):
    verified = ema("verify", write("safetensors"))
    assert "without checksums" in verified.out


def test_a_folder_of_torch_distributed_has_no_checksums(write, ema):
    folder = write("distributed")
    assert ema("verify", folder).error.startswith(f"{folder}: ")


def test_checkpoints_are_neither_pruned_nor_repaired(write, ema, tmp_path):
    folder = write("distributed")
    before = contents(folder)
    pruned = ema("prune", folder, "--keep", "2", "--yes")
    assert pruned.error.startswith(f"{folder}: ")
    assert contents(folder) == before
    for file in folder.rglob("*.distcp"):
        file.write_bytes(b"")
    done = ema("synthesize", folder, "--sigma-rel", "0.2", "--out", tmp_path / "o.pt")
    assert done.code == 1
    assert "ema verify" not in done.error


def epochs_of_an_ema(folder):
    """Write weights and an EMA of decay 0.95 after each of 40 epochs of 10 steps."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.full((3000,), 4.0)
    average = weights.clone()
    for step in range(1, 401):
        weights = weights + 0.1 * torch.randn(3000, generator=generator)
        average = 0.95 * average + 0.05 * weights
        if step % 10 == 0:
            content = {"model": {"w": weights}, "ema": {"w": average}}
            store(folder / f"epoch_{step // 10}.pt", content)


def test_all_commands_ask_for_the_steps_of_an_epoch_by_the_same_line(ema, tmp_path):
    epochs_of_an_ema(tmp_path / "ck")
    line = f"ema import {tmp_path / 'ck'} --steps-per-epoch N --out run"
    for command in (
        ["synthesize", "--sigma-rel", "0.1", "--dry-run"],
        ["error-plot", "--json"],
        ["sweep", "--eval", "true {weights}", "--minimize"],
        ["audit"],
    ):
        assert line in ema(command[0], tmp_path / "ck", *command[1:]).error
    assert line in ema("info", tmp_path / "ck").out
    audited = ema("audit", tmp_path / "ck", "--steps-per-epoch", "10")
    assert re.search(r"^found: decay 0\.9[45]\d*, ", audited.out, re.MULTILINE)
    # the mean age of 20 steps is that of gamma = 18, whose width is 0.0475
    assert re.search(r"^as sigma_rel 0\.04[678]\d* after", audited.out, re.MULTILINE)
    ema("import", tmp_path / "ck", "--steps-per-epoch", "10", "--out", tmp_path / "run")
    again = ema("audit", tmp_path / "run", "--steps-per-epoch", "10")
    assert again.error.startswith("--steps-per-epoch 10: ")
    informed = ema("info", tmp_path / "run")
    assert re.search(r"400  EMA of decay 0\.95  sigma_rel 0\.04[678]\d*  ", informed.out)
    curve = ema("error-plot", tmp_path / "run", "--json")
    assert curve.code == 0
