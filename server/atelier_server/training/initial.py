"""The first weights of a training: PEFT's own, whatever it calls them.

Some of PEFT's initialisations (PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775) take the pair out of the
base's weights, so that base and pair together are the base. Here the base stays as it is, and the pair is
taken away from what is learned: W + s B A - s B0 A0. PEFT converts such an adapter to plain LoRA by the same
identity, as [B, -B0] [A; A0] of twice the rank (`LoraModel.subtract_mutated_init`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from torch.nn.utils import skip_init

from atelier_server.adapters.changes import full
from atelier_server.adapters.layers import BankLayer
from atelier_server.adapters.leaves import Pair
from atelier_server.core import Recipe
from atelier_server.errors import InvalidRequest, Violation

# LoftQ quantises the base; EVA, CorDA and LoRA-GA look at data first.
_KNOWN = re.compile(r"gaussian|default|pissa(_niter_\d+)?|olora|orthogonal")
_OUT_OF_THE_BASE = ("pissa", "olora")


def is_out_of_the_base(recipe: Recipe) -> bool:
    """Whether the first pairs are not nothing, and have to be taken away again."""
    return recipe.init_lora_weights.startswith(_OUT_OF_THE_BASE)


def initial_pairs(layers: Mapping[str, BankLayer], recipe: Recipe) -> dict[str, Pair]:
    """What PEFT injects into a model of these layers, in this order, after `torch.manual_seed(seed)`.

    float32 on the CPU; no random number is drawn from anybody's generator. Raises InvalidRequest for an
    initialisation that PEFT has not, or not for these layers.
    """
    if not _KNOWN.fullmatch(recipe.init_lora_weights):
        raise _refused(recipe, "gaussian, default, pissa, pissa_niter_N, olora and orthogonal can be")
    skeleton = nn.Module()
    for name, layer in layers.items():
        _put(skeleton, name, _bare(layer, with_weights=is_out_of_the_base(recipe)))
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        use_rslora=recipe.use_rslora,
        init_lora_weights=_peft_name(recipe.init_lora_weights),
        target_modules=list(layers),
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            inject_adapter_in_model(config, skeleton)
    except ValueError as error:
        raise _refused(recipe, str(error)) from error
    weights = get_peft_model_state_dict(skeleton)
    return {name: (weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]) for name in layers}


def _peft_name(name: str) -> bool | str:
    return True if name == "default" else name


def _refused(recipe: Recipe, why: str) -> InvalidRequest:
    return InvalidRequest.of(
        [Violation("recipe.init_lora_weights", f"{recipe.init_lora_weights!r} cannot be had here: {why}")]
    )


def _bare(layer: BankLayer, *, with_weights: bool) -> nn.Module:
    """A layer of these shapes without a bias, on the CPU.

    Without weights it is not initialised: memory that is never touched, and no random number drawn. With them
    it has a copy, which PEFT changes.
    """
    if isinstance(layer, nn.Conv2d):
        bare: nn.Module = skip_init(  # type: ignore[no-untyped-call]
            nn.Conv2d,
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=False,
        )
    else:
        bare = skip_init(nn.Linear, layer.in_features, layer.out_features, bias=False)  # type: ignore[no-untyped-call]
    if with_weights:
        bare.weight = nn.Parameter(full(layer.weight.detach()).to("cpu", torch.float32, copy=True))
    return bare


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """`root.NAME = module`, with plain modules for the parts of the name that are missing."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
