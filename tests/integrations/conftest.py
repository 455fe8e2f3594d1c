"""Fixtures of the tests with training frameworks."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Forget the state that accelerate keeps in the process."""
    found = sys.modules.get("accelerate.state")
    for kind in ("AcceleratorState", "GradientState", "PartialState") if found else ():
        getattr(found, kind)._reset_state()
