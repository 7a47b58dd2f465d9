"""DreamBooth with LoRA (arXiv 2208.12242, 2106.09685) on the layers of the resident base."""

from __future__ import annotations

from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.leaves import Leaf, LeafSet
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.initial import initial_weights
from atelier_server.training.methods.method import Method
from atelier_server.training.parts import Part, Phase

TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0")


class Lora(Method):
    """The U-Net's attention."""

    def __init__(self, recipe: Recipe, base: BaseModel, denoiser: Denoiser, bank: SlotBank) -> None:
        super().__init__(recipe, denoiser)
        self._base = base
        self._bank = bank
        self.phases = [Phase("lora", ("unet",), 0, recipe.max_train_steps)]

    def begin(self) -> None:
        layers = {
            name: layer
            for name, layer in self._bank.layers.items()
            if name.startswith("unet.") and name.endswith(TARGETS)
        }
        first = initial_weights(layers, self.recipe)
        scale = self.recipe.lora_alpha / self.recipe.rank
        self.leaves = LeafSet(
            {name: Leaf(self._leaf(first[name].A), self._leaf(first[name].B), scale) for name in layers}
        )
        self.parts = [Part("unet", self.leaves.named_parameters(), self.recipe.learning_rate)]

    def adapter(self) -> CanonicalAdapter:
        modules = {}
        for name, leaf in self.leaves.leaves.items():
            assert isinstance(leaf, Leaf)
            modules[name] = LoraModule(_copy(leaf.A), _copy(leaf.B), self.recipe.lora_alpha)
        return CanonicalAdapter(modules)

    def _leaf(self, weights: Tensor) -> nn.Parameter:
        return nn.Parameter(weights.detach().to(self._base.device, copy=True))


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", copy=True)
