"""What an operator sees of a real server: its log as JSON, and its spans in a collector on loopback."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from atelier.v1 import generation_pb2, generation_pb2_grpc
from tests.contract.harness import picture, train_requests
from tests.process.server import Server

pytestmark = pytest.mark.process

SECRET = "a prompt that is nobody's business"
TOKEN = "Bearer token-that-nobody-may-read"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans."""

    def __init__(self) -> None:
        self.spans: SimpleQueue[Span] = SimpleQueue()

    def Export(  # noqa: N802
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        return pb.ExportTraceServiceResponse()

    def taken(self) -> list[Span]:
        return [self.spans.get_nowait() for _ in range(self.spans.qsize())]


@pytest.fixture
def observed(tmp_path: Path) -> Iterator[tuple[Collector, Server]]:
    """A server that logs JSON and sends its spans to a collector on loopback."""
    collecting = grpc.server(ThreadPoolExecutor(2))
    taking = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(taking, collecting)
    endpoint = f"http://127.0.0.1:{collecting.add_insecure_port('127.0.0.1:0')}"
    collecting.start()
    server = Server(tmp_path / "data", "--log-format", "json", "--otlp-endpoint", endpoint)
    try:
        yield taking, server.start()
    finally:
        server.stop()
        collecting.stop(None).wait()


def lines(server: Server) -> list[dict[str, Any]]:
    log = (server.data_dir / "server.log").read_text().splitlines()
    return [json.loads(line) for line in log]


def by_name(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def test_log_and_spans_of_a_picture_and_a_training(observed: tuple[Collector, Server]) -> None:
    taking, server = observed
    metadata = (("x-request-id", "paint-1"), ("traceparent", PARENT), ("authorization", TOKEN))
    with grpc.insecure_channel(server.address) as channel:
        paint = generation_pb2_grpc.GenerationServiceStub(channel).Generate
        request = generation_pb2.GenerateRequest(prompt=SECRET, num_inference_steps=2)
        list(paint(request, metadata=metadata))
        bad = generation_pb2.GenerateRequest(prompt=SECRET, scheduler=SECRET, num_images=-1)
        with pytest.raises(grpc.RpcError):
            list(paint(bad, metadata=(("x-request-id", "paint-2"), ("authorization", TOKEN))))
        train = channel.stream_stream(
            "/atelier.v1.TrainingService/Train",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=bytes,
        )
        recipe = {"max_train_steps": 2, "checkpointing_steps": 1, "instance_prompt": SECRET}
        messages = train_requests(picture(), **recipe)
        list(train(iter(messages), metadata=(("x-request-id", "train-1"), ("traceparent", PARENT))))
        worker = server.state["worker_pid"]
        os.kill(worker, signal.SIGSTOP)  # the device hangs: a scrape does not wait for it
        try:
            seen = server.metrics()
        finally:
            os.kill(worker, signal.SIGCONT)
        assert seen["atelier_images_total"] == 1
        assert seen['atelier_vram_component_bytes{component="base"}'] > 0
    assert server.stop() == 0

    said = lines(server)
    text = json.dumps(said)
    assert SECRET not in text
    assert TOKEN.split()[1] not in text
    ended = {line["request_id"]: line for line in said if line["message"] == "call ended"}
    assert ended["paint-1"]["code"] == "OK"
    assert ended["paint-1"]["tenant"] == "default"
    assert ended["paint-1"]["trace_id"] == TRACE
    assert ended["paint-2"]["reason"] == "INVALID_REQUEST"
    assert set(ended["paint-2"]["fields"].split(",")) == {"scheduler", "num_images"}
    published = [line for line in said if line["message"] == "checkpoint published"]
    assert {(line["process"], line["request_id"]) for line in published} == {("worker", "train-1")}
    assert [line["adapter"] for line in published] == ["otto@v1@1", "otto@v1@2"]
    assert len({line["training"] for line in published}) == 1

    spans = taking.taken()
    in_trace = [span for span in spans if span.trace_id.hex() == TRACE]
    (call,) = by_name(in_trace, "atelier.v1.GenerationService/Generate")
    assert call.parent_span_id.hex() == PARENT.split("-")[2]
    for phase in ("queue", "text_encode", "denoise", "decode", "image_encode"):
        (span,) = by_name(in_trace, phase)
        assert span.parent_span_id == call.span_id
        assert call.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    (training,) = by_name(in_trace, "atelier.v1.TrainingService/Train")
    assert [len(by_name(in_trace, name)) for name in ("prepare", "train", "publish")] == [1, 2, 2]
    assert {span.parent_span_id for span in by_name(in_trace, "train")} == {training.span_id}
    assert SECRET.encode() not in b"".join(span.SerializeToString() for span in spans)
