"""README and guides: their code runs, and the links, rooms and tests that they name exist."""

import re
import shlex
import shutil
import sys
import threading
from pathlib import Path

import forked
import pytest
import torch
from ema_command import environments_of_ranks
from torch import nn

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.planning import Schedule

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
    torch.save(model.state_dict(), directory.parent / "model.pt")
    return directory


def evaluate(network):
    assert not network.training
    return 0.5


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
def folder(names, finished_run, tmp_path):
    """The files that a page's commands use: those of the README, and a program of the user's."""
    shutil.copytree(finished_run.parent, tmp_path / "run")
    (tmp_path / "eval.py").write_text(EVALUATION)
    (tmp_path / "sample.py").write_text(SAMPLES)
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


@pytest.mark.usefixtures("folder")
def test_the_code_of_all_pages_runs_in_one_folder_in_the_order_of_the_readme(ema, names, wandb):
    order = re.findall(r"^\| \[\w+\]\(posthoc_cli/guides/(\w+)\.md\)", README.read_text(), re.M)
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
    names["writer"].close()
    for width in ("0.05", "0.1", "0.28"):
        assert last_point(f"loss/{width}") == (20, 0.5)


def test_the_guide_shows_the_errors_of_schedules():
    page = (PACKAGE / "guides/training.md").read_text()
    rows = re.findall(
        r"^\| (\d+) \| 1/(\d+) of .* \| ([\d.]+) % \| ([\d.]+) % \|$", page, re.MULTILINE
    )
    assert len(rows) == 3
    for keep, times, worst, median in rows:
        curve = Schedule(400_000, 400_000 // int(times), int(keep)).error_curve((0.05, 0.28))
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


def test_torch_loads_a_snapshot_of_the_sharded_training_onto_another_mesh(tmp_path):
    """The guide `distributed` has the training, the guide `format` the call that loads."""
    run_on_two(torchrun_code("distributed"), tmp_path)
    run_on_two(MESH + torchrun_code("format") + SAVE, tmp_path)
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


def test_the_readme_runs_as_pasted_in_an_empty_folder(ema, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = programs_of_the_readme()
    assert [*programs] == ["task.py", "before.py", "eval.py", "train.py"]
    for name, text in programs.items():
        Path(name).write_text(text)
    Path("eval.py").write_text(EVALUATION)
    first, before, train = [text for language, text in code_blocks(README) if language == "console"]
    console = before + first + train  # the first block uses the files of a program further down
    printed = []
    for program, *arguments in commands(console):
        if program == "ema":
            done = ema(*arguments)
        else:
            done = forked.check(programs[arguments[0]])
            assert done.err == ""
        printed += done.out.splitlines()
    shown = [line for line in console.splitlines() if line[0] not in "$."]
    # The numbers depend on the evaluation, which is replaced here, and on machines.
    names = {line.split("  ")[0] for line in shown if "  " in line}
    assert names <= {line.split("  ")[0] for line in printed}
    # The losses of the second training are those shown, up to the last digits.
    for name in ("last weights", "average"):
        expected = number_after(name, shown)
        assert number_after(name, printed) == pytest.approx(expected, rel=0.1)
    evaluated = forked.check(programs["eval.py"], "from-hook.safetensors")
    assert float(evaluated.out) == pytest.approx(expected, rel=0.1)


def number_after(name, lines):
    (line,) = [line for line in lines if line.startswith(f"{name}: ")]
    return float(line.removeprefix(f"{name}: "))


def test_the_training_in_the_readme_goes_on_after_an_interrupt_and_ends_when_it_is_finished(
    tmp_path, monkeypatch
):
    """It is interrupted before its first checkpoint, and after one."""
    monkeypatch.chdir(tmp_path)
    programs = programs_of_the_readme()
    task = programs["task.py"].replace("torch.randn(2000,", "torch.randn(230,")
    Path("task.py").write_text(task)
    train = programs["train.py"]
    update = "    ema.update_(model)"
    printing = train.replace(update, f"    print(step)\n{update}")
    for count in (50, 150):
        fails = train.replace(update, f"    print(step)\n    assert step < {count}\n{update}")
        failed = forked.run(fails)
        assert failed.code == 1
        steps = failed.out.split()
        assert steps == [str(step) for step in range(1, count + 1)]
    done = forked.check(printing)
    assert done.out.split()[:130] == [str(step) for step in range(101, 231)]
    assert {snapshot.t for snapshot in Run("run/ema").snapshots} == {100, 200, 230}
    again = forked.run(train)
    assert again.code == 1
    assert again.err == "this training is finished; to begin anew, remove run/checkpoint.pt\n"


def test_the_readme_is_short_and_links_to_every_guide_and_links_to_files_lead_somewhere():
    assert len(README.read_text().splitlines()) <= 227
    for guide in GUIDES:
        assert f"posthoc_cli/guides/{guide.name})" in README.read_text()
    for page in (README, *GUIDES):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), link


def test_a_guide_begins_with_its_name_and_subject():
    for guide in GUIDES:
        assert re.match(rf"# {guide.stem.capitalize()}.*: .*\n\n", guide.read_text())


def test_the_development_guide_names_every_room():
    text = (PACKAGE / "guides/development.md").read_text()
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


def test_the_development_guide_names_the_files_that_a_synthesis_enters(finished_run, tmp_path):
    run = Run(finished_run)
    run.write([0.1], tmp_path / "first.safetensors")  # imports what is imported late
    entered = files_entered(lambda: Run(run.directory).write([0.1], tmp_path / "a.safetensors"))
    _, _, text = (PACKAGE / "guides/development.md").read_text().partition("**A synthesis**")
    way, _, _ = text.partition("**A foreign file**")
    names = {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", way)}
    assert entered - GROUND <= names
    assert len(entered) <= 31


def test_ema_guide_lists_every_guide_with_its_subject(ema):
    _, *rows = ema("guide").out.splitlines()
    assert [row.split()[0] for row in rows] == [guide.stem for guide in GUIDES]
    (training,) = [row for row in rows if row.startswith("training")]
    assert "  record averages while a model trains" in training


def test_the_command_has_the_name_of_the_package_too():
    """`uvx posthoc-cli` and `pipx run posthoc-cli` look for it."""
    project = (ROOT / "pyproject.toml").read_text()
    names = re.findall(r'^(\S+) = "posthoc_cli.__main__:main"', project, re.MULTILINE)
    assert names == ["ema", "posthoc-cli"]
