"""Notices a worker that lives and gets nowhere: a hung device call, a frozen process."""

from __future__ import annotations

import time
from collections.abc import Callable

from atelier_server.messages import Heartbeat


class Watchdog:
    """`seconds` without a new step, or without a heartbeat, are too long; 0 never is.

    A step is one forward or one training step, with the encoding, loading and decoding that belong to it.
    Times are the front's own clock.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._heard_at = self._moved_at = clock()
        self._turns = -1

    @property
    def look_seconds(self) -> float:
        """How often to look."""
        return min(max(self._seconds / 10, 0.05), 5.0)

    def begin(self) -> None:
        """A worker is ready; before that it loads a model, however long that takes."""
        self._heard_at = self._moved_at = self._clock()
        self._turns = -1

    def heard(self, heartbeat: Heartbeat) -> None:
        self._heard_at = self._clock()
        if heartbeat.idle or heartbeat.turns != self._turns:
            self._moved_at, self._turns = self._heard_at, heartbeat.turns

    def stalled(self) -> str:
        """Why the worker is to be ended; "" if it is not."""
        if not self._seconds:
            return ""
        now = self._clock()
        if now - self._heard_at > self._seconds:
            return f"nothing was heard of it for {now - self._heard_at:.1f} s"
        if now - self._moved_at > self._seconds:
            return f"its step has taken {now - self._moved_at:.1f} s"
        return ""
