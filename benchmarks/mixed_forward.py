"""One forward of the U-Net with a different adapter in each of eight rows: the bank against PEFT."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from benchmarks.bases import random_adapters, sd1_shaped
from benchmarks.desk import Desk
from benchmarks.harness import Row, interleave, row, seconds

_ROWS = 8
_RANK = 16


def run(*, quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = sd1_shaped(root / "base")
        files = random_adapters(root / "files", base, count=_ROWS, rank=_RANK)
        desk = Desk(str(base), root / "data")
        for slot, use in enumerate(desk.publish(files), start=1):
            desk.runner.load(use, slot)
        rows = [[(slot, 1.0)] for slot in range(1, _ROWS + 1)]
        inputs = inputs_of(desk.runner.base.unet.config, _ROWS)
        peft, names = _peft(base, files)

        def ours() -> torch.Tensor:
            # As the loop does it: gathered anew only when the batch has changed.
            with torch.no_grad(), desk.runner.bank.use(desk.runner.gather(rows)):
                return desk.runner.base.unet(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]

        def peer() -> torch.Tensor:
            with torch.no_grad():
                return peft(**inputs, return_dict=False, adapter_names=names)[0]  # type: ignore[no-any-return]

        if (difference := (ours() - peer()).abs().max().item()) > 1e-4:
            raise RuntimeError(f"the two sides compute different things: {difference}")
        samples = interleave(lambda: seconds(ours), lambda: seconds(peer), 1 if quick else 31)
    target = None if quick else ">= 1.8"
    case = f"{_ROWS} rows, {_ROWS} adapters, SD 1.5's graph / 10; peer: PEFT's adapter_names"
    return [row(case, "s", samples, target, ratio=lambda a, b: b / a)]


def inputs_of(config: Any, rows: int) -> dict[str, torch.Tensor]:
    """Random arguments of a U-Net's forward."""
    generator = torch.Generator().manual_seed(0)
    side = config.sample_size
    return {
        "sample": torch.randn(rows, config.in_channels, side, side, generator=generator),
        "timestep": torch.linspace(900, 100, rows),
        "encoder_hidden_states": torch.randn(rows, 32, config.cross_attention_dim, generator=generator),
    }


def _peft(base: Path, files: list[Path]) -> tuple[Any, list[str]]:
    """PEFT's model of the same U-Net with all adapters, and a name for each row."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    config = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    names = [file.stem for file in files]
    model = get_peft_model(unet, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, file in zip(names, files, strict=True):
        weights = {f"base_model.model.{key.removeprefix('unet.')}": v for key, v in load_file(file).items()}
        set_peft_model_state_dict(model, weights, adapter_name=name)
    return model.eval(), names
