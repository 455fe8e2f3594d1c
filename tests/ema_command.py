"""What a test sees of a command that it ran."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The object that it printed with --json."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error; fails where there is not exactly one."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("ema: error: "), self.err
        return lines[0].removeprefix("ema: error: ")


Ema = Callable[..., Result]
Asked = Callable[[str, Path], list[str]]


def unmeasured_environment() -> dict[str, str]:
    """The environment without coverage's, for processes that may not write a file at their end or get signals."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COV")}
