"""JSON of headers, strictly: each key once, numbers that are finite, text that is Unicode."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots.entry import MAX_TENSORS

# of a header: a tensor of ten dimensions has 16. A parsed value takes up to 90 bytes of memory.
MAX_VALUES = 16 * MAX_TENSORS


def require(is_right: bool, problem: str) -> None:
    """Raise a ValueError that says what is wrong, unless a condition holds."""
    if not is_right:
        raise ValueError(problem)


def parse_object(
    path: Path,
    data: bytes | str,
    what: str,
    most: int = MAX_VALUES,
) -> dict[str, Any]:
    """Parse an object of at most `most` values in strict JSON: no duplicate keys, no NaN, no zero
    bytes, no text that is not Unicode."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        objects = text.count("{") + text.count("[")  # each takes 64 bytes of memory
        most_objects = len(text) // 8 + 1000
        require(objects <= most_objects, "holds more objects than its length explains")
        values = text.count(",")
        require(values <= most, f"holds {values:,} values; at most {most:,} are allowed")
        value: dict[str, Any] = _DECODER.decode(text)
        if "\\u" in text:  # only escapes can produce such text
            check_text(compact(value))
        require(isinstance(value, dict), "must be a JSON object")
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, f"damaged {what}: {str(error)[:200]}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    require(len(result) == len(pairs), "the same key twice")
    return result


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_constant=lambda constant: require(False, f"{constant} is not JSON"),
)

_NO_TEXT = re.compile(r"[\ud800-\udfff]|\\u0000")  # lone surrogates and escaped zero bytes


def check_text(text: str) -> None:
    """Raise ValueError if a name or value in compact JSON has a zero byte or is not Unicode."""
    if bad := _NO_TEXT.search(text):
        begin = max(0, bad.start() - 40)
        near = ascii(text[begin : bad.end() + 40])
        raise ValueError(f"a name or value has a zero byte or is not Unicode text: {near}")


def compact(value: object) -> str:
    """Write a value as JSON without spaces: arrays as lists, dataclasses as objects."""

    def plain(value: Any) -> object:
        if isinstance(value, np.ndarray):
            return value.tolist()
        return vars(value)

    return json.dumps(
        value,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
        default=plain,
    )
