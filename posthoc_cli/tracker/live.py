"""The running averages as a source of a synthesis, beside the snapshots on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import torch

from posthoc_cli.snapshots.format import SnapshotInfo


@dataclass(frozen=True)
class LiveSource:
    """One running average, with the copies that belong to it. Reading it copies nothing but buffers."""

    info: SnapshotInfo
    averages: Mapping[str, torch.Tensor]
    copies: Mapping[str, torch.Tensor]

    @property
    def name(self) -> str:
        """A word for it, where a snapshot has a file name."""
        return f"live average of sigma_rel {self.info.sigma_rel:g}"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of its tensors."""
        return {name: tuple(tensor.shape) for name, tensor in {**self.averages, **self.copies}.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in {**self.averages, **self.copies}.values())

    def open(self) -> LiveSource:
        """Itself: there is nothing to open."""
        return self

    def read(self, name: str) -> torch.Tensor:
        """One tensor; a copy of a buffer, since callers keep those as they are."""
        return self.averages[name] if name in self.averages else self.copies[name].clone()

    def __enter__(self) -> LiveSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
