"""Small files of every kind, each with what is made of it, and the trying of harm to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from factories import split_snapshot, write_snapshot

from posthoc_cli import PostHocEMA, disk_sources
from posthoc_cli.errors import FileFormatError, PostHocError
from posthoc_cli.export.convert import export_file
from posthoc_cli.export.layouts import OutputOptions
from posthoc_cli.export.writing import write_synthesis
from posthoc_cli.reconstruction import Distance, Measurements
from posthoc_cli.snapshots.check import verify
from posthoc_cli.snapshots.headers import decode_snapshot, file_kind
from posthoc_cli.snapshots.outputs import INDEX_NAME, decode_index, decode_output
from posthoc_cli.snapshots.reading import open_file
from posthoc_cli.snapshots.states import decode_state
from posthoc_cli.synthesis.plan import plan_synthesis
from posthoc_cli.tracker.state import open_state
from torture.tally import Tally

RUN_ID = "ab12" * 8
VALUES = {"a": torch.tensor([1.0, -2.5]), "b": torch.tensor([7], dtype=torch.int16)}


Content = dict[str, object]
"""What a file holds: the bytes of each tensor by name, and what the file says about itself under ""."""


def examine(path: Path) -> Content:
    """Verify a snapshot, an output, a state, or the shards beside an index as `ema verify` does; returns the content.

    Raises:
        PostHocError: naming the file.
    """
    for report in verify(path).files:
        if not report.is_fine:
            raise FileFormatError(report.path, report.detail)
    if path.name != INDEX_NAME:
        return _content(path)
    content: Content = {}
    for shard in decode_index(path).shards:
        content |= _content(path.parent / shard)
    return content


def _content(path: Path) -> Content:
    decoders = {"snapshot": decode_snapshot, "output": decode_output, "state": decode_state}
    with open_file(path) as file:
        kind = file_kind(file.header)
        if kind not in decoders:
            raise FileFormatError(path, f"its ema.format is {str(kind)[:40]!r}")
        said = decoders[kind](path, file.header)
        return {"": said} | {name: file.read(name).tobytes() for name in file.header.tensors}


REFUSED = object()


@dataclass(frozen=True)
class Victim:
    """A file that will be harmed, and what is made of it."""

    kind: str
    path: Path
    use: Callable[[], object]
    """Makes something of it; returns what came out."""
    out: Path
    """Where that goes, if anywhere."""
    named: str
    """What an error must name: the file, or the folder of an index and its shards."""
    is_index: bool = False
    """Some harm changes nothing: there is no checksum in an index of the Hugging Face libraries."""

    def tried(self, tally: Tally, harm: str, intact: tuple[object, object]) -> None:
        """Count one harm, which is in the file now: it must be found, or, in an index, change nothing."""
        tally.tried += 1
        for how, act, before in (("examined", lambda: examine(self.path), intact[0]), ("used", self.use, intact[1])):
            what = f"{self.kind}, {harm}, {how}"
            found = self.attempt(tally, what, act, self.named)
            if found is not REFUSED and not (self.is_index and found == before):
                tally.missed.append(f"{what}: not found")

    def attempt(self, tally: Tally, what: str, act: Callable[[], object], named: str) -> object:
        """What comes out; REFUSED where that is an error: of this package, naming what it must, without an output."""
        try:
            return act()
        except PostHocError as error:
            text = str(error)
            if named not in text or not text.replace("'", "").isprintable() or len(text) > 2_000:
                tally.missed.append(f"{what}: {text[:300]!r} does not name {named}"[:4000])
            if self.out.exists():
                tally.lost.append(f"{what}: an output was left"[:4000])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is no error of the package
            tally.missed.append(f"{what}: {type(error).__name__}: {str(error)[:300]}"[:4000])
        finally:
            self.out.unlink(missing_ok=True)
        return REFUSED

    def intact(self) -> tuple[object, object]:
        """What is seen of the file, and made of it, without harm."""
        seen = examine(self.path), self.use()
        self.out.unlink(missing_ok=True)
        return seen


def all_victims(folder: Path) -> Iterator[Victim]:
    """One of each kind."""
    for make in (small_snapshot, small_part, small_output, small_state, small_index, small_shard):
        (folder / make.__name__).mkdir()
        yield make(folder / make.__name__)


Harms = Callable[[Victim, bytes], Iterable[tuple[str, Callable[[], object]]]]
"""What can be done to a victim of this content: in words, and the doing."""


def harm_all(victims: Iterable[Victim], harms: Harms, share: float, seed: int) -> Tally:
    """Do a share of all harms to each victim, one at a time; at least one."""
    tally, chance = Tally(), random.Random(seed)
    for victim in victims:
        intact, data = victim.intact(), victim.path.read_bytes()
        everything = list(harms(victim, data))
        for what, harm in chance.sample(everything, max(1, round(share * len(everything)))):
            harm()
            victim.tried(tally, what, intact)
            victim.path.write_bytes(data)
        if victim.intact() != intact:
            tally.lost.append(f"{victim.kind}: is not what it was before")
    return tally


def small_snapshot(folder: Path, values: dict[str, torch.Tensor] | None = None) -> Victim:
    """A snapshot that a synthesis reads."""
    measured = Measurements(7.25, 1e-7, (Distance(5.0, 0.05, 0.25, 1e-8),))
    path = write_snapshot(
        folder / "run", 10, 0.05, RUN_ID, values or VALUES, sigma_rels=(0.05, 0.28), aliases={"tied": "a"},
        left_out=("frozen",), measurements=measured, clock=((10, 10.0),),
    )  # fmt: skip
    out = folder / "out.safetensors"
    return Victim("snapshot", path, lambda: synthesize(folder / "run", out), out, str(path))


def small_part(folder: Path) -> Victim:
    """The second of two parts of a snapshot that a synthesis reads."""
    whole = small_snapshot(folder, {"a": torch.tensor([[1.0], [-2.5]]), "b": VALUES["b"]})
    path = split_snapshot(whole.path, 2) / "part-00002-of-00002.safetensors"
    return Victim("part", path, whole.use, whole.out, path.parent.name)


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
    """The exact state beside the snapshots, which a tracker goes on from."""
    path, model = folder / "run/state.safetensors", Tiny()
    with PostHocEMA.from_model(
        model, folder / "run", update_every=1, checkpoint_every=1, max_checkpoints=None, keep_state=True
    ) as tracker:
        tracker.update_(model)

    def use() -> object:
        with open_state(path) as state:
            tensors = {kind: {key: dict(own) for key, own in state[kind].items()} for kind in ("high", "low")}
            return repr(state | tensors | {kind: dict(state[kind]) for kind in ("mean", "copies")})

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
    write_synthesis(plan_synthesis(disk_sources(run), [0.05]), [out], OutputOptions(overwrite=True))
    return examine(out)
