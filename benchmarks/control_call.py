"""A control call while pictures are painted: our front against a server that paints in its own process.

Other clients, in a process of their own, ask for pictures with an adapter each: the peer
changes adapters between two pictures, which is Python's work and holds its lock.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from time import perf_counter, sleep

import grpc

from atelier.v1 import generation_pb2, generation_pb2_grpc, server_pb2, server_pb2_grpc
from benchmarks import servers
from benchmarks.bases import random_adapters, sd1_shaped
from benchmarks.harness import Row, interleave, row

_PAUSE_SECONDS = 0.005
_STREAMS = 8
_STEPS = 20


def run(*, quick: bool) -> list[Row]:
    calls, rounds = (20, 1) if quick else (400, 7)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = sd1_shaped(root / "base")
        files = random_adapters(root / "files", base, count=_STREAMS, rank=16)
        names = [file.stem for file in files]
        with servers.diffusers(base, files) as theirs, servers.ours(base, root / "data", files) as mine:
            samples = interleave(lambda: _p99(mine, names, calls), lambda: _p99(theirs, names, calls), rounds)
    target = None if quick else ">= 5"
    return [row("p99 of GetServerInfo while generating", "s", samples, target, ratio=lambda a, b: b / a)]


def _p99(address: str, names: Sequence[str], calls: int) -> float:
    """Seconds, over so many calls one after another, while the other clients keep the server painting."""
    taken = []
    with _painting(address, names), grpc.insecure_channel(address) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        stub.GetServerInfo(server_pb2.GetServerInfoRequest())  # connects
        for _ in range(calls):
            before = perf_counter()
            stub.GetServerInfo(server_pb2.GetServerInfoRequest())
            taken.append(perf_counter() - before)
            sleep(_PAUSE_SECONDS)
    return statistics.quantiles(taken, n=100, method="inclusive")[-1]


@contextmanager
def _painting(address: str, names: Sequence[str]) -> Iterator[None]:
    """Begins when the first step is told."""
    spawn = multiprocessing.get_context("spawn")
    begun = spawn.Event()
    process = spawn.Process(target=_paint, args=(address, names, begun), daemon=True)
    process.start()
    try:
        assert begun.wait(60), "nothing is painted"
        yield
    finally:
        process.kill()
        process.join()


def _paint(address: str, names: Sequence[str], begun: Event) -> None:
    asyncio.run(_paint_all(address, names, begun))


async def _paint_all(address: str, names: Sequence[str], begun: Event) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(_stream(channel, *given, begun) for given in enumerate(names)))


async def _stream(channel: grpc.aio.Channel, seed: int, adapter: str, begun: Event) -> None:
    """One picture after another, for ever."""
    request = generation_pb2.GenerateRequest(
        prompt="a red cat",
        seed=seed,
        num_inference_steps=_STEPS,
        guidance_scale=5.0,
        scheduler="ddim",
        width=64,
        height=64,
        adapters=[generation_pb2.AdapterSelection(adapter=adapter)],
    )
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    while True:
        async for event in stub.Generate(request):
            if event.HasField("progress"):
                begun.set()
