"""Before, while and after training: schedules, which snapshots to keep, and what they are good for.

Pure NumPy; nothing here reads a file, so that a schedule can be judged before training.
"""

from posthoc_cli.planning.choosing import MOST_SOLVED, choose
from posthoc_cli.planning.curves import (
    EVENLY,
    Candidate,
    ErrorCurve,
    ErrorPoint,
    ProfileFit,
    check_sigma_range,
    error_curve,
    profile_fit,
)
from posthoc_cli.planning.forecast import Forecast, forecast, forecast_at, sigma_rels_in
from posthoc_cli.planning.keeping import USEFUL_RANGE, errors_after_each, exchanged, losses_of, snapshots_to_drop
from posthoc_cli.planning.proposals import Proposal, judge, propose
from posthoc_cli.planning.schedule import MOST_TIMES, Schedule, listed
from posthoc_cli.planning.task import Task, check_dtype, relative_rounding

__all__ = [
    "EVENLY",
    "MOST_SOLVED",
    "MOST_TIMES",
    "USEFUL_RANGE",
    "Candidate",
    "ErrorCurve",
    "ErrorPoint",
    "Forecast",
    "ProfileFit",
    "Proposal",
    "Schedule",
    "Task",
    "check_dtype",
    "check_sigma_range",
    "choose",
    "error_curve",
    "errors_after_each",
    "exchanged",
    "forecast",
    "forecast_at",
    "judge",
    "listed",
    "losses_of",
    "profile_fit",
    "propose",
    "relative_rounding",
    "sigma_rels_in",
    "snapshots_to_drop",
]
