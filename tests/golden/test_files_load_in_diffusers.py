"""Files that we write, loaded by diffusers: the same change of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from atelier_server import pocket
from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.format import read_adapter, write_adapter
from tests.unit.adapters.tiny import ATTENTION, EVERYTHING, adapter_for


def mixed_alphas(adapter: CanonicalAdapter) -> CanonicalAdapter:
    return CanonicalAdapter(
        {
            name: LoraModule(m.A, m.B, m.alpha if number % 3 else 2.0)
            for number, (name, m) in enumerate(adapter.low_rank.items())
        }
    )


def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(pocket.path(), safety_checker=None)


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_load_lora_weights_makes_the_same_change(
    layout: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    plain, ours = pipeline(), pipeline()
    bank = SlotBank(slots=1, max_rank=8)
    bank.wrap(ours.unet, "unet")
    adapter = adapter_for(bank, rank=4, alpha=6.0, seed=1, targets=targets)
    if layout == "diffusers":  # kohya files with mixed alphas are mis-scaled by diffusers itself
        adapter = mixed_alphas(adapter)
    write_adapter(adapter, tmp_path / "x.safetensors", layout)  # type: ignore[arg-type]
    before = {name: weight.clone() for name, weight in plain.unet.state_dict().items()}
    plain.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="subject")
    plain.fuse_lora()
    plain.unload_lora_weights()
    after = plain.unet.state_dict()
    for name, weight in before.items():
        module = adapter.low_rank.get(f"unet.{name.removesuffix('.weight')}")
        change = after[name] - weight
        if module is None or name.endswith(".bias"):
            assert not change.any()
        else:
            rank = module.A.shape[0]
            delta = module.alpha / rank * module.B.reshape(-1, rank) @ module.A.reshape(rank, -1)
            assert (change - delta.reshape(change.shape)).abs().max() <= 1e-5


def test_what_diffusers_saves_is_read(tmp_path: Path) -> None:
    pipe = pipeline()
    bank = SlotBank(slots=1, max_rank=8)
    wrapped = pipeline()
    bank.wrap(wrapped.unet, "unet")
    adapter = mixed_alphas(adapter_for(bank, rank=4, alpha=6.0, seed=1))
    write_adapter(adapter, tmp_path / "x.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="subject")
    pipe.unet.save_lora_adapter(str(tmp_path), adapter_name="subject", weight_name="y.safetensors")
    read, _ = read_adapter(tmp_path / "y.safetensors", bank.layers)
    assert read.low_rank.keys() == adapter.low_rank.keys()
    for name, module in adapter.low_rank.items():
        assert (read.low_rank[name].A == module.A).all()
        assert (read.low_rank[name].B == module.B).all()
        assert read.low_rank[name].alpha == module.alpha
