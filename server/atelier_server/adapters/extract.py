"""The difference of two bases as an adapter of a given rank, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from atelier_server.adapters.algebra import module_of, nearest
from atelier_server.adapters.canonical import CanonicalAdapter, Module
from atelier_server.errors import AdapterMismatch, InvalidRequest, Violation


class Weights(Protocol):
    """The weights of a base, read when they are asked for."""

    def get(self, name: str) -> Tensor | None:
        """The weight of the layer `name` ("unet.conv_in"), None if there is no such layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Extracted:
    """`kept`: the share of the difference's squared norm, over all layers, that the rank could hold.

    Biases and norms, which have no rank, are left as they are in the base.
    """

    adapter: CanonicalAdapter
    kept: float


def extract(
    tuned: Weights,
    base: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int,
    family: str,
    progress: Callable[[int, int], None],
) -> Extracted:
    """W of `tuned` less W of `base` for the layers of `shapes`, which are linear or convolutions.

    One layer is in memory at a time. `progress` gets the layers done and their number; what it raises ends
    the work. Raises AdapterMismatch if a layer is missing or of another shape, InvalidRequest if nothing
    differs.
    """
    modules: dict[str, Module] = {}
    kept = square = 0.0
    for number, (name, shape) in enumerate(shapes.items()):
        progress(number, len(shapes))
        difference = _weight(tuned, name, shape, "tuned") - _weight(base, name, shape, "base")
        whole = difference.double().square().sum().item()
        if not whole:
            continue
        pair, held = nearest(difference.flatten(1), rank)
        modules[name] = module_of(pair, shape)
        kept, square = kept + held, square + whole
    progress(len(shapes), len(shapes))
    if not modules:
        raise InvalidRequest.of([Violation("tuned", "has the same weights as the base: nothing to extract")])
    return Extracted(CanonicalAdapter(modules, family=family), min(kept / square, 1.0))


def _weight(weights: Weights, name: str, shape: tuple[int, ...], which: str) -> Tensor:
    weight = weights.get(name)
    if weight is None:
        raise AdapterMismatch(
            f"the {which} model has no layer {name}: it is of another family", {"module": name}
        )
    if tuple(weight.shape) != shape:
        raise AdapterMismatch(
            f"{name} of the {which} model has shape {tuple(weight.shape)}, the resident base's is {shape}",
            {"module": name},
        )
    return weight.float()
