"""The header of an output, the file that a synthesis writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from posthoc_cli.snapshots.decoding import ANY_SIGN
from posthoc_cli.snapshots.tensorfile import FORMAT

AVERAGE_OF_TWO = " (average)"
"""What the name of an average ends with whose checkpoint holds weights, too."""


@dataclass(frozen=True)
class Used:
    """A snapshot that an output was made from."""

    file: str
    coefficient: Annotated[float, ANY_SIGN]


@dataclass(frozen=True)
class OutputInfo:
    """The content of the header of an output, the file that a synthesis writes: `kind` is
    "output"."""

    run_id: str
    profile: str  # the target, for people: "sigma_rel 0.15", "beta 0.9999", ...
    sigma_rel: float | None  # None, like gamma, if the profile is not a power function
    gamma: Annotated[float, ANY_SIGN] | None
    t: float
    t_unit: str
    method: str
    profile_error: float  # relative L2 error between the profiles
    # expected relative L2 error of the weights; None if it is unknown
    predicted_error: float | None
    snapshots: tuple[Used, ...]
    copies: tuple[str, ...] = ()  # names of the tensors that are copies (buffers), not averages
    # the file of pretrained weights that are mixed in, 16 digits that identify it, and their share
    base: str | None = None
    base_hash: str | None = None
    base_share: float | None = None

    def encode(self) -> dict[str, Any]:
        """Encode the header as a JSON object, without the checksums of blocks."""
        content = {"kind": "output", "format": FORMAT, **vars(self)}
        if self.base is None:
            for name in ("base", "base_hash", "base_share"):
                del content[name]
        return content
