"""The names of published models: the whole module tables of SD 1.5, SD 2.1 and SDXL, without weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel

from atelier_server.adapters.formats.names import ModuleNames, Spelled

SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
ORIGINAL = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")
UNETS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}


@cache
def names(model: str) -> ModuleNames:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[model])
    shapes = {
        f"unet.{name}": tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    return ModuleNames(shapes)


@pytest.mark.parametrize("model", UNETS)
def test_every_module_is_found_by_both_of_its_names(model: str) -> None:
    table = names(model)
    original = {name: table.sgm(name.removeprefix("unet.")) for name in table.shapes}
    assert len(set(original.values())) == len(table.shapes)
    for name, sgm in original.items():
        assert sgm.startswith(
            ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
        )
        for spelled in (name.removeprefix("unet."), sgm):
            assert table.find(Spelled.of("lora_unet_" + spelled.replace(".", "_"))) == name
            assert table.find(Spelled.of(f"diffusion_model.{spelled}")) == name


# From the published checkpoints' own key names.
@pytest.mark.parametrize(
    ("model", "sgm", "name"),
    [
        ("sd15", "input_blocks.1.1.proj_in", "down_blocks.0.attentions.0.proj_in"),
        ("sd15", "input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("sd15", "input_blocks.8.1.proj_out", "down_blocks.2.attentions.1.proj_out"),
        ("sd15", "input_blocks.11.0.out_layers.3", "down_blocks.3.resnets.1.conv2"),
        ("sd15", "middle_block.2.in_layers.2", "mid_block.resnets.1.conv1"),
        ("sd15", "output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("sd15", "output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("sd15", "output_blocks.11.1.proj_in", "up_blocks.3.attentions.2.proj_in"),
        ("sd15", "time_embed.2", "time_embedding.linear_2"),
        ("sd15", "out.2", "conv_out"),
        (
            "sdxl",
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k",
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
        ),
        ("sdxl", "input_blocks.4.0.skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("sdxl", "output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("sdxl", "output_blocks.8.0.emb_layers.1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("sdxl", "label_emb.0.2", "add_embedding.linear_2"),
    ],
)
def test_the_original_names(model: str, sgm: str, name: str) -> None:
    assert names(model).sgm(name) == sgm
