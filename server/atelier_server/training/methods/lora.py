"""DreamBooth with LoRA (arXiv 2208.12242, 2106.09685) on the resident base."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.methods.low_rank import LowRank
from atelier_server.training.methods.method import Method
from atelier_server.training.parts import Part, Phase


class Lora(Method):
    """Pairs in the U-Net, and in the text encoders if the recipe says so."""

    def __init__(self, recipe: Recipe, base: BaseModel, denoiser: Denoiser, bank: SlotBank) -> None:
        super().__init__(recipe, denoiser)
        self._base = base
        self._bank = bank
        self._encoders = base.family.text_encoders if recipe.train_text_encoder else ()
        self.phases = [Phase("lora", ("unet", *self._encoders), 0, recipe.max_train_steps)]

    def begin(self) -> None:
        self._low_rank = LowRank(self.recipe, self._bank, self._encoders)
        self.leaves, self.text_leaves = self._low_rank.of("unet"), self._low_rank.of(*self._encoders)
        rates = {"unet": self.recipe.learning_rate}
        self.parts = [
            Part(
                component,
                self._low_rank.of(component).named_parameters(),
                rates.get(component, self.recipe.text_encoder_lr),
            )
            for component in ("unet", *self._encoders)
        ]

    def adapter(self) -> CanonicalAdapter:
        return CanonicalAdapter(self._low_rank.modules())

    def constants(self) -> Mapping[str, Tensor]:
        return self._low_rank.constants()

    def take_constants(self, constants: Mapping[str, Tensor]) -> None:
        self._low_rank.take_constants(constants)
