"""Eight clients at once, all different: shared forwards, the bits of a request alone, diffusers' picture."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from atelier import Client
from atelier_server import pocket
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.diffusion.schedulers import _REGISTRY
from tests.adapters import merge, random_adapter, write
from tests.process.server import Server

pytestmark = pytest.mark.process

ADAPTERS = {
    "ada": random_adapter(1, rank=4, alpha=4.0),
    "bea": random_adapter(2, rank=8, alpha=4.0),
    "cleo": random_adapter(3, rank=16, alpha=16.0),
    "dora": random_adapter(4, rank=8, alpha=8.0, convolutions=True),
}
# Adapters, scheduler, steps, guidance, seed, prompt.
REQUESTS: list[tuple[list[str], str, int, float, int, str]] = [
    (["ada"], "ddim", 5, 5.0, 1, "a red octopus on a beach"),
    (["bea:0.7"], "euler", 6, 7.5, 2, "a yellow cat in the snow"),
    (["cleo"], "euler-a", 6, 3.0, 3, "a green car in the desert"),
    (["dora"], "dpmpp-2m", 5, 6.0, 4, "a purple fish under water"),
    ([], "unipc", 6, 5.0, 5, "a white rocket at night"),
    (["ada:0.5", "cleo:0.6"], "ddim", 5, 9.0, 6, "a blue octopus in a forest"),
    (["dora:-0.5"], "dpmpp-2m", 6, 1.0, 7, "a pink pig on green grass"),
    ([], "euler", 5, 4.0, 8, "a brown bear in a forest"),
]


def settings(request: tuple[list[str], str, int, float, int, str]) -> dict[str, Any]:
    adapters, scheduler, steps, guidance, seed, prompt = request
    return {
        "prompt": prompt,
        "adapters": adapters,
        "scheduler": scheduler,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "reproducibility": "strict",
        "batch_bucket": 16,
    }


def theirs(request: tuple[list[str], str, int, float, int, str]) -> np.ndarray:
    """diffusers' own picture, the adapters merged into its weights."""
    adapters, scheduler, steps, guidance, seed, prompt = request
    pipeline = StableDiffusionPipeline.from_pretrained(pocket.path(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for reference in adapters:
        name, _, weight = reference.partition(":")
        adapter: CanonicalAdapter = ADAPTERS[name]
        merge(pipeline, adapter, float(weight or 1))
    class_name, overrides = _REGISTRY[scheduler]
    pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **overrides)
    output = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
    )
    return np.asarray(output.images[0]).astype(int)


def test_eight_different_requests_at_once(server: Server, tmp_path: Path) -> None:
    with Client(server.address) as client, ThreadPoolExecutor(len(REQUESTS)) as pool:
        for name, adapter in ADAPTERS.items():
            client.import_adapter(write(adapter, tmp_path / f"{name}.safetensors"), name)
        before = server.metrics()
        together = list(pool.map(lambda request: client.generate(**settings(request)), REQUESTS))
        after = server.metrics()
        alone = [client.generate(**settings(request)) for request in REQUESTS]

    images = after["atelier_batch_rows_sum"] - before.get("atelier_batch_rows_sum", 0)
    forwards = after["atelier_batch_rows_count"] - before.get("atelier_batch_rows_count", 0)
    assert images / forwards > 4

    components = ("base", "bank", "training", "activations", "runtime")
    parts = {name: after[f'atelier_vram_component_bytes{{component="{name}"}}'] for name in components}
    assert parts["base"] > 10 * 2**20
    assert parts["bank"] > 0
    assert parts["training"] == 0
    assert sum(parts.values()) == pytest.approx(
        after['atelier_vram_bytes{device="cpu",kind="allocated"}'], rel=0.2
    )

    for request, mixed, single in zip(REQUESTS, together, alone, strict=True):
        assert mixed.images[0].data == single.images[0].data
        ours = np.asarray(Image.open(io.BytesIO(mixed.images[0].data))).astype(int)
        assert np.abs(ours - theirs(request)).max() <= 1
        assert mixed.batch_bucket == 16
