"""The model as a folder: Stable Diffusion's layout, half precision, no trace of where it was made."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from pocket.unet import build_scheduler

_PATHS = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


def save_model(
    folder: Path,
    *,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Writes the five parts; `StableDiffusionPipeline.from_pretrained(folder)` loads them in float32."""
    parts = [copy.deepcopy(part).to("cpu", torch.float16).eval() for part in (vae, unet, text_encoder)]
    pipeline = StableDiffusionPipeline(
        vae=parts[0],
        unet=parts[1],
        text_encoder=parts[2],
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    clean(folder)


def clean(folder: Path) -> None:
    """Takes out of a folder's JSON files where they were made, and makes half precision load as float32."""
    for path in sorted(folder.rglob("*.json")):
        _clean(path)


def size_mb(folder: Path) -> float:
    """What a folder weighs, in MB of 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _clean(path: Path) -> None:
    entries = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in entries.items() if name not in _PATHS}
    # transformers would load halves as halves; diffusers' parts come in float32 whatever they are.
    for part in (kept, kept.get("text_config", {}), kept.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    if kept != entries:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
