"""The precision that a training computes in, beside a base whose weights have one already."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from atelier_server.core import Recipe
from atelier_server.core.recipe import PRECISIONS
from atelier_server.errors import InvalidRequest, Violation

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precisions_on(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """What a base with weights of this dtype trains in: autocast goes down from float32, never up to it."""
    if dtype != torch.float32:
        return tuple(name for name, own in _DTYPES.items() if own == dtype)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return tuple(name for name in PRECISIONS if name != "bf16")  # before Ampere only imitated
    return PRECISIONS


@dataclass(frozen=True, slots=True)
class Precision:
    """`autocast` is None where everything runs in the dtype of the base's weights.

    What learns is float32 in any case. Gradients that pass through float16 are `scaled`, or the small ones
    would vanish (arXiv 1710.03740).
    """

    device: str
    autocast: torch.dtype | None
    scaled: bool

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Precision:
        """Raises InvalidRequest for what the base or its device cannot."""
        asked = recipe.mixed_precision
        if asked and asked not in (known := precisions_on(device, dtype)):
            own = str(dtype).removeprefix("torch.")
            told = f"{asked!r}: on {device.type}, a base in {own} trains in {' or '.join(known)}"
            raise InvalidRequest.of([Violation("recipe.mixed_precision", told)])
        computes = _DTYPES[asked] if asked else dtype
        return cls(device.type, None if computes == dtype else computes, computes == torch.float16)

    def context(self) -> AbstractContextManager[object]:
        """Of a forward, with the loss outside."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device, self.autocast)
