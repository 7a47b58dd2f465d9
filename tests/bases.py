"""Tiny bases of every family with fixed random weights, saved as real diffusers folders.

    folder = save_base("sdxl", tmp_path / "base")      # what `serve --model` takes
    pipeline = peer("sdxl", folder)                    # diffusers' own pipeline on it

They have the layout of the real ones (layer graphs, attention, text encoders, tokenizers' padding,
scheduler settings) at a fraction of the width: 64 x 64 pixels, latents of 8 x 8, prompts of 77 tokens in
pocket's words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from atelier_server import pocket

FAMILIES = ("sd1", "sd2", "sdxl")
PIXELS = 64
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sampled(*quick: str) -> list[Any]:
    """Every family as a parameter; those that are not `quick` wait for `make soak`."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.soak) for name in FAMILIES]


def save_base(family: str, folder: Path, *, variant: str | None = None, seed: int = 0, **unet: Any) -> Path:
    """Saves a base of that family; `unet` changes its U-Net's config (in_channels=9, say)."""
    torch.manual_seed(seed)
    _PIPELINES[family](unet).save_pretrained(folder, variant=variant)
    return folder


def pipeline_of(family: str, seed: int = 0) -> DiffusionPipeline:
    """A base of that family that is not saved anywhere."""
    torch.manual_seed(seed)
    return _PIPELINES[family]({})


def save_controlnet(family: str, folder: Path, base: Path, *, seed: int = 1) -> Path:
    """Saves a ControlNet for the base in `base`: its encoder, with output layers that are not zero."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    for name, parameter in controlnet.named_parameters():
        if name.startswith(("controlnet_", "controlnet_cond_embedding.conv_out")):
            torch.nn.init.normal_(parameter, std=0.3)
    controlnet.save_pretrained(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file; None takes one away."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def lose(component: Path, name: str) -> None:
    """Takes a tensor out of a component's file."""
    (file,) = component.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})


def peer(family: str, folder: Path) -> DiffusionPipeline:
    """diffusers' own pipeline on a saved base."""
    cls = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    extra = {} if family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    pipeline = cls.from_pretrained(folder, dtype=torch.float32, **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sd1(unet: Mapping[str, Any]) -> DiffusionPipeline:
    tokenizer = _tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_act="quick_gelu")),
        tokenizer=tokenizer,
        unet=_unet({"cross_attention_dim": 32, "attention_head_dim": 4, **unet}),
        scheduler=PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False),
        **_NO_CHECKER,
    )


def _sd2(unet: Mapping[str, Any]) -> DiffusionPipeline:
    tokenizer = _tokenizer(pad_token="!")
    linear = {"cross_attention_dim": 32, "attention_head_dim": (2, 4), "use_linear_projection": True}
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_act="gelu")),
        tokenizer=tokenizer,
        unet=_unet({**linear, **unet}),
        scheduler=DDIMScheduler(
            **_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False
        ),
        **_NO_CHECKER,
    )


def _sdxl(unet: Mapping[str, Any]) -> DiffusionPipeline:
    tokenizer, tokenizer_2 = _tokenizer(), _tokenizer(pad_token="!")
    # The published configs say eos_token_id 2, which makes transformers pool at the largest id.
    second = _text_config(tokenizer_2, hidden_act="gelu", hidden_size=40, projection_dim=40, eos_token_id=2)
    extended = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 72,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
    }
    return StableDiffusionXLPipeline(
        vae=_vae(force_upcast=True, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_act="quick_gelu", eos_token_id=2)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_unet({**extended, **unet}),
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading"),
        add_watermarker=False,
    )


_PIPELINES: dict[str, Callable[[Mapping[str, Any]], DiffusionPipeline]] = {
    "sd1": _sd1,
    "sd2": _sd2,
    "sdxl": _sdxl,
}
_NO_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def _tokenizer(**special: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(pocket.path() / "tokenizer", model_max_length=77, **special)


def _text_config(tokenizer: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**settings, **changes})


def _vae(**changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=PIXELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **changes,
    )


def _unet(changes: Mapping[str, Any]) -> UNet2DConditionModel:
    settings = {
        "sample_size": PIXELS // 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**{**settings, **changes})
    # Fresh weights hardly hear the prompt: another one would not be seen in the picture.
    for name, parameter in unet.named_parameters():
        if name.endswith("attn2.to_out.0.weight"):
            parameter.data *= 8
    return unet
