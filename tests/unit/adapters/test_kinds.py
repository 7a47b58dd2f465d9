"""Every kind of adapter against the library that defines it, and against its own formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from atelier_server.adapters.canonical import DenseModule, LoraModule
from atelier_server.adapters.kinds import PARTS, convert
from atelier_server.errors import AdapterMismatch, UnsupportedFormat
from tests.unit.adapters.merged import merge, merged_weight

LAYERS = {
    "linear": lambda: nn.Linear(24, 36),
    "conv": lambda: nn.Conv2d(24, 36, 3, padding=1),
    "1x1": lambda: nn.Conv2d(24, 36, 1),
}
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "locon": (LoConModule, {}),
    "locon-cp": (LoConModule, {"use_tucker": True}),
    "loha": (LohaModule, {}),
    "loha-cp": (LohaModule, {"use_tucker": True}),
    "lokr": (LokrModule, {"factor": 4}),
    "lokr-both": (LokrModule, {"factor": 12, "decompose_both": True, "lora_dim": 2}),
    "lokr-cp": (LokrModule, {"factor": 2, "use_tucker": True}),
    "lokr-whole": (LokrModule, {"factor": 4, "full_matrix": True}),
}


def inputs_of(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn((2, 24, 8, 8) if isinstance(layer, nn.Conv2d) else (2, 7, 24), generator=generator)


@torch.no_grad()
def filled(module: nn.Module, seed: int = 1) -> nn.Module:
    """Random weights in place of the zeros that adapters begin with."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "dora_scale" in name or "magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dora", [None, "outputs", "inputs"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_kind", LAYERS)
def test_forward_equals_lycoris(layer_kind: str, kind: str, dora: str | None) -> None:
    torch.manual_seed(0)
    layer, plain = LAYERS[layer_kind](), LAYERS[layer_kind]()
    plain.load_state_dict(layer.state_dict())
    cls, options = KINDS[kind]
    options = {"lora_dim": 3, "alpha": 2.0, "bypass_mode": False, **options}
    if dora:
        options |= {"weight_decompose": True, "wd_on_out": dora == "outputs"}
    theirs = filled(cls("x", layer, **options))
    parts = theirs.custom_state_dict() if hasattr(theirs, "custom_state_dict") else theirs.state_dict()
    module = convert("x", parts, tuple(layer.weight.shape), max_rank=64)
    with torch.no_grad():
        expected = theirs(inputs_of(layer))
        merge(plain, [(module, 1.0)])
        assert relative(plain(inputs_of(layer)), expected) < 1e-5
    assert (module.magnitude is not None) == bool(dora)


@pytest.mark.parametrize("layer_kind", LAYERS)
def test_a_full_difference_with_its_bias_equals_lycoris(layer_kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[layer_kind]()
    theirs = filled(FullModule("x", layer))
    weight, bias = theirs.weight.detach().clone(), theirs.bias.detach().clone()
    module = convert("x", {"diff": weight, "diff_b": bias}, tuple(layer.weight.shape), max_rank=8)
    with torch.no_grad():
        expected = theirs(inputs_of(layer))
        merge(layer, [(module, 1.0)])
        assert relative(layer(inputs_of(layer)), expected) < 1e-5
    assert isinstance(module, DenseModule)


@pytest.mark.parametrize("norm", [nn.LayerNorm(24), nn.GroupNorm(4, 24)])
def test_a_norm_equals_lycoris(norm: nn.Module) -> None:
    theirs = filled(NormModule("x", norm))
    parts = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    assert parts.keys() == {"w_norm", "b_norm"}
    module = convert("x", parts, (24,), max_rank=8)
    x = torch.randn(2, 7, 24) if isinstance(norm, nn.LayerNorm) else torch.randn(2, 24, 4, 4)
    with torch.no_grad():
        expected = theirs(x)
        merge(norm, [(module, 1.0)])
        assert relative(norm(x), expected) < 1e-5


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = LAYERS["linear"]()
        self.conv = LAYERS["conv"]()


PEFT = {
    "loha": LoHaConfig(r=3, alpha=2, target_modules=["fc", "conv"]),
    "loha-cp": LoHaConfig(r=3, alpha=2, target_modules=["conv"], use_effective_conv2d=True),
    "lokr": LoKrConfig(r=3, alpha=2, target_modules=["fc", "conv"], decompose_factor=4),
    "lokr-both": LoKrConfig(r=2, alpha=3, target_modules=["fc"], decompose_both=True),
    "lokr-cp": LoKrConfig(r=2, alpha=3, target_modules=["conv"], use_effective_conv2d=True),
    "lokr-whole": LoKrConfig(r=32, alpha=8, target_modules=["fc", "conv"]),
    "dora": LoraConfig(r=3, lora_alpha=2, target_modules=["fc", "conv"], use_dora=True),
}


@pytest.mark.parametrize("kind", PEFT)
def test_forward_equals_peft(kind: str) -> None:
    """PEFT's scale is always alpha / r of its config, also where LyCORIS has none."""
    torch.manual_seed(0)
    plain, config = Two(), PEFT[kind]
    theirs = Two()
    theirs.load_state_dict(plain.state_dict())
    adapted = get_peft_model(theirs, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            filled(nn.ParameterDict({name.replace(".", "-"): parameter}))
    state = get_peft_model_state_dict(adapted)
    names = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    scale = (config.lora_alpha if kind == "dora" else config.alpha) / config.r
    for layer_name in config.target_modules:
        prefix = f"base_model.model.{layer_name}."
        parts = {
            names.get(key.removeprefix(prefix), key.removeprefix(prefix)): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        if "lora_magnitude_vector" in parts:
            parts["magnitude"] = parts.pop("lora_magnitude_vector")
        layer = plain.get_submodule(layer_name)
        module = convert(layer_name, parts, tuple(layer.weight.shape), max_rank=64, scale=scale)
        with torch.no_grad():
            expected = adapted.get_submodule(f"base_model.model.{layer_name}")(inputs_of(layer))
            merge(layer, [(module, 1.0)])
            assert relative(layer(inputs_of(layer)), expected) < 1e-5


# ------------------------------------------------------------------------------- low rank where there is one
shapes = st.sampled_from([(36, 24), (16, 64), (12, 8, 3, 3)])


@settings(max_examples=30, deadline=None)
@given(shape=shapes, r1=st.integers(1, 3), r2=st.integers(1, 3), seed=st.integers(0, 1000))
def test_loha_is_a_low_rank_of_the_ranks_product(shape: tuple[int, ...], r1: int, r2: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    out, features = shape[0], torch.Size(shape[1:]).numel()
    parts = {
        "hada_w1_a": torch.randn(out, r1, generator=generator),
        "hada_w1_b": torch.randn(r1, features, generator=generator),
        "hada_w2_a": torch.randn(out, r2, generator=generator),
        "hada_w2_b": torch.randn(r2, features, generator=generator),
        "alpha": torch.tensor(0.5),
    }
    expected = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    expected = (0.5 / r1 * expected).reshape(shape)
    for limit in (64, 1):
        module = convert("x", parts, shape, max_rank=limit)
        rank = r1 * r2
        fits = rank <= limit and rank * (out + features) < out * features
        assert isinstance(module, LoraModule if fits else DenseModule)
        assert not isinstance(module, LoraModule) or module.rank == rank
        assert relative(merged_weight(torch.zeros(shape), module), expected.double()) < 1e-6


def test_plain_lora_keeps_its_very_tensors_and_its_alpha() -> None:
    up, down = torch.randn(36, 4).half(), torch.randn(4, 24).half()
    parts = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(0.1)}
    module = convert("x", parts, (36, 24), max_rank=2)  # ranks above the limit are the bank's to refuse
    assert isinstance(module, LoraModule)
    assert (module.A is down, module.B is up) == (True, True)
    assert module.alpha == parts["alpha"].item()
    del parts["alpha"]
    assert convert("x", parts, (36, 24), max_rank=8).alpha == 4.0  # type: ignore[union-attr]


def test_the_bias_beside_low_rank_weights_is_kept() -> None:
    parts = {"lora_up.weight": torch.ones(36, 1), "lora_down.weight": torch.ones(1, 24)}
    module = convert("x", {**parts, "diff_b": torch.arange(36.0)}, (36, 24), max_rank=2)
    assert torch.equal(module.bias, torch.arange(36.0))  # type: ignore[arg-type]
    alone = convert("x", {"diff_b": torch.arange(36.0)}, (36, 24), max_rank=2)
    assert isinstance(alone, DenseModule)
    assert alone.weight is None


# ---------------------------------------------------------------------------------------------- bad input
GOOD = {
    "hada_w1_a": torch.ones(36, 2),
    "hada_w1_b": torch.ones(2, 24),
    "hada_w2_a": torch.ones(36, 2),
    "hada_w2_b": torch.ones(2, 24),
}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({**GOOD, "lora_up.weight": torch.ones(36, 2)}, "LoRA and LoHa at once"),
        ({k: v for k, v in GOOD.items() if k != "hada_w2_b"}, "lacks its hada_w2_b"),
        ({"lora_up.weight": torch.ones(36, 2)}, "lacks its lora_down.weight"),
        ({"lokr_w1": torch.ones(6, 4)}, "lacks its lokr_w2_a"),
        ({**GOOD, "oft_blocks": torch.ones(1)}, "oft_blocks, which is not known"),
        ({"alpha": torch.ones(())}, "no weights beside alpha"),
        ({**GOOD, "alpha": torch.ones(2)}, "not one finite number"),
        ({**GOOD, "alpha": torch.tensor(float("nan"))}, "not one finite number"),
        ({"w_norm": torch.ones(36), "alpha": torch.ones(())}, "a norm with alpha"),
        ({}, "no weights"),
    ],
)
def test_what_cannot_be_understood_is_named(parts: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UnsupportedFormat, match=message):
        convert("x", parts, (36, 24), max_rank=8)


@settings(max_examples=80, deadline=None)
@given(
    names=st.sets(st.sampled_from(sorted(PARTS)), min_size=1),
    dims=st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 6, 24, 36]), max_size=4), min_size=16, max_size=16),
    shape=st.sampled_from([(36, 24), (36, 24, 3, 3), (24,)]),
)
def test_any_shapes_give_a_module_that_fits_or_a_refusal(
    names: set[str], dims: list[list[int]], shape: tuple[int, ...]
) -> None:
    parts = {name: torch.zeros(size) for name, size in zip(sorted(names), dims, strict=False)}
    try:
        module = convert("unet.x", parts, shape, max_rank=8)
    except (UnsupportedFormat, AdapterMismatch) as refusal:
        message = refusal.message
    else:
        merged_weight(torch.ones(shape), module)
        message = "unet.x"
    assert "unet.x" in message
