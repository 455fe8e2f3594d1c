"""A small language model, and its training by the transformers Trainer, also as a program that
kills itself."""

from pathlib import Path

import torch
from integrations.programs import end, task, use_fsdp_on_the_cpu
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from truth import EVERY, recorded

from posthoc_cli.integrations.transformers import PostHocCallback

BEST = {
    "metric_for_best_model": "eval_ema_loss",
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
}
DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(0, 32, (40, 8), generator=torch.manual_seed(1))
]


class Recorder(TrainerCallback):
    """Records the weights after each step, and kills the process, or raises an error, at one."""

    def __init__(self, killed_at=0, fails_at=0):
        self.weights = []
        self._killed_at = killed_at
        self._fails_at = fails_at
        self.before_end = lambda: None

    def on_optimizer_step(self, args, state, control, model, **_):
        self.weights.append(recorded(model))

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self._killed_at:
            self.before_end()
            end(Path(args.output_dir).parent, self.weights)
        if state.global_step == self._fails_at:
            raise KeyError("the training fails here")


def network():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def make_trainer(folder, *callbacks, model=None, **arguments):
    settings = {
        "max_steps": 10,
        "save_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 5,
        "seed": 3,
        "eval_steps": 4,
    }
    args = TrainingArguments(str(folder / "out"), **(settings | arguments))
    if model is None:
        model = network()
    trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA[:4])
    for callback in callbacks:
        if getattr(callback, "evaluate", None) is not None:
            callback.install(trainer)
        else:
            trainer.add_callback(callback)
    return trainer


class Evaluated(TrainerCallback):
    def on_prediction_step(self, args, state, control, model, **_):
        self.weights = recorded(model)


if __name__ == "__main__":
    folder, kind, resumes = task()
    recorder = Recorder(killed_at=0 if resumes else 7)
    evaluated = Evaluated()
    options = dict(BEST)
    if kind == "sharded":
        use_fsdp_on_the_cpu()
        options |= {
            "fsdp": "full_shard",
            "fsdp_config": {"fsdp_version": 2, "cpu_ram_efficient_loading": False},
        }
    trainer = make_trainer(folder, recorder, evaluated, **options)
    callback = PostHocCallback(folder / "ema", evaluate=0.2, **EVERY).install(trainer)
    recorder.before_end = lambda: callback.ema.flush()  # the snapshots of step 4 are on disk
    trainer.train(resume_from_checkpoint=resumes)
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    loaded = recorded(trainer.model)
    with callback.ema.model(trainer.model, 0.2) as averaged:
        average = recorded(averaged)
    made = [recorder.weights, average, callback.ema.step, evaluated.weights, best, loaded]
    torch.save(made, folder / f"made-{trainer.args.process_index}.pt")
