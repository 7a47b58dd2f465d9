"""Standard health: "" is the front's life, the four services are the worker's readiness."""

from __future__ import annotations

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio

SERVICES = (
    "atelier.v1.GenerationService",
    "atelier.v1.TrainingService",
    "atelier.v1.AdapterService",
    "atelier.v1.ServerService",
)
_Status = health_pb2.HealthCheckResponse


class Health(aio.HealthServicer):
    """Starts alive and not ready."""

    async def set_ready(self, ready: bool) -> None:
        for service in SERVICES:
            await self.set(service, _Status.SERVING if ready else _Status.NOT_SERVING)

    async def drain(self) -> None:
        """NOT_SERVING for good, liveness too."""
        await self.enter_graceful_shutdown()
