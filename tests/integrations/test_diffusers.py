"""The replacement for diffusers' EMAModel, with the real library."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from groups import check_group

pytest.importorskip("diffusers", reason="diffusers is not installed: make integrations installs it")

from diffusers import UNet2DModel
from integrations.programs import FRAMEWORKS, heavy
from integrations.truth import distance, exact, recorded
from integrations.unet import EVERY, Training, network

from posthoc_cli import Run
from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.integrations.diffusers import PostHocEMAModel

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


def test_a_script_resumes_exactly_through_its_save_hooks(tmp_path: Path) -> None:
    """From the checkpoint of the fourth step, with snapshots of later ones on the disk."""
    first = Training(tmp_path)
    first.run(last=7)
    first.ema_model.close()
    complete = Training(tmp_path / "complete")
    complete.run()
    resumed = Training(tmp_path)
    resumed.accelerator.load_state(str(tmp_path / "saved"))
    resumed.run(first=4)
    assert resumed.ema_model.ema.step == 10
    assert distance(resumed.weights[-1], complete.weights[-1]) == 0
    parameters = list(resumed.model.parameters())
    resumed.ema_model.store(parameters)
    resumed.ema_model.copy_to(parameters)
    assert distance(recorded(resumed.bare), exact(complete.weights, 0.2)) < 1e-6
    resumed.ema_model.restore(parameters)
    assert distance(recorded(resumed.bare), complete.weights[-1]) == 0
    saved = UNet2DModel.from_pretrained(tmp_path / "saved/unet_ema")
    assert distance(dict(saved.named_parameters()), exact(complete.weights[:4], 0.2)) < 1e-6
    other = network()  # such as the model of a pipeline
    resumed.ema_model.copy_to(other.parameters())
    assert distance(dict(other.named_parameters()), exact(complete.weights, 0.2)) < 1e-6
    decay = resumed.ema_model.cur_decay_value  # of the update from 9 to 10: (9 / 10) ** (gamma + 1)
    x = math.log(decay) / math.log(0.9)
    assert x / ((x + 1) ** 2 * (x + 2)) == pytest.approx(0.2**2, rel=1e-9)
    shadow = dict(zip(dict(resumed.bare.named_parameters()), resumed.ema_model.shadow_params, strict=True))
    assert distance(shadow, exact(complete.weights, 0.2)) < 1e-6
    assert resumed.ema_model.optimization_step == 10
    assert resumed.ema_model.get_decay(10) == resumed.ema_model.decay == decay
    resumed.ema_model.load_state_dict(resumed.ema_model.state_dict())
    assert resumed.ema_model.ema.step == 10
    with pytest.raises(NotReadyError, match="tracks no model"):
        PostHocEMAModel.from_pretrained(tmp_path / "saved/unet_ema").step()
    resumed.ema_model.close()
    assert Run(tmp_path / "ema").step == 10


GROUP = """
import integrations.programs, torch, warnings
warnings.simplefilter("ignore")
integrations.programs.announce(rank, world)
from integrations.unet import Training, network, recorded
made = []
for resumed in (False, True):
    training = Training(folder)
    if resumed:
        training.accelerator.load_state(str(folder / "saved"))
    else:
        assert training.ema_model.cur_decay_value is None
    training.run(first=4 * resumed)
    training.accelerator.wait_for_everyone()
    if rank == 0:
        other = network()
        training.ema_model.copy_to(other.parameters())
        made.append([training.weights, recorded(other)])
    else:
        training.ema_model.save_pretrained(folder / "none")
        refused(lambda: training.ema_model.copy_to(training.bare.parameters()))
    training.ema_model.close()
torch.save(made, folder / f"made-{rank}.pt")
"""


@heavy
def test_the_main_process_alone_saves_and_copies_averages(tmp_path: Path) -> None:
    _, out = check_group(GROUP, 2, tmp_path, modules=FRAMEWORKS)
    (complete, average), (weights, again) = torch.load(tmp_path / "made-0.pt")
    assert distance(average, exact(complete, 0.2)) < 1e-6
    assert distance(weights[-1], complete[-1]) == 0
    assert distance(again, exact(complete, 0.2)) < 1e-6
    assert out.count("the first process keeps the averages") == 2
    assert not (tmp_path / "none").exists()


def test_bad_arguments_and_calls_are_errors(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(InvalidValueError, match=r"0\.4: must lie in"):
        PostHocEMAModel(model, tmp_path, sigma_rel=0.4)
    with pytest.raises(InvalidValueError, match="not its parameters"):
        PostHocEMAModel(model.parameters(), tmp_path)
    ema_model = PostHocEMAModel(model, tmp_path, **EVERY)
    with pytest.raises(NotReadyError, match="copy_to"):
        ema_model.restore(model.parameters())
    with pytest.raises(InvalidValueError, match="neither those of a UNet2DModel"):
        ema_model.copy_to(list(model.parameters())[:2])
    with pytest.raises(InvalidValueError, match="not a folder of save_pretrained"):
        PostHocEMAModel.from_pretrained(tmp_path)
