"""Thumbnails: small, of any picture, and never in the way of what they are of."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore
from atelier_server.core import CheckpointId
from atelier_server.jobs.thumbnails import embedded, keep, thumbnail

OTTO = CheckpointId("otto", 1, 0)


def picture(size: tuple[int, int] = (640, 320), format: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, "red" if mode == "RGB" else 0).save(file, format)
    return file.getvalue()


def safetensors(metadata: object) -> bytes:
    header = json.dumps({"__metadata__": metadata}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (picture(), (128, 64)),
        (picture((64, 64), "JPEG"), (64, 64)),
        (picture((100, 1000), "WEBP"), (13, 128)),
        (picture((200, 200), mode="P"), (128, 128)),
    ],
)
def test_a_thumbnail_is_small(given: bytes, size: tuple[int, int]) -> None:
    small = thumbnail(given)
    with Image.open(io.BytesIO(small)) as image:
        assert (image.format, image.size) == ("WEBP", size)
    assert len(small) < 32_000


def test_a_file_carries_its_picture(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    path.write_bytes(safetensors({"modelspec.thumbnail": url}))
    assert embedded(path) == embedded(tmp_path) == picture()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        safetensors({}),
        safetensors([]),
        safetensors({"modelspec.thumbnail": 5}),
        safetensors({"modelspec.thumbnail": "data:image/png;base64,@@@"}),
        safetensors({"modelspec.thumbnail": ""}),
        (5).to_bytes(8, "little") + b"[[[[[",
    ],
)
def test_a_file_without_a_picture(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert embedded(path) is None


@pytest.mark.parametrize("given", [b"no picture", picture()[:100], None, b""])
def test_what_is_no_picture_is_no_thumbnail(tmp_path: Path, given: bytes | None) -> None:
    store = AdapterStore(tmp_path)
    store.publish_version(
        lambda folder: (folder / ADAPTER_FILE).write_bytes(b"x") and None,
        name="otto",
        trigger="",
        base_model="",
        base_sha256="",
        new_version=False,
        rank=1,
        lora_alpha=1.0,
    )
    keep(store, OTTO, given)
    assert store.versions()[0].thumbnail == ""
    keep(store, OTTO, picture())
    assert store.versions()[0].thumbnail == "names/otto/v1/thumbnail/000000.webp"
