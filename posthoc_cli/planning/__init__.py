"""Before, while and after training: schedules, which snapshots to keep, and what they are good for.

Pure NumPy; nothing here reads a file, so that a schedule can be judged before training.
"""

from posthoc_cli.planning.curves import (
    EVENLY,
    Candidate,
    ErrorCurve,
    ErrorPoint,
    ProfileFit,
    check_sigma_range,
    error_curve,
    profile_fit,
)  # fmt: skip
from posthoc_cli.planning.proposals import (
    Proposal,
    Task,
    judge,
    planning_report,
    propose,
    relative_rounding,
)  # fmt: skip
from posthoc_cli.planning.schedule import Forecast, Schedule, forecast, forecast_at, listed
from posthoc_cli.planning.thinning import (
    MOST_SOLVED,
    USEFUL_RANGE,
    errors_after_each,
    exchanged,
    losses_of,
    snapshots_to_drop,
    thinned_subset,
)  # fmt: skip

__all__ = [
    "EVENLY",
    "MOST_SOLVED",

    "USEFUL_RANGE",
    "Candidate",
    "ErrorCurve",
    "ErrorPoint",
    "Forecast",
    "ProfileFit",
    "Proposal",
    "Schedule",
    "Task",

    "check_sigma_range",
    "error_curve",
    "errors_after_each",
    "exchanged",
    "forecast",
    "forecast_at",
    "judge",
    "listed",
    "losses_of",
    "planning_report",
    "profile_fit",
    "propose",
    "relative_rounding",
    "snapshots_to_drop",
    "thinned_subset",
]  # fmt: skip
