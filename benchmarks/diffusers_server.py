"""The peer of the latency benchmarks: the server that one writes first.

    python -m benchmarks.diffusers_server BASE FILE...

One process, grpc.aio, diffusers' pipeline with every adapter loaded, requests one after another in a thread.
What changes the pipeline waits for the picture in hand, and goes before those that wait.
Speaks as much of our contract as the benchmarks ask for; prints its port.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import torch

from atelier.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from atelier_server.core import ImageFormat
from atelier_server.diffusion.images import encode_picture
from benchmarks.bases import peer_pipeline

Events = asyncio.Queue[generation_pb2.GenerateResponse | None]


class Gone(Exception):
    """Nobody waits for the picture any more."""


class Turns:
    """Who has the pipeline: one at a time. Pictures in the order of their arrival, a change before them."""

    def __init__(self) -> None:
        self._pictures = asyncio.Lock()
        self._pipeline = asyncio.Lock()  # of the pictures only one, the next, stands here with the changes

    @asynccontextmanager
    async def picture(self) -> AsyncIterator[None]:
        async with self._pictures, self._pipeline:
            yield

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        async with self._pipeline:
            yield


class Painter(
    generation_pb2_grpc.GenerationServiceServicer,
    server_pb2_grpc.ServerServiceServicer,
    adapter_pb2_grpc.AdapterServiceServicer,
):
    def __init__(self, base: Path, files: list[Path]) -> None:
        self._pipeline = peer_pipeline(base)
        self._files = {file.stem: file for file in files}
        for name, file in self._files.items():
            self._load(file, name)
        self._turns = Turns()

    def _load(self, file: Path, name: str) -> None:
        self._pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)

    async def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: object
    ) -> server_pb2.GetServerInfoResponse:
        return server_pb2.GetServerInfoResponse(ready=True)

    async def ImportAdapter(
        self, request_iterator: AsyncIterator[adapter_pb2.ImportAdapterRequest], context: object
    ) -> adapter_pb2.ImportAdapterResponse:
        name = (await anext(request_iterator)).metadata.name
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            async for message in request_iterator:
                file.write(message.chunk)
            file.flush()
            async with self._turns.change():
                await asyncio.to_thread(self._load, Path(file.name), name)
        return adapter_pb2.ImportAdapterResponse(adapter=adapter_pb2.Adapter(name=name))

    async def LoadAdapter(
        self, request: adapter_pb2.LoadAdapterRequest, context: object
    ) -> adapter_pb2.LoadAdapterResponse:
        name = request.adapter
        async with self._turns.change():
            await asyncio.to_thread(self._load, self._files[name], name)
        return adapter_pb2.LoadAdapterResponse()

    async def UnloadAdapter(
        self, request: adapter_pb2.UnloadAdapterRequest, context: object
    ) -> adapter_pb2.UnloadAdapterResponse:
        await self._forget(request.adapter)
        return adapter_pb2.UnloadAdapterResponse()

    async def DeleteAdapter(
        self, request: adapter_pb2.DeleteAdapterRequest, context: object
    ) -> adapter_pb2.DeleteAdapterResponse:
        await self._forget(request.adapter)
        return adapter_pb2.DeleteAdapterResponse()

    async def _forget(self, name: str) -> None:
        async with self._turns.change():
            await asyncio.to_thread(self._pipeline.delete_adapters, name)

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        async with self._turns.picture():
            events: Events = asyncio.Queue()
            loop, gone = asyncio.get_running_loop(), threading.Event()
            painting = asyncio.create_task(asyncio.to_thread(self._paint, request, loop, events, gone))
            try:
                while (event := await events.get()) is not None:
                    yield event
            finally:
                gone.set()  # a thread is not cancelled with its task: it would paint to the end
                await painting

    def _paint(
        self,
        request: generation_pb2.GenerateRequest,
        loop: asyncio.AbstractEventLoop,
        events: Events,
        gone: threading.Event,
    ) -> None:
        def tell(event: generation_pb2.GenerateResponse | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def stepped(_pipeline: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
            progress = generation_pb2.GenerateResponse.Progress(
                step=step + 1, total=request.num_inference_steps
            )
            tell(generation_pb2.GenerateResponse(progress=progress))
            if gone.is_set():
                raise Gone
            return values

        try:
            if request.adapters:
                self._pipeline.set_adapters(request.adapters[0].adapter)
            pixels = self._pipeline(
                request.prompt,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                num_images_per_prompt=max(1, request.num_images),
                height=64,
                width=64,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                callback_on_step_end=stepped,
                output_type="pt",
            ).images[0]
            data = encode_picture(pixels, ImageFormat.PNG, {})
            image = generation_pb2.GenerateResponse.Image(data=data, size=len(data), last=True)
            tell(generation_pb2.GenerateResponse(image=image))
            tell(generation_pb2.GenerateResponse(completed=generation_pb2.GenerateResponse.Completed()))
        except Gone:
            pass
        finally:
            tell(None)


async def serve(base: Path, files: list[Path]) -> None:
    server = grpc.aio.server()
    painter = Painter(base, files)  # type: ignore[abstract]  # what it lacks is UNIMPLEMENTED
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(painter, server)
    server_pb2_grpc.add_ServerServiceServicer_to_server(painter, server)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(painter, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]]))
