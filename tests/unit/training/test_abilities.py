"""What a base can be taught depends on how it lies in memory."""

from __future__ import annotations

import pytest

from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.offload import Offloaded
from atelier_server.training import abilities


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    monkeypatch.setattr(abilities, "METHODS", ("lora", "dreambooth", "textual_inversion", "pivotal"))
    monkeypatch.setattr(abilities, "UNHEEDED", ())
    return load_base("pocket", "cpu")


def test_a_quantized_base_learns_on_top_of_its_weights(base: BaseModel) -> None:
    base.quantization = "int8"
    assert abilities.abilities(base).methods == ("lora", "textual_inversion", "pivotal")


def test_text_encoders_at_rest_learn_nothing(base: BaseModel) -> None:
    module = base.modules["text_encoder"]
    base.offloaded = {"text_encoder": Offloaded(module, fetch=lambda tensor: tensor, settle=lambda: None)}
    can = abilities.abilities(base)
    assert can.methods == ("lora", "dreambooth")
    assert can.unheeded == ("train_text_encoder",)


def test_an_inpainting_base_is_not_taught(base: BaseModel) -> None:
    base.inpainting = True
    assert abilities.abilities(base).methods == ()
