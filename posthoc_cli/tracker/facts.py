"""Typed access to a state that comes from outside: nothing taken on trust, one clear line for what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posthoc_cli.errors import InvalidValueError, shown
from posthoc_cli.snapshots.metadata import is_number
from posthoc_cli.tracker.settings import check_sigma_rels


class Facts:
    """The entries of a tracker's state.

    Raises:
        InvalidValueError: it is no dict; and from every method: the entry is missing, or not what it must be.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise InvalidValueError("state", f"must be the dict that state_dict() gives, not {shown(state)}")
        self._state = state

    def value(self, key: str) -> Any:
        """Whatever is there."""
        if key not in self._state:
            raise InvalidValueError("state", f"{key}: is missing; not a tracker's state, as state_dict() gives it")
        return self._state[key]

    def whole(self, key: str) -> int:
        """A whole number, at least 0."""
        value = self.value(key)
        if type(value) is not int or not 0 <= value < 2**63:
            raise _bad(key, "a whole number, at least 0", value)
        return value

    def number(self, key: str) -> float:
        """A finite number, at least 0."""
        value = self.value(key)
        if not is_number(value) or value < 0:
            raise _bad(key, "a finite number, at least 0", value)
        return float(value)

    def text(self, key: str) -> str:
        """A string."""
        value = self.value(key)
        if not isinstance(value, str):
            raise _bad(key, "a string", value)
        return value

    def run_id(self) -> str:
        """32 hexadecimal digits."""
        value = self.text("run_id")
        if not re.fullmatch("[0-9a-f]{32}", value):
            raise _bad("run_id", "32 hexadecimal digits", value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self.value(key)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise _bad(key, "a list of strings", value)
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers, at least 0."""
        value = self.value(key)
        if not isinstance(value, (list, tuple)) or not all(is_number(item) and item >= 0 for item in value):
            raise _bad(key, "a list of finite numbers, at least 0", value)
        return tuple(map(float, value))

    def sigma_rels(self) -> tuple[float, ...]:
        """The profiles."""
        try:
            return check_sigma_rels(self.value("sigma_rels"))
        except InvalidValueError as error:
            raise InvalidValueError("state", str(error)) from error

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A dict."""
        return self.tensors(self._state, key)

    @staticmethod
    def tensors(entries: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """The dict under a key of `entries`."""
        if key not in entries:
            raise InvalidValueError("state", f"{key}: is missing; not a tracker's state, as state_dict() gives it")
        value = entries[key]
        if not isinstance(value, Mapping):
            raise _bad(key, "a dict", value)
        return value


def _bad(key: str, accepted: str, value: object) -> InvalidValueError:
    return InvalidValueError("state", f"{key}: must be {accepted}, not {shown(value)}")
