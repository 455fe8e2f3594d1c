"""Where the sums are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posthoc_cli.errors import InvalidValueError

if TYPE_CHECKING:
    import torch

AUTO_REASON = "auto: reading and verifying on the CPU is the limit, and the bus would be one more"
"""Why `auto` is the CPU, whatever else is there: every byte is read and verified there in any case, and the sums take
a fraction of that time; `scripts/bench_synthesis.py --device cuda` prints both."""


def parse_device(device: str) -> str:
    """The device to make sums on.

    Raises:
        InvalidValueError: not a device, or not there; says what is.
    """
    import torch

    available = ["cpu"]
    available += [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    if device == "auto":
        return "cpu"
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in available:
        raise InvalidValueError(
            "device", "is not there", f"choose from auto, {', '.join(available)}", value=f"{device!r}"
        )
    return wanted


def numbered_device(device: torch.device | str) -> torch.device:
    """The same device; for `cuda` the calling thread's current one, which is another in the threads that make sums."""
    import torch

    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def device_reason(device: str) -> str:
    """Why the sums are made where they are, for reports."""
    return AUTO_REASON if device == "auto" else "asked for"
