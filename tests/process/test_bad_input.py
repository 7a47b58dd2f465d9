"""Bad input at a real server: the right status, everything that is wrong at once, and the next call works."""

from __future__ import annotations

import pickle
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from atelier import (
    AlreadyExistsError,
    AtelierError,
    CheckpointPublished,
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    TrainingCompleted,
    TrainingEvent,
    TrainingImage,
    TrainingState,
)
from atelier.errors import from_rpc
from atelier.v1.training_pb2 import TrainingRecipe, TrainRequest
from atelier.v1.training_pb2_grpc import TrainingServiceStub
from tests.pictures import png, soft_colours
from tests.process.server import Server

pytestmark = pytest.mark.process

OTTO = Path(__file__).parents[2] / "examples" / "otto"
PICTURES = sorted(OTTO.glob("*.png"))[:2]
PNG = b"\x89PNG\r\n\x1a\n"
GOOD: dict[str, Any] = {
    "instance_prompt": "a sks blue plush octopus",
    "max_train_steps": 1,
    "rank": 2,
    "train_batch_size": 1,
}
BIG = 20_000
ErrorKind = TypeVar("ErrorKind", bound=AtelierError)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all that is wrong: each test leaves it as good as it was."""
    running = Server(tmp_path_factory.mktemp("bad-input") / "data")
    try:
        yield running.start()
    finally:
        with suppress(ProcessLookupError):
            running.stop()


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture
def client(connection: Client, server: Server) -> Iterator[Client]:
    """After every test the same worker still paints."""
    worker = server.state["worker_pid"]
    yield connection
    assert paints(connection)
    assert server.state["worker_pid"] == worker


@pytest.fixture(scope="module")
def otto(connection: Client) -> str:
    """An adapter of one step."""
    assert learns(connection, "otto")
    return "otto"


def paints(client: Client, adapter: str | tuple[str, ...] = ()) -> bool:
    result = client.generate("a red octopus", adapters=adapter, seed=7, num_inference_steps=2)
    return result.images[0].data.startswith(PNG)


def learns(client: Client, name: str) -> bool:
    last = list(client.train(name, PICTURES, **GOOD))[-1]
    return isinstance(last, TrainingCompleted) and last.state is TrainingState.SUCCEEDED


def free_name() -> str:
    return f"next-{uuid.uuid4().hex[:8]}"


def train(client: Client, name: str, images: Any = PICTURES, **recipe: Any) -> list[TrainingEvent]:
    return list(client.train(name, images, **(GOOD | recipe)))


def refused(kind: type[ErrorKind], reason: str, call: Callable[[], object]) -> ErrorKind:
    """The error of a call that has to be refused so."""
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.reason == reason, str(caught.value)
    return caught.value


def violations(call: Callable[[], object], reason: str = "INVALID_REQUEST") -> dict[str, str]:
    """Field to description of everything that a call is refused for."""
    error = refused(InvalidArgumentError, reason, call)
    found = {violation.field: violation.description for violation in error.violations}
    assert len(found) == len(error.violations)
    return found


# --------------------------------------------------------------------------------------------- generations
@pytest.mark.parametrize(
    ("field", "value", "wants"),
    [
        ("width", 100, "multiple of 8"),
        ("width", 0, "between 8 and 2048"),
        ("height", -8, "between 8 and 2048"),
        ("height", 2056, "between 8 and 2048"),
        ("num_inference_steps", 0, "between 1 and 200"),
        ("num_inference_steps", 10**6, "between 1 and 200"),
        ("num_images", 0, "between 1 and 16"),
        ("num_images", 10**6, "between 1 and 16"),
        ("guidance_scale", float("nan"), "finite number at least 0 and at most 100"),
        ("guidance_scale", float("inf"), "finite number at least 0 and at most 100"),
        ("scheduler", "magic", "euler-a"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(
    client: Client, field: str, value: Any, wants: str
) -> None:
    fields: Any = {field: value}
    found = violations(lambda: client.generate("x", **fields))
    assert list(found) == [field]
    assert str(value) in found[field]
    assert wants in found[field]


def test_pictures_that_do_not_fit_are_named_with_what_would(client: Client) -> None:
    """The noise is larger than gRPC's own limit for a message."""
    noise = png(np.random.default_rng(0).integers(0, 256, (1400, 1200, 3)))
    assert len(noise) > 4 * 2**20
    found = violations(lambda: client.generate("x", image=noise, width=64, height=64))
    assert found == {"image": "is 1200 x 1400; 64 x 64 would be right"}
    speck = np.zeros((64, 64))
    speck[1, 1] = 255
    error = refused(
        InvalidArgumentError,
        "INVALID_REQUEST",
        lambda: client.generate("x", image=soft_colours(), mask_image=png(speck), num_inference_steps=2),
    )
    assert "mask_image: nothing of it is left at the latents' size" in error.message
    assert violations(lambda: client.generate("x", eta=0.5, scheduler="euler")) == {
        "eta": "scheduler euler has no eta; those that have it: ddim, tcd"
    }


def test_a_prompt_of_100_kb(client: Client) -> None:
    found = violations(lambda: client.generate("x" * 100_000, negative_prompt="y" * 100_000))
    assert found == {
        "prompt": "100000 characters are more than 10000",
        "negative_prompt": "100000 characters are more than 10000",
    }


def test_everything_wrong_with_a_generation_is_said_at_once(client: Client) -> None:
    found = violations(
        lambda: client.generate(
            "x" * 100_000,
            adapters=["../x", "otto:nan", "otto@-1"],
            request_id="not-a-uuid",
            width=100,
            height=10**6,
            num_images=0,
            num_inference_steps=10**6,
            guidance_scale=float("nan"),
            scheduler="magic",
            reproducibility="strict",
            batch_bucket=3,
        )
    )
    assert set(found) == {
        *("prompt", "adapters[0].adapter", "adapters[1].adapter", "adapters[2].adapter", "request_id"),
        *("width", "height", "num_images", "num_inference_steps", "guidance_scale", "scheduler"),
        "batch_bucket",
    }
    assert "'../x'" in found["adapters[0].adapter"]


def test_more_adapters_than_a_picture_may_have(client: Client, otto: str) -> None:
    assert violations(lambda: client.generate("x", adapters=[otto] * 5)) == {
        "adapters": "5 adapters are more than 4"
    }


@pytest.mark.parametrize("reference", ["nobody", "otto@999", "otto@v7"])
def test_an_unknown_adapter_or_checkpoint(client: Client, otto: str, reference: str, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    calls: list[Callable[[], object]] = [
        lambda: client.generate("x", adapters=reference),
        lambda: client.generate("x", adapters=[otto, reference]),
        lambda: client.load_adapter(reference),
        lambda: client.export_adapter(reference, target),
    ]
    for call in calls:
        error = refused(NotFoundError, "ADAPTER_NOT_FOUND", call)
        assert reference.partition("@")[0] in error.message
        assert error.resource is not None
    assert list(tmp_path.iterdir()) == []
    assert paints(client, otto)


def test_an_unknown_training(client: Client) -> None:
    calls: list[Callable[[], object]] = [
        lambda: list(client.watch_training("nobody")),
        lambda: client.get_training("nobody"),
        lambda: client.cancel_training("nobody"),
        lambda: client.resume_training("nobody"),
        lambda: client.delete_training("../../x"),
    ]
    for call in calls:
        refused(NotFoundError, "TRAINING_NOT_FOUND", call)


def test_a_generations_request_id_with_another_body(client: Client) -> None:
    known = str(uuid.uuid4())
    first = client.generate("a red octopus", request_id=known, seed=7, num_inference_steps=2)
    error = refused(
        AlreadyExistsError,
        "REQUEST_ID_REUSED",
        lambda: client.generate("a blue octopus", request_id=known, seed=7, num_inference_steps=2),
    )
    assert error.resource is not None
    assert error.resource.name == known
    again = client.generate("a red octopus", request_id=known, seed=7, num_inference_steps=2)
    assert again.images[0].data == first.images[0].data


# ----------------------------------------------------------------------------------------------- pictures
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


# ------------------------------------------------------------------------------------------------ recipes
@pytest.mark.parametrize(
    ("field", "value", "wants"),
    [
        ("rank", 0, "between 1 and 64"),
        ("rank", 10**6, "between 1 and 64"),
        ("max_train_steps", 0, "between 1 and 20000"),
        ("max_train_steps", 10**6, "between 1 and 20000"),
        ("train_batch_size", 0, "between 1 and 16"),
        ("resolution", 100, "multiple of 8"),
        ("resolution", 4096, "between 8 and 2048"),
        ("learning_rate", float("nan"), "finite number above 0"),
        ("learning_rate", 0.0, "finite number above 0"),
        ("lr_scheduler", "magic", "cosine"),
        ("checkpointing_steps", 0, "between 1 and"),
    ],
)
def test_a_wrong_recipe(client: Client, field: str, value: Any, wants: str) -> None:
    found = violations(lambda: train(client, "recipe", **{field: value}))
    # The alpha that is not given is the rank, also a wrong one.
    assert set(found) - {"recipe.lora_alpha"} == {f"recipe.{field}"}
    assert str(value) in found[f"recipe.{field}"]
    assert wants in found[f"recipe.{field}"]


@pytest.mark.parametrize("name", ["../x", "", "Otto", "a/b", "x" * 64, "x\0y", "-a"])
def test_a_name_that_is_no_name(client: Client, otto: str, name: str, tmp_path: Path) -> None:
    assert set(violations(lambda: train(client, name))) == {"recipe.name"}
    file = tmp_path / "otto.safetensors"
    client.export_adapter(otto, file)
    assert set(violations(lambda: client.import_adapter(file, name))) == {"metadata.name"}
    assert set(violations(lambda: client.get_adapter(name))) == {"adapter"}
    assert set(violations(lambda: client.delete_adapter(name))) == {"adapter"}


def test_everything_wrong_with_a_recipe_is_said_at_once(client: Client) -> None:
    wrong: dict[str, Any] = {
        "instance_prompt": "x" * 100_000,
        "max_train_steps": 10**6,
        "learning_rate": float("nan"),
        "lr_scheduler": "magic",
        "lr_warmup_steps": -1,
        "train_batch_size": 0,
        "rank": 10**6,
        "lora_alpha": float("inf"),
        "resolution": 100,
        "checkpointing_steps": 0,
        "validation_steps": 10**6,
        "adam_beta1": 1.0,
        "adam_beta2": float("nan"),
        "adam_weight_decay": -1.0,
        "adam_epsilon": 0.0,
        "max_grad_norm": 0.0,
        "snr_gamma": float("nan"),
        "caption_dropout": 2.0,
        "method": "magic",
    }
    found = violations(lambda: train(client, "../x", [], request_id="no uuid", **wrong))
    expected = {f"recipe.{field}" for field in wrong}
    assert set(found) == expected | {"start.request_id", "recipe.name", "recipe.num_images"}
    assert learns(client, free_name())


def test_a_trainings_request_id_with_another_body(client: Client) -> None:
    known = str(uuid.uuid4())
    first = train(client, "once", request_id=known)
    others: list[Callable[[], object]] = [
        lambda: train(client, "once", request_id=known, rank=4),
        lambda: train(client, "twice", request_id=known),
        lambda: train(client, "once", PICTURES[::-1], request_id=known),
    ]
    for call in others:
        error = refused(AlreadyExistsError, "REQUEST_ID_REUSED", call)
        assert error.resource is not None
        assert error.resource.name == known
    assert train(client, "once", request_id=known) == first
    error = refused(AlreadyExistsError, "ADAPTER_EXISTS", lambda: train(client, "once"))
    assert "new_version" in error.message


# ------------------------------------------------------------------------------- a loss that is no number
def explode(client: Client, name: str) -> tuple[list[TrainingEvent], FailedPreconditionError]:
    """A rate that is 0 at the first step, so that its checkpoint is good, and absurd from then on."""
    events: list[TrainingEvent] = []

    def call() -> None:
        recipe = GOOD | {"max_train_steps": 30, "checkpointing_steps": 1, "learning_rate": 1e20}
        recipe |= {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10}
        events.extend(client.train(name, PICTURES, **recipe))  # those before the error stay

    return events, refused(FailedPreconditionError, "NONFINITE_LOSS", call)


def test_a_rate_that_turns_the_loss_to_nan_stops_and_keeps_the_last_good_checkpoint(client: Client) -> None:
    events, error = explode(client, "wild")
    step = int(error.metadata["step"])
    assert 1 < step < 30
    assert f"step {step}" in error.message
    assert "lower the learning rate" in error.message
    last = events[-1]
    assert isinstance(last, TrainingCompleted)
    assert (last.state, last.reason) == (TrainingState.FAILED, "NONFINITE_LOSS")
    training = client.get_training("wild")
    assert (training.state, training.reason) == (TrainingState.FAILED, "NONFINITE_LOSS")
    # Whoever watches it later hears the same.
    late = refused(FailedPreconditionError, "NONFINITE_LOSS", lambda: list(client.watch_training("wild")))
    assert late.metadata == error.metadata
    assert any(isinstance(event, CheckpointPublished) and event.step == 1 for event in events)
    assert paints(client, "wild@1")
    assert learns(client, free_name())


def test_what_a_wild_training_recommends_can_be_painted(client: Client) -> None:
    events, _ = explode(client, "wilder")
    assert isinstance(events[-1], TrainingCompleted)
    assert paints(client, "wilder")
    assert paints(client, events[-1].adapter)


# ------------------------------------------------------------------------------------------------ imports
def test_a_pickle_named_safetensors_is_never_unpickled(client: Client, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (trap,))

    file = tmp_path / "nice.safetensors"
    file.write_bytes(pickle.dumps(Trap()))
    error = refused(InvalidArgumentError, "UNSUPPORTED_FORMAT", lambda: client.import_adapter(file, "nice"))
    assert "safetensors" in error.message
    assert str(tmp_path) not in error.message
    assert not trap.exists()
    refused(NotFoundError, "ADAPTER_NOT_FOUND", lambda: client.get_adapter("nice"))


@pytest.mark.parametrize("size", [0, 4, 100])
def test_a_file_that_is_not_whole(client: Client, otto: str, size: int, tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    client.export_adapter(otto, file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InvalidArgumentError) as caught:
        client.import_adapter(file, "cut")
    assert caught.value.reason in ("INVALID_REQUEST", "UNSUPPORTED_FORMAT")


def test_an_adapter_that_does_not_fit(client: Client, otto: str, tmp_path: Path) -> None:
    file = tmp_path / "otto.safetensors"
    client.export_adapter(otto, file)
    weights = load_file(file)
    name = sorted(key for key in weights if "to_q" in key)[0]

    def spoilt(**changes: torch.Tensor) -> Callable[[], object]:
        target = tmp_path / "spoilt.safetensors"
        save_file({**weights, **changes}, target)
        return lambda: client.import_adapter(target, "spoilt")

    wider = torch.zeros(weights[name].shape[0], weights[name].shape[1] + 3)
    layer = name.partition(".lora")[0].removeprefix("unet.")
    assert layer in refused(InvalidArgumentError, "ADAPTER_MISMATCH", spoilt(**{name: wider})).message
    broken = torch.full_like(weights[name], float("nan"))
    assert layer in refused(InvalidArgumentError, "ADAPTER_MISMATCH", spoilt(**{name: broken})).message
    foreign = {key.replace(layer, "down_blocks.99.to_q"): value for key, value in weights.items()}
    target = tmp_path / "foreign.safetensors"
    save_file(foreign, target)
    refused(InvalidArgumentError, "ADAPTER_MISMATCH", lambda: client.import_adapter(target, "foreign"))
    assert client.import_adapter(file, "fitting").adapter.name == "fitting"
    assert paints(client, "fitting")
