"""Requests that come at random times: how long until the first step, and until the picture is there.

The peer serves first come, first served; arrivals come at 0.8 of what it can do. Both sides get the same
arrivals, each round with others, and share one core with the client that asks.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from time import perf_counter

import grpc

from atelier.v1 import generation_pb2, generation_pb2_grpc
from benchmarks import servers
from benchmarks.bases import PROMPTS, random_adapters, sd1_shaped
from benchmarks.harness import Row, interleave, row

_LOAD = 0.8
_ADAPTERS = 8


@dataclass(frozen=True, slots=True)
class Served:
    """Seconds from a request's arrival to its first step and to its last message."""

    first_step: float
    completed: float


def run(*, quick: bool) -> list[Row]:
    steps, requests, rounds = (2, 4, 1) if quick else (20, 40, 5)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = sd1_shaped(root / "base")
        files = random_adapters(root / "files", base, count=2 if quick else _ADAPTERS, rank=16)
        asked = [_request(number, file, steps) for number, file in zip(range(requests), cycle(files))]
        with servers.diffusers(base, files) as theirs, servers.ours(base, root / "data", files) as mine:
            capacity = _capacity(theirs, asked[: max(2, requests // 4)])
            rate = _LOAD * capacity
            served = {"ours": _Rounds(mine, asked, rate), "peer": _Rounds(theirs, asked, rate)}
            means = interleave(served["ours"].run, served["peer"].run, rounds)
    # The first round was the warm-up.
    firsts = {side: [_p95(one, "first_step") for one in s.kept[1:]] for side, s in served.items()}
    return [
        row("p95 to the first step", "s", firsts, None if quick else "<= 0.1", ratio=_ratio),
        row("mean to the picture", "s", means, None if quick else "<= 0.6", ratio=_ratio),
    ]


def _ratio(ours: float, peer: float) -> float:
    return ours / peer


class _Rounds:
    """One side; round n of both has the same arrivals."""

    def __init__(self, address: str, asked: list[generation_pb2.GenerateRequest], rate: float) -> None:
        self.address, self.asked, self.rate = address, asked, rate
        self.kept: list[list[Served]] = []

    def run(self) -> float:
        random = Random(len(self.kept))
        gaps = [random.expovariate(self.rate) for _ in self.asked]
        served = asyncio.run(_arrive(self.address, self.asked, gaps))
        self.kept.append(served)
        return _mean(served, "completed")


async def _arrive(
    address: str, asked: list[generation_pb2.GenerateRequest], gaps: list[float]
) -> list[Served]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        begun = []
        for request, gap in zip(asked, gaps, strict=True):
            await asyncio.sleep(gap)
            begun.append(asyncio.create_task(_one(stub, request)))
        return list(await asyncio.gather(*begun))


async def _one(
    stub: generation_pb2_grpc.GenerationServiceStub, request: generation_pb2.GenerateRequest
) -> Served:
    arrived, first = perf_counter(), 0.0
    async for message in stub.Generate(request):  # type: ignore[attr-defined]
        if not first and message.HasField("progress"):
            first = perf_counter() - arrived
    return Served(first, perf_counter() - arrived)


def _capacity(address: str, asked: list[generation_pb2.GenerateRequest]) -> float:
    """Pictures a second of a server that always has work; the first one is its warm-up."""
    asyncio.run(_arrive(address, asked[:1], [0.0]))
    before = perf_counter()
    asyncio.run(_arrive(address, asked, [0.0] * len(asked)))
    return len(asked) / (perf_counter() - before)


def _request(number: int, file: Path, steps: int) -> generation_pb2.GenerateRequest:
    prompt = next(islice(cycle(PROMPTS), number, None))
    return generation_pb2.GenerateRequest(
        prompt=prompt,
        adapters=[generation_pb2.AdapterSelection(adapter=file.stem)],
        seed=number,
        num_inference_steps=steps,
        guidance_scale=5.0,
        scheduler="ddim",
        width=64,
        height=64,
    )


def _p95(served: list[Served], name: str) -> float:
    values: list[float] = [getattr(one, name) for one in served]
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def _mean(served: list[Served], name: str) -> float:
    return statistics.fmean(getattr(one, name) for one in served)
