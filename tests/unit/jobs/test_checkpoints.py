"""Which checkpoints a recipe keeps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atelier_server.adapters.records import CheckpointRecord
from atelier_server.core import CheckpointId, Recipe
from atelier_server.jobs.checkpoints import superseded


def records(steps: list[int], tagged: frozenset[int] = frozenset()) -> list[CheckpointRecord]:
    return [
        CheckpointRecord(
            CheckpointId("otto", 1, step),
            *("", "", 0, 0.0, None, 0, 0.0),
            tags=("production",) if step in tagged else (),
        )
        for step in steps
    ]


def kept(steps: list[int], *, tagged: frozenset[int] = frozenset(), **fields: int) -> list[int]:
    found = records(steps, tagged)
    gone = superseded(found, Recipe(instance_prompt="p", resolution=64, **fields))  # type: ignore[arg-type]
    return [record.id.step for record in found if record not in gone]


def test_all_are_kept_unless_the_recipe_says_otherwise() -> None:
    assert kept([1, 2, 3]) == kept([1, 2, 3], keep_every=2) == [1, 2, 3]


def test_the_last_ones_every_so_many_and_the_tagged_are_kept() -> None:
    steps = list(range(50, 501, 50))
    assert kept(steps, keep_last=1) == [500]
    assert kept(steps, keep_last=3) == [400, 450, 500]
    assert kept(steps, keep_last=1, keep_every=200) == [200, 400, 500]
    assert kept(steps, keep_last=1, tagged=frozenset({150})) == [150, 500]
    assert kept([50], keep_last=1) == [50]
    assert kept([], keep_last=1) == []


@given(st.sets(st.integers(1, 50)), st.integers(1, 5), st.integers(0, 10), st.frozensets(st.integers(1, 50)))
def test_the_newest_always_stays_and_pruning_again_changes_nothing(
    steps: set[int], keep_last: int, keep_every: int, tagged: frozenset[int]
) -> None:
    ordered = sorted(steps)
    left = kept(ordered, keep_last=keep_last, keep_every=keep_every, tagged=tagged)
    assert left[-keep_last:] == ordered[-keep_last:]
    assert kept(left, keep_last=keep_last, keep_every=keep_every, tagged=tagged) == left
