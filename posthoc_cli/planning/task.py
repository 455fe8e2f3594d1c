"""What a plan has to do: how long training is, how large the network, how much disk, which averages are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning.curves import check_sigma_range
from posthoc_cli.planning.keeping import USEFUL_RANGE
from posthoc_cli.profiles import check_sigma_rel
from posthoc_cli.reconstruction import Motion
from posthoc_cli.reconstruction.prior import ASSUMED_STRETCH, ROUNDING

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""The dtypes that a plan chooses from, and bytes an element."""

MOST_KEPT = 64
"""Snapshots a profile that are proposed at most, unless asked for: more gain little, and make synthesis slow."""

GOOD_ERROR = 5e-4
"""A worst predicted error that is good enough, unless somebody says otherwise: rounding a result once to float16 costs
2e-4, to bfloat16 1.5e-3."""

_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}


def relative_rounding(dtype: str) -> float:
    """Root mean square error of values rounded to the nearest of a dtype, relative to them; float16 1.9e-4."""
    return ROUNDING * _EPS[check_dtype(dtype)]


def check_dtype(dtype: str) -> str:
    """A dtype that can be planned with, or an InvalidValueError that lists them."""
    if dtype not in ITEM_BYTES:
        raise InvalidValueError("dtype", f"must be one of {', '.join(ITEM_BYTES)}", value=f"{dtype!r}")
    return dtype


@dataclass(frozen=True)
class Task:
    """What is asked of a plan.

    Attributes:
        steps: length of training.
        parameters: averaged elements of the network.
        max_bytes: for all snapshots at their fullest.
        sigma_range: the averages that are wanted.
        motion: how the network will move over (0, steps], relative to its norm; None for evenly.
        max_error: a worst predicted error that is good enough; of schedules below it the cheapest is the best.
        rounding: measured root mean square error of a stored average by dtype, relative to its norm, where it is
            not `relative_rounding`.
        sigma_rels, dtype, checkpoint_every, max_checkpoints: fixed choices; None leaves them to the search.

    Raises:
        InvalidValueError: naming the attribute.
    """

    steps: int
    parameters: int
    max_bytes: int
    sigma_range: tuple[float, float] = USEFUL_RANGE
    motion: Motion | None = None
    max_error: float = GOOD_ERROR
    rounding: Mapping[str, float] = field(default_factory=dict)
    sigma_rels: tuple[float, ...] | None = None
    dtype: str | None = None
    checkpoint_every: int | None = None
    max_checkpoints: int | None = None

    def __post_init__(self) -> None:
        check_sigma_range(self.sigma_range)
        for sigma_rel in self.sigma_rels or ():
            check_sigma_rel(sigma_rel)
        for name in ("steps", "checkpoint_every", "max_checkpoints"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 10**15:
                raise InvalidValueError(f"{name} {value}", "must be a whole number from 1 to 1e15")
        if not 0 <= self.max_error < 1:
            raise InvalidValueError(
                "max_error", "must be a relative error in [0, 1), such as 0.0005", value=f"{self.max_error!r}"
            )
        if self.parameters < 1:
            raise InvalidValueError("params", "must be at least 1, such as 1.2e9 or 350M", value=self.parameters)
        if self.dtype is not None:
            check_dtype(self.dtype)
        if self.checkpoint_every is not None and self.checkpoint_every > self.steps:
            raise InvalidValueError(
                "checkpoint_every",
                f"must be at most steps ({self.steps:,}), or no snapshot is ever taken",
                value=f"{self.checkpoint_every:,}",
            )
        self._check_budget()

    @property
    def path(self) -> Motion:
        """How the network is taken to move over training, relative to its norm."""
        return Motion.even(self.steps, ASSUMED_STRETCH**2) if self.motion is None else self.motion

    def rounding_of(self, dtype: str) -> float:
        """Root mean square error of an average stored in a dtype, relative to its norm."""
        return self.rounding.get(dtype, relative_rounding(dtype))

    def snapshot_bytes(self, dtype: str) -> int:
        """Size of one snapshot; its header and buffers are small and not counted."""
        return self.parameters * ITEM_BYTES[dtype]

    def places(self, dtype: str, profiles: int) -> int:
        """Snapshots of each profile that the budget has room for at one moment."""
        return self.max_bytes // (self.snapshot_bytes(dtype) * profiles)

    def taken_most(self) -> int:
        """Times at which snapshots are taken at most."""
        return self.steps // (self.checkpoint_every or 1)

    def fits(self, dtype: str, profiles: int) -> bool:
        """Whether the budget has room for the fixed choices, or for any."""
        kept, taken = self.max_checkpoints or 1, self.taken_most()
        # While one is written there is one more than is kept, unless none is ever dropped.
        return self.places(dtype, profiles) >= (taken if taken <= kept else kept + 1)

    def dtypes(self) -> Sequence[str]:
        """Those that the search may choose from."""
        return tuple(ITEM_BYTES) if self.dtype is None else (self.dtype,)

    def _check_budget(self) -> None:
        profiles = 1 if self.sigma_rels is None else len(self.sigma_rels)
        if any(self.fits(dtype, profiles) for dtype in self.dtypes()):
            return
        least = min(self.snapshot_bytes(dtype) for dtype in self.dtypes()) * profiles
        kept, taken = self.max_checkpoints or 1, self.taken_most()
        moment = taken if taken <= kept else kept + 1
        raise InvalidValueError(
            "max_size",
            f"has no room for {kept:,} snapshot{'s' * (kept > 1)} of {profiles} "
            f"profile{'s' * (profiles > 1)} and the one being written; it takes {least * moment:,} bytes",
            value=f"{self.max_bytes:,} bytes",
        )
