"""Files that PEFT and LyCORIS write: imported, the same forward as in the library that wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lycoris import create_lycoris
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.importer import Base, import_file
from atelier_server.report import AdapterReport
from tests.unit.adapters.tiny import Inputs, tiny_unet

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PEFT_CONFIGS: dict[str, tuple[PeftConfig, str]] = {
    "lora": (LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, alpha_pattern={"to_v": 3}), "lora"),
    "rslora": (LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=[*ATTENTION, "conv1"]), "lora"),
    "dora": (LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=ATTENTION), "dora"),
    "loha": (LoHaConfig(r=2, alpha=3, target_modules=ATTENTION), "loha"),
    "lokr": (LoKrConfig(r=2, alpha=3, target_modules=ATTENTION), "lokr"),
}
LYCORIS: dict[str, tuple[dict[str, Any], str]] = {
    "locon": ({"algo": "lora"}, "locon"),
    "locon-cp": ({"algo": "lora", "use_tucker": True}, "locon"),
    "dora": ({"algo": "lora", "dora_wd": True}, "dora"),
    "loha": ({"algo": "loha"}, "loha"),
    "lokr": ({"algo": "lokr", "factor": 4}, "lokr"),
    "full": ({"algo": "full"}, "full"),
    "norms": ({"algo": "lora", "train_norm": True}, "norm"),
}


def imported(path: Path) -> tuple[Tensor, AdapterReport]:
    """The output of the tiny U-Net with the file in a slot, and what the import said."""
    unet, bank = tiny_unet(), SlotBank(slots=1, max_rank=32)
    bank.wrap(unet, "unet")
    base = Base.of("sd1", {"unet": unet}, max_rank=32, is_word=lambda word: False)
    adapter, report = import_file(path, base)
    bank.load(1, adapter)
    with bank.use(bank.gather([[(1, 1.0)]] * 8)):
        return Inputs().run(unet), report


@torch.no_grad()
def trained(module: nn.Module) -> None:
    """Random weights in place of what adapters begin with; the base stays as it is."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(parameter * (1 + noise) if "magnitude" in name or "dora" in name else noise)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_a_folder_of_peft(case: str, tmp_path: Path) -> None:
    config, kind = PEFT_CONFIGS[case]
    model = get_peft_model(tiny_unet(), config)
    trained(model)
    model.save_pretrained(tmp_path / "x")
    theirs = Inputs().run(model.eval())
    ours, report = imported(tmp_path / "x")
    assert relative(ours, theirs) < 1e-5
    assert relative(Inputs().run(tiny_unet()), theirs) > 2e-3
    assert (report.format, report.coverage) == ("peft", 1.0)
    assert kind in dict(report.kinds)


@pytest.mark.parametrize("case", LYCORIS)
def test_a_file_of_lycoris(case: str, tmp_path: Path) -> None:
    options, kind = LYCORIS[case]
    unet: UNet2DConditionModel = tiny_unet()
    network = create_lycoris(unet, 1.0, linear_dim=2, linear_alpha=3.0, conv_dim=2, conv_alpha=1.0, **options)
    network.apply_to()
    trained(network)
    network.save_weights(str(tmp_path / "x.safetensors"), None, {"ss_network_module": "lycoris.kohya"})
    theirs = Inputs().run(unet)
    ours, report = imported(tmp_path / "x.safetensors")
    assert relative(ours, theirs) < 1e-5
    assert relative(Inputs().run(tiny_unet()), theirs) > 2e-3
    assert (report.format, report.coverage) == ("lycoris", 1.0)
    assert kind in dict(report.kinds)
