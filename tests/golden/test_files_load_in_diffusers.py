"""Files that we write, loaded by diffusers; files that diffusers misreads, read right by us."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.exporter import Layout, write_adapter
from atelier_server.adapters.importer import Base, import_file
from tests.bases import FAMILIES, pipeline_of
from tests.foreign import changes_for, kohya
from tests.unit.adapters.merged import merged_weight

Only = Callable[[str], bool]
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


def components(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: module for name in names if (module := getattr(pipeline, name, None)) is not None}


@cache
def base(family: str) -> Base:
    return Base.of(family, components(pipeline_of(family)), max_rank=8, is_word=lambda word: False)


def adapter_for(family: str, *, mixed: bool, only: Only = lambda name: True) -> CanonicalAdapter:
    changes = changes_for(components(pipeline_of(family)), mixed=mixed)
    return CanonicalAdapter({name: module for name, module in changes.items() if only(name)}, family=family)


def change_of(module: LoraModule) -> Tensor:
    delta = module.alpha / module.rank * module.B.flatten(1) @ module.A.flatten(1)
    return delta.reshape(module.B.shape[0], *module.A.shape[1:])


def fused(family: str, path: Path) -> Iterator[tuple[str, Tensor]]:
    """By module, how diffusers changes the weights when it loads the file and fuses it."""
    plain, pipeline = components(pipeline_of(family)), pipeline_of(family)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="subject")
    pipeline.fuse_lora(components=list(plain))
    pipeline.unload_lora_weights()
    for component, after in components(pipeline).items():
        before = plain[component].state_dict()
        for name, weight in after.state_dict().items():
            yield f"{component}.{name}", weight - before[name]


def misread(family: str, path: Path, expected: Mapping[str, LoraModule]) -> set[str]:
    """The modules to which diffusers does not do what alpha/r B A says."""
    wrong = set()
    for name, change in fused(family, path):
        module = expected.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        truth = change_of(module) if module is not None else torch.zeros_like(change)
        if (change - truth).abs().max() > 1e-5:
            wrong.add(name.removesuffix(".weight"))
    return wrong


def is_attention(name: str) -> bool:
    return name.startswith("unet.") and name.endswith(ATTENTION)


def in_unet(name: str) -> bool:
    return name.startswith("unet.") and "add_embedding" not in name and "time_embedding" not in name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("layout", "mixed", "only"),
    [
        # With the configuration in the header everything is right, mixed alphas of text encoders too.
        ("diffusers", True, lambda name: True),
        ("kohya", False, lambda name: not name.startswith("unet.") or is_attention(name)),
        ("kohya", False, in_unet),
    ],
    ids=["diffusers-mixed", "kohya-attention-text", "kohya-convolutions"],
)
def test_load_lora_weights_makes_the_same_change(
    family: str, layout: Layout, mixed: bool, only: Only, tmp_path: Path
) -> None:
    adapter = adapter_for(family, mixed=mixed, only=only)
    write_adapter(adapter, tmp_path / "x.safetensors", layout, None, base(family).names)
    assert misread(family, tmp_path / "x.safetensors", adapter.low_rank) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_write(family: str, tmp_path: Path) -> None:
    """`set_peft_model_state_dict` after the configuration of the header was injected."""
    adapter = adapter_for(family, mixed=True, only=lambda name: name.startswith("unet."))
    write_adapter(adapter, tmp_path / "adapter_model.safetensors", "peft")
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    config = PeftConfig.from_peft_type(peft_type="LORA", **header)
    unet = pipeline_of(family).unet
    inject_adapter_in_model(config, unet)
    bare = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    result = set_peft_model_state_dict(unet, bare)
    assert not result.unexpected_keys
    for name, module in adapter.low_rank.items():
        layer: Any = unet.get_submodule(name.removeprefix("unet."))
        assert layer.scaling["default"] == pytest.approx(module.alpha / module.rank)
        assert torch.equal(layer.lora_A["default"].weight, module.A)
    assert get_peft_model_state_dict(unet).keys() == bare.keys()


def test_what_diffusers_saves_is_read(tmp_path: Path) -> None:
    pipeline = pipeline_of("sd1")
    adapter = adapter_for("sd1", mixed=True, only=is_attention)
    write_adapter(adapter, tmp_path / "x.safetensors")
    pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="subject")
    pipeline.unet.save_lora_adapter(str(tmp_path), adapter_name="subject", weight_name="y.safetensors")
    read, _ = import_file(tmp_path / "y.safetensors", base("sd1"))
    assert read.modules.keys() == adapter.modules.keys()
    for name, module in adapter.low_rank.items():
        assert torch.equal(read.low_rank[name].A, module.A)
        assert torch.equal(read.low_rank[name].B, module.B)
        assert read.low_rank[name].alpha == module.alpha


# ---------------------------------------- where diffusers 0.42 is wrong about kohya files
def in_text_encoder(*ends: str) -> Only:
    return lambda name: name.startswith("text_encoder.") and name.endswith(ends)


# PEFT says so in a warning: nobody who loads a file sees more of it.
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize(
    ("only", "mixed", "how"),
    [
        (is_attention, True, "alphas that differ within attention fall back to the commonest"),
        (in_text_encoder(".q_proj", ".v_proj", ".out_proj", ".fc1"), True, "likewise in a text encoder"),
        (in_text_encoder(".q_proj", ".v_proj", ".fc1"), False, "without out_proj its attention is dropped"),
    ],
    ids=["mixed-attention", "mixed-text-encoder", "no-out-proj"],
)
def test_what_diffusers_misreads_we_read(only: Only, mixed: bool, how: str, tmp_path: Path) -> None:
    adapter = adapter_for("sd1", mixed=mixed, only=only)
    path = kohya(adapter.low_rank, tmp_path / "x.safetensors")
    assert misread("sd1", path, adapter.low_rank), f"diffusers has learned: {how}; this test can go"
    read, report = import_file(path, base("sd1"))
    assert report.coverage == 1.0
    for name, module in adapter.low_rank.items():
        assert torch.equal(change_of(read.low_rank[name]), change_of(module))


def test_a_text_encoder_of_q_and_v_alone_is_refused_by_diffusers_and_read_by_us(tmp_path: Path) -> None:
    adapter = adapter_for("sd1", mixed=False, only=in_text_encoder(".q_proj", ".v_proj"))
    path = kohya(adapter.low_rank, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
        pipeline_of("sd1").load_lora_weights(str(tmp_path), weight_name=path.name)
    assert import_file(path, base("sd1"))[0].modules.keys() == adapter.modules.keys()


def test_dora_is_loaded_as_dora(tmp_path: Path) -> None:
    """Magnitudes of outputs, in the layout that diffusers and PEFT have for them."""
    plain = components(pipeline_of("sd1"))["unet"]
    modules = {}
    for name, module in adapter_for("sd1", mixed=True, only=is_attention).low_rank.items():
        weight = plain.get_submodule(name.removeprefix("unet.")).weight
        assert isinstance(weight, Tensor)
        magnitude = weight.detach().norm(dim=1) * torch.linspace(0.5, 1.5, len(weight))
        modules[name] = replace(module, magnitude=magnitude)
    adapter = CanonicalAdapter(modules, family="sd1")
    write_adapter(adapter, tmp_path / "x.safetensors", "diffusers")
    for name, change in fused("sd1", tmp_path / "x.safetensors"):
        if (module := modules.get(name.removesuffix(".weight"))) is not None and name.endswith(".weight"):
            weight = plain.state_dict()[name.removeprefix("unet.")]
            assert (weight + change - merged_weight(weight, module)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_learned_tokens_are_loaded(family: str, tmp_path: Path) -> None:
    pipeline = pipeline_of(family)
    vectors = {name: torch.randn(2, width) for name, width in base(family).widths.items()}
    adapter = CanonicalAdapter({}, {"<sks>": vectors}, family=family)
    write_adapter(adapter, tmp_path / "x.safetensors", "textual-inversion")
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    for encoder, expected in vectors.items():
        model = getattr(pipeline, encoder)
        tokenizer = getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))
        # diffusers takes the pair of SDXL apart by hand, the file of one encoder as it is.
        source: Any = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[encoder]
        source = loaded[source] if family == "sdxl" else str(tmp_path / "x.safetensors")
        pipeline.load_textual_inversion(source, token="<sks>", text_encoder=model, tokenizer=tokenizer)
        ids = tokenizer.convert_tokens_to_ids(["<sks>", "<sks>_1"])
        assert torch.equal(model.get_input_embeddings().weight[ids].detach(), expected)
