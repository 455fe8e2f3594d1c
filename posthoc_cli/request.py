"""What a user wants of a run: averages, of which tensors, made how, and in which files; or a search
for the best one.

The command line, `Run` and the plan of a synthesis, or a sweep, take the same object. Each field
says here what `--help` prints of its option, and is checked once, when the request is made; errors
carry the field's name. So an option is one field and the place that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, field
from functools import cached_property, wraps
from inspect import Parameter, getdoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from posthoc_cli import files, resources
from posthoc_cli.checkpoints.containers import INDEX_ENDING
from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import (
    InvalidValueError,
    abbreviate,
    argument,
    at_most_one,
    check_count,
    check_number,
    check_word,
)
from posthoc_cli.planning import check_sigma_range
from posthoc_cli.reconstruction import check_method
from posthoc_cli.resources import ProgressBar, no_bar, worker_count
from posthoc_cli.snapshots.selection import Selection, make_selection
from posthoc_cli.targets import Target, Wanted, as_targets

if TYPE_CHECKING:
    import torch

LAYOUTS = {
    "safetensors": (".safetensors",),
    "sharded": (),
    "pt": (".pt", ".pth", ".bin", ".ckpt"),
}
"""The layouts of an output, each with the file name extensions that it accepts; shards are in a
folder."""

_P = ParamSpec("_P")
_S = TypeVar("_S")
_R = TypeVar("_R")


class Help(NamedTuple):
    """What `--help` prints of a field's option."""

    panel: str
    metavar: str
    text: str
    default: str = ""  # as shown, where it is not the field's own


def _option(panel: str, metavar: str, text: str, default: Any = None, shown: str = "") -> Any:
    return field(default=default, metadata={"help": Help(panel, metavar, text, shown)})


def _dtype() -> Any:
    text = "float32, float16, bfloat16, float64 (or fp32, ...), or keep: each tensor's own."
    return _option("Output", "DTYPE", text, shown="keep")


def _like() -> Any:
    text = "Make a copy of this checkpoint or model folder, with the average in place of its own."
    return _option("Output", "CHECKPOINT", text)


def _base() -> Any:
    text = "The weights that a fine-tuning started from, to mix in."
    return _option("How", "CHECKPOINT", text)


def _time() -> Any:
    return _option("Which run", "TIME", "The training time of the averages.", shown="the last")


def _step() -> Any:
    text = "The same time as a step (a call of update_): 50000, 5e4, 50K."
    return _option("Which run", "COUNT", text)


@dataclass(frozen=True)
class Request:
    """Averages of a run.

    Arguments:
        targets: one or more; see `targets.as_target`.
        t: time of the targets; snapshots at or before it are used.
        step: the same in calls of `update_`; if the run's clock does not count steps, it must be
            the step of a snapshot.
        method: the solver, one of `reconstruction.METHODS`; None for the first.
        max_error: the largest predicted error to accept.
        dtype: dtype of the averages in the outputs; None or "keep" for each parameter's own.
            Buffers keep their own.
        include, exclude: globs on names of tensors: make only those that match the first, and none
            that match the second.
        device: where sums are computed; "auto" for the one that is there.
        base: a checkpoint, model folder or URL of the weights that a fine-tuning started from.
        base_share: their share of each tensor that they have; the rest is the average.

    Raises:
        InvalidValueError: an argument is invalid; the error names it and what would be accepted.
    """

    targets: Wanted | Sequence[Wanted]
    _: KW_ONLY
    t: float | None = _time()
    step: int | None = _step()
    method: str | None = _option(
        "How",
        "",
        "The solver: minvar, for the least error of the weights, or paper, for the nearest "
        "profile, as published.",
        shown="minvar",
    )
    max_error: float | None = _option(
        "How",
        "ERROR",
        "Fail if a predicted error exceeds this: 0.01, or 1%.",
        shown="warn from a lost gain of 5% on",
    )
    dtype: torch.dtype | str | None = _dtype()
    include: str | Sequence[str] | None = _option(
        "Output", "GLOB", "Make only tensors of these names: 'decoder.*'. Repeatable."
    )
    exclude: str | Sequence[str] | None = _option(
        "Output", "GLOB", "Leave out tensors of these names. Repeatable."
    )
    device: torch.device | str = _option(
        "How",
        "DEVICE",
        "Where to compute the sums: auto, cpu, or what torch has: cuda, cuda:1, xpu, mps.",
        "auto",
    )
    base: str | Path | None = _base()
    base_share: float | None = _option(
        "How", "SHARE", "Their share, above 0 and below 1; the rest is the average."
    )

    def __post_init__(self) -> None:
        check_method(self.method)
        if self.max_error is not None:
            accepted = "be a relative error in (0, 1), such as 0.01"
            check_number("max_error", self.max_error, lambda error: 0 < error < 1, accepted)
        at_most_one(t=self.t, step=self.step)
        parse_dtype(self.dtype)
        if not self.wished:
            raise InvalidValueError("sigma_rel", "at least one value is needed, in (0, 0.2887)")
        self.selection  # noqa: B018  raises an error if invalid
        if (self.base is None) != (self.base_share is None):
            given, lacking = "base", "base_share"
            if self.base is None:
                given, lacking = lacking, given
            raise InvalidValueError(given, f"needs {argument(lacking)}")
        if self.base_share is not None:
            check_number(
                "base_share", self.base_share, lambda share: 0 < share < 1, "lie in (0, 1)"
            )

    @cached_property
    def wished(self) -> tuple[Target, ...]:
        return as_targets(self.targets)

    @cached_property
    def selection(self) -> Selection:
        """The choice of tensors."""
        return make_selection(self.include, self.exclude, "average")


@dataclass(frozen=True, kw_only=True)
class FileRequest:
    """How the files of a model are written.

    Arguments:
        dtype: see `Request`.
        layout: one of `LAYOUTS`; None to choose it by the output's name.
        max_shard_size: of a sharded output, such as "5GB", which is the default.
        like: a checkpoint or model folder, which outputs are copies of but for the tensors of the
            average.
        overwrite: replace existing outputs.
        distributed: all processes of a torchrun job make this call, and each writes some of the
            shards.

    Raises:
        InvalidValueError: an argument is invalid, or contradicts another one.
    """

    dtype: torch.dtype | str | None = _dtype()
    layout: str | None = _option(
        "Output",
        "LAYOUT",
        "safetensors, sharded (a folder), or pt.",
        shown="from the output's name",
    )
    max_shard_size: int | str | None = _option(
        "Output", "SIZE", "The largest shard of a sharded output.", shown="5GB"
    )
    like: str | Path | None = _like()
    overwrite: bool = _option("Output", "", "Replace existing outputs.", False)
    distributed: bool = False

    def __post_init__(self) -> None:
        parse_dtype(self.dtype)
        if self.layout is not None:
            check_word("layout", self.layout, LAYOUTS)
        self.shard_bytes  # noqa: B018  raises an error if invalid
        if self.like is None:
            return
        at_most_one(like=self.like, dtype=parse_dtype(self.dtype))
        at_most_one(like=self.like, layout=self.layout)
        at_most_one(like=self.like, max_shard_size=self.max_shard_size)
        if self.distributed:
            reason = "one process makes a copy: run the command without torchrun"
            raise InvalidValueError("like", reason)
        if self.overwrite and self.makes_folders:
            raise InvalidValueError("overwrite", "a copy of a folder replaces no other folder")

    @property
    def shard_bytes(self) -> int:
        size = "5GB" if self.max_shard_size is None else str(self.max_shard_size)
        return resources.parse_bytes(size, "max_shard_size")

    @property
    def makes_folders(self) -> bool:
        """Whether every output is a folder."""
        if self.like is None:
            return self.distributed or self.layout == "sharded"
        like = files.local_path("like", self.like)
        return like.is_dir() or like.name.endswith(INDEX_ENDING)

    @property
    def ending(self) -> str:
        """The ending of the name of an output that is a file, by default."""
        if self.like is not None:
            return Path(self.like).suffix
        return LAYOUTS[self.layout or "safetensors"][0]

    def find_layout(self, path: Path) -> str:
        """Find the layout of an output: as given, or by its name .pt, .safetensors, or a folder of
        shards; or "like" for a copy.

        Raises InvalidValueError if the name has the ending of another layout, or of none. A folder
        may have any name.
        """
        if self.like is not None:
            if not (self.makes_folders or path.name.endswith(self.ending)):
                reason = f"must end in {self.ending}, like the file that it is a copy of"
                raise InvalidValueError("out", reason, value=path)
            return "like"
        named = next((name for name, endings in LAYOUTS.items() if path.suffix in endings), None)
        given = "sharded" if self.distributed else self.layout
        layout = given or named or "sharded"
        is_other = named not in (None, layout)
        is_unknown = given is None and named is None and path.suffix
        if (is_other or is_unknown) and not path.is_dir():
            if is_other:
                raise InvalidValueError(path, f"its extension does not fit the layout {layout}")
            reason = "its extension is unknown"
            raise InvalidValueError(
                path, reason, "use .safetensors or .pt, or for a folder no extension"
            )
        if self.max_shard_size is not None and layout != "sharded":
            reason = f"applies to sharded outputs only, and this layout is {layout}"
            hint = f"add {argument('layout')} sharded"
            raise InvalidValueError("max_shard_size", reason, hint, value=self.max_shard_size)
        return layout


@dataclass(frozen=True)
class OutputRequest(FileRequest, Request):
    """Averages of a run in files.

    Arguments, beside those of `Request` and `FileRequest`:
        out: a file, or a folder for a file per target; may be None in a dry run.
        raw: replace the raw weights of `like`, not its own average.
        average, weights: the key, prefix or glob of the average, or of the weights, of `like` to
            replace; with both, the average.
        dry_run: plan only.
        workers: number of threads; None for one per core.
        progress: opens a progress bar.
    """

    out: str | Path | None = None
    _: KW_ONLY
    raw: bool = _option("Output", "", "Replace the raw weights of --like, found by names.", False)
    average: str | None = _option(
        "Output",
        "KEY",
        "Replace the average of this key, prefix or glob in --like.",
        shown="by its name",
    )
    weights: str | None = _option(
        "Output",
        "KEY",
        "Replace the weights of this key, prefix or glob in --like; --raw finds them by names.",
    )
    dry_run: bool = _option("How", "", "Show coefficients, errors and sizes; write nothing.", False)
    workers: int | None = None
    progress: ProgressBar = field(default=no_bar, compare=False)

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        FileRequest.__post_init__(self)
        worker_count(self.workers)
        at_most_one(overwrite=self.overwrite, dry_run=self.dry_run)
        at_most_one(raw=self.raw, average=self.average)
        at_most_one(raw=self.raw, weights=self.weights)
        for name in ("raw", "average", "weights"):
            if self.like is None and getattr(self, name) not in (None, False):
                reason = f"needs {argument('like')}, whose tensors it replaces"
                raise InvalidValueError(name, reason)
        at_most_one(like=self.like, include=self.include)
        at_most_one(like=self.like, exclude=self.exclude)


@dataclass(frozen=True)
class SweepRequest:
    """A search for the best length of an average by a metric.

    Arguments:
        evaluate: a function that takes the tensors by name and returns the metric, a number, or the
            metric and its standard error; or a command, as of `--eval`.
        minimize, maximize: whether a lower or a higher metric is better: one of them is True.
        look: show the images that a command makes of some lengths, without a metric.
        metric: where a command prints its metric, as `--metric`; or what a function returns.
        sigma_range, sigma_rels: the range to search, by default all whose lost gain is below 5 %,
            or a list to measure.
        budget: the most evaluations, of averages and of what they are compared with; None for as
            many as the search makes.
        jobs: commands that run side by side; a function is called in this thread.
        base: the weights that a fine-tuning started from, as in `Request`: shares of them are
            measured, too.
        t: time at which the averages end.
        step: the same in calls of `update_`.
        raw: the last weights, to measure them too, if the run lacks them: tensors by name, or a
            checkpoint.
        like: as in `FileRequest`, for a command's weights and the best average.
        out: a folder for trials, logs, images, the best average and the page, with which the same
            call continues (a function is known by its name: name another folder if it has changed);
            None to keep nothing.

    Raises:
        InvalidValueError: an argument is invalid, or contradicts another one.
    """

    evaluate: str | Callable[[dict[str, torch.Tensor]], Any] = _option(
        "How",
        "COMMAND",
        "The evaluation, without a shell. {weights} becomes an average's file; also {sigma_rel}, "
        "{seed}, {dir}, {job}.",
        MISSING,
    )
    _: KW_ONLY
    minimize: bool | None = _option("How", "", "Lower is better.")
    maximize: bool | None = _option("How", "", "Higher is better.")
    look: bool = _option(
        "How", "", "No metric: only show the images of some lengths, side by side.", False
    )
    metric: str | None = _option(
        "How",
        "KEY",
        "The word before the number, such as loss in loss: 2.67, or its key in a JSON object; or "
        "r.json:acc: acc of the newest r.json in {dir}.",
        shown="the last line that is a number",
    )
    sigma_range: tuple[float, float] | None = None
    sigma_rels: Sequence[float] | None = None
    budget: int | None = _option(
        "How",
        "COUNT",
        "The most evaluations: at least 4 beside those of your EMA and last weights.",
        shown="what the search takes, some 8 to 25",
    )
    jobs: int = _option(
        "How",
        "COUNT",
        "Evaluations side by side, each with its {job} and a CUDA device of its own.",
        1,
    )
    base: str | Path | None = _base()
    like: str | Path | None = _like()
    t: float | None = _time()
    step: int | None = _step()
    raw: str | Path | Mapping[str, torch.Tensor] | None = _option(
        "Which run", "CHECKPOINT", "The last weights, to measure them too: last.pt."
    )
    out: str | Path | None = None

    def __post_init__(self) -> None:
        at_most_one(minimize=self.minimize, maximize=self.maximize, look=self.look)
        at_most_one(look=self.look, metric=self.metric)
        at_most_one(look=self.look, base=self.base)
        at_most_one(sigma_range=self.sigma_range, sigma_rels=self.sigma_rels)
        if self.sigma_range is not None:
            check_sigma_range(self.sigma_range)
        at_most_one(t=self.t, step=self.step)
        self.is_lower_better  # noqa: B018  raises an error if it is not said
        check_count("jobs", self.jobs)
        if self.sigma_rels is not None and self.budget is not None:
            reason = "bounds the search of a range, and a list is measured as it is"
            raise InvalidValueError("budget", reason, value=self.budget)
        if callable(self.evaluate):
            if self.look:
                raise InvalidValueError("look", "needs a command, which makes the images")
        elif not isinstance(self.evaluate, str):
            reason = "must be a function of the tensors by name, or a command"
            raise InvalidValueError("evaluate", reason, value=abbreviate(self.evaluate))
        elif self.out is None:
            raise InvalidValueError("out", "is required: a command has logs")
        elif isinstance(self.raw, Mapping):
            raise InvalidValueError("raw", "must be a checkpoint where a command measures it")
        if self.like is not None and self.out is None:
            reason = f"needs {argument('out')}, where the best average is a copy of it"
            raise InvalidValueError("like", reason)

    @cached_property
    def folder(self) -> Path | None:
        return None if self.out is None else files.local_path("out", self.out)

    @cached_property
    def is_lower_better(self) -> bool | None:
        """Whether a lower metric is better; None of a look, which has no metric."""
        if self.look:
            return None
        said = {self.minimize, None if self.maximize is None else not self.maximize} - {None}
        if said not in ({True}, {False}):
            words = f"{argument('minimize')} or {argument('maximize')}"
            reason = f"say whether lower or higher is better: give {words}"
            hint = f"or {argument('look')}, to compare images without a metric"
            raise InvalidValueError("minimize", reason, hint)
        return said.pop()


def takes(
    make: Callable[_P, Any],
) -> Callable[[Callable[[_S, Any], _R]], Callable[Concatenate[_S, _P], _R]]:
    """Give a method that takes a request the arguments of the request, and their description."""

    def decorate(method: Callable[[_S, Any], _R]) -> Callable[Concatenate[_S, _P], _R]:
        @wraps(method)
        def call(self: _S, /, *args: _P.args, **options: _P.kwargs) -> _R:
            return method(self, make(*args, **options))

        call.__doc__ = f"{getdoc(method)}\n\n{getdoc(make)}"
        taken = signature(make)
        own = Parameter("self", Parameter.POSITIONAL_ONLY)
        vars(call)["__signature__"] = taken.replace(
            parameters=[own, *taken.parameters.values()],
            return_annotation=signature(method).return_annotation,
        )
        return call

    return decorate
