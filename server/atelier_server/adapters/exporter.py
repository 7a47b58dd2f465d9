"""The way out of the wardrobe: files that other tools load, with true alphas, trigger words and recipe.

    diffusers            unet.NAME.lora_A.weight, alphas in the header under lora_adapter_metadata (JSON)
    peft                 base_model.model.NAME.lora_A.weight, likewise
    kohya                formats.kohya
    textual-inversion    the learned token alone

Learned tokens are bundled with the weights in every other layout. What a layout cannot hold is refused.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.formats.header import describe
from atelier_server.adapters.formats.kohya import kohya_tensors, lone_tokens, token_tensors
from atelier_server.adapters.formats.names import ModuleNames
from atelier_server.adapters.formats.peft import METADATA_KEY, header_for
from atelier_server.errors import UnsupportedFormat

Layout = Literal["diffusers", "peft", "kohya", "textual-inversion"]


def write_adapter(
    adapter: CanonicalAdapter,
    path: Path,
    layout: Layout = "diffusers",
    metadata: Mapping[str, str] | None = None,
    names: ModuleNames | None = None,
) -> None:
    """Writes `adapter` with `metadata` in the header; equal adapters give equal bytes.

    `names` are the modules of its base. Raises UnsupportedFormat for what `layout` cannot hold, OSError as
    files do.
    """
    if layout not in get_args(Layout):
        raise UnsupportedFormat(f"layout {layout!r} is none of {', '.join(get_args(Layout))}")
    header = {"format": "pt", **describe(adapter), **(metadata or {})}
    if not adapter.modules and layout != "textual-inversion":
        raise UnsupportedFormat(f"the adapter is a learned token alone; {layout} holds weights")
    if layout == "kohya":
        tensors = kohya_tensors(adapter, names)
    elif layout == "textual-inversion":
        if len(adapter.tokens) != 1:
            raise UnsupportedFormat(
                f"the adapter has {len(adapter.tokens)} learned tokens; this layout holds one"
            )
        tensors = lone_tokens(adapter)
        header["name"] = next(iter(adapter.tokens))
    else:
        tensors = _peft_tensors(adapter, layout)
        header[METADATA_KEY] = json.dumps(
            header_for(adapter, prefix_unet=layout == "diffusers"), sort_keys=True
        )
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(plain, path, header)
    _sort_header(path)


def _peft_tensors(adapter: CanonicalAdapter, layout: str) -> dict[str, Tensor]:
    """Names of PEFT below the component's; PEFT's own layout has the U-Net's modules bare."""
    dora = {module.magnitude is not None for module in adapter.low_rank.values()}
    if len(dora) > 1:
        raise UnsupportedFormat(f"some layers are DoRA and some are not: {layout} cannot tell; kohya can")
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        if not isinstance(module, LoraModule) or module.bias is not None:
            raise UnsupportedFormat(f"{name} is a full difference, which {layout} cannot hold; kohya can")
        key = _dotted(name, layout)
        tensors[f"{key}.lora_A.weight"] = module.A
        tensors[f"{key}.lora_B.weight"] = module.B
        if module.magnitude is not None:
            if module.magnitude.dim() != 1:
                raise UnsupportedFormat(f"{name} is DoRA over inputs, which {layout} cannot hold; kohya can")
            tensors[f"{key}.lora_magnitude_vector"] = module.magnitude
    return tensors | token_tensors(adapter)


def _dotted(name: str, layout: str) -> str:
    component, _, bare = name.partition(".")
    if component != "unet" and not bare.startswith(("text_model.", "text_projection")):
        bare = f"text_model.{bare}"  # transformers 5 took it out; diffusers reads both, older ones this
    if layout == "diffusers":
        return f"{component}.{bare}"
    return f"base_model.model.{bare if component == 'unet' else f'{component}.{bare}'}"


def _sort_header(path: Path) -> None:
    """Puts the header's entries into a fixed order, in place; the library's differs from run to run."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # The same characters in another order, so of the same length.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))
