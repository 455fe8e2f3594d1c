"""Where the sums are made."""

from __future__ import annotations

from posthoc_cli.errors import InvalidValueError

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
        raise InvalidValueError(f"device {device!r}: is not there; choose from auto, {', '.join(available)}")
    return wanted


def device_reason(device: str) -> str:
    """Why the sums are made where they are, for reports."""
    return AUTO_REASON if device == "auto" else "asked for"
