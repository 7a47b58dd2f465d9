"""LoRA files of three layouts, and files that are none."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.format import (
    METADATA_KEY,
    Layout,
    read_adapter,
    write_adapter,
)
from atelier_server.errors import AdapterMismatch, UnsupportedFormat

NAMES = (
    "unet.conv_in",
    "unet.down_blocks.0.attentions.0.proj_in",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
)
ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYOUTS = get_args(Layout)


def adapter(seed: int = 0, dtype: torch.dtype = torch.float32) -> CanonicalAdapter:
    """A rank and an alpha of its own for every layer."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for number, name in enumerate(NAMES):
        rank, kernel = 2 + number, (3, 3) if name == "unet.conv_in" else ()
        A = torch.randn(rank, 4, *kernel, generator=generator).to(dtype)
        B = torch.randn(6, rank, *((1, 1) if kernel else ()), generator=generator).to(dtype)
        modules[name] = LoraModule(A, B, 1.5 * number + 0.1)
    return CanonicalAdapter(modules)


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def pair(rank: int = 2) -> tuple[Tensor, Tensor]:
    return torch.ones(rank, 4), torch.ones(6, rank)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_layout_keeps_tensors_and_alphas(layout: Layout, dtype: torch.dtype, tmp_path: Path) -> None:
    written = adapter(dtype=dtype)
    write_adapter(written, tmp_path / "x.safetensors", layout, {"trigger": "sks"})
    read, detected = read_adapter(tmp_path / "x.safetensors", NAMES)
    assert detected == layout
    assert read.low_rank.keys() == written.low_rank.keys()
    for name, module in written.low_rank.items():
        assert torch.equal(read.low_rank[name].A, module.A)
        assert torch.equal(read.low_rank[name].B, module.B)
        assert read.low_rank[name].A.dtype == dtype
        assert read.low_rank[name].alpha == pytest.approx(module.alpha, rel=1e-6)  # kohya's is a float32
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata()["trigger"] == "sks"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_adapters_give_equal_bytes_whatever_the_order_of_their_layers(
    layout: Layout, tmp_path: Path
) -> None:
    metadata = {"a": "1", "b": "2", "c": "3"}
    write_adapter(adapter(), tmp_path / "x", layout, metadata)
    backwards = CanonicalAdapter(dict(reversed(adapter().low_rank.items())))
    write_adapter(backwards, tmp_path / "y", layout, dict(reversed(metadata.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_the_layouts_name_their_tensors_as_other_tools_do(tmp_path: Path) -> None:
    expected = {
        "diffusers": {f"unet.{ATTN}.to_out.0.lora_A.weight", "unet.conv_in.lora_B.weight"},
        "peft": {f"base_model.model.{ATTN}.to_out.0.lora_A.weight", "base_model.model.conv_in.lora_B.weight"},
        "kohya": {
            f"lora_unet_{ATTN.replace('.', '_')}_to_out_0.lora_down.weight",
            "lora_unet_conv_in.lora_up.weight",
            "lora_unet_conv_in.alpha",
        },
    }
    for layout in LAYOUTS:
        write_adapter(adapter(), tmp_path / layout, layout)
        assert expected[layout] <= safetensors.torch.load_file(tmp_path / layout).keys()
    with pytest.raises(UnsupportedFormat):
        write_adapter(adapter(), tmp_path / "x", "pickle")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names",
    [
        (f"unet.{ATTN}.processor.to_q_lora.down.weight", f"unet.{ATTN}.processor.to_q_lora.up.weight"),
        (f"unet.{ATTN}.to_q.lora.down.weight", f"unet.{ATTN}.to_q.lora.up.weight"),
        (f"{ATTN}.to_q.lora_A.weight", f"{ATTN}.to_q.lora_B.weight"),
        (f"{ATTN}.to_q.lora_A.default.weight", f"{ATTN}.to_q.lora_B.default.weight"),
        (
            f"base_model.model.unet.{ATTN}.to_q.lora_A.weight",
            f"base_model.model.unet.{ATTN}.to_q.lora_B.weight",
        ),
    ],
)
def test_older_and_neighbouring_names_are_read(names: tuple[str, str], tmp_path: Path) -> None:
    path = save(tmp_path / "x", dict(zip(names, pair(), strict=True)))
    read, _ = read_adapter(path, NAMES)
    assert list(read.low_rank) == [f"unet.{ATTN}.to_q"]
    assert read.low_rank[f"unet.{ATTN}.to_q"].alpha == 2.0  # none given: the rank


def test_the_old_name_of_the_output_projection_is_read(tmp_path: Path) -> None:
    names = (f"unet.{ATTN}.processor.to_out_lora.down.weight", f"unet.{ATTN}.processor.to_out_lora.up.weight")
    read, _ = read_adapter(save(tmp_path / "x", dict(zip(names, pair(), strict=True))), NAMES)
    assert list(read.low_rank) == [f"unet.{ATTN}.to_out.0"]


def test_alphas_of_the_header_follow_peft(tmp_path: Path) -> None:
    tensors = {}
    for projection in ("to_q", "to_out.0"):
        A, B = pair()
        tensors |= {
            f"unet.{ATTN}.{projection}.lora_A.weight": A,
            f"unet.{ATTN}.{projection}.lora_B.weight": B,
        }
    config = {"unet.lora_alpha": 8, "unet.r": 2, "unet.alpha_pattern": {"to_out.0": 3}}
    path = save(tmp_path / "x", tensors, {METADATA_KEY: json.dumps(config)})
    modules = read_adapter(path, NAMES)[0].low_rank
    assert [modules[f"unet.{ATTN}.{p}"].alpha for p in ("to_q", "to_out.0")] == [8, 3]
    config["unet.use_rslora"] = True
    path = save(tmp_path / "y", tensors, {METADATA_KEY: json.dumps(config)})
    assert read_adapter(path, NAMES)[0].low_rank[f"unet.{ATTN}.to_q"].alpha == pytest.approx(8 * 2**0.5)


Q = f"unet.{ATTN}.to_q"


@pytest.mark.parametrize(
    ("tensors", "error", "named"),
    [
        ({}, UnsupportedFormat, "no tensors"),
        ({"model.diffusion_model.x.weight": torch.ones(2, 2)}, UnsupportedFormat, "model.diffusion_model.x"),
        ({"text_encoder.a.lora_A.weight": torch.ones(2, 2)}, UnsupportedFormat, "text encoder"),
        ({"lora_te_text_model_a.lora_down.weight": torch.ones(2, 2)}, UnsupportedFormat, "not supported yet"),
        ({"unet.nothing.lora_A.weight": torch.ones(2, 2)}, AdapterMismatch, "unet.nothing.lora_A.weight"),
        ({"lora_unet_nothing.lora_up.weight": torch.ones(2, 2)}, AdapterMismatch, "lora_unet_nothing"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 4)}, UnsupportedFormat, "lacks its B"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(4)}, UnsupportedFormat, "magnitude"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 4, dtype=torch.int64)}, UnsupportedFormat, "lora_A"),
        (
            {f"{Q}.lora_A.weight": torch.ones(2, 4), f"{Q}.lora_B.weight": torch.ones(6, 3)},
            UnsupportedFormat,
            r"\(6, 3\)",
        ),
        (
            {f"{Q}.lora_A.weight": torch.full((2, 4), torch.nan), f"{Q}.lora_B.weight": torch.ones(6, 2)},
            AdapterMismatch,
            "not finite",
        ),
        (
            {
                f"{Q}.lora_A.weight": torch.ones(2, 4),
                f"{Q}.lora_B.weight": torch.ones(6, 2),
                f"{Q}.alpha": torch.tensor(float("inf")),
            },
            AdapterMismatch,
            "not finite",
        ),
        (
            {f"{Q}.lora_A.weight": torch.ones(2, 4), f"{Q}.lora.down.weight": torch.ones(2, 4)},
            UnsupportedFormat,
            "repeats",
        ),
    ],
)
def test_what_is_wrong_is_named(
    tensors: dict[str, Tensor], error: type[Exception], named: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=named):
        read_adapter(save(tmp_path / "x", tensors), NAMES)


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(a+)+$": 1}}']
)
def test_a_bad_header_is_refused(config: str, tmp_path: Path) -> None:
    A, B = pair()
    path = save(tmp_path / "x", {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}, {METADATA_KEY: config})
    with pytest.raises(UnsupportedFormat):
        read_adapter(path, NAMES)


class _Explosive:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the pickle was run')",)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(pickle.dumps(_Explosive(), protocol=4))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Explosive()))
    for name in ("raw", "zip"):
        with pytest.raises(UnsupportedFormat, match="pickle"):
            read_adapter(tmp_path / name, NAMES)


def test_truncated_and_lying_files_are_refused(tmp_path: Path) -> None:
    write_adapter(adapter(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    damaged = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "header": whole[:100],
        "long": whole + b"x",
        "huge": struct.pack("<Q", 2**62) + whole[8:],
        "text": b"hello, this is a text file",
        "json": whole.replace(b'"F32"', b'"F99"'),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnsupportedFormat):
            read_adapter(tmp_path / name, NAMES)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnsupportedFormat):
        read_adapter(path, NAMES)
