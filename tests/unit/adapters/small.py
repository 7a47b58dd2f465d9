"""Bases of a few modules each, without a model: what a file has to fit, and random adapters for it."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule, Module
from atelier_server.adapters.importer import Base

ATTN = "down_blocks.1.attentions.0.transformer_blocks.0"
_UNET = {
    "unet.conv_in": (8, 4, 3, 3),
    "unet.down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
    "unet.down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
    "unet.down_blocks.1.resnets.0.norm1": (8,),
    "unet.down_blocks.1.resnets.0.conv_shortcut": (8, 6, 1, 1),
    "unet.down_blocks.1.resnets.0.time_emb_proj": (8, 16),
    "unet.down_blocks.1.attentions.0.proj_in": (8, 8),
    f"unet.{ATTN}.attn1.to_q": (8, 8),
    f"unet.{ATTN}.attn1.to_out.0": (8, 8),
    f"unet.{ATTN}.attn2.to_k": (8, 12),
    f"unet.{ATTN}.ff.net.0.proj": (16, 8),
    f"unet.{ATTN}.norm1": (8,),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v": (8, 8),
    "unet.up_blocks.0.resnets.0.conv1": (8, 10, 3, 3),
    "unet.up_blocks.0.upsamplers.0.conv": (8, 8, 3, 3),
    "unet.time_embedding.linear_1": (16, 8),
}
_TEXT = {
    "text_encoder.encoder.layers.0.self_attn.q_proj": (6, 6),
    "text_encoder.encoder.layers.0.self_attn.out_proj": (6, 6),
    "text_encoder.encoder.layers.0.mlp.fc1": (12, 6),
    "text_encoder.final_layer_norm": (6,),
}
_TEXT_2 = {
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (10, 10),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": (10, 20),
    "text_encoder_2.text_projection": (10, 10),
}


def is_word(word: str) -> bool:
    return word.lower() in ("dog", "cat")


SD1 = Base("sd1", _UNET | _TEXT, {"text_encoder": 6}, 8, is_word)
SDXL = Base(
    "sdxl",
    _UNET | {"unet.add_embedding.linear_1": (16, 24)} | _TEXT | _TEXT_2,
    {"text_encoder": 6, "text_encoder_2": 10},
    8,
    is_word,
)
_DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
_ALPHAS = st.floats(-64, 64) | st.sampled_from([0.0, 1.0, 4.0, 0.1, 1 / 3])


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randn(shape, generator=generator).to(draw(_DTYPES))


def low_rank(
    shape: tuple[int, ...], *, dora: bool, over_inputs: bool, bias: bool
) -> st.SearchStrategy[LoraModule]:
    out, *features = shape
    magnitudes = tensors(1, features[0]) if over_inputs else tensors(out)

    @st.composite
    def build(draw: st.DrawFn) -> LoraModule:
        rank = draw(st.integers(1, 5))
        return LoraModule(
            draw(tensors(rank, *features)),
            draw(tensors(out, rank, *(1 for _ in features[1:]))),
            draw(_ALPHAS),
            draw(magnitudes) if dora else None,
            draw(tensors(out)) if bias else None,
        )

    return build()


def dense(shape: tuple[int, ...]) -> st.SearchStrategy[DenseModule]:
    return st.builds(DenseModule, tensors(*shape), st.none() | tensors(shape[0]))


@st.composite
def adapters(draw: st.DrawFn, base: Base, *, everything: bool) -> CanonicalAdapter:
    """`everything`: full differences, norms, biases, DoRA here and there: only kohya's layout holds them."""
    chosen = draw(st.lists(st.sampled_from(sorted(base.shapes)), min_size=1, max_size=6, unique=True))
    all_dora = draw(st.booleans())
    modules: dict[str, Module] = {}
    for name in chosen:
        shape = base.shapes[name]
        if len(shape) == 1 or (everything and draw(st.integers(0, 3)) == 0):
            if everything:
                modules[name] = draw(dense(shape))
            continue
        dora = draw(st.booleans()) if everything else all_dora
        over_inputs = everything and shape[0] > 1 and draw(st.booleans())
        bias = everything and draw(st.booleans())
        modules[name] = draw(low_rank(shape, dora=dora, over_inputs=over_inputs, bias=bias))
    names = st.sampled_from(["<sks>", "zwx-1", "my token", "a.b", "<s0>"])
    tokens = {
        placeholder: {encoder: draw(tensors(2, width)) for encoder, width in base.widths.items()}
        for placeholder in draw(st.lists(names, max_size=2, unique=True))
    }
    if not modules:
        modules["unet.conv_in"] = draw(
            low_rank(base.shapes["unet.conv_in"], dora=False, over_inputs=False, bias=False)
        )
    triggers = tuple(
        draw(st.lists(st.sampled_from(["sks", "a zwx rocket", "x, y"]), max_size=2, unique=True))
    )
    return CanonicalAdapter(modules, tokens, triggers, {}, base.family)
