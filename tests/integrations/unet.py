"""The training of a small diffusion model as in diffusers' scripts, also as a program that kills
itself."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from integrations.programs import end, task
from truth import EVERY, recorded

from posthoc_cli.errors import NotReadyError
from posthoc_cli.integrations.diffusers import PostHocEMAModel

IMAGES = torch.randn(10, 2, 1, 8, 8, generator=torch.manual_seed(5))


def network():
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (4,),
    }
    size = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    }
    return UNet2DModel(add_attention=False, **size, **blocks)


class Training:
    def __init__(self, folder):
        self.folder = folder
        self.accelerator = Accelerator(cpu=True)
        self.bare = network()
        self.ema_model = PostHocEMAModel(
            self.bare,
            folder / "ema",
            sigma_rel=0.2,
            model_cls=UNet2DModel,
            model_config=self.bare.config,
            **EVERY,
        )
        self.accelerator.register_save_state_pre_hook(self.save)
        self.accelerator.register_load_state_pre_hook(self.load)
        optimizer = torch.optim.AdamW(self.bare.parameters(), lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(self.bare, optimizer)
        self.ema_model.to(self.accelerator.device)
        self.weights = []

    def save(self, models, weights, output_dir):
        if self.accelerator.is_main_process:
            self.ema_model.save_pretrained(Path(output_dir) / "unet_ema")
            for model in models:
                model.save_pretrained(Path(output_dir) / "unet")
                weights.pop()

    def load(self, models, input_dir):
        loaded = PostHocEMAModel.from_pretrained(Path(input_dir) / "unet_ema", UNet2DModel)
        self.ema_model.load_state_dict(loaded.state_dict())
        self.ema_model.to(self.accelerator.device)
        saved = UNet2DModel.from_pretrained(input_dir, subfolder="unet")
        models.pop().load_state_dict(saved.state_dict())

    def run(self, first=0, killed_at=0):
        for number in range(first, len(IMAGES)):
            output = self.model(IMAGES[number], number).sample
            self.accelerator.backward(output.square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema_model.step(self.model.parameters())
            self.weights.append(recorded(self.bare))
            if number == 3 and self.accelerator.is_main_process:
                self.accelerator.save_state(str(self.folder / "saved"))
            if number == killed_at > 0:
                end(self.folder, self.weights)


if __name__ == "__main__":
    folder, _, resumes = task()
    training = Training(folder)
    other = network()
    if resumes:
        training.accelerator.load_state(str(folder / "saved"))
        training.run(first=4)
    else:
        training.run(killed_at=7)
    training.accelerator.wait_for_everyone()
    if training.accelerator.is_main_process:
        training.ema_model.copy_to(other.parameters())
        average = recorded(other)
        made = [training.weights, average, training.ema_model.optimization_step, average]
        torch.save(made, folder / "made-0.pt")
    else:
        training.ema_model.save_pretrained(folder / "none")
        with pytest.raises(NotReadyError, match="first process"):
            training.ema_model.copy_to(other.parameters())
    training.ema_model.close()
