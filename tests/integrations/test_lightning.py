"""The callback for Lightning's Trainer, with the real library."""

import copy

import pytest
import torch
from checking import refused

pytest.importorskip("lightning.pytorch")

from integrations.digits import EVERY, Recorder, Regression, loader, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tracker.runs import times
from truth import assert_exact, distance, exact, live, recorded

from posthoc_cli.integrations.lightning import PostHocWeightAveraging

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


def fit(folder, *callbacks, module=None, ckpt_path=None, **arguments):
    if module is None:
        module = Regression()
    trainer = make_trainer(folder, *callbacks, **arguments)
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return module


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The weights of 18 steps without interruption, and without a tracker."""
    recorder = Recorder()
    fit(tmp_path_factory.mktemp("expected"), recorder)
    return recorder.weights


def test_validation_and_checkpoints_hold_the_average_and_training_does_not(tmp_path, expected):
    seen = []

    class Watching(Regression):
        def validation_step(self, batch, index):
            if index == 0:
                seen.append(copy.deepcopy(parameters(self)))

    callback = PostHocWeightAveraging(tmp_path / "ema", validate=0.2, **EVERY)
    trainer = make_trainer(tmp_path, callback, num_sanity_val_steps=1)
    module = Watching()
    trainer.fit(module, loader(), loader())
    _sanity, *averages = seen
    for average, last in zip(averages, (6, 12, 18), strict=True):
        assert distance(average, exact(expected[:last], 0.2)) < 1e-6
    assert distance(parameters(module), expected[-1]) == 0
    checkpoint = tmp_path / "out/step=8.ckpt"
    stored = torch.load(checkpoint, weights_only=True)
    assert distance(stored["current_model_state"], expected[7]) == 0
    loaded = Regression.load_from_checkpoint(checkpoint)
    assert distance(parameters(loaded), exact(expected[:8], 0.2)) < 1e-6
    trainer.test(module, loader(), ckpt_path=str(checkpoint), verbose=False)
    assert distance(parameters(module), exact(expected[:8], 0.2)) < 1e-6


def parameters(module):
    return dict(module.named_parameters())


class Failing(Regression):
    def validation_step(self, batch, index):
        raise KeyError("the validation fails")


class Manual(Regression):
    """A generator and its critic, each with an optimizer that steps at every second batch."""

    automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            if index % 2 == 0:
                optimizer.step()

    def configure_optimizers(self):
        optimizers = []
        for layer in (self.net[0], self.net[-1]):
            optimizers.append(torch.optim.SGD(layer.parameters(), lr=0.05))
        return optimizers


def test_a_step_counts_once_with_two_optimizers_and_not_without_a_step(tmp_path):
    callback = PostHocWeightAveraging(tmp_path / "ema", **EVERY)
    recorder = Recorder()
    module = fit(tmp_path, callback, recorder, module=Manual())
    assert len(recorder.weights) == 9  # of 18 batches; the trainer counts 18 steps
    assert_exact(callback.ema, module, recorder.weights)


def test_accumulation_and_a_stride(tmp_path):
    options = EVERY | {"update_every_n_steps": 2}
    callback = PostHocWeightAveraging(tmp_path / "ema", **options)
    recorder = Recorder()
    module = fit(
        tmp_path,
        callback,
        recorder,
        accumulate_grad_batches=2,
        max_epochs=4,
    )
    assert len(recorder.weights) == 12
    assert_exact(callback.ema, module, recorder.weights, every=2)


class AtEpochEnds(PostHocWeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


def test_updates_at_the_ends_of_epochs(tmp_path, expected):
    callback = AtEpochEnds(tmp_path / "ema", **EVERY)
    module = fit(tmp_path, callback)
    assert callback.ema.step == 3
    assert callback.ema.t == 18
    average = live(callback.ema, module, 0.2)
    assert distance(average, exact(expected, 0.2, every=6)) < 1e-6


class Always(PostHocWeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return True


def test_a_step_that_ends_an_epoch_is_one_update(tmp_path):
    callback = Always(tmp_path / "ema", **EVERY)
    fit(tmp_path, callback)
    assert callback.ema.step == 18


class Beginning(Callback):
    def on_train_start(self, trainer, pl_module):
        self.weights = recorded(pl_module)


def test_an_exception_closes_the_tracker_and_a_resumed_training_copies_the_average_at_its_end(
    tmp_path,
    expected,
):
    options = EVERY | {"validate": 0.2, "copy_at_end": True}
    callback = PostHocWeightAveraging(tmp_path / "ema", **options)
    module = Failing()
    with pytest.raises(KeyError, match="the validation fails"):
        fit(tmp_path, callback, module=module)
    assert distance(parameters(module), expected[5]) == 0  # the raw weights
    assert times(tmp_path / "ema") == {4, 6}
    again = PostHocWeightAveraging(tmp_path / "ema", **options)
    beginning = Beginning()
    module = fit(tmp_path, again, beginning, ckpt_path=tmp_path / "out/step=4.ckpt")
    assert distance(beginning.weights, expected[3]) == 0  # the raw ones, too
    with again.ema.model(Regression(), 0.2) as average:
        assert distance(parameters(module), parameters(average)) == 0


def test_a_checkpoint_without_the_callback_is_accepted_and_figures_are_logged(tmp_path, caplog):
    fit(tmp_path, max_epochs=1)
    callback = PostHocWeightAveraging(tmp_path / "ema", validate=0.15, **EVERY)
    logger = CSVLogger(tmp_path / "logs", flush_logs_every_n_steps=1)
    fit(tmp_path, callback, logger=logger, ckpt_path=tmp_path / "out/step=4.ckpt")
    assert "the averages begin with this training" in caplog.text
    (metrics,) = (tmp_path / "logs").rglob("metrics.csv")
    assert "ema/predicted_error_0.15" in metrics.read_text()


def test_a_copy_at_the_end_needs_a_length(tmp_path):
    with refused("copy_at_end", "validate="):
        PostHocWeightAveraging(tmp_path, copy_at_end=True)


def test_a_fast_dev_run_writes_nothing_and_training_then_begins(tmp_path):
    callback = PostHocWeightAveraging(
        tmp_path / "ema",
        validate=0.2,
        copy_at_end=True,
        **EVERY,
    )
    fit(tmp_path, callback, fast_dev_run=3)
    assert callback.ema is None
    assert not (tmp_path / "ema").exists()
    fit(tmp_path, callback, limit_train_batches=2, max_epochs=1)
    assert times(tmp_path / "ema") == {2}


def test_a_training_that_goes_on_continues_the_clock(tmp_path):
    module = Regression()
    for t in (2, 4):
        callback = PostHocWeightAveraging(tmp_path / "ema", resume="auto", **EVERY)
        fit(tmp_path, callback, module=module, limit_train_batches=2, max_epochs=1)
        assert callback.ema.t == t


def test_a_training_has_only_one_averaging_callback(tmp_path):
    """Checkpoints have room for one average: of two, each would take the average of the other for
    the raw weights."""
    one = PostHocWeightAveraging(tmp_path / "ema", **EVERY)
    other = AtEpochEnds(tmp_path / "other", **EVERY)
    with refused("callbacks"):
        fit(tmp_path, one, other)
