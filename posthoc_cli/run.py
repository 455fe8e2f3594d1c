"""`Run`: a run, finished or still training, read from its directory of snapshots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli import files
from posthoc_cli.checkpoints.manifest import Manifest, read_manifest
from posthoc_cli.checkpoints.places import Place, check_foreign, holds_checkpoints
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    PostHocError,
)
from posthoc_cli.opening import open_sources
from posthoc_cli.planning import USEFUL_RANGE, CurveRequest, ErrorCurve
from posthoc_cli.profiles import Point
from posthoc_cli.request import OutputRequest, Request, SweepRequest, takes
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.snapshots.directory import (
    is_import,
    is_snapshot_name,
    list_directory,
    read_directory,
)
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.snapshots.outputs import describe
from posthoc_cli.snapshots.prune import Pruning, plan_pruning
from posthoc_cli.snapshots.prune import prune as prune_directory
from posthoc_cli.snapshots.snapshot import Snapshot, file_bytes
from posthoc_cli.snapshots.sources import Sources, announce, count_sources, use
from posthoc_cli.snapshots.verify import DAMAGED, UNCHANGED, FileReport, Verification, verify
from posthoc_cli.synthesis.curve import run_curve
from posthoc_cli.synthesis.plan import Plan, announce_plan, plan_synthesis
from posthoc_cli.synthesis.weights import Weights, make_weights

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.audit import Audit
    from posthoc_cli.export.writing import SynthesisReport
    from posthoc_cli.sweep import SweepReport


class Run:
    """The snapshots of one run, or its checkpoints. Headers are read by the first call, and by a
    later one if names, sizes or times of files have changed; only averages read tensors.

    Arguments:
        directory: the directory of a tracker's snapshots; or a directory, a file or a glob of
            checkpoints or averages of other programs; or the run that `import_checkpoints` made of
            them. It is looked at by each call, not before: a training may begin later.

    Errors of all methods and properties that read snapshots:
        DirectoryError: the directory does not exist, or holds no snapshot.
        FileFormatError, MismatchError: a snapshot is damaged, or does not belong to the run.
        InvalidValueError: the checkpoints lack some information, and need an import.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = files.check_path("directory", directory)
        self._sources: Sources | None = None  # as they were last read

    def __repr__(self) -> str:
        if files.is_url(self.directory):  # without a request
            return f"Run({str(self.directory)!r})"
        try:
            sources = self.sources
        except PostHocError as error:
            return f"Run({str(self.directory)!r}: {error.reason})"
        what = count_sources(sources)
        if sources.widths:
            what += f" of {', '.join(f'{width:g}' for width in sources.widths)}"
        time = f"{sources.t:,.12g} {sources.t_unit}"
        return f"Run({str(self.directory)!r}: {what} up to {time})"

    # --- contents

    @property
    def sources(self) -> Sources:
        """The snapshots or checkpoints to make averages from, by time."""
        if self._sources is None or not self._sources.look.is_current():
            self._sources = open_sources(self.directory)
        return self._sources

    @property
    def snapshots(self) -> list[Snapshot]:
        """The headers of all snapshots of a tracker, by time, then sigma_rel."""
        return read_directory(self.directory)

    @property
    def profiles(self) -> list[float]:
        """The sigma_rel of each tracked profile."""
        return [*self.sources.widths]

    @property
    def t(self) -> float:
        """Training time of the newest snapshot."""
        return self.sources.t

    @property
    def step(self) -> int:
        """Calls of `update_` up to the newest snapshot."""
        return self.sources.step

    @property
    def tensors(self) -> dict[str, Entry]:
        """Dtype (its safetensors name) and shape of every tensor of an average, under all its
        names."""
        return self.sources.tensors

    def info(self) -> dict[str, Any]:
        """Return a description of the directory and its problems, from headers."""
        directory = self.directory
        is_own = directory.is_dir() and any(map(is_snapshot_name, list_directory(directory)))
        if is_own or not holds_checkpoints(directory):
            try:
                return describe(directory)
            except DirectoryError:
                check_foreign(Place(directory))
                raise
        from posthoc_cli.checkpoints.describe import describe_checkpoints

        return describe_checkpoints(directory)

    # --- averages

    @takes(Request)
    def plan(self, request: Request) -> Plan:
        """Compute the coefficients and errors of averages; see `plan_synthesis`."""
        return plan_synthesis(self.sources, request)

    @takes(Request)
    def average(self, request: Request) -> Weights:
        """Make an average in memory, on the request's device ("auto": the CPU).

        Raises the errors of `plan_synthesis`, and a NonFiniteError for a result that is not finite.
        """
        if len(request.wished) > 1:
            reason = "is several; `write` makes more than one"
            raise InvalidValueError("target", reason, value=request.targets)
        device = "cpu" if request.device == "auto" else request.device
        sources = self.sources
        announce(sources)

        def average(sources: Sources) -> Weights:
            plan = plan_synthesis(sources, request)
            announce_plan(plan)
            return make_weights(plan, device)

        return use(sources, average)

    @takes(OutputRequest)
    def write(self, request: OutputRequest) -> SynthesisReport | None:
        """Write averages to files, as `ema synthesize` does. Each file appears complete or not at
        all.

        Returns the report; None in every rank of a torchrun job but the first.
        """
        from posthoc_cli.export.writing import write_averages

        return write_averages(lambda: self.sources, request)

    @takes(SweepRequest)
    def sweep(self, request: SweepRequest) -> SweepReport:
        """Find the best length of an average by a metric, as `ema sweep` does. A notebook shows the
        report with its curve.

        Raises the errors of `Sweep.run`, and what a function raises.
        """
        from posthoc_cli.sweep import Sweep

        report = Sweep(self.sources, request).run()
        if request.folder is None:
            return report
        from posthoc_cli.report.page import write_page

        return write_page(report, request.folder)

    # --- errors

    @takes(CurveRequest)
    def error_curve(self, request: CurveRequest) -> ErrorCurve:
        """Compute the reconstruction error against sigma_rel.

        If the run has more snapshots than a solve can take, the curve is computed from the ones
        that a synthesis at `t` uses. A sample of the tensors is read if headers have no
        measurements.
        """
        return run_curve(self.sources, request)

    # --- maintenance

    def check(self, progress: ProgressBar = no_bar) -> Verification:
        """Verify every byte, and compare the snapshots with each other; outputs and parts are
        verified, too.

        Raises:
            DirectoryError: the directory holds no files with checksums.
        """
        path = self.directory
        if is_import(path):
            return _check_import(read_manifest(path))
        try:
            return verify(path, progress)
        except DirectoryError as error:
            if not holds_checkpoints(path):
                raise
            raise DirectoryError(
                path, "holds checkpoints of other programs, which have no checksums"
            ) from error

    def audit(
        self,
        claimed: float | None = None,
        *,
        step_from: str | None = None,
        steps_per_epoch: int | None = None,
        first_epoch: int | None = None,
    ) -> list[Audit]:
        """Find the decay, or the sigma_rel, that the averages really have; see `checkpoints.audit`.

        `claimed` is the decay that they should have, in (0, 1); by default the decay in the files
        or of an import. The others are settings of an import: the files' numbers may need
        one. Returns one audit for each average; `is_bad` if it contradicts the claim. An
        InvalidValueError if less than two times have both an average and the weights.
        """
        from posthoc_cli.checkpoints.audit import audit_sources

        settings = {
            "step_from": step_from,
            "steps_per_epoch": steps_per_epoch,
            "first_epoch": first_epoch,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        sources = open_sources(self.directory, given, settle=False)
        if all(isinstance(source.profile, Point) for source in sources):
            sources = open_sources(self.directory, given)  # asks which of two sets is an average
        announce(sources)
        return audit_sources(sources, claimed)

    def prune(
        self,
        *,
        keep: int,
        sigma_range: tuple[float, float] = USEFUL_RANGE,
        dry_run: bool = False,
        agree: Callable[[Pruning], bool] = lambda _: True,
        progress: ProgressBar = no_bar,
    ) -> Pruning:
        """Delete the snapshots that matter least. Arguments and errors are as in `plan_pruning`,
        and:

        Arguments:
            dry_run: delete nothing.
            agree: called with the plan before anything is deleted, without the lock; nothing is
                deleted if it is False.
            progress: opens a progress bar.

        Raises:
            InvalidValueError: the directory is a URL, and this is not a dry run.
            LockedError: a tracker is writing to the directory.
            MismatchError: the directory has changed in the meantime; nothing was deleted.
        """
        if not dry_run:
            files.local_path("directory", self.directory)
        if is_import(self.directory):
            raise DirectoryError(
                self.directory, "refers to files of other programs, which are never deleted"
            )
        planned = plan_pruning(self.snapshots, keep, sigma_range)
        if dry_run or not planned.to_delete or not agree(planned):
            return planned
        with progress("verifying what stays", file_bytes(planned.kept)) as advance:
            return prune_directory(self.directory, planned, advance)


def _check_import(manifest: Manifest) -> Verification:
    """Check that the files that an import refers to are unchanged since the import."""
    reports = []
    for path in manifest.files:
        report = FileReport(path, "checkpoint", UNCHANGED)
        try:
            manifest.check_file(path)
        except FileFormatError as error:
            report = replace(report, state=DAMAGED, detail=f"{error.reason}; {error.hint}")
        reports.append(report)
    return Verification(manifest.folder, False, tuple(reports))
