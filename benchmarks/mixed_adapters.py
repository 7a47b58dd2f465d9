"""Eight requests, each with an adapter of its own: one mixed batch against diffusers, one after another."""

from __future__ import annotations

import tempfile
from itertools import cycle, islice
from pathlib import Path

import torch

from atelier_server import pocket
from benchmarks.bases import PROMPTS, peer_pipeline, random_adapters, sd1_shaped
from benchmarks.desk import Desk, job
from benchmarks.harness import Row, interleave, row, seconds


def run(*, quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny = _case(root / "tiny", sd1_shaped(root / "sd1"), requests=2 if quick else 8, quick=quick)
        small = _case(root / "pocket", pocket.path(), requests=2 if quick else 8, quick=quick)
    unit = "images/s"
    target = None if quick else ">= 3"
    return [
        row("8 requests, 8 adapters, SD 1.5's graph / 10", unit, tiny, target, ratio=_ratio),
        row("8 requests, 8 adapters, pocket (compute-bound on one core)", unit, small, None, ratio=_ratio),
    ]


def _ratio(ours: float, peer: float) -> float:
    return ours / peer


def _case(root: Path, base: Path, *, requests: int, quick: bool) -> dict[str, list[float]]:
    """images/s of both sides; text encoding, decoding and (ours) PNG encoding included."""
    steps = 2 if quick else 20
    files = random_adapters(root / "files", base, count=requests, rank=16)
    prompts = list(islice(cycle(PROMPTS), requests))
    desk = Desk(str(base), root / "data")
    uses = desk.publish(files)
    jobs = [
        job(f"r{i}", prompt, use, steps=steps, seed=i)
        for i, (prompt, use) in enumerate(zip(prompts, uses, strict=True))
    ]
    pipeline = peer_pipeline(base)
    for file in files:
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=file.stem)

    def peer() -> None:
        for i, (prompt, file) in enumerate(zip(prompts, files, strict=True)):
            pipeline.set_adapters(file.stem)
            pipeline(
                prompt,
                num_inference_steps=steps,
                guidance_scale=5.0,
                height=64,
                width=64,
                generator=torch.Generator("cpu").manual_seed(i),
            )

    return interleave(
        lambda: requests / seconds(lambda: desk.generate(jobs)),
        lambda: requests / seconds(peer),
        1 if quick else 7,
    )
