"""The server around its calls: health, reflection, adapters, metrics, drain, the data directory."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from atelier.v1 import adapter_pb2, generation_pb2, server_pb2
from atelier_server.app import Application
from atelier_server.core import METHODS, SCHEDULERS
from atelier_server.data_directory import DataDirectory
from atelier_server.errors import StartError
from tests.contract.harness import FAKE, Service, Start, import_requests, kinds, refused, running, settings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
STEPS = {"max_train_steps": 10, "checkpointing_steps": 5}


async def status(service: Service, name: str) -> int:
    answer = await service.health.Check(health_pb2.HealthCheckRequest(service=name))
    return int(answer.status)


async def test_readiness_follows_the_worker_and_life_does_not(service: Service) -> None:
    names = [f"atelier.v1.{name}Service" for name in ("Generation", "Training", "Adapter", "Server")]
    assert [await status(service, name) for name in ("", *names)] == [SERVING] * 5
    file = service.application._directory.path / "server.json"
    before = json.loads(file.read_text())
    assert (before["port"], before["pid"]) == (service.application.port, os.getpid())
    watch = service.health.Watch(health_pb2.HealthCheckRequest(service=names[0]))
    stream = aiter(watch)
    assert (await anext(stream)).status == SERVING
    os.kill(before["worker_pid"], signal.SIGKILL)
    assert (await anext(stream)).status == NOT_SERVING
    assert await status(service, "") == SERVING
    assert (await anext(stream)).status == SERVING
    watch.cancel()
    assert json.loads(file.read_text())["worker_pid"] not in (None, before["worker_pid"])


async def test_reflection_lists_the_services(service: Service) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    answers = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    names = {entry.name for entry in answers[0].list_services_response.service}
    assert names >= {"atelier.v1.GenerationService", "atelier.v1.TrainingService", "grpc.health.v1.Health"}


async def test_server_info(service: Service) -> None:
    info = await service.server.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert list(info.base_model.training_methods) == list(METHODS)
    assert "fp16" in info.base_model.training_precisions
    assert info.ready
    assert (info.base_model.reference, info.base_model.native_width) == ("fake", 64)
    assert tuple(info.schedulers) == SCHEDULERS
    assert info.limits.max_lora_rank == 64
    assert info.slots.total == 16


async def test_the_request_id_comes_back(service: Service) -> None:
    call = service.server.GetServerInfo(
        server_pb2.GetServerInfoRequest(), metadata=(("x-request-id", "mine-1"),)
    )
    await call
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine-1"


def ask(name: str) -> adapter_pb2.LoadAdapterRequest:
    return adapter_pb2.LoadAdapterRequest(adapter=name)


async def test_adapters_are_loaded_and_unloaded(service: Service) -> None:
    await service.train(**STEPS)
    first, second = (
        await service.adapters.LoadAdapter(ask("otto@5")),
        await service.adapters.LoadAdapter(ask("otto@5")),
    )
    assert (first.adapter, first.loaded, second.loaded) == ("otto@v1@5", True, False)
    answer = await service.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter="otto@v1"))
    assert [(c.step, c.resident) for c in answer.adapter.checkpoints] == [(5, True), (10, False)]
    assert list(answer.adapter.tags) == ["v1"]
    info = await service.server.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert list(info.slots.adapters) == ["otto@v1@5"]
    unload = adapter_pb2.UnloadAdapterRequest(adapter="otto")
    assert (await service.adapters.UnloadAdapter(unload)).unloaded == 1
    assert (await service.adapters.UnloadAdapter(unload)).unloaded == 0
    for bad in ("../x", "otto:0.5", ""):
        refusal = await refused(service.adapters.LoadAdapter(ask(bad)))
        assert set(refusal.violations) == {"adapter"}
    refusal = await refused(service.adapters.LoadAdapter(ask("otto@7")))
    assert refusal.reason == "ADAPTER_NOT_FOUND"
    unload = adapter_pb2.UnloadAdapterRequest(adapter="nobody")
    assert (await refused(service.adapters.UnloadAdapter(unload))).reason == "ADAPTER_NOT_FOUND"
    delete = adapter_pb2.DeleteAdapterRequest(adapter="otto@5")
    assert set((await refused(service.adapters.DeleteAdapter(delete))).violations) == {"adapter"}


async def export(service: Service, name: str, layout: int = 0) -> bytes:
    request = adapter_pb2.ExportAdapterRequest(adapter=name, format=layout)
    messages = [message async for message in service.adapters.ExportAdapter(request)]
    assert all(len(message.chunk) <= 2**20 for message in messages)
    data = b"".join(message.chunk for message in messages[1:])
    assert messages[0].metadata.size_bytes == len(data)
    assert messages[0].metadata.sha256 == hashlib.sha256(data).hexdigest()
    return data


async def test_import_and_export(service: Service) -> None:
    data = bytes(range(256)) * 4096 * 3
    answer = await service.adapters.ImportAdapter(iter(import_requests(data, trigger="a guest")))
    assert (answer.adapter.name, answer.adapter.version, answer.matched_modules) == ("guest", 1, 2)
    assert answer.adapter.trigger == "a guest"
    assert not answer.adapter.checkpoints[0].HasField("loss")
    assert await export(service, "guest") == data
    taken = await refused(service.adapters.ImportAdapter(iter(import_requests(data))))
    assert taken.reason == "ADAPTER_EXISTS"
    answer = await service.adapters.ImportAdapter(iter(import_requests(data, new_version=True)))
    assert answer.adapter.version == 2
    assert list((service.application._directory.path / "uploads").iterdir()) == []


async def test_a_folder_is_taken_apart_and_its_report_kept(service: Service) -> None:
    file = adapter_pb2.ImportAdapterRequest.File
    files = [file(name="adapter_config.json", size_bytes=2), file(name="a.safetensors", size_bytes=7)]
    answer = await service.adapters.ImportAdapter(iter(import_requests(b"{}weights", files=files)))
    assert await export(service, "guest") == b"weights"
    assert list((service.application._directory.path / "uploads").iterdir()) == []
    shown = await service.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter="guest"))
    assert shown.adapter.report == answer.report
    assert [(part.name, part.reason) for part in answer.report.unmatched] == [
        ("unet.c", "the base model has no such module")
    ]
    listed = await service.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())
    assert not listed.adapters[0].HasField("report")


@pytest.mark.parametrize(
    ("files", "field"),
    [
        ([("../a.safetensors", 8)], "metadata.files[0].name"),
        ([("a/b.safetensors", 8)], "metadata.files[0].name"),
        ([("a.bin", 8)], "metadata.files[0].name"),
        ([("a.safetensors", 7)], "metadata.files"),
        ([("a.safetensors", 4), ("a.safetensors", 4)], "metadata.files"),
        ([(f"{n}.json", 0) for n in range(17)] + [("a.safetensors", 8)], "metadata.files"),
    ],
)
async def test_a_folder_that_is_none(service: Service, files: list[tuple[str, int]], field: str) -> None:
    named = [adapter_pb2.ImportAdapterRequest.File(name=name, size_bytes=size) for name, size in files]
    refusal = await refused(service.adapters.ImportAdapter(iter(import_requests(b"bad file", files=named))))
    assert refusal.code == "INVALID_ARGUMENT"
    assert field in refusal.violations


@pytest.mark.parametrize("hub_id", ["nobody", "../x", "a/b/../../c@x y", "http://a/b", "a/b//etc/x", "a/b/"])
async def test_a_hub_id_that_is_none(service: Service, hub_id: str) -> None:
    fields = {"hub_id": hub_id, "size_bytes": 0, "sha256": ""}
    refusal = await refused(service.adapters.ImportAdapter(iter(import_requests(b"", **fields))))
    assert refusal.code == "INVALID_ARGUMENT"
    assert "metadata.hub_id" in refusal.violations


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"size_bytes": 5}, "INVALID_REQUEST"),
        ({"size_bytes": 50}, "UPLOAD_INCOMPLETE"),
        ({"sha256": "0" * 64}, "INVALID_REQUEST"),
        ({"sha256": "x", "name": "X", "size_bytes": 0}, "INVALID_REQUEST"),
        ({}, "ADAPTER_MISMATCH"),
    ],
)
async def test_a_bad_import_leaves_nothing(service: Service, fields: dict, reason: str) -> None:
    refusal = await refused(service.adapters.ImportAdapter(iter(import_requests(b"bad file", **fields))))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
    assert list((service.application._directory.path / "uploads").iterdir()) == []


async def test_a_rotten_file_and_a_lost_worker_are_told(service: Service) -> None:
    await service.adapters.ImportAdapter(iter(import_requests(b"fine")))
    refusal = await refused(export(service, "guest", adapter_pb2.ADAPTER_FORMAT_KOHYA))
    assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "WORKER_LOST")
    blobs = service.application._directory.path.glob("adapters/blobs/*/*")
    (file,) = [blob for blob in blobs if blob.read_bytes() == b"fine"]  # the other is the report
    file.write_bytes(b"rot!")
    refusal = await refused(export(service, "guest"))
    assert (refusal.code, refusal.reason) == ("DATA_LOSS", "ADAPTER_CORRUPT")


async def test_metrics_are_served(start: Start) -> None:
    service = await start(metrics_port=0)
    await service.generate("a", num_images=2)
    await refused(service.generate("a", num_images=0))
    url = f"http://127.0.0.1:{service.application.metrics_port}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    assert "atelier_images_total 2.0" in text
    assert 'atelier_request_duration_seconds_count{code="OK",method="Generate"} 1.0' in text
    assert 'code="INVALID_ARGUMENT",method="Generate"' in text
    assert 'atelier_queue_wait_seconds_count{kind="generate"} 1.0' in text


async def test_drain_finishes_what_runs_and_admits_nothing(service: Service) -> None:
    stream = aiter(service.generations.Generate(generation_pb2.GenerateRequest(prompt="hold")))
    while (await anext(stream)).WhichOneof("event") != "progress":
        pass
    service.application.leave()
    await service.until(NOT_SERVING, "")
    refusal = await refused(service.generate("a"))
    assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "SERVER_DRAINING")
    refusal = await refused(service.train())
    assert refusal.reason == "SERVER_DRAINING"
    service.application.leave()
    refusal = await refused(anext(stream))
    assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "SERVER_DRAINING")
    await service.serving


async def test_a_data_directory_has_one_server(service: Service) -> None:
    path = service.application._directory.path
    with pytest.raises(StartError, match="another server"):
        Application(settings(path), FAKE)


async def test_a_worker_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    async with running(tmp_path, ready=False, model="broken") as service:
        with pytest.raises(StartError, match="there is no such model"):
            await service.serving


SERVE = """
import asyncio, logging, sys
from atelier_server import app
from tests.contract.harness import FAKE, settings
from pathlib import Path
logging.basicConfig(level="INFO", stream=sys.stderr)
asyncio.run(app.run(settings(Path(sys.argv[1])), FAKE))
"""


async def spawn(data_dir: Path) -> tuple[asyncio.subprocess.Process, int]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, str(data_dir), stdout=asyncio.subprocess.PIPE
    )
    line = (await process.stdout.readline()).decode()
    assert line.startswith("atelier listening on 127.0.0.1:")
    return process, json.loads((data_dir / "server.json").read_text())["port"]


async def test_killed_fronts_leave_no_lock_and_signals_drain(tmp_path: Path) -> None:
    first, _ = await spawn(tmp_path)
    first.kill()
    await first.wait()
    second, _ = await spawn(tmp_path)
    second.send_signal(signal.SIGTERM)
    assert await second.wait() == 0
    assert not (tmp_path / "server.json").exists()


async def test_bad_settings_are_all_told(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "atelier_server",
        "--port=70000",
        "--device=toaster",
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "ATELIER_SLOTS": "0", "ATELIER_LIMIT_MAX_NUM_IMAGES": "x"},
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    for part in ("--port (ATELIER_PORT)", "ATELIER_DEVICE", "ATELIER_SLOTS", "ATELIER_LIMIT_MAX_NUM_IMAGES"):
        assert part in errors.decode()


async def test_a_call_of_the_next_moment_works_after_a_crash(service: Service) -> None:
    os.kill(service.application.worker.pid, signal.SIGKILL)
    assert kinds(await service.generate("a"))[-1] == "completed"


async def test_a_full_disk_does_not_end_a_server_whose_worker_comes_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """server.json is for tools; it is written again when there is room."""

    def full(self: DataDirectory, **facts: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DataDirectory, "announce", full)
    watch = service.health.Watch(health_pb2.HealthCheckRequest(service="atelier.v1.GenerationService"))
    assert (await watch.read()).status == SERVING
    os.kill(service.application.worker.pid, signal.SIGKILL)
    back = asyncio.create_task(_states(watch, 2))
    await asyncio.wait((back, service.serving), timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert not service.serving.done()
    assert await back == [NOT_SERVING, SERVING]


async def _states(watch: grpc.aio.UnaryStreamCall[Any, Any], count: int) -> list[int]:
    """The next so many that a health stream tells."""
    told = [int((await watch.read()).status) for _ in range(count)]
    watch.cancel()
    return told
