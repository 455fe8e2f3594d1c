"""The average that several processes ask for together.

The first process plans it, and sends the plan. Of replicas it also makes the average; of a sharded
model each process makes the chunks that it owns, and other holders of the same elements receive
them, tensor by tensor. An error in one process is raised in all of them before a model has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import torch_dtype
from posthoc_cli.errors import FileFormatError, InvalidValueError, ModelMismatchError, VanishedError
from posthoc_cli.run import Wanted, Weights, make_weights
from posthoc_cli.snapshots.directory import find_snapshots, read_snapshot, shared_fields
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.targets import Target, as_target
from posthoc_cli.tracker.model import TrackedModel, named_tensors
from posthoc_cli.tracker.processes import (
    Group,
    ShardOwners,
    as_dtensor,
    held_box,
    held_part,
    reshard,
)
from posthoc_cli.tracker.snapshotter import LiveSource

log = logging.getLogger(__name__)


def plan_possible(
    sources: Sequence[Source], wanted: Mapping[str, Target]
) -> tuple[dict[str, Plan], dict[str, str]]:
    """Plan averages by label, and say why others cannot be made yet, such as a window longer than
    the run so far."""
    plans, refusals = dict[str, Plan](), dict[str, str]()
    for label, target in wanted.items():
        try:
            plans[label] = plan_synthesis(sources, [target])
        except InvalidValueError as error:
            refusals[label] = str(error)
    return plans, refusals


def logged(plan: Plan) -> Plan:
    """Log the predicted error of a plan of one target."""
    error = plan.predicted_error(0)
    predicted = "unknown" if error is None else f"{error:.2g}"
    log.info(
        "average of %s at t = %.12g: predicted error %s", plan.targets[0].title, plan.t, predicted
    )
    if plan.choice is not None:
        log.info("made from %s", plan.choice)
    return plan


def run_snapshots(directory: Path, run_id: str) -> list[Snapshot]:
    """Return the snapshots of a run on disk; none if the directory belongs to another run."""
    snapshots = find_snapshots(directory)
    return snapshots if snapshots and snapshots[0].run_id == run_id else []


def joined(parts: Sequence[Snapshot]) -> LiveSource:
    """Return the live average of complete tensors, without values, from the headers of its owners'
    chunks."""
    entries = {
        n: replace(e, shape=part.chunks[n].shape) for part in parts for n, e in part.entries.items()
    }
    return LiveSource(**vars(parts[0]) | shared_fields(parts) | {"entries": entries})


def _read_again(path: Path, checksum: str) -> Snapshot:
    """Read the header of a snapshot that the first process has planned with; raise an error if it
    was replaced."""
    try:
        snapshot = read_snapshot(path)
    except FileFormatError as error:
        if files.is_absent(path):
            raise VanishedError(path, "was removed while it was being used") from error
        raise
    if snapshot.identity != checksum:
        raise FileFormatError(path, "was replaced while it was being used", "run again")
    return snapshot


SentPlan = tuple[Plan, Sequence[tuple[str, str]]]


def to_send(plan: Plan) -> SentPlan:
    """Return what the first process sends of a plan: without its target, which may be a user's
    object, and with the newest header as its only source; and the name and the checksum of each
    source."""
    newest: Any = plan.newest
    header = (
        newest.header
        if isinstance(newest, LiveSource)
        else replace(newest, files=(), sketch="", sample="")
    )
    return replace(plan, sources=(header,), targets=()), [
        (source.name, source.identity) for source in plan.sources
    ]


@torch.inference_mode(False)
@torch.no_grad()
def exchanged(
    group: Group,
    sent: SentPlan,
    live: Mapping[str, Source],
    wanted: Wanted,
    tracked: TrackedModel,
    model: torch.nn.Module | None,
    directory: Path,
) -> Weights:
    """Return all that this process holds of an average, under all names, on the host, after
    exchanging it.

    `live` are the live averages in this process, by name: of its chunks of a sharded `model`, or in
    the first one all.
    """
    plan, used = replace(sent[0], targets=(as_target(wanted),)), sent[1]
    tensors, holders, boxes = dict[str, torch.Tensor](), None, {}
    makes_any = group.leads
    if isinstance(tracked.members, ShardOwners):
        assert model is not None
        reshard(model)  # so that this process holds its chunks
        tensors = {tensor.name: tensor.tensor for tensor in named_tensors(model)}
        holders = tracked.members.holders
        boxes = {name: tracked.box(name) for name in plan.tensors if name in tracked.tensors}
        makes_any = bool(boxes)

    def make() -> Weights:
        for name, box in boxes.items():
            tensor, expected = tensors.get(name), (tracked.complete_shape(name), box)
            if tensor is None or (tuple(tensor.shape), held_box(name, tensor)[1]) != expected:
                where = "spread over the processes in another way than when tracked"
                reason = f"is missing in the model, of another shape, or {where}"
                raise ModelMismatchError(f"tensor {name!r}", reason)
        sources = tuple(
            live.get(name) or _read_again(directory / name, checksum) for name, checksum in used
        )
        subset = None if holders is None else frozenset(boxes)
        return make_weights(replace(plan, sources=sources, boxes=boxes, subset=subset))

    own, weights = group.together(make if makes_any else Weights), Weights()
    for name, names in plan.names.items():
        if holders is not None and name not in tensors:
            continue  # of another stage of a pipeline
        shape = held_part(tensors[name]).shape if name in tensors else plan.entries[name].shape
        value = (
            own[name]
            if name in own
            else torch.empty(shape, dtype=torch_dtype(plan.output_dtype(name)))
        )
        group.exchange(value, group.ranks if holders is None else holders.get(name, ()))
        weights.update(dict.fromkeys(names, value))
    weights.predicted_error, weights.profile_error = plan.predicted_error(0), plan.profile_error(0)
    return weights


def as_dtensors(chunks: Weights, model: torch.nn.Module) -> Weights:
    """Return the weights with DTensors on the host in place of chunks, sharded like the model's
    parameters."""
    weights = Weights()
    weights.predicted_error, weights.profile_error = chunks.predicted_error, chunks.profile_error
    converted: dict[int, torch.Tensor] = {}  # by the chunk, which tied names share
    for name, _, tensor, *_ in named_tensors(model):
        if (chunk := chunks.get(name)) is not None:
            if id(chunk) not in converted:
                converted[id(chunk)] = as_dtensor(chunk, tensor)
            weights[name] = converted[id(chunk)]
    return weights
