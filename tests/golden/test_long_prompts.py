"""Prompts of two windows, in one batch with short ones, against diffusers given the same embeddings."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from atelier_server import pocket
from atelier_server.core import Mode
from benchmarks.desk import Desk, job

FIRST = "a red octopus on a beach , " * 4
SECOND = "a yellow cat in the snow , a green car"


def hidden(pipeline: StableDiffusionPipeline, text: str) -> torch.Tensor:
    return pipeline.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)[0]


def test_two_windows_equal_their_embeddings_side_by_side(tmp_path: Path) -> None:
    desk = Desk("pocket", tmp_path)
    encoder = desk.runner.base.encoders[0]
    words = (FIRST + SECOND).split()
    first = max(
        n for n in range(len(words)) if len(encoder.ids(" ".join(words[:n]))) <= encoder.max_tokens - 2
    )
    assert first < len(words)
    windows = " ".join(words[:first]), " ".join(words[first:])
    long = replace(job("long", FIRST + SECOND, steps=4, seed=3), mode=Mode.STRICT, bucket=8)
    jobs = [long, replace(long, id="short", prompt="a red cat")]
    together = desk.generate(jobs)
    for one in jobs:
        assert desk.generate([one])[one.id] == together[one.id]

    pipeline = StableDiffusionPipeline.from_pretrained(
        pocket.path(), dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with torch.no_grad():
        prompt = torch.cat([hidden(pipeline, window) for window in windows], dim=1)
        negative = torch.cat([hidden(pipeline, "")] * 2, dim=1)
    theirs = pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    ours = Image.open(io.BytesIO(together["long"][0]))
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
