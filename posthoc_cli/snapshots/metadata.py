"""The metadata of one file: typed access, with nothing taken on trust."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt

_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")

_MOST_DIGITS = 4_300
"""What Python itself accepts since 3.10.7, unless told otherwise."""


def file_kind(header: fmt.FileHeader) -> str | None:
    """ "snapshot", "output", "state", or None for a file that is none of them."""
    return header.metadata.get("ema.format")


def parse_json(path: Path, data: bytes | str, what: str) -> Any:
    """JSON without the liberties that Python takes: no key twice, no NaN, no text that is none.

    Raises:
        FileFormatError: naming the file and `what`.
    """
    text = data if isinstance(data, str) else decode_text(path, data, what)
    with _damage_named(path, what):
        value = _decoder().decode(text)
        if "\\u" in text:  # all other text is as it was decoded
            _check_text(value)
        return value


def decode_text(path: Path, data: bytes, what: str) -> str:
    """Text from UTF-8.

    Raises:
        FileFormatError: naming the file and `what`.
    """
    with _damage_named(path, what):
        return data.decode("utf-8")


def parse_json_at(path: Path, text: str, begin: int, what: str) -> tuple[Any, int]:
    """As `parse_json`, a value within a text, and where it ends.

    Raises:
        FileFormatError: naming the file and `what`.
    """
    with _damage_named(path, what):
        value, end = _decoder().raw_decode(text, begin)
        if "\\u" in text[begin:end]:
            _check_text(value)
        return value, end


@contextmanager
def _damage_named(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, f"damaged {what}: {str(error)[:200]}") from error


def _decoder() -> json.JSONDecoder:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("the same key twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse, parse_int=_parse_int())


def _parse_int() -> Callable[[str], int] | None:
    """None, the fast way, where Python itself refuses numbers of thousands of digits, which take it hours."""
    limit: Callable[[], int] = getattr(sys, "get_int_max_str_digits", lambda: 0)
    return None if limit() else _short_int


def _short_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _check_text(value: Any) -> None:
    """Refuse text that escapes have made of what is none: halves of a character, zero bytes."""
    left = [("", value)]
    while left:
        key, one = left.pop()
        if isinstance(one, dict):
            left += [*((name, name) for name in one), *one.items()]
        elif isinstance(one, list):
            left += [(key, item) for item in one]
        elif isinstance(one, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in one):
            raise ValueError(f"{shown(key)}: {shown(one)} is not Unicode text, or has a zero byte")


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


class Metadata:
    """Typed access to the metadata of one file, with errors that name the file and the key."""

    def __init__(self, path: Path, header: fmt.FileHeader, expected: str) -> None:
        self._path = path
        self._metadata = header.metadata
        found = file_kind(header)
        if found != expected:
            what = "has no ema.format" if found is None else f"its ema.format is {shown(found)}"
            article = "an" if expected.startswith("o") else "a"
            raise FileFormatError(path, f"not {article} {expected} of this package: {what}")
        version = fmt.version_of(expected)
        if self.text("ema.version") != version:
            raise self.bad("ema.version", f"{shown(self.text('ema.version'))}; this release reads {version}")

    def bad(self, key: str, reason: str) -> FileFormatError:
        """An error to raise: what is wrong with a key."""
        return FileFormatError(self._path, f"{key}: {reason}")

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return key in self._metadata

    def text(self, key: str) -> str:
        """The value itself."""
        if key not in self._metadata:
            raise self.bad(key, "is missing")
        return self._metadata[key]

    def unit(self) -> str:
        """What time counts, as `tracker.settings` accepts it: a word for tables and pictures."""
        text = self.text("ema.t_unit")
        if not (text and text.isprintable()):
            raise self.bad("ema.t_unit", f"{shown(text)} does not name what t counts")
        return text

    def run_id(self) -> str:
        """32 hexadecimal digits."""
        text = self.text("ema.run_id")
        if not re.fullmatch(r"[0-9a-f]{32}", text):
            raise self.bad("ema.run_id", f"{shown(text)} is not 32 hexadecimal digits")
        return text

    def number(self, key: str) -> float:
        """A finite number."""
        if not _DECIMAL.fullmatch(self.text(key)):  # float() takes more: 1_0, digits of other scripts
            raise self.bad(key, f"{shown(self.text(key))} is not a number")
        value = float(self.text(key))
        if not math.isfinite(value):
            raise self.bad(key, f"{value} is not finite")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None for null."""
        return None if self.text(key) == "null" else self.number(key)

    def integer(self, key: str) -> int:
        """A whole number."""
        text = self.text(key)
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise self.bad(key, f"{shown(text)} is not a whole number")
        return int(text)

    def json_object(self, key: str) -> dict[str, Any]:
        """A JSON object."""
        value = parse_json(self._path, self.text(key), key)
        if not isinstance(value, dict):
            raise self.bad(key, "is not a JSON object")
        return value

    def json_list(self, key: str) -> list[Any]:
        """A JSON list."""
        value = parse_json(self._path, self.text(key), key)
        if not isinstance(value, list):
            raise self.bad(key, "is not a JSON list")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A JSON list of strings."""
        value = self.json_list(key)
        if not all(isinstance(name, str) for name in value):
            raise self.bad(key, "is not a list of names")
        return tuple(value)

    def one_of(self, key: str, value: Any, part: str, accepted: tuple[str, ...]) -> str:
        """The string `part` of the object `value`, one of those accepted."""
        found = value.get(part) if isinstance(value, dict) else None
        if not isinstance(found, str) or found not in accepted:
            raise self.bad(key, f"{part} {shown(found)} is none of {', '.join(accepted)}")
        return found
