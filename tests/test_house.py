"""The rules of the whole package: public names, the direction of imports, fast help,
documentation."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import typer
from density import density

import posthoc_cli
from posthoc_cli.cli import app

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "posthoc_cli"
ROOMS = (
    "errors", "remote", "files", "resources", "dtypes", "profiles", "targets", "reconstruction",
    "planning", "snapshots", "checkpoints", "synthesis", "export", "plots", "run", "tracker",
    "averages", "integrations", "sweep", "report", "demo", "cli",
)  # fmt: skip
MODULES = pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)


def commands():
    return typer.main.get_command(app).commands


def test_public_names():
    assert posthoc_cli.__all__ == [
        "Beta",
        "Decay",
        "Groups",
        "HalfLife",
        "Mean",
        "PostHocEMA",
        "PostHocError",
        "PowerFunction",
        "Run",
        "Window",
        "averages",
        "disk_sources",
        "error_curve",
        "errors",
        "export_file",
        "gamma_from_sigma_rel",
        "import_checkpoints",
        "plan_synthesis",
        "reconstruct",
        "sigma_rel_from_gamma",
        "sweep",
        "synthesize",
    ]
    assert posthoc_cli.averages.__all__ == [
        "DifferentiableEMA",
        "EMAStats",
        "ExponentialMovingAverage",
        "HareAndTortoise",
        "ShadowModel",
        "SwitchEMA",
    ]
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


@MODULES
def test_imports_point_towards_errors(path):
    """Integrations import only the public tracker; a framework is imported only by the integration
    of its name."""
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = imported(path)
    frameworks = {name.split(".")[0] for name in names} & {
        "transformers",
        "lightning",
        "accelerate",
        "diffusers",
    }
    assert frameworks <= {path.stem}
    if room in ("__init__", "__main__"):
        return
    assert room in ROOMS, "add a new room to ROOMS"
    ours = {name for name in names if name.startswith("posthoc_cli.")}
    allowed = FEW.get(room, set(ROOMS[: ROOMS.index(room) + 1]))
    assert {name.split(".")[1] for name in ours} <= allowed | {"__version__"}
    if room == "integrations":
        assert {name for name in ours if "posthoc_cli.tracker." in name} <= {
            "posthoc_cli.tracker.PostHocEMA",
            "posthoc_cli.tracker.abstain",
        }


def test_no_modules_import_each_other_in_a_circle():
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


HEAVY = {"torch", "matplotlib", "obstore", "huggingface_hub", "posthoc_cli.remote"}


@pytest.mark.parametrize("what", LIGHT)
def test_help_and_numbers_load_no_heavy_libraries(what):
    code = f"{LIGHT[what]}\nimport sys; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_commands_are_those_of_the_design():
    assert {*commands()} == {
        "synthesize",
        "sweep",
        "report",
        "error-plot",
        "info",
        "export",
        "plan",
        "prune",
        "profile",
        "verify",
        "import",
        "audit",
        "demo",
        "guide",
    }


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_an_example_and_a_place_in_the_guides(name):
    command = commands()[name]
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
INERT = {"super().load", "inner.load", "_Machine(file, begin, end, budget, archive).load"}
"""Calls of the interpreter of pickles, which finds no class: `test_hostile_checkpoints`."""


@MODULES
def test_nothing_that_executes_a_file_is_imported_or_called(path):
    """`import_module` is used only for the table of public names."""
    found = {name.split(".")[0] for name in imported(path)} & PICKLING
    text = path.read_text()
    harmless = HARMLESS
    if path == PACKAGE / "checkpoints" / "pickles.py":
        harmless = HARMLESS | INERT
        found.remove("pickle")
    assert not found
    calls = set()
    for node in parsed(path):
        if isinstance(node, ast.Call):
            calls.add(ast.unparse(node.func))
    assert not calls & EXECUTING
    loading = {call for call in calls if call.split(".")[-1] in LOADING}
    # the tracker's state in the framework's own checkpoint
    if path == PACKAGE / "integrations" / "__init__.py":
        assert "weights_only=True" in text
        loading -= {"torch.load", "load"}
    assert loading <= harmless
    assert "allow_pickle" not in text
    assert "load_file" not in calls or "from safetensors.torch import load_file" in text
    assert "import_module" not in text or path == PACKAGE / "__init__.py"


LIMITS = {
    PACKAGE: {"tokens a line": 8.09, "packed": 0, "times": 1, "inner": 3, "big": 7},
    ROOT / "scripts": {"tokens a line": 8.79, "packed": 0, "times": 0, "inner": 0, "big": 0},
    ROOT / "tests": {"tokens a line": 8.62, "packed": 0, "times": 0, "inner": 0, "big": 11},
}
"""The most that `density` may count. Lower a limit when code falls below it; never raise one."""


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there an f-string is several tokens")
@pytest.mark.parametrize("folder", LIMITS, ids=lambda folder: folder.name)
def test_code_is_not_denser_than_before(folder):
    counts = density(folder)
    found = {"tokens a line": round(counts["tokens"] / counts["lines"], 2)}
    for name in ("packed", "times", "inner", "big"):
        found[name] = counts[name]
    limits = LIMITS[folder]
    too_many = {name: count for name, count in found.items() if count > limits[name]}
    assert not too_many
