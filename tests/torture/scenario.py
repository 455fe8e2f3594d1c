"""A run as a user makes it: training with thinning and a resume, synthesis, export into shards, pruning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from posthoc_cli.errors import PostHocError
from posthoc_cli.snapshots.check import list_contents, verify, verify_measurements
from posthoc_cli.snapshots.models import INDEX_NAME
from torture.commands import run_ema
from torture.training import STATE, train, wrong_output, wrong_snapshots

STEPS = 10
STOPS = 7
"""The first training ends here, without a state of its last two steps."""
SAVES = 5


@dataclass
class Run:
    """The whole scenario in a folder.

    Attributes:
        note: told what is durable, and what is done.
        errors: what went wrong on the way, each a line.
    """

    root: Path
    note: Callable[..., None] = lambda *_: None
    make_room: Callable[[], None] = lambda: None
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory, self.shards = self.root / "run", self.root / "shards"
        self.outputs = [self.root / "out" / f"sigma_rel-{target}.safetensors" for target in (0.1, 0.2)]

    def do(self) -> None:
        """Do everything; what fails is done once more."""
        if not (self.directory / STATE).exists():
            self._twice(lambda: self._train(STOPS))
        self._twice(lambda: self._train(STEPS))
        out = ["--out", self.root / "out", "--force"]
        self._twice(lambda: self._ema("synthesize", self.directory, "--sigma-rel", "0.1,0.2", *out))
        self.note("output", *(path.relative_to(self.root).as_posix() for path in self.outputs))
        shards = ["--out", self.shards, "--max-shard-size", "40", "--force"]
        self._twice(lambda: self._ema("export", self.outputs[0], *shards))
        self.note("output", "shards")
        self._twice(lambda: self._ema("prune", self.directory, "--keep", 2, "--yes"))

    def _twice(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except (PostHocError, CommandError) as error:
            self.errors.append(str(error))
            self.make_room()
            stage()
        self.make_room()

    def _train(self, until: int) -> None:
        self.errors += train(self.directory, until, (SAVES,), self.note, checkpoint_every=1, max_checkpoints=3)

    def _ema(self, *arguments: object) -> None:
        result = run_ema(*arguments)
        if result.code:
            raise CommandError(result.err.strip() or f"exit code {result.code}")

    # --- what must be so

    def problems(self) -> list[str]:
        """What is wrong in the directory of snapshots."""
        if not any(path.suffix == ".safetensors" for path in self.directory.iterdir()):
            return []
        found = verify_measurements(verify(list_contents(self.directory)))
        broken = [f"{file.path.name}: {file.detail}" for file in found.files if not file.is_fine]
        return [*found.problems, *broken, *wrong_snapshots(self.directory)]

    def wrong_shards(self) -> list[str]:
        """What is wrong with the exported shards."""
        paths = sorted(self.shards.glob("model*.safetensors"))
        if len(paths) != 2 or not (self.shards / INDEX_NAME).exists():
            return [f"{self.shards.name}: holds {[path.name for path in paths]}"]
        return [line for path in paths for line in wrong_output(path)]


class CommandError(Exception):
    """A command that ended with an exit code above 0."""
