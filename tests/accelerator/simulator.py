"""The simulated accelerator of `simulator.cpp` as the torch device "sim": built, loaded, asked.

`load` compiles the file once for each version of torch and of the file, into the user's cache, and
gives torch the module `torch.sim`, with the functions of `torch.cuda` that the package and its
tests use. It changes torch for the whole process: `test_accelerator.py` starts one for it.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("simulator.cpp")


def missing():
    """Return why the simulator cannot be built here, or None."""
    if not sys.platform.startswith("linux"):
        return "the simulated accelerator needs Linux"
    if shutil.which("g++") is None:
        return "the simulated accelerator needs g++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the simulated accelerator needs Python's headers"
    if not hasattr(torch, "accelerator") or not hasattr(torch.accelerator, "set_device_index"):
        return f"the simulated accelerator needs a newer torch than {torch.__version__}"
    return None


def build():
    """Compile the simulator unless the cache has it, and return its path."""
    key = f"{torch.__version__} {sys.version} {SOURCE.read_text()}"
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = caches / "posthoc-cli-simulator"
    built = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not built.exists():
            compile_source(built)
    return built


def compile_source(built):
    from torch.utils.cpp_extension import include_paths, library_paths

    unfinished = built.with_suffix(".unfinished")
    includes = [f"-I{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    libraries = []
    for path in library_paths():
        libraries += [f"-L{path}", f"-Wl,-rpath,{path}"]
    libraries += ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
    options = ["-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-w"]
    names = ["-DTORCH_EXTENSION_NAME=simulated"]
    names += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command = ["g++", *options, *names, *includes, str(SOURCE), "-o", str(unfinished), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    unfinished.replace(built)


@cache
def load():
    """Make the device "sim" known to torch, and return the functions of the C++ file."""
    spec = importlib.util.spec_from_file_location("simulated", build())
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    core.set_where(where)
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", device_module(core))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return core


def where():
    """Say which lines, outside of torch, the calling thread runs."""
    lines = []
    frame = sys._getframe().f_back  # none in a thread that runs no lines
    while frame is not None and len(lines) < 3:
        path = frame.f_code.co_filename
        if "/torch/" not in path and path[0] != "<" and "contextlib" not in path:
            lines.append(f"{path.rpartition('/')[2]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


def device_module(core):
    """Make the module `torch.sim`."""
    module = types.ModuleType("torch.sim")

    class Device:
        """As torch.cuda.device: leaving it makes no context on the device before."""

        def __init__(self, device):
            self.index = index_of(device)

        def __enter__(self):
            self.before = core.exchange_device(self.index)

        def __exit__(self, *_):
            core.maybe_exchange_device(self.before)

    def index_of(device):
        index = device if isinstance(device, int) else torch.device(device).index
        return core.current_device() if index is None else index

    @contextmanager
    def stream(chosen):
        """As torch.cuda.stream: the stream's device is current, and then the one before again."""
        before = torch.accelerator.current_stream(core.current_device())
        inner = torch.accelerator.current_stream(chosen.device)
        torch.accelerator.set_stream(chosen)
        try:
            yield
        finally:
            torch.accelerator.set_stream(inner)
            torch.accelerator.set_stream(before)

    module.device = Device
    module.stream = stream
    module.Stream = lambda device=None: torch.Stream("sim" if device is None else device)
    module.Event = lambda **options: torch.Event("sim", **options)
    module.current_stream = torch.accelerator.current_stream
    module.current_device = core.current_device
    module.set_device = lambda device: core.exchange_device(index_of(device)) and None
    module.device_count = lambda: core.device_count
    module.synchronize = torch.accelerator.synchronize
    module.is_available = module.is_initialized = lambda: True
    module.is_current_stream_capturing = lambda: False
    module.memory_allocated = lambda: core.counts()["live"]
    module.max_memory_allocated = lambda: core.counts()["peak"]
    module.reset_peak_memory_stats = core.reset
    module.empty_cache = lambda: None
    module.get_device_name = lambda _: "simulated accelerator"
    module._sleep = lambda cycles: core.sleep(cycles // 1000)  # of a clock of 1 GHz
    # which torch asks of every device
    module._is_in_bad_fork = lambda: False
    module._lazy_init = lambda: None
    module.manual_seed = module.manual_seed_all = lambda _: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16, torch.float32]
    return module
