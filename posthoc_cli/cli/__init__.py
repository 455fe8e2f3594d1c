"""The command `ema`: each command parses its arguments, calls the library once and prints the
result.

No module of this room loads torch or matplotlib before a command needs it, so that help appears at
once.
"""

from __future__ import annotations

import inspect
import io
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import typer
from typer import Option

import posthoc_cli
from posthoc_cli.cli import (
    audit,
    demo,
    error_plot,
    export,
    guide,
    import_,
    info,
    output,
    prune,
    quotes,
    sweep,
    synthesize,
    verify,
)
from posthoc_cli.errors import (
    InvalidValueError,
    PostHocError,
    collect_warnings,
    name_options,
    one_line,
)

# typer bundles click or uses the installed one, depending on its release; this is the base class of
# all usage errors in either case.
_USAGE_ERROR: Any = typer.BadParameter.__base__
_DEBUG = "--debug"
_STRICT = "--strict"
# of torch's RuntimeError, and of the ImportError of a library
_NO_MEMORY = ("DefaultCPUAllocator: ", "failed to map segment")
_NO_THREAD = "can't start new thread"  # of Python's RuntimeError


class _Plain:
    """Parameters whose help shows no type of Python: none after arguments and after options without
    a value. --help, which was just used, is not shown."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in params:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
                parameter.hidden = parameter.name == "help"
            elif parameter.param_type_name == "argument":
                parameter.display_type = _show_nothing
        return params


def _show_nothing(_: Any) -> str:
    return ""


class _Group(_Plain, typer.core.TyperGroup):
    """The group of all commands."""


class _Command(_Plain, typer.core.TyperCommand):
    """A command: an error about arguments of the library names the options of these names."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        options = dict[str, Any]()
        for parameter in self.params:
            if parameter.param_type_name == "option":
                options |= dict.fromkeys(parameter.opts, parameter)
        for place, word in enumerate(args, start=1):
            option = options.get(word)
            is_missing = place == len(args) or args[place] in options
            if option is not None and not option.is_flag and is_missing:
                raise InvalidValueError(word, f"needs a value: {option.help.rstrip('.')}")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        own = _option_names(self)
        options = dict[str, str]()
        for command in ctx.parent.command.commands.values():  # a hint may ask for another one
            options |= _option_names(command)
        options |= own
        with name_options(options):
            try:
                return super().invoke(ctx)
            except PostHocError as error:
                if isinstance(error.args[0], str):  # else a path, which may be named like an option
                    error.subject = options.get(error.subject, error.subject)
                raise


def _option_names(command: Any) -> dict[str, str]:
    """Find the options of a command by the names of their arguments."""
    options = {}
    for option in command.params:
        name = option.opts[0]
        if name.startswith("--"):
            options[option.name] = name
    return options


app = typer.Typer(
    cls=_Group,
    name="ema",
    help="Choose the length of a model's weight average after training.",
    epilog="Example:  ema synthesize run/ema --sigma-rel 0.15 --out model.safetensors",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
EXAMPLES: dict[Callable[..., int | None], tuple[str, ...]] = {
    synthesize.synthesize: (
        "ema synthesize run/ema --sigma-rel 0.15 --out model.safetensors",
        "ema synthesize run/ema --sigma-rel 0.05,0.06,...,0.25 --decay 0.9999 --out averages/",
        "ema synthesize run/ema --sigma-rel 0.1 --like last.pt --out averaged.pt",
    ),
    sweep.sweep: (
        "ema sweep checkpoints/ --eval 'python eval.py {weights}' --minimize --out best",
        "ema sweep run/ema --eval 'python eval.py {weights}' --metric acc --maximize --raw last.pt",
    ),
    error_plot.error_plot: (
        "ema error-plot run/ema --out error.png",
        "ema error-plot --steps 200000 --every 1000 --keep 20 --out error.png",
    ),
    info.info: ("ema info run/ema", "ema info model.safetensors --json"),
    verify.verify: ("ema verify run/ema", "ema verify out/ m.safetensors --json"),
    export.export: (
        "ema export model.safetensors --out model.pt",
        "ema export last.pt --out average.safetensors",
        "ema export avg.safetensors --like model/ --out folder/",
        "ema export avg.safetensors --like last.pt --out averaged.pt",
    ),
    prune.prune: (
        "ema prune run/ema --keep 20 --dry-run",
        "ema prune run/ema --keep 10 --yes",
    ),
    import_.import_: ("ema import old --sigma-rels 0.05,0.28 --update-every 10 --out run",),
    audit.audit: ("ema audit checkpoints --claimed 0.9999 --out audit.png",),
    demo.demo: ("ema demo --out ema-demo",),
    guide.guide: ("ema guide training",),
}
"""The examples at the end of each command's help."""

_PANELS: dict[str, tuple[Callable[..., int | None], ...]] = {
    "Choose": (sweep.sweep, synthesize.synthesize, error_plot.error_plot),
    "Look": (info.info, audit.audit, verify.verify),
    "Files": (import_.import_, export.export, prune.prune),
    "Learn": (demo.demo, guide.guide),
}
"""The commands in the order of the help, by what one wants."""

for _panel, _functions in _PANELS.items():
    for _function in _functions:
        # Each paragraph of the help becomes one line, which is wrapped to the terminal; each
        # example starts a new line.
        app.command(
            _function.__name__.strip("_").replace("_", "-"),
            cls=_Command,
            help=re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(_function.__doc__ or "")),
            epilog="Example:  " + "\n\nor:       ".join(EXAMPLES[_function]),
            rich_help_panel=_panel,
        )(_function)


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"ema {posthoc_cli.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = Option(
        False, "--version", "-V", callback=_print_version, is_eager=True, help="Print the version."
    ),
    debug: bool = Option(False, _DEBUG, help="Show a traceback when something goes wrong."),
    strict: bool = Option(False, _STRICT, help="Take a warning as an error: nothing is written."),
) -> None:
    """Choose the length of a model's weight average after training."""


def main() -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0: done. 1: a failed check, or an error at run time. 2: the command line is wrong:
    an unknown option, a value out of range, a path that does not exist or is of another kind, an
    output that exists. 130: interrupted. 143, 129: ended by SIGTERM, SIGHUP. 141: the reader of the
    output has closed it, as `head` does.
    """
    # Solves are small: BLAS threads take longer to start than to compute. NumPy reads this when it
    # is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = sys.argv[1:] or ["help"]
    if arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    elif arguments == ["version"]:
        arguments = ["--version"]
    debug = _DEBUG in arguments
    sys.excepthook = _show_traceback if debug else _report_unexpected
    warnings.showwarning = lambda message, *_, **__: _print_message("warning", message)
    output.log_to_stderr()
    _prepare_streams()
    _clean_up_on_signals()
    _allow_many_files()
    try:
        # Not app(...): that would install typer's own excepthook.
        command: Any = typer.main.get_command(app)
        words = [word for word in arguments if word not in (_DEBUG, _STRICT)]
        with collect_warnings(strict=_STRICT in arguments) as output.warnings:
            code = command.main(words, prog_name="ema", standalone_mode=False)
        output.write("", flush=True)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        code = _drop_output()
    except (PostHocError, OSError) as error:
        if debug:
            raise
        code = _report_error(error)
    except SystemExit as ending:
        # click turns a broken pipe into exit code 1
        if not isinstance(ending.__context__, BrokenPipeError):
            raise
        code = _drop_output()
    except _USAGE_ERROR as error:
        code = _report_usage(error)
    if code == 130:  # from the handler above, or returned by typer
        output.print_note("ema: interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _report_error(error: PostHocError | OSError) -> int:
    """Print an error, and return the exit code."""
    if isinstance(error, PostHocError):
        _print_message("error", error)
        return error.exit_code
    if error.filename == output.STDOUT:
        _drop_output()
    reason = (error.strerror or str(error)).lower()
    _print_message("error", f"{error.filename}: {reason}" if error.filename else reason)
    return 1


def _report_usage(error: Any) -> int:
    text = error.format_message().replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    if context is not None:
        own = _option_names(context.command)
        split = ""
        if not isinstance(context.command, _Group):
            words = sys.argv[sys.argv.index(context.info_name) :]
            split = quotes.find_split(words, own.get("evaluate"), own.values())
        if quotes.may_be_split(text):
            text += "; put a path with spaces in quotes"
        text = split or f"{text} (see {context.command_path} --help)"
    _print_message("error", text)
    return 2


def _print_message(kind: str, message: object) -> None:
    output.print_note(f"ema: {kind}: {one_line(' '.join(str(message).split()))}")


def _report_unexpected(
    kind: type[BaseException],
    error: BaseException,
    _: object,
) -> None:
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        _print_message("error", "not enough memory is free")
    elif isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        reason = "the system starts no more threads: a limit of processes or of memory is reached"
        _print_message("error", reason)
    else:
        hint = f"run again with {_DEBUG} to see where, and report it"
        _print_message("error", f"unexpected {kind.__name__}: {error}; {hint}")


def _show_traceback(
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        output.print_note(line)


def _drop_output() -> int:
    """Redirect stdout to /dev/null, so that the interpreter can flush and close it; return the exit
    code of SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def _prepare_streams() -> None:
    """Replace streams that the caller has closed, and escape characters that the encoding of stdout
    lacks."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _allow_many_files() -> None:
    """Raise the limit of open files: a run may have more snapshots than the usual limit of
    1,024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)
    with suppress(ValueError, OSError):  # some systems allow less than they report
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _clean_up_on_signals() -> None:
    """Exit as after an error, without partial outputs, on SIGTERM and when the terminal closes."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda received, _: sys.exit(128 + received))
