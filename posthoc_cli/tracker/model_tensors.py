"""Which tensors of a model are averaged, which are copied, which are left out."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NonFiniteError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.format import Selection, TrackedTensor
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.tensors import stored_name, torch_dtype
from posthoc_cli.tracker.names import NamedTensor, named_modules, named_tensors, wrapped_child

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes that torch knows no arithmetic of."""

ON_META = (
    "is on the meta device and has no values; PostHocEMA.from_path(checkpoint_dir).load_into(model, sigma_rel=...) "
    "fills a model with an average, load_state_dict(assign=True) with any values"
)
"""What to say of a tensor without values, after its name."""

AVERAGED_DTYPES = tuple(map(torch_dtype, EPS))


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a model's state, by the name they are stored under.

    Attributes:
        averaged: floating-point parameters, and buffers that the user wants averaged.
        copied: other persistent buffers, parameters of whole numbers, and what the user wants copied.
        aliases: further names of tensors above (tied parameters) -> the stored name.
        left_out: names in the model's state that are not tracked: what the selection leaves out, extra state.
        frozen: those of them that are left out only since they do not require gradients.
    """

    averaged: dict[str, torch.Tensor]
    copied: dict[str, torch.Tensor]
    aliases: dict[str, str]
    left_out: tuple[str, ...]
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TrackedModel:
    """What a run tracks of a model: the part of a snapshot's header that must not change."""

    tensors: dict[str, TrackedTensor]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: dict[str, str]
    left_out: tuple[str, ...]
    frozen: frozenset[str] = frozenset()
    segment: int = 0

    @classmethod
    def of_model(cls, found: ModelTensors) -> TrackedModel:
        """What a model in memory would be stored as."""
        tensors, shapes = {}, {}
        for role, group in (("average", found.averaged), ("copy", found.copied)):
            for name, tensor in group.items():
                tensors[name] = TrackedTensor(role, stored_name(tensor.dtype, name))
                shapes[name] = tuple(tensor.shape)
        return cls(tensors, shapes, found.aliases, found.left_out, found.frozen)

    @classmethod
    def of_snapshot(cls, snapshot: Snapshot) -> TrackedModel:
        """What a snapshot says was tracked."""
        shapes = {name: entry.shape for name, entry in snapshot.header.tensors.items()}
        info = snapshot.info
        return cls(info.tensors, shapes, info.aliases, info.left_out, segment=info.segment)

    def check_header(self) -> None:
        """Raise an InvalidValueError where there are so many tensors that no snapshot's header can name them.

        Now, and not when the first snapshot is due. What else a header holds is small, and not counted.
        """
        names = [*self.tensors, *self.aliases, *self.left_out]
        # A tensor's name stands in a header three times, beside at most 300 bytes.
        if 3 * sum(map(len, names)) + 300 * len(names) < fmt.MAX_HEADER_BYTES // 4:
            return
        entries = fmt.lay_out(
            [fmt.TensorSpec(name, own.dtype, self.shapes[name]) for name, own in self.tensors.items()]
        )
        checksums = {name: "0" * 16 * -(-entry.nbytes // fmt.BLOCK_BYTES) for name, entry in entries.items()}
        try:
            fmt.encode_header(entries, fmt.tensor_metadata(self.tensors, self.aliases, self.left_out), checksums)
        except InvalidValueError as error:
            raise InvalidValueError(
                "model", f"{error}; it has {len(names):,} tensors: leave some out with include or exclude, or join them"
            ) from error

    def check(self, found: TrackedModel) -> None:
        """Raise a ModelMismatchError, naming the tensor, unless names, shapes, dtypes and roles are these."""
        for name in self.tensors:
            if name not in found.tensors:
                raise ModelMismatchError(f"tensor {name!r}", _why_missing(name, found))
        for name, tensor in found.tensors.items():
            if name not in self.tensors:
                raise ModelMismatchError(f"tensor {name!r}", self._why_new(name))
            if found.shapes[name] != self.shapes[name]:
                shapes = list(found.shapes[name]), list(self.shapes[name])
                raise ModelMismatchError(
                    f"tensor {name!r}", f"has the shape {shapes[0]}, and had {shapes[1]} when tracking began"
                )
            if tensor != self.tensors[name]:
                raise ModelMismatchError(f"tensor {name!r}", _why_other(tensor, self.tensors[name]))
        for alias in self.aliases.keys() | found.aliases.keys():
            if self.aliases.get(alias) != found.aliases.get(alias):
                raise ModelMismatchError(f"tensor {alias!r}", "is not tied to the tensor that it was tied to")

    def _why_new(self, name: str) -> str:
        if name in self.left_out:
            return (
                "is to be averaged now, but was left out when tracking began: it did not require gradients then; a "
                "hook with on_change='follow' takes it in"
            )
        return "is in the model, but was not when tracking began; a hook with on_change='follow' takes it in"


def _why_missing(name: str, found: TrackedModel) -> str:
    if name in found.frozen:
        return (
            "is tracked, but does not require gradients any more; a hook made with only_trainable=False takes "
            "parameters whether they do or not, one with on_change='follow' goes on without it"
        )
    return "is tracked, but the model has no such tensor to track"


def _why_other(found: TrackedTensor, tracked: TrackedTensor) -> str:
    if found.role != tracked.role:
        return f"is {_KEPT[found.role]} now, and was {_KEPT[tracked.role]} when tracking began"
    return (
        f"is {torch_dtype(found.dtype)}, and was {torch_dtype(tracked.dtype)} when tracking began; convert the model "
        "before the hook is made, or compute in half precision with torch.autocast, which leaves parameters as they "
        "are; a hook with on_change='follow' begins its average anew"
    )


_KEPT = {"average": "averaged", "copy": "copied"}


def check_model(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, or an InvalidValueError that says what it is instead."""
    if not isinstance(model, torch.nn.Module):
        raise InvalidValueError("model", f"must be a torch.nn.Module, not {type(model).__name__}")
    return model


def collect_tensors(model: torch.nn.Module, selection: Selection, also: frozenset[str] | None = None) -> ModelTensors:
    """Look through a model, wrapped or bare: the names are the same.

    Arguments:
        model: any module.
        selection: what the user wants of it.
        also: parameters that are taken though they do not require gradients.

    Raises:
        InvalidValueError: nothing to average, or a tensor that cannot be averaged or stored, by name.
    """
    averaged: dict[str, torch.Tensor] = {}
    copied: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    left_out = list(_extra_state_names(check_model(model)))
    frozen: set[str] = set()
    first_name: dict[int, str] = {}
    tensors = named_tensors(model)
    # A tied parameter is one tensor: any of its names will do.
    copy_only = {id(found.tensor) for found in tensors if selection.copies(found.name)}
    for found in tensors:
        name, tensor = found.name, found.tensor
        is_copied = id(tensor) in copy_only
        if not found.in_state:
            continue
        if not selection.names(name) or (not found.is_parameter and selection.buffers == "skip"):
            left_out.append(name)
            continue
        wanted = not selection.only_trainable or tensor.requires_grad or is_copied or name in (also or ())
        if found.is_parameter and not wanted:
            left_out.append(name)
            frozen.add(name)
            continue
        _check_name(found)
        stored = first_name.setdefault(id(tensor), name)
        if stored != name:
            aliases[name] = stored
            continue
        _check_dense(name, tensor)
        (averaged if not is_copied and _is_averaged(found, selection) else copied)[name] = tensor.detach()
    if not averaged:
        raise _nothing_to_average(selection, bool(frozen))
    return ModelTensors(averaged, copied, aliases, tuple(left_out), frozenset(frozen))


def nonfinite_name(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The first tensor that holds a nan or an infinity; while none does, one synchronisation a device and dtype.

    The 2-norm is the cheapest sum that no nan and no infinity can hide in. It may overflow where all values are
    finite: then the largest magnitude decides.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() > 0:
            groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    bad: set[str] = set()
    for names in groups.values():
        group = [_with_arithmetic(tensors[name]) for name in names]
        if bool(torch.isfinite(torch.stack(torch._foreach_norm(group, 2))).all()):
            continue
        finite = torch.isfinite(torch.stack(torch._foreach_norm(group, float("inf"))))
        if not bool(finite.all()):
            bad.update(name for name, fine in zip(names, finite.tolist(), strict=True) if not fine)
    return next((name for name in tensors if name in bad), None)


def _with_arithmetic(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in EIGHT_BITS else tensor


def _extra_state_names(model: torch.nn.Module) -> Iterator[str]:
    """Names of state that is no tensor (`get_extra_state`)."""
    plain = torch.nn.Module.get_extra_state
    seen: set[int] = set()
    for place in named_modules(model):
        module = place.module
        if id(module) not in seen and wrapped_child(module) is None and type(module).get_extra_state is not plain:
            yield f"{place.path}._extra_state" if place.path else "_extra_state"
        seen.add(id(module))


def _is_averaged(found: NamedTensor, selection: Selection) -> bool:
    """Whether a tensor is averaged, or else copied.

    Raises:
        InvalidValueError: it should be averaged and cannot be, by name.
    """
    if not found.is_parameter:
        return selection.buffers == "average" and found.tensor.dtype in AVERAGED_DTYPES
    name, tensor = found.name, found.tensor
    if tensor.is_complex():
        raise InvalidValueError(
            "parameter",
            "is complex, and only real numbers are averaged; let the model hold torch.view_as_real of "
            f"it, have it copied with copy_only={name!r}, or leave it out with exclude={name!r}",
            value=f"{name!r}",
        )
    if tensor.is_floating_point() and tensor.dtype not in AVERAGED_DTYPES:
        raise InvalidValueError(
            "parameter",
            f"dtype {tensor.dtype} cannot be averaged; "
            f"{', '.join(str(d).removeprefix('torch.') for d in AVERAGED_DTYPES)} can",
            value=f"{name!r}",
        )
    return tensor.is_floating_point()


def _check_name(found: NamedTensor) -> None:
    """Raise an InvalidValueError for the one name that no tensor in a safetensors file can have."""
    if found.name == "__metadata__":
        raise InvalidValueError(
            f"{('parameter' if found.is_parameter else 'buffer')} {found.name!r}",
            "safetensors files keep this name for themselves, so that no snapshot can hold it; rename "
            f"it in the model, or leave it out with exclude={found.name!r}",
        )


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise an InvalidValueError for what has no values of its own, whole and here."""
    if torch.nn.parameter.is_lazy(tensor):
        raise InvalidValueError("tensor", "has no shape yet", "run a batch through the model first", value=f"{name!r}")
    if hasattr(tensor, "to_local"):
        raise InvalidValueError(
            "tensor",
            "is sharded over processes (DTensor), and sharded models cannot be tracked yet; "
            "DistributedDataParallel can",
            value=f"{name!r}",
        )
    if hasattr(tensor, "ds_id") and hasattr(tensor, "ds_tensor"):
        raise InvalidValueError(
            "tensor",
            "is sharded over processes (DeepSpeed ZeRO-3), which leaves a placeholder here, and "
            "sharded models cannot be tracked yet; ZeRO-1 and ZeRO-2 can",
            value=f"{name!r}",
        )
    if tensor.layout != torch.strided:
        raise InvalidValueError("tensor", f"is {tensor.layout}; only dense tensors can be tracked", value=f"{name!r}")
    if tensor.is_meta:
        raise InvalidValueError("tensor", ON_META, value=f"{name!r}")


def _nothing_to_average(selection: Selection, has_frozen: bool) -> InvalidValueError:
    if has_frozen or not (selection.include or selection.exclude or selection.copy_only):
        return InvalidValueError(
            "model",
            "has no parameter to average: none of floating-point values requires gradients",
            "only_trainable=False takes frozen ones too",
        )
    return InvalidValueError("model", "has no parameter to average: include, exclude and copy_only leave none")


# --- A model's tensors, looked through once, and again only when they are others than before -------


class WatchedModel:
    """The tensors that were found in a model, as long as they stay the same.

    What is compared at every update, in place of walking through the modules: the names and objects that the modules
    hold, where the parameters' values are and how they lie, their shapes, dtypes and whether they require gradients.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._contents: list[dict[str, Any]] = []
        self._filled: list[dict[str, Any]] = []
        self._state_tensors: list[torch.Tensor] = []
        self._held: list[object] = []
        self._state: tuple[object, ...] = ()
        self._tensors: ModelTensors | None = None

    def tensors(self, model: torch.nn.Module, collect: Callable[[torch.nn.Module], ModelTensors]) -> ModelTensors:
        """What `collect` finds in the model: the object of the last call, unless it had to be called again."""
        if self._tensors is not None and self._model is not None and self._model() is model and self._is_same():
            return self._tensors
        self._tensors = None
        found = collect(model)
        self._model = weakref.ref(model)  # it may go before the tracker does
        self._contents = [
            contents
            for module in model.modules()
            for contents in (module._parameters, module._buffers, module._modules)
        ]
        self._state_tensors = [*model.parameters(), *model.buffers()]
        self._filled = [contents for contents in self._contents if contents]
        self._held = [*chain.from_iterable(map(dict.values, self._filled))]
        self._state = self._now()
        self._tensors = found
        return found

    def _is_same(self) -> bool:
        return self._now() == self._state

    def _now(self) -> tuple[object, ...]:
        """What would be another if the tensors were others. `_held` keeps ids from being given again."""
        tensors = self._state_tensors
        return (
            [*map(len, self._contents)],
            [*chain.from_iterable(self._filled)],
            [*map(id, chain.from_iterable(map(dict.values, self._filled)))],
            [p.data_ptr() for p in tensors],
            [p.requires_grad for p in tensors],
            [p.dtype for p in tensors],
            [p.shape for p in tensors],
            [p.stride() for p in tensors if p.layout == torch.strided],
        )


# --- A run whose model changes while it is trained: the averages go on with what is as it was ------


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """A new segment: averages of tensors as they were go on, of others they begin with the present values.

    Attributes:
        tracked: what is tracked from now on.
        begun: names of the tensors whose averages begin.
    """

    tracked: TrackedModel
    begun: tuple[str, ...]


@torch.no_grad()
def find_change(tracked: TrackedModel, found: ModelTensors) -> Change:
    """How to go on with what a model has now, in place of what was tracked.

    Raises:
        NonFiniteError: a tensor holds nan or infinity, by name. A new average begins at an update, and this is none.
    """
    wanted = replace(TrackedModel.of_model(found), segment=tracked.segment + 1)
    wanted.check_header()
    begun = [name for name in found.averaged if not _same(name, tracked, wanted)]
    bad = nonfinite_name(found.averaged)
    if bad is not None and bad not in begun:
        raise NonFiniteError(f"parameter {bad!r}", "holds nan or infinity; no average has taken it in")
    if bad is not None:
        raise NonFiniteError(f"parameter {bad!r}", "is new, and holds nan or infinity; its average cannot begin")
    log.warning(
        "the model's tensors have changed: %s; a new segment of snapshots begins",
        "; ".join(filter(None, (_listed("new", begun), _listed("gone", _gone(tracked, wanted))))) or "tied names",
    )
    return Change(wanted, tuple(begun))


def _same(name: str, before: TrackedModel, now: TrackedModel) -> bool:
    return before.tensors.get(name) == now.tensors[name] and before.shapes.get(name) == now.shapes[name]


def _gone(before: TrackedModel, now: TrackedModel) -> list[str]:
    return [name for name in before.tensors if name not in now.tensors]


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what}: {', '.join(names[:5])}{more}" if names else ""
