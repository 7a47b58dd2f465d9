"""Which files of a folder or hub repository are its adapter, by their names alone. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch

from atelier_server.errors import UnsupportedFormat

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_EMBEDDINGS = ("*_emb.safetensors", "*learned_embeds*.safetensors", "*embeddings*.safetensors")


def adapter_files(names: Iterable[str]) -> list[str]:
    """Weights as PEFT, diffusers or kohya's scripts leave them, then learned tokens, then configurations.

    `names` are relative paths with slashes. Raises UnsupportedFormat if there is none or it is unclear.
    """
    known = set(names)
    found = _weights(known)
    embeddings = sorted(name for name in known if _is_embedding(name) and name not in found)
    if not found and not embeddings:
        listed = ", ".join(sorted(known)[:8]) or "nothing"
        raise UnsupportedFormat(f"the folder has no safetensors file of an adapter; it has {listed}")
    configs = {name.rpartition("/")[0] for name in found}
    paths = [f"{folder}/{PEFT_CONFIG}" if folder else PEFT_CONFIG for folder in sorted(configs)]
    return [*found, *embeddings, *(path for path in paths if path in known)]


def _weights(known: set[str]) -> list[str]:
    for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS):
        if name in known:
            return [name]
    parts = [f"{component}/{PEFT_WEIGHTS}" for component in COMPONENTS]
    if any(part in known for part in parts):
        return [part for part in parts if part in known]
    top = sorted(name for name in known if "/" not in name and name.endswith(".safetensors"))
    others = [name for name in top if not _is_embedding(name)]
    if len(others) > 1:
        raise UnsupportedFormat(f"which of these is the adapter? Name the file: {', '.join(others[:8])}")
    return others


def _is_embedding(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _EMBEDDINGS)
