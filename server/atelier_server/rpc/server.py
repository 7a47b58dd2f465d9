"""The gRPC server with everything it serves, and ServerService."""

from __future__ import annotations

from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from atelier.v1 import (
    adapter_pb2_grpc,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    training_pb2_grpc,
)
from atelier_server.access.identity import Identity
from atelier_server.config import Limits, Settings
from atelier_server.errors import StartError
from atelier_server.jobs.craft import Craft
from atelier_server.jobs.dispatch import WorkerStatus
from atelier_server.jobs.generations import Generations
from atelier_server.jobs.trainings import Trainings
from atelier_server.jobs.wardrobe import Wardrobe
from atelier_server.metrics import Metrics
from atelier_server.rpc.adapters import AdapterServicer
from atelier_server.rpc.admission import Admission
from atelier_server.rpc.codec.adapter import encode_info
from atelier_server.rpc.generation import GenerationServicer
from atelier_server.rpc.health import SERVICES, Health
from atelier_server.rpc.interceptors import CallInterceptor
from atelier_server.rpc.tls import Certificates
from atelier_server.rpc.training import TrainingServicer
from atelier_server.traces import Tracer

_OPTIONS: tuple[tuple[str, int], ...] = (
    # Clients may ping every 20 s (ours do every 30 s); gRPC's default would send them away for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client whose cable was pulled says nothing: its calls end when it answers no ping.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Two servers on one port would share its connections in silence.
    ("grpc.so_reuseport", 0),
)


def _of(settings: Settings) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", settings.limits.max_request_bytes),
        ("grpc.max_connection_age_ms", round(settings.connection_age_seconds * 1000)),
        ("grpc.max_connection_age_grace_ms", round(settings.connection_age_grace_seconds * 1000)),
    )


class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    def __init__(self, status: WorkerStatus, limits: Limits) -> None:
        self._status = status
        self._limits = limits

    async def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> server_pb2.GetServerInfoResponse:
        return encode_info(self._status, self._limits)


def build_server(
    *,
    generations: Generations,
    trainings: Trainings,
    wardrobe: Wardrobe,
    craft: Craft,
    status: WorkerStatus,
    settings: Settings,
    metrics: Metrics,
    tracer: Tracer,
    health: Health,
    identity: Identity,
) -> grpc.aio.Server:
    """Everything registered, no port yet."""
    limits = settings.limits
    interceptor = CallInterceptor(
        metrics, tracer, identity, Admission(limits), slow_reader_seconds=settings.slow_reader_seconds
    )
    server = grpc.aio.server(interceptors=(interceptor,), options=(*_OPTIONS, *_of(settings)))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(
        GenerationServicer(generations, wardrobe, status, limits), server
    )
    training_pb2_grpc.add_TrainingServiceServicer_to_server(
        TrainingServicer(trainings, wardrobe.uploads, status, limits), server
    )
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(wardrobe, craft, limits), server)
    server_pb2_grpc.add_ServerServiceServicer_to_server(ServerServicer(status, limits), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if settings.reflection:
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((*SERVICES, health_name, reflection.SERVICE_NAME), server)
    return server


def build_health_server(health: Health) -> grpc.aio.Server:
    """Health alone, for a port without TLS: probes of Kubernetes speak none."""
    server = grpc.aio.server(options=_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return server


def listen(server: grpc.aio.Server, host: str, port: int, certificates: Certificates | None = None) -> int:
    """Adds a port, with TLS if there are certificates; its number. Raises StartError."""
    where = address(host, port)
    try:
        if certificates is None:
            return server.add_insecure_port(where)
        return server.add_secure_port(where, certificates.credentials())
    except RuntimeError as error:
        raise StartError(f"cannot listen on {where}") from error


def address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
