"""Ways to learn a subject: what is learned, which of it when, and the adapter that comes of it."""

from __future__ import annotations

from atelier_server.adapters.bank import SlotBank
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.training.methods.lora import Lora
from atelier_server.training.methods.method import Method
from atelier_server.training.methods.pivotal import Pivotal
from atelier_server.training.methods.textual_inversion import TextualInversion


def method_of(recipe: Recipe, *, base: BaseModel, denoiser: Denoiser, bank: SlotBank) -> Method:
    """The method that a recipe names. Raises InvalidRequest for one that is not known."""
    if recipe.method == "textual_inversion":
        return TextualInversion(recipe, base, denoiser, bank)
    if recipe.method == "pivotal":
        weights = _of_weights("recipe.pivotal_method", recipe.pivotal_method)
        return Pivotal(recipe, base, bank, weights(recipe, base, denoiser, bank))
    return _of_weights("recipe.method", recipe.method)(recipe, base, denoiser, bank)


def _of_weights(field: str, name: str) -> type[Lora]:
    if name == "lora":
        return Lora
    raise InvalidRequest.of([Violation(field, f"{name!r} is not known here")])
