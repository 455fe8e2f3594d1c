"""Values of a report's `to_dict` as texts for people: for the page, and for the tables of the
terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posthoc_cli.errors import list_first, percent
from posthoc_cli.resources import format_bytes
from posthoc_cli.snapshots.output_info import AVERAGE_OF_TWO

_LONGEST_TEXT = 200
_PERCENT = (
    "profile_error", "predicted_error", "lost_gain", "worst_error", "median_error",
    "relative_rounding", "unexplained", "versus_raw",
)  # fmt: skip
_FORMATS: dict[str, Callable[[Any], str]] = {
    "path": str,
    "bytes": format_bytes,
    "norm": "{:.4g}".format,
    "value": "{:.6g}".format,
    "standard_error": "{:.6g}".format,
    "seconds": "{:.1f}".format,
    "measured": lambda count: (
        f"{count:,} of them, from which errors are predicted"
        if count
        else "none of them: errors are predicted from a sample"
    ),
    "relative_rounding_range": lambda ends: " to ".join(
        dict.fromkeys(map(percent, ends or [None]))
    ),
    "coefficient": lambda value: f"{value:+.6f}" if abs(value) < 1e6 else f"{value:+.6g}",
    **dict.fromkeys(_PERCENT, percent),
}


def make_title(key: str) -> str:
    """Put a key into words."""
    return key.replace("_", " ").replace("sigma rel", "sigma_rel")


def text(key: str, value: Any) -> str:
    """Write the value of a key as text; empty to omit it."""
    if key in _FORMATS:
        return _FORMATS[key](value)
    if key == "snapshots" and isinstance(value, list):
        # a target of groups lists them once per group, and a checkpoint may have two
        names = {snapshot["file"].removesuffix(AVERAGE_OF_TWO) for snapshot in value}
        return f"{len(names):,}"
    if value is None:
        # profiles other than power functions have no width
        return "" if key in ("sigma_rel", "gamma", "as") else "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {text(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return list_first(text("", item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.12g}"
    shown = str(value)
    return shown if len(shown) <= _LONGEST_TEXT else f"{shown[: _LONGEST_TEXT - 3]}..."


def facts(description: dict[str, Any]) -> list[tuple[str, str]]:
    """List the result of `Run.info` as names and texts to print, without its tables and notes."""
    hidden = {"notes", "problems", "profiles", "outputs", "checkpoints"}
    if description.get("method") != "paper":
        hidden.add("profile_error")
    hidden |= {key for key in ("aliases", "superseded") if not description.get(key)}
    pairs = []
    for key, value in description.items():
        if key in hidden or value is None:
            continue
        shown = text(key, value)
        if shown:
            pairs.append((make_title(key), shown))
    return pairs
