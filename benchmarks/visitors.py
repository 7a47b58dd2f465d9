"""Clients of a load run: those who read, those who dawdle, stop reading, leave, or are killed.

`python -m benchmarks.visitors ADDRESS` is a client that asks for a picture and then only waits to be killed.
"""

from __future__ import annotations

import asyncio
import random
import sys
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

import grpc
import grpc.aio

from atelier.v1 import generation_pb2 as pb
from atelier.v1.generation_pb2_grpc import GenerationServiceStub

PROMPTS = tuple(
    f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("octopus", "rocket")
)
_SCHEDULERS = ("ddim", "euler", "euler-a", "dpmpp-2m", "unipc")
_DAWDLE_SECONDS = 0.3
_STOP_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Visit:
    """How a call went: `code` is the name of its gRPC status."""

    kind: str
    code: str
    seconds: float
    images: int


Call = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
Behaviour = Callable[[Call], Awaitable[int]]


async def _reads(call: Call) -> int:
    return len([message async for message in call if message.HasField("image") and message.image.last])


async def _dawdles(call: Call) -> int:
    images = 0
    async for message in call:
        images += message.HasField("image") and message.image.last
        await asyncio.sleep(_DAWDLE_SECONDS)
    return images


async def _stops_reading(call: Call) -> int:
    await call.read()
    await asyncio.sleep(_STOP_SECONDS)
    call.cancel()
    return 0


async def _leaves(call: Call) -> int:
    await call.read()
    call.cancel()
    return 0


BEHAVIOURS: dict[str, Behaviour] = {
    "reads": _reads,
    "dawdles": _dawdles,
    "stops reading": _stops_reading,
    "leaves": _leaves,
}
KILLED = "killed"
# Of a hundred visitors.
SHARES = {"reads": 70, "dawdles": 10, "stops reading": 6, "leaves": 7, KILLED: 7}
EXPECTED = {
    "reads": {"OK"},
    "dawdles": {"OK"},
    "stops reading": {"CANCELLED", "OK"},
    "leaves": {"CANCELLED", "OK"},
    KILLED: {"killed"},
}


def kinds(count: int, chance: random.Random) -> list[str]:
    """A shuffled list of visitors, in the shares above."""
    listed = [
        kind for kind, share in SHARES.items() if kind != "reads" for _ in range(round(count * share / 100))
    ]
    listed += ["reads"] * (count - len(listed))
    chance.shuffle(listed)
    return listed


def wish(chance: random.Random, adapters: list[str], steps: int) -> pb.GenerateRequest:
    """One request of about so many steps: one adapter or two, mixed schedulers, guidance and sizes."""
    chosen = chance.sample(adapters, k=2 if chance.random() < 0.2 else 1)
    strict = chance.random() < 0.1
    return pb.GenerateRequest(
        # The server keeps the results of those that give an id, for a while.
        request_id=str(uuid.UUID(int=chance.getrandbits(128), version=4)) if chance.random() < 0.25 else "",
        prompt=chance.choice(PROMPTS),
        adapters=[pb.AdapterSelection(adapter=f"{name}:0.8") for name in chosen],
        seed=chance.getrandbits(32),
        num_images=2 if chance.random() < 0.1 else 1,
        num_inference_steps=chance.randint(steps * 3 // 5, steps * 7 // 5),
        guidance_scale=chance.choice((1.0, 5.0, 7.5)),
        scheduler=chance.choice(_SCHEDULERS),
        height=96 if chance.random() < 0.1 else 64,
        reproducibility=pb.REPRODUCIBILITY_STRICT if strict else pb.REPRODUCIBILITY_FAST,
    )


async def visit(stub: GenerationServiceStub, kind: str, request: pb.GenerateRequest) -> Visit:
    """One call of a client that lives. It always ends with a status."""
    began = perf_counter()
    call: Call = stub.Generate(request)  # type: ignore[assignment]
    images = 0
    with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):  # the code below says which
        images = await BEHAVIOURS[kind](call)
    code = await call.code()
    return Visit(kind, code.name, perf_counter() - began, images)


async def killed(address: str, request: pb.GenerateRequest) -> Visit:
    """One call of a process that is killed once it has begun to read."""
    began = perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.visitors", address, request.SerializeToString().hex()),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    process.kill()
    await process.wait()
    return Visit(KILLED, "killed", perf_counter() - began, 0)


def main(address: str, request: str) -> None:
    with grpc.insecure_channel(address) as channel:
        call = GenerationServiceStub(channel).Generate(pb.GenerateRequest.FromString(bytes.fromhex(request)))
        for message in call:
            print(message.WhichOneof("event"), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
