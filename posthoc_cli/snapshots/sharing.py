"""What the headers of a run say alike, decoded once and held once in memory: there may be thousands, each naming every
tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Sharing:
    """What the header before said, for the next one: most of both is the same, word for word."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._decoded: dict[str, tuple[object, Any]] = {}

    def texts(self, metadata: dict[str, str]) -> dict[str, str]:
        """The same metadata; a text that the header before had, too, is that one's object."""
        last = self._texts
        self._texts = {key: last[key] if last.get(key) == text else text for key, text in metadata.items()}
        return self._texts

    def once(self, key: str, said: object, decode: Callable[[], T]) -> T:
        """What `decode` makes of what is said: the same object again where the last one under this key said the same.

        Arguments:
            said: all that the result follows from.
            decode: how; whoever gets the result does not change it.
        """
        last = self._decoded.get(key)
        if last is None or last[0] != said:
            last = self._decoded[key] = said, decode()
        result: T = last[1]
        return result
