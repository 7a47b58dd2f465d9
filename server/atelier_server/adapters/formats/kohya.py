"""kohya's layout, the one that holds everything: read by A1111, ComfyUI, kohya's scripts and diffusers.

lora_unet_NAME_WITH_UNDERSCORES.lora_down.weight, .lora_up.weight, .alpha, .dora_scale
lora_te_text_model_..., with two text encoders lora_te1_text_model_... and lora_te2_text_model_...
.diff, .diff_b, .w_norm, .b_norm        full differences and norms, as LyCORIS names them
bundle_emb.PLACEHOLDER.string_to_param.*, with two text encoders .clip_l and .clip_g
"""

from __future__ import annotations

import torch
from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule
from atelier_server.adapters.formats.names import ModuleNames

_CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def kohya_tensors(adapter: CanonicalAdapter, names: ModuleNames | None) -> dict[str, Tensor]:
    """An adapter's tensors by key. With the base's `names` an SDXL adapter gets the original code's names."""
    sdxl = adapter.family == "sdxl" or any(name.startswith("text_encoder_2.") for name in adapter.modules)
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        key = _key(name, sdxl, names if sdxl else None)
        parts = _low_rank(module) if isinstance(module, LoraModule) else _dense(module)
        tensors |= {f"{key}.{part}": tensor for part, tensor in parts.items()}
    return tensors | token_tensors(adapter)


def token_tensors(adapter: CanonicalAdapter) -> dict[str, Tensor]:
    """Learned tokens bundled with a LoRA."""
    both = adapter.family == "sdxl" or any("text_encoder_2" in vectors for vectors in adapter.tokens.values())
    return {
        f"bundle_emb.{placeholder}.{_CLIP[encoder] if both else 'string_to_param.*'}": vectors
        for placeholder, by_encoder in adapter.tokens.items()
        for encoder, vectors in by_encoder.items()
    }


def lone_tokens(adapter: CanonicalAdapter) -> dict[str, Tensor]:
    """The one learned token of an adapter as a file of its own, which A1111 and diffusers load."""
    ((placeholder, by_encoder),) = adapter.tokens.items()
    if adapter.family == "sdxl" or "text_encoder_2" in by_encoder:
        return {_CLIP[encoder]: vectors for encoder, vectors in by_encoder.items()}
    return {placeholder: by_encoder["text_encoder"]}


def _key(name: str, sdxl: bool, names: ModuleNames | None) -> str:
    component, _, bare = name.partition(".")
    if component == "unet":
        return "lora_unet_" + (names.sgm(bare) if names else bare).replace(".", "_")
    prefix = {"text_encoder": "lora_te1_" if sdxl else "lora_te_", "text_encoder_2": "lora_te2_"}[component]
    # transformers 5 took this level out of CLIPTextModel; every other tool expects it.
    level = "" if bare.startswith(("text_model.", "text_projection")) else "text_model."
    return prefix + f"{level}{bare}".replace(".", "_")


def _low_rank(module: LoraModule) -> dict[str, Tensor]:
    parts = {
        "lora_down.weight": module.A,
        "lora_up.weight": module.B,
        "alpha": _exact(module.alpha),
        **({} if module.bias is None else {"diff_b": module.bias}),
    }
    return parts | _magnitude(module.magnitude, module.A.dim())


def _dense(module: DenseModule) -> dict[str, Tensor]:
    """A difference of one dimension is a norm's."""
    norm = module.weight is not None and module.weight.dim() == 1
    weight, bias = ("w_norm", "b_norm") if norm else ("diff", "diff_b")
    named = {weight: module.weight, bias: module.bias}
    parts = {part: tensor for part, tensor in named.items() if tensor is not None}
    return parts | _magnitude(module.magnitude, module.weight.dim() if module.weight is not None else 2)


def _magnitude(magnitude: Tensor | None, dimensions: int) -> dict[str, Tensor]:
    """[o,1,...] for outputs, [1,i,...] for inputs."""
    if magnitude is None:
        return {}
    shape = magnitude.shape if magnitude.dim() == 2 else (len(magnitude), 1)
    return {"dora_scale": magnitude.reshape(*shape, *(1 for _ in range(dimensions - 2)))}


def _exact(alpha: float) -> Tensor:
    """In float32, as others write it, where that holds the number."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
