"""The tracer: W3C context in and out, spans of others under the call's own, and nothing without the extra."""

from __future__ import annotations

import socket
import sys
import time

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from atelier_server.messages import Span
from atelier_server.otel import OtelTracer
from atelier_server.traces import NoTracer, TracingUnavailable, tracer

METHOD = "/atelier.v1.GenerationService/Generate"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_call_continues_its_callers_trace_and_a_phase_the_calls() -> None:
    exporter = InMemorySpanExporter()
    otel = OtelTracer("http://127.0.0.1:1", exporter)
    call = otel.begin(METHOD, {"traceparent": PARENT, "tracestate": "vendor=1"}, "my-id")
    assert call.origin.request_id == "my-id"
    assert call.origin.trace_id == PARENT.split("-")[1]
    assert call.origin.tracestate == "vendor=1"
    assert call.origin.traced
    otel.finished(Span("denoise", call.origin, 1_000, 5_000, (("steps", 30),)))
    call.end("OK")
    otel.close()
    phase, span = exporter.get_finished_spans()
    assert span.name == "atelier.v1.GenerationService/Generate"
    assert span.kind is SpanKind.SERVER
    assert format(span.parent.span_id, "016x") == PARENT.split("-")[2]
    assert span.attributes["atelier.request_id"] == "my-id"
    assert span.attributes["rpc.response.status_code"] == "OK"
    assert span.resource.attributes["service.name"] == "atelier"
    assert phase.parent.span_id == span.context.span_id
    assert phase.context.trace_id == span.context.trace_id
    assert (phase.start_time, phase.end_time) == (1_000, 5_000)
    assert dict(phase.attributes) == {"atelier.steps": 30}


@pytest.mark.parametrize(
    ("code", "status"),
    [("OK", StatusCode.UNSET), ("INVALID_ARGUMENT", StatusCode.UNSET), ("INTERNAL", StatusCode.ERROR)],
)
def test_only_the_servers_faults_are_errors(code: str, status: StatusCode) -> None:
    exporter = InMemorySpanExporter()
    otel = OtelTracer("http://127.0.0.1:1", exporter)
    otel.begin(METHOD, {}, "a").end(code)
    otel.close()
    assert exporter.get_finished_spans()[0].status.status_code is status


@pytest.mark.parametrize("traceparent", [PARENT[:-1] + "0", "nonsense", "00-" + "0" * 32 + "-1-01", "\x00"])
def test_callers_decide_on_sampling_and_cannot_break_anything(traceparent: str) -> None:
    exporter = InMemorySpanExporter()
    otel = OtelTracer("http://127.0.0.1:1", exporter)
    call = otel.begin(METHOD, {"traceparent": traceparent}, "a")
    call.end("OK")
    otel.close()
    asked_not_to = traceparent == PARENT[:-1] + "0"
    assert call.origin.traced is not asked_not_to
    assert len(exporter.get_finished_spans()) == (0 if asked_not_to else 1)


def test_a_collector_that_is_not_there_delays_no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atelier_server.otel._CLOSE_SECONDS", 0.1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        otel = OtelTracer(f"http://127.0.0.1:{taken.getsockname()[1]}")
        otel.begin(METHOD, {}, "a").end("OK")
        before = time.monotonic()
        otel.close()
        assert time.monotonic() - before < 5  # the exporter itself would try for ten seconds


def test_without_an_endpoint_nothing_is_traced() -> None:
    quiet = tracer("")
    assert isinstance(quiet, NoTracer)
    call = quiet.begin(METHOD, {"traceparent": PARENT}, "a")
    assert not call.origin.traced
    call.end("OK")
    quiet.close()


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "atelier_server.otel")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracingUnavailable, match=r"atelier\[otel\]"):
        tracer("http://127.0.0.1:4317")
