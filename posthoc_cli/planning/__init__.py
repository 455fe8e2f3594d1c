"""Schedules before training, thinning of snapshots during it, and the errors to expect after it.

Pure NumPy; no function of this room reads a file, so that schedules can be compared before training.
"""

from posthoc_cli.planning.curves import (
    EVENLY,
    Candidate,
    ErrorCurve,
    ErrorPoint,
    ErrorReport,
    check_max_error,
    check_sigma_range,
    check_within,
    error_curve,
    forecast,
    time_between,
)  # fmt: skip
from posthoc_cli.planning.proposals import PlanReport, evaluate, propose
from posthoc_cli.planning.schedule import (
    SPARED_TIMES,
    USEFUL_RANGE,
    Schedule,
    exchanged,
    range_of,
    relative_rounding,
    removal_order,
    snapshots_to_drop,
    spared_times,
)  # fmt: skip

__all__ = [
    "EVENLY",
    "SPARED_TIMES",
    "USEFUL_RANGE",
    "Candidate",
    "ErrorCurve",
    "ErrorPoint",
    "ErrorReport",
    "PlanReport",
    "Schedule",
    "check_max_error",
    "check_sigma_range",
    "check_within",
    "error_curve",
    "evaluate",
    "exchanged",
    "forecast",
    "propose",
    "range_of",
    "relative_rounding",
    "removal_order",
    "snapshots_to_drop",
    "spared_times",
    "time_between",
]  # fmt: skip
