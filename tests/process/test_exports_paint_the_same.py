"""What a server exports, diffusers and PEFT paint with: the server's own picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open

from atelier import Client
from atelier_server import pocket
from tests.adapters import random_adapter, write
from tests.process.server import Server

pytestmark = pytest.mark.process

PROMPT, SEED, STEPS, GUIDANCE = "a red octopus on a beach", 5, 4, 5.0


def test_every_layout_paints_the_server_s_picture(tmp_path: Path) -> None:
    file = write(random_adapter(3, rank=8, alpha=4.0, convolutions=True), tmp_path / "subject.safetensors")
    server = Server(tmp_path / "server").start()
    try:
        with Client(server.address) as client:
            client.import_adapter(file, "subject")
            fields = {
                "seed": SEED,
                "num_inference_steps": STEPS,
                "guidance_scale": GUIDANCE,
                "scheduler": "ddim",
            }
            ours = client.generate(PROMPT, adapters="subject", **fields).images[0].data
            plain = client.generate(PROMPT, **fields).images[0].data
            for layout in ("diffusers", "kohya", "peft"):
                client.export_adapter("subject", tmp_path / f"{layout}.safetensors", format=layout)
    finally:
        server.stop()
    assert np.abs(pixels(ours) - pixels(plain)).max() > 20, "the adapter is to be seen"
    for layout in ("diffusers", "kohya"):
        pipeline = peer()
        pipeline.load_lora_weights(tmp_path, weight_name=f"{layout}.safetensors")
        assert np.abs(painted(pipeline) - pixels(ours)).max() <= 1, layout
    pipeline = peer()
    with safe_open(tmp_path / "peft.safetensors", framework="pt") as exported:
        config = PeftConfig.from_peft_type(
            peft_type="LORA", **json.loads(exported.metadata()["lora_adapter_metadata"])
        )
    inject_adapter_in_model(config, pipeline.unet)
    set_peft_model_state_dict(pipeline.unet, safetensors.torch.load_file(tmp_path / "peft.safetensors"))
    assert np.abs(painted(pipeline) - pixels(ours)).max() <= 1, "peft"


def peer() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(pocket.path(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def painted(pipeline: StableDiffusionPipeline) -> np.ndarray:
    output = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
    )
    return np.asarray(output.images[0]).astype(int)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)
