"""The command `ema`: a file a command, each of which parses, calls the library once and prints.

Nothing here loads torch or matplotlib before a command needs it, so that help is instant.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
import re
import resource
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import typer
from typer import Argument, Option

import posthoc_cli
from posthoc_cli import files
from posthoc_cli.cli import (
    audit,
    demo,
    error_plot,
    export,
    guide,
    import_,
    info,
    output,
    plan,
    profile,
    prune,
    report,
    sweep,
    synthesize,
    verify,
)
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, PostHocError, VanishedError, printable
from posthoc_cli.targets import FORMS

# typer brings its own click or uses the installed one, depending on its release; this is the base class of all
# mistakes on the command line in either.
_USAGE_ERROR: Any = typer.BadParameter.__base__
_DEBUG = "--debug"
_LONGEST_LINE = 5_000
_ARGUMENT = re.compile(r"(?:^|(?<=, )|(?<= and ))(\w+)(?=[, ]|$)")
"""In the subject of a library's error: "t", "t and step", "beta 0.3"."""
_ADVICE = re.compile(r"`(\w+)`|\b(\w+)=True")
"""In its hint: "give `layout`", "or overwrite=True"."""


class _Command(typer.core.TyperCommand):
    """A command whose errors name its options, and the commands that help."""

    def get_help_option(self, ctx: Any) -> Any:
        """Not listed: whoever sees the list knows it."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.hidden = True
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As of any command, but an empty argument is refused: as a path it would mean the working directory."""
        given = {} if ctx.resilient_parsing or "" not in args else self.make_parser(ctx).parse_args(args=[*args])[0]
        for argument in self.params:
            value = given.get(argument.name)
            if argument.param_type_name == "argument" and (value == "" or (isinstance(value, tuple) and "" in value)):
                raise InvalidValueError(argument.metavar, files.EMPTY)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PostHocError as error:
            raise _with_options(error, ctx).with_traceback(error.__traceback__) from error.__cause__


def _options(command: Any) -> dict[str, str]:
    """The options of a command by the names of its function's arguments."""
    return {option.name: option.opts[0] for option in command.params if option.opts[0][:2] == "--"}


def _with_options(error: PostHocError, context: Any) -> PostHocError:
    """A copy of a library's error: arguments are options, and a broken snapshot leads to `ema verify`."""
    changed = copy.copy(error)
    options = _options(context.command)
    if isinstance(error, InvalidValueError) or error.value:
        changed.subject = _ARGUMENT.sub(lambda found: options.get(found[1], found[1]), error.subject)
    if "import with" in error.hint:
        options = _options(context.find_root().command.commands["import"])
    changed.hint = _ADVICE.sub(lambda found: options.get(found[1] or found[2], found[0]), error.hint)
    is_ours = Path(error.subject).suffix in ("", ".safetensors")
    if isinstance(error, FileFormatError | MismatchError) and is_ours and not isinstance(error, VanishedError):
        for directory in (context.params.get("directory"), *(context.params.get("directories") or ())):
            path = None if directory is None else files.expanded(Path(directory))
            if path is not None and error.subject.startswith(f"{path}{os.sep}") and _is_run(path):
                hint = f"`ema verify {directory}` checks every file, and with --repair sets aside what is broken"
                return changed.with_hint(hint)
    return changed


def _is_run(directory: Path) -> bool:
    """Whether a tracker has written to a directory; files of others are never set aside."""
    from posthoc_cli.snapshots.directory import inspect_directory
    from posthoc_cli.snapshots.writer import LOCK_NAME

    return (directory / LOCK_NAME).exists() or bool(inspect_directory(directory).snapshots)


app = typer.Typer(
    name="ema",
    help="Choose the length of a model's weight average after training.",
    epilog="Example:  ema synthesize run/ema --sigma-rel 0.15 --out model.safetensors",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (
    synthesize, sweep, report, error_plot, info, verify, export, plan, prune, profile, import_, audit, demo, guide,
):  # fmt: skip
    # The function of a command has the name of its file.
    _function = getattr(_module, _module.__name__.rpartition(".")[2])
    _name = _function.__name__.strip("_").replace("_", "-")
    # Each paragraph of its help in one line, which is wrapped to the terminal; each example in lines of its own.
    _text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(_function.__doc__ or ""))
    _examples = _module.EPILOG.replace("   or   ", "\n\nor:       ")
    app.command(_name, cls=_Command, help=_text, epilog=_examples)(_function)


def _names(incomplete: str) -> list[str]:
    """Names of commands, for completion in a shell."""
    root: Any = typer.main.get_command(app)
    return [name for name in root.commands if name.startswith(incomplete)]


@app.command("help", cls=_Command, epilog="Example:  ema help synthesize")
def _help(
    context: typer.Context,
    command: str | None = Argument(None, metavar="COMMAND", autocompletion=_names, help="A command, or targets."),
) -> None:
    """Show the help of a command, or of all.

    ema help targets lists the kinds of averages that --target names.
    """
    if command == "targets":
        width = "0.15", "sigma_rel: the width of a power function, as a fraction of training time"
        output.print_pairs([width, *FORMS.values()])
        output.print_line("each also as a list, such as 0.05,0.10, or a range START:STOP:STEP; of a decay 5%:50%:5%")
        return
    root: Any = context.find_root().command
    root.main([*([] if command is None else [command]), "--help"], prog_name="ema", standalone_mode=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ema {posthoc_cli.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = Option(
        False, "--version", "-V", callback=_print_version, is_eager=True, metavar="", help="Print the version."
    ),
    debug: bool = Option(False, _DEBUG, metavar="", help="Show a traceback when something goes wrong."),
) -> None:
    """Choose the length of a model's weight average after training."""


def main() -> NoReturn:
    """Run the command line and exit.

    0: done. 1: a failed check, or an error at run time. 2: the command line is wrong: an unknown option, a value out
    of range, a path that does not exist or is of another kind, an output whose folder does not exist. 130:
    interrupted. 143, 129: SIGTERM, SIGHUP. 141: the reader of the output has closed it, as `head` does.
    """
    # Solves are small: threads of BLAS take longer to start than the work does. Read when NumPy is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = sys.argv[1:] or ["--help"]
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
        code = command.main([a for a in arguments if a != _DEBUG], prog_name="ema", standalone_mode=False)
        output.write("", flush=True)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        code = _reader_has_gone()
    except PostHocError as error:
        if debug:
            raise
        code = error.exit_code
        _print_message("error", error)
    except OSError as error:
        if debug:
            raise
        code = 1
        if error.filename == output.STDOUT:
            _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        _print_message("error", where + (error.strerror or str(error)).lower())
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):  # click turns that into exit code 1
            raise
        code = _reader_has_gone()
    except _USAGE_ERROR as error:
        code = 2
        context = getattr(error, "ctx", None)
        see = "" if context is None else f" (see {context.command_path} --help)"
        _print_message("error", f"{error.format_message()}{see}")
    if code == 130:  # typer may return it
        output.print_note("ema: interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _print_message(kind: str, message: object) -> None:
    """One line of limited length."""
    line = printable(" ".join(str(message).split()))
    output.print_note(f"ema: {kind}: {line[:_LONGEST_LINE]}{'...' * (len(line) > _LONGEST_LINE)}")


def _report_unexpected(kind: type[BaseException], error: BaseException, _: object) -> None:
    hint = f"run again with {_DEBUG} to see where, and report it"
    _print_message("error", f"unexpected {kind.__name__}: {error}; {hint}")


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        output.print_note(line)


def _reader_has_gone() -> int:
    """The exit code of a process that SIGPIPE ended; the interpreter closes a stream that works."""
    _drop_output()
    return 128 + 13


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_streams() -> None:
    """Replace streams that the caller has closed; escape names that the terminal's encoding lacks."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _allow_many_files() -> None:
    """Raise the limit of open files as far as allowed: a run may have more snapshots than the usual 1,024."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if most == resource.RLIM_INFINITY else min(65_536, most)
    with suppress(ValueError, OSError):  # some systems allow less than they report
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), most))


def _clean_up_on_signals() -> None:
    """End as after an error, with nothing partial left, on SIGTERM and when the terminal closes."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
        signal.signal(signal.SIGHUP, _terminate)


def _terminate(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)
