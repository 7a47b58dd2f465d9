"""The store's own file: everything of the canonical form comes back, bit for bit."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule, Module, tensors_of
from atelier_server.adapters.stored import decode_stored, write_stored
from atelier_server.errors import UnsupportedFormat

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
NAMES = st.sampled_from(
    [
        *(f"unet.down_blocks.{i}.attentions.0.to_q" for i in range(4)),
        "unet.conv_in",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    ]
)
WORDS = st.text(min_size=1, max_size=12)


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randn(shape, generator=generator).to(draw(DTYPES))


@st.composite
def low_rank(draw: st.DrawFn) -> LoraModule:
    rank = draw(st.integers(1, 5))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
    return LoraModule(
        draw(tensors(rank, 4, *kernel)),
        draw(tensors(6, rank, *((1, 1) if kernel else ()))),
        draw(st.floats(-1e3, 1e3)),
        draw(st.none() | tensors(6) | tensors(1, 4)),
        draw(st.none() | tensors(6)),
    )


@st.composite
def dense(draw: st.DrawFn) -> DenseModule:
    weight = draw(st.none() | tensors(6, 4))
    if weight is None:
        return DenseModule(None, draw(tensors(6)))
    return DenseModule(weight, draw(st.none() | tensors(6)), draw(st.none() | tensors(6)))


ADAPTERS = st.builds(
    CanonicalAdapter,
    modules=st.dictionaries(NAMES, low_rank() | dense(), max_size=5),
    tokens=st.dictionaries(
        WORDS,
        st.dictionaries(st.sampled_from(["text_encoder", "text_encoder_2"]), tensors(2, 8), min_size=1),
        max_size=3,
    ),
    triggers=st.lists(WORDS, max_size=3).map(tuple),
    source=st.dictionaries(WORDS, st.text(max_size=20), max_size=3),
    family=st.sampled_from(["", "sd1", "sdxl"]),
)


def fields(module: Module) -> dict[str, tuple[torch.dtype, Tensor]]:
    return {name: (tensor.dtype, tensor) for name, tensor in tensors_of(module)}


def assert_equal(read: CanonicalAdapter, written: CanonicalAdapter) -> None:
    """Tensor for tensor, alpha for alpha."""
    assert read.modules.keys() == written.modules.keys()
    for name, module in written.modules.items():
        other = read.modules[name]
        assert type(other) is type(module)
        if isinstance(module, LoraModule) and isinstance(other, LoraModule):
            assert other.alpha == module.alpha
        ours, theirs = fields(other), fields(module)
        assert ours.keys() == theirs.keys()
        for part, (dtype, tensor) in theirs.items():
            assert ours[part][0] == dtype
            assert torch.equal(ours[part][1], tensor), (name, part)
    assert {p: set(v) for p, v in read.tokens.items()} == {p: set(v) for p, v in written.tokens.items()}
    for placeholder, by_encoder in written.tokens.items():
        for encoder, vectors in by_encoder.items():
            assert torch.equal(read.tokens[placeholder][encoder], vectors)
    assert read.triggers == written.triggers
    assert dict(read.source) == dict(written.source)
    assert read.family == written.family


@settings(deadline=None, max_examples=60)
@given(ADAPTERS)
def test_everything_comes_back(tmp_path_factory: pytest.TempPathFactory, adapter: CanonicalAdapter) -> None:
    folder = tmp_path_factory.getbasetemp()
    write_stored(adapter, folder / "x")
    assert_equal(decode_stored((folder / "x").read_bytes()), adapter)
    backwards = CanonicalAdapter(
        dict(reversed(adapter.modules.items())),
        dict(reversed(adapter.tokens.items())),
        adapter.triggers,
        dict(reversed(adapter.source.items())),
        adapter.family,
    )
    write_stored(backwards, folder / "y")
    assert (folder / "x").read_bytes() == (folder / "y").read_bytes()


def test_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    """diffusers' layout, as the store kept it before there was a canonical file."""
    q, conv = "unet.down_blocks.0.to_q", "unet.conv_in"
    weights = {
        f"{q}.lora_A.weight": torch.randn(2, 4),
        f"{q}.lora_B.weight": torch.randn(6, 2),
        f"{conv}.lora_A.weight": torch.randn(3, 4, 3, 3),
        f"{conv}.lora_B.weight": torch.randn(6, 3, 1, 1),
    }
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 0.3,
        "unet.rank_pattern": {"conv_in": 3},
        "unet.alpha_pattern": {"conv_in": 7.5},
        "unet.target_modules": ["conv_in", "down_blocks.0.to_q"],
    }
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    safetensors.torch.save_file(weights, tmp_path / "x", header)
    read = decode_stored((tmp_path / "x").read_bytes()).low_rank
    assert {name: module.alpha for name, module in read.items()} == {q: 0.3, conv: 7.5}
    for name, module in read.items():
        assert torch.equal(module.A, weights[f"{name}.lora_A.weight"])
        assert torch.equal(module.B, weights[f"{name}.lora_B.weight"])


def test_what_is_no_stored_file_is_refused(tmp_path: Path) -> None:
    write_stored(
        CanonicalAdapter({"unet.x": LoraModule(torch.ones(1, 2), torch.ones(2, 1), 1.0)}), tmp_path / "x"
    )
    whole = (tmp_path / "x").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    damaged = [
        b"",
        whole[:-1],
        whole + b"x",
        struct.pack("<Q", 2**62) + whole[8:],
        whole.replace(b"unet.x.A", b"unet.x.Q"),
        whole.replace(b"alphas", b"alpjas"),
        safetensors.torch.save({"a": torch.ones(1)}),
        safetensors.torch.save({"a": torch.ones(1)}, {"atelier": "[]"}),
        safetensors.torch.save({"unet.x.A": torch.ones(1)}, {"atelier": whole[8 : 8 + size].decode()}),
    ]
    for content in damaged:
        with pytest.raises(UnsupportedFormat):
            decode_stored(content)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(content: bytes) -> None:
    with pytest.raises(UnsupportedFormat):
        decode_stored(content)
