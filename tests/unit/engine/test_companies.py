"""Who takes the next micro-step with whom: companies, fairness among trainings, too many for the memory."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from atelier_server.core import Priority
from atelier_server.engine.companies import Companies, Place


def companies(**places: Place) -> Companies:
    found = Companies()
    for name, place in places.items():
        found.join(name, lambda place=place: place, Priority.NORMAL)  # type: ignore[misc]
    return found


def turns(found: Companies, count: int, seconds: float = 1.0) -> list[tuple[str, ...]]:
    taken = []
    for _ in range(count):
        taken.append(found.next())
        found.charge(taken[-1], seconds)
    return taken


def test_equal_companies_share_a_micro_step_as_far_as_their_rows_fit() -> None:
    place = Place("512", rows=3, bucket=8)
    assert turns(companies(a=place, b=place, c=place), 3) == [("a", "b"), ("c", "a"), ("b", "c")]


def test_others_take_turns() -> None:
    found = companies(a=Place("512", 2, 8), b=Place("768", 2, 8), c=Place(None), d=Place(None))
    assert turns(found, 8) == [("a",), ("b",), ("c",), ("d",)] * 2


def test_a_smaller_one_is_taken_where_a_larger_does_not_fit() -> None:
    found = companies(a=Place("x", 5, 8), b=Place("x", 4, 8), c=Place("x", 2, 8))
    assert found.next() == ("a", "c")


def test_a_place_may_change_from_one_micro_step_to_the_next() -> None:
    found, wide = Companies(), True
    found.join("a", lambda: Place("wide" if wide else "tall", 1, 4), Priority.NORMAL)
    found.join("b", lambda: Place("tall", 1, 4), Priority.NORMAL)
    assert found.next() == ("a",)
    wide = False
    assert found.next() == ("a", "b")


def test_trainings_share_the_seconds_by_priority() -> None:
    found = Companies()
    for name, priority in (("low", Priority.LOW), ("normal", Priority.NORMAL), ("high", Priority.HIGH)):
        found.join(name, Place, priority)
    counted = Counter(name for names in turns(found, 210) for name in names)
    assert counted == {"high": 160, "normal": 40, "low": 10}


def test_who_takes_less_time_comes_more_often() -> None:
    found = companies(slow=Place(), fast=Place())
    counted: Counter[str] = Counter()
    for _ in range(300):
        (name,) = found.next()
        counted[name] += 1
        found.charge((name,), 2.0 if name == "slow" else 1.0)
    assert counted["fast"] == 2 * counted["slow"]


def test_too_many_for_the_memory_are_fewer_from_then_on() -> None:
    place = Place("x", 1, 8)
    found = companies(a=place, b=place, c=place, d=place)
    found.crowded(found.next())
    assert [len(names) for names in turns(found, 4)] == [3] * 4
    found.crowded(found.next())
    found.crowded(found.next())
    assert {len(names) for names in turns(found, 4)} == {1}
    for name in "abcd":
        found.leave(name)
    for name in "ab":
        found.join(name, lambda: place, Priority.NORMAL)
    assert len(found.next()) == 2, "others are another question"


PLACES = st.builds(
    lambda company, rows: Place(company, rows, 8), st.sampled_from([None, "x", "y"]), st.integers(1, 8)
)
MEMBERS = st.lists(st.tuples(PLACES, st.sampled_from(Priority), st.floats(0.001, 10)), min_size=1, max_size=6)


@given(MEMBERS, st.data())
def test_every_company_is_legal_and_nobody_starves(
    members: list[tuple[Place, Priority, float]], data: st.DataObject
) -> None:
    found = Companies()
    places = {f"t{i}": place for i, (place, _, _) in enumerate(members)}
    weights = {f"t{i}": 4.0 ** (priority - 1) for i, (_, priority, _) in enumerate(members)}
    seconds = {f"t{i}": cost for i, (_, _, cost) in enumerate(members)}
    for i, (place, priority, _) in enumerate(members):
        found.join(f"t{i}", lambda place=place: place, priority)  # type: ignore[misc]
    had = dict.fromkeys(places, 0.0)  # seconds for the weight
    for turn in range(40):
        names = found.next()
        assert len(set(names)) == len(names)
        assert had[names[0]] <= min(had.values()) + 1e-4, "who has had least leads"
        if len(names) > 1:
            assert {places[name].company for name in names} in ({"x"}, {"y"})
            assert sum(places[name].rows for name in names) <= 8
        cost = max(seconds[name] for name in names)
        found.charge(names, cost)
        for name in names:
            had[name] += cost / len(names) / weights[name]
        assert turn + 1 < len(members) or all(had.values()), "everybody has had a turn by now"
    gone = data.draw(st.sampled_from(sorted(places)))
    found.leave(gone)
    found.leave(gone)
    assert not found or gone not in found.next()
