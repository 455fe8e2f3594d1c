"""The examples of the guide `trainers` run, each with its framework."""

import re
from pathlib import Path

import pytest
import torch

from posthoc_cli import Run

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

FRAMEWORKS = ("transformers", "lightning", "accelerate", "diffusers")
GUIDE = Path(__file__).resolve().parents[2] / "posthoc_cli/guides/trainers.md"
BLOCK = re.compile(r"^```python (\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLES = dict.fromkeys(FRAMEWORKS, "")
for _framework, _code in BLOCK.findall(GUIDE.read_text()):
    EXAMPLES[_framework] += _code


def train_step(model, batch, optimizer):
    output = model(batch, 1).sample if hasattr(model, "config") else model(batch)
    output.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def names_for(framework):
    """Return the names that an example uses without defining them."""
    if framework == "transformers":
        from integrations.llama import DATA, network
        from transformers import TrainingArguments

        args = TrainingArguments(
            "out",
            max_steps=12,
            eval_strategy="steps",
            eval_steps=10,
            report_to=[],
            use_cpu=True,
        )
        return {"model": network(), "args": args, "dataset": DATA}
    if framework == "lightning":
        from integrations.digits import Regression, loader

        return {"module": Regression(), "loader": loader()}
    if framework == "accelerate":
        model = torch.nn.Linear(4, 4)
        loader = torch.utils.data.DataLoader(torch.randn(20, 4), batch_size=4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return {
            "model": model,
            "optimizer": optimizer,
            "loader": loader,
            "evaluate": lambda _: None,
        }
    from integrations.unet import IMAGES, network

    unet = network()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    return {
        "unet": unet,
        "optimizer": optimizer,
        "loader": IMAGES,
        "train_step": train_step,
    }


def check_logged_lengths(framework, names):
    """Logged metrics are of the averages at the last evaluation, which snapshots hold rounded."""
    if framework == "transformers":
        logged = names["trainer"].state.log_history
        steps = [row["step"] for row in logged if "eval_ema_0.2_loss" in row]
        assert 10 in steps
    elif framework == "lightning":
        module = names["module"].eval()
        for length in names["lengths"]:
            module.load_state_dict(Run("run/lengths").average(length))
            losses = [float(module.loss(batch)) for batch in names["loader"]]
            shown = float(names["trainer"].callback_metrics[f"val_loss_{length}"])
            assert shown == pytest.approx(sum(losses) / len(losses), rel=0.01)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_example_runs(framework, tmp_path, monkeypatch):
    pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    names = names_for(framework)
    assert EXAMPLES[framework]
    exec(compile(EXAMPLES[framework], GUIDE.name, "exec"), names)
    check_logged_lengths(framework, names)
    for name in ("ema", "ema_model"):
        if name in names:
            names[name].close()
    assert Run("run/ema").step > 0
