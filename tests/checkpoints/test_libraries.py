"""Averages that other libraries stored, written by the libraries themselves where they are
installed."""

import inspect

import edm2_layout
import pytest
import torch
from checking import refused
from checkpoint_layouts import check_average
from saved import read

from posthoc_cli import Run

WIDTHS = (0.05, 0.28)
ASKED = [
    ("ema_model.w", {}, "sigma_rels", " --sigma-rels N --update-every N --out run"),
    ("ema_model.w", {"sigma_rels": WIDTHS}, "update_every", " N --out run"),
    ("ema_model.w", {"sigma_rels": (0.05,), "update_every": 1}, "sigma_rels", " 1."),
    ("w", {"sigma_rels": WIDTHS, "update_every": 5}, "update_after_step", " 100"),
]


@pytest.mark.parametrize(("name", "settings", "lacking", "fact"), ASKED)
def test_what_numbered_files_lack_is_asked_for(name, settings, lacking, fact, tmp_path):
    """With a wrong `update_after_step`, averages were 8 % off."""
    for number in (0, 1):
        content = {
            "initted": torch.tensor(True),
            name: torch.ones(3),
        }
        torch.save(content, tmp_path / f"{number}.200.pt")
    with refused(lacking, fact):
        read(tmp_path, **settings)


def of_ema_pytorch():
    return pytest.importorskip("ema_pytorch").KarrasEMA


def of_posthoc_ema():
    return pytest.importorskip("posthoc_ema").PostHocEMA.from_model


@pytest.mark.parametrize(
    ("name", "library"), [("ema_model.w", of_ema_pytorch), ("w", of_posthoc_ema)]
)
def test_the_default_of_what_a_file_lacks_is_that_of_its_library(name, library, tmp_path):
    for number in (0, 1):
        content = {"initted": torch.tensor(True), name: torch.ones(3)}
        torch.save(content, tmp_path / f"{number}.200.pt")
    default = inspect.signature(library()).parameters["update_every"].default
    with refused("update_every", f"by default update_every is {default}"):
        read(tmp_path, sigma_rels=WIDTHS)


def test_the_first_update_of_posthoc_ema_is_at_step_1_at_the_earliest(tmp_path):
    content = {
        "initted": torch.tensor(True),
        "w": torch.ones(3),
    }
    torch.save(content, tmp_path / "0.200.pt")
    settings = {
        "update_every": 5,
        "update_after_step": 0,
    }
    (source,) = read(tmp_path, sigma_rels=(0.05,), **settings).checkpoints
    assert source.profile.t_first == 1


def test_pickles_of_edm2(tmp_path):
    states = {}
    for kimg in (0, 1024, 2048):
        for width in (0.05, 0.1):
            net = edm2_layout.network()
            edm2_layout.save(tmp_path / f"network-snapshot-{kimg:07d}-{width:.3f}.pkl", net)
            states[1000 * kimg, width] = net.state_dict()
        # as its training does
        torch.save({"net": net.state_dict()}, tmp_path / f"training-state-{kimg:07d}.pt")
    run = Run(tmp_path)
    times = [(source.t, source.sigma_rel) for source in run.sources]
    assert times == [*states][2:]
    assert run.sources[0].t_unit == "images"
    check_average(run, states, 0.07, at="t sigma_rel", exact=1e-6)


def test_a_published_file_of_edm2_has_its_time_and_width_in_its_name(tmp_path):
    file = tmp_path / "edm2-img512-s-2147483-0.050.pkl"
    edm2_layout.save(file, edm2_layout.network())
    (source,) = Run(file).sources
    assert source.t == 2_147_483_000
    assert source.sigma_rel == 0.05
