"""Choose the length of a model's weight average after training.

`PostHocEMA` tracks averages while a network trains. `Run` turns its snapshots into the average of
any length, as the `ema` command does. `averages` holds other kinds of averages, `errors` everything
that this package raises on purpose. Names are loaded on first use, so that importing the package is
cheap.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from posthoc_cli.errors import EachOnce, show_unhandled

__version__ = "0.3.0"

if TYPE_CHECKING:
    from posthoc_cli import averages, errors
    from posthoc_cli.checkpoints.import_run import import_checkpoints
    from posthoc_cli.errors import PostHocError
    from posthoc_cli.export.convert import export_file
    from posthoc_cli.opening import disk_sources
    from posthoc_cli.planning import CurveRequest, error_curve
    from posthoc_cli.profiles import PowerFunction, gamma_from_sigma_rel, sigma_rel_from_gamma
    from posthoc_cli.reconstruction import reconstruct
    from posthoc_cli.request import Request
    from posthoc_cli.run import Run
    from posthoc_cli.synthesis.engine import synthesize
    from posthoc_cli.synthesis.plan import plan_synthesis
    from posthoc_cli.targets import Beta, Decay, HalfLife, Mean, Window
    from posthoc_cli.tracker import PostHocEMA

__all__ = [
    "Beta", "CurveRequest", "Decay", "HalfLife", "Mean", "PostHocEMA", "PostHocError",
    "PowerFunction", "Request", "Run", "Window", "averages", "disk_sources", "error_curve",
    "errors", "export_file", "gamma_from_sigma_rel", "import_checkpoints", "plan_synthesis",
    "reconstruct", "sigma_rel_from_gamma", "synthesize",
]  # fmt: skip

_HOMES = {
    "Beta": "targets", "Decay": "targets",
    "HalfLife": "targets", "Mean": "targets", "Window": "targets", "PostHocEMA": "tracker",
    "PostHocError": "errors", "PowerFunction": "profiles",
    "Request": "request", "Run": "run",
    "CurveRequest": "planning", "disk_sources": "opening", "error_curve": "planning",
    "export_file": "export.convert", "gamma_from_sigma_rel": "profiles",
    "import_checkpoints": "checkpoints.import_run", "plan_synthesis": "synthesis.plan",
    "reconstruct": "reconstruction", "sigma_rel_from_gamma": "profiles",
    "synthesize": "synthesis.engine",
}  # fmt: skip
"""The module of each name that is not a module itself."""

logging.getLogger(__name__).addHandler(EachOnce(show_unhandled))


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
