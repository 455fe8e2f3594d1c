"""Whether files are what was written: `list_contents`, then `verify`; and what to do where they are not.

Nothing here changes a file. `repair` sets aside what is broken, `clean` removes what interrupted writes have left.
"""

from posthoc_cli.snapshots.verification.contents import Contents, list_contents
from posthoc_cli.snapshots.verification.deep import deep_bytes
from posthoc_cli.snapshots.verification.directory import verify, verify_measurements
from posthoc_cli.snapshots.verification.repairing import (
    MOVED,
    SIGMA_RELS,
    Cleaning,
    Errors,
    Repair,
    clean,
    is_snapshot_directory,
    plan_repair,
    repair,
)
from posthoc_cli.snapshots.verification.reports import (
    STATES,
    UNCHECKED,
    WHOLE,
    FileReport,
    Verification,
)

__all__ = [
    "MOVED",
    "SIGMA_RELS",
    "STATES",
    "UNCHECKED",
    "WHOLE",
    "Cleaning",
    "Contents",
    "Errors",
    "FileReport",
    "Repair",
    "Verification",
    "clean",
    "deep_bytes",
    "is_snapshot_directory",
    "list_contents",
    "plan_repair",
    "repair",
    "verify",
    "verify_measurements",
]
