"""The rules of the whole package: public names, the direction of imports, fast help,
documentation."""

import ast
import itertools
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import typer

import posthoc_cli
from posthoc_cli.cli import app

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "posthoc_cli"
ROOMS = (
    "errors", "remote", "files", "resources", "devices", "group", "dtypes", "profiles",
    "decay_rules", "run_clock", "targets", "reconstruction",
    "planning", "snapshots", "checkpoints", "opening", "request", "synthesis", "export", "plots",
    "sweep", "report", "run", "tracker", "averages", "integrations", "demo", "cli",
)  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def commands():
    return typer.main.get_command(app).commands


def test_public_names_are_loaded_on_first_use():
    """`__all__` lists them; ruff compares it with the imports for type checkers."""
    assert posthoc_cli._HOMES.keys() == {*posthoc_cli.__all__} - {"averages", "errors"}
    for module in (posthoc_cli, posthoc_cli.averages):
        for name in module.__all__:
            assert getattr(module, name).__name__.removeprefix("posthoc_cli.") == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        posthoc_cli.nothing  # noqa: B018
    assert set(posthoc_cli.__all__) < set(dir(posthoc_cli))


@cache
def parsed(path):
    return [*ast.walk(ast.parse(path.read_text()))]


@cache
def imported(path):
    """Return the modules that a module imports, and the names that it imports from them."""
    names = []
    for node in parsed(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return frozenset(names)


FEW = {
    "plots": {"errors", "planning", "plots"},
    "integrations": {"errors", "profiles", "targets", "tracker", "integrations"},
}
"""Rooms that may not import all rooms above them."""


def test_imports_point_towards_errors():
    """Integrations import only the public tracker; a framework is imported only by the integration
    of its name."""
    for path in MODULES:
        check_imports(path)


def check_imports(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = imported(path)
    frameworks = {name.split(".")[0] for name in names} & {
        "transformers",
        "lightning",
        "accelerate",
        "diffusers",
    }
    assert frameworks <= {path.stem}, path
    if room in ("__init__", "__main__"):
        return
    assert room in ROOMS, "add a new room to ROOMS"
    ours = {name for name in names if name.startswith("posthoc_cli.")}
    allowed = FEW.get(room, set(ROOMS[: ROOMS.index(room) + 1]))
    assert {name.split(".")[1] for name in ours} <= allowed | {"__version__"}, path
    if room == "integrations":
        assert {name for name in ours if "posthoc_cli.tracker." in name} <= {
            "posthoc_cli.tracker.PostHocEMA",
            "posthoc_cli.tracker.was_skipped",
        }


def test_only_one_module_names_kinds_of_accelerators():
    kinds = re.compile(r"torch\.(cuda|xpu|mps|accelerator)|is_cuda")
    for path in MODULES:
        if path.name != "devices.py":
            assert not kinds.search(path.read_text()), path


def test_imports_have_no_circles():
    """This includes imports for annotations; the `__init__` of a room, which re-exports names, is
    left out."""
    modules = {
        f"posthoc_cli.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}": path
        for path in PACKAGE.rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    }
    TopologicalSorter(
        {name: imported(path) & modules.keys() for name, path in modules.items()}
    ).prepare()


RUN = """
import sys
sys.argv = {words!r}
from posthoc_cli.cli import main
try:
    main()
except SystemExit:
    pass
"""
LIGHT = {
    "ema --help": RUN.format(words=["ema", "--help"]),
    "ema synthesize --help": RUN.format(words=["ema", "synthesize", "--help"]),
    "a look at a run": "from posthoc_cli import Run; print(Run('nowhere'))",
    "numbers": "import posthoc_cli, posthoc_cli.reconstruction, posthoc_cli.planning",
}


HEAVY = {"torch", "matplotlib", "fsspec", "huggingface_hub", "posthoc_cli.remote"}


@pytest.mark.parametrize("what", LIGHT)
def test_help_and_numbers_load_no_heavy_libraries(what):
    code = f"{LIGHT[what]}\nimport sys; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_command_names():
    assert {*commands()} == {
        "synthesize",
        "sweep",
        "error-plot",
        "info",
        "export",
        "prune",
        "verify",
        "import",
        "audit",
        "demo",
        "guide",
    }


def test_every_command_has_help_an_example_and_a_place_in_the_guides():
    for name, command in commands().items():
        check_help(name, command)


def check_help(name, command):
    assert len(command.help.splitlines()[0]) < 60
    assert f"Example:  ema {name}" in command.epilog
    assert set(re.findall(r"--[a-z-]+", command.epilog)) <= {
        option for p in command.params for option in p.opts
    }
    pages = [ROOT / "README.md", *(PACKAGE / "guides").glob("*.md")]
    assert any(f"ema {name}" in page.read_text() for page in pages)
    for parameter in command.params:
        if parameter.name not in ("install_completion", "show_completion"):
            assert parameter.help, f"{name} {parameter.name}"


def test_messages_name_arguments_by_the_function_argument():
    """So that a command names its options, and no word of a user is taken for an argument."""
    names = {option.name for command in commands().values() for option in command.params}
    for path in MODULES:
        docstrings = {id(node.value) for node in parsed(path) if isinstance(node, ast.Expr)}
        for node in parsed(path):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and id(node) not in docstrings:
                quoted = {*re.findall(r"`(\w+)`", node.value)}
                assert not quoted & names, f"{path}:{node.lineno}"


COUNTED = {
    "averages", "bytes", "checkpoints", "files", "models", "parts", "problems", "shards",
    "snapshots", "steps", "targets", "tensors", "times", "trials", "updates", "values",
}  # fmt: skip
MANY = {
    "averages.py": 1, "checkpoints/audit.py": 3, "checkpoints/pickles.py": 2, "demo.py": 3,
    "export/convert.py": 1, "export/job.py": 1, "export/names.py": 1, "remote.py": 1,
    "snapshots/directory.py": 1, "snapshots/opened_file.py": 1, "snapshots/prune.py": 1,
    "snapshots/strict_json.py": 1, "snapshots/tensorfile.py": 3, "snapshots/writer.py": 1,
    "sweep/search.py": 1, "sweep/sweeps.py": 1,
}  # fmt: skip
"""How many counts a module writes with a plural alone, since one is no case there."""


def test_a_count_of_one_has_a_singular():
    """`errors.count_noun` writes it; a constant in capitals is more than one."""
    found = Counter()
    for path in MODULES:
        for node in parsed(path):
            values = node.values if isinstance(node, ast.JoinedStr) else []
            for count, noun in itertools.pairwise(values):
                if is_plural_alone(count, noun):
                    found[path.relative_to(PACKAGE).as_posix()] += 1
    assert found == MANY


def is_plural_alone(count, noun):
    """Return whether a part of a text is a count that varies, and the next one begins with a
    plural."""
    if not (isinstance(count, ast.FormattedValue) and isinstance(noun, ast.Constant)):
        return False
    counted = ast.unparse(count.value)
    is_constant = counted.strip("_").isupper() or counted.startswith("argument(")
    return not is_constant and bool(re.match(rf" ({'|'.join(COUNTED)})\b", noun.value))


PICKLING = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml",
    "pandas", "runpy",
}  # fmt: skip
EXECUTING = {"eval", "exec", "compile", "__import__"}
LOADING = {
    "load",
    "loads",
    "load_file",
    "load_state_dict_from_url",
    "read_pickle",
    "load_module",
    "Unpickler",
}
HARMLESS = {"json.loads", "load_file"}
"""Loaders that execute no code: of JSON, and of safetensors (used by the demo)."""
INERT = 3
"""Calls of `load` in the interpreter of pickles, which finds no class:
`test_hostile_checkpoints`."""


def test_nothing_that_executes_a_file_is_imported_or_called():
    """`import_module` is used only for the table of public names."""
    for path in MODULES:
        check_calls(path)


def check_calls(path):
    found = {name.split(".")[0] for name in imported(path)} & PICKLING
    text = path.read_text()
    calls = called(path)
    loading = Counter()
    for call in calls:
        name = call.split(".")[-1]
        if name in LOADING and call not in HARMLESS:
            loading[name] += 1
    if path == PACKAGE / "checkpoints" / "pickles.py":
        found.remove("pickle")
        assert loading.pop("load") == INERT
    assert not found, path
    assert not set(calls) & EXECUTING, path
    # the tracker's state in the framework's own checkpoint
    if path == PACKAGE / "integrations" / "__init__.py":
        assert "weights_only=True" in text
        assert loading.pop("load") == 2
    assert not loading, path
    assert "allow_pickle" not in text, path
    assert "load_file" not in calls or "from safetensors.torch import load_file" in text
    assert "import_module" not in text or path == PACKAGE / "__init__.py"


@cache
def called(path):
    """Return what a module calls, with repetitions, each as it is written."""
    return [ast.unparse(node.func) for node in parsed(path) if isinstance(node, ast.Call)]


READING = {
    "open", "fdopen", "read_text", "read_bytes", "fromfile", "memmap", "loadtxt", "genfromtxt",
    "mmap", "load_file", "safe_open", "load", "copyfile", "copy2", "copytree",
}  # fmt: skip
UNGUARDED = {
    "files.py": {"open": 4},  # the file operations themselves
    "snapshots/opened_file.py": {"open": 1},  # the guarded read
    "snapshots/directory.py": {"open": 1},  # the lock, which is written
    # methods of the places of checkpoints, which return an `OpenedFile`
    "checkpoints/choose.py": {"open": 1},
    "checkpoints/describe.py": {"open": 1},
    "checkpoints/places.py": {"open": 1},
    "checkpoints/pickles.py": {"load": INERT},  # from an opened file
    "export/output.py": {"copyfile": 1},  # what `like` has found to be files of its folder
    "integrations/__init__.py": {"load": 2},  # the tracker's own state
    "sweep/evaluation.py": {"open": 2},  # which are written
    "sweep/weights.py": {"safe_open": 1, "load_file": 1},  # what it has just written
    # files of the package
    "cli/guide.py": {"read_text": 1},
    "report/page.py": {"read_text": 2},
    "cli/__init__.py": {"open": 4},  # of the system's empty device
}
"""How often a module opens or copies a file by other means than `OpenedFile`, by the name of the
function."""


def test_files_are_read_through_the_guard_against_pipes_and_devices():
    """`OpenedFile` waits for no writer and takes regular files alone, `read_small_file` bounds
    their size: a folder of somebody else may hold anything."""
    for path in MODULES:
        reading = Counter()
        for call in called(path):
            name = call.split(".")[-1]
            if name in READING:
                reading[name] += 1
        module = path.relative_to(PACKAGE).as_posix()
        assert reading == UNGUARDED.get(module, {}), path
