"""Bad pictures to learn from: huge, broken, missing, out of order, again and again."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from atelier import Client, NotFoundError, TrainingCompleted, TrainingImage, TrainingWarning
from atelier.errors import from_rpc
from atelier.v1.training_pb2 import TrainingRecipe, TrainRequest
from atelier.v1.training_pb2_grpc import TrainingServiceStub
from tests.pictures import soft_colours
from tests.process.bad_input.calls import (
    PICTURES,
    PNG,
    free_name,
    learns,
    refused,
    train,
    violations,
)
from tests.process.server import Server

pytestmark = pytest.mark.process


BIG = 20_000


def bomb() -> bytes:
    """A good black PNG of 20,000 x 20,000 pixels, one bit each; made row by row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + BIG // 8)
    pixels = b"".join(packer.compress(row) for _ in range(BIG)) + packer.flush()
    header = struct.pack(">IIBBBBB", BIG, BIG, 1, 0, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def most_memory(pid: int) -> int:
    """The most bytes that a process has had in memory so far."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024


def test_no_pictures(client: Client, tmp_path: Path) -> None:
    assert violations(lambda: train(client, "empty", [])) == {
        "recipe.num_images": "0 is not between 1 and 200"
    }
    with pytest.raises(ValueError, match="holds no pictures"):
        client.train("empty", folder=tmp_path, instance_prompt="x")


def test_a_huge_picture_is_refused_by_its_header(client: Client, server: Server) -> None:
    data = bomb()
    assert len(data) < 100_000
    processes = [int(server.state["pid"]), int(server.state["worker_pid"])]
    before = [most_memory(pid) for pid in processes]
    found = violations(lambda: train(client, "huge", [TrainingImage(data, "huge.png")] * 3))
    assert set(found) == {"images[0]", "images[1]", "images[2]"}
    assert "'huge.png' is 20000 x 20000; at most 50000000 pixels" in found["images[0]"]
    # Decoded it would be 400 MB.
    assert all(most_memory(pid) - old < 2**26 for pid, old in zip(processes, before, strict=True))
    assert learns(client, free_name())


def test_every_bad_picture_is_named(client: Client, tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("this is no picture")
    good = PICTURES[0].read_bytes()
    pictures = [
        TrainingImage(good, "good.png"),
        TrainingImage(text.read_bytes(), text.name),
        TrainingImage(good[: len(good) // 2], "half.png"),
        TrainingImage(PNG, "head.png"),
        TrainingImage(good, "wordy.png", "w" * 100_000),
    ]
    found = violations(lambda: train(client, "pictures", pictures))
    assert set(found) == {"images[1]", "images[2]", "images[3]", "images[4].caption"}
    assert found["images[1]"] == "'notes.png' is not a PNG, JPEG or WebP picture"
    assert "'half.png' cannot be decoded" in found["images[2]"]
    assert "'head.png' has no readable PNG header" in found["images[3]"]
    assert "100000 characters are more than 10000" in found["images[4].caption"]
    # Nothing is left of it: the name is free.
    assert learns(client, "pictures")


def send(server: Server, *requests: TrainRequest) -> Callable[[], object]:
    """A Train call of messages that the real client would not send."""

    def call() -> object:
        with grpc.insecure_channel(server.address) as channel:
            try:
                return list(TrainingServiceStub(channel).Train(iter(requests), timeout=30))
            except grpc.RpcError as error:
                raise from_rpc(error) from None

    return call


def start(name: str, num_images: int) -> TrainRequest:
    recipe = TrainingRecipe(name=name, instance_prompt="x", num_images=num_images, max_train_steps=1)
    return TrainRequest(start=TrainRequest.Start(request_id=str(uuid.uuid4()), recipe=recipe))


def picture(index: int, data: bytes, size: int) -> TrainRequest:
    return TrainRequest(image=TrainRequest.ImageChunk(index=index, size_bytes=size, data=data))


def test_a_stream_that_ends_before_its_pictures_do(client: Client, server: Server) -> None:
    data = PICTURES[0].read_bytes()
    one_of_two = send(server, start("short", 2), picture(0, data, len(data)))
    assert violations(one_of_two, "UPLOAD_INCOMPLETE") == {
        "images[1]": "the stream ended after 1 of 2 pictures"
    }
    half_of_one = send(server, start("short", 1), picture(0, data[:100], len(data)))
    assert violations(half_of_one, "UPLOAD_INCOMPLETE") == {
        "images[0]": f"has 100 of {len(data)} bytes at the end"
    }
    assert violations(send(server)) == {"start": "must be the first message"}
    assert violations(send(server, picture(0, data, len(data)))) == {"start": "must be the first message"}
    refused(NotFoundError, "TRAINING_NOT_FOUND", lambda: client.get_training("short"))
    assert learns(client, "short")


def test_a_stream_out_of_order(client: Client, server: Server) -> None:
    data = PICTURES[0].read_bytes()
    whole = len(data)
    cases = {
        "images[1]": [start("order", 2), picture(1, data, whole)],
        "images[0].size_bytes": [start("order", 1), picture(0, b"", 0)],
        "images[0]": [start("order", 1), picture(0, data, whole - 1)],
        "image": [start("order", 1), start("order", 1)],
    }
    for field, requests in cases.items():
        assert set(violations(send(server, *requests))) == {field}
    too_many = send(server, start("order", 1), picture(0, data, whole), picture(1, data, whole))
    assert set(violations(too_many)) == {"images[1]"}
    assert learns(client, "order")


def test_twins_small_ones_and_captions_without_the_token_are_told_and_learned(client: Client) -> None:
    good = PICTURES[0].read_bytes()
    small = soft_colours(24, 16)
    pictures = [
        TrainingImage(good, "good.png", "a sks octopus"),
        TrainingImage(good, "again.png", "a sks octopus"),
        TrainingImage(small, "small.png", "an octopus"),
    ]
    tokens = {"method": "textual_inversion", "placeholder_tokens": ["sks"], "optimizer": "adamw"}
    events = train(client, free_name(), pictures, resolution=64, **tokens)
    warned = {event.reason: event.message for event in events if isinstance(event, TrainingWarning)}
    assert "'again.png' as 'good.png'" in warned["DUPLICATE_IMAGES"]
    assert "resolution 64" in warned["SMALL_IMAGES"]
    assert "'small.png' (24 x 16)" in warned["SMALL_IMAGES"]
    assert warned["CAPTION_WITHOUT_TOKEN"].endswith("teach no token: 'small.png'")
    assert isinstance(events[-1], TrainingCompleted)
    assert client.get_training(events[0].training).recipe["num_images"] == 2
