"""Weights that change over the steps, rows at different steps in a batch, against diffusers' set_adapters."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from atelier_server import pocket
from atelier_server.core import AdapterUse, GenerationJob, Mode
from atelier_server.diffusion.schedulers import _REGISTRY
from benchmarks.desk import Desk, job
from tests.adapters import random_adapter, write

FADING = (1.5, 0.8, 0.0, -0.7)
SWELLING = (0.2, 1.0)  # the last one holds
CASES = [("ddim", 4), ("heun", 4), ("euler", 6)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, list[AdapterUse], list[Path]]:
    root = tmp_path_factory.mktemp("weights")
    desk = Desk("pocket", root / "data", slots=3, max_rank=8)
    files = [write(random_adapter(i, rank=4, alpha=4.0), root / f"a{i}.safetensors") for i in range(2)]
    return desk, desk.publish(files), files


def request(uses: list[AdapterUse], scheduler: str, steps: int) -> GenerationJob:
    weighted = [replace(uses[0], weights=FADING), replace(uses[1], weights=SWELLING)]
    plain = job(f"{scheduler}-{steps}", "a red octopus", *weighted, steps=steps, seed=3)
    return replace(plain, scheduler=scheduler, mode=Mode.STRICT, bucket=8)


def theirs(files: list[Path], scheduler: str, steps: int) -> np.ndarray:
    pipeline = StableDiffusionPipeline.from_pretrained(
        pocket.path(), dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    for i, file in enumerate(files):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{i}")
    class_name, overrides = _REGISTRY[scheduler]
    pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **overrides)

    def weigh(step: int) -> None:
        weights = [schedule[min(step, len(schedule) - 1)] for schedule in (FADING, SWELLING)]
        pipeline.set_adapters(["a0", "a1"], weights)

    def between(_: Any, index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        weigh((index + 1) // pipeline.scheduler.order)
        return values

    weigh(0)
    output = pipeline(
        "a red octopus",
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
        callback_on_step_end=between,
    )
    return np.asarray(output.images[0]).astype(int)


# PEFT's note that several adapters share a model: here they are meant to.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_equals_set_adapters_between_the_steps(desk: tuple[Desk, list[AdapterUse], list[Path]]) -> None:
    table, uses, files = desk
    jobs = [request(uses, scheduler, steps) for scheduler, steps in CASES]
    together = table.generate(jobs)
    for one, (scheduler, steps) in zip(jobs, CASES, strict=True):
        ours = np.asarray(Image.open(io.BytesIO(together[one.id][0]))).astype(int)
        assert np.abs(ours - theirs(files, scheduler, steps)).max() <= 1
        assert table.generate([one])[one.id] == together[one.id]


def test_the_schedule_is_seen(desk: tuple[Desk, list[AdapterUse], list[Path]]) -> None:
    table, uses, _ = desk
    changing = request(uses, "ddim", 4)
    constant = replace(
        changing, id="c", adapters=tuple(replace(u, weights=u.weights[:1]) for u in changing.adapters)
    )
    assert table.generate([changing])[changing.id] != table.generate([constant])["c"]
