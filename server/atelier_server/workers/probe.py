"""How far an adapter moves the U-Net: one small forward with it, one without."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from atelier_server.adapters.bank import ActiveRows, SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.words import Words
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.conditioning import Conditioning, Framing
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.errors import AdapterMismatch

_PROMPT = "a photo"
_TIMESTEP = 500.0
_LARGEST = 32  # of the latents, in both directions


class Probe:
    """Always the same noise, prompt and timestep: equal adapters give equal numbers. The device's thread."""

    def __init__(self, base: BaseModel, denoiser: Denoiser, bank: SlotBank) -> None:
        self._base = base
        self._denoiser = denoiser
        self._bank = bank

    def measure(self, adapter: CanonicalAdapter) -> float:
        """The norm of the change of the output, relative to the output's; 0 for an adapter that does nothing.

        At weight 1, with its text encoders and learned tokens. Takes no slot: whatever is resident stays so.
        Raises AdapterMismatch where the output is not finite.
        """
        with self._base.at_work(*self._base.family.text_encoders):
            return self._measured(adapter)

    def _measured(self, adapter: CanonicalAdapter) -> float:
        rows, words = self._bank.alone(adapter)
        prompt = " ".join([_PROMPT, *adapter.tokens])
        plain = self._forward(None, None, prompt) if adapter.tokens else self._plain
        output = self._forward(rows, words, prompt)
        if not bool(output.isfinite().all()):
            raise AdapterMismatch(
                f"with this adapter at weight 1 the U-Net's output is not finite in {self._dtype}"
            )
        return float((output - plain).norm() / plain.norm())

    @property
    def _dtype(self) -> str:
        return str(self._base.dtype).removeprefix("torch.")

    @cached_property
    def _plain(self) -> Tensor:
        return self._forward(None, None, _PROMPT)

    @torch.no_grad()
    def _forward(self, rows: ActiveRows | None, words: Words | None, prompt: str) -> Tensor:
        """[1,C,h,w], float32, on the CPU."""
        base = self._base
        with self._bank.use(rows, words):
            embeds = base.encode_prompt(prompt, words=words.ids if words else {})
            framing = Framing.whole(base.native_width, base.native_height)
            conditioning = Conditioning.stack([base.family.condition(embeds, framing)])
            output = self._denoiser.predict(
                self._latents, torch.tensor([_TIMESTEP], device=base.device), conditioning
            )
        return output.float().cpu()

    @cached_property
    def _latents(self) -> Tensor:
        _, height, width = self._base.latent_shape(self._base.native_width, self._base.native_height)
        shape = (1, self._base.unet.config.in_channels, min(height, _LARGEST), min(width, _LARGEST))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(self._base.device, self._base.dtype)
