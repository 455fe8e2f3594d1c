"""`ema` in this process, as a script may run it: what it prints, how it ends, and that it ends at all."""

from __future__ import annotations

import io
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType

import pytest
from ema_command import Result

from posthoc_cli.cli import main

LONGEST = 180
"""Seconds that a command on a tiny directory may take on a busy machine."""


class HungError(BaseException):
    """Something has taken too long. Not an Exception: nobody may swallow it."""


def run_ema(*arguments: object) -> Result:
    """Run `ema` with these arguments; what it sets for its process is set back."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), time_limit():
        patch.setattr(sys, "argv", ["ema", *map(str, arguments)])
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        patch.setattr(logging.root, "handlers", list(logging.root.handlers))
        patch.setattr(logging.root, "level", logging.root.level)
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except Exception as error:  # noqa: BLE001 - as the interpreter does at the end of a process
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Result(code, out.getvalue(), err.getvalue())


def wrong_result(result: Result) -> str:
    """How a command did not end as it must: in one line that names what is wrong, and nothing raw for the terminal."""
    errors = [line for line in result.err.splitlines() if line.startswith("ema: error: ")]
    if result.code not in (0, 1, 2) or len(errors) > 1 or "unexpected" in result.err or "Traceback" in result.err:
        return f"ended with {result.code}: {result.err[-500:]}"
    if result.code and not errors and "problem: " not in result.out:
        return f"ended with {result.code} without a word"
    return ""


@contextmanager
def time_limit() -> Iterator[None]:
    """HungError where the block takes too long."""
    before = signal.signal(signal.SIGALRM, _hang_up)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _hang_up(_: int, __: FrameType | None) -> None:
    raise HungError(f"took more than {LONGEST} s")
