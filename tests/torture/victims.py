"""Small files of every kind, each with what is made of it: what harm is done to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from factories import write_snapshot

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import PostHocError
from posthoc_cli.export.convert import export_file
from posthoc_cli.export.outputs import write_synthesis
from posthoc_cli.reconstruction import Distance, Measurements
from posthoc_cli.snapshots.models import INDEX_NAME
from posthoc_cli.synthesis.engine import Options
from posthoc_cli.synthesis.plan import plan_synthesis
from posthoc_cli.synthesis.sources import disk_sources
from torture.examining import examine
from torture.tally import Tally

RUN_ID = "ab12" * 8
VALUES = {"a": torch.tensor([1.0, -2.5]), "b": torch.tensor([7], dtype=torch.int16)}


@dataclass(frozen=True)
class Victim:
    """A file that will be harmed.

    Attributes:
        kind: what it is.
        path: the file.
        use: makes something of it; returns what came out.
        out: where that goes, if anywhere.
        named: what an error must name: the file, or the folder of an index and its shards.
        is_index: some harm changes nothing: there is no checksum in an index of the Hugging Face libraries.
    """

    kind: str
    path: Path
    use: Callable[[], object]
    out: Path
    named: str
    is_index: bool = False

    def tried(self, tally: Tally, harm: str, intact: tuple[object, object]) -> None:
        """Count one harm, which is in the file now: it must be found, or, in an index, change nothing."""
        tally.tried += 1
        for how, act, before in (("examined", lambda: examine(self.path), intact[0]), ("used", self.use, intact[1])):
            what = f"{self.kind}, {harm}, {how}"
            try:
                found = act()
            except PostHocError as error:
                if self.named not in str(error) or not str(error).replace("'", "").isprintable():
                    tally.missed.append(f"{what}: {str(error)[:300]!r} does not name {self.named}")
                if self.out.exists():
                    tally.lost.append(f"{what}: an output was left")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is no error of the package
                tally.missed.append(f"{what}: {type(error).__name__}: {error}"[:300])
            else:
                if not (self.is_index and found == before):
                    tally.missed.append(f"{what}: not found")
            with suppress(FileNotFoundError):
                self.out.unlink()

    def intact(self) -> tuple[object, object]:
        """What is seen of the file, and made of it, without harm."""
        seen = examine(self.path), self.use()
        with suppress(FileNotFoundError):
            self.out.unlink()
        return seen


def small_snapshot(folder: Path, values: dict[str, torch.Tensor] | None = None) -> Victim:
    """A snapshot that a synthesis reads."""
    measured = Measurements(7.25, 1e-7, (Distance(5.0, 0.05, 0.25, 1e-8),))
    path = write_snapshot(
        folder / "run", 10, 0.05, RUN_ID, values or VALUES, sigma_rels=(0.05, 0.28), aliases={"tied": "a"},
        left_out=("frozen",), measurements=measured, clock=((10, 10.0),), segment=1,
    )  # fmt: skip
    out = folder / "out.safetensors"
    return Victim("snapshot", path, lambda: synthesize(folder / "run", out), out, str(path))


def small_output(folder: Path) -> Victim:
    """An output of a synthesis, which an export reads."""
    path, out = folder / "made.safetensors", folder / "out.safetensors"
    synthesize(small_snapshot(folder / "source").path.parent, path)

    def use() -> object:
        export_file(path, out)
        return examine(out)

    return Victim("output", path, use, out, str(path))


class Tiny(torch.nn.Module):
    """Two parameters and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.5, -1.0]))
        self.register_buffer("count", torch.tensor(3, dtype=torch.int16))


def small_state(folder: Path) -> Victim:
    """A tracker's state, which the tracker goes on from; later snapshots lie in its directory."""
    path, model = folder / "state.safetensors", Tiny()
    tracker = PostHocEMA.from_model(model, folder / "run", update_every=1, checkpoint_every=1, max_checkpoints=None)
    tracker.update_(model)
    tracker.save_state(path)

    def go_on() -> str:
        tracker.update_(model)
        tracker.flush()
        return seen()

    def seen() -> str:
        return repr((tracker.state_dict(), sorted((folder / "run").glob("*.safetensors"))))

    def use() -> object:
        try:
            tracker.load_state(path)
        except PostHocError:
            assert seen() == later, "a state that was refused has changed the tracker or its directory"
            raise
        loaded = seen()
        assert go_on().count("0000000000000002-") == 2
        return loaded

    later = go_on()
    return Victim("state", path, use, folder / "no-output", str(path))


def small_index(folder: Path) -> Victim:
    """The index of an output in two shards, which an export reads."""
    output, shards = small_output(folder), folder / "shards"
    export_file(output.path, shards, max_shard_size="10")

    def use() -> object:
        export_file(shards, output.out)
        return examine(output.out)

    return Victim("index", shards / INDEX_NAME, use, output.out, str(shards), is_index=True)


def small_shard(folder: Path) -> Victim:
    """A shard of that output."""
    index = small_index(folder)
    path = index.path.with_name("model-00001-of-00002.safetensors")
    return Victim("shard", path, index.use, index.out, str(path))


def synthesize(run: Path, out: Path) -> object:
    """Make the tracked average again; returns what is in the output."""
    write_synthesis(plan_synthesis(disk_sources(run), [0.05]), [out], Options(overwrite=True))
    return examine(out)
