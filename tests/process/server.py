"""A real server process for tests: started, killed, started again on the same data and port."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_SECONDS = 120
# A server with a scripted worker: for tests of what the front does by itself.
FRONT = "tests.process.front"


class Server:
    """`python -m atelier_server` on `data_dir`; `stop` and `kill` leave the data.

    With `--health-port` among the options health is asked there, without TLS.
    """

    def __init__(self, data_dir: Path, *options: str, module: str = "atelier_server") -> None:
        self.data_dir = data_dir
        self._module = module
        self._options = options
        self._port = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> Server:
        """Starts it and waits until the worker is ready. A second start takes the same port."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with (self.data_dir / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", self._module, "--model", "pocket", "--device", "cpu"),
                    *("--port", str(self._port), "--metrics-port", "0", "--threads", "1"),
                    *("--data-dir", str(self.data_dir), *self._options),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        match = re.match(r"atelier listening on \S+:(\d+)", line)
        assert match, f"the server said {line!r}; its log: {self.log()}"
        self._port = int(match[1])
        self.wait_ready()
        return self

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.data_dir / "server.json").read_text())
        return state

    def log(self) -> str:
        return (self.data_dir / "server.log").read_text()[-4000:]

    @property
    def health_address(self) -> str:
        return f"127.0.0.1:{self.state['health_port'] or self._port}"

    def wait_ready(self) -> None:
        """Watches the health service until generations are served."""
        request = health_pb2.HealthCheckRequest(service="atelier.v1.GenerationService")
        with grpc.insecure_channel(self.health_address) as channel:
            for answer in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=START_SECONDS):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return

    def health(self, service: str = "") -> int:
        with grpc.insecure_channel(self.health_address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status)

    def metrics(self) -> dict[str, float]:
        """Sample name with its labels, as scraped, to its value."""
        url = f"http://127.0.0.1:{self.state['metrics_port']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    # ------------------------------------------------------------------------------------------------ ends
    def kill(self) -> None:
        """kill -9 of the front."""
        assert self._process is not None
        self._process.kill()
        self._wait(10)

    def kill_worker(self) -> int:
        """kill -9 of the worker; its number."""
        pid = int(self.state["worker_pid"])
        os.kill(pid, signal.SIGKILL)
        return pid

    def terminate(self) -> None:
        """SIGTERM, and no waiting."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM; the exit code."""
        self.terminate()
        return self._wait(timeout)

    def _wait(self, timeout: float) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        code = self._process.wait(timeout=timeout)
        self._process.stdout.close()
        return code


def wait_gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process (not a child of ours) ends within the time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)
