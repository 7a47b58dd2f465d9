"""The first weights of a training: PEFT's own, whatever it calls them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from torch.nn.utils import skip_init

from atelier_server.adapters.canonical import LoraModule
from atelier_server.adapters.layers import BankLayer
from atelier_server.core import Recipe


def initial_weights(layers: Mapping[str, BankLayer], recipe: Recipe) -> dict[str, LoraModule]:
    """What PEFT injects into a model of these layers after `torch.manual_seed(seed)`, float32 on the CPU."""
    skeleton = nn.Module()
    for name, layer in layers.items():
        _put(skeleton, name, _bare(layer))
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=list(layers),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        inject_adapter_in_model(config, skeleton)
    weights = get_peft_model_state_dict(skeleton)
    return {
        name: LoraModule(
            weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"], recipe.lora_alpha
        )
        for name in layers
    }


def _bare(layer: BankLayer) -> nn.Module:
    """Of the layer's shapes, not initialised: memory that is never touched, and no random number drawn."""
    assert isinstance(layer, nn.Linear)
    shape = (layer.in_features, layer.out_features)
    return skip_init(nn.Linear, *shape, bias=False)  # type: ignore[no-untyped-call,no-any-return]


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """`root.NAME = module`, with plain modules for the parts of the name that are missing."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
