"""The averages that a sweep measures, as files: made in one pass, and one that is there already used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.export.layouts import layout_of, output_exists, output_paths, suffix_of
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.run import Run
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Target

Made = tuple[Path, float | None]
"""An average as a file or folder, and its predicted error."""


@dataclass(frozen=True)
class Candidates:
    """Makes averages of a run.

    Attributes:
        run: the snapshots.
        plan: of any target of theirs; says which run it is, and how large an average.
        method, dtype, layout, like, component, progress: as in `Run.write`.
    """

    run: Run
    plan: Plan
    method: str | None = None
    dtype: Any = None
    layout: str | None = None
    like: Path | None = None
    component: str | None = None
    progress: ProgressBar = no_bar

    @property
    def run_id(self) -> str:
        """Of the run."""
        return self.plan.newest.info.run_id

    @property
    def nbytes(self) -> int:
        """Of one average, on the disk."""
        if self.like is None:
            return self.plan.nbytes
        return sum(path.stat().st_size for path in self.like.rglob("*") if path.is_file())

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two averages of one target the same, beside their time."""
        folder = {} if self.like is None else {"like": str(self.like.resolve()), "component": self.component}
        return {
            "run": self.run_id, "method": self.plan.method, "dtype": self.plan.dtype, "layout": self.layout, **folder,
        }  # fmt: skip

    def output(self, folder: Path, name: str) -> Path:
        """The path of an average with this name."""
        return folder / f"{name}{'' if self.like is not None else suffix_of(self.layout)}"

    def make(self, folder: Path, wanted: Sequence[tuple[Target, float]]) -> list[Made]:
        """Write averages, each with its time, into a folder, in one pass for each time.

        Raises:
            InvalidValueError, NonFiniteError, WriteError: as `Run.write`.
        """
        made: dict[tuple[Target, float], Made] = {}
        for t in dict.fromkeys(t for _, t in wanted):
            targets = list(dict.fromkeys(target for target, at in wanted if at == t))
            pattern = str(self.output(folder, f"{{target}}-{self._digest(t)}"))
            paths = dict(zip(targets, output_paths(targets, pattern, None)[0], strict=True))
            there = [target for target in targets if self._exists(paths[target])]
            missing = [target for target in targets if target not in there]
            plans = [self.run.plan(there, t=t, method=self.method, dtype=self.dtype)] if there else []
            if missing:
                report = self.write(missing, pattern, t)
                plans.append(report.plan)
            for plan in plans:
                for index, target in enumerate(plan.targets):
                    made[target, t] = paths[target], plan.predicted_error(index)
        return [made[one] for one in wanted]

    def _exists(self, path: Path) -> bool:
        return path.exists() if self.like is not None else output_exists(path, layout_of(path, self.layout))

    def write(self, targets: Sequence[Target], out: str, t: float, overwrite: bool = False) -> Any:
        """As `Run.write`."""
        return self.run.write(
            targets, out, t=t, method=self.method, dtype=self.dtype, layout=self.layout, like=self.like,
            component=self.component, overwrite=overwrite, progress=self.progress,
        )  # fmt: skip

    def _digest(self, *more: object) -> str:
        return hashlib.sha256(json.dumps([self.settings, *more]).encode()).hexdigest()[:8]
