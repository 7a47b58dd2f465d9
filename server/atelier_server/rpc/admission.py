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
    """Classes apart: a thousand watchers of trainings keep nobody from listing adapters."""

    def __init__(self, limits: Limits) -> None:
        self._limits = {
            GENERATE: limits.max_generate_calls,
            TRAIN: limits.max_train_calls,
            CONTROL: limits.max_control_calls,
        }
        self._open: Counter[str] = Counter()

    @contextmanager
    def enter(self, method: str) -> Iterator[None]:
        """For the length of a call of `method`, /package.Service/Name. Raises TooManyCalls."""
        kind = _CLASSES.get(method.rpartition("/")[2], CONTROL)
        limit = self._limits[kind]
        if self._open[kind] >= limit:
            raise TooManyCalls(f"{limit} {kind} calls are open", {"class": kind, "limit": str(limit)})
        self._open[kind] += 1
        try:
            yield
        finally:
            self._open[kind] -= 1
