"""A run, finished or still training, read from its directory of snapshots."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli import files
from posthoc_cli.errors import PostHocError
from posthoc_cli.planning import USEFUL_RANGE, Candidate, ErrorCurve, error_curve, profile_fit
from posthoc_cli.profiles import Profile
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.snapshots import pruning
from posthoc_cli.snapshots.check import Verification, list_contents, verify, verify_measurements
from posthoc_cli.snapshots.description import describe
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.format import TensorSpec, of_newest_segment
from posthoc_cli.snapshots.measurements import Likeness, chosen_up_to, deep_bytes, likeness, run_clock
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.synthesis.plan import Plan, plan_synthesis, with_consistent_plan
from posthoc_cli.synthesis.sources import disk_sources, source_prior
from posthoc_cli.targets import Target, as_target

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from posthoc_cli.export.job import SynthesisReport

Wanted = float | Target | Profile
"""An average: a sigma_rel, a target such as Beta(0.9999), or any object with `density` and `tail`."""


class Weights(OrderedDict[str, "torch.Tensor"]):
    """Averaged tensors by name. Pickles as a plain OrderedDict, so that a file of it loads with `weights_only=True`.

    `with ema.state_dict(...) as weights` gives the dict itself, as users of other libraries write it.

    Attributes:
        predicted_error: expected relative L2 distance from the true average; None if unknown.
        profile_error: relative L2 distance between the wanted profile and the one that the snapshots make.
    """

    predicted_error: float | None = None
    profile_error: float = 0.0

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())


def make_weights(plan: Plan, device: torch.device | str = "cpu") -> Weights:
    """The first target of a plan, in memory. Errors as `synthesize`."""
    from posthoc_cli.synthesis.engine import Options, synthesize

    made = {name: tensors[0] for name, tensors in synthesize(plan, Options(device))}
    weights = Weights((spec.name, made[spec.name]) for spec in plan.specs())
    weights.predicted_error = plan.predicted_error(0)
    weights.profile_error = float(plan.reconstruction.profile_error[0])
    return weights


class Run:
    """The snapshots of one run. Reads headers only, until tensors are asked for; the directory anew at every call.

    Arguments:
        directory: where the tracker writes its snapshots. It need not exist yet.

    Errors of all methods and properties that read snapshots:
        DirectoryError: there is no directory, or no snapshot in it.
        FileFormatError, MismatchError: a snapshot is damaged, or does not belong to the run.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = files.expanded(Path(directory))

    def __repr__(self) -> str:
        try:
            snapshots = self.snapshots
        except PostHocError as error:
            return f"Run({str(self.directory)!r}: {error.reason})"
        widths = ", ".join(f"{profile:g}" for profile in _profiles(snapshots))
        last = snapshots[-1].info
        return f"Run({str(self.directory)!r}: {len(snapshots)} snapshots of {widths} up to {last.t:g} {last.t_unit})"

    # --- what is there

    @property
    def snapshots(self) -> list[Snapshot]:
        """The headers of all snapshots, by time, then sigma_rel."""
        return read_directory(self.directory)

    @property
    def profiles(self) -> list[float]:
        """The sigma_rel of each tracked profile."""
        return _profiles(self.snapshots)

    @property
    def t(self) -> float:
        """Training time of the newest snapshot."""
        return self.snapshots[-1].info.t

    @property
    def step(self) -> int:
        """Calls of `update_` up to the newest snapshot."""
        return self.snapshots[-1].info.step

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype (its safetensors name) and shape of every tensor of an average, under all its names."""
        newest = self.snapshots[-1]
        names = {name: name for name in newest.info.tensors} | newest.info.aliases
        return {
            alias: TensorSpec(alias, newest.info.tensors[name].dtype, newest.header.tensors[name].shape)
            for alias, name in names.items()
        }

    def info(self) -> dict[str, Any]:
        """All that headers tell of the directory, also where something is wrong with it: see `describe`."""
        return describe(self.directory)

    # --- averages

    def plan(
        self,
        targets: Wanted | Sequence[Wanted],
        *,
        t: float | None = None,
        step: int | None = None,
        method: str | None = None,
        max_error: float | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Plan:
        """Coefficients and errors of averages. Arguments and errors as in `plan_synthesis`."""
        return plan_synthesis(disk_sources(self.directory), as_targets(targets), t, step, method, max_error, dtype)

    def average(
        self,
        target: Wanted,
        *,
        t: float | None = None,
        step: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        method: str | None = None,
    ) -> Weights:
        """One average, in memory.

        Arguments:
            target: a sigma_rel in (0, 0.2887), a target, or an object with `density` and `tail`.
            t, step: the time of the average; by default that of the newest snapshot.
            dtype: of the averaged tensors; by default each parameter's own.
            device: where the sums are made and the tensors are.
            method: the solver, "minvar" or "paper".

        Raises:
            InvalidValueError, NonFiniteError: an argument, or a value of the result, cannot be used.
        """
        plan = functools.partial(self.plan, target, t=t, step=step, method=method, dtype=dtype)
        return with_consistent_plan(plan, functools.partial(make_weights, device=device))

    def write(
        self,
        targets: Wanted | Sequence[Wanted],
        out: str | Path | None,
        *,
        t: float | None = None,
        step: int | None = None,
        method: str | None = None,
        max_error: float | None = None,
        dtype: torch.dtype | str | None = None,
        layout: str | None = None,
        max_shard_size: str = "5GB",
        device: str = "auto",
        accumulate: torch.dtype | str | None = None,
        overwrite: bool = False,
        skip_existing: bool = False,
        dry_run: bool = False,
        shard: str | None = None,
        finish: bool = False,
        distributed: bool = False,
        progress: ProgressBar = no_bar,
    ) -> SynthesisReport | None:
        """Write averages to files, as `ema synthesize` does. Each appears complete or not at all.

        Arguments:
            targets, t, step, method, max_error, dtype: as in `plan_synthesis`.
            out: a file, a folder, or a name with `{sigma_rel}` or `{target}` in it; None for a dry run without.
            layout: "safetensors", "sharded" or "pt"; by default from the output's name.
            max_shard_size: of the sharded layout.
            device: where the sums are made: "auto", "cpu", "cuda", ...
            accumulate: dtype of the sums, as in `plan_synthesis`.
            overwrite: replace outputs that are there.
            skip_existing: leave outputs of the same plan as they are.
            dry_run: plan only.
            shard: "K/N": make part K of N, a shard in the folder `out`.
            finish: verify the parts that are there, and write the index.
            distributed: this is one of the processes of a torchrun job, all of which make this call.
            progress: opens a progress bar.

        Returns:
            What was made; None in every process of a torchrun job but the first.

        Raises:
            InvalidValueError, InexactError, OutputExistsError, WriteError, NonFiniteError, NotReadyError, RankError.
        """
        from posthoc_cli.export.job import Synthesis

        return Synthesis(
            self.directory, as_targets(targets), None if out is None else str(out), t, step, method, max_error, dtype,
            layout, max_shard_size, device, accumulate, overwrite, skip_existing, dry_run, shard, finish, distributed,
            progress,
        ).run()  # fmt: skip

    def write_groups(
        self,
        groups: Sequence[Mapping[str, float]],
        paths: Sequence[Path],
        *,
        t: float | None = None,
        step: int | None = None,
        method: str | None = None,
        max_error: float | None = None,
        dtype: torch.dtype | str | None = None,
        layout: str | None = None,
        overwrite: bool = False,
    ) -> list[float | None]:
        """Write outputs whose tensors have averages of different lengths, all in one pass.

        Arguments:
            groups: for each output sigma_rel by glob on tensors' names, such as `{"unet.up.*": 0.12, "*": 0.08}`. The
                first glob that matches a name counts. All outputs have the same globs.
            paths: of the outputs.
            t, step, method, max_error, dtype, layout, overwrite: as in `write`.

        Returns:
            The predicted error of each output: the largest of its groups; None if one is not known.

        Raises:
            InvalidValueError: also a tensor that no glob matches, or a glob without a tensor.
            InexactError, OutputExistsError, WriteError, NonFiniteError.
        """
        from posthoc_cli.export.groups import write_groups
        from posthoc_cli.synthesis.engine import Options

        plan = functools.partial(self.plan, t=t, step=step, method=method, max_error=max_error, dtype=dtype)
        return write_groups(plan, groups, paths, Options(layout=layout, overwrite=overwrite))

    # --- errors

    def candidate(self, t: float | None = None) -> Candidate:
        """The snapshots as `error_curve` and `profile_fit` take them, beside those of schedules.

        Only those since the model's tensors last changed. If there are more than a solve can take, those that a
        synthesis at `t` uses. Reads a sample of the tensors where headers have no measurements.
        """
        sources = of_newest_segment(disk_sources(self.directory))
        infos = [source.info for source in sources]
        unit = infos[0].t_unit
        usable, later = chosen_up_to(sources, Candidate("", [info.profile.pure for info in infos]).time(t))
        last, known = usable[-1].info.t, [*usable, *later]
        count = sum(info.t <= last for info in infos)
        which = f"{len(usable):,} of {count:,}" if len(usable) < count else f"{count:,}"
        label = f"{self.directory}: {which} snapshot{'s' * (count != 1)} up to {last:,.12g} {unit}"
        profiles, first = [source.info.profile.pure for source in known], min(info.t_first for info in infos)
        return Candidate.of_run(label, profiles, source_prior(known), unit, run_clock(infos), first)

    def error_curve(
        self,
        sigma_range: tuple[float, float] = (0.01, 0.2886),
        *,
        t: float | None = None,
        method: str | None = None,
        others: Sequence[Target] = (),
    ) -> ErrorCurve:
        """Reconstruction error against sigma_rel; arguments as in the function of this name."""
        return error_curve(self.candidate(t), sigma_range, t=t, method=method, others=others)

    def plot_errors(
        self,
        sigma_range: tuple[float, float] = (0.01, 0.2886),
        *,
        t: float | None = None,
        method: str | None = None,
        draw: Wanted | Sequence[Wanted] = (),
    ) -> Figure:
        """A matplotlib figure of the error curve; below it the targets in `draw` over training time."""
        from posthoc_cli import plots

        candidate, targets = self.candidate(t), as_targets(draw)
        others = [target for target in targets if target.sigma_rel is None]
        curve = error_curve(candidate, sigma_range, t=t, method=method, others=others)
        fits = [profile_fit(candidate, target, t, method=method) for target in targets]
        return plots.error_figure([curve], fits, method == "paper")

    def likeness(self, steps: int) -> Likeness:
        """How the network moved, and how exactly averages were stored, as a forecast for a run of so many steps."""
        return likeness(self.snapshots, steps)

    # --- care

    def check(self, deep: bool = False, progress: ProgressBar = no_bar) -> Verification:
        """Verify every byte, and compare the snapshots with each other; see `check_path`."""
        return check_path(self.directory, deep, progress)

    def prune(
        self,
        *,
        keep: int | None = None,
        max_bytes: int | None = None,
        max_error: float | None = None,
        sigma_range: tuple[float, float] = USEFUL_RANGE,
        dry_run: bool = False,
        agree: Callable[[pruning.Pruning], bool] = lambda _: True,
        progress: ProgressBar = no_bar,
    ) -> pruning.Pruning:
        """Delete the snapshots that are missed least. Arguments and errors as in `plan_pruning`, and:

        Arguments:
            dry_run: delete nothing.
            agree: asked with the plan before anything is deleted, while the directory is not locked.
            progress: opens a progress bar.

        Raises:
            LockedError: a tracker is writing to the directory.
            MismatchError: the directory has changed meanwhile; nothing was deleted.
        """
        planned = pruning.plan_pruning(self.snapshots, keep, max_bytes, max_error, sigma_range)
        if dry_run or not planned.gone or not agree(planned):
            return planned
        with progress("verifying what stays", planned.read_bytes) as advance:
            return pruning.prune(self.directory, planned, advance)


def check_path(path: Path, deep: bool = False, progress: ProgressBar = no_bar) -> Verification:
    """Verify every byte of a directory or of a file, as `ema verify` does.

    Arguments:
        path: snapshots, outputs, states, parts or shards; or one such file.
        deep: also compare the values of snapshots with what was measured when they were written.
        progress: opens a progress bar.

    Raises:
        DirectoryError: there is nothing to verify.
    """
    contents = list_contents(path)
    with progress("verifying", contents.nbytes) as advance:
        found = verify(contents, advance)
    if not deep:
        return found
    with progress("measuring", deep_bytes(found.snapshots)) as advance:
        return verify_measurements(found, advance)


def as_targets(wanted: Wanted | Sequence[Wanted]) -> tuple[Target, ...]:
    """Targets from one or several that a user names.

    Raises:
        InvalidValueError: one cannot be a target.
    """
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return tuple(map(as_target, wanted))
    return (as_target(wanted),)


def _profiles(snapshots: Sequence[Snapshot]) -> list[float]:
    return sorted({snapshot.info.sigma_rel for snapshot in snapshots})
