"""Files of every tool, imported: the same forward as with W + alpha/r B A written into the weights.

Three tiny bases; rank and alpha one for all or every module's own; with and without text encoders.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import LoraModule
from atelier_server.adapters.importer import Base, import_file
from tests.bases import FAMILIES, pipeline_of
from tests.foreign import EVERY_FORMAT, changes_for

ROWS = 2


@dataclass(frozen=True, eq=False)
class Studio:
    """A base, plain and inside a bank."""

    plain: Mapping[str, nn.Module]
    wrapped: Mapping[str, nn.Module]
    bank: SlotBank
    base: Base


@cache
def studio(family: str) -> Studio:
    torch.manual_seed(0)
    pipeline = pipeline_of(family)
    plain = {
        name: getattr(pipeline, name).eval().requires_grad_(False)
        for name in ("unet", "text_encoder", "text_encoder_2")
        if getattr(pipeline, name, None) is not None
    }
    wrapped = copy.deepcopy(plain)
    bank = SlotBank(slots=2, max_rank=8)
    for name, module in wrapped.items():
        bank.wrap(module, name)
    base = Base.of(family, wrapped, max_rank=8, is_word=lambda word: word == "dog")
    return Studio(plain, wrapped, bank, base)


def forward(components: Mapping[str, nn.Module], name: str) -> Tensor:
    """The output of one component for fixed inputs of ROWS rows."""
    generator = torch.Generator().manual_seed(1)
    root = components[name]
    if name != "unet":
        ids = torch.randint(1, 300, (ROWS, 77), generator=generator)
        return root(ids).last_hidden_state
    config = root.config
    latents = torch.randn(ROWS, 4, 8, 8, generator=generator)
    prompts = torch.randn(ROWS, 77, config.cross_attention_dim, generator=generator)
    extra = {}
    if config.addition_embed_type == "text_time":
        extra = {"text_embeds": torch.randn(ROWS, 40, generator=generator), "time_ids": torch.ones(ROWS, 6)}
    return root(latents, torch.tensor([10.0, 700.0]), prompts, added_cond_kwargs=extra).sample


@cache
def changes(family: str, mixed: bool, text_encoders: bool) -> Mapping[str, LoraModule]:
    components = studio(family).plain
    return changes_for({n: m for n, m in components.items() if n == "unet" or text_encoders}, mixed=mixed)


@cache
def merged(family: str, mixed: bool) -> Mapping[str, Tensor]:
    """The slow and obvious path: the outputs of a copy whose weights were changed."""
    components = copy.deepcopy(studio(family).plain)
    for name, module in changes(family, mixed, True).items():
        component, _, bare = name.partition(".")
        weight = components[component].get_submodule(bare).weight
        delta = module.alpha / module.rank * module.B.flatten(1) @ module.A.flatten(1)
        weight.data += delta.reshape(weight.shape)
    with torch.no_grad():
        return {name: forward(components, name) for name in components}


CASES = [(tool, mixed, True) for tool in EVERY_FORMAT for mixed in (False, True)]
CASES += [(tool, True, False) for tool in ("kohya", "diffusers", "peft")]


@pytest.mark.parametrize(("tool", "mixed", "text_encoders"), CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_is_that_of_merged_weights(
    family: str, tool: str, mixed: bool, text_encoders: bool, tmp_path: Path
) -> None:
    place, written = studio(family), changes(family, mixed, text_encoders)
    adapter, report = import_file(EVERY_FORMAT[tool](written, tmp_path / "x.safetensors"), place.base)
    assert set(report.matched) == set(written)
    assert report.coverage == report.confidence == 1.0
    if tool != "ai-toolkit-peft":
        assert {n: m.alpha for n, m in adapter.low_rank.items()} == {n: m.alpha for n, m in written.items()}
    place.bank.load(1, adapter)
    for name in place.plain:
        if name != "unet" and not text_encoders:
            continue
        rows = place.bank.gather([[(1, 1.0)]] * ROWS, (name,))
        with torch.no_grad(), place.bank.use(rows):
            ours = forward(place.wrapped, name)
        theirs = merged(family, mixed)[name]
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
        assert (
            theirs - forward(place.plain, name)
        ).norm() / theirs.norm() > 1e-2  # there was something to do
