"""A notebook's cell or a function that trains is run again, in the same process: the tracker that
takes the place of the earlier one continues from the last step that was counted."""

import gc
import shutil
import weakref
from unittest.mock import Mock

import pytest
import torch
from tracker.runs import Training, track

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import ModelMismatchError, NotReadyError

SETTINGS = {
    "update_every": 2,
    "checkpoint_every": 4,
    "checkpoint_dtype": None,
}
ROUNDED = 1e-6  # float32, once at each of the ends


class Notebook:
    """Variables that stay from cell to cell, and a training whose cell can be run again."""

    def __init__(self, folder, kind="plain"):
        self.folder = folder
        self.kind = kind
        self.training = Training()
        self.optimizer = torch.optim.SGD(self.training.model.parameters(), lr=1.0)

    def begin(self):
        if self.kind == "from_path" and self.folder.exists():
            return PostHocEMA.from_path(self.folder, self.training.model)
        model = self.training.model
        if self.kind == "wrapped":
            model = torch.nn.DataParallel(model)
        return PostHocEMA.from_model(model, self.folder, resume="auto", **SETTINGS)

    def cell(self, steps):
        """Make a tracker, and train some steps."""
        self.ema = self.begin()
        for _ in range(steps):
            self.step()
            self.ema.update_(self.training.model)

    def step(self):
        """Take the training's next step by an optimizer, whose rounding is undone."""
        before = self.training.state()
        self.training.run(len(self.training.path) + 1)
        for name, parameter in self.training.model.named_parameters():
            parameter.grad = before[name] - parameter.detach()
            parameter.data.copy_(before[name])
        self.optimizer.step()


@pytest.mark.parametrize("kind", ["plain", "from_path", "wrapped"])
def test_a_cell_that_is_run_again_continues(tmp_path, kind):
    """After 4, 5 and 7 steps, some of them in the middle between two updates and snapshots."""
    notebook = Notebook(tmp_path / "run", kind)
    for steps in (4, 5, 7):
        notebook.cell(steps)
    assert notebook.training.error(notebook.ema) < ROUNDED
    assert notebook.ema.t == 16


def test_a_function_that_is_run_again_continues(tmp_path):
    """Its tracker has not stayed."""
    notebook = Notebook(tmp_path / "run")
    notebook.cell(5)
    del notebook.ema
    gc.collect()
    notebook.cell(4)
    assert notebook.training.error(notebook.ema) < ROUNDED


def test_an_interrupted_cell_is_run_again(
    tmp_path,
    monkeypatch,
    caplog,
):
    """A step that was taken, and not counted, is named."""
    notebook = Notebook(tmp_path / "run")
    notebook.cell(7)
    notebook.step()
    interrupt = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(notebook.ema._pipeline, "wait_for_turn", interrupt)
    with pytest.raises(KeyboardInterrupt):
        notebook.ema.update_(notebook.training.model)
    caplog.clear()
    notebook.cell(6)
    assert notebook.ema.step == 13
    assert "the model has moved since step 7, the last that was counted" in caplog.text


def test_weights_of_a_snapshot_count_more_than_the_last_step(tmp_path):
    """So do those of no snapshot."""
    notebook = Notebook(tmp_path / "run")
    notebook.cell(25)
    training = notebook.training
    path = training.path
    training.model.load_state_dict(path[19])
    ema = notebook.begin()
    training.path = path[:20]
    training.run(23, ema)
    assert ema.step == 23
    ema = notebook.begin()
    training.model.load_state_dict(path[12])  # which has no snapshot
    with pytest.raises(ModelMismatchError, match="its weights are those of no snapshot"):
        ema.update_(training.model)


def test_the_earlier_tracker_says_that_it_was_closed(
    tmp_path,
    caplog,
):
    notebook = Notebook(tmp_path / "run")
    notebook.cell(4)
    earlier = notebook.ema
    notebook.cell(1)
    assert "its earlier tracker is closed at step 4, as another one takes its place" in caplog.text
    with pytest.raises(NotReadyError, match="this tracker was closed"):
        earlier.update_(notebook.training.model)
    reader = PostHocEMA.from_path(tmp_path / "run", Training().model)
    assert not notebook.ema.closed  # a reader, also with a model of its own, takes no place
    assert reader.step == 4


def test_a_folder_that_was_removed_between_two_runs_of_a_cell_begins_anew(tmp_path):
    notebook = Notebook(tmp_path / "run")
    notebook.cell(6)
    notebook.ema.flush()
    shutil.rmtree(tmp_path / "run")
    notebook.cell(3)
    assert notebook.ema.step == 3


def test_a_tracker_and_its_attachment_form_no_cycle(tmp_path):
    gc.disable()
    try:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = track(model, tmp_path)
        ema.attach(optimizer)
        reference = weakref.ref(ema)
        del ema
        assert reference() is not None  # which the optimizer updates
        del optimizer
        assert reference() is None
    finally:
        gc.enable()
