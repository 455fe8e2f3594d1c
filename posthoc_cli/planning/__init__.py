"""Before, during and after training: schedules, which snapshots to keep, and the errors to expect.

Pure NumPy; nothing here reads a file, so that schedules can be compared before training.
"""

from posthoc_cli.planning.curves import (
    EVENLY,
    Candidate,
    ErrorCurve,
    ErrorPoint,
    ErrorReport,
    ProfileFit,
    check_max_error,
    check_sigma_range,
    check_within,
    error_curve,
    profile_fit,
)  # fmt: skip
from posthoc_cli.planning.proposals import PlanReport, Proposal, Task, evaluate, propose
from posthoc_cli.planning.schedule import Forecast, Schedule, forecast, listed, relative_rounding
from posthoc_cli.planning.thinning import (
    USEFUL_RANGE,
    errors_after_each,
    exchanged,
    losses_of,
    range_of,
    removal_order,
    snapshots_to_drop,
)  # fmt: skip

__all__ = [
    "EVENLY", "USEFUL_RANGE", "Candidate", "ErrorCurve", "ErrorPoint", "ErrorReport", "Forecast",
    "PlanReport", "ProfileFit", "Proposal", "Schedule", "Task", "check_max_error", "check_sigma_range", "check_within",
    "error_curve", "errors_after_each", "evaluate", "exchanged", "forecast", "listed", "losses_of",
    "profile_fit", "propose", "range_of", "relative_rounding", "removal_order", "snapshots_to_drop",
]  # fmt: skip
