"""Both clients against a scripted server on a real channel."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

import atelier
from atelier.events import Completed, Image, Progress, Queued


def test_generate_returns_whole_pictures_in_order(server: Any) -> None:
    with atelier.Client(server.address) as client:
        result = client.generate("an octopus", adapters=["otto@6:0.8", "zoe"], seed=7, num_images=3, width=64)
    (request,) = server.script.generates
    assert [s.adapter for s in request.adapters] == ["otto@6:0.8", "zoe"]
    assert (request.prompt, request.seed, request.num_images, request.width) == ("an octopus", 7, 3, 64)
    assert not request.HasField("guidance_scale")
    assert [(image.index, image.seed) for image in result.images] == [(0, 7), (1, 8), (2, 9)]
    assert all(image.data.startswith(b"\x89PNG") for image in result.images)
    assert result.receipt.prompt == "an octopus"
    assert result.receipt.versions == {"atelier": "0.1.0"}


def test_generate_stream_tells_every_event(server: Any) -> None:
    with atelier.Client(server.address) as client:
        kinds = [type(event) for event in client.generate_stream("", seed=1)]
    assert kinds == [Queued, Progress, Image, Completed]


def test_a_request_without_a_seed_gets_one_so_that_it_can_be_repeated(server: Any) -> None:
    with atelier.Client(server.address) as client:
        result = client.generate("x")
    assert server.script.generates[0].HasField("seed")
    assert result.seed == server.script.generates[0].seed == result.images[0].seed


def test_train_uploads_a_folder_and_yields_events(server: Any, folder: Path) -> None:
    with atelier.Client(server.address) as client:
        events = list(client.train("otto", folder=folder, instance_prompt="a sks octopus", rank=4))
    (upload,) = server.script.uploads
    recipe = upload[0].start.recipe
    assert (recipe.name, recipe.rank, recipe.num_images) == ("otto", 4, 2)
    assert [m.image.filename for m in upload[1:]] == ["a.PNG", "b.png"]
    assert [m.image.caption for m in upload[1:]] == ["", "a sks octopus"]
    assert [event.seq for event in events] == list(range(1, 11))
    assert isinstance(events[-1], atelier.TrainingCompleted)
    assert events[-1].state is atelier.TrainingState.SUCCEEDED
    assert events[0].create_time is not None


def test_large_pictures_go_in_pieces_of_a_mebibyte(server: Any) -> None:
    data = bytes(range(256)) * 10_000
    with atelier.Client(server.address) as client:
        list(client.train("otto", [data, atelier.TrainingImage(b"", "empty.png")], instance_prompt="x"))
    chunks = [m.image for m in server.script.uploads[0][1:]]
    assert max(len(chunk.data) for chunk in chunks) == 2**20
    assert b"".join(chunk.data for chunk in chunks if chunk.index == 0) == data
    assert [chunk.size_bytes for chunk in chunks if chunk.size_bytes] == [len(data)]
    assert chunks[-1].index == 1
    assert chunks[-1].filename == "empty.png"


def test_watching_after_the_last_event_ends_at_once(server: Any) -> None:
    with atelier.Client(server.address) as client:
        assert list(client.watch_training("otto", after_seq=10)) == []


def test_records(server: Any) -> None:
    with atelier.Client(server.address) as client:
        assert [adapter.name for adapter in client.list_adapters()] == ["bolt", "otto", "zoe"]
        adapter = client.get_adapter("otto")
        assert adapter.checkpoints[0].loss == 0.25
        assert adapter.create_time is None
        training = client.get_training("otto")
        assert training.state is atelier.TrainingState.RUNNING
        assert training.recipe == {"name": "otto", "rank": 8, "validation_prompts": ("p",)}
        assert [t.id for t in client.list_trainings()] == ["otto-k3f9"]
        assert client.cancel_training("otto").state is atelier.TrainingState.CANCELLED
        assert client.resume_training("otto").state is atelier.TrainingState.QUEUED
        client.delete_training("otto")
        assert client.load_adapter("otto") == atelier.LoadedAdapter("otto@6", True)
        assert client.unload_adapter("otto") == 2
        client.delete_adapter("otto")
        info = client.server_info()
    assert info.ready
    assert info.schedulers == ("ddim", "euler")
    assert info.base_model.native_width == 64


def test_import_declares_size_and_digest(server: Any, tmp_path: Path) -> None:
    source = tmp_path / "zoe.safetensors"
    source.write_bytes(b"x" * (2**20 + 5))
    with atelier.Client(server.address) as client:
        imported = client.import_adapter(source, "zoe", trigger="zoe")
    assert (imported.detected_format, imported.matched_modules, imported.adapter.name) == ("kohya", 32, "zoe")
    metadata, *chunks = server.script.imports[0]
    assert metadata.metadata.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata.metadata.size_bytes == 2**20 + 5
    assert [len(message.chunk) for message in chunks] == [2**20, 5]


def test_import_tells_what_was_understood(server: Any, tmp_path: Path) -> None:
    (tmp_path / "zoe.safetensors").write_bytes(b"x")
    with atelier.Client(server.address) as client:
        report = client.import_adapter(tmp_path / "zoe.safetensors", "zoe").report
    assert report is not None
    assert (report.format, report.coverage, report.probe) == ("kohya", 0.25, 0.125)
    assert [(count.alpha, count.modules) for count in report.alphas] == [(0.5, 1), (8.0, 1)]
    assert report.unmatched[0].reason == "no such module"
    assert report.tokens[0].encoders == ("text_encoder",)
    assert report.metadata == {"ss_epoch": "3"}


def test_a_folder_is_uploaded_file_after_file(server: Any, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "unet" / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "learned_embeds.safetensors").write_bytes(b"tokens")
    (tmp_path / "README.md").write_bytes(b"not wanted")
    with atelier.Client(server.address) as client:
        client.import_adapter(tmp_path, "zoe", allow_partial=True, placeholder="<z>", new_version=True)
    message, *chunks = server.script.imports[-1]
    metadata, data = message.metadata, b"".join(chunk.chunk for chunk in chunks)
    assert [(file.name, file.size_bytes) for file in metadata.files] == [
        ("learned_embeds.safetensors", 6),
        ("unet/adapter_config.json", 2),
        ("unet/adapter_model.safetensors", 7),
    ]
    assert data == b"tokens{}weights"
    assert (metadata.size_bytes, metadata.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (metadata.allow_partial, metadata.placeholder, metadata.new_version) == (True, "<z>", True)
    empty = tmp_path / "empty"
    empty.mkdir()
    with atelier.Client(server.address) as client, pytest.raises(ValueError, match=r"no \.safetensors"):
        client.import_adapter(empty, "zoe")


def test_a_hub_id_is_for_the_server_to_read(server: Any) -> None:
    with atelier.Client(server.address) as client:
        client.import_adapter("someone/toy-lora/toy.safetensors@main", "zoe")
        (message,) = server.script.imports[-1]
        assert message.metadata.hub_id == "someone/toy-lora/toy.safetensors@main"
        assert not message.metadata.size_bytes
        with pytest.raises(FileNotFoundError):
            client.import_adapter("no-such-file.safetensors", "zoe")
        with pytest.raises(TypeError, match="did you mean 'placeholder'"):
            client.import_adapter("a/b", "zoe", placeholders="<z>")  # type: ignore[call-arg]


def test_export_writes_a_checked_file(server: Any, tmp_path: Path) -> None:
    server.script.export_digest = hashlib.sha256(server.script.export).hexdigest()
    target = tmp_path / "otto.safetensors"
    with atelier.Client(server.address) as client:
        exported = client.export_adapter("otto", target, "kohya")
    assert server.script.calls[0].format == 2
    assert exported.adapter == "otto@6"
    assert target.read_bytes() == b"weights"


def test_a_damaged_export_leaves_nothing_behind(server: Any, tmp_path: Path) -> None:
    server.script.export_digest = "00" * 32
    target = tmp_path / "otto.safetensors"
    target.write_bytes(b"old")
    with atelier.Client(server.address) as client, pytest.raises(atelier.DataLossError, match="7 bytes"):
        client.export_adapter("otto", target)
    assert [p.name for p in tmp_path.iterdir()] == ["otto.safetensors"]
    assert target.read_bytes() == b"old"


def test_an_error_carries_all_its_details(server: Any, full_refusal: grpc.Status) -> None:
    server.script.refuse = full_refusal
    with atelier.Client(server.address) as client, pytest.raises(atelier.InvalidArgumentError) as caught:
        client.generate("x", width=63)
    error = caught.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "INVALID_REQUEST"
    assert error.metadata == {"step": "7"}
    assert [v.field for v in error.violations] == ["width", "seed"]
    assert error.retry_after == 2.5
    assert error.resource == atelier.Resource("adapter", "otto")
    assert str(error).startswith("INVALID_ARGUMENT INVALID_REQUEST: width")


def test_a_deadline_is_told(server: Any) -> None:
    server.script.pause_generate = True
    with atelier.Client(server.address) as client, pytest.raises(atelier.DeadlineExceededError):
        client.generate("x", timeout=0.3)
    server.script.stopping.set()


async def test_the_async_client_does_the_same(server: Any, folder: Path, tmp_path: Path) -> None:
    server.script.export_digest = hashlib.sha256(server.script.export).hexdigest()
    async with atelier.AsyncClient(server.address) as client:
        result = await client.generate("an octopus", adapters="otto", num_images=2, seed=3)
        assert [image.seed for image in result.images] == [3, 4]
        events = [e async for e in client.train("otto", folder=folder, instance_prompt="x")]
        assert [event.seq for event in events] == list(range(1, 11))
        assert [a.name async for a in client.list_adapters()] == ["bolt", "otto", "zoe"]
        assert [t.id async for t in client.list_trainings()] == ["otto-k3f9"]
        assert (await client.get_training("otto")).id == "otto-k3f9"
        assert (await client.get_adapter("otto")).name == "otto"
        assert (await client.load_adapter("otto")).loaded
        assert await client.unload_adapter("otto") == 2
        await client.delete_adapter("otto")
        await client.delete_training("otto")
        assert (await client.cancel_training("otto")).state.ended
        assert not (await client.resume_training("otto")).state.ended
        exported = await client.export_adapter("otto", tmp_path / "o.safetensors")
        assert exported.path.read_bytes() == b"weights"
        assert (await client.import_adapter(exported.path, "zoe")).matched_modules == 32
        assert (await client.server_info()).ready


async def test_the_async_client_raises_the_same_errors(server: Any, full_refusal: grpc.Status) -> None:
    server.script.refuse = full_refusal
    async with atelier.AsyncClient(server.address) as client:
        with pytest.raises(atelier.InvalidArgumentError) as caught:
            await client.generate("x")
        assert len(caught.value.violations) == 2
        with pytest.raises(atelier.InvalidArgumentError):
            await client.get_adapter("otto")


def test_worker_lost_is_a_verdict_and_not_tried_again(
    server: Any, make_refusal: Callable[..., grpc.Status]
) -> None:
    info = error_details_pb2.ErrorInfo(reason="WORKER_LOST", domain="atelier")
    server.script.refuse = make_refusal(grpc.StatusCode.UNAVAILABLE, "died three times", info)
    with (
        atelier.Client(server.address) as client,
        pytest.raises(atelier.UnavailableError, match="three times"),
    ):
        client.generate("x")
    assert len(server.script.generates) == 1
