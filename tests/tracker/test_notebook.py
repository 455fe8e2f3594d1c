"""Cells that train are run again in IPython, as the guide `training` promises.

IPython keeps what a cell displays and the frames of its last exception, and so trackers and models
of cells that have run."""

import json

import forked
import pytest
from checking import heavy

pytest.importorskip("IPython")

SHELL = """
import json, pathlib, sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
errors = []
for cell in json.loads(sys.argv[1]):
    error = shell.run_cell(cell, store_history=True).error_in_exec
    errors.append("" if error is None else f"{type(error).__name__}: {error}")
pathlib.Path("errors.json").write_text(json.dumps(errors))
"""

SETUP = """
%load_ext autoreload
%autoreload 2
import signal, torch, net
from factories import averages_in, exact_average
from posthoc_cli import PostHocEMA

settings = dict(update_every=1, checkpoint_every=3, checkpoint_dtype=None, resume="auto")
interrupted = None
"""

NET = """%%writefile net.py
import torch

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def loss(self):
        return (self.weight - {goal}).square().sum()
"""

MODEL = """
model = net.Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
path = []
"""

TRAIN = """
ema = PostHocEMA.from_model(model, "run", **settings)
for number in range(4):
    model.loss().backward()
    optimizer.step()
    path.append(model.weight.detach().double().numpy().copy())
    ema.update_(model)
    if number == interrupted:
        signal.raise_signal(signal.SIGINT)
ema
"""

ATTACHED = TRAIN.replace('"run"', '"attached"').replace("    ema.update_(model)\n", "")
ATTACHED = ATTACHED.replace("for number", "ema.attach(optimizer)\nfor number")

CHECK = """
assert ema.step == len(path) == {steps}, (ema.step, len(path))
for sigma_rel, own in averages_in(ema.state_dict()).items():
    exact = exact_average(path, float(sigma_rel), range(1, {steps} + 1))
    assert abs(own["weight"].numpy() - exact).max() < 1e-6
"""


def run_cells(folder, *cells):
    """Return the error of each cell, "" for none."""
    env = {"IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1"}
    forked.check(SHELL, json.dumps(cells), cwd=folder, env=env)
    errors = json.loads((folder / "errors.json").read_text())
    assert len(errors) == len(cells)
    return errors


@heavy
def test_cells_that_train_are_run_again(tmp_path):
    (tmp_path / "net.py").touch()
    errors = run_cells(
        tmp_path,
        NET.format(goal=1),
        SETUP,
        # plainly
        *(MODEL, TRAIN, TRAIN, CHECK.format(steps=8)),
        # after an interrupt
        *("interrupted = 1", TRAIN, "interrupted = None", TRAIN, CHECK.format(steps=14)),
        # after the model's file was edited
        *(NET.format(goal=-5), TRAIN, "assert path[-1].min() < -1", CHECK.format(steps=18)),
        # attached
        *(MODEL, ATTACHED, ATTACHED, CHECK.format(steps=8)),
        *("interrupted = 2", ATTACHED, "interrupted = None", ATTACHED, CHECK.format(steps=15)),
        # with a new model: the weights decide
        *(MODEL, TRAIN),
    )
    first, second, refused = [error for error in errors if error]
    assert first.startswith("KeyboardInterrupt")
    assert second.startswith("KeyboardInterrupt")
    assert refused.startswith("ModelMismatchError")
