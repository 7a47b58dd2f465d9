"""What a picture is painted again with, and what is refused before that."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PillowImage
from PIL.PngImagePlugin import PngInfo

from atelier import Control, wire
from atelier.events import Image, Receipt, ReceiptControlNet
from atelier.records import ControlNet, ServerInfo
from atelier.replay import arguments, check_server, compare
from atelier.v1 import server_pb2

EDGES = b"the edges"
CANNY = ReceiptControlNet("canny", "c" * 64, hashlib.sha256(EDGES).hexdigest(), 0.5, 0.0, 0.75)
RECEIPT = Receipt(
    base_model="pocket",
    base_sha256="b" * 64,
    adapters=(),
    scheduler="ddim",
    num_inference_steps=3,
    guidance_scale=7.5,
    width=8,
    height=8,
    reproducibility="fast",
    batch_bucket=2,
    dtype="float32",
    device="cpu",
    versions={"torch": "2"},
    create_time=None,
    prompt="a cat",
    negative_prompt="",
    seed=1,
    num_images=1,
    controlnets=(CANNY,),
    device_description="x86_64, 2 threads",
    base_config_sha256="d" * 64,
)


def file(receipt: Receipt) -> bytes:
    told = {field: getattr(receipt, field) for field in Receipt.__dataclass_fields__}
    told |= {"controlnets": [], "create_time": None}
    info, stream = PngInfo(), io.BytesIO()
    info.add_itxt("atelier", json.dumps(told))
    PillowImage.new("RGB", (8, 8)).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"negative_prompt": "blue"}, {"negative_prompt": "blue"}),
        ({"empty_negative_prompt": True}, {"negative_prompt": ""}),
    ],
)
def test_no_negative_prompt_is_not_an_empty_one(changes: dict[str, Any], expected: dict[str, str]) -> None:
    receipt = replace(RECEIPT, controlnets=(), **changes)
    told = arguments(file(receipt), receipt)
    assert {key: told[key] for key in told.keys() & {"negative_prompt"}} == expected


@pytest.fixture
def edges(tmp_path: Path) -> Path:
    path = tmp_path / "edges.png"
    path.write_bytes(EDGES)
    return path


def test_a_controlnet_is_given_as_to_generate(edges: Path) -> None:
    expected = [Control("canny", EDGES, 0.5, 0.0, 0.75)]
    for given in (
        f"canny={edges}",
        Control("canny", edges),
        [Control("canny", EDGES, scale=0.5, end=0.75)],
        [f"canny={edges}:0.5"],
    ):
        assert arguments(file(RECEIPT), RECEIPT, controlnets=given)["controlnets"] == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Control("canny", EDGES, scale=0.7), r"controlnets canny: .* made with scale 0\.5, not 0\.7"),
        (Control("canny", EDGES, end=1.0), r"controlnets canny: .* made with end 0\.75, not 1"),
        ([Control("canny", EDGES), Control("depth", EDGES)], "controlnets depth: .* made without it"),
        (Control("canny", b"others"), "controlnets canny: this file has sha256"),
        ([], "controlnets canny: needed, the file with sha256"),
    ],
)
def test_what_the_receipt_does_not_say_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(file(RECEIPT), RECEIPT, controlnets=given)


def test_another_controlnet_of_that_name_is_refused() -> None:
    def server(sha256: str) -> ServerInfo:
        empty = wire.decode(ServerInfo, server_pb2.GetServerInfoResponse())
        return replace(empty, controlnets=(ControlNet(name="canny", reference="x", sha256=sha256),))

    check_server(RECEIPT, server("c" * 64))
    with pytest.raises(ValueError, match=r"another ControlNet canny \(sha256 c{12}\.\.\.\) than .* e{12}"):
        check_server(RECEIPT, server("e" * 64))


def test_what_is_not_as_it_was_is_told() -> None:
    after = replace(
        RECEIPT,
        compiled=True,
        device_description="x86_64, 4 threads",
        base_config_sha256="e" * 64,
        versions={"torch": "3"},
    )
    image = Image(0, "image/png", file(after), 1)
    told = compare(file(RECEIPT), RECEIPT, image)
    assert told.bit_equal
    assert told.changes == (
        "compiled no, now yes",
        f"base_config_sha256 {'d' * 64}, now {'e' * 64}",
        "device_description x86_64, 2 threads, now x86_64, 4 threads",
        "torch 2, now 3",
    )
    older = replace(RECEIPT, device_description="", base_config_sha256="")
    assert compare(file(older), older, Image(0, "image/png", file(RECEIPT), 1)).changes == ()
