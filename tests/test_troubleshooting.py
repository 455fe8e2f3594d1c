"""The guide `troubleshooting`: each of its messages is provoked, in its order, and compared."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checking import heavy
from ema_command import run_ema
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import PostHocError

GUIDE = Path(__file__).parent.parent / "posthoc_cli/guides/troubleshooting.md"


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    """Weights with BatchNorm, averages alone, files without a step, and an evaluation that looks at
    no weights."""
    monkeypatch.chdir(tmp_path)
    for folder in ("ck", "emas", "runs"):
        Path(folder).mkdir()
    model = make_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for step in range(1, 401):
        move(model)
        average.update_parameters(model)
        if step % 25 == 0:
            torch.save(model.state_dict(), f"ck/step{step}.pt")
            torch.save({"ema": average.module.state_dict()}, f"emas/step{step}.pt")
    for name in ("best", "final"):
        torch.save(model.state_dict(), f"runs/{name}.pt")
    Path("eval.py").write_text("print('loss: 1.5')")


def make_model():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@torch.no_grad()
def move(model):
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)


def ends(*words):
    """Run a command; return its error."""
    *_, last = run_ema(*words).err.splitlines()
    return last.removeprefix("ema: error: ")


def says(*words):
    """Run a command that is done; return what it has said before."""
    done = run_ema(*words)
    assert done.code == 0, done.err
    return done.err.splitlines()


def split_pattern():
    return ends("synthesize", *sorted(Path("ck").iterdir()), "--sigma-rel", "0.1", "--out", "a.pt")


def no_step():
    return ends("synthesize", "runs", "--sigma-rel", "0.1", "--out", "a.pt")


def no_decay():
    return ends("synthesize", "emas", "--sigma-rel", "0.1", "--out", "a.pt")


def poor_average():
    _, warning, *_ = says("synthesize", "ck", "--sigma-rel", "0.02", "--out", "a.pt")
    return warning.removeprefix("ema: warning: ")


def statistics():
    *_, notice = says("synthesize", "ck", "--sigma-rel", "0.286", "--out", "b.pt")
    return notice


def sweep(*words):
    command = f"{sys.executable} eval.py {{weights}}"
    return ends("sweep", "ck", "--eval", command, "--minimize", "--sigma-rel", "0.1,0.2", *words)


def no_metric():
    return sweep("--metric", "acc")


def same_metric():
    return sweep("--metric", "loss", "--out", "again")


def train(steps):
    model = make_model()
    with PostHocEMA.from_model(model, "run/ema", checkpoint_every=20) as ema:
        for _ in range(steps):
            move(model)
            ema.update_(model)


def raised(call, *arguments):
    with pytest.raises(PostHocError) as caught:
        call(*arguments)
    return str(caught.value)


def old_snapshots():
    train(100)
    return raised(train, 10)


def diverged():
    model = make_model()
    ema = PostHocEMA.from_model(model, "run/other")
    model[0].weight.data[0, 0] = torch.nan
    try:
        return raised(lambda: [ema.update_(model) for _ in range(10)])
    finally:
        ema.close()


SECOND = """
from test_troubleshooting import make_model
from posthoc_cli import PostHocEMA
from posthoc_cli.errors import PostHocError
model = make_model()
ema = PostHocEMA.from_model(model, "run/ema", resume=0)
for _ in range(10):
    ema.update_(model)
"""


def second_writer():
    model = make_model()
    ema = PostHocEMA.from_model(model, "run/ema", resume=0)
    ema.update_(model)
    words = [sys.executable, "-c", SECOND]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    second = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    ema.close()
    *_, last = second.stderr.splitlines()
    return last.removeprefix("posthoc_cli.errors.LockedError: ")


PROVOKED = (
    split_pattern, no_step, no_decay, poor_average, statistics, no_metric, same_metric,
    old_snapshots, diverged, second_writer,
)  # fmt: skip


@heavy
def test_each_message_of_the_guide_is_met():
    messages = re.findall(r"^```text\n(.*)\n```$", GUIDE.read_text(), re.MULTILINE)
    assert len(messages) == len(PROVOKED) == 10
    for provoke, message in zip(PROVOKED, messages, strict=True):
        pattern = ".*".join(map(re.escape, message.split("...")))
        assert re.fullmatch(pattern, provoke()), provoke.__name__
