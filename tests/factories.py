"""What tests are made of: snapshot files, directories of one run, a small model with every kind of
tensor.

The averages here are NumPy float64 straight from the formulas, never this package's own.
"""

import json
from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from torch import nn

from posthoc_cli import PowerFunction
from posthoc_cli.dtypes import stored_name
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.boxes import Chunk
from posthoc_cli.snapshots.decoding import decode
from posthoc_cli.snapshots.directory import find_snapshots, snapshot_path
from posthoc_cli.snapshots.entry import Entry, tensor_bytes
from posthoc_cli.snapshots.output_info import OutputInfo, Used
from posthoc_cli.snapshots.sketch_text import decode_path, encode_path
from posthoc_cli.snapshots.snapshot import START, Snapshot, TrackingSchedule, decode_snapshot
from posthoc_cli.snapshots.source import TrackedTensor
from posthoc_cli.snapshots.tensorfile import read_file
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.tracker.tracked_averages import Standing

SIGMA_RELS = (0.05, 0.10, 0.15, 0.28)
"""What a run in a test tracks, unless it says otherwise."""

INDEX = "model.safetensors.index.json"

RUN_ID = "5eed" * 8
OTHER_RUN_ID = "0ddd" * 8


# --- the formulas, written a second time
# -----------------------------------------------------------


def exact_gamma(sigma_rel):
    """Return gamma of a power function: for x = gamma + 1 the largest root of (x + 1)**2 (x + 2) =
    x / sigma_rel**2."""
    linear = 5.0 - sigma_rel**-2
    roots = np.roots([1.0, 4.0, linear, 2.0])
    return float(max(roots.real)) - 1.0


def exact_weights(sigma_rel, times):
    """Return the discrete weights of updates at `times`, the last of which is the time of the
    average: [len(times)].

    (t_k/T)**(gamma+1) - (t_{k-1}/T)**(gamma+1), where t_0 = 0.
    """
    edges = np.append(0.0, times)
    passed = edges / edges[-1]
    until = passed ** (exact_gamma(sigma_rel) + 1)
    return np.diff(until)


def exact_average(values, sigma_rel, times):
    """Return the power-function average of `values` taken at `times`, at the last of these
    times."""
    shares = exact_weights(sigma_rel, times)
    stacked = np.array([np.asarray(value) for value in values], dtype=np.float64)
    return np.tensordot(shares, stacked, axes=1)


def relative_distance(found, exact):
    """Return the L2 distance of a vector from the exact one, relative to the norm of that."""
    apart = np.asarray(found, dtype=np.float64) - exact
    return float(np.linalg.norm(apart) / np.linalg.norm(exact))


def power_functions(times, sigma_rels=(0.05, 0.28)):
    """Return the profiles of the snapshots that a run has at these times, in the order of time."""
    profiles = []
    for t in np.atleast_1d(times).tolist():
        profiles += [PowerFunction.from_sigma_rel(sigma_rel, t) for sigma_rel in sigma_rels]
    return profiles


# --- snapshots
# -------------------------------------------------------------------------------------


def make_info(values, t=10.0, sigma_rel=0.05, run_id=RUN_ID, **overrides):
    """Describe a snapshot of `values`: floating-point tensors are averages in their dtype, others
    are copies.

    `overrides` are fields of Snapshot; `tensors` names those that are something else, such as {"w":
    "average F32"}.
    """
    tensors = {}
    for name, value in values.items():
        role = "average" if value.is_floating_point() else "copy"
        tensors[name] = TrackedTensor(role, stored_name(value.dtype))
    for name, text in overrides.pop("tensors", {}).items():
        role, dtype = text.split()
        tensors[name] = TrackedTensor(role, dtype)
    info = Snapshot(
        run_id=run_id,
        sigma_rel=sigma_rel,
        gamma=exact_gamma(sigma_rel),
        sigma_rels=tuple(sorted({*SIGMA_RELS, sigma_rel})),
        t=float(t),
        t_unit="steps",
        step=int(t),
        t_first=min(1.0, float(t)),
        max_interval=1.0,
        updates=max(int(t), 1),
        schedule=EVERY_STEP,
        tensors=tensors,
    )
    return replace(info, **overrides)


EVERY_STEP = TrackingSchedule(
    update_every=1,
    checkpoint_every=1,
    max_checkpoints=None,
    checkpoint_dtype=None,
)


def write_tensors(path, values, info, overwrite):
    entries = {}
    for name, value in values.items():
        entries[name] = Entry(stored_name(value.dtype), tuple(value.shape))
    for_dcp = info.for_dcp if isinstance(info, Snapshot) else {}
    with TensorFileWriter(path, entries, info.encode(), for_dcp, overwrite) as writer:
        for name, value in values.items():
            writer.write(name, [tensor_bytes(value)])
        writer.publish()


def write_snapshot(directory, t, sigma_rel, run_id, values, name=None, **overrides):
    """Write a snapshot file of `values` without conversion; return its path.

    `name` is the file's, in place of its usual one; `overrides` as in `make_info`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    info = make_info(values, t, sigma_rel, run_id, **overrides)
    path = snapshot_path(directory, info.t, info.sigma_rel)
    if name is not None:
        path = directory / name
    write_tensors(path, values, info, overwrite=False)
    return path


def split_snapshot(path, parts=3, grids=None):
    """Replace a snapshot by a folder of parts, as several processes write them; return the folder.

    A tensor is cut along its first dimension as `torch.chunk` does, or into a grid of `grids`; its
    chunks belong to the first parts, in order, without those that have no elements. The first part
    has all of the measurements.
    """
    info = read_snapshot(path)
    pieces = [{} for _ in range(parts)]
    chunks = [{} for _ in range(parts)]
    for name, value in load_file(path).items():
        grid = (grids or {}).get(name, (parts,))
        for number, (offset, piece) in enumerate(cut(value, grid)):
            pieces[number][name] = piece.contiguous()
            chunks[number][name] = Chunk(tuple(value.shape), offset)
    others = without_measurements(info)
    for number in range(parts):
        header = others if number else info
        part = part_of(header, chunks[number], (number + 1, parts))
        file = snapshot_path(path.parent, info.t, info.sigma_rel, part.part)
        file.parent.mkdir(exist_ok=True)
        write_tensors(file, pieces[number], part, overwrite=False)
    path.unlink()
    return file.parent


def part_of(info, chunks, part):
    """Return the header of a part, its number and the count, that holds these chunks."""
    _, count = part
    return replace(
        info,
        tensors={name: info.tensors[name] for name in chunks},
        aliases={alias: name for alias, name in info.aliases.items() if name in chunks},
        part=part,
        chunks=chunks,
        mesh={"shape": [count], "names": None},
    )


def without_measurements(info):
    """Return the header of a part that measured nothing, where others did."""
    if info.measurements:
        info = replace(info, measurements=Measurements(0.0, 0.0))
    if not info.sketch:
        return info
    path = decode_path(info.sketch)
    sketch = path.sketch
    still = replace(sketch, means=0 * sketch.means, spread=0 * sketch.spread)
    return replace(info, sketch=encode_path(path._replace(sketch=still)))


def cut(value, grid):
    """Return the cells of a grid that have elements, each with the position of its first
    element."""
    whole = ((0,) * value.dim(), value)
    cells = [whole]
    for axis, count in enumerate(grid[: value.dim()]):
        size = value.shape[axis]
        step = max(1, -(-size // count))
        smaller = []
        for offset, cell in cells:
            for begin in range(0, size, step):
                length = min(step, size - begin)
                place = (*offset[:axis], begin, *offset[axis + 1 :])
                smaller.append((place, cell.narrow(axis, begin, length)))
        cells = smaller
    filled = [(offset, cell) for offset, cell in cells if cell.numel()]
    return filled or [whole]


def rewrite_snapshot(path, change=lambda _: None, **fields):
    """Write a snapshot again, with correct checksums and other values or other `fields` of its
    Snapshot."""
    info = read_snapshot(path)
    values = load_file(path)
    change(values)
    write_tensors(path, values, replace(info, **fields), overwrite=True)  # type: ignore[arg-type]


def read_snapshot(path):
    return decode_snapshot(read_file(path))


def snapshots_in(run):
    """Return the snapshots of a run; none for a missing or empty directory."""
    return find_snapshots(run)


def sketch_of(source):
    """Return the sketch of the weights' path in a header."""
    return decode_path(source.sketch).sketch


def write_output(path, tensors, copies=()):
    """Write an output, as of a synthesis, of any values; `copies` names the tensors that are no
    averages."""
    info = OutputInfo(
        run_id=RUN_ID,
        profile="sigma_rel 0.1",
        sigma_rel=0.1,
        gamma=exact_gamma(0.1),
        t=10.0,
        t_unit="steps",
        method="paper",
        profile_error=1e-3,
        predicted_error=None,
        snapshots=(Used("x", 1.0),),
        copies=copies,
    )
    write_tensors(path, tensors, info, overwrite=True)
    return path


def read_output(path):
    return decode(read_file(path), "output", OutputInfo)


def write_run(
    directory,
    trajectory,
    snapshot_times,
    sigma_rels=(0.05, 0.28),
    dtype=torch.float32,
    run_id=RUN_ID,
):
    """Write the snapshots of a run with the weights of `trajectory` and one update at each of the
    steps 1, 2, ...

    Arguments:
        trajectory: the weights after each step, by name.
        snapshot_times: steps with snapshots, one for each of `sigma_rels`.
        dtype: what the averages are rounded to.

    Returns:
        The paths, by time, then sigma_rel.
    """
    names = list(trajectory[0])
    tracked = tuple(sorted(sigma_rels))
    given = {
        "tensors": dict.fromkeys(names, f"average {stored_name(dtype)}"),
        "sigma_rels": tracked,
    }
    paths = []
    for t in snapshot_times:
        times = range(1, t + 1)
        for sigma_rel in tracked:
            values = {}
            for name in names:
                weights = [step[name] for step in trajectory[:t]]
                average = torch.from_numpy(exact_average(weights, sigma_rel, times))
                values[name] = average.to(dtype)
            path = write_snapshot(directory, t, sigma_rel, run_id, values, **given)
            paths.append(path)
    return paths


def random_walk(steps, shapes):
    """Return weights that walk randomly as a network's do: after each step, by name, float64."""
    generator = np.random.default_rng(0)
    walk = [{} for _ in range(steps)]
    for name, shape in shapes.items():
        moves = generator.normal(size=(steps, *shape))
        for weights, place in zip(walk, np.cumsum(moves, axis=0), strict=True):
            weights[name] = place
    return walk


# --- a model
# ---------------------------------------------------------------------------------------


class TinyModel(nn.Module):
    """A small model with tensors of every kind, see `tiny_model`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        """Return logits, shape [batch, 5], of tokens 0 .. 4, shape [batch]."""
        hidden = self.norm(self.embed(tokens))
        return self.head(hidden + self.frozen)


def tiny_model(seed=0):
    """Make a model with tied parameters (`embed.weight`, `head.weight`), float parameters,
    BatchNorm buffers (two of float, one of int64) and a frozen parameter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyModel()


def info_of(state):
    """Return the numbers of a tracker's own state, those that equal their default, too."""
    info = json.loads(state["info"])
    standing = vars(Standing()) | info.get("standing", {})
    nothing = vars(START)
    standing |= nothing | info.get("standing", {}).get("last", {})
    return nothing | info.get("last", {}) | info | {"standing": standing}


def averages_in(state):
    """Return the averages in a tracker's state by sigma_rel and name, in float64."""
    found = {}
    standing = info_of(state)["standing"]
    folded = standing["folded_t"] / (standing["t"] or 1.0)
    for key, high in state["high"].items():
        mass = 1 - folded ** (exact_gamma(float(key)) + 1)
        found[key] = {}
        for name, value in high.items():
            average = value.double()
            mean = state["mean"][key][name].double()
            found[key][name] = average + mass * (mean - average)
    return found


def contents(folder):
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            found[name] = path.read_bytes()
    return found


# --- damage ---------------------------------------------------------------------------------------


def snapshot_files(run):
    return sorted(run.glob("0*.safetensors"))


def forge(path, changes):
    """Change values, given as JSON, in the object of a file's header, or remove them (None), and
    seal it again."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header["__metadata__"]
    own = {}
    for key, value in json.loads(metadata["ema"]).items():
        own[key] = json.dumps(value)
    own.update(changes)
    items = [f"{json.dumps(key)}:{value}" for key, value in own.items() if value is not None]
    metadata["ema"] = "{" + ",".join(items) + "}"
    unsealed = "0" * 16
    metadata["ema.checksum"] = unsealed
    text = json.dumps(header, separators=(",", ":"))
    size = len(text.encode()).to_bytes(8, "little")
    checksum = xxhash.xxh3_64_hexdigest(size + text.encode())
    mark = '"ema.checksum":"'
    sealed = text.replace(mark + unsealed, mark + checksum)
    path.write_bytes(size + sealed.encode() + data[end:])
    return path


def flip_bit(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


# --- the solver
# ------------------------------------------------------------------------------------


def solved(solver, target):
    """Return the coefficients for one target: shape [n]."""
    return solver.optimum(solver.right_hand_side(target))


def squared_error(solver, coefficients, target):
    """Return the expected squared error of any coefficients for one target."""
    rhs = solver.right_hand_side(target)
    squares = solver.expected_squares(coefficients, rhs)
    return float(squares.sum())


@dataclass(frozen=True)
class Span:
    """The profile of the mean over a span of time."""

    start: float
    end: float

    def tail(self, s):
        left = self.end - np.asarray(s)
        return np.clip(left / (self.end - self.start), 0.0, 1.0)


def write_ema_checkpoints(folder, steps=200, decay=0.9):
    """Write checkpoints of a random walk with its EMA, every tenth step, and of the last step with
    weights alone; return the newest EMA."""
    random = torch.Generator().manual_seed(0)
    weights = torch.zeros(50)
    average = torch.zeros(50)
    for step in range(1, steps + 1):
        weights = weights + 0.1 * torch.randn(50, generator=random)
        average = decay * average + (1 - decay) * weights
        state = {"n_averaged": torch.tensor(step), "module.w": average}
        if step % 10 == 0:
            torch.save({"model": {"w": weights}, "ema": state}, folder / f"step{step}.pt")
    torch.save({"model": {"w": weights + 0.1}}, folder / f"step{steps + 10}.pt")
    return average
