"""Python code in a process of its own that need not import torch first, which takes two seconds of
processor time.

A server of `multiprocessing` that has imported everything forks such processes. Each has its own
arguments, environment, working directory and standard streams, gets signals as from a terminal, and
ends as any process of Python does, up to the functions of `atexit`. What depends on how an
interpreter starts (its options, `sitecustomize`, what is imported and when) or on how it destroys
its modules needs `subprocess` still.
"""

import atexit
import functools
import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import warnings
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from ema_command import Result, unmeasured_environment

EMA = "from posthoc_cli.__main__ import main; main()"
"""The code of the command `ema`."""
SLOW = """
import time
from posthoc_cli.synthesis import engine
compute = engine.Calculator.compute
engine.Calculator.compute = lambda *arguments: (time.sleep(0.5), compute(*arguments))
"""
"""Code to run before a synthesis: every tile takes half a second."""
ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests/programs"
PRELOADED = (
    "forked", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "scipy.optimize", "matplotlib.backends.backend_agg", "posthoc_cli.cli", "posthoc_cli.averages",
    "posthoc_cli.demo", "posthoc_cli.export", "posthoc_cli.planning", "posthoc_cli.plots",
    "posthoc_cli.synthesis", "posthoc_cli.tracker",
)  # fmt: skip


def program(name):
    """Return the code of a program of `tests/programs`."""
    return (PROGRAMS / f"{name}.py").read_text()


class Forked:
    """A process that runs `code`; it has the methods of subprocess.Popen that tests use.

    Arguments:
        arguments: sys.argv from its second item on.
        env: the complete environment; by default this process's, without coverage's variables.
        modules: what else the server has imported, one server each.
    """

    def __init__(self, code, *arguments, cwd=None, env=None, modules=()):
        self._files = [_folder() / f"{next(_numbers)}" for _ in range(2)]
        for file in self._files:
            file.touch()
        environment = dict(unmeasured_environment() if env is None else env)
        folder = str(cwd or Path.cwd())
        request = (code, [*map(str, arguments)], folder, environment, [*map(str, self._files)])
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_become, args=request
        )
        # which it would import
        with (
            mock.patch.dict(sys.modules, {"__main__": types.ModuleType("__main__")}),
            mock.patch.object(
                forkserver, "connect_to_new_process", _server(modules).connect_to_new_process
            ),
        ):
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self, timeout=0):
        self._process.join(timeout)
        return self._process.exitcode

    def wait(self, timeout=250):
        ended = self.poll(timeout)
        assert ended is not None, f"still runs after {timeout} s"
        return ended

    def communicate(self, timeout=250):
        self.wait(timeout)
        out, err = (file.read_text(errors="replace") for file in self._files)
        return out, err

    def first_line(self, timeout=60):
        """Wait for the first line on stdout and return it; what there is, if the process ends or
        the time is over."""
        until = time.monotonic() + timeout
        while (
            b"\n" not in self._files[0].read_bytes()
            and time.monotonic() < until
            and self.poll(0.01) is None
        ):
            pass
        return self._files[0].read_text(errors="replace").partition("\n")[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.wait()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(code, *arguments, **options):
    process = Forked(code, *arguments, **options)
    out, err = process.communicate()
    return Result(process.wait(), out, err)


def check(code, *arguments, **options):
    done = run(code, *arguments, **options)
    assert done.code == 0, done.err
    return done


@contextmanager
def waiting(code, *arguments):
    """Yield a process that has run code and printed a line, and waits; kill it at the end of the
    block."""
    with Forked(f"{code}\nimport signal; signal.pause()", *arguments) as process:
        assert process.first_line(), process.communicate()
        yield process


_numbers = itertools.count()


@functools.cache
def _folder():
    """Return a folder of this test process for what its processes print."""
    folder = Path(tempfile.mkdtemp(prefix="printed-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _server(modules):
    """Return a server of this test process, which ends with it."""
    server = forkserver.ForkServer()
    # those that are not installed are left out
    server.set_forkserver_preload([*PRELOADED, *modules])
    paths = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    # threads do not fork
    environment = unmeasured_environment() | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch.object(sys, "warnoptions", ["ignore"]),
    ):
        server.ensure_running()
    return server


def _become(code, arguments, cwd, environment, streams):
    """Set up a new process as if this interpreter had been started for `code`, and run it."""
    gc.freeze()  # collections would go through all that the server has imported, and so copy it
    for number, name in enumerate([os.devnull, *streams]):
        os.dup2(os.open(name, os.O_RDWR), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["ema", *arguments]
    sys.path.insert(0, "")  # as `python -c` has it; what tests are made of is there, too
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    warnings.simplefilter("ignore")
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), vars(main))
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if not isinstance(ended.code, int | None):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
        status = 1
    # As Python ends, but without taking apart all that the server has imported, which takes 0.35 s.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
