"""Readers take no lock: what they have planned with may be thinned away before they open it. Then they plan again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from posthoc_cli.errors import VanishedError

if TYPE_CHECKING:
    from posthoc_cli.synthesis.plan import Plan

log = logging.getLogger(__name__)

ATTEMPTS = 100
"""Plans at most: a writer that removes a file at each of them is no training."""

_T = TypeVar("_T")


def with_consistent_plan(make: Callable[[], Plan], use: Callable[[Plan], _T]) -> _T:
    """What `use` makes of a plan, made again as long as snapshots of it vanish before they are open.

    A file that is open stays readable when it is removed, and all are opened before anything is made of them.

    Arguments:
        make: plans with what is there; where headers have no measurements it reads tensors itself.
        use: opens the snapshots of the plan; must leave nothing behind when it raises.

    Raises:
        VanishedError: snapshots went away at every attempt.
        others: as `make` and `use`.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return use(make())
        except VanishedError as error:
            log.warning("%s; planning again with what is there", error)
    return use(make())
