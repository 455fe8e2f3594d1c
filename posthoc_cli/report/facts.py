"""The result of `Run.info` as names and texts, for the page and for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from posthoc_cli.errors import percent
from posthoc_cli.resources import size_text


def facts(description: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the result of `Run.info` as names and texts to print, without its tables and notes."""
    hidden = {"notes", "problems", "profiles", "outputs", "checkpoints"}
    hidden |= set() if description.get("method") == "paper" else {"profile_error"}
    names = {key: key.replace("_", " ").replace("sigma rel", "sigma_rel") for key in description}
    pairs = [(names[key], _text(key, value)) for key, value in description.items() if key not in hidden]
    return [(name, text) for name, text in pairs if text]


def summary(description: dict[str, Any]) -> list[tuple[str, str]]:
    """Return `facts`, with one line each for the profiles and the checkpoints in place of their tables."""
    pairs = facts(description)
    if profiles := description.get("profiles"):
        pairs.append(("averages", ", ".join(f"sigma_rel {profile['sigma_rel']:g}" for profile in profiles)))
    if checkpoints := description.get("checkpoints"):
        counts = Counter(checkpoint["holds"] for checkpoint in checkpoints)
        listed = ", ".join(f"{count:,} x {holds}" for holds, count in counts.items())
        size = size_text(sum(checkpoint["bytes"] for checkpoint in checkpoints))
        pairs.append(("checkpoints", f"{listed}, {size}"))
    return pairs


def brief_text(text: str) -> str:
    """Return a text for a table, truncated if it is long."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 3]}..."


_LONGEST_TEXT = 200
_FORMATS: dict[str, Callable[[Any], str]] = {
    "path": str,
    "bytes": size_text,
    "norm": "{:.4g}".format,
    "measured": lambda count: f"{count:,} of them" if count else "none of them: errors are predicted from a sample",
    **dict.fromkeys(("profile_error", "predicted_error", "relative_rounding"), percent),
}


def _text(key: str, value: Any) -> str:
    """Return a value of a report as text to print; empty to omit it."""
    if key in _FORMATS:
        return _FORMATS[key](value)
    if key == "snapshots" and isinstance(value, list):
        return f"{len({snapshot['file'] for snapshot in value}):,}"  # a target of groups lists them once per group
    if value is None:
        return "" if key in ("sigma_rel", "gamma") else "none"  # profiles other than power functions have no width
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.12g}"
    return brief_text(str(value))
