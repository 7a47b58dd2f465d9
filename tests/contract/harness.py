"""A whole front over a real channel, with a scripted worker process behind it."""

from __future__ import annotations

import asyncio
import hashlib
import io
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from PIL import Image

from atelier.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from atelier_server.app import Application
from atelier_server.config import Limits, Settings

Start = Callable[..., Awaitable["Service"]]
FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


class Service:
    """A running server and the stubs of its services."""

    def __init__(self, application: Application, channel: grpc.aio.Channel, serving: asyncio.Task) -> None:
        self.application = application
        self.channel = channel
        self.serving = serving
        self.generations = generation_pb2_grpc.GenerationServiceStub(channel)
        self.trainings = training_pb2_grpc.TrainingServiceStub(channel)
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        self.server = server_pb2_grpc.ServerServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def until(self, status: int, service: str = "atelier.v1.GenerationService") -> None:
        call = self.health.Watch(health_pb2.HealthCheckRequest(service=service))
        async for answer in call:
            if answer.status == status:
                break
        call.cancel()

    async def until_ready(self) -> None:
        await self.until(health_pb2.HealthCheckResponse.SERVING)

    async def generate(self, prompt: str = "", **fields: object) -> list[generation_pb2.GenerateResponse]:
        request = generation_pb2.GenerateRequest(prompt=prompt, **fields)
        return [message async for message in self.generations.Generate(request)]

    async def train(
        self, *pictures: bytes, request_id: str = "", cancel_on_disconnect: bool = False, **recipe: object
    ) -> list[training_pb2.TrainingEvent]:
        messages = train_requests(
            *pictures, request_id=request_id, cancel_on_disconnect=cancel_on_disconnect, **recipe
        )
        return [response.event async for response in self.trainings.Train(iter(messages))]

    async def watch(self, training: str, after_seq: int = 0) -> list[training_pb2.TrainingEvent]:
        request = training_pb2.WatchTrainingRequest(training=training, after_seq=after_seq)
        return [response.event async for response in self.trainings.WatchTraining(request)]


def train_requests(
    *pictures: bytes, request_id: str = "", cancel_on_disconnect: bool = False, **recipe: object
) -> list[training_pb2.TrainRequest]:
    fields = {"name": "otto", "instance_prompt": "a sks plush", "num_images": len(pictures) or 1}
    start = training_pb2.TrainRequest.Start(
        request_id=request_id,
        recipe=training_pb2.TrainingRecipe(**{**fields, **recipe}),
        cancel_on_disconnect=cancel_on_disconnect,
    )
    chunks = [
        training_pb2.TrainRequest.ImageChunk(
            index=i, filename=f"photo-{i}.png", size_bytes=len(data), data=data
        )
        for i, data in enumerate(pictures or (picture(),))
    ]
    return [
        training_pb2.TrainRequest(start=start),
        *(training_pb2.TrainRequest(image=chunk) for chunk in chunks),
    ]


def picture(format: str = "PNG", size: tuple[int, int] = (16, 12), color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format)
    return file.getvalue()


def settings(data_dir: Path, **fields: object) -> Settings:
    values = {"port": 0, "metrics_port": -1, "data_dir": data_dir, "drain_seconds": 5.0, "limits": Limits()}
    return Settings(**{**values, **fields})


@asynccontextmanager
async def running(data_dir: Path, *, ready: bool = True, **fields: object) -> AsyncIterator[Service]:
    application = Application(settings(data_dir, **fields), FAKE)
    await application.start()
    serving = asyncio.create_task(application.serve())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{application.port}") as channel:
        service = Service(application, channel, serving)
        try:
            if ready:
                await service.until_ready()
            yield service
        finally:
            application.leave()
            application.leave()
            await asyncio.gather(serving, return_exceptions=True)
            await application.stop()


class Refusal:
    """The status of a failed call with its details."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code().name
        self.message = error.details() or ""
        self.trailers = dict(error.trailing_metadata() or ())
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.violations: dict[str, str] = {}
        self.retry_seconds: int | None = None
        self.resource = ("", "")
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            self._read(detail)

    def _read(self, detail: object) -> None:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry, resource = error_details_pb2.RetryInfo(), error_details_pb2.ResourceInfo()
        if detail.Unpack(info):
            assert info.domain == "atelier"
            self.reason, self.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            self.violations = {v.field: v.description for v in bad.field_violations}
        elif detail.Unpack(retry):
            self.retry_seconds = retry.retry_delay.seconds
        elif detail.Unpack(resource):
            self.resource = (resource.resource_type, resource.resource_name)


async def refused(call: Awaitable[object]) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return Refusal(caught.value)


def kinds(messages: Iterable[object]) -> list[str]:
    return [message.WhichOneof("event") for message in messages]


def new_id() -> str:
    return str(uuid.uuid4())


def import_requests(data: bytes, **fields: object) -> list[adapter_pb2.ImportAdapterRequest]:
    values = {"name": "guest", "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    metadata = adapter_pb2.ImportAdapterRequest.Metadata(**{**values, **fields})
    return [
        adapter_pb2.ImportAdapterRequest(metadata=metadata),
        *(adapter_pb2.ImportAdapterRequest(chunk=data[i : i + 2**20]) for i in range(0, len(data), 2**20)),
    ]
