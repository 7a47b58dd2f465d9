"""Traces: a span for every call, and one for each phase of what it asked for.

The front alone talks to a collector; the worker's spans come as messages, like its metrics, and only where
the call is sampled. Without `--otlp-endpoint` nothing of this costs anything: OpenTelemetry is an extra.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol

from atelier_server.messages import Span
from atelier_server.origin import Origin


class CallTrace(Protocol):
    """The span of one call."""

    @property
    def origin(self) -> Origin:
        """What is told to whoever works on this call."""

    def end(self, code: str) -> None:
        """`code` is the name of the call's gRPC status."""


class Tracer(Protocol):
    def begin(self, method: str, metadata: Mapping[str, str], request_id: str) -> CallTrace:
        """A call of `method` ("/package.Service/Method"); its metadata may say which trace it belongs to."""

    def finished(self, span: Span) -> None:
        """A phase that somebody else has measured."""

    def close(self) -> None:
        """Sends what is left; takes at most a few seconds."""


class _Untraced:
    def __init__(self, origin: Origin) -> None:
        self.origin = origin

    def end(self, code: str) -> None:
        pass


class NoTracer:
    """The default."""

    def begin(self, method: str, metadata: Mapping[str, str], request_id: str) -> CallTrace:  # noqa: ARG002
        return _Untraced(Origin(request_id))

    def finished(self, span: Span) -> None:
        pass

    def close(self) -> None:
        pass


class TracingUnavailable(Exception):
    """OpenTelemetry is asked for and not installed."""


def tracer(endpoint: str) -> Tracer:
    """The tracer that sends to an OTLP collector at `endpoint`; none for "". Raises TracingUnavailable."""
    if not endpoint:
        return NoTracer()
    try:
        otel = importlib.import_module("atelier_server.otel")
    except ImportError as error:
        message = (
            f"--otlp-endpoint needs OpenTelemetry ({error.name} is missing): pip install 'atelier[otel]'"
        )
        raise TracingUnavailable(message) from error
    made: Tracer = otel.OtelTracer(endpoint)
    return made
