"""Learned tokens (textual inversion, arXiv 2208.01618) as the ecosystem's files hold them.

emb_params [n,d]                               A1111 and kohya's scripts; emp_params in OneTrainer's files
clip_l [n,768], clip_g [n,1280]                a pair for SDXL (kohya, OneTrainer, diffusers' advanced script)
<placeholder> [d] or [n,d]                     diffusers' learned_embeds: the key is the token
bundle_emb.PLACEHOLDER.clip_l, ...             bundled with a LoRA (OneTrainer, ComfyUI, A1111)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_ENCODERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
_ANY = ("emb_params", "emp_params", "string_to_param.*", "*")
_BUNDLE = re.compile(
    r"bundle_emb\.(?P<placeholder>.+?)\.(?P<what>clip_[lgh](?:_out)?|emb_params|string_to_param\.\*)"
)
_OUTPUT = re.compile(r"clip_[lg]_out|em[bp]_params_out")
MAX_PLACEHOLDER = 100


@dataclass(frozen=True, slots=True, eq=False)
class LearnedToken:
    """Vectors [n,d] of a placeholder ("" = the file does not name it) for an encoder ("" = any that fits)."""

    key: str
    placeholder: str
    encoder: str
    vectors: Tensor


def learned_token(key: str, tensor: Tensor, keys: int) -> LearnedToken | None:
    """The token that `key` holds, None if it holds none. `keys` is how many the file has."""
    if match := _BUNDLE.fullmatch(key):
        what = match["what"]
        if what in _ENCODERS or what in _ANY:
            return LearnedToken(key, match["placeholder"], _ENCODERS.get(what, ""), tensor)
        return None
    if key in _ENCODERS or key in _ANY:
        return LearnedToken(key, "", _ENCODERS.get(key, ""), tensor)
    # diffusers: nothing but one vector or a few, under the token's own name.
    if keys == 1 and tensor.dim() <= 2 and len(key) <= MAX_PLACEHOLDER and not key.endswith(".weight"):
        return LearnedToken(key, key, "", tensor)
    return None


def is_output_vector(key: str) -> bool:
    """Vectors that OneTrainer adds to an encoder's outputs."""
    return _OUTPUT.fullmatch(key) is not None or (key.startswith("bundle_emb.") and key.endswith("_out"))


def fitted(token: LearnedToken, widths: Mapping[str, int]) -> tuple[str, Tensor] | str:
    """The encoder and vectors [n,d] of a token for a base whose encoders have `widths`; else why not."""
    vectors = token.vectors
    if vectors.dim() == 1:
        vectors = vectors[None]
    if vectors.dim() != 2 or not vectors.numel():
        return f"has vectors of shape {tuple(token.vectors.shape)}; (n, width) would fit"
    width = vectors.shape[1]
    if token.encoder:
        if token.encoder not in widths:
            return f"is for {token.encoder}, which the base model does not have"
        if widths[token.encoder] != width:
            return f"has width {width}; the base model's {token.encoder} has {widths[token.encoder]}"
        return token.encoder, vectors
    for encoder, expected in widths.items():
        if expected == width:
            return encoder, vectors
    have = ", ".join(f"{encoder} {expected}" for encoder, expected in widths.items())
    return f"has width {width}; the base model's text encoders have: {have}"
