"""The averages that a sweep measures, as files: made in one pass, and one that is there already used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        options: method, dtype, layout, like and component, as in `Run.write`.
        progress: opens a progress bar.
    """

    run: Run
    plan: Plan
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: ProgressBar = no_bar

    @property
    def nbytes(self) -> int:
        """Of one average, on the disk."""
        if self._like is None:
            return self.plan.nbytes
        return sum(path.stat().st_size for path in self._like.rglob("*") if path.is_file())

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two averages of one target the same, beside their time."""
        plan = self.plan
        settings = {"run": plan.newest.info.run_id, "method": plan.method, "dtype": plan.dtype, "layout": self._layout}
        if self._like is None:
            return settings
        return settings | {"like": str(self._like.resolve()), "component": self.options["component"]}

    def output(self, folder: Path, name: str) -> Path:
        """The path of an average with this name."""
        return folder / f"{name}{'' if self._like is not None else suffix_of(self._layout)}"

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
            how = {name: self.options.get(name) for name in ("method", "dtype")}
            plans = [self.run.plan(there, t=t, **how)] if there else []
            plans += [self.write(missing, pattern, t).plan] if missing else []
            for plan in plans:
                for index, target in enumerate(plan.targets):
                    made[target, t] = paths[target], plan.predicted_error(index)
        return [made[one] for one in wanted]

    def write(self, targets: Sequence[Target], out: str, t: float, overwrite: bool = False) -> Any:
        """As `Run.write`."""
        return self.run.write(targets, out, t=t, overwrite=overwrite, progress=self.progress, **self.options)

    @property
    def _like(self) -> Path | None:
        like: Path | None = self.options.get("like")
        return like

    @property
    def _layout(self) -> str | None:
        layout: str | None = self.options.get("layout")
        return layout

    def _exists(self, path: Path) -> bool:
        return path.exists() if self._like is not None else output_exists(path, layout_of(path, self._layout))

    def _digest(self, *more: object) -> str:
        return hashlib.sha256(json.dumps([self.settings, *more]).encode()).hexdigest()[:8]
