"""Pictures painted again from the receipts in their files: bit for bit, however they came about."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from atelier import Client, GenerationResult, NotFoundError
from atelier.cli import cli
from atelier.replay import read_receipt, replay
from tests.adapters import random_adapter, write
from tests.pictures import right_part, soft_colours
from tests.process.server import Server

pytestmark = pytest.mark.process

PROMPT = "a (red:1.3) octopus on a beach"
REQUESTS: list[dict[str, Any]] = [
    {
        "num_inference_steps": 5,
        "seed": 1,
        "scheduler": "heun",
        "use_karras_sigmas": True,
        "guidance_scale": 6.3,
    },
    {"num_inference_steps": 6, "seed": 2, "adapters": ["ada:1..0.2", "bea:-0.5"], "negative_prompt": "blue"},
    {"num_inference_steps": 6, "seed": 3, "image": soft_colours(), "strength": 0.7, "scheduler": "euler-a"},
    {
        "num_inference_steps": 5,
        "seed": 4,
        "image": soft_colours(),
        "mask_image": right_part(),
        "clip_skip": 1,
    },
    {"num_inference_steps": 5, "seed": 5, "guidance_scale": 1.0, "num_images": 2, "image_format": "webp"},
    {
        "num_inference_steps": 4,
        "seed": 6,
        "scheduler": "ddim",
        "eta": 0.3,
        "image_format": "jpeg",
        "width": 96,
    },
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("replay") / "data")
    try:
        yield running.start()
    finally:
        with suppress(ProcessLookupError):
            running.stop()


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("files")
    with Client(server.address) as client:
        for number, name in enumerate(("ada", "bea")):
            adapter = random_adapter(number, rank=4, alpha=4.0)
            client.import_adapter(write(adapter, folder / f"{name}.safetensors"), name)
        yield client


def test_fast_pictures_of_a_busy_server_come_again_bit_for_bit(client: Client) -> None:
    """Their neighbours come and go, so that their forwards have different numbers of rows."""

    def paint(fields: dict[str, Any]) -> GenerationResult:
        return client.generate(PROMPT, **fields)

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        results = list(pool.map(paint, REQUESTS))
    seen = [read_receipt(image.data) for result in results for image in result.images]
    assert any(receipt.batch_buckets for receipt in seen)
    for fields, result in zip(REQUESTS, results, strict=True):
        given = {name: fields[name] for name in ("image", "mask_image") if name in fields}
        for image in result.images:
            again = replay(client, image, **given)
            assert (again.bit_equal, again.largest_difference, again.changes) == (True, 0, ())
            assert again.receipt.seed == image.seed


def test_the_command_says_equal_or_how_far(client: Client, server: Server, tmp_path: Path) -> None:
    painted = client.generate(PROMPT, seed=7, num_inference_steps=3).images[0]
    file = painted.save(tmp_path / "a.png")
    call = ["generate", "--replay", str(file), "--server", server.address]
    done = CliRunner().invoke(cli, [*call, "-o", str(tmp_path / "again.png")])
    assert (done.exit_code, done.stdout) == (0, f"{file}  bit-equal\n")
    assert read_receipt((tmp_path / "again.png").read_bytes()).seed == 7

    with Image.open(io.BytesIO(painted.data)) as picture:
        picture.load()
        info = picture.info["atelier"]
    red, *rest = picture.getpixel((3, 3))
    picture.putpixel((3, 3), (red - 9 if red > 128 else red + 9, *rest))
    kept = PngInfo()
    kept.add_itxt("atelier", info)
    picture.save(file, pnginfo=kept)
    done = CliRunner().invoke(cli, [*call, "--json"])
    told = json.loads(done.stdout)["replay"]
    assert (done.exit_code, told["bit_equal"], told["largest_difference"]) == (1, False, 9)
    assert told["receipt"]["prompt"] == PROMPT
    assert CliRunner().invoke(cli, [*call, "--seed", "3"]).exit_code == 2


def test_what_is_missing_or_another_is_named(client: Client, tmp_path: Path) -> None:
    plain = Image.new("RGB", (8, 8))
    plain.save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="has no receipt"):
        replay(client, tmp_path / "plain.png")
    with pytest.raises(ValueError, match="is no picture"):
        replay(client, b"hello")
    begun = client.generate("x", image=soft_colours(), num_inference_steps=2, seed=1).images[0]
    with pytest.raises(ValueError, match=r"image: needed, the file with sha256 [0-9a-f]{64}"):
        replay(client, begun)
    with pytest.raises(ValueError, match=r"image: this file has sha256 .*, the picture was made with sha256"):
        replay(client, begun, image=right_part())


def test_an_adapter_is_found_by_its_content_or_not_at_all(client: Client, tmp_path: Path) -> None:
    files = [
        write(random_adapter(10 + i, rank=4, alpha=4.0), tmp_path / f"{i}.safetensors") for i in range(2)
    ]
    client.import_adapter(files[0], "cleo")
    painted = client.generate("x", adapters="cleo", num_inference_steps=2, seed=1).images[0]
    client.import_adapter(files[1], "cleo", new_version=True)
    assert replay(client, painted).bit_equal
    client.delete_adapter("cleo@v1")
    with pytest.raises(NotFoundError, match="no checkpoint of 'cleo' has the sha256"):
        replay(client, painted)
