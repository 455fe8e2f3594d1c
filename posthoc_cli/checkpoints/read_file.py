"""Files of tensors that other programs wrote: safetensors, or what `torch.save` and `pickle.dump` make.

A file is indexed once, and its tensors are then read from where they are. Such files have no checksums of blocks: what
tells that a file is still the one that was indexed is its size, the places of its tensors, and a sample of its content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli.checkpoints.read_pickle import Node, read_pickled
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.directory import PICKLES
from posthoc_cli.snapshots.headers import decode_header, file_kind
from posthoc_cli.snapshots.reading import sampled_identity
from posthoc_cli.snapshots.tensor_file import OpenedFile, read_start

ENDINGS = (fmt.SUFFIX, *PICKLES, ".pth.tar")

PARAMETERS = "shadow_params"
"""Under which averages are a list, in the order of the model's parameters."""
_MOST_VALUES = 1_000_000
_DEEPEST = 100


@dataclass(frozen=True)
class IndexedFile:
    """What a file holds.

    Attributes:
        content: tensors (`TensorEntry`), numbers, texts, and nodes in place of tensors that are not read, by the keys
            that lead to each.
        metadata: of a safetensors file; else empty.
        identity: 16 hexadecimal digits, of its size and a sample of its content.
    """

    content: Mapping[tuple[str, ...], Any]
    metadata: Mapping[str, str]
    identity: str


def index_file(path: Path) -> IndexedFile:
    """Find the tensors of a file that is no snapshot or state. A FileFormatError names it and says what is wrong."""
    with OpenedFile(path) as file:
        if path.suffix != fmt.SUFFIX:
            return IndexedFile(_leaves(path, read_pickled(file, 0, file.size)), {}, sampled_identity(file))
        header = decode_header(path, read_start(file), file.size)
        if file_kind(header) in ("snapshot", "state"):
            raise FileFormatError(path, f"is a {file_kind(header)} of this package, no checkpoint")
        found: dict[tuple[str, ...], Any] = {
            (name,): replace(entry, begin=header.payload_start + entry.begin) for name, entry in header.tensors.items()
        }
        return IndexedFile(found, header.metadata, sampled_identity(file))


def _leaves(path: Path, value: Any) -> dict[tuple[str, ...], Any]:
    """The tensors, numbers and texts within dicts, and those of averages in lists, by the keys that lead to each.

    A tensor of a kind that is not read (sparse, quantized, spread over processes) stays a node. The names of modules
    within a pickled module are one key, joined by dots, as in a state dict.
    """
    found: dict[tuple[str, ...], Any] = {}
    left: list[tuple[tuple[str, ...], Any, int, bool]] = [((), value, 0, False)]
    count = 0
    while left:
        keys, one, depth, within = left.pop()
        if isinstance(one, list) and keys[-1:] == (PARAMETERS,):
            one = dict(enumerate(one))
        if not isinstance(one, dict) or (isinstance(one, Node) and one.name.startswith("torch._utils._rebuild")):
            if isinstance(one, Node | fmt.TensorEntry | int | float | str):
                found[keys] = one
        elif depth < _DEEPEST:
            module = _module_tensors(one) if isinstance(one, Node) else None
            is_module, held = module is not None, module or one
            count += len(held)
            if count > _MOST_VALUES:
                raise FileFormatError(path, f"cannot be read as tensors: holds more than {_MOST_VALUES:,} values")
            for key in reversed(held):
                if isinstance(key, str | int):
                    name = (*keys[:-1], f"{keys[-1]}.{key}") if is_module and within else (*keys, str(key))
                    left.append((name, held[key], depth + 1, is_module))
    return found


def _module_tensors(node: Node) -> dict[Any, Any] | None:
    """The parameters, buffers and inner modules of a pickled torch module; None of something else.

    Its attributes are its state, or are among what it is made of, also one level further down under `state`.
    """
    for value in (node.state, *node.arguments):
        for state in (value, value.get("state")) if isinstance(value, dict) else ():
            if isinstance(state, dict) and {"_parameters", "_buffers", "_modules"} <= state.keys():
                own = [state[key] for key in ("_parameters", "_buffers", "_modules")]
                held = {key: value for part in own if isinstance(part, dict) for key, value in part.items()}
                unsaved = state.get("_non_persistent_buffers_set")
                names = {key for key in unsaved if isinstance(key, str)} if isinstance(unsaved, list) else set()
                return {key: held[key] for key in held if key not in names}
    return None


def names_in(names: Sequence[str]) -> str:
    """A few names for a message."""
    return ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
