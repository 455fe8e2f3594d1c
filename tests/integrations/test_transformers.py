"""The callback for the transformers Trainer, with the real library."""

import gc
import shutil
import weakref

import pytest
import torch
from checking import refused

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from integrations.llama import BEST, DATA, Recorder, make_trainer, network
from transformers import EarlyStoppingCallback
from truth import EVERY, assert_exact, distance, exact, recorded

from posthoc_cli import Run
from posthoc_cli.errors import ModelMismatchError, NotReadyError
from posthoc_cli.integrations.transformers import PostHocCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


def with_weights(weights):
    model = network()
    model.load_state_dict(weights, strict=False)
    return model


def loss(weights, folder):
    """Return the library's loss of weights without a callback; releases weigh the last tokens
    differently."""
    trainer = make_trainer(folder, model=with_weights(weights))
    return float(trainer.evaluate()["eval_loss"])


def logged(trainer, name="eval_ema_loss"):
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The weights of ten steps without interruption, and without a tracker."""
    recorder = Recorder()
    make_trainer(
        tmp_path_factory.mktemp("expected"),
        recorder,
        save_strategy="no",
    ).train()
    return recorder.weights


def test_a_checkpoint_elsewhere_does_not_take_the_state_of_another_training(
    tmp_path,
    expected,
    caplog,
):
    """`output_dir` holds a checkpoint of the same step of another training, whose averages differ;
    neither has logged anything yet. The first tracker is still open, since an exception has ended
    its training."""
    options = EVERY | {"checkpoint_dtype": None}
    callback = PostHocCallback(tmp_path / "ema", **options)
    first = make_trainer(tmp_path, callback, Recorder(fails_at=9))
    with pytest.raises(KeyError, match="the training fails here"):
        first.train()
    shutil.move(tmp_path / "out/checkpoint-4", tmp_path / "kept")  # the newest snapshots: 8
    other = PostHocCallback(tmp_path / "other", **options)
    make_trainer(
        tmp_path,
        other,
        learning_rate=0.1,
        max_steps=4,
    ).train()
    assert (tmp_path / "out/checkpoint-4/posthoc_ema.pt").exists()
    callback = PostHocCallback(tmp_path / "ema", **options)
    resumed = make_trainer(tmp_path, callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert "holds no averages of these weights" in caplog.text
    assert_exact(callback.ema, resumed.model, expected)


def test_a_training_that_begins_again_with_smaller_batches_continues_its_averages(tmp_path, caplog):
    """There were steps and snapshots with larger batches; the trainer does not reset the weights
    either."""

    class Large(Recorder):
        def on_step_end(self, args, state, control, **_):
            if len(self.weights) == 5:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    callback = PostHocCallback(tmp_path / "ema", **EVERY)
    recorder = Large()
    options = {"auto_find_batch_size": True, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, callback, recorder, **options)
    trainer.train()
    assert trainer.state.global_step == 10
    assert_exact(callback.ema, trainer.model, recorder.weights)
    assert len(recorder.weights) == 15
    assert "its averages continue from step 5" in caplog.text


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_a_scaler_skips_do_not_count(tmp_path, monkeypatch, optim):
    """accelerate counts those of a fused optimizer, the default, which a GradScaler calls even
    then."""
    from accelerate.optimizer import AcceleratedOptimizer

    scaler = torch.amp.GradScaler("cpu")
    real = AcceleratedOptimizer.__init__

    def init(self, inner, *_, **__):
        real(self, inner, False, scaler=scaler)

    monkeypatch.setattr(AcceleratedOptimizer, "__init__", init)

    class Infinite(Recorder):
        def on_pre_optimizer_step(self, _, state, __, model, **___):
            if state.global_step in (1, 2):
                next(model.parameters()).grad.fill_(torch.inf)

    callback = PostHocCallback(tmp_path / "ema", **EVERY)
    recorder = Infinite()
    options = {"save_strategy": "no", "max_steps": 6, "max_grad_norm": 0, "optim": optim}
    trainer = make_trainer(tmp_path, callback, recorder, **options)
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert distance(recorder.weights[2], recorder.weights[0]) == 0
    del recorder.weights[1:3]
    assert_exact(callback.ema, trainer.model, recorder.weights)


def test_several_averages_are_evaluated_and_one_of_them_chooses_the_best_model(tmp_path, caplog):
    """A linear decay over the last half is the mean of that half; a window is left out while
    training is too short."""
    wanted = [0.2, "decay:linear:50%", "window:5"]
    options = EVERY | {"checkpoint_every": 2, "checkpoint_dtype": None}
    callback = PostHocCallback(tmp_path / "ema", evaluate=wanted, **options)
    recorder = Recorder()
    arguments = BEST | {"metric_for_best_model": "eval_ema_decay-linear-50%_loss"}
    arguments |= {"max_steps": 8, "learning_rate": 0.05, "eval_steps": 2, "save_steps": 2}
    trainer = make_trainer(tmp_path, recorder, **arguments)
    callback.install(trainer).install(trainer)
    trainer.train()
    weights = recorder.weights
    steps = (2, 4, 6, 8)
    losses = {step: loss(exact(weights[:step], 0.2), tmp_path) for step in steps}
    assert logged(trainer, "eval_ema_0.2_loss") == pytest.approx(losses, rel=1e-5)
    # these are within the predicted error
    losses = {step: loss(mean(weights[step - 5 : step]), tmp_path) for step in (6, 8)}
    assert logged(trainer, "eval_ema_window-5_loss") == pytest.approx(losses, rel=2e-3)
    losses = {step: loss(mean(weights[step // 2 : step]), tmp_path) for step in steps}
    assert logged(trainer, "eval_ema_decay-linear-50%_loss") == pytest.approx(losses, rel=2e-3)
    assert caplog.text.count("window:5") == 1
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert distance(recorded(trainer.model), mean(weights[best // 2 : best])) < 5e-3
    assert (tmp_path / f"out/checkpoint-{best}/ema_decay-linear-50%").exists()


def mean(weights):
    """Return the average at the last of these steps, by definition."""
    mean = {}
    for name in weights[0]:
        values = torch.stack([step[name] for step in weights])
        mean[name] = values.mean(dim=0)
    return mean


def test_several_evaluation_sets_and_figures_in_the_log(tmp_path):
    callback = PostHocCallback(tmp_path / "ema", evaluate=0.15, **EVERY)
    trainer = make_trainer(
        tmp_path,
        save_strategy="no",
        eval_strategy="steps",
        logging_steps=1,
    )
    trainer.eval_dataset = {"a": DATA[:2], "b": DATA[2:4]}
    callback.install(trainer)
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_a_loss", "eval_b_loss", "eval_ema_a_loss", "eval_ema_b_loss"} <= names
    assert "eval_ema_a_loss" in trainer.evaluate()  # also when training is over
    assert {"ema/predicted_error_0.15", "ema/snapshot_seconds"} <= names
    assert [*logged(trainer, "loss")] == [*range(1, 11)]


def test_an_adapter_is_tracked_saved_and_loaded_alone(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(network(), config)
    callback = PostHocCallback(tmp_path / "ema", evaluate=0.2, **EVERY)
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, model=model, max_steps=4, **BEST)
    callback.install(trainer)
    trainer.train()
    average = exact(recorder.weights, 0.2)
    loaded = peft.PeftModel.from_pretrained(network(), tmp_path / "out/checkpoint-4/ema")
    assert distance(dict(loaded.named_parameters()), average) < 1e-6
    saved = peft.utils.load_peft_weights(str(tmp_path / "out/checkpoint-4"), device="cpu")
    assert set(Run(tmp_path / "ema").tensors) == set(saved)


def test_wrong_callbacks_are_errors_at_once(tmp_path):
    one = PostHocCallback(tmp_path / "one")
    two = PostHocCallback(tmp_path / "two")
    with refused("callbacks"):
        make_trainer(tmp_path, one, two).train()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(PostHocCallback(tmp_path / "ema", evaluate=0.15))
    with pytest.raises(NotReadyError, match=r"install\(trainer\)"):
        trainer.train()


def test_averages_begin_where_a_checkpoint_has_none_and_not_with_other_weights(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=4).train()
    callback = PostHocCallback(tmp_path / "ema", **EVERY)
    make_trainer(tmp_path, callback).train(resume_from_checkpoint=True)
    assert "begin with this training" in caplog.text
    assert callback.ema.step == 6
    again = PostHocCallback(tmp_path / "ema", **EVERY)
    with refused("model", "resume=0", kind=ModelMismatchError):
        make_trainer(tmp_path, again).train()


def test_early_stopping_on_the_averages_metric(tmp_path):
    """That callback counts its calls, and is disabled by one without the metric; here it is before
    ours."""
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    arguments = BEST | {"learning_rate": 10.0, "eval_steps": 1, "save_steps": 1}
    trainer = make_trainer(tmp_path, stopping, **arguments)
    PostHocCallback(tmp_path / "ema", evaluate=0.2, **EVERY).install(trainer)
    trainer.train()
    losses = [*logged(trainer).values()]
    assert trainer.state.global_step == len(losses) < 10
    # each step was better than those before, but for the last two
    *better, one, other = losses
    assert better == sorted({*better}, reverse=True)
    assert min(one, other) >= better[-1]


def test_a_finished_training_frees_its_model_and_trainer(tmp_path):
    callback = PostHocCallback(tmp_path / "ema", evaluate=0.15, **EVERY)
    trainer = make_trainer(tmp_path, save_strategy="no", max_steps=4)
    callback.install(trainer)
    trainer.train()
    model = weakref.ref(trainer.model)
    reference = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert model() is None
    assert reference() is None
    assert callback.ema is not None
