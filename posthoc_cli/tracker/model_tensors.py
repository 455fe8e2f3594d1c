"""Which tensors of a model are averaged, which are copied, which are left out."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch

from posthoc_cli.errors import InvalidValueError, ModelMismatchError
from posthoc_cli.snapshots.format import TrackedTensor
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.tensors import stored_name

AVERAGED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a model's state, by the name they are stored under.

    Attributes:
        averaged: floating-point parameters.
        copied: persistent buffers, and parameters of whole numbers.
        aliases: further names of tensors above (tied parameters) -> the stored name.
        left_out: names in the model's state that are not tracked: frozen parameters, extra state.
    """

    averaged: dict[str, torch.Tensor]
    copied: dict[str, torch.Tensor]
    aliases: dict[str, str]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class TrackedModel:
    """What a run tracks of a model: the part of a snapshot's header that must not change."""

    tensors: Mapping[str, TrackedTensor]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    left_out: tuple[str, ...]

    @classmethod
    def of_model(cls, found: ModelTensors) -> TrackedModel:
        """What a model in memory would be stored as."""
        tensors, shapes = {}, {}
        for role, group in (("average", found.averaged), ("copy", found.copied)):
            for name, tensor in group.items():
                tensors[name] = TrackedTensor(role, stored_name(tensor.dtype, name))
                shapes[name] = tuple(tensor.shape)
        return cls(tensors, shapes, found.aliases, found.left_out)

    @classmethod
    def of_snapshot(cls, snapshot: Snapshot) -> TrackedModel:
        """What a snapshot says was tracked."""
        shapes = {name: entry.shape for name, entry in snapshot.header.tensors.items()}
        return cls(snapshot.info.tensors, shapes, snapshot.info.aliases, snapshot.info.left_out)

    def check(self, found: TrackedModel) -> None:
        """Raise a ModelMismatchError, naming the tensor, unless names, shapes, dtypes and roles are these."""
        for name in self.tensors:
            if name not in found.tensors:
                raise ModelMismatchError(f"tensor {name!r}: is tracked, but the model has no such tensor to track")
        for name, tensor in found.tensors.items():
            if name not in self.tensors:
                raise ModelMismatchError(f"tensor {name!r}: is in the model, but was not when tracking began")
            if found.shapes[name] != self.shapes[name]:
                raise ModelMismatchError(
                    f"tensor {name!r}: has the shape {list(found.shapes[name])}, tracked is {list(self.shapes[name])}"
                )
            if tensor != self.tensors[name]:
                raise ModelMismatchError(
                    f"tensor {name!r}: is {tensor.role} of {tensor.dtype}, "
                    f"tracked is {self.tensors[name].role} of {self.tensors[name].dtype}"
                )
        for alias in self.aliases.keys() | found.aliases.keys():
            if self.aliases.get(alias) != found.aliases.get(alias):
                raise ModelMismatchError(f"tensor {alias!r}: is not tied to the tensor that it was tied to")


def check_model(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, or an InvalidValueError that says what it is instead."""
    if not isinstance(model, torch.nn.Module):
        raise InvalidValueError(f"model: must be a torch.nn.Module, not {type(model).__name__}")
    return model


def collect_tensors(model: torch.nn.Module, only_trainable: bool, also: Container[str] = frozenset()) -> ModelTensors:
    """Look through a model.

    Arguments:
        model: any module.
        only_trainable: leave out parameters that do not require gradients,
        also: but not those of these names.

    Raises:
        InvalidValueError: nothing to average, or a parameter that cannot be, by name.
    """
    averaged: dict[str, torch.Tensor] = {}
    copied: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    left_out = list(_extra_state_names(check_model(model)))
    first_name: dict[int, str] = {}
    for name, tensor, is_parameter in _state_tensors(model):
        if is_parameter and only_trainable and not tensor.requires_grad and name not in also:
            left_out.append(name)
            continue
        stored = first_name.setdefault(id(tensor), name)
        if stored != name:
            aliases[name] = stored
        elif tensor.layout != torch.strided:
            raise InvalidValueError(f"tensor {name!r}: is {tensor.layout}; only dense tensors can be tracked")
        elif is_parameter and (tensor.is_floating_point() or tensor.is_complex()):
            averaged[name] = _checked(name, tensor)
        else:
            copied[name] = tensor.detach()
    if not averaged:
        raise InvalidValueError(
            "the model has no parameter to average: none of floating-point values requires gradients; "
            "only_trainable=False takes frozen ones too"
        )
    return ModelTensors(averaged, copied, aliases, tuple(left_out))


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
        group = [tensors[name] for name in names]
        if bool(torch.isfinite(torch.stack(torch._foreach_norm(group, 2))).all()):
            continue
        finite = torch.isfinite(torch.stack(torch._foreach_norm(group, float("inf"))))
        if not bool(finite.all()):
            bad.update(name for name, fine in zip(names, finite.tolist(), strict=True) if not fine)
    return next((name for name in tensors if name in bad), None)


def _state_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, is a parameter) of everything in the state dict, tied names included."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, True
    transient = {
        f"{path}.{key}" if path else key
        for path, module in model.named_modules(remove_duplicate=False)
        for key in module._non_persistent_buffers_set
    }
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in transient:
            yield name, buffer, False


def _extra_state_names(model: torch.nn.Module) -> Iterator[str]:
    """Names of state that is no tensor (`get_extra_state`)."""
    plain = torch.nn.Module.get_extra_state
    for path, module in model.named_modules():
        if type(module).get_extra_state is not plain:
            yield f"{path}._extra_state" if path else "_extra_state"


def _checked(name: str, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
        raise InvalidValueError(f"parameter {name!r}: has no shape yet; run a batch through the model first")
    if parameter.dtype not in AVERAGED_DTYPES:
        raise InvalidValueError(
            f"parameter {name!r}: dtype {parameter.dtype} cannot be averaged; "
            f"{', '.join(str(d).removeprefix('torch.') for d in AVERAGED_DTYPES)} can"
        )
    if parameter.is_meta:
        raise InvalidValueError(f"parameter {name!r}: is on the meta device and has no values to average")
    if hasattr(parameter, "to_local"):
        raise InvalidValueError(
            f"parameter {name!r}: is sharded over processes (DTensor); give the hook whole parameters"
        )
    return parameter.detach()
