"""What the snapshots of a run say alike, held once in memory: there may be thousands, each naming every tensor."""

from __future__ import annotations

from dataclasses import replace

from posthoc_cli.snapshots.reader import Snapshot


class Sharing:
    """Snapshots, one after another, each with what it has in common with the one before."""

    def __init__(self) -> None:
        self._last: Snapshot | None = None

    def __call__(self, snapshot: Snapshot) -> Snapshot:
        """The same snapshot; what it says of its tensors is the last one's object, where that is equal."""
        last, self._last = self._last, snapshot
        if last is None:
            return snapshot
        texts, own, info = last.header.metadata, snapshot.header, snapshot.info
        metadata = {key: texts[key] if texts.get(key) == text else text for key, text in own.metadata.items()}
        entries = last.header.tensors if own.tensors == last.header.tensors else own.tensors
        tensors = last.info.tensors if info.tensors == last.info.tensors else info.tensors
        self._last = replace(
            snapshot,
            header=replace(own, metadata=metadata, tensors=entries),
            info=replace(info, tensors=tensors),
        )
        return self._last
