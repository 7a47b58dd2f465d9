"""DreamBooth (arXiv 2208.12242): the whole U-Net learns, in a private copy; optionally the text encoders too.

The resident base is read once, for the copy. What is published is the adapter of the recipe's rank that comes
nearest to what the copy has become; the copy's own weights are in every checkpoint's state.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.tuning import Tuning
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.training import private
from atelier_server.training.methods.method import Method
from atelier_server.training.parts import Part, Phase


class Dreambooth(Method):
    """`modules` are the private ones by component: float32 whatever the base is."""

    shares = False

    def __init__(self, recipe: Recipe, base: BaseModel, bank: SlotBank) -> None:
        if base.quantization:
            told = f"it learns the base's own weights, which are in {base.quantization} here (--quantize)"
            raise InvalidRequest.of([Violation("recipe.method", f"'dreambooth': {told}; use lora")])
        components = ("unet", *(base.family.text_encoders if recipe.train_text_encoder else ()))
        self.modules: dict[str, nn.Module] = {
            name: private.outline(base.modules[name]) for name in components
        }
        super().__init__(recipe, Denoiser(self.modules["unet"], base.scheduler_config))
        self._resident = base
        self._bank = bank
        self.heard_by = base.hearing_with(self.modules)
        self.phases = [Phase("dreambooth", components, 0, recipe.max_train_steps)]
        self._tuning: Tuning | None = None

    def begin(self) -> None:
        recipe = self.recipe
        self.parts = [
            Part(
                component,
                {
                    f"{component}.{name}": parameter
                    for name, parameter in self._filled(component, module).items()
                },
                recipe.learning_rate if component == "unet" else recipe.text_encoder_lr,
            )
            for component, module in self.modules.items()
        ]

    def _filled(self, component: str, module: nn.Module) -> dict[str, nn.Parameter]:
        return private.fill(module, self._resident.modules[component], self._resident.device)

    def after_step(self, phase: Phase) -> None:  # noqa: ARG002 - there is one
        self._tuning = None

    # ---------------------------------------------------------------------------------------- the adapter
    def extracting(self) -> Iterator[None]:
        """Works out the adapter of the weights of now, a layer between two yields."""
        if self._tuning is not None:
            return
        tuning = Tuning(
            tuned={name: p for part in self.parts for name, p in part.parameters.items()},
            base={
                f"{component}.{name}": p
                for component in self.modules
                for name, p in self._resident.modules[component].named_parameters()
            },
            shapes=self._bank.shapes,
            rank=self.recipe.rank,
        )
        yield from tuning.steps()
        self._tuning = tuning

    def adapter(self) -> CanonicalAdapter:
        return self._extracted().adapter(self._resident.family.name)

    @property
    def kept_share(self) -> float | None:
        return self._extracted().kept_share

    @property
    def full_modules(self) -> dict[str, nn.Module]:
        return self.modules

    def _extracted(self) -> Tuning:
        if self._tuning is None:
            for _ in self.extracting():
                pass
        assert self._tuning is not None
        return self._tuning
