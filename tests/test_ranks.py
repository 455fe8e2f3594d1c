"""Which process of a job is named when one has died, without processes."""

from __future__ import annotations

import pytest
from torch.distributed import HashStore

from posthoc_cli.errors import RankError
from posthoc_cli.synthesis import ranks
from posthoc_cli.synthesis.ranks import Ranks


@pytest.mark.parametrize(
    ("began", "said"),
    [
        ((0, 2), "^rank 0 has died: it gives no sign of life$"),
        ((2,), "^rank 2 has died: it gives no sign of life$"),
        ((), "^rank 0 and rank 2 never began: died, or ended by the launcher$"),
    ],
)
def test_a_process_that_the_launcher_ends_names_the_dead_and_not_those_that_were_ended_too(
    monkeypatch: pytest.MonkeyPatch, began: tuple[int, ...], said: str
) -> None:
    monkeypatch.setattr(ranks, "BEAT", 0.02)
    monkeypatch.setattr(ranks, "FAREWELL", 0.1)
    store = HashStore()
    for rank in began:
        store.add(f"ema/beat/{rank}", 3)
    with pytest.raises(RankError, match=said), Ranks(1, 3, store):
        raise SystemExit(143)
