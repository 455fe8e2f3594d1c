"""Python code in a process of its own that need not import torch first, which takes two seconds of processor time.

A server that has imported everything forks such processes. Each has its own arguments, environment, working directory
and standard streams, gets signals as from a terminal, and ends as any process of Python does, up to the functions of
`atexit`. What depends on how an interpreter starts (its options, `sitecustomize`, what is imported and when) or on how
it destroys its modules needs `subprocess` still.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen  # by name: tests replace subprocess.Popen by Forked
from typing import IO

from ema_command import Result, unmeasured_environment

EMA = "from posthoc_cli.__main__ import main; main()"
"""The code of the command `ema`."""
ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "scipy.optimize",
    "matplotlib.backends.backend_agg", "posthoc_cli.cli", "posthoc_cli.averages", "posthoc_cli.demo",
    "posthoc_cli.export", "posthoc_cli.planning", "posthoc_cli.plots", "posthoc_cli.synthesis", "posthoc_cli.tracker",
)  # fmt: skip


# --- for tests -------------------------------------------------------------------------------------


class Forked:
    """A process that runs `code`; it has the methods of subprocess.Popen that tests use.

    Arguments:
        arguments: sys.argv from its second item on.
        env: the complete environment; by default this process's, without coverage's variables.
        modules: what else the server has imported, one server each.
    """

    def __init__(
        self, code: str, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None,
        modules: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self._server = _server(modules)
        self.returncode: int | None = None
        self._printed = ("", "")
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - closed when the process has ended
        words, environment = [str(argument) for argument in arguments], unmeasured_environment() if env is None else env
        started = _ask(
            self._server,
            {"code": code, "arguments": words, "cwd": str(cwd or Path.cwd()), "env": dict(environment)},
            [file.fileno() for file in self._files],
        )
        assert started is not None
        self.pid = started

    def poll(self, timeout: float = 0) -> int | None:
        """Return the exit code, or None if the process runs after so many seconds."""
        if self.returncode is None:
            self.returncode = _ask(self._server, {"pid": self.pid, "timeout": timeout})
            if self.returncode is not None:
                out, err = (_close(file) for file in self._files)
                self._printed = (out, err)
        return self.returncode

    def wait(self, timeout: float = 250) -> int:
        """Return the exit code; fail if the process runs after so many seconds."""
        ended = self.poll(timeout)
        assert ended is not None, f"still runs after {timeout} s"
        return ended

    def communicate(self, timeout: float = 250) -> tuple[str, str]:
        """Wait; return what it has printed on stdout and on stderr."""
        self.wait(timeout)
        return self._printed

    def first_line(self, timeout: float = 60) -> str:
        """Wait for the first line on stdout and return it; what there is, if the process ends or the time is over."""
        until, printed = time.monotonic() + timeout, ""
        while "\n" not in printed and time.monotonic() < until:
            if self.poll(0.01) is not None:
                printed = self._printed[0]
                break
            printed = os.pread(self._files[0].fileno(), 10_000, 0).decode(errors="replace")
        return printed.partition("\n")[0]

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def _close(file: IO[bytes]) -> str:
    """Return the content of a file, and close it."""
    with file:
        file.seek(0)
        return file.read().decode(errors="replace")


def run(code: str, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Result:
    """Run code until it ends."""
    process = Forked(code, *arguments, cwd=cwd, env=env)
    out, err = process.communicate()
    return Result(process.wait(), out, err)


def check(code: str, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Result:
    """Run code that must succeed; return what it printed."""
    done = run(code, *arguments, cwd=cwd, env=env)
    assert done.code == 0, done.err
    return done


@contextmanager
def waiting(code: str, *arguments: object) -> Iterator[Forked]:
    """Yield a process that has run code and printed a line, and waits; kill it at the end of the block."""
    with Forked(f"{code}\nimport signal; signal.pause()", *arguments) as process:
        assert process.first_line(), process.communicate()
        yield process


@functools.cache
def _server(modules: tuple[str, ...]) -> socket.socket:
    """Return a server of this test process; it ends when this end of the socket is closed."""
    ours, its = socket.socketpair()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = unmeasured_environment() | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}  # threads do not fork
    with its:
        number = its.fileno()
        words = [sys.executable, "-W", "ignore", __file__, str(number), *modules]
        server = Popen(words, pass_fds=[number], env=environment)
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


def _ask(server: socket.socket, request: dict[str, object], streams: list[int] | None = None) -> int | None:
    """Send a request; return the number in the answer."""
    socket.send_fds(server, [b"?"], streams or [])
    server.sendall(json.dumps(request).encode() + b"\n")
    answer: int | None = json.loads(_line(server))
    return answer


# --- the server ------------------------------------------------------------------------------------


SIGNALS = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Wait in the server: for its question how a process ended, or until a forked process is ready for them."""


def _line(channel: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = channel.recv(1 << 16)  # one line at a time is on its way
        if not part:
            raise EOFError("the other process has ended")
        line += part
    return line


def _serve(channel: socket.socket, modules: Sequence[str]) -> None:
    """Answer requests until the other end is closed; in a forked child, run its request."""
    for module in PRELOADED:
        __import__(module)
    for module in modules:
        with suppress(ImportError):  # a framework that is not installed, whose tests are skipped
            __import__(module)
    gc.collect()
    gc.freeze()  # the end of a forked process would go through all of that, and so copy it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    while True:
        question, streams, _, _ = socket.recv_fds(channel, 1, 2)
        if not question:
            return
        request = json.loads(_line(channel))
        if "pid" in request:
            answer = _ended(request["pid"], time.monotonic() + request["timeout"])
        else:
            answer = os.fork()
            if answer == 0:
                channel.close()
                _become(request, streams)
                return
            for stream in streams:
                os.close(stream)
        channel.sendall(json.dumps(answer).encode() + b"\n")


def _ended(pid: int, until: float) -> int | None:
    """Return the exit code of a child, or None if it runs at `until`."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        left = until - time.monotonic()
        if left <= 0 or signal.sigtimedwait({signal.SIGCHLD}, left) is None:
            return None


def _become(request: dict[str, object], streams: list[int]) -> None:
    """Set up the process as if this interpreter had been started for `request`."""
    for number, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(str(request["cwd"]))
    os.environ.clear()
    os.environ.update(request["env"])  # type: ignore[call-overload]
    sys.argv = ["ema", *request["arguments"]]  # type: ignore[misc]
    sys.path.insert(0, "")  # as `python -c` has it; what tests are made of is there, too
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = 0
    try:
        exec(compile(str(request["code"]), "<string>", "exec"), vars(main))
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        code = ended.code or 0
    # As Python ends, but without taking apart all that the server has imported, which takes 0.35 s.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
