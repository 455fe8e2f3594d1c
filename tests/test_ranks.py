"""The processes of a job end together, and name the one that failed or died; here they are threads, or absent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from posthoc_cli.errors import RankError
from posthoc_cli.export import ranks
from posthoc_cli.export.ranks import Ranks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "FAREWELL", 0.2)
    monkeypatch.setattr(ranks, "PATIENCE", 0.2)


@pytest.mark.parametrize(
    ("alive", "said"), [((0, 2), None), ((0,), "rank 2: has died"), ((), "rank 0 and rank 2: died, or never began")]
)
def test_a_process_that_the_launcher_ends_names_those_that_do_not_answer(
    alive: tuple[int, ...], said: str | None
) -> None:
    store = HashStore()
    for rank in alive:
        store.set(f"left/{rank}", "1")
    with pytest.raises(SystemExit if said is None else RankError) as raised, Ranks(1, 3, store):
        raise SystemExit(143)
    assert str(raised.value) == (said or "143")


def test_a_failure_stops_those_that_work_and_those_that_wait() -> None:
    store = HashStore()
    with pytest.raises(ValueError, match="broken"), Ranks(1, 3, store):
        raise ValueError("broken")
    with pytest.raises(RankError) as raised, Ranks(0, 3, store) as working:
        working.check()
    assert (raised.value.subject, raised.value.reason) == ("rank 1", "failed: broken")
    with pytest.raises(RankError, match="rank 1"), Ranks(2, 3, store) as waiting:
        waiting.finish(lambda: None)


def test_a_rank_that_does_not_come_is_named_when_the_time_is_up() -> None:
    store = HashStore()
    store.set("ready/1", "1")
    with pytest.raises(RankError) as raised, Ranks(0, 3, store) as rank:
        rank.finish(lambda: pytest.fail("finished without rank 2"))
    assert raised.value.subject == "rank 2"


def test_the_first_rank_begins_and_finishes_alone_and_all_wait_for_it() -> None:
    store, done = HashStore(), list[str]()

    def work(number: int) -> list[str]:
        with Ranks(number, 3, store) as rank:
            rank.begin(lambda: done.append(f"begun by {number}"))
            seen = list(done)
            rank.finish(lambda: done.append(f"finished by {number}"))
            return seen + done

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
    assert found == [["begun by 0", "begun by 0", "finished by 0"]] * 3
