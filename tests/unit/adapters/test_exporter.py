"""Files that others load: names, alphas, headers; and back into the same canonical form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule
from atelier_server.adapters.exporter import Layout, write_adapter
from atelier_server.adapters.importer import Base, import_file
from atelier_server.errors import UnsupportedFormat
from tests.unit.adapters.small import ATTN, SD1, SDXL, adapters
from tests.unit.adapters.test_stored import assert_equal

LAYOUTS = ("diffusers", "peft", "kohya")


def round_trip(adapter: CanonicalAdapter, base: Base, layout: Layout, folder: Path) -> CanonicalAdapter:
    write_adapter(adapter, folder / "x.safetensors", layout, None, base.names)
    read, report = import_file(folder / "x.safetensors", base)
    assert report.coverage == 1.0
    assert (report.format, report.software) == (layout, "Atelier" if adapter.triggers else report.software)
    return read


def same(read: CanonicalAdapter, written: CanonicalAdapter) -> None:
    """But for `source`, which holds what the header says."""
    assert_equal(CanonicalAdapter(read.modules, read.tokens, read.triggers, {}, read.family), written)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), base=st.sampled_from([SD1, SDXL]), layout=st.sampled_from(LAYOUTS))
def test_every_layout_gives_the_same_canonical_form_back(
    data: st.DataObject, base: Base, layout: Layout, tmp_path_factory: pytest.TempPathFactory
) -> None:
    adapter = data.draw(adapters(base, everything=layout == "kohya"))
    same(round_trip(adapter, base, layout, tmp_path_factory.getbasetemp()), adapter)


@settings(deadline=None, max_examples=20)
@given(data=st.data(), base=st.sampled_from([SD1, SDXL]), layout=st.sampled_from(LAYOUTS))
def test_equal_adapters_give_equal_bytes(
    data: st.DataObject, base: Base, layout: Layout, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    adapter = data.draw(adapters(base, everything=layout == "kohya"))
    backwards = CanonicalAdapter(
        dict(reversed(adapter.modules.items())),
        dict(reversed(adapter.tokens.items())),
        adapter.triggers,
        {},
        adapter.family,
    )
    metadata = {"a": "1", "b": "é\n", "c": '"3"'}
    write_adapter(adapter, folder / "x", layout, metadata, base.names)
    write_adapter(backwards, folder / "y", layout, dict(reversed(metadata.items())), base.names)
    assert (folder / "x").read_bytes() == (folder / "y").read_bytes()
    with safe_open(folder / "x", framework="pt") as file:
        assert file.metadata().items() >= metadata.items()


def lora(base: Base, name: str, alpha: float = 3.0, **more: torch.Tensor) -> dict[str, LoraModule]:
    out, *features = base.shapes[name]
    return {
        name: LoraModule(
            torch.ones(2, *features), torch.ones(out, 2, *(1,) * len(features[1:])), alpha, **more
        )
    }


Q, FC1 = f"unet.{ATTN}.attn1.to_q", "text_encoder.encoder.layers.0.mlp.fc1"
FLAT = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
FC2 = "text_encoder_2.text_model.encoder.layers.0.mlp.fc2"


def keys_of(path: Path) -> set[str]:
    return {key.partition(".lora")[0] for key in safetensors.torch.load_file(path) if ".lora" in key}


def test_names_are_those_of_the_other_tools(tmp_path: Path) -> None:
    small = CanonicalAdapter(lora(SD1, Q) | lora(SD1, FC1), family="sd1")
    large = CanonicalAdapter(lora(SDXL, Q) | lora(SDXL, FC1) | lora(SDXL, FC2), family="sdxl")
    te, te2 = "text_model_encoder_layers_0_mlp_fc1", "text_model_encoder_layers_0_mlp_fc2"
    expected: list[tuple[CanonicalAdapter, Base, Layout, set[str]]] = [
        (small, SD1, "kohya", {f"lora_unet_{FLAT}", f"lora_te_{te}"}),
        (
            large,
            SDXL,
            "kohya",
            {
                "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
                f"lora_te1_{te}",
                f"lora_te2_{te2}",
            },
        ),
        (large, SDXL, "diffusers", {Q, "text_encoder.text_model.encoder.layers.0.mlp.fc1", FC2}),
        (
            small,
            SD1,
            "peft",
            {
                f"base_model.model.{ATTN}.attn1.to_q",
                "base_model.model.text_encoder.text_model.encoder.layers.0.mlp.fc1",
            },
        ),
    ]
    for adapter, base, layout, names in expected:
        write_adapter(adapter, tmp_path / "x", layout, None, base.names)
        assert keys_of(tmp_path / "x") == names


def test_alphas_are_the_true_ones(tmp_path: Path) -> None:
    adapter = CanonicalAdapter(lora(SD1, Q, 0.1) | lora(SD1, FC1, 7.0), family="sd1")
    write_adapter(adapter, tmp_path / "x", "kohya")
    weights = safetensors.torch.load_file(tmp_path / "x")
    assert weights[f"lora_unet_{FLAT}.alpha"].item() == 0.1  # float32 does not hold it
    assert weights["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"].dtype == torch.float32
    write_adapter(adapter, tmp_path / "y", "diffusers")
    with safe_open(tmp_path / "y", framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (config["unet.lora_alpha"], config["text_encoder.lora_alpha"]) == (0.1, 7)
    assert config["text_encoder.target_modules"] == ["encoder.layers.0.mlp.fc1"]


def test_the_header_says_what_it_is(tmp_path: Path) -> None:
    adapter = CanonicalAdapter(lora(SDXL, Q, 8.0), {}, ("a zwx rocket",), {"ss_steps": "40"}, "sdxl")
    write_adapter(adapter, tmp_path / "x", "kohya", {"atelier.recipe": "{}"}, SDXL.names)
    with safe_open(tmp_path / "x", framework="pt") as file:
        header = file.metadata()
    told = {
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.trigger_phrase": "a zwx rocket",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_dim": "2",
        "ss_network_alpha": "8.0",
        "ss_steps": "40",
        "atelier.recipe": "{}",
    }
    assert header.items() >= told.items()


def test_what_a_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    conv, magnitude = "unet.conv_in", torch.ones(8)
    refused: list[tuple[CanonicalAdapter, str]] = [
        (CanonicalAdapter({conv: DenseModule(torch.ones(SD1.shapes[conv]))}), "full difference"),
        (CanonicalAdapter(lora(SD1, conv, bias=torch.ones(8))), "full difference"),
        (CanonicalAdapter(lora(SD1, conv, magnitude=magnitude) | lora(SD1, Q)), "some are not"),
        (CanonicalAdapter(lora(SD1, Q, magnitude=torch.ones(1, 8))), "over inputs"),
        (CanonicalAdapter({}, {"<x>": {"text_encoder": torch.ones(1, 6)}}), "learned token alone"),
    ]
    for adapter, named in refused:
        for layout in ("diffusers", "peft"):
            with pytest.raises(UnsupportedFormat, match=named):
                write_adapter(adapter, tmp_path / "x", layout)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedFormat, match="0 learned tokens"):
        write_adapter(CanonicalAdapter(lora(SD1, Q)), tmp_path / "x", "textual-inversion")
    with pytest.raises(UnsupportedFormat, match=", ".join(get_args(Layout))):
        write_adapter(CanonicalAdapter(lora(SD1, Q)), tmp_path / "x", "pickle")  # type: ignore[arg-type]


@pytest.mark.parametrize("base", [SD1, SDXL], ids=["sd1", "sdxl"])
def test_a_learned_token_alone(base: Base, tmp_path: Path) -> None:
    vectors = {encoder: torch.randn(3, width) for encoder, width in base.widths.items()}
    adapter = CanonicalAdapter({}, {"<sks>": vectors}, (), {}, base.family)
    write_adapter(adapter, tmp_path / "x", "textual-inversion")
    expected = {"<sks>"} if base is SD1 else {"clip_l", "clip_g"}
    assert safetensors.torch.load_file(tmp_path / "x").keys() == expected
    read, report = import_file(tmp_path / "x", base)
    same(read, adapter)
    assert report.format == "textual-inversion"
