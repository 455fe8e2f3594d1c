"""The metadata of an output; specified in `snapshots.format`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.headers import Metadata, is_number


@dataclass(frozen=True)
class OutputInfo:
    """All metadata of an output.

    `profile` is the target in words; `snapshots` are the name and coefficient of each.
    """

    run_id: str
    profile: str
    sigma_rel: float | None
    gamma: float | None
    t: float
    t_unit: str
    method: str
    profile_error: float
    predicted_error: float | None
    snapshots: tuple[tuple[str, float], ...]
    copies: tuple[str, ...] = ()


SAME_COEFFICIENT = 1e-6
"""Coefficients of one plan may differ by this fraction of the largest, since processors round differently. It is far
below the rounding of float16 snapshots."""


def output_difference(found: OutputInfo, wanted: OutputInfo) -> str | None:
    """How an output differs from the wanted one in run, target, time or method, in words; None if it does not."""
    for name, words in (("run_id", "run"), ("profile", "target"), ("t", "t"), ("method", "method")):
        values = getattr(found, name), getattr(wanted, name)
        if values[0] != values[1]:
            return f"its {words} is {str(values[0])[:60]}, not {values[1]}"
    return None


def same_coefficients(found: OutputInfo, wanted: OutputInfo) -> bool:
    """Whether two outputs have equally many snapshots and the same coefficients."""
    pairs = [[c for _, c in info.snapshots if c] for info in (found, wanted)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    most = SAME_COEFFICIENT * max((abs(c) for c in pairs[1]), default=0.0)
    return all(abs(a - b) <= most for a, b in zip(*pairs, strict=True))


def output_metadata(info: OutputInfo) -> dict[str, str]:
    """The metadata of an output as strings, without its checksums."""
    return {
        "format": "pt",
        "ema.format": "output",
        "ema.version": fmt.VERSION,
        "ema.run_id": info.run_id,
        "ema.profile": info.profile,
        "ema.sigma_rel": fmt.compact(info.sigma_rel),
        "ema.gamma": fmt.compact(info.gamma),
        "ema.t": repr(info.t),
        "ema.t_unit": info.t_unit,
        "ema.method": info.method,
        "ema.profile_error": repr(info.profile_error),
        "ema.predicted_error": fmt.compact(info.predicted_error),
        "ema.snapshots": fmt.compact([{"file": name, "coefficient": c} for name, c in info.snapshots]),
        "ema.copies": fmt.compact(list(info.copies)),
    }


def decode_output(path: Path, header: fmt.FileHeader) -> OutputInfo:
    """The checked metadata of an output.

    Raises:
        FileFormatError: naming the file and the key.
    """
    reader = Metadata(path, header, "output")
    snapshots = []
    for item in reader.json_list("ema.snapshots"):
        if not (isinstance(item, dict) and isinstance(item.get("file"), str) and is_number(item.get("coefficient"))):
            raise FileFormatError(path, "ema.snapshots must list files with their coefficients")
        snapshots.append((item["file"], float(item["coefficient"])))
    info = OutputInfo(
        run_id=reader.run_id(),
        profile=reader.text("ema.profile"),
        sigma_rel=reader.optional_number("ema.sigma_rel"),
        gamma=reader.optional_number("ema.gamma"),
        t=reader.number("ema.t"),
        t_unit=reader.unit(),
        method=reader.text("ema.method"),
        profile_error=reader.number("ema.profile_error"),
        predicted_error=reader.optional_number("ema.predicted_error"),
        snapshots=tuple(snapshots),
        copies=reader.names("ema.copies"),
    )
    if not fmt.EARLIEST <= info.t <= fmt.LATEST:
        raise reader.bad("ema.t", f"{info.t:g} is not a time of training")
    if info.sigma_rel is not None and not info.sigma_rel > 0:
        raise reader.bad("ema.sigma_rel", f"{info.sigma_rel:g} is not above 0")
    for key, error in (("profile_error", info.profile_error), ("predicted_error", info.predicted_error)):
        if error is not None and error < 0:
            raise reader.bad(f"ema.{key}", f"{error:g} is below 0")
    return info
