"""Writes a diffusers pipeline as one file with the names of the original Stable Diffusion code (LDM).

The way back from what diffusers' single-file loader does, for tests of that loader on small models.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import ControlNetModel, DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


# Which encoder lies where, and whether under CLIP's names or OpenCLIP's.
_TEXT = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.text_model.", False)},
    "sd2": {"text_encoder": ("cond_stage_model.model.", True)},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.text_model.", False),
        "text_encoder_2": ("conditioner.embedders.1.model.", True),
    },
}
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def write_single_file(pipeline: DiffusionPipeline, path: Path, family: str = "sd1") -> None:
    """All weights of `pipeline` in one safetensors file at `path`."""
    layers = pipeline.unet.config.layers_per_block
    levels = len(pipeline.vae.config.block_out_channels)
    up_attention = ["CrossAttn" in kind for kind in pipeline.unet.config.up_block_types]
    tensors: dict[str, Tensor] = {}
    for name, tensor in pipeline.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_name(name, layers, up_attention)] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        flat = re.search(r"mid_block.attentions.0.to_.*weight", name)
        tensors["first_stage_model." + _vae_name(name, levels)] = tensor[:, :, None, None] if flat else tensor
    for encoder, (prefix, is_open_clip) in _TEXT[family].items():
        states = getattr(pipeline, encoder).state_dict()
        bare = {name.removeprefix("text_model."): tensor for name, tensor in states.items()}
        for name, tensor in (_open_clip(bare) if is_open_clip else bare).items():
            tensors[prefix + name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def write_controlnet_file(controlnet: ControlNetModel, path: Path) -> None:
    """A ControlNet in one file, under the names of its authors' code."""
    blocks = len(controlnet.controlnet_cond_embedding.blocks)
    tensors: dict[str, Tensor] = {}
    for name, tensor in controlnet.state_dict().items():
        renamed = name
        for pattern, place in (
            (r"controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
            (r"controlnet_cond_embedding\.conv_out", f"input_hint_block.{2 * blocks + 2}"),
            (r"controlnet_mid_block", "middle_block_out.0"),
            (r"controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0"),
        ):
            renamed = re.sub(pattern, place, renamed)
        renamed = re.sub(
            r"controlnet_cond_embedding\.blocks\.(\d+)",
            lambda m: f"input_hint_block.{2 * int(m[1]) + 2}",
            renamed,
        )
        if renamed == name:
            renamed = _unet_name(name, controlnet.config.layers_per_block, [])
        tensors[f"control_model.{renamed}"] = tensor.contiguous()
    save_file(tensors, path)


def _open_clip(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP has the three projections of an attention in one, and its last one the other way round."""
    found: dict[str, Tensor] = {}
    for name, tensor in states.items():
        for ours, theirs in _OPEN_CLIP.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif ".attn.q_proj." in name:
            parts = (tensor, *(states[_back(name).replace("q_proj", p)] for p in ("k_proj", "v_proj")))
            found[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif not re.search(r"\.attn\.[kv]_proj\.", name):
            found[name] = tensor
    return found


def _back(name: str) -> str:
    return name.replace("transformer.resblocks", "encoder.layers").replace(".attn.", ".self_attn.")


def _unet_name(name: str, layers: int, up_attention: list[bool]) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    match = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
    assert match, name
    where, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        part, _, tail = rest.partition(".")
        rest = f"{_UNET_RESNET[part]}.{tail}"
    if where == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    place = block * (layers + 1) + number
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if up_attention[block] else 1}.{rest}"
    column = 1 if kind == "attentions" else 0
    return f"{'input_blocks' if where == 'down_blocks' else 'output_blocks'}." + (
        f"{place + 1 if where == 'down_blocks' else place}.{column}.{rest}"
    )


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
        for ours, theirs in _VAE_ATTENTION.items():
            name = name.replace(f"mid.attn_1.{ours}.", f"mid.attn_1.{theirs}.")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
