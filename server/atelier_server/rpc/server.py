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
from atelier_server.config import Limits
from atelier_server.jobs.dispatch import WorkerStatus
from atelier_server.jobs.generations import Generations
from atelier_server.jobs.trainings import Trainings
from atelier_server.jobs.wardrobe import Wardrobe
from atelier_server.metrics import Metrics
from atelier_server.rpc.adapters import AdapterServicer
from atelier_server.rpc.codec.adapter import encode_info
from atelier_server.rpc.generation import GenerationServicer
from atelier_server.rpc.health import SERVICES, Health
from atelier_server.rpc.interceptors import CallInterceptor
from atelier_server.rpc.training import TrainingServicer

# Clients may ping idle connections every 20 s; gRPC's default would send them away for it.
_OPTIONS = (
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two servers on one port would share its connections in silence.
    ("grpc.so_reuseport", 0),
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
    status: WorkerStatus,
    limits: Limits,
    metrics: Metrics,
    health: Health,
) -> grpc.aio.Server:
    """Everything registered, no port yet."""
    server = grpc.aio.server(interceptors=(CallInterceptor(metrics),), options=_OPTIONS)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(
        GenerationServicer(generations, wardrobe, status, limits), server
    )
    training_pb2_grpc.add_TrainingServiceServicer_to_server(
        TrainingServicer(trainings, wardrobe.uploads, status, limits), server
    )
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(wardrobe, limits), server)
    server_pb2_grpc.add_ServerServiceServicer_to_server(ServerServicer(status, limits), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server
