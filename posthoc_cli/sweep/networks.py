"""The averages that a sweep measures, as files: made in one pass, and one that is there already used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.export.layouts import layout_of, output_exists, output_paths, suffix_of
from posthoc_cli.run import Run
from posthoc_cli.sweep.axes import Axis, good_range
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import SigmaRel, Target


@dataclass(frozen=True, eq=False)
class Network:
    """A network, and the length of its average.

    Attributes:
        run: its snapshots.
        axis: the length, which is searched or given.
        plan: of any target; says which run it is, at which time, and how large an average.
        options: dtype, layout, like and component, as in `Run.write`.
        name: "guide" for a second network.
    """

    run: Run
    axis: Axis
    plan: Plan
    options: dict[str, Any]
    name: str = ""

    @classmethod
    def of(cls, run: Run, axis: Axis | None, t: float | None, options: dict[str, Any], name: str = "") -> Network:
        """By default with all lengths whose predicted error is good, at the time of the newest snapshot."""
        target = SigmaRel(0.2) if axis is None else axis.target(axis.high)
        planned = run.write(target, None, t=t, dry_run=True, **options)
        assert planned is not None
        return cls(run, axis or good_range(run, planned.plan.t), planned.plan, options, name)

    @property
    def nbytes(self) -> int:
        """Of one average, on the disk."""
        if self._like is None:
            return self.plan.nbytes
        return sum(path.stat().st_size for path in self._like.rglob("*") if path.is_file())

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two averages of one target the same."""
        plan, layout = self.plan, self.options.get("layout")
        same = {"run": plan.newest.info.run_id, "t": plan.t, "method": plan.method, "dtype": plan.dtype}
        like = {"like": str(self._like.resolve()), "component": self.options.get("component")} if self._like else {}
        return same | {"layout": layout} | like

    @property
    def has_raw(self) -> bool:
        """Whether the weights themselves are there, of the averages' time."""
        return self.run.has_raw(self.plan.t)

    def title(self, value: float) -> str:
        """Of a length, for people."""
        return f"{self.name} {self.axis.title(value)}".lstrip()

    def make(self, folder: Path, values: Sequence[float]) -> list[tuple[dict[str, Any], float | None]]:
        """Write averages into a folder, in one pass: what placeholders become, and the predicted error of each.

        Raises:
            InvalidValueError, NonFiniteError, WriteError: as `Run.write`.
        """
        wanted = {value: self.axis.target(value) for value in values}
        digest = hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:8]
        pattern = str(folder / f"{{target}}-{digest}{self._suffix}")
        paths = dict(zip(wanted, output_paths([*wanted.values()], pattern, None)[0], strict=True))
        there = [value for value, path in paths.items() if self._exists(path)]
        missing = [value for value in wanted if value not in there]
        how: dict[str, Any] = {"t": self.plan.t, "dtype": self.options.get("dtype")}
        plans = [self.run.plan([wanted[value] for value in there], **how)] if there else []
        plans += [self._write([wanted[value] for value in missing], pattern)] if missing else []
        known = [plan.predicted_error(index) for plan in plans for index in range(len(plan.targets))]
        errors = dict(zip([*there, *missing], known, strict=True))
        names = [f"{one}:{self.name}".rstrip(":") for one in ("weights", "sigma_rel")]
        return [(dict(zip(names, (paths[value], value), strict=True)), errors[value]) for value in values]

    def write(self, folder: Path, name: str, target: Target) -> Path:
        """Write one average under a name, in place of what is there."""
        path = folder / f"{name}{self._suffix}"
        self._write([target], str(path), overwrite=self._like is None)
        return path

    @property
    def _like(self) -> Path | None:
        return self.options.get("like")

    @property
    def _suffix(self) -> str:
        return "" if self._like is not None else suffix_of(self.options.get("layout"))

    def _exists(self, path: Path) -> bool:
        is_folder = self._like is not None
        return path.exists() if is_folder else output_exists(path, layout_of(path, self.options.get("layout")))

    def _write(self, targets: Sequence[Target], out: str, overwrite: bool = False) -> Plan:
        how = self.options | {"t": self.plan.t, "overwrite": overwrite}
        made = self.run.write(targets, out, **how)
        assert made is not None
        return made.plan
