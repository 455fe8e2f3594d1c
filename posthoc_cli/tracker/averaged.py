"""The average that several processes ask for together.

For replicas the first process makes it, and sends it to the others. For a sharded model each
process fills its chunks: for a tracked length from its own averages, which holders of the same
elements receive from the one that keeps them; for other lengths from snapshots, by a plan of the
first process. An error in one process is raised in all of them before a model has changed.
"""

from __future__ import annotations

import logging
import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posthoc_cli import files
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import FileFormatError, InvalidValueError, ModelMismatchError, VanishedError
from posthoc_cli.group import Group
from posthoc_cli.reconstruction import ROUNDING
from posthoc_cli.run import Wanted, Weights, make_weights
from posthoc_cli.snapshots.directory import read_snapshot
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import Box
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.targets import Target, as_target
from posthoc_cli.tracker.model import TrackedModel, named_tensors
from posthoc_cli.tracker.processes import (
    ShardOwners,
    local_box,
    local_part,
    reshard,
)

log = logging.getLogger(__name__)


def plan_possible(
    sources: Sequence[Source],
    targets: Mapping[str, Target],
) -> tuple[dict[str, Plan], dict[str, str]]:
    """Plan averages by label, and say why others cannot be made yet, such as a window longer than
    the run so far."""
    plans = dict[str, Plan]()
    refusals = dict[str, str]()
    for label, target in targets.items():
        try:
            plans[label] = plan_synthesis(sources, [target])
        except InvalidValueError as error:
            refusals[label] = str(error)
    return plans, refusals


def log_predicted_error(plan: Plan) -> Plan:
    """Log the predicted error of a plan of one target."""
    error = plan.predicted_error(0)
    predicted = "unknown" if error is None else f"{error:.2g}"
    log.info(
        "average of %s at t = %.12g: predicted error %s", plan.targets[0].title, plan.t, predicted
    )
    return plan


def conversion_error(dtypes: Mapping[str, torch.dtype], boxes: Mapping[str, Box]) -> float:
    """Predict the relative error of rounding averages of these sizes to narrower dtypes than
    float32, if all elements are equally large."""
    total = 0
    squares = 0.0
    for name, dtype in dtypes.items():
        size = boxes[name].size
        total += size
        spacing = torch.finfo(dtype).eps
        if spacing > EPS["F32"]:
            squares += size * (ROUNDING * spacing) ** 2
    return math.sqrt(squares / max(1, total))


@torch.inference_mode(False)
@torch.no_grad()
def from_first(
    group: Group,
    make: Callable[[], Weights],
) -> Weights:
    """Make weights in the first process, and return them in every process, with names that share a
    tensor."""
    if group.is_alone:
        return make()
    own: list[Weights] = []  # in the first process

    def outline() -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights = make()
        own.append(weights)
        return _without_values(weights), vars(weights)

    shapes, attributes = group.from_first(outline)
    weights = Weights()
    vars(weights).update(attributes)
    sent: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        if id(shape) not in sent:
            value = own[0][name] if own else torch.empty_like(shape, device="cpu")
            group.broadcast(value, group.ranks)
            sent[id(shape)] = value
        weights[name] = sent[id(shape)]
    return weights


def _without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make tensors of these dtypes and shapes on the meta device, without values."""
    empty = {id(tensor): tensor.to("meta") for tensor in tensors.values()}
    return {name: empty[id(tensor)] for name, tensor in tensors.items()}


# --- chunks of a sharded model


def index_chunks(
    model: nn.Module,
    tracked: TrackedModel,
) -> dict[str, Tensor]:
    """Find a sharded model's tensors by name; raise a ModelMismatchError if an owned chunk is not
    where it was when it was tracked."""
    reshard(model)
    tensors = {tensor.name: tensor.tensor for tensor in named_tensors(model)}
    for name, box in tracked.boxes.items():
        tensor = tensors.get(name)
        actual = None
        if tensor is not None:
            _, own_box = local_box(name, tensor)
            actual = tuple(tensor.shape), own_box
        if actual != (tracked.shapes[name], box):
            where = "spread over the processes in another way than when tracked"
            reason = f"is missing in the model, of another shape, or {where}"
            raise ModelMismatchError(f"tensor {name!r}", reason)
    return tensors


@torch.inference_mode(False)
@torch.no_grad()
def with_replicas(
    group: Group,
    own: Weights,
    tensors: Mapping[str, Tensor],
    members: ShardOwners,
) -> Weights:
    """Collect the chunks of all `tensors` that this process holds, from its `own` averages and from
    other processes."""
    own_dtypes = {name: value.dtype for name, value in own.items()}
    answers = group.from_all((own_dtypes, vars(own)))
    dtype = ChainMap(*[dtypes for dtypes, _ in answers])
    weights = Weights(own)
    for _, attributes in answers:
        vars(weights).update(attributes)
    for name in sorted(members.holders):  # in the same order in all processes
        value = own.get(name)
        if value is None:
            value = _empty_part(tensors[name], dtype[name])
        group.broadcast(value, members.holders[name])
        weights[name] = value
    _add_names(weights, tensors, dtype)
    return weights


def _add_names(
    weights: Weights,
    tensors: Mapping[str, Tensor],
    dtype: Mapping[str, torch.dtype],
) -> None:
    """Add further names of tied tensors, and chunks without elements."""
    names = {id(tensors[name]): name for name in weights}
    for name, tensor in tensors.items():
        if id(tensor) not in names and name in dtype:
            weights[name] = _empty_part(tensor, dtype[name])
            names[id(tensor)] = name
        elif id(tensor) in names:
            weights[name] = weights[names[id(tensor)]]


def _empty_part(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(local_part(tensor).shape, dtype=dtype)


def _read_again(path: Path, checksum: str) -> Snapshot:
    """Read the header of a snapshot that the first process has planned with; raise an error if the
    snapshot was replaced."""
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


def reduce_to_send(plan: Plan) -> SentPlan:
    """Reduce a plan to what the first process sends: without its target, which may be a user's
    object, and with the newest header as its only source; and the name and the checksum of each
    source."""
    newest: Any = plan.newest
    header = replace(newest, files=(), sketch="", sample="")
    used = [(source.name, source.identity) for source in plan.sources]
    return replace(plan, sources=(header,), targets=()), used


@torch.inference_mode(False)
@torch.no_grad()
def read_chunks(
    group: Group,
    sent: SentPlan,
    length: Wanted,
    tensors: Mapping[str, Tensor],
    directory: Path,
) -> Weights:
    """Read the chunks of all `tensors` that this process holds from snapshots in a directory."""
    plan, used = sent
    boxes: dict[str, Box] = {}
    for name, tensor in tensors.items():
        if name in plan.newest.tensors:  # else of another name, or not tracked
            boxes[name] = local_box(name, tensor)[1]

    def make() -> Weights:
        sources = tuple(_read_again(directory / name, checksum) for name, checksum in used)
        target = as_target(length)
        own = replace(
            plan, sources=sources, targets=(target,), boxes=boxes, subset=frozenset(boxes)
        )
        return make_weights(own)

    return group.together(make)
