"""A control call while pictures are painted: our front against a server that paints in its own process."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

import grpc

from atelier.v1 import generation_pb2, generation_pb2_grpc, server_pb2, server_pb2_grpc
from benchmarks import servers
from benchmarks.bases import random_adapters, sd1_shaped
from benchmarks.harness import Row, interleave, row

_PAUSE_SECONDS = 0.005
_STREAMS = 4


def run(*, quick: bool) -> list[Row]:
    calls, rounds = (20, 1) if quick else (400, 7)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = sd1_shaped(root / "base")
        files = random_adapters(root / "files", base, count=1, rank=16)
        with servers.diffusers(base, files) as theirs, servers.ours(base, root / "data", files) as mine:
            samples = interleave(
                lambda: asyncio.run(_p99(mine, calls)), lambda: asyncio.run(_p99(theirs, calls)), rounds
            )
    target = None if quick else ">= 5"
    return [row("p99 of GetServerInfo while generating", "s", samples, target, ratio=lambda a, b: b / a)]


async def _p99(address: str, calls: int) -> float:
    """Seconds, over so many calls one after another, while a few streams keep the server painting."""
    async with grpc.aio.insecure_channel(address) as channel:
        painting = [asyncio.create_task(_paint(channel, seed)) for seed in range(_STREAMS)]
        stub = server_pb2_grpc.ServerServiceStub(channel)
        taken = []
        for _ in range(calls):
            before = perf_counter()
            await stub.GetServerInfo(server_pb2.GetServerInfoRequest())
            taken.append(perf_counter() - before)
            await asyncio.sleep(_PAUSE_SECONDS)
        for task in painting:
            task.cancel()
        await asyncio.gather(*painting, return_exceptions=True)
    return statistics.quantiles(taken, n=100, method="inclusive")[-1]


async def _paint(channel: grpc.aio.Channel, seed: int) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    while True:
        request = generation_pb2.GenerateRequest(
            prompt="a red cat",
            seed=seed,
            num_inference_steps=50,
            guidance_scale=5.0,
            scheduler="ddim",
            width=64,
            height=64,
        )
        async for _ in stub.Generate(request):
            pass
