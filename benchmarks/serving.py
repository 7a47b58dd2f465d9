"""A real server process for the time of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

_READY_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Serving:
    """A running server, as its data directory tells of it."""

    data_dir: Path

    def _told(self, name: str) -> int:
        return int(json.loads((self.data_dir / "server.json").read_text())[name])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._told('port')}"

    @property
    def metrics_port(self) -> int:
        """0 where metrics are off."""
        return self._told("metrics_port")

    @property
    def pid(self) -> int:
        return self._told("pid")

    @property
    def worker_pid(self) -> int:
        """Of the worker that runs now; there is one once the server is ready."""
        return self._told("worker_pid")


@contextmanager
def serving(data_dir: Path, *options: str, model: Path | str = "pocket") -> Iterator[Serving]:
    """A server on one thread of a CPU, ready, and drained at the end of the block.

    Its log is data_dir/server.log.
    """
    command = [sys.executable, "-m", "atelier_server", "--model", str(model), "--device", "cpu"]
    settings = ["--port", "0", "--threads", "1", "--data-dir", str(data_dir), *options]
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *settings], stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ)
        )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        server = Serving(data_dir)
        _wait_ready(server.address)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def health(channel: grpc.Channel, service: str = "") -> bool:
    """Whether a service says that it serves; "" is the server itself."""
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = check(health_pb2.HealthCheckRequest(service=service), timeout=30)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _wait_ready(address: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    with grpc.insecure_channel(address) as channel:
        while not health(channel, "atelier.v1.GenerationService"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server is not ready after {_READY_SECONDS:g} s")
            time.sleep(0.1)
