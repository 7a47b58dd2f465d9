"""LoRA and DoRA leaves on the layers of the resident base, and the adapter that they become."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import LoraModule
from atelier_server.adapters.changes import full
from atelier_server.adapters.layers import BankLayer
from atelier_server.adapters.leaves import AnyLeaf, DoraLeaf, Leaf, LeafSet, Pair
from atelier_server.adapters.slots import component_of
from atelier_server.core import Recipe
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.training.initial import initial_pairs, is_out_of_the_base

# The ends of the names of layers, in diffusers' U-Net and in CLIP.
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
_UNET = {
    "attention": ATTENTION,
    "feed_forward": (".ff.net.0.proj", ".ff.net.2"),
    "convolutions": (".conv1", ".conv2", ".conv_shortcut", "samplers.0.conv"),
}
_ENCODER = (".q_proj", ".k_proj", ".v_proj", ".out_proj")


class LowRank:
    """A leaf a layer: of the U-Net those that the recipe targets, of `encoders` the attention.

    Raises InvalidRequest for what the base's layers cannot have.
    """

    def __init__(self, recipe: Recipe, bank: SlotBank, encoders: Sequence[str]) -> None:
        self._recipe = recipe
        layers = dict(_targets(bank, recipe, encoders))
        doubled = is_out_of_the_base(recipe)
        if doubled and 2 * recipe.rank > bank.max_rank:
            message = f"{recipe.init_lora_weights} makes twice the rank, and slots hold {bank.max_rank}"
            raise InvalidRequest.of([Violation("recipe.rank", message)])
        # alpha / sqrt(rank) is rsLoRA's scale (arXiv 2312.03732).
        root = math.sqrt(recipe.rank) if recipe.use_rslora else recipe.rank
        self._scale = recipe.lora_alpha / root
        self._leaves: dict[str, AnyLeaf] = {}
        for name, pair in initial_pairs(layers, recipe).items():
            device = layers[name].weight.device
            a, b = (nn.Parameter(t.detach().to(device, torch.float32, copy=True)) for t in pair)
            initial = (a.detach().clone(), b.detach().clone()) if doubled else None
            leaf = Leaf(a, b, self._scale, initial)
            self._leaves[name] = _with_magnitude(leaf, layers[name]) if recipe.use_dora else leaf

    def of(self, *components: str) -> LeafSet:
        """The leaves of these components."""
        return LeafSet(
            {name: leaf for name, leaf in self._leaves.items() if component_of(name) in components}
        )

    def modules(self) -> dict[str, LoraModule]:
        """Copies on the CPU, in the canonical form, whose scale is alpha / rank whatever the recipe's was."""
        modules = {}
        for name, leaf in self._leaves.items():
            pair, magnitude = (leaf.low_rank, leaf.magnitude) if isinstance(leaf, DoraLeaf) else (leaf, None)
            a, b = _copy(pair.A), _copy(pair.B)
            if pair.initial is not None:
                a = torch.cat([a, _copy(pair.initial[0])])
                b = torch.cat([b, -_copy(pair.initial[1])], dim=1)
            alpha = self._recipe.lora_alpha if self._is_plain(a) else pair.scale * len(a)
            modules[name] = LoraModule(a, b, alpha, None if magnitude is None else _copy(magnitude))
        return modules

    def constants(self) -> dict[str, Tensor]:
        """The pairs that are taken away."""
        return {
            f"{name}.{part}": tensor
            for name, initial in self._initial()
            for part, tensor in zip(("A", "B"), initial, strict=True)
        }

    def take_constants(self, constants: Mapping[str, Tensor]) -> None:
        for name, initial in self._initial():
            for part, tensor in zip(("A", "B"), initial, strict=True):
                tensor.copy_(constants[f"{name}.{part}"])

    def _is_plain(self, a: Tensor) -> bool:
        """Whether alpha is the recipe's own, to the bit."""
        return len(a) == self._recipe.rank and not self._recipe.use_rslora

    def _initial(self) -> Iterator[tuple[str, Pair]]:
        for name, leaf in self._leaves.items():
            pair = leaf.low_rank if isinstance(leaf, DoraLeaf) else leaf
            if pair.initial is not None:
                yield name, pair.initial


def _targets(bank: SlotBank, recipe: Recipe, encoders: Sequence[str]) -> Iterator[tuple[str, BankLayer]]:
    """In the order of the base's layers: PEFT's, too."""
    ends = tuple(end for target in recipe.target_modules for end in _UNET[target])
    for name, layer in bank.layers.items():
        component = component_of(name)
        if name.endswith(ends if component == "unet" else _ENCODER) and component in ("unet", *encoders):
            yield name, layer


def _with_magnitude(leaf: Leaf, layer: BankLayer) -> DoraLeaf:
    """DoRA begins at the norms of the base's own weights."""
    weight = full(layer.weight.detach()).flatten(1).float() + leaf.weight_change()
    return DoraLeaf(leaf, nn.Parameter(torch.linalg.vector_norm(weight, dim=1)), layer)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
