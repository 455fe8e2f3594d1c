"""Synthesized weights in Python: as a state dict, and swapped into a live model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from itertools import chain, islice, pairwise
from types import TracebackType
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import swa_utils

from posthoc_cli.dtypes import DTYPES
from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NonFiniteError, NotReadyError
from posthoc_cli.snapshots.tensors import torch_dtype
from posthoc_cli.synthesis.engine import NoWriter, synthesize, synthesize_into
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.synthesis.tiles import Tile
from posthoc_cli.tracker.model_tensors import ON_META, check_model, swapped
from posthoc_cli.tracker.names import NamedTensor, is_fsdp, named_tensors

Arguments = ParamSpec("Arguments")
Given = TypeVar("Given")


class Block(Generic[Given]):
    """A context manager for `with` only: any other use is an error that shows the statement to write."""

    def __init__(self, name: str, opened: AbstractContextManager[Given]) -> None:
        self._name = name
        self._opened = opened

    def __enter__(self) -> Given:
        return self._opened.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._opened.__exit__(kind, error, trace)

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Raise a NotReadyError: only what the block gives can be called."""
        raise NotReadyError(f"{self._name}(...)", self._advice("averaged(...)"))

    def __reduce__(self) -> NoReturn:
        raise NotReadyError(f"{self._name}(...)", self._advice("torch.save(averaged.state_dict(), ...)"))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{self._name}(...): {self._advice(f'averaged.{name}')}")

    def _advice(self, use: str) -> str:
        return (
            f"is for a `with` statement, such as `with ema.{self._name}(...) as averaged: {use}`; "
            "load_into fills a model for good"
        )


def in_block(make: Callable[Arguments, Iterator[Given]]) -> Callable[Arguments, Block[Given]]:
    """As `contextlib.contextmanager`, but for a `Block`, which is no decorator."""
    opened = contextmanager(make)

    @wraps(make)
    def begin(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Block[Given]:
        return Block(make.__name__, opened(*args, **kwargs))

    return begin


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], own_dtypes: bool = True) -> None:
    """Copy `weights` into a model's parameters and buffers.

    Arguments:
        model: any module with tensors of these names and shapes, wrapped or bare; its other tensors do not change.
        weights: tensors by name.
        own_dtypes: whether the model keeps its dtypes and is changed in place; else it takes the dtypes of `weights`.

    Raises:
        ModelMismatchError: the model has no such tensor, or in another shape; nothing is changed.
        NonFiniteError: a value is too large for the model's dtype; nothing is changed.
    """
    targets = weight_targets(model, {name: tuple(value.shape) for name, value in weights.items()})
    with torch.inference_mode(False), torch.no_grad():
        for name, target in targets.items() if own_dtypes else ():
            check_fits(name, weights[name], target.tensor.dtype)
        for name, target in targets.items():
            load_weight(target.tensor, weights[name], own_dtypes)


def load_weight(target: torch.Tensor, value: torch.Tensor, own_dtype: bool) -> None:
    """Copy one value into a model's tensor; see `load_weights`."""
    if not _is_writable(target):
        target.data = value.to(target.device, target.dtype, copy=True)
    elif own_dtype or value.dtype == target.dtype:
        target.data.copy_(value)
    else:
        target.data = value.to(target.device, copy=True)


def check_fits(name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Check that a model's dtype, if its range is smaller, can hold the values of a tensor.

    Raises:
        NonFiniteError: naming the tensor.
    """
    both = values.dtype.is_floating_point and dtype.is_floating_point
    if not both or torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return
    lost = values.isfinite() & ~values.to(dtype).float().isfinite()
    if bool(lost.any()):
        largest = float(values[lost].abs().max())
        raise NonFiniteError(
            f"tensor {name!r}",
            f"the model's {dtype} cannot hold its largest value, {largest:.6g}; dtype=torch.float32 "
            "changes the model's",
        )


@contextmanager
def swapped_in(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], own_dtypes: bool = True) -> Iterator[None]:
    """Give the model `weights` and eval mode for the block; afterwards everything is as before, also on an error.

    This restores the swapped weights, gradients, buffers, the train or eval mode of each module, and the device. The
    model's own values are kept in host memory meanwhile, so that an accelerator holds no second copy. Arguments as in
    `load_weights`.
    """
    targets = weight_targets(model, {name: tuple(value.shape) for name, value in weights.items()})
    for name, target in targets.items():
        if target.tensor.is_meta:
            raise InvalidValueError("tensor", *ON_META, value=f"{name!r}")
    if not own_dtypes:
        check_dtypes_free(model, ", ".join(sorted({str(weights[name].dtype) for name in targets})))
    held = _holders(model, {id(target.registered) for target in targets.values()})
    with ExitStack() as stack:
        swapped.append(held)
        stack.callback(swapped.remove, held)
        new_dtypes = {id(target.registered): weights[name].dtype for name, target in targets.items()}
        with torch.inference_mode(False), torch.no_grad():
            _save(stack, model, new_dtypes, own_dtypes)
        # A gradient of the model's own weights is none of the averaged ones, and may not have their dtype.
        for parameter in model.parameters():
            parameter.grad = None
        load_weights(model, weights, own_dtypes)
        model.eval()
        yield


def _holders(model: torch.nn.Module, tensors: set[int]) -> frozenset[int]:
    """Ids of these tensors and of the modules that hold them: the tensors may be replaced while they are swapped."""
    modules = {
        id(module)
        for module in model.modules()
        if any(id(tensor) in tensors for tensor in chain(module._parameters.values(), module._buffers.values()))
    }
    return frozenset(tensors | modules)


def _is_writable(tensor: torch.Tensor) -> bool:
    """Whether values can be copied into a tensor: not where elements share memory (expanded), or in sparse layouts."""
    return tensor.layout == torch.strided and all(
        stride > 0 or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _save(stack: ExitStack, model: torch.nn.Module, new_dtypes: Mapping[int, torch.dtype], own_dtypes: bool) -> None:
    """Push what restores the model onto the stack, which runs all of it even if one callback fails."""
    for module in model.modules():
        stack.callback(setattr, module, "training", module.training)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                swapped = id(parameter) in new_dtypes
                in_place = not swapped or own_dtypes or new_dtypes[id(parameter)] == parameter.dtype
                _save_parameter(stack, module, key, parameter, swapped, in_place)
        for key in module._buffers:
            _save_buffer(stack, module, key)


def weight_targets(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NamedTensor]:
    """The model's tensors of these names and shapes.

    Raises:
        ModelMismatchError: naming the tensor that the model does not have, or has in another shape.
    """
    tensors = {found.name: found for found in named_tensors(check_model(model))}
    for name, shape in shapes.items():
        if name not in tensors:
            raise ModelMismatchError(f"tensor {name!r}", "is in the averaged weights, but the model has no such tensor")
        if tuple(tensors[name].tensor.shape) != shape:
            raise ModelMismatchError(
                f"tensor {name!r}",
                f"has the shape {list(tensors[name].tensor.shape)} in the model, {list(shape)} in the averaged weights",
            )
    return {name: tensors[name] for name in shapes}


def check_dtypes_free(model: torch.nn.Module, dtype: torch.dtype | str) -> None:
    """Raise an InvalidValueError where the model's tensors cannot take another dtype: FSDP keeps them end to end."""
    if any(is_fsdp(module) for module in model.modules()):
        raise InvalidValueError("dtype", "a model under FSDP keeps the dtypes it has", "leave dtype out", value=dtype)


def _save_parameter(
    stack: ExitStack, module: torch.nn.Module, key: str, parameter: torch.nn.Parameter, swapped: bool, in_place: bool
) -> None:
    """Save a parameter's storage and, if its values will change, a copy of them in host memory."""
    device, grad, requires_grad = parameter.device, parameter.grad, parameter.requires_grad
    # The storage itself is kept, unless it is to be replaced by one of another dtype.
    storage = parameter.data if in_place else None
    values = parameter.data.to("cpu", copy=True) if swapped else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore() -> None:
        # Moving a module between kinds of devices may replace the Parameter itself.
        module._parameters[key] = parameter
        if storage is not None:
            parameter.data = storage if values is None else storage.copy_(values)
        elif values is not None:
            parameter.data = values.to(device)
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad

    stack.callback(restore)


def _save_buffer(stack: ExitStack, module: torch.nn.Module, key: str) -> None:
    """Save a buffer and a copy of its values in host memory."""
    buffer = module._buffers[key]
    storage = None if buffer is None else buffer.data
    # On meta there are no values to save, nor can any be written.
    writable = storage is not None and not storage.is_meta and _is_writable(storage)
    values = storage.to("cpu", copy=True) if storage is not None and writable else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore() -> None:
        module._buffers[key] = buffer
        if buffer is not None and storage is not None:
            buffer.data = storage if values is None else storage.copy_(values)

    stack.callback(restore)


def fill_model(model: torch.nn.Module, plan: Plan, device: torch.device | str = "cpu") -> None:
    """Fill a model's own tensors with the first target of a plan.

    Everything is computed and dropped once before the first tensor changes, so that a damaged snapshot, a value that
    is not finite or a model that does not fit leaves the model as it was. That takes twice the time, and no memory.

    Arguments:
        model: with tensors of the plan's names and shapes; others of its tensors are left alone.
        plan: of one target; without a dtype of its own the model keeps its dtypes.
        device: where tensors that are on `meta` are created.

    Raises:
        ModelMismatchError: naming the tensor, before anything is changed.
        FileFormatError, NonFiniteError: as `synthesize`, before anything is changed.
    """
    shapes = {spec.name: spec.shape for spec in plan.specs()}
    targets = weight_targets(model, shapes)
    if plan.dtype is not None:
        check_dtypes_free(model, DTYPES[plan.dtype].torch_name)
    room = _usable_device(device)
    dtypes = {name: target.tensor.dtype for name, target in targets.items()} if plan.dtype is None else {}
    for _ in synthesize_into(plan, lambda tile: [_Fitting(tile, dtypes, plan.names)]):
        pass
    with torch.inference_mode(False), torch.no_grad():
        made = synthesize(plan)
        first = list(islice(made, 1))  # all files are open now, so that none can go any more
        _materialise(model, set(shapes), room)
        targets = weight_targets(model, shapes)
        for name, (value,) in chain(first, made):
            load_weight(targets[name].tensor, value, own_dtype=plan.dtype is None)
    _warn_of_the_rest(model)


class _Fitting(NoWriter):
    """Drops results after a check that the model's tensors can hold them."""

    def __init__(self, tile: Tile, dtypes: Mapping[str, torch.dtype], names: Mapping[str, Sequence[str]]) -> None:
        self._pieces = [
            (name, dtypes[name], start, end)
            for piece, (start, end) in zip(tile.pieces, pairwise(tile.bounds), strict=True)
            for name in names[piece.name]
            if dtypes and dtypes[name] != torch_dtype(tile.dtype)
        ]

    def write(self, begin: int, values: torch.Tensor) -> None:
        """Check the values instead of writing them."""
        for name, dtype, start, end in self._pieces:
            check_fits(name, values[max(0, start - begin) : max(0, end - begin)], dtype)


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).split("\n")[0]
        raise InvalidValueError("device", f"cannot be used: {reason}", value=f"{str(device)!r}") from error


def _materialise(model: torch.nn.Module, filled: set[str], device: torch.device) -> None:
    """Give room to tensors on `meta` that will be filled; tied ones stay tied, under whatever names."""
    named = named_tensors(model)
    old = {id(found.registered): found.registered for found in named if found.tensor.is_meta and found.name in filled}
    new = {key: torch.empty_like(tensor, device=device) for key, tensor in old.items()}
    for key, tensor in old.items():
        if isinstance(tensor, torch.nn.Parameter):
            new[key] = torch.nn.Parameter(new[key], tensor.requires_grad)
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if id(value) in new:
                    own[name] = new[id(value)]  # type: ignore[assignment]


def _warn_of_the_rest(model: torch.nn.Module) -> None:
    on_meta = {id(found.registered): found.name for found in named_tensors(model) if found.registered.is_meta}
    left = list(on_meta.values())
    if left:
        warnings.warn(
            f"on meta still, since no average fills them: {', '.join(left[:10])}"
            f"{f' and {len(left) - 10} more' if len(left) > 10 else ''}; give them values before the model is used",
            RuntimeWarning,
            stacklevel=4,
        )


@torch.no_grad()
def update_bn(model: torch.nn.Module, loader: Iterable[Any]) -> None:
    """Recompute the statistics of a model's BatchNorm layers in one pass over `loader`, each batch counting alike.

    See `torch.optim.swa_utils.update_bn`. Modes and momenta are restored afterwards; after an error statistics, too.

    Arguments:
        model: in any mode, on any device.
        loader: gives the model's inputs, or lists or tuples that begin with them; tensors on any device. It is not read
            if there are no BatchNorm layers.

    Raises:
        InvalidValueError: not a model, or a loader that gives nothing.
    """
    layers = [module for module in check_model(model).modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    first = next(model.parameters(), next(model.buffers(), None))
    count = 0

    def inputs() -> Iterator[Any]:
        nonlocal count
        for count, batch in enumerate(loader, 1):  # noqa: B007  # read below
            yield _moved(
                batch[0] if isinstance(batch, list | tuple) else batch, None if first is None else first.device
            )

    with ExitStack() as always, ExitStack() as on_error:
        for module in model.modules():
            always.callback(setattr, module, "training", module.training)
        for layer in layers:
            always.callback(setattr, layer, "momentum", layer.momentum)
            for buffer in layer.buffers(recurse=False):
                on_error.callback(buffer.copy_, buffer.clone())
        swa_utils.update_bn(inputs(), model)
        if not count:
            raise InvalidValueError("update_bn", "the loader gave no batch to measure BatchNorm statistics on")
        on_error.pop_all()


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
