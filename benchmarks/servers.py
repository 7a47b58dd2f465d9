"""Two server processes side by side: ours, and the one of diffusers that one writes first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atelier import Client


@contextmanager
def ours(model: Path | str, data_dir: Path, adapters: Sequence[Path] = ()) -> Iterator[str]:
    """A server on one thread with these adapter files imported, each by its stem; its address."""
    command = [sys.executable, "-m", "atelier_server", "--model", str(model), "--device", "cpu"]
    options = ["--port", "0", "--metrics-port", "-1", "--threads", "1", "--data-dir", str(data_dir)]
    with _running([*command, *options]) as process:
        _first_line(process)
        port = json.loads((data_dir / "server.json").read_text())["port"]
        address = f"127.0.0.1:{port}"
        _wait_ready(address)
        with Client(address) as client:
            for file in adapters:
                client.import_adapter(file, file.stem)
                client.load_adapter(file.stem)
        yield address


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


def _wait_ready(address: str) -> None:
    request = health_pb2.HealthCheckRequest(service="atelier.v1.GenerationService")
    with grpc.insecure_channel(address) as channel:
        for answer in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=120):  # type: ignore[attr-defined]
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()
