"""What an import says about a file: families by names and shapes, and how large the change is."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule, Module
from atelier_server.report import TokenReport

# The width of the cross-attention's inputs, of published models.
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_DEEP = re.compile(r"transformer_blocks[._][1-9]")
_BLOCK = re.compile(r"(?:(?:down|up)_blocks\.\d+|mid_block)")
_TRANSFORMERS_ONLY = re.compile(
    r"(?:double|single)_(?:transformer_)?blocks|joint_blocks|lora_transformer_|^transformer\."
)


def family_of(downs: Mapping[str, Tensor], keys: Iterable[str], header: str) -> tuple[str, str]:
    """The family of bases that a file was made for and how one can tell, ("", "") if one cannot.

    `downs`: the low-rank weights [r,i,...] of its modules by their names in the file, or shapes like them.
    `header`: the family that the header names. Names and shapes count more.
    """
    keys = list(keys)
    for key in keys:
        if _TRANSFORMERS_ONLY.search(key):
            return header or "transformer", f"{key} is of a diffusion transformer"
    for name, down in downs.items():
        if re.search(r"attn2[._]to_[kv]", name) and down.dim() > 1 and down.shape[1] in _WIDTHS:
            width = down.shape[1]
            return _WIDTHS[width], f"its cross-attention is {width} wide"
    for key in keys:
        if key.startswith(("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.")) or key == "clip_g":
            return "sdxl", "it changes a second text encoder"
        if _DEEP.search(key):
            return "sdxl", "it has several transformer blocks in a place"
    return (header, "its header says so") if header else ("", "")


def norms(adapter: CanonicalAdapter) -> tuple[tuple[str, float], ...]:
    """The Frobenius norm of the change by block of the U-Net and by text encoder, in the order of names."""
    squares: defaultdict[str, float] = defaultdict(float)
    for name, module in adapter.modules.items():
        squares[block_of(name)] += _squared_norm(module)
    return tuple((block, math.sqrt(square)) for block, square in sorted(squares.items()))


def block_of(name: str) -> str:
    """ "unet.down_blocks.1" for one of its modules, "text_encoder", "unet" for what lies between blocks."""
    component, _, rest = name.partition(".")
    match = _BLOCK.match(rest)
    return f"{component}.{match[0]}" if match else component


def tokens_of(adapter: CanonicalAdapter) -> tuple[TokenReport, ...]:
    return tuple(
        TokenReport(placeholder, max(len(v) for v in vectors.values()), tuple(sorted(vectors)))
        for placeholder, vectors in sorted(adapter.tokens.items())
    )


def difference_bytes(adapter: CanonicalAdapter, itemsize: int) -> int:
    """What its whole differences take on the device, in each slot that holds it."""
    dense = (module for module in adapter.modules.values() if not isinstance(module, LoraModule))
    return sum(module.weight.numel() * itemsize for module in dense if module.weight is not None)


_T = TypeVar("_T", int, float, str)


def counted(values: Iterable[_T]) -> tuple[tuple[_T, int], ...]:
    """Each value with how often it comes, in order."""
    return tuple(sorted(Counter(values).items()))


def _squared_norm(module: Module) -> float:
    """Of alpha/r B A without the product itself: tr((Bt B)(A At)). Of a full difference, as it is."""
    if isinstance(module, LoraModule):
        a, b = module.A.flatten(1).float(), module.B.flatten(1).float()
        return (module.alpha / module.rank) ** 2 * max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)
    return sum(float(t.float().square().sum()) for t in (module.weight, module.bias) if t is not None)
