"""A runner of the command `ema` in the process of a test."""

import io
import json
import logging
import os
import signal
import socket
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

from proposals import check_proposals

from posthoc_cli.cli import main


@dataclass(frozen=True)
class Result:
    """The exit code of a command and its output."""

    code: int
    out: str
    err: str
    shown: str = ""  # both, in the order in which a terminal shows them

    @property
    def json(self):
        """The object printed with --json."""
        return json.loads(self.out)

    @property
    def error(self):
        """The error message, which must be the only line on stderr."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("ema: error: "), self.err
        return lines[0].removeprefix("ema: error: ")


@contextmanager
def as_command(*arguments):
    """Make this process look like `ema` with these arguments, and restore its signal handlers and
    hooks afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    words = ["ema", *map(str, arguments)]
    with (
        mock.patch.multiple(sys, argv=words, excepthook=sys.excepthook),
        mock.patch.object(warnings, "showwarning", warnings.showwarning),
        mock.patch.multiple(logging.root, handlers=[], level=logging.root.level),
    ):
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for room in ("checkpoints", "snapshots"):
                logging.getLogger(f"posthoc_cli.{room}").setLevel(logging.NOTSET)


class Stream(io.StringIO):
    """A stream that is also shown on a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self._terminal = terminal

    def write(self, text):
        self._terminal.write(text)
        return super().write(text)


def run_ema(*arguments):
    """Run `ema` and return its result; an uncaught exception is printed as by the interpreter. What
    it proposes must be accepted."""
    terminal = io.StringIO()
    out = Stream(terminal)
    err = Stream(terminal)
    code = 0
    with as_command(*arguments), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except Exception as error:  # noqa: BLE001 - as the interpreter does
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
    shown = terminal.getvalue()
    check_proposals([*map(str, arguments)], shown)
    return Result(code, out.getvalue(), err.getvalue(), shown)


def unmeasured_environment():
    """Return the environment without coverage's variables, for processes that are killed or must
    not write it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COV")}


def environments_of_ranks(count):
    """Return the environments of the processes of a torchrun job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    environments = []
    for rank in range(count):
        job = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "RANK": str(rank),
        }
        environments.append(unmeasured_environment() | job)
    return environments
