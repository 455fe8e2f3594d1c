"""README and guides: their code runs, and the links, rooms and tests that they name exist."""

import io
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import threading
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from checking import heavy
from ema_command import environments_of_ranks
from markdown_it import MarkdownIt
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from torch import nn

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.cli.guide import render
from posthoc_cli.planning import CurveRequest, Schedule

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "posthoc_cli"
README = ROOT / "README.md"
GUIDES = sorted((PACKAGE / "guides").glob("*.md"))
BLOCK = re.compile(r"^```(python|console)(?: shown)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^\$ (.*?)\s*(?:#.*)?$", re.MULTILINE)
PROGRAM = re.compile(r"# (\w+\.py)\n")
"""The first line of a block that is a file."""


EVALUATION = """
import array, json, sys
loss = 0.0
with open(sys.argv[1], "rb") as file:
    loss += sum(weight**2 for weight in array.array("f", file.read()[-64:]))
print(loss)
print(json.dumps({"loss": loss, "loss_stderr": 1e-3}))
"""
"""An evaluation that is faster than one that loads a model."""
SAMPLES = """
import sys
with open(sys.argv[2] + "/sample.png", "wb") as file:
    file.write(b"\\x89PNG")
"""
"""A program that needs no library to write what begins as a picture."""
SRUN = """#!/bin/sh
test "$1 $2" = "--gpus 1" || exit 64
shift 2
echo "$*" >> srun.log
exec "$@"
"""
"""A stand-in for Slurm's command, which runs at once what it is to run on a GPU of the cluster."""


def code_blocks(page):
    """Return language and text of the blocks to run, in order."""
    return BLOCK.findall(page.read_text())


def commands(block):
    return [shlex.split(line) for line in COMMAND.findall(block)]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def train_step(model, batch, optimizer):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of 2,000 steps of weights that move slowly, as that of the README's example."""
    directory = tmp_path_factory.mktemp("finished") / "ema"
    model = make_model()
    with PostHocEMA.from_model(model, directory, checkpoint_every=100) as ema, torch.no_grad():
        for _ in range(2000):
            for parameter in model.parameters():
                parameter += 3e-4 * torch.randn(parameter.shape)
            ema.update_(model)
    torch.save({"model": model.state_dict(), "step": 2000}, directory.parent / "checkpoint.pt")
    return directory


@torch.no_grad()
def evaluate(network):
    assert not network.training
    return float(network(torch.eye(4)).square().mean())


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names that a page's Python code uses; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    model = make_model()
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-2),
        "loader": list(torch.randn(20, 8, 4)),
        "train_step": train_step,
        "evaluate": evaluate,
    }


@pytest.fixture
def folder(names, finished_run, tmp_path, monkeypatch):
    """The files that a page's commands use: those of the README, and a program of the user's."""
    shutil.copytree(finished_run.parent, tmp_path / "run")
    (tmp_path / "eval.py").write_text(EVALUATION)
    (tmp_path / "sample.py").write_text(SAMPLES)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    weights = names["model"].state_dict()
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": weights, "ema": weights}, tmp_path / "checkpoints/step2000.pt")


@pytest.fixture
def wandb(monkeypatch):
    import wandb  # late, as all workers import this module

    monkeypatch.setenv("WANDB_SILENT", "true")
    yield wandb
    wandb.finish()


def last_point(tag):
    """Return the last step and value of a curve that TensorBoard reads from a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    *_, last = EventAccumulator("run/events").Reload().Scalars(tag)
    return last.step, last.value


@heavy
@pytest.mark.usefixtures("folder")
def test_the_code_of_all_pages_runs_in_one_folder_in_the_order_of_the_readme(ema, names, wandb):
    _, listed = README.read_text().split("## Guides\n")
    order = dict.fromkeys(re.findall(r"\]\(posthoc_cli/guides/(\w+)\.md\)", listed))
    assert sorted(order) == [page.stem for page in GUIDES]
    for name in order:
        for language, block in code_blocks(PACKAGE / "guides" / f"{name}.md"):
            if language == "python":
                exec(compile(block, name, "exec"), names)
                continue
            for program, *arguments in commands(block):
                assert program == "ema"
                result = ema(*arguments)
                assert result.code == 0, (name, arguments, result.err)
    wandb.log({}, step=21)  # it keeps a step's figures until the next step
    figures = wandb.run.summary
    assert figures["_step"] == 20
    assert figures["predicted_error_0.1"] > 0
    check_search_on_a_cluster(figures["search"])
    names["writer"].close()
    for width in ("0.05", "0.1", "0.2", "0.28"):
        names["model"].load_state_dict(Run("run/watched").average(float(width)))
        step, value = last_point(f"loss/{width}")
        assert step == 20
        # whose running statistics are less exact: of two stored times
        assert value == pytest.approx(evaluate(names["model"].eval()), rel=0.1)


def check_search_on_a_cluster(table):
    """Check that each evaluation went through the cluster's command, and that the tracker of
    experiments has all of the search's trials."""
    trials = json.loads(Path("cluster/sweep.json").read_text())["trials"]
    evaluated = Path("srun.log").read_text().splitlines()
    assert len(evaluated) == len(trials) > 0
    assert table["nrows"] == len(trials)


def test_the_guide_shows_the_errors_of_schedules():
    page = (PACKAGE / "guides/training.md").read_text()
    rows = re.findall(
        r"^\| (\d+) \| 1/(\d+) of .* \| ([\d.]+) % \| ([\d.]+) % \|$", page, re.MULTILINE
    )
    assert len(rows) == 3
    for keep, times, worst, median in rows:
        schedule = Schedule(400_000, 400_000 // int(times), int(keep))
        curve = schedule.error_curve(CurveRequest((0.05, 0.28)))
        assert (f"{100 * curve.worst:.2g}", f"{100 * curve.median:.2g}") == (worst, median)


MESH = """
import os
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

dist.init_process_group()
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
"""
SAVE = """
torch.save(weights["0.weight"].to_local(), f"held-{os.environ['RANK']}.pt")
dist.destroy_process_group()
"""


def torchrun_code(guide):
    page = (PACKAGE / f"guides/{guide}.md").read_text()
    (code,) = re.findall(r"^```python torchrun\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return code


@heavy
def test_torch_loads_a_snapshot_of_the_sharded_training_onto_another_mesh(tmp_path):
    """The guide `distributed` has the training, the guide `snapshots` the call that loads."""
    run_on_two(torchrun_code("distributed"), tmp_path)
    run_on_two(MESH + torchrun_code("snapshots") + SAVE, tmp_path)
    stored = Run(tmp_path / "run/ema").snapshots[-1].tensor("0.weight")
    held = [torch.load(tmp_path / f"held-{rank}.pt") for rank in range(2)]
    assert torch.equal(torch.cat(held), stored.float())


def run_on_two(program, folder):
    """Run a program in two processes, as torchrun does."""
    processes = []
    for environment in environments_of_ranks(2):
        processes.append(forked.Forked(program, cwd=folder, env=environment))
    printed = [process.communicate() for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], printed


def programs_of_the_readme():
    programs = {}
    for language, block in code_blocks(README):
        if language == "python":
            programs[PROGRAM.match(block)[1]] = block
    return programs


EVALUATION_OF_THE_README = """
import sys
import numpy as np
from safetensors.numpy import load_file
weights = load_file(sys.argv[1])
batch = np.load("batch.npy")
hidden = np.maximum(batch @ weights["0.weight"].T + weights["0.bias"], 0)
error = hidden @ weights["2.weight"].T + weights["2.bias"] - np.sin(batch).sum(1, keepdims=True)
print(np.square(error).mean())
"""
"""What its eval.py computes, without torch, whose import takes some seconds."""


@heavy
def test_the_readme_runs_as_pasted_and_prints_what_it_shows(ema, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    programs = programs_of_the_readme()
    assert [*programs] == ["task.py", "before.py", "eval.py", "train.py"]
    for name, text in programs.items():
        Path(name).write_text(text)
    Path("eval.py").write_text(EVALUATION_OF_THE_README)
    batch = torch.randn(10_000, 8, generator=torch.Generator().manual_seed(1))
    np.save("batch.npy", batch.numpy())
    first, before, train = [text for language, text in code_blocks(README) if language == "console"]
    console = before + first + train  # the first block uses the files of a program further down
    printed = {}
    for line, shown in sessions(console):
        program, *arguments = shlex.split(line)
        if program == "ema":
            done = ema(*arguments)
            printed[line] = done.shown.splitlines()
        else:
            done = forked.check(programs[arguments[0]])
            printed[line] = done.out.splitlines()
        assert done.code == 0, done.err
        assert shows(shown, printed[line]), (shown, printed[line])
    (notice, _, *table), (_, average), _ = [*printed.values()][1:]
    for file, line in (
        ("best/best.safetensors", next(line for line in table if line.startswith("metric "))),
        ("from-hook.safetensors", average),
    ):
        evaluated = forked.check(programs["eval.py"], file)
        assert float(evaluated.out) == pytest.approx(float(line.split()[-1]), rel=1e-3)
    check_other_commands(ema, notice)


def check_other_commands(ema, notice):
    """Check what the README says of other commands, and of both folders."""
    for command in (
        "synthesize checkpoints/ --sigma-rel 0.1 --dry-run",
        "error-plot checkpoints/",
    ):
        done = ema(*command.split())
        assert done.code == 0, done.err
        assert done.shown.splitlines().count(notice) == 1
    _, found, _ = notice.split("; ")
    assert found in ema("audit", "checkpoints/").out.splitlines()
    evaluation = ("--eval", "python3 eval.py {weights}", "--minimize", "--sigma-rel", "0.05,0.1")
    for words in (
        ("error-plot", "run/ema"),
        ("sweep", "run/ema", "--raw", "run/checkpoint.pt", *evaluation),
    ):
        done = ema(*words)
        assert done.code == 0, done.err
    assert "better than the last weights" in done.out


def sessions(console):
    """Yield each command of a block, with the lines that it shows."""
    for session in console.removeprefix("$ ").split("\n$ "):
        command, *shown = session.splitlines()
        yield command.partition("  #")[0], shown


def shows(shown, printed):
    """Return whether a page shows what a command has printed: each line, with others in place of
    three dots."""
    if not shown:
        return True
    line, *rest = shown
    if line == "...":
        return any(shows(rest, printed[skipped:]) for skipped in range(len(printed) + 1))
    if not printed or not is_like(line, printed[0]):
        return False
    return shows(rest, printed[1:]) if rest else len(printed) == 1


SECONDS = re.compile(r"in [\d.]+ s\b")
NUMBER = re.compile(r"(± |predicted error )?(\d[\d,]*(?:\.\d+)?)( %)?")


def is_like(shown, printed):
    """Return whether a line differs from the one that a page shows by the last digits of numbers
    alone: by 5 % of a number, or of its distance from 1, predicted errors by a factor of 2, and
    times by any. A whole number without a unit is a count."""
    shown = SECONDS.sub("", shown)
    printed = SECONDS.sub("", printed)
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    for expected, found in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True):
        is_error, text, is_share = expected
        number, other = (float(each[1].replace(",", "")) for each in (expected, found))
        tolerance = 0.05 * number
        if is_error:
            tolerance = number
        elif number < 1:
            tolerance = 0.05 * min(number, 1 - number)
        elif "." not in text and not is_share:
            tolerance = 0.0
        if abs(other - number) > tolerance:
            return False
    return True


def test_lines_of_the_readme_are_compared_number_by_number():
    line = "best 0.113 (as decay 0.9961), 68 % of 40 files, predicted error 0.03 %, in 0.0 s"
    alike = "best 0.114 (as decay 0.9962), 67 % of 40 files, predicted error 0.05 %, in 0.2 s"
    assert is_like(line, line)
    assert is_like(line, alike)
    for old, new in (
        ("0.113", "0.12"),
        ("0.9961", "0.9965"),
        ("40", "41"),
        ("68 %", "60 %"),
        ("0.03 %", "0.07 %"),
        ("best", "worst"),
    ):
        assert not is_like(line, line.replace(old, new))
    assert shows(["a", "...", "c"], ["a", "b", "b", "c"])
    assert shows(["a", "..."], ["a"])
    assert not shows(["a"], ["a", "b"])
    assert not shows(["a", "b"], ["a", "c", "b"])
    assert not shows(["a", "...", "c"], ["a", "b"])


FOLDERS = ("whole", "killed")
KILLED_AT = (50, 150, 199, 201, 305, 330)
"""Before the first checkpoint, and after one: just before and after the next one, too."""


@heavy
def test_the_training_in_the_readme_ends_with_the_same_bits_after_six_kills(tmp_path, monkeypatch):
    programs = programs_of_the_readme()
    task = programs["task.py"].replace("torch.randn(2000,", "torch.randn(340,")
    train = programs["train.py"]
    update = "    ema.update_(model)"
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "task.py").write_text(task)
    monkeypatch.chdir(tmp_path / "whole")
    expected = forked.check(train)
    monkeypatch.chdir(tmp_path / "killed")
    begun = 1
    for count in KILLED_AT:
        kill = f"    print(step, flush=True)\n    if step == {count}:\n        os._exit(9)\n"
        killed = forked.run("import os\n" + train.replace(update, kill + update))
        assert killed.code == 9
        assert killed.out.split() == [str(step) for step in range(begun, count + 1)]
        begun = count // 100 * 100 + 1
    assert forked.check(train).out == expected.out
    whole, again = (torch.load(tmp_path / folder / "run/checkpoint.pt") for folder in FOLDERS)
    for name, weights in whole["model"].items():
        assert torch.equal(again["model"][name], weights)
    whole, again = (Run(tmp_path / folder / "run/ema").snapshots for folder in FOLDERS)
    assert {snapshot.t for snapshot in again} == {100, 200, 300, 340}
    for one, other in zip(whole, again, strict=True):
        assert (one.t, one.sigma_rel) == (other.t, other.sigma_rel)
        for name in one.entries:
            assert torch.equal(one.tensor(name), other.tensor(name))
    finished = forked.run(train)
    assert finished.code == 1
    assert finished.err == "this training is finished; to begin anew, remove run/checkpoint.pt\n"


@pytest.fixture(scope="module")
def page_of_the_index():
    """The README as a package index shows it: with the substitutions of the build."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    page = README.read_text()
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        replaced = re.sub(rule["pattern"], rule["replacement"], page)
        assert replaced != page, rule
        page = replaced
    return page


def test_the_page_of_the_index_has_no_picture_or_link_that_is_relative(page_of_the_index):
    targets = []
    tags = []
    for token in MarkdownIt("commonmark").enable("table").parse(page_of_the_index):
        for part in (token, *(token.children or ())):
            targets += [part.attrs[name] for name in ("href", "src") if name in part.attrs]
            if part.type.startswith("html"):
                tags.append(part.content)
    assert targets
    assert not [target for target in targets if not target.startswith("https://")]
    assert not tags  # such as of a <picture>


def test_the_page_of_the_index_ends_no_sentence_in_the_air(page_of_the_index):
    """Where a picture was, the sentence before it ends."""
    paragraphs = re.sub(r"^```.*?^```$", "```", page_of_the_index, flags=re.DOTALL | re.MULTILINE)
    for before, after in itertools.pairwise(paragraphs.split("\n\n")):
        assert not before.endswith(":") or after.startswith("```"), before


def test_the_readme_is_short_and_links_to_every_guide_and_links_to_files_lead_somewhere():
    assert len(README.read_text().splitlines()) <= 280
    for guide in GUIDES:
        assert f"posthoc_cli/guides/{guide.name})" in README.read_text()
    for page in (README, *GUIDES):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), link


PAGES = ("#ffffff", "#0d1117")
"""A light page, and a dark one."""


def luminance(colour):
    """Compute the relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[begin : begin + 2], 16) / 255 for begin in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def find_colours(picture):
    """Find the colours of a drawing, or those of a picture of points that are nearly opaque."""
    if picture.suffix == ".svg":
        return {*re.findall(r"(?:fill|stroke): (#\w{6})", picture.read_text())}
    with Image.open(picture) as image:
        found = image.convert("RGBA").getcolors(image.width * image.height)
    return {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b, alpha) in found if alpha > 200}


@pytest.mark.parametrize(
    "picture", sorted((ROOT / ".assets").iterdir()), ids=lambda path: path.name
)
def test_a_picture_is_readable_on_light_and_on_dark_pages(picture):
    """Each of its colours has a contrast of 3 to both, as WCAG 2 asks of graphics: so that nothing
    opaque lies behind them."""
    pages = [page.read_text() for page in (README, *GUIDES)]
    assert any(f".assets/{picture.name})" in page for page in pages)
    colours = find_colours(picture)
    assert len(colours) >= 2
    for colour, page in itertools.product(colours, PAGES):
        dark, light = sorted((luminance(colour), luminance(page)))
        assert (light + 0.05) / (dark + 0.05) >= 3, (colour, page)


def test_a_guide_begins_with_its_name_and_subject():
    for guide in GUIDES:
        assert re.match(rf"# {guide.stem.capitalize()}.*: .*\n\n", guide.read_text())


def test_the_guide_for_contributors_names_every_room():
    text = (PACKAGE / "guides/contributing.md").read_text()
    for path in PACKAGE.iterdir():
        if path.name[0] not in "_." and path.name != "py.typed":
            assert re.search(rf"^  {path.stem}(/|\.py) ", text, re.MULTILINE), path


GROUND = {"errors.py", "resources.py", "dtypes.py", "profiles.py"}
"""Files that every way enters."""


def files_entered(call):
    """Return the files of the package whose functions a call enters, in any thread."""
    entered = set()

    def note(frame, event, _):
        code = frame.f_code
        path = Path(code.co_filename)
        if event != "call" or code.co_name == "<module>":
            return
        if path.is_relative_to(PACKAGE):
            entered.add(path)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {path.name for path in entered}


def test_the_guide_for_contributors_names_the_files_that_a_synthesis_enters(finished_run, tmp_path):
    run = Run(finished_run)
    run.write([0.1], tmp_path / "first.safetensors")  # imports what is imported late
    entered = files_entered(lambda: Run(run.directory).write([0.1], tmp_path / "a.safetensors"))
    _, _, text = (PACKAGE / "guides/contributing.md").read_text().partition("**A synthesis**")
    way, _, _ = text.partition("**A foreign file**")
    names = {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", way)}
    assert entered - GROUND <= names
    assert len(entered) <= 38  # one subject each


def test_ema_guide_lists_nine_guides_and_the_other_pages_each_with_its_subject(ema):
    _, *rows = ema("guide").out.splitlines()
    groups = [row for row in rows if row[0] != " "]
    assert groups == ["Guides:", "Reference:"]
    assert rows.index("Reference:") - rows.index("Guides:") == 1 + 9
    pages = [row.split()[0] for row in rows if row not in groups]
    assert sorted([*pages, "contributing"]) == [guide.stem for guide in GUIDES]
    (training,) = [row for row in rows if row.startswith("  training")]
    assert "  record averages while a model trains" in training
    listed = ema("guide", "--json").json["guides"]
    assert [each["guide"] for each in listed] == pages


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_terminal_of_80_columns_shows_whole_lines_of_code_and_whole_words_in_tables(guide):
    page = guide.read_text()
    shown = io.StringIO()
    Console(file=shown, width=80).print(render(page), crop=False)
    lines = {line.rstrip() for line in shown.getvalue().splitlines()}
    blocks = re.findall(r"^```.+?\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    code = {f" {line}".rstrip() for line in "".join(blocks).splitlines()}
    assert code <= lines
    assert max(map(cell_len, lines - code)) <= 80
    assert "\u2026" not in shown.getvalue()


def test_the_command_has_the_name_of_the_package_too():
    """`uvx posthoc-cli` and `pipx run posthoc-cli` look for it."""
    project = (ROOT / "pyproject.toml").read_text()
    names = re.findall(r'^(\S+) = "posthoc_cli.__main__:main"', project, re.MULTILINE)
    assert names == ["ema", "posthoc-cli"]
