"""Ways to learn a subject: what is learned, which of it when, and the adapter that comes of it."""

from __future__ import annotations

from atelier_server.adapters.bank import SlotBank
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.training.methods.lora import Lora
from atelier_server.training.methods.method import Method


def method_of(recipe: Recipe, *, base: BaseModel, denoiser: Denoiser, bank: SlotBank) -> Method:
    """The method that a recipe names. Raises InvalidRequest for one that is not known."""
    if recipe.method == "lora":
        return Lora(recipe, base, denoiser, bank)
    raise InvalidRequest.of([Violation("recipe.method", f"{recipe.method!r} is none of: lora")])
