"""Choose the length of a model's weight average after training.

`PostHocEMA` tracks averages while a network trains. `Run` turns its snapshots into the average of any length, as the
`ema` command does. `averages` holds other kinds of averages, `errors` everything that this package raises on purpose.
Names are loaded on first use, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from posthoc_cli import averages as averages
    from posthoc_cli import errors as errors
    from posthoc_cli.errors import PostHocError as PostHocError
    from posthoc_cli.export.convert import export_file as export_file
    from posthoc_cli.planning import Schedule as Schedule
    from posthoc_cli.planning import error_curve as error_curve
    from posthoc_cli.profiles import PowerFunction as PowerFunction
    from posthoc_cli.profiles import gamma_from_sigma_rel as gamma_from_sigma_rel
    from posthoc_cli.profiles import sigma_rel_from_gamma as sigma_rel_from_gamma
    from posthoc_cli.reconstruction import reconstruct as reconstruct
    from posthoc_cli.run import Run as Run
    from posthoc_cli.synthesis.engine import synthesize as synthesize
    from posthoc_cli.synthesis.plan import plan_synthesis as plan_synthesis
    from posthoc_cli.synthesis.sources import disk_sources as disk_sources
    from posthoc_cli.targets import Beta as Beta
    from posthoc_cli.targets import Between as Between
    from posthoc_cli.targets import Window as Window
    from posthoc_cli.tracker import PostHocEMA as PostHocEMA

_HOMES = {
    "Beta": "targets",
    "Between": "targets",
    "Window": "targets",
    "PostHocEMA": "tracker",
    "PostHocError": "errors",
    "PowerFunction": "profiles",
    "Run": "run",
    "Schedule": "planning",
    "disk_sources": "synthesis.sources",
    "error_curve": "planning",
    "export_file": "export.convert",
    "gamma_from_sigma_rel": "profiles",
    "plan_synthesis": "synthesis.plan",
    "reconstruct": "reconstruction",
    "sigma_rel_from_gamma": "profiles",
    "synthesize": "synthesis.engine",
}

_MODULES = ("averages", "errors")

__all__ = sorted((*_HOMES, *_MODULES))


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
