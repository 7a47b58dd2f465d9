"""The layers of a base that adapters can change, each replaced by one that has deltas."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from atelier_server.adapters.canonical import DenseModule, Module
from atelier_server.adapters.changes import Difference, LayerChange, change_of
from atelier_server.adapters.layers import BankLayer, Current, is_norm, wrapped, wrapped_norm
from atelier_server.adapters.shapes import shape_fault
from atelier_server.adapters.words import BankEmbedding, is_vocabulary
from atelier_server.errors import AdapterMismatch


class Wrapping:
    """Linear layers, convolutions, norms and text encoders' vocabularies, by name.

    `shapes`: of the weights that adapters can change, norms included.
    """

    def __init__(self, current: Current) -> None:
        self._current = current
        self.layers: dict[str, BankLayer] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.vocabularies: dict[str, BankEmbedding] = {}
        self._norms: dict[str, tuple[nn.Module, str]] = {}

    def wrap(self, root: nn.Module, prefix: str) -> list[BankLayer]:
        """Replaces every plain linear and convolution layer inside `root`, freezes the base; the new layers.

        So is a text encoder's vocabulary. Norms are replaced when an adapter that changes them is first
        loaded. Layers are known as PREFIX.NAME, with their names in `root`, whose device and dtype must be
        final.
        """
        root.requires_grad_(False)
        added = []
        for name, module in list(root.named_modules()):
            layer = wrapped(module, f"{prefix}.{name}", self._current)
            if layer is not None:
                root.set_submodule(name, layer)
                self.layers[layer.layer_name] = layer
                self.shapes[layer.layer_name] = tuple(layer.weight.shape)
                added.append(layer)
            elif is_norm(module):
                self.shapes[f"{prefix}.{name}"] = tuple(module.weight.shape)
                self._norms[f"{prefix}.{name}"] = (root, name)
            elif is_vocabulary(module, name):
                assert isinstance(module, nn.Embedding)
                self.vocabularies[prefix] = BankEmbedding(module, prefix, self._current)
                root.set_submodule(name, self.vocabularies[prefix])
        return added

    def layer(self, name: str) -> nn.Module:
        """The layer or norm of that name, one of `shapes`."""
        if (layer := self.layers.get(name)) is not None:
            return layer
        root, inner = self._norms[name]
        return root.get_submodule(inner)

    def check(self, modules: Mapping[str, Module], max_rank: int) -> None:
        """Raises AdapterMismatch that names the first module which does not fit."""
        for name, module in modules.items():
            if (shape := self.shapes.get(name)) is None:
                raise AdapterMismatch(f"the base model has no layer {name}", {"module": name})
            if fault := shape_fault(module, shape, max_rank):
                raise AdapterMismatch(f"the adapter's {name} {fault}", {"module": name})

    def change(self, name: str, module: Module) -> LayerChange:
        """What the module does to its layer; a norm is wrapped now, as few adapters change one."""
        if (layer := self.layers.get(name)) is not None:
            return change_of(module, layer)
        root, inner = self._norms[name]
        norm = self.layer(name)
        if is_norm(norm):
            root.set_submodule(inner, wrapped_norm(norm, name, self._current))
        assert isinstance(module, DenseModule)
        assert isinstance(norm.weight, Tensor)
        parts = (None if t is None else t.to(norm.weight) for t in (module.weight, module.bias))
        return LayerChange(difference=Difference(*parts))
