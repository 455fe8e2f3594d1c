"""Which tensors of a model are averaged, copied or left out, under which names, and whether they are those of the run.

Names are the same whatever the model is wrapped in. `torch.compile`, DataParallel, DistributedDataParallel, FSDP and
activation checkpointing put a child between a module and its tensors' names. Such a child is recognised by its parent's
type, never by its name: a user's module may have a child called `module`. Tensors of a PEFT adapter have the names
under which PEFT saves and loads them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch

from posthoc_cli.dtypes import EPS, stored_name, torch_dtype
from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NonFiniteError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.chunks import Box, Chunk
from posthoc_cli.snapshots.format import TrackedTensor
from posthoc_cli.snapshots.path import index_within, places
from posthoc_cli.snapshots.selection import Selection, running_statistics
from posthoc_cli.snapshots.sources import Snapshot
from posthoc_cli.tracker.sharding import Members, is_fsdp, is_sharded, local_part, local_tensors, reshard

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)  # torch has no arithmetic for them
AVERAGED_DTYPES = tuple(map(torch_dtype, EPS))

ON_META = (
    "is on the meta device and has no values",
    "PostHocEMA.from_path(checkpoint_dir).load_into(model, sigma_rel=...) fills a model with an average, "
    "load_state_dict(assign=True) with any values",
)
"""Reason and hint for a tensor without values."""

_CHANGED = "begin a new directory for the changed model"
_OTHER_DTYPE = (
    "convert the model before the hook is made; or compute in half precision with torch.autocast, which does not "
    "change parameters"
)
_NEW_SHAPE = (
    "where modules give their buffers a shape at the first batch, as fake quantization does, run one batch through the "
    "model before the tracker is made, or leave such buffers out with exclude=, by name or glob"
)


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a model's state, by the name they are stored under.

    Attributes:
        averaged: floating-point parameters, running statistics, and buffers that the user wants averaged.
        copied: other persistent buffers and parameters, and tensors that the user wants copied.
        aliases: further names of these (tied parameters) -> the stored name.
        left_out: names in the model's state that are not tracked; those in `frozen` since they need no gradient.
        chunks: of the tensors of which this process holds a part only, see `sharding`: where it belongs.
        statistics: names of those that are averaged though they are no weights.
    """

    averaged: dict[str, torch.Tensor]
    copied: dict[str, torch.Tensor]
    aliases: dict[str, str]
    left_out: tuple[str, ...]
    frozen: frozenset[str] = frozenset()
    chunks: dict[str, Chunk] = field(default_factory=dict)
    statistics: frozenset[str] = frozenset()

    def of(self, members: Members) -> ModelTensors:
        """What this process averages and writes of them."""
        names = members.owned(self.averaged.keys() | self.copied.keys())
        averaged, copied = ({n: t for n, t in own.items() if n in names} for own in (self.averaged, self.copied))
        aliases = {alias: name for alias, name in self.aliases.items() if name in names}
        chunks = {name: chunk for name, chunk in self.chunks.items() if name in names}
        return replace(self, averaged=averaged, copied=copied, aliases=aliases, chunks=chunks)


@dataclass(frozen=True)
class TrackedModel:
    """What a run tracks of a model: the entries of a snapshot's header that must not change in a run.

    In a process that has met others to track one sharded model, `members`, it is what that process owns; `everywhere`
    are the shapes of all averages then, complete.
    """

    tensors: dict[str, TrackedTensor]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: dict[str, str]
    left_out: tuple[str, ...]
    frozen: frozenset[str] = frozenset()
    chunks: dict[str, Chunk] = field(default_factory=dict)
    members: Members = field(default_factory=Members)
    everywhere: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of_model(cls, found: ModelTensors, members: Members | None = None) -> TrackedModel:
        """The entries for a model in memory."""
        roles = dict.fromkeys(found.averaged, "average") | dict.fromkeys(found.statistics, "statistic")
        averaged = {n: TrackedTensor(roles[n], stored_name(t.dtype, n)) for n, t in found.averaged.items()}
        copied = {name: TrackedTensor("copy", stored_name(t.dtype, name)) for name, t in found.copied.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in (found.averaged | found.copied).items()}
        members = members or Members()
        if not members.is_chunked:  # nothing is owned yet: the complete model
            shapes |= {name: chunk.shape for name, chunk in found.chunks.items()}
        whole = {name: Chunk(shape, (0,) * len(shape)) for name, shape in shapes.items()}
        chunks = whole | found.chunks if members.is_chunked else {}
        return cls(averaged | copied, shapes, found.aliases, found.left_out, found.frozen, chunks, members)

    @classmethod
    def of_snapshot(cls, snapshot: Snapshot) -> TrackedModel:
        """The entries of a snapshot."""
        shapes = {name: entry.shape for name, entry in snapshot.header.tensors.items()}
        info = snapshot.info
        return cls(info.tensors, shapes, info.aliases, info.left_out)

    @property
    def known_names(self) -> frozenset[str]:
        """All names of the tensors."""
        return frozenset(self.tensors.keys() | self.aliases.keys())

    def complete_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the model, of which a part may be here."""
        return self.chunks[name].shape if name in self.chunks else self.shapes[name]

    def box(self, name: str) -> Box:
        """The elements of a tensor that are here."""
        return self.chunks[name].box(self.shapes[name]) if name in self.chunks else Box.whole(self.shapes[name])

    @property
    def complete_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all averages, those of other processes, too."""
        return self.everywhere or {name: self.shapes[name] for name in self.weights}

    @property
    def weights(self) -> list[str]:
        """Averages, and no running statistics: what is rounded, measured and sketched."""
        return [name for name, own in self.tensors.items() if own.role == "average"]

    @cached_property
    def sampled(self) -> list[tuple[str, int]]:
        """The elements of a snapshot's sample that are here: name, and row-major index in what is here of it."""
        return [*self.numbered_sample.values()]

    @cached_property
    def numbered_sample(self) -> dict[int, tuple[str, int]]:
        """The same by their place in the sample."""
        own = ((number, name, index) for number, (name, index) in enumerate(places(self.complete_shapes)))
        found = (
            (number, name, index_within(self.box(name), self.complete_shape(name), index))
            for number, name, index in own
            if name in self.tensors
        )
        return {number: (name, index) for number, name, index in found if index is not None}

    def boxes(self) -> dict[str, Box] | None:
        """What is here of each tensor of a sharded model; None of any other one."""
        return {name: self.box(name) for name in self.tensors} if self.members.is_chunked else None

    @property
    def part(self) -> tuple[int, int] | None:
        """Number of the part of a snapshot that this process writes, from 1, and how many there are; None for none."""
        return self.members.part

    @property
    def leads(self) -> bool:
        """Whether what is known of the complete averages alone is told by this process."""
        return self.part is None or self.part[0] == 1

    def dtypes(self, copied: bool) -> dict[str, torch.dtype]:
        """The model's dtypes of the tensors that are copied, or else of those that are averaged, by name."""
        own = self.tensors.items()
        return {name: torch_dtype(one.dtype) for name, one in own if (one.role == "copy") == copied}

    def check_header(self) -> None:
        """Raise an InvalidValueError for too many tensors for a snapshot's header: now, not when one is due."""
        names = [*self.tensors, *self.aliases, *self.left_out]
        # A header has a tensor's name three times, with at most 300 bytes more.
        size = 3 * sum(map(len, names)) + 300 * len(names)
        if size < fmt.MAX_HEADER_BYTES // 4 and len(names) <= fmt.MAX_TENSORS:
            return
        specs = [fmt.TensorSpec(name, own.dtype, self.shapes[name]) for name, own in self.tensors.items()]
        entries = fmt.lay_out(specs)
        checksums = {name: "0" * 16 * -(-entry.nbytes // fmt.BLOCK_BYTES) for name, entry in entries.items()}
        tables = {"tensors": self.tensors, "aliases": self.aliases, "left_out": self.left_out}
        tables["sample"] = fmt.encode_sample(*[[0.0] * len(self.sampled)] * 2)
        try:
            fmt.encode_header(entries, fmt.encode_metadata("snapshot", tables), checksums)
        except InvalidValueError as error:
            reason = f"with {len(names):,} tensors a snapshot's {error.subject} {error.reason}"
            raise InvalidValueError("model", reason, "leave some out with include or exclude, or join them") from error

    def check(self, found: TrackedModel) -> None:
        """Raise a ModelMismatchError, naming the tensor, unless names, shapes, dtypes and roles are these."""
        for name in (*self.tensors, *found.tensors):
            if (name in self.tensors) != (name in found.tensors):
                raise ModelMismatchError(f"tensor {name!r}", *self._why_missing_or_new(name, found))
        kept = {"average": "averaged", "statistic": "averaged as a running statistic", "copy": "copied"}
        for name, tensor in found.tensors.items():
            own, shape, expected = self.tensors[name], list(found.shapes[name]), list(self.shapes[name])
            what, was, hint = "", "", ""
            if shape != expected:
                what, was = f"has the shape {shape}", f"had {expected}"
                if tensor.role == own.role == "copy":
                    hint = _NEW_SHAPE
            elif tensor.role != own.role:
                what, was = f"is {kept[tensor.role]} now", f"was {kept[own.role]}"
            elif tensor.dtype != own.dtype:
                what, was = f"is {torch_dtype(tensor.dtype)}", f"was {torch_dtype(own.dtype)}"
                hint = _OTHER_DTYPE
            if what:
                raise ModelMismatchError(f"tensor {name!r}", f"{what}, and {was} when tracking began", hint)
        for alias in self.aliases.keys() | found.aliases.keys():
            if self.aliases.get(alias) != found.aliases.get(alias):
                raise ModelMismatchError(f"tensor {alias!r}", "is not tied to the tensor that it was tied to")

    def _why_missing_or_new(self, name: str, found: TrackedModel) -> tuple[str, str]:
        frozen_too = "make the tracker with include='*', which tracks frozen parameters, too"
        if name in found.frozen:
            return "is tracked, but does not require gradients any more", frozen_too
        if name in self.tensors:
            return "is tracked, but the model has no such tensor to track", ""
        if name in self.left_out:
            reason = "requires gradients now, but was left out when tracking began, since it did not then"
            return reason, frozen_too
        return "is in the model, but was not when tracking began", ""


def check_model(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, or an InvalidValueError if it is no module."""
    if not isinstance(model, torch.nn.Module):
        raise InvalidValueError("model", f"must be a torch.nn.Module, not {type(model).__name__}")
    return model


swapped: list[frozenset[int]] = []
"""For each open block with averaged weights, the ids of the swapped tensors and of the modules that hold them.

The block refers to all of these objects, so that no id is used again meanwhile.
"""


def is_swapped(model: torch.nn.Module) -> bool:
    """Whether any part of a model holds averaged weights, which no average may take in.

    Compares tensors and modules, since the swapped model may be a part of this one, or this one a part of it.
    """
    if not swapped:
        return False
    own = frozenset(map(id, chain(model.modules(), model.parameters(), model.buffers())))
    return any(own & held for held in [*swapped])


# --- looking through a model ---


def collect_tensors(model: torch.nn.Module, selection: Selection, also: frozenset[str] = frozenset()) -> ModelTensors:
    """The tensors of a model, or what this process holds of them; those in `also` even if they require no gradients.

    Raises:
        InvalidValueError: nothing to average, or a tensor that cannot be averaged or stored, by name.
    """
    averaged: dict[str, torch.Tensor] = {}
    copied: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    left_out: list[str] = []
    frozen: set[str] = set()
    first_name: dict[int, str] = {}
    chunks: dict[str, Chunk] = {}
    reshard(check_model(model))
    tensors = named_tensors(model)
    # A tied parameter is one tensor: any of its names will do.
    copy_only = {id(found.tensor) for found in tensors if selection.copies(found.name)}
    statistics: set[str] = set()
    running = running_statistics(found.name for found in tensors if not found.is_parameter)
    for found in tensors:
        name, tensor = found.name, found.tensor
        is_copied = id(tensor) in copy_only
        if not found.in_state:
            continue
        if not selection.names(name):
            left_out.append(name)
            continue
        wanted = not selection.only_trainable or tensor.requires_grad or is_copied or name in also
        if found.is_parameter and not wanted:
            left_out.append(name)
            frozen.add(name)
            continue
        if name == "__metadata__":
            reason = "safetensors files reserve this name, so that no snapshot can hold it"
            hint = f"rename it in the model, or leave it out with exclude={name!r}"
            raise InvalidValueError("parameter" if found.is_parameter else "buffer", reason, hint, value=f"{name!r}")
        stored = first_name.setdefault(id(tensor), name)
        if stored != name:
            aliases[name] = stored
            continue
        _check_dense(name, tensor)
        local, chunk = local_part(name, tensor)
        is_statistic = name in running and selection.buffers == "statistics" and tensor.dtype in AVERAGED_DTYPES
        (averaged if not is_copied and (is_statistic or _is_averaged(found, selection)) else copied)[name] = local
        if is_statistic and not is_copied:
            statistics.add(name)
        if chunk is not None:
            chunks[name] = chunk
    if not averaged.keys() - statistics:
        reason, hint = "none of floating-point values requires gradients", "include='*' takes frozen ones, too"
        if not frozen and (selection.include or selection.exclude):
            reason, hint = "include and exclude leave none", ""
        raise InvalidValueError("model", f"has no parameter to average: {reason}", hint)
    return ModelTensors(averaged, copied, aliases, tuple(left_out), frozenset(frozen), chunks, frozenset(statistics))


def nonfinite_name(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The first tensor that holds a nan or an infinity."""
    for name, tensor in tensors.items():
        if not bool((tensor.float() if tensor.dtype in EIGHT_BITS else tensor).isfinite().all()):
            return name
    return None


def nonfinite_error(name: str | None, tracked: Mapping[str, TrackedTensor], step: int) -> NonFiniteError:
    """The error for a tensor that holds nan or infinity; None for one in another process."""
    reason = f"holds nan or infinity at step {step}; no average has taken it in"
    if name is None:
        return NonFiniteError("a parameter in another process", reason)
    if name in tracked and tracked[name].role == "statistic":
        hint = (
            "buffers='copy' copies running statistics; or recompute them, and let on_nonfinite='skip' leave these out"
        )
        return NonFiniteError(f"running statistic {name!r}", reason, hint)
    return NonFiniteError(f"parameter {name!r}", reason)


def _is_averaged(found: NamedTensor, selection: Selection) -> bool:
    """Whether a tensor is averaged, or else copied; an InvalidValueError if it should be averaged and cannot be."""
    if not found.is_parameter:
        return selection.buffers == "average" and found.tensor.dtype in AVERAGED_DTYPES
    name, tensor = found.name, found.tensor
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in AVERAGED_DTYPES):
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in AVERAGED_DTYPES)
        reason = f"dtype {tensor.dtype} cannot be averaged; {accepted} can"
        hint = f"let the model hold torch.view_as_real of it, or leave it out with exclude={name!r}"
        raise InvalidValueError("parameter", reason, hint if tensor.is_complex() else "", value=f"{name!r}")
    return tensor.is_floating_point()


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise an InvalidValueError for a tensor that has no values of its own, complete and in this process."""
    reason, hint = "", ""
    if torch.nn.parameter.is_lazy(tensor):
        reason, hint = "has no shape yet", "run a batch through the model first"
    elif hasattr(tensor, "ds_id") and hasattr(tensor, "ds_tensor"):
        reason = "is sharded over processes by DeepSpeed ZeRO-3, whose parameters have no values between steps"
        hint = "use ZeRO-1 or ZeRO-2, or fully_shard"
    elif tensor.layout != torch.strided:
        reason = f"is {tensor.layout}; only dense tensors can be tracked"
    elif tensor.is_meta:
        reason, hint = ON_META
    if reason:
        raise InvalidValueError("tensor", reason, hint, value=f"{name!r}")


# --- whether the model is still the tracked one ---


class ModelWatch:
    """Cache of the model's tensors, invalidated when the model changes."""

    def __init__(self, selection: Selection, members: Members) -> None:
        self._selection, self._members = selection, members
        self._known: tuple[weakref.ref[torch.nn.Module], _Look, ModelTensors] | None = None
        self._checked: tuple[ModelTensors, TrackedModel] | None = None

    def tensors(self, model: torch.nn.Module) -> ModelTensors:
        """The model's tensors: the object of the last call, unless the model has changed."""
        if self._known is not None:
            known, look, found = self._known
            if known() is model and look.is_same():
                return found
        self._known = None
        found = self._collect(model)
        self._known = weakref.ref(model), _Look(model), found  # the model may go before the tracker does
        return found

    def check(self, tensors: ModelTensors, tracked: TrackedModel) -> None:
        """Raise a ModelMismatchError unless these are the tracked tensors."""
        if self._checked is None or self._checked[0] is not tensors or self._checked[1] is not tracked:
            try:
                tracked.check(TrackedModel.of_model(tensors, self._members))
            except ModelMismatchError as error:
                raise error.with_hint(_CHANGED) from None
            self._checked = tensors, tracked

    def check_model(self, model: torch.nn.Module, tracked: TrackedModel) -> ModelTensors:
        """The model's tensors, or a ModelMismatchError unless they are the tracked ones, frozen or not."""
        found = self._collect(model, tracked.known_names)
        tracked.check(TrackedModel.of_model(found, self._members))
        return found

    def sample(self, model: torch.nn.Module, tracked: TrackedModel) -> dict[int, float]:
        """The part of a snapshot's sample that is here, of the model, which must be the tracked one."""
        found = self.check_model(model, tracked).averaged
        known = {name: found[name].detach().reshape(-1) for name, _ in tracked.sampled}
        return {number: known[name][index].float().item() for number, (name, index) in tracked.numbered_sample.items()}

    def _collect(self, model: torch.nn.Module, also: frozenset[str] = frozenset()) -> ModelTensors:
        found = collect_tensors(model, self._selection, also)
        self._members.check_kind(model)
        return found.of(self._members)


class _Look:
    """What a model's modules hold at one moment.

    Walking through the modules at every update would cost more than comparing names, objects, places in memory, dtypes
    and whether gradients are required.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._contents: list[dict[str, Any]] = []
        for module in model.modules():
            self._contents += module._parameters, module._buffers, module._modules
        self._filled = [contents for contents in self._contents if contents]
        self._held = [*chain.from_iterable(map(dict.values, self._filled))]  # so that no id is used again
        self._tensors = [*model.parameters(), *model.buffers()]
        self._are_sharded = any(map(is_sharded, self._tensors))
        local = self._local()
        self._views = [p.detach() if p.layout == torch.strided else None for p in local]
        self._fingerprint = self._take_fingerprint(local)

    def is_same(self) -> bool:
        """Whether nothing has changed; of tensors that are sparse their place does not say it."""
        local = self._local()
        return self._fingerprint == self._take_fingerprint(local) and all(
            view is None or p.is_set_to(view) for p, view in zip(local, self._views, strict=True)
        )

    def _local(self) -> Sequence[torch.Tensor]:
        """What is here of the model's tensors."""
        return local_tensors(self._tensors) if self._are_sharded else self._tensors

    def _take_fingerprint(self, local: Sequence[torch.Tensor]) -> tuple[object, ...]:
        """Differs if the tensors do, but for their places."""
        return (
            [*map(len, self._contents)],
            [*chain.from_iterable(self._filled)],
            [*map(id, chain.from_iterable(map(dict.values, self._filled)))],
            [p.requires_grad for p in local],
            [p.dtype for p in local],
        )


# --- names, without wrappers ---


_WRAPPERS = (
    ("torch.nn.parallel.data_parallel", "DataParallel"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch._dynamo.eval_frame", "OptimizedModule"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
)
"""Where each wrapper is defined, and its class. It has one child, the module that it wraps."""


@dataclass(frozen=True)
class NamedModule:
    """A module or wrapper, at one of the paths to it: without wrappers ("" for the model itself), and as torch's."""

    path: str
    raw: str
    module: torch.nn.Module


@dataclass(frozen=True)
class NamedTensor:
    """A parameter or buffer, under one of its names: without wrappers, and as torch's. Tied names have one `tensor`.

    `in_state` are all but transient buffers.
    """

    name: str
    raw: str
    tensor: torch.Tensor
    is_parameter: bool
    in_state: bool = True


def named_tensors(model: torch.nn.Module) -> list[NamedTensor]:
    """Parameters, then buffers, in the order of the modules, tied names included.

    Raises:
        InvalidValueError: the first FSDP has sharded the model, or laid its parameters end to end in another one.
    """
    modules = list(named_modules(model))
    _check_unsharded(modules)
    tensors = [
        NamedTensor(_join(place.path, key), _join(place.raw, key), parameter, True)
        for place in modules
        for key, parameter in place.module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    for place in modules:
        for key, buffer in place.module.named_buffers(recurse=False, remove_duplicate=False):
            in_state = key not in place.module._non_persistent_buffers_set  # `state_dict` would call hooks, and copy
            tensors.append(NamedTensor(_join(place.path, key), _join(place.raw, key), buffer, False, in_state))
    renamed: dict[str, str] = {}
    for root, adapter in _adapter_roots(modules):
        renamed |= _adapter_names(root, adapter, modules, tensors)
    return [replace(tensor, name=renamed[tensor.raw]) if tensor.raw in renamed else tensor for tensor in tensors]


def named_modules(model: torch.nn.Module) -> Iterator[NamedModule]:
    """Every module by every path, wrappers too (under the path of the module they wrap)."""
    found: dict[str, tuple[str, str | None]] = {}  # the path of each, and the child that it wraps
    for raw, module in model.named_modules(remove_duplicate=False):
        parent, _, key = raw.rpartition(".")
        above, wrapped = found.get(parent, ("", ""))
        path = above if key == wrapped else _join(above, key)
        found[raw] = path, wrapped_child(module)
        yield NamedModule(path, raw, module)


def wrapped_child(module: torch.nn.Module) -> str | None:
    """The name of the child that a wrapper wraps; None for a module that is no wrapper."""
    if any(_is_a(module, wrapper) for wrapper in _WRAPPERS):
        return next(name for name, _ in module.named_children())
    return None


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside all of its wrappers."""
    while (child := wrapped_child(model)) is not None:
        model = model.get_submodule(child)
    return model


def _is_a(module: torch.nn.Module, wrapper: tuple[str, str]) -> bool:
    where, kind = wrapper
    # What nobody has imported wraps nothing. That another release of torch has no such class is an error.
    return where in sys.modules and isinstance(module, getattr(sys.modules[where], kind))


def _check_unsharded(modules: Iterable[NamedModule]) -> None:
    for place in modules:
        if not is_fsdp(place.module):
            continue
        from torch.distributed.fsdp import FlatParameter, ShardingStrategy

        where = f"module {place.path!r}" if place.path else "the model"
        if place.module.sharding_strategy != ShardingStrategy.NO_SHARD:
            reason = f"FSDP has laid its parameters end to end and cut them ({place.module.sharding_strategy})"
            hint = "use torch.distributed.fsdp.fully_shard, DistributedDataParallel, or FSDP with NO_SHARD"
            raise InvalidValueError(where, reason, hint)
        if any(isinstance(parameter, FlatParameter) for parameter in place.module.parameters()):
            raise InvalidValueError(
                where, "FSDP has laid its parameters end to end", "say use_orig_params=True to FSDP"
            )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# --- adapters of PEFT ---


def _adapter_roots(modules: Sequence[NamedModule]) -> Iterator[tuple[NamedModule, str]]:
    """The outermost modules with one adapter, and its name, which PEFT leaves out of its tensors' names.

    With several, tensors keep torch's names, which tell them apart; so do those of prompt learning, saved computed.
    """
    if "peft" not in sys.modules:
        return
    found: list[str] = []
    for place in modules:
        if any(place.raw == raw or place.raw.startswith(f"{raw}." if raw else "") for raw in found):
            continue
        configs = _adapter_configs(place.module)
        if configs:
            found.append(place.raw)
            adapter, config = next(iter(configs.items()))
            if len(configs) == 1 and not config.is_prompt_learning:
                yield place, adapter


def _adapter_configs(module: torch.nn.Module) -> Mapping[str, Any]:
    from peft import PeftConfig, PeftModel

    # Not `getattr`: wrappers hand on the attributes of what they wrap.
    configs = module.peft_config if isinstance(module, PeftModel) else vars(module).get("peft_config")
    if not isinstance(configs, Mapping):
        return {}
    return {name: config for name, config in configs.items() if isinstance(config, PeftConfig)}


def _adapter_names(
    root: NamedModule, adapter: str, modules: list[NamedModule], tensors: list[NamedTensor]
) -> dict[str, str]:
    """The names under which PEFT saves and loads an adapter's tensors, by torch's names."""
    start = f"{root.raw}." if root.raw else ""
    inside = {t.raw.removeprefix(start): t.tensor for t in tensors if t.raw.startswith(start)}
    wrappers = [place for place in modules if place.raw.startswith(start) and wrapped_child(place.module)]
    found = {}
    for raw, saved in _saved_names(root.module, adapter, inside).items():
        name = start + saved
        found[start + raw] = _join(root.path, saved)
        # The innermost wrapper last: its path is without its parents' prefixes.
        for place in wrappers:
            prefix = _join(place.raw, str(wrapped_child(place.module))) + "."
            if (start + raw).startswith(prefix) and name.startswith(prefix):
                found[start + raw] = _join(place.path, name.removeprefix(prefix))
    return found


def _saved_names(module: torch.nn.Module, adapter: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    from peft import get_peft_model_state_dict

    # An object for each name: PEFT's result tells by it where a tensor was.
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    names = {id(tensor): name for name, tensor in state.items()}
    saved = get_peft_model_state_dict(module, state_dict=dict(state), adapter_name=adapter, save_embedding_layers=False)
    return {names[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in names}
