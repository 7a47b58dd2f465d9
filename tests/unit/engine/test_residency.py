"""Slots: one adapter in one slot, the least recently used goes first, pinned ones stay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atelier_server.core import CheckpointId
from atelier_server.engine.residency import Residency


def checkpoint(number: int) -> CheckpointId:
    return CheckpointId(f"a{number}", 1, 0)


def test_the_least_recently_used_is_evicted() -> None:
    residency = Residency(2)
    first, _ = residency.acquire(checkpoint(1), frozenset())
    residency.acquire(checkpoint(2), frozenset())
    residency.acquire(checkpoint(1), frozenset())
    slot, needs_load = residency.acquire(checkpoint(3), frozenset())
    assert needs_load
    assert slot != first
    assert residency.slot(checkpoint(2)) is None
    assert residency.evictions == 1


def test_a_pinned_adapter_is_not_evicted() -> None:
    residency = Residency(2)
    residency.acquire(checkpoint(1), frozenset())
    residency.acquire(checkpoint(2), frozenset())
    residency.acquire(checkpoint(3), frozenset({checkpoint(1), checkpoint(3)}))
    assert residency.resident == (checkpoint(1), checkpoint(3))


def test_a_released_slot_is_free_again() -> None:
    residency = Residency(1)
    slot, _ = residency.acquire(checkpoint(1), frozenset())
    assert residency.release([checkpoint(1), checkpoint(9)]) == [slot]
    assert residency.acquire(checkpoint(2), frozenset()) == (slot, True)
    assert residency.evictions == 0


@given(
    slots=st.integers(1, 5),
    batches=st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=5), max_size=30),
)
def test_every_batch_that_is_admitted_lies_in_slots_of_its_own(slots: int, batches: list[set[int]]) -> None:
    residency = Residency(slots)
    contents: dict[int, CheckpointId] = {}
    for numbers in batches:
        pinned = frozenset(checkpoint(n) for n in numbers)
        if not residency.can_admit(pinned):
            assert len(pinned) > slots
            continue
        taken = {}
        for wanted in sorted(pinned):
            slot, needs_load = residency.acquire(wanted, pinned)
            if needs_load:
                contents[slot] = wanted
            assert contents[slot] == wanted
            taken[slot] = wanted
        assert len(taken) == len(pinned)
        assert all(1 <= slot <= slots for slot in taken)
        assert len(residency.resident) <= slots


def test_who_is_pinned_for_good_outlives_every_batch() -> None:
    residency = Residency(3)
    residency.acquire(checkpoint(1), frozenset())
    residency.pin(checkpoint(1))
    for number in range(2, 9):
        residency.acquire(checkpoint(number), frozenset({checkpoint(number)}))
    assert residency.slot(checkpoint(1)) is not None
    assert residency.can_admit({checkpoint(1), checkpoint(2), checkpoint(3)})
    assert not residency.can_admit({checkpoint(2), checkpoint(3), checkpoint(4)})
    residency.unpin([checkpoint(1)])
    assert residency.can_admit({checkpoint(2), checkpoint(3), checkpoint(4)})
    residency.acquire(checkpoint(9), frozenset({checkpoint(7), checkpoint(8)}))
    assert residency.slot(checkpoint(1)) is None
