"""Which call the work at hand comes from: told to logs and traces, never to the work itself."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

_SAMPLED = 0x01


@dataclass(frozen=True, slots=True)
class Origin:
    """A call's id, and its W3C trace context (https://www.w3.org/TR/trace-context/); "" = there is none."""

    request_id: str = ""
    traceparent: str = ""
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        return self.traceparent.split("-")[1] if self.traceparent else ""

    @property
    def traced(self) -> bool:
        """Whether somebody wants to see spans of this."""
        return bool(self.traceparent) and bool(int(self.traceparent.rsplit("-", 1)[1], 16) & _SAMPLED)


NOWHERE = Origin()
_CURRENT: ContextVar[Origin] = ContextVar("origin")


def current() -> Origin:
    """The origin of what this task or thread is doing; empty outside of calls."""
    return _CURRENT.get(NOWHERE)


def set_current(origin: Origin) -> None:
    """From here on, in this task or thread. Every call is a task of its own: nothing has to be put back."""
    _CURRENT.set(origin)
