"""A streamed Generate over gRPC against the same work called in process."""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path

from atelier import Client
from atelier_server.core import GenerationJob
from benchmarks import servers
from benchmarks.desk import Desk, job
from benchmarks.harness import Row, interleave, row, seconds

_PROMPT = "a red octopus on a beach"


def run(*, quick: bool) -> list[Row]:
    steps, pairs = (2, 1) if quick else (30, 21)
    with tempfile.TemporaryDirectory() as folder, servers.ours("pocket", Path(folder) / "server") as address:
        desk = Desk("pocket", Path(folder) / "desk")
        seeds, mine = count(), count()
        with Client(address) as client:

            def ours() -> None:
                client.generate(
                    _PROMPT, seed=next(seeds), num_inference_steps=steps, guidance_scale=5.0, scheduler="ddim"
                )

            def peer() -> None:
                number = next(mine)
                request: GenerationJob = job(f"r{number}", _PROMPT, steps=steps, seed=number)
                desk.generate([request])

            samples = interleave(lambda: 1 / seconds(ours), lambda: 1 / seconds(peer), pairs)
    target = None if quick else ">= 0.95"
    return [row("one 64-pixel picture, pocket", "images/s", samples, target, ratio=lambda a, b: a / b)]
