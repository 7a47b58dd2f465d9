"""Text encoders and VAE that rest in CPU memory: the same pictures, with less of the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.diffusion.base import load_base

pytestmark = pytest.mark.gpu


def test_what_rests_comes_to_the_device_and_goes_again() -> None:
    plain = load_base("pocket", "cuda")
    base = load_base("pocket", "cuda", offload=("text_encoders", "vae"))
    assert {str(p.device) for p in base.vae.parameters()} == {"cpu"}
    assert all(p.is_pinned() for p in base.modules["text_encoder"].parameters())
    assert base.device.type == "cuda"
    before = torch.cuda.memory_allocated()
    latents, expected = (one.encode_image(torch.zeros(3, 64, 64))[0] for one in (base, plain))
    assert torch.equal(latents, expected)
    assert torch.equal(base.decode_latents(latents), plain.decode_latents(expected))
    text = base.encode_prompt("a red cat")
    assert text.states.device.type == "cuda"
    assert torch.equal(text.states, plain.encode_prompt("a red cat").states)
    assert {str(p.device) for p in base.vae.parameters()} == {"cpu"}
    del latents, expected, text
    assert torch.cuda.memory_allocated() - before < 2**22


def test_the_bank_of_a_text_encoder_is_on_the_device() -> None:
    base = load_base("pocket", "cuda", offload=("text_encoders",))
    bank = SlotBank(slots=1, max_rank=4)
    bank.wrap(base.modules["text_encoder"], "text_encoder")
    encoder: Any = base.modules["text_encoder"]
    tokens = {"<s>": {"text_encoder": torch.zeros(1, encoder.config.hidden_size)}}
    with base.at_work("text_encoder"):
        bank.load(1, CanonicalAdapter({}, tokens=tokens))
    words = bank.words([(1, 1.0)])
    assert words.vectors["text_encoder"].device.type == "cuda"
    with bank.use(None, words):
        assert base.encode_prompt("a <s>", words=words.ids).states.device.type == "cuda"
