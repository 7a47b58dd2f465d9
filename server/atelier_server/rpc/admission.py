"""How many calls of a class may be open at once. One more is refused at once, and told when to come back.

gRPC's own `maximum_concurrent_rpcs` ends what is too much with a bare CANCELLED now and then; this one has a
status for every call. Health is never counted: it answers whatever else there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from atelier_server.config import Limits
from atelier_server.errors import TooManyCalls

GENERATE, TRAIN, CONTROL = "generate", "train", "control"
_CLASSES = {"Generate": GENERATE, "Train": TRAIN, "WatchTraining": TRAIN}


class Admission:
    """Classes apart: a thousand watchers of trainings keep nobody from listing adapters.

    And a full house is full for those who are in it: a tenant that has no call open in a class may open one.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = {
            GENERATE: limits.max_generate_calls,
            TRAIN: limits.max_train_calls,
            CONTROL: limits.max_control_calls,
        }
        self._open: Counter[str] = Counter()
        self._held: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def enter(self, method: str, tenant: str) -> Iterator[None]:
        """For the length of a tenant's call of `method`, /package.Service/Name. Raises TooManyCalls."""
        kind = _CLASSES.get(method.rpartition("/")[2], CONTROL)
        limit = self._limits[kind]
        key = (kind, tenant)
        if self._open[kind] >= limit and self._held[key]:
            raise TooManyCalls(f"{limit} {kind} calls are open", {"class": kind, "limit": str(limit)})
        self._open[kind] += 1
        self._held[key] += 1
        try:
            yield
        finally:
            self._open[kind] -= 1
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
