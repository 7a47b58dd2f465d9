"""The file in which the store keeps an adapter: the canonical form, whole, as safetensors.

    unet.conv_in.A, unet.conv_in.B, unet.conv_in.magnitude       a low-rank module
    unet.conv_norm_out.weight, unet.conv_norm_out.bias           a full difference
    token.0.text_encoder                                         the first placeholder's vectors

The header's one entry, `atelier`, is a JSON object: alphas by module, placeholders in order, triggers,
source, family. Equal adapters give equal bytes. Files that earlier versions stored, LoRA of the U-Net in
diffusers' layout, are read too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule, Module, tensors_of
from atelier_server.errors import UnsupportedFormat

_KEY = "atelier"
_LEGACY_KEY = "lora_adapter_metadata"


def write_stored(adapter: CanonicalAdapter, path: Path) -> None:
    """Writes `adapter` without a second copy of its tensors. Raises OSError as files do."""
    tensors = {
        f"{name}.{part}": tensor
        for name, module in adapter.modules.items()
        for part, tensor in tensors_of(module)
    }
    placeholders = sorted(adapter.tokens)
    for number, placeholder in enumerate(placeholders):
        for encoder, vectors in adapter.tokens[placeholder].items():
            tensors[f"token.{number}.{encoder}"] = vectors
    header = {
        "alphas": {name: module.alpha for name, module in adapter.low_rank.items()},
        "family": adapter.family,
        "source": dict(adapter.source),
        "tokens": placeholders,
        "triggers": list(adapter.triggers),
    }
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    # One entry only: safetensors writes several in an order that differs from run to run.
    safetensors.torch.save_file(plain, path, {_KEY: json.dumps(header, sort_keys=True)})


def decode_stored(file: bytes) -> CanonicalAdapter:
    """The adapter of a stored file. No look at the values: they were checked when it was published.

    Raises UnsupportedFormat for bytes that are no such file.
    """
    try:
        tensors = safetensors.torch.load(file)
        (size,) = struct.unpack("<Q", file[:8])
        metadata = json.loads(file[8 : 8 + size]).get("__metadata__", {})
        if _KEY in metadata:
            return _decode(tensors, json.loads(metadata[_KEY]))
        return _decode_legacy(tensors, json.loads(metadata[_LEGACY_KEY]))
    except SafetensorError as error:
        raise UnsupportedFormat(f"this is not a whole safetensors file: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedFormat(f"this is no file of the adapter store: {error!r}") from error


def _decode(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> CanonicalAdapter:
    alphas: dict[str, float] = header["alphas"]
    fields: dict[str, dict[str, Tensor]] = {}
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, part = key.rpartition(".")
        if owner.startswith("token."):
            tokens.setdefault(header["tokens"][int(owner.removeprefix("token."))], {})[part] = tensor
        else:
            fields.setdefault(owner, {})[part] = tensor
    # In the order of names, which is the file's own only by its writer's grace.
    modules: dict[str, Module] = {
        name: LoraModule(alpha=alphas[name], **fields[name])
        if "A" in fields[name]
        else DenseModule(**fields[name])
        for name in sorted(fields)
    }
    return CanonicalAdapter(modules, tokens, tuple(header["triggers"]), header["source"], header["family"])


def _decode_legacy(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CanonicalAdapter:
    """unet.NAME.lora_A.weight and the arguments of peft.LoraConfig, each with the prefix `unet.`."""
    common, pattern = config["unet.lora_alpha"], config["unet.alpha_pattern"]
    modules: dict[str, Module] = {}
    for key in sorted(tensors):
        name, found, _ = key.partition(".lora_A.weight")
        if found:
            alpha = pattern.get(name.removeprefix("unet."), common)
            modules[name] = LoraModule(tensors[key], tensors[f"{name}.lora_B.weight"], float(alpha))
    return CanonicalAdapter(modules)
