"""Names of PEFT's adapters: those that PEFT's own loading takes. PEFT is asked; nothing of it is repeated here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Place(Protocol):
    """A module and the paths to it; see `naming.NamedModule`."""

    @property
    def path(self) -> str:
        """Without wrappers."""
        ...

    @property
    def raw(self) -> str:
        """As torch names it."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """Itself."""
        ...


@dataclass(frozen=True)
class AdapterRoot:
    """A module with one adapter in it, or a PeftModel around one.

    Attributes:
        path, raw: see `naming.NamedModule`.
        module: what PEFT is asked about.
        adapter: the adapter's name, which its tensors' names do not have where PEFT has saved them.
    """

    path: str
    raw: str
    module: torch.nn.Module
    adapter: str

    def saved_names(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """The names that PEFT saves the adapter's tensors under, by the names in the module."""
        from peft import get_peft_model_state_dict

        # An object for each name, so that what comes back tells where it was.
        state = {name: tensor.detach() for name, tensor in tensors.items()}
        names = {id(tensor): name for name, tensor in state.items()}
        saved = get_peft_model_state_dict(
            self.module, state_dict=dict(state), adapter_name=self.adapter, save_embedding_layers=False
        )
        return {names[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in names}


def adapter_roots(places: Sequence[Place]) -> Iterator[AdapterRoot]:
    """The outermost modules with an adapter each.

    With several adapters in a module names stay as they are, with the adapter's in them: without it they would be the
    same. So do those of prompt learning, which PEFT saves computed.
    """
    if "peft" not in sys.modules:
        return
    found: list[str] = []
    for place in places:
        if any(place.raw == raw or place.raw.startswith(f"{raw}." if raw else "") for raw in found):
            continue
        configs = _configs(place.module)
        if configs:
            found.append(place.raw)
            adapter, config = next(iter(configs.items()))
            if len(configs) == 1 and not config.is_prompt_learning:
                yield AdapterRoot(place.path, place.raw, place.module, adapter)


def _configs(module: torch.nn.Module) -> Mapping[str, Any]:
    """The adapters that a module says it has."""
    from peft import PeftConfig, PeftModel

    # Not `getattr`: wrappers hand on what they wrap.
    configs = module.peft_config if isinstance(module, PeftModel) else vars(module).get("peft_config")
    if not isinstance(configs, Mapping):
        return {}
    return {name: config for name, config in configs.items() if isinstance(config, PeftConfig)}
