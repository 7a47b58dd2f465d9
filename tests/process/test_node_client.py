"""Clients that know nothing of this project: Node reads protos/, buf asks the server's reflection.

Both list the adapters and stream a Generate. The Node client runs where Node is installed; `make test` brings
its two packages in first (target `node-client`).
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "tests" / "node"
NODE = shutil.which("node")
PNG_HEAD = "89504e470d0a1a0a"

BUF = str(Path(sys.executable).with_name("buf"))

pytestmark = pytest.mark.process
# Where there is no Node there is nothing to run, and CI has it.
needs_node = pytest.mark.skipif(NODE is None or shutil.which("npm") is None, reason="needs Node and npm")


def _wait_until_ready(address: str) -> None:
    """Follows the service's health until its worker can paint."""
    with grpc.insecure_channel(address) as channel:
        watched = health_pb2.HealthCheckRequest(service="atelier.v1.GenerationService")
        for answer in health_pb2_grpc.HealthStub(channel).Watch(watched, timeout=120):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on a free port: HOST:PORT."""
    folder = tmp_path_factory.mktemp("server")
    options = [
        "--model",
        "pocket",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--port",
        "0",
        "--metrics-port",
        "-1",
    ]
    command = [sys.executable, "-m", "atelier_server", *options, "--data-dir", str(folder / "data")]
    with (folder / "stderr.txt").open("w+") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            first = server.stdout.readline()
            found = re.match(r"atelier listening on (\S+:\d+)", first)
            assert found, f"{first!r}\n{(folder / 'stderr.txt').read_text()}"
            _wait_until_ready(found[1])
            yield found[1]
        finally:
            server.terminate()
            server.communicate(timeout=60)


@pytest.fixture(scope="module")
def lines(address: str) -> list[dict[str, Any]]:
    """What the Node client printed."""
    assert NODE is not None
    assert (CLIENT / "node_modules").is_dir(), "run `make node-client`"
    command = [NODE, str(CLIENT / "client.mjs"), address, str(ROOT / "protos"), "a red octopus on a beach"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_node
def test_node_lists_the_adapters(lines: list[dict[str, Any]]) -> None:
    assert lines[0] == {"adapters": []}


@needs_node
def test_node_streams_a_generate_in_order(lines: list[dict[str, Any]]) -> None:
    events = [line["event"] for line in lines[1:]]
    assert events[0] == "queued"
    assert events[-2:] == ["image", "completed"]
    assert set(events[1:-2]) <= {"queued", "progress"}
    progress = [line for line in lines if line.get("event") == "progress"]
    assert (progress[-1]["step"], progress[-1]["total"]) == (4, 4)


@needs_node
def test_node_receives_a_png_and_the_receipt(lines: list[dict[str, Any]]) -> None:
    image, completed = lines[-2:]
    assert (image["mime_type"], image["head"], image["last"]) == ("image/png", PNG_HEAD, True)
    assert int(image["size"]) == image["bytes"] > 100
    assert (completed["seed"], completed["receipt"]["base_model"]) == ("7", "pocket")


def _buf_curl(address: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to a call that buf encodes by what the server's reflection says."""
    url = f"http://{address}/atelier.v1.{method}"
    command = [BUF, "curl", "--http2-prior-knowledge", "--protocol", "grpc", "-d", json.dumps(request), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(_objects(done.stdout))


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects written one after another."""
    decoder, rest = json.JSONDecoder(), text.strip()
    while rest:
        found, end = decoder.raw_decode(rest)
        yield found
        rest = rest[end:].lstrip()


def test_buf_lists_the_adapters_by_reflection(address: str) -> None:
    assert _buf_curl(address, "AdapterService/ListAdapters", {}) == [{}]


def test_buf_streams_a_generate_by_reflection(address: str) -> None:
    request = {
        "prompt": "a red octopus on a beach",
        "seed": "7",
        "num_inference_steps": 4,
        "guidance_scale": 3,
    }
    answers = _buf_curl(address, "GenerationService/Generate", request)
    events = [next(iter(answer)) for answer in answers]
    assert events[0] == "queued"
    assert events[-2:] == ["image", "completed"]
    assert base64.b64decode(answers[-2]["image"]["data"]).hex().startswith(PNG_HEAD)
