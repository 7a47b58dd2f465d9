"""OpenTelemetry behind `traces.Tracer`. The only module that knows it; imported only where it is asked for.

The SDK reads its own variables beside `--otlp-endpoint`: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES,
OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, and so on. Attributes follow its conventions for RPC.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span as OpenSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from atelier_server.messages import Span
from atelier_server.origin import Origin
from atelier_server.traces import CallTrace

_CLOSE_SECONDS = 3.0
_W3C = TraceContextTextMapPropagator()
# The server's own faults; the others are the client's, and no error of the server's span.
_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}


class OtelCall:
    def __init__(self, span: OpenSpan, origin: Origin) -> None:
        self._span = span
        self.origin = origin

    def end(self, code: str) -> None:
        self._span.set_attribute("rpc.response.status_code", code)
        if code in _FAULTS:
            self._span.set_status(Status(StatusCode.ERROR, code))
        self._span.end()


class OtelTracer:
    """Sends spans in batches, from a thread of its own. `exporter` is for tests."""

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        version = importlib.metadata.version("atelier")
        resource = Resource.create({"service.name": "atelier", "service.version": version})
        # What the operator says in OTEL_* wins over our own name.
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        exporter = exporter or OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("atelier", version)

    def begin(self, method: str, metadata: Mapping[str, str], request_id: str) -> CallTrace:
        service, _, name = method.strip("/").rpartition("/")
        span = self._tracer.start_span(
            f"{service}/{name}",
            context=_W3C.extract(metadata, Context()),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system.name": "grpc",
                "rpc.method": f"{service}/{name}",
                "atelier.request_id": request_id,
            },
        )
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(span, Context()))
        origin = Origin(request_id, carrier.get("traceparent", ""), carrier.get("tracestate", ""))
        return OtelCall(span, origin)

    def finished(self, span: Span) -> None:
        carrier = {"traceparent": span.origin.traceparent, "tracestate": span.origin.tracestate}
        made = self._tracer.start_span(
            span.name,
            context=_W3C.extract(carrier, Context()),
            start_time=span.start_ns,
            attributes={f"atelier.{name}": value for name, value in span.attributes},
        )
        made.end(end_time=span.end_ns)

    def close(self) -> None:
        # A collector that does not answer is not waited for: the last spans are not worth a slow exit.
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        ending.join(_CLOSE_SECONDS)
