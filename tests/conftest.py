"""Fixtures that many tests share."""

import gc
import importlib.util

import pytest
import torch
from device import IS_SIMULATED, MODULE
from ema_command import run_ema
from integrations.programs import forget

from posthoc_cli.tracker import memory, pipeline

if importlib.util.find_spec("hypothesis") is not None:  # `make gpu` may run without it
    import hypothesis

    # other work runs at the same time
    hypothesis.settings.register_profile("any machine", deadline=None)
    hypothesis.settings.load_profile("any machine")


def pytest_collection_finish():
    """Exempt loaded modules from garbage collection, which some tests run."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("cuda")
    if marker is None:
        return
    if IS_SIMULATED and not marker.kwargs.get("simulated", True):
        pytest.skip("needs a CUDA device, not a simulated one")
    if not MODULE.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: tensors are small, and other test processes use the other cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _alone():
    """Seed torch for each test; fail a test that leaves gradients disabled or inference mode on."""
    torch.manual_seed(0)
    yield
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    assert modes == (True, False)


@pytest.fixture(autouse=True)
def _ended():
    """Close trackers that a test has not closed, so that they log nothing into another test; reset
    accelerate."""
    yield
    pipeline.finish()
    forget()


@pytest.fixture
def small_tiles(monkeypatch):
    """Divide the tensors of small models into many tiles, as those of large ones are."""
    monkeypatch.setattr(memory, "TILE", 64)


@pytest.fixture
def ema():
    """Return a function that runs `ema` with its arguments."""
    return run_ema
