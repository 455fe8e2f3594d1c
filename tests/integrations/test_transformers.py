"""The callback for the transformers Trainer, with the real library."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from groups import check_group, run_group

pytest.importorskip("transformers", reason="transformers is not installed: make integrations installs it")
pytest.importorskip("accelerate", reason="accelerate is not installed: make integrations installs it")

import transformers
from integrations.llama import DATA, EVERY, Recorder, make_trainer, network
from integrations.programs import FRAMEWORKS, exit_codes_of_two, heavy, start
from integrations.truth import assert_exact, distance, exact
from transformers import EarlyStoppingCallback, LlamaForCausalLM, Trainer

from posthoc_cli import Run
from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NotReadyError
from posthoc_cli.integrations.transformers import PostHocCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

BEST = {"metric_for_best_model": "eval_ema_loss", "load_best_model_at_end": True, "eval_strategy": "steps"}


def with_weights(weights: Mapping[str, torch.Tensor]) -> LlamaForCausalLM:
    model = network()
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    return model


def loss(weights: Mapping[str, torch.Tensor], folder: Path) -> float:
    """Return the library's loss of weights without a callback; releases weigh the last tokens differently."""
    return float(make_trainer(folder, model=with_weights(weights)).evaluate()["eval_loss"])


def logged(trainer: Trainer, name: str = "eval_ema_loss") -> dict[int, float]:
    """Return a logged figure by step."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """The weights of ten steps without interruption, and without a tracker."""
    recorder = Recorder()
    make_trainer(tmp_path_factory.mktemp("expected"), recorder, save_strategy="no").train()
    return recorder.weights


def test_a_killed_training_resumes_exactly_and_each_step_counts_once(tmp_path: Path, expected: list[Any]) -> None:
    assert start("llama", tmp_path, 7).wait(250) == -signal.SIGKILL
    assert (tmp_path / "out/checkpoint-4/posthoc_ema.pt").exists()
    callback = PostHocCallback(tmp_path / "ema", **EVERY)
    resumed = make_trainer(tmp_path, callback)
    resumed.train(resume_from_checkpoint=True)
    assert_exact(callback.ema, resumed.model, expected)
    assert distance(dict(resumed.model.named_parameters()), expected[-1]) == 0
    run = Run(tmp_path / "ema")
    assert sorted({snapshot.t for snapshot in run.snapshots}) == [4, 8, 10]
    assert distance(run.average(0.2, dtype=torch.float32), exact(expected, 0.2)) < 1e-3  # stored in float16


def test_any_checkpoint_resumes_moved_or_older_than_the_snapshots(tmp_path: Path, expected: list[Any]) -> None:
    """The first tracker of the process is still open, since an exception has ended its training."""
    options = EVERY | {"checkpoint_dtype": None}
    callback = PostHocCallback(tmp_path / "ema", **options)
    first = make_trainer(tmp_path, callback, Recorder(fails_at=9))
    with pytest.raises(KeyError, match="the training fails here"):
        first.train()
    moved = tmp_path / "elsewhere" / "kept"
    shutil.move(tmp_path / "out/checkpoint-4", moved)  # the newest snapshots are of step 8
    first.callback_handler.pop_callback(Recorder)
    first.train(resume_from_checkpoint=str(moved))
    assert_exact(callback.ema, first.model, expected)
    again = PostHocCallback(tmp_path / "ema", **options)
    second = make_trainer(tmp_path, again)
    second.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-8"))
    assert_exact(again.ema, second.model, expected)


def test_a_checkpoint_elsewhere_does_not_take_the_state_of_another_training(
    tmp_path: Path, expected: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """`output_dir` holds a checkpoint of the same step of another training, whose averages differ."""
    options = EVERY | {"checkpoint_dtype": None}
    with pytest.raises(KeyError, match="the training fails here"):
        one = PostHocCallback(tmp_path / "ema", **options)
        make_trainer(tmp_path, one, Recorder(fails_at=5), logging_steps=1).train()
    (tmp_path / "out/checkpoint-4").rename(tmp_path / "kept")
    one.ema.close()
    other = PostHocCallback(tmp_path / "other", **options)
    make_trainer(tmp_path, other, logging_steps=1, learning_rate=0.1, max_steps=4).train()
    assert (tmp_path / "out/checkpoint-4/posthoc_ema.pt").exists()
    callback = PostHocCallback(tmp_path / "ema", **options)
    resumed = make_trainer(tmp_path, callback, logging_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert "holds no state of this callback" in caplog.text
    assert_exact(callback.ema, resumed.model, expected)


def test_a_training_that_begins_again_with_smaller_batches_continues_its_averages(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There were steps and snapshots with larger batches; the trainer does not reset the weights either."""

    class Large(Recorder):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if len(self.weights) == 5:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    callback, recorder = PostHocCallback(tmp_path / "ema", **EVERY), Large()
    trainer = make_trainer(tmp_path, callback, recorder, auto_find_batch_size=True, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 10
    assert_exact(callback.ema, trainer.model, recorder.weights)
    assert len(recorder.weights) == 15
    assert "its averages continue from step 5" in caplog.text


def test_steps_that_a_fused_optimizer_skips_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate counts them: a GradScaler calls such an optimizer, which is the default, even then."""
    from accelerate.optimizer import AcceleratedOptimizer

    scaler, real = torch.amp.GradScaler("cpu"), AcceleratedOptimizer.__init__
    monkeypatch.setattr(
        AcceleratedOptimizer, "__init__", lambda self, inner, *_, **__: real(self, inner, False, scaler=scaler)
    )

    class Infinite(Recorder):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step in (1, 2):
                next(model.parameters()).grad.fill_(torch.inf)

    callback, recorder = PostHocCallback(tmp_path / "ema", **EVERY), Infinite()
    trainer = make_trainer(
        tmp_path, callback, recorder, save_strategy="no", max_steps=6, max_grad_norm=0, optim="adamw_torch_fused"
    )
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert distance(recorder.weights[2], recorder.weights[0]) == 0
    del recorder.weights[1:3]
    assert_exact(callback.ema, trainer.model, recorder.weights)


def test_several_averages_are_evaluated_and_one_of_them_chooses_the_best_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A linear decay over the last half is the mean of that half; a window is left out while training is too short."""
    wanted = [0.2, "decay:linear:50%", "window:5"]
    callback, recorder = PostHocCallback(tmp_path / "ema", evaluate=wanted, **EVERY), Recorder()
    name = "eval_ema_decay-linear-50%_loss"
    arguments = BEST | {"metric_for_best_model": name}
    trainer = make_trainer(tmp_path, recorder, max_steps=8, learning_rate=0.05, eval_steps=2, save_steps=2, **arguments)
    callback.options |= {"checkpoint_every": 2, "checkpoint_dtype": None}
    assert callback.install(trainer) is callback
    trainer.train()
    losses: dict[str, dict[int, float]] = {}
    for label in ("0.2", "decay-linear-50%", "window-5"):
        found, losses[label] = logged(trainer, f"eval_ema_{label}_loss"), {}
        for step in found:
            count = {"0.2": 0, "decay-linear-50%": step // 2, "window-5": 5}[label]
            average = mean(recorder.weights[:step], count) if count else exact(recorder.weights[:step], 0.2)
            losses[label][step] = loss(average, tmp_path)
        # A tracked profile has float32 rounding; a reconstructed one is within the predicted error.
        assert found == pytest.approx(losses[label], rel=1e-5 if label == "0.2" else 2e-3)
    assert losses["window-5"].keys() == {6, 8}
    assert losses["0.2"].keys() == {2, 4, 6, 8}
    assert caplog.text.count("window:5") == 1
    best = min(losses["decay-linear-50%"], key=losses["decay-linear-50%"].get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.state.best_metric == pytest.approx(losses["decay-linear-50%"][best], rel=2e-3)
    assert distance(dict(trainer.model.named_parameters()), mean(recorder.weights[:best], best // 2)) < 5e-3
    (folder,) = (tmp_path / f"out/checkpoint-{best}").glob("ema*")
    assert folder.name == "ema_decay-linear-50%"
    saved = dict(LlamaForCausalLM.from_pretrained(folder).named_parameters())
    assert distance(saved, mean(recorder.weights[:best], best // 2)) < 5e-3


def mean(weights: list[Any], count: int) -> dict[str, torch.Tensor]:
    return {name: sum(step[name] for step in weights[-count:]) / count for name in weights[0]}


@heavy
def test_replicas_in_two_processes_evaluate_one_average(tmp_path: Path) -> None:
    assert exit_codes_of_two("llama", tmp_path, 0) == [0, 0]
    weights = [torch.load(tmp_path / f"weights-{rank}.pt") for rank in "01"]
    assert distance(weights[1][-1], weights[0][-1]) == 0
    history = json.loads((tmp_path / "out/checkpoint-8/trainer_state.json").read_text())["log_history"]
    (found,) = (entry["eval_ema_loss"] for entry in history if "eval_ema_loss" in entry and entry["step"] == 8)
    average = exact(weights[0][:8], 0.2)
    assert found == pytest.approx(loss(average, tmp_path), rel=1e-5)
    folder = LlamaForCausalLM.from_pretrained(tmp_path / "out/checkpoint-8/ema")
    assert distance(dict(folder.named_parameters()), average) < 1e-6
    assert Run(tmp_path / "ema").step == 10


SHARDED = """
import integrations.programs, torch, warnings
warnings.simplefilter("ignore")
integrations.programs.announce(rank, world)
integrations.programs.use_fsdp_on_the_cpu()
from integrations.llama import EVERY, Recorder, make_trainer
from integrations.truth import recorded
from posthoc_cli.integrations.transformers import PostHocCallback
recorder = Recorder(killed_at=7 if "killed" in arguments else 0)
options = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2, "cpu_ram_efficient_loading": False}}
options |= {"metric_for_best_model": "eval_ema_loss", "load_best_model_at_end": True, "eval_strategy": "steps"}
trainer = make_trainer(folder, recorder, max_steps=8, **options)
callback = PostHocCallback(folder / "ema", evaluate=0.2, **EVERY).install(trainer)
trainer.train(resume_from_checkpoint="resumed" in arguments)
best = recorded(trainer.model)
with callback.ema.model(trainer.model, 0.2) as averaged:
    found = recorded(averaged)
torch.save([recorder.weights, found, callback.ema.step, best, trainer.state.best_metric], folder / f"made-{rank}.pt")
"""


@heavy
@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 shards models on accelerators only")
def test_a_killed_training_of_a_sharded_model_resumes_exactly(tmp_path: Path) -> None:
    check_group(SHARDED, 2, tmp_path / "expected", modules=FRAMEWORKS)
    weights, *_ = torch.load(tmp_path / "expected/made-0.pt")
    killed = run_group(SHARDED, 2, tmp_path, "killed", modules=FRAMEWORKS)
    assert -signal.SIGKILL in {result.code for result in killed}
    assert len(list((tmp_path / "out/checkpoint-4/posthoc_ema").glob("*.distcp"))) == 2
    check_group(SHARDED, 2, tmp_path, "resumed", modules=FRAMEWORKS)
    averages = [exact(weights[:step], 0.2) for step in (4, 8)]
    losses = [loss(average, tmp_path) for average in averages]
    for rank in (0, 1):
        resumed, average, step, best, metric = torch.load(tmp_path / f"made-{rank}.pt")
        assert metric == pytest.approx(min(losses), rel=1e-5)
        assert distance(best, averages[losses.index(min(losses))]) < 1e-6
        assert step == len(weights) == 8
        assert distance(resumed[-1], weights[-1]) == 0
        assert distance(average, exact(weights, 0.2)) < 1e-6


def test_several_evaluation_sets_and_figures_in_the_log(tmp_path: Path) -> None:
    callback = PostHocCallback(tmp_path / "ema", evaluate=0.15, **EVERY)
    trainer = make_trainer(tmp_path, save_strategy="no", eval_strategy="steps", logging_steps=1)
    trainer.eval_dataset = {"a": DATA[:2], "b": DATA[2:4]}
    callback.install(trainer)
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_a_loss", "eval_b_loss", "eval_ema_a_loss", "eval_ema_b_loss"} <= names
    assert set(trainer.evaluate()) >= {"eval_a_loss", "eval_ema_a_loss"}  # also when training is over
    assert {"ema/predicted_error_0.15", "ema/snapshot_seconds"} <= names
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == list(range(1, 11))


def test_an_adapter_is_tracked_saved_and_loaded_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(network(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    callback, recorder = PostHocCallback(tmp_path / "ema", evaluate=0.2, folders=True, **EVERY), Recorder()
    trainer = make_trainer(tmp_path, recorder, model=model, max_steps=4)
    callback.install(trainer)
    trainer.train()
    average = exact(recorder.weights, 0.2)
    loaded = peft.PeftModel.from_pretrained(network(), tmp_path / "out/checkpoint-4/ema")
    assert distance(dict(loaded.named_parameters()), average) < 1e-6
    saved = peft.utils.load_peft_weights(str(tmp_path / "out/checkpoint-4"), device="cpu")
    assert set(Run(tmp_path / "ema").tensors) == set(saved)


def test_bad_arguments_and_callbacks_are_errors_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidValueError, match=r"evaluate=0\.15"):
        PostHocCallback(tmp_path / "ema", folders=True)
    for wanted, message in ((0.4, r"0\.4: must lie in"), ([0.1, None], "target None: must be a sigma_rel"), ("x", "x")):
        with pytest.raises(InvalidValueError, match=message):
            PostHocCallback(tmp_path / "ema", evaluate=wanted)
    one, two = PostHocCallback(tmp_path / "one"), PostHocCallback(tmp_path / "two")
    for given in ((one, two), (one, one)):
        with pytest.raises(InvalidValueError, match="leave one out"):
            make_trainer(tmp_path, *given).train()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(PostHocCallback(tmp_path / "ema", evaluate=0.15))
    with pytest.raises(NotReadyError, match=r"install\(trainer\), in place of callbacks"):
        trainer.train()
    make_trainer(tmp_path, max_steps=4).train()  # a checkpoint without the callback
    callback = PostHocCallback(tmp_path / "ema", **EVERY)
    make_trainer(tmp_path, callback).train(resume_from_checkpoint=True)
    assert "or begin with this training" in caplog.text
    assert callback.ema.step == 6
    with pytest.raises(ModelMismatchError, match="another directory"):
        make_trainer(tmp_path, PostHocCallback(tmp_path / "ema", **EVERY), save_strategy="no").train()


def test_early_stopping_on_the_averages_metric(tmp_path: Path) -> None:
    """That callback counts its calls, and is disabled by one without the metric; here it is before ours."""
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(tmp_path, stopping, learning_rate=10.0, eval_steps=1, save_steps=1, **BEST)
    PostHocCallback(tmp_path / "ema", evaluate=0.2, **EVERY).install(trainer)
    trainer.train()
    losses = [*logged(trainer).values()]
    worse = [loss >= best for loss, best in zip(losses[1:], itertools.accumulate(losses, min), strict=False)]
    assert worse == [False] * (len(worse) - 2) + [True] * 2  # such steps only make it worse, and the second one ends it
    assert trainer.state.global_step == len(losses) < 10
