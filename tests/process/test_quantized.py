"""A base with its linear layers in eight bits: pictures, mixed batches, adapters of every kind, trainings."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atelier import Client, TrainingCompleted
from atelier.replay import read_receipt
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from tests.adapters import random_adapter, weights, write
from tests.pictures import soft_colours
from tests.process.server import Server

pytestmark = pytest.mark.process

TORCHAO = Path(__file__).parents[2] / "tools" / "torchao"
# Mean difference of a picture's values from those of the float base, of 255; measured 0.27 and 1.6 at most.
TOLERANCE = {"int8": 1.0, "fp8": 4.0}
ADAPTERS = ([], ["ada"], ["dora"], ["inputs"], ["ada:0.5", "dora:0.5"], ["merged"])


def dora(adapter: CanonicalAdapter, *, inputs: bool = False) -> CanonicalAdapter:
    """The same pairs with magnitudes a tenth above the base's, of outputs or of inputs."""
    modules: dict[str, LoraModule] = {}
    for name, module in adapter.low_rank.items():
        norms = 1.1 * weights()[name].norm(dim=0 if inputs else 1)
        modules[name] = replace(module, magnitude=norms[None] if inputs else norms)
    return replace(adapter, modules=modules)


FILES = {
    "ada": random_adapter(1, rank=4, alpha=4.0),
    "dora": dora(random_adapter(2, rank=8, alpha=4.0)),
    "inputs": dora(random_adapter(3, rank=4, alpha=2.0), inputs=True),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[np.ndarray]]:
    """The float base's pictures."""
    running = Server(tmp_path_factory.mktemp("plain") / "data")
    try:
        with Client(running.start().address) as client:
            bring(client, tmp_path_factory.mktemp("files"))
            yield [pixels(paint(client, adapters)) for adapters in ADAPTERS]
    finally:
        with suppress(ProcessLookupError):
            running.stop()


def bring(client: Client, folder: Path) -> None:
    for name, adapter in FILES.items():
        client.import_adapter(write(adapter, folder / f"{name}.safetensors", "kohya"), name)
    client.merge_adapters(["dora:0.5", "ada:0.5"], "merged", rank=16)


def paint(client: Client, adapters: list[str]) -> bytes:
    result = client.generate(
        "a red octopus on a beach",
        adapters=adapters,
        num_inference_steps=3,
        scheduler="ddim",
        seed=1,
        reproducibility="strict",
        batch_bucket=16,
    )
    return result.images[0].data


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.soak)])
def test_the_pictures_of_a_quantized_base(
    kind: str, plain: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (TORCHAO / "torchao").is_dir(), "torchao is missing: run `make tools`"
    # For this server alone: with torchao on its path, diffusers imports it in every process.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TORCHAO), os.environ.get("PYTHONPATH", "")]))
    running = Server(tmp_path / "data", "--quantize", kind)
    try:
        with Client(running.start().address) as client, ThreadPoolExecutor(len(ADAPTERS)) as pool:
            bring(client, tmp_path)
            together = list(pool.map(lambda adapters: paint(client, adapters), ADAPTERS))
            assert together[2:4] == [paint(client, adapters) for adapters in ADAPTERS[2:4]]
            for data, expected in zip(together, plain, strict=True):
                assert 0 < np.abs(pixels(data) - expected).mean() < TOLERANCE[kind]

            base = client.server_info().base_model
            assert base is not None
            receipt = read_receipt(together[0])
            assert (base.quantization, receipt.quantization) == (kind, kind)
            assert receipt.base_sha256 == base.sha256

            recipe = {"max_train_steps": 2, "learning_rate": 1e-3, "train_batch_size": 2}
            for name, knobs in (("otto", {}), ("dory", {"use_dora": True, "init_lora_weights": "pissa"})):
                *_, last = client.train(name, [soft_colours()], instance_prompt="sks", **recipe, **knobs)
                assert isinstance(last, TrainingCompleted)
                assert paint(client, [name]) != together[0]
            memory = running.metrics()['atelier_vram_component_bytes{component="base"}']
            assert memory < 0.8 * 4 * base.num_parameters
    finally:
        with suppress(ProcessLookupError):
            running.stop()
