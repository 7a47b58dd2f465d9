"""A streamed Generate over gRPC against the same work called in process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from atelier import Client
from atelier_server.core import GenerationJob
from benchmarks.desk import Desk, job
from benchmarks.harness import Row, interleave, row, seconds

_PROMPT = "a red octopus on a beach"


def run(*, quick: bool) -> list[Row]:
    steps, pairs = (2, 1) if quick else (30, 21)
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder) / "server") as address:
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


@contextmanager
def _server(data_dir: Path) -> Iterator[str]:
    """A real server process on one thread; ends with the block."""
    command = [sys.executable, "-m", "atelier_server", "--model", "pocket", "--device", "cpu"]
    options = ["--port", "0", "--metrics-port", "-1", "--threads", "1", "--data-dir", str(data_dir)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        process.stdout.readline()
        port = json.loads((data_dir / "server.json").read_text())["port"]
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
