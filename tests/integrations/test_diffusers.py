"""The replacement for diffusers' EMAModel, with the real library."""

import pytest
import torch
from checking import refused

pytest.importorskip("diffusers")

from diffusers import UNet2DModel
from integrations.unet import Training, network
from truth import EVERY, distance, exact, recorded

from posthoc_cli.errors import NotReadyError
from posthoc_cli.integrations.diffusers import PostHocEMAModel

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


def test_a_script_finds_the_methods_of_the_librarys_own_averages(tmp_path):
    """`test_processes` kills and resumes this training."""
    complete = Training(tmp_path)
    ema_model = complete.ema_model
    complete.run()
    average = exact(complete.weights, 0.2)
    parameters = list(complete.model.parameters())
    ema_model.store(parameters)
    ema_model.copy_to(parameters)
    assert distance(recorded(complete.bare), average) < 1e-6
    ema_model.restore(parameters)
    assert distance(recorded(complete.bare), complete.weights[-1]) == 0
    other = network()  # such as the model of a pipeline
    ema_model.copy_to(other.parameters())
    assert distance(recorded(other), average) < 1e-6
    shadow = zip(
        recorded(complete.bare),
        ema_model.shadow_params,
        strict=True,
    )
    assert distance(dict(shadow), average) < 1e-6
    assert ema_model.optimization_step == 10
    ema_model.load_state_dict(ema_model.state_dict())
    assert ema_model.ema.step == 10
    saved = UNet2DModel.from_pretrained(tmp_path / "saved/unet_ema")
    assert distance(recorded(saved), exact(complete.weights[:4], 0.2)) < 1e-6
    with pytest.raises(NotReadyError):
        PostHocEMAModel.from_pretrained(tmp_path / "saved/unet_ema").step()


def test_bad_arguments_and_calls_are_errors(tmp_path):
    model = network()
    with refused("sigma_rel 0.4"):
        PostHocEMAModel(model, tmp_path, sigma_rel=0.4)
    with refused("model"):
        PostHocEMAModel(model.parameters(), tmp_path)
    ema_model = PostHocEMAModel(model, tmp_path, **EVERY)
    with refused("restore", "copy_to", kind=NotReadyError):
        ema_model.restore(model.parameters())
    ema_model.step()
    with refused("parameters"):
        ema_model.copy_to(list(model.parameters())[:2])
    with refused(f"path {tmp_path}"):
        PostHocEMAModel.from_pretrained(tmp_path)


def test_the_average_is_copied_into_trainable_parameters_alone(tmp_path):
    model = torch.nn.Linear(2, 3)
    model.weight.requires_grad_(False)
    ema_model = PostHocEMAModel(model, tmp_path, sigma_rel=0.2, **EVERY)
    ema_model.step()
    average = model.bias.detach().clone()
    torch.nn.init.zeros_(model.bias)
    ema_model.copy_to([model.bias])
    assert torch.equal(model.bias, average)
