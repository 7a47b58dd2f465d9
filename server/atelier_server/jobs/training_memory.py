"""What a training needs of the device, guessed before it starts.

The constants are Stable Diffusion 1.5's, scaled by the base's parameters. What a forward keeps for its
backward was counted for its U-Net and SDXL's, in half precision, without attention's matrices: about 0.6 MB
a latent pixel. It goes with the width of the layers, so with the root of the parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from atelier_server.core import ROW_BUCKETS, BaseInfo, Costs, Recipe

_RANK_SHARE = 2.3e-4  # of the base's parameters: a rank of 1 on the attention
_LAYERS = {"attention": 1.0, "feed_forward": 1.6, "convolutions": 2.4}  # of the attention's, by their shapes
_TEXT_SHARE = 0.25  # of the U-Net's adapter: that of the text encoders
_UNET_SHARE = 0.8  # of the base's parameters
_LEARNED_BYTES = 16  # of a parameter that learns: float32 weight, gradient, two moments
_AVERAGED_BYTES = 4  # and its moving average
_ACTIVATIONS = 9.0  # numbers of a latent pixel, for the root of the parameters
_CHECKPOINTED = 0.25  # of the activations, with gradient checkpointing: their inputs, and one block's


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes that a training holds between two steps, and those that a step takes besides."""

    state: int
    step: int

    @property
    def total(self) -> int:
        return self.state + self.step


def base_bytes(base: BaseInfo) -> int:
    """Of the base's weights, which every training shares."""
    return base.num_parameters * _itemsize(base)


def demand(recipe: Recipe, base: BaseInfo, costs: Costs) -> Demand:
    """What a training needs beside the base. A step is never less than the forward of so many rows, which
    was measured.
    """
    rows = _rows(recipe)
    numbers = rows * (recipe.resolution // 8) ** 2 * math.sqrt(base.num_parameters) * _ACTIVATIONS
    activations = numbers * _itemsize(base)
    if recipe.gradient_checkpointing:
        activations *= _CHECKPOINTED
    forward = costs.forward_bytes(rows, recipe.resolution, recipe.resolution)
    state = _learned(recipe) * base.num_parameters * _bytes_each(recipe)
    return Demand(int(state), max(int(activations), forward))


def _itemsize(base: BaseInfo) -> int:
    return 4 if base.dtype == "float32" else 2


def _rows(recipe: Recipe) -> int:
    """Of a micro-step: the bucket that holds them."""
    rows = recipe.rows
    return recipe.batch_bucket or next((bucket for bucket in ROW_BUCKETS if bucket >= rows), rows)


def _learned(recipe: Recipe) -> float:
    """The share of the base's parameters that learns."""
    if recipe.method == "textual_inversion":
        return 0.0  # some vectors
    method = recipe.pivotal_method if recipe.method == "pivotal" else recipe.method
    if method == "dreambooth":
        return 1.0 if recipe.train_text_encoder else _UNET_SHARE  # private ones, beside the resident ones
    layers = sum(_LAYERS[target] for target in recipe.target_modules)
    text = _TEXT_SHARE if recipe.train_text_encoder else 0.0
    return _RANK_SHARE * recipe.rank * (layers + text)


def _bytes_each(recipe: Recipe) -> int:
    return _LEARNED_BYTES + (_AVERAGED_BYTES if recipe.use_ema else 0)
