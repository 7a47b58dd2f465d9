"""Who has had least of the device, for its weight: weighted fair queueing (Demers, Keshav, Shenker 1989).

Each key has a virtual time that grows with what it is given. Whoever comes new, or back from a pause, begins
where the least of those present stands: no credit is saved up while away, and nobody waits for the past of
others. Whole numbers, so the order never depends on rounding.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from atelier_server.core import Priority

Key = TypeVar("Key", bound=Hashable)

# A step of a job of twice the weight counts half.
WEIGHTS = {Priority.LOW: 1, Priority.NORMAL: 4, Priority.HIGH: 16}
HEAVIEST = max(WEIGHTS.values())


class Shares(Generic[Key]):
    """The virtual times of the keys that are present."""

    def __init__(self) -> None:
        self._times: dict[Key, int] = {}

    def present(self, keys: Iterable[Key]) -> None:
        """These are here now; all others are forgotten."""
        here = set(keys)
        least = min((time for key, time in self._times.items() if key in here), default=0)
        self._times = {key: self._times.get(key, least) for key in here}

    def __getitem__(self, key: Key) -> int:
        return self._times[key]

    def charge(self, key: Key, cost: int) -> None:
        self._times[key] += cost
