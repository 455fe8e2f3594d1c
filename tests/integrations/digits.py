"""A small regression in Lightning, also as a program that kills itself."""

from pathlib import Path

import torch
from integrations.programs import end, task
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from truth import recorded

from posthoc_cli.integrations.lightning import PostHocWeightAveraging

EVERY = {
    "update_every_n_steps": 1,
    "checkpoint_every": 4,
    "sigma_rels": (0.1, 0.2),
}
X = torch.randn(24, 4, generator=torch.manual_seed(5))
Y = X @ torch.randn(4, 1, generator=torch.manual_seed(6))


def loader():
    return DataLoader(TensorDataset(X, Y), batch_size=4)  # six batches an epoch


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.net = nn.Sequential(*layers)

    def loss(self, batch):
        x, y = batch
        error = self.net(x) - y
        return error.square().mean()

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss(batch))
        self.validated = recorded(self)

    def test_step(self, batch, _):
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Recorder(Callback):
    """Records the weights after each optimizer step, and kills the process at one."""

    def __init__(self, killed_at=0):
        self.weights = []
        self._killed_at = killed_at
        self._step = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.weights.append(recorded(pl_module))
        if 0 < self._step == self._killed_at:
            end(Path(trainer.default_root_dir), self.weights)


def make_trainer(folder, *callbacks, **arguments):
    """Return a trainer of three epochs of six steps, with a checkpoint every fourth step."""
    saving = ModelCheckpoint(folder / "out", "{step}", every_n_train_steps=4, save_top_k=-1)
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=[*callbacks, saving], **(settings | arguments))


class Sharded(Regression):
    def configure_model(self):
        if not hasattr(self.net, "reshard"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


if __name__ == "__main__":
    folder, kind, resumes = task()
    recorder = Recorder(killed_at=0 if resumes else 7)
    group = {}
    module = Regression()
    if kind != "alone":
        group = {"strategy": "ddp", "devices": 2}
    if kind == "sharded":
        group["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        module = Sharded()
    callback = PostHocWeightAveraging(folder / "ema", validate=0.2, **EVERY)
    trainer = make_trainer(folder, callback, recorder, **group)
    checkpoint = folder / "out/step=4.ckpt" if resumes else None
    trainer.fit(module, loader(), loader(), ckpt_path=checkpoint)
    with callback.ema.model(module, 0.2) as averaged:
        average = recorded(averaged)
    made = [recorder.weights, average, callback.ema.step, module.validated]
    if kind != "sharded":
        stored = torch.load(folder / "out/step=8.ckpt", weights_only=True)
        made += [8, stored["state_dict"]]
    torch.save(made, folder / f"made-{trainer.global_rank}.pt")
