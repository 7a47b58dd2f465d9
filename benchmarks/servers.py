"""Two server processes side by side: ours, and the one of diffusers that one writes first.

And clients that keep one of them painting, in a process of their own: this module imports no torch, so that
such a process is there at once.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import grpc

from atelier import Client
from atelier.v1 import generation_pb2, generation_pb2_grpc
from benchmarks.serving import serving


@contextmanager
def ours(model: Path | str, data_dir: Path, adapters: Sequence[Path] = ()) -> Iterator[str]:
    """A server on one thread with these adapter files imported, each by its stem; its address."""
    with serving(data_dir, "--metrics-port", "-1", model=model) as server:
        with Client(server.address) as client:
            for file in adapters:
                client.import_adapter(file, file.stem)
                client.load_adapter(file.stem)
        yield server.address


@contextmanager
def diffusers(model: Path, adapters: Sequence[Path]) -> Iterator[str]:
    """The peer with the same base and adapters; its address."""
    command = [sys.executable, "-m", "benchmarks.diffusers_server", str(model), *map(str, adapters)]
    with _running(command) as process:
        yield f"127.0.0.1:{int(_first_line(process))}"


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def picture(adapter: str, *, seed: int, steps: int) -> generation_pb2.GenerateRequest:
    """Asks either server for a picture of 64 x 64 with an adapter."""
    return generation_pb2.GenerateRequest(
        prompt="a red cat",
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=5.0,
        scheduler="ddim",
        width=64,
        height=64,
        adapters=[generation_pb2.AdapterSelection(adapter=adapter)],
    )


@contextmanager
def painting(address: str, adapters: Sequence[str], *, steps: int) -> Iterator[None]:
    """One client for each adapter asks for one picture after another; begins when the first step is told."""
    spawn = multiprocessing.get_context("spawn")
    begun = spawn.Event()
    process = spawn.Process(target=_paint, args=(address, adapters, steps, begun), daemon=True)
    process.start()
    try:
        assert begun.wait(60), "nothing is painted"
        yield
    finally:
        process.kill()
        process.join()


def _paint(address: str, adapters: Sequence[str], steps: int, begun: Event) -> None:
    asyncio.run(_paint_all(address, adapters, steps, begun))


async def _paint_all(address: str, adapters: Sequence[str], steps: int, begun: Event) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        requests = [picture(adapter, seed=seed, steps=steps) for seed, adapter in enumerate(adapters)]
        await asyncio.gather(*(_stream(channel, request, begun) for request in requests))


async def _stream(channel: grpc.aio.Channel, request: generation_pb2.GenerateRequest, begun: Event) -> None:
    """One picture after another, for ever."""
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    while True:
        async for event in stub.Generate(request):
            if event.HasField("progress"):
                begun.set()
