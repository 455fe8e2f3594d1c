"""Decoding of JSON by the annotations of the dataclass that holds it: headers, states, options."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from posthoc_cli.errors import FileFormatError, quote
from posthoc_cli.snapshots.source import Rule
from posthoc_cli.snapshots.tensorfile import FORMATS, TensorFile

T = TypeVar("T")


def is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


# of numbers that may be negative; all others must not be
ANY_SIGN = "of any sign"

# values of states and of options, which have no checksums; a sealed header is trusted
Count = Annotated[int, Rule("a whole number above 0", lambda count: count > 0)]

RunId = Annotated[
    str, Rule("32 hexadecimal digits", lambda text: re.fullmatch("[0-9a-f]{32}", text))
]


def decode(
    file: TensorFile,
    kind: str,
    form: type[T],
) -> T:
    """Decode the content of a file of a kind as the dataclass `form`; raise FileFormatError if it
    is invalid.

    A header with a valid checksum is trusted: checksums guard against accidents and are not
    signatures.
    """
    number = file.content.get("format")
    if file.kind != kind or number not in FORMATS:
        accepted = " or ".join(map(str, FORMATS))
        reason = f"is not of the kind {kind!r} and format {accepted}"
        if file.kind:
            reason += f", but {quote(file.kind)} of format {quote(number)}"
        else:
            reason += " of this package"
        raise FileFormatError(file.path, reason)
    try:
        return cast(T, convert(file.content, form))
    except (ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(file.path, f"ema: {error}") from None


@lru_cache
def field_kinds(form: Any) -> dict[str, Any]:
    """Find the annotations of a dataclass by field name."""
    return get_type_hints(form, include_extras=True)


def convert(value: Any, kind: Any) -> Any:
    """Convert a JSON value to an annotated type: lists to tuples, objects to dataclasses, by their
    fields.

    Raises ValueError, which says what is expected. Numbers must be finite and at least 0, and
    satisfy the annotation's `Rule`, or are converted by the function in its place. Keys that a
    dataclass does not have are ignored: they come from later releases.
    """
    if kind in _PLAIN:
        accepts, words = _PLAIN[kind]
        _check(accepts(value), words, value)
        return float(value) if kind is float else value
    origin = get_origin(kind)
    args = get_args(kind)
    if origin is Annotated:
        return _convert_by_rule(value, *args)
    if type(None) in args:
        return None if value is None else convert(value, args[0])
    if origin is tuple:
        return _convert_list(value, args)
    _check(isinstance(value, dict), "a JSON object", value)
    if is_dataclass(kind):
        return _convert_object(value, kind)
    return {name: _member(name, each, args[-1]) for name, each in value.items()}


def _convert_by_rule(
    value: Any,
    kind: Any,
    rule: Rule | Callable[[Any], Any],
) -> Any:
    if not isinstance(rule, Rule):
        return rule(value)
    result = convert(value, kind)
    _check(bool(rule.accepts(result)), rule.words, value)
    return result


def _convert_list(
    value: Any,
    kinds: tuple[Any, ...],
) -> tuple[Any, ...]:
    words = f"a list of {len(kinds)}"
    is_list = isinstance(value, list | tuple)
    if kinds[-1] is ...:
        words = "a list"
        kinds = kinds[:1] * len(value) if is_list else kinds
    _check(is_list and len(value) == len(kinds), words, value)
    return tuple(map(convert, value, kinds))


def _convert_object(value: Mapping[str, Any], form: Any) -> Any:
    for each in fields(form):
        if each.name not in value and not is_optional(each):
            raise ValueError(f"{each.name}: is missing")
    members = {}
    for name, kind in field_kinds(form).items():
        if name in value:
            members[name] = _member(name, value[name], kind)
    return form(**members)


def _member(name: str, value: Any, kind: Any) -> Any:
    try:
        return convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{quote(name)[1:-1]}: {error}") from error


def is_optional(each: Field[Any]) -> bool:
    """Return whether a header may lack a field: one that is empty by default."""
    return each.default_factory is not MISSING or not each.default


def _check(is_right: bool, words: str, value: Any) -> None:
    if not is_right:
        raise ValueError(f"must be {words}, not {quote(value)}")


# The plain types of JSON values, each with a test and its description.
_PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    Any: (lambda _: True, ""),
    Annotated[float, ANY_SIGN]: (is_number, "a finite number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str), "a string"),
    int: (lambda value: type(value) is int and 0 <= value < 2**63, "a whole number, at least 0"),
    float: (lambda value: is_number(value) and value >= 0, "a finite number, at least 0"),
}
