"""Ways to learn a subject: what is learned, which of it when, and the adapter that comes of it."""

from __future__ import annotations

from atelier_server.adapters.bank import SlotBank
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.training.methods.dreambooth import Dreambooth
from atelier_server.training.methods.lora import Lora
from atelier_server.training.methods.method import Method
from atelier_server.training.methods.pivotal import Pivotal
from atelier_server.training.methods.textual_inversion import TextualInversion


def method_of(recipe: Recipe, *, base: BaseModel, denoiser: Denoiser, bank: SlotBank) -> Method:
    """The method that a recipe names. Raises InvalidRequest for one that is not known."""
    if recipe.method == "textual_inversion":
        return TextualInversion(recipe, base, denoiser, bank)
    if recipe.method == "pivotal":
        if recipe.pivotal_method == "dreambooth" and recipe.train_text_encoder:
            # A private text encoder knows no new tokens.
            told = "true, but pivotal with dreambooth learns the U-Net and tokens; use pivotal_method lora"
            raise InvalidRequest.of([Violation("recipe.train_text_encoder", told)])
        field, name = "recipe.pivotal_method", recipe.pivotal_method
    else:
        field, name = "recipe.method", recipe.method
    if name == "lora":
        weights: Method = Lora(recipe, base, denoiser, bank)
    elif name == "dreambooth":
        weights = Dreambooth(recipe, base, bank)
    else:
        raise InvalidRequest.of([Violation(field, f"{name!r} is not known here")])
    return Pivotal(recipe, base, bank, weights) if recipe.method == "pivotal" else weights
