"""Which trainings take the next micro-step, alone or together. Pure bookkeeping: no torch, no clock.

Trainings of equal companies may share a micro-step as long as their rows fit it. Who has had least of the
device for its weight leads (see `shares`), and takes those along that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count

from atelier_server.core import Priority
from atelier_server.engine.shares import HEAVIEST, WEIGHTS, Shares

_TICKS = 10**6  # a second


@dataclass(frozen=True, slots=True)
class Place:
    """What a training needs of its next micro-step: `rows` of the `bucket` that it has.

    Those whose `company` is equal may share the rest of it; None is alone.
    """

    company: Hashable | None = None
    rows: int = 1
    bucket: int = 1


@dataclass(frozen=True, slots=True)
class _Member:
    arrival: int
    priority: Priority
    place: Callable[[], Place]


class Companies:
    """The trainings that have steps to take."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._arrivals = count()
        self._times: Shares[str] = Shares()
        # How many are too many for the memory, while one of that company is there.
        self._crowd: dict[Hashable, int] = {}

    def __bool__(self) -> bool:
        return bool(self._members)

    def join(self, training: str, place: Callable[[], Place], priority: Priority) -> None:
        """`place` is asked before each micro-step: a training's may change from one to the next."""
        self._members[training] = _Member(next(self._arrivals), priority, place)
        self._times.present(self._members)

    def leave(self, training: str) -> None:
        """Also for one that is not there."""
        if self._members.pop(training, None) is not None:
            self._times.present(self._members)
        if not self._members:
            self._crowd.clear()

    def next(self) -> tuple[str, ...]:
        """Those of the next micro-step, who leads first. Call where there is somebody."""
        leader, *others = sorted(self._members, key=lambda t: (self._times[t], self._members[t].arrival))
        place = self._members[leader].place()
        if place.company is None:
            return (leader,)
        chosen, rows, most = [leader], place.rows, self._crowd.get(place.company, len(self._members) + 1) - 1
        for training in others:
            if len(chosen) >= most:
                break
            other = self._members[training].place()
            if other.company == place.company and rows + other.rows <= place.bucket:
                chosen.append(training)
                rows += other.rows
        return tuple(chosen)

    def crowded(self, trainings: Sequence[str]) -> None:
        """So many were too many for the memory: fewer at a time from now on, as long as any are there."""
        member = self._members.get(trainings[0])
        if member is not None and (company := member.place().company) is not None:
            self._crowd[company] = len(trainings)

    def charge(self, trainings: Sequence[str], seconds: float) -> None:
        """What a micro-step took, an equal part for each who was in it."""
        for training in trainings:
            if (member := self._members.get(training)) is not None:
                ticks = max(1, round(seconds * _TICKS / len(trainings)))
                self._times.charge(training, ticks * HEAVIEST // WEIGHTS[member.priority])
