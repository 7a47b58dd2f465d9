"""A mixed batch through the bank against PEFT as diffusers drives it, one adapter at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.exporter import write_adapter
from atelier_server.adapters.importer import Base, import_file
from atelier_server.adapters.kinds import convert
from tests.unit.adapters.tiny import ATTENTION, EVERYTHING, Inputs, adapter_for, tiny_unet, wrapped_unet

ROWS = [
    [],
    [(1, 1.0)],
    [(2, 1.0)],
    [(3, 0.8)],
    [(1, 0.7), (2, 0.4)],
    [(2, 0.5), (3, 1.0)],
    [(1, -1.0)],
    [(3, 1.0)],
]


def through_peft(adapters: dict[int, CanonicalAdapter], folder: Path) -> UNet2DConditionModel:
    """A plain U-Net with every adapter loaded by diffusers from our files."""
    unet = tiny_unet()
    for slot, adapter in adapters.items():
        path = folder / f"weights-{slot}.safetensors"
        write_adapter(adapter, path)
        unet.load_lora_adapter(
            str(path.parent), weight_name=path.name, prefix="unet", adapter_name=f"subject{slot}"
        )
    return unet


# PEFT's note that several adapters share a model: here they are meant to.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_every_row_of_a_mixed_batch_equals_peft(tmp_path: Path) -> None:
    unet, bank = wrapped_unet()
    adapters = {
        1: adapter_for(bank, rank=4, alpha=4, seed=1),
        2: adapter_for(bank, rank=16, alpha=8, seed=2, targets=EVERYTHING),
        3: adapter_for(bank, rank=8, alpha=1, seed=3, targets=(".to_q", ".to_v")),
    }
    for slot, adapter in adapters.items():
        bank.load(slot, adapter)
    inputs = Inputs()
    with bank.use(bank.gather(ROWS)):
        mixed = inputs.run(unet)
    reference = through_peft(adapters, tmp_path)
    for number, row in enumerate(ROWS):
        if row:
            reference.enable_lora()
            reference.set_adapters([f"subject{slot}" for slot, _ in row], [weight for _, weight in row])
        else:
            reference.disable_lora()
        assert (mixed[number] - inputs.run(reference, number)[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING])
def test_single_rows_in_bfloat16_are_as_good_as_pefts(targets: tuple[str, ...], tmp_path: Path) -> None:
    """Both against float32: neither rounds more than the other."""
    unet, bank = wrapped_unet()
    adapter = adapter_for(bank, rank=8, alpha=4, seed=1, targets=targets)
    bank.load(1, adapter)
    inputs = Inputs(rows=2)
    with bank.use(bank.gather([[(1, 0.8)]] * 2)):
        exact = inputs.run(unet)
    half = tiny_unet().to(torch.bfloat16)
    bank = SlotBank(slots=1, max_rank=16)
    bank.wrap(half, "unet")
    bank.load(1, adapter)
    peft = through_peft({1: adapter}, tmp_path).to(torch.bfloat16)
    peft.set_adapters(["subject1"], [0.8])
    inputs.latents, inputs.prompts = inputs.latents.bfloat16(), inputs.prompts.bfloat16()
    with bank.use(bank.gather([[(1, 0.8)]] * 2)):
        ours = (inputs.run(half).float() - exact).square().mean().sqrt()
    theirs = (inputs.run(peft).float() - exact).square().mean().sqrt()
    assert ours <= 1.25 * theirs


def dora_through_peft() -> tuple[UNet2DConditionModel, CanonicalAdapter]:
    """A U-Net with a random DoRA of PEFT's own making on linear layers and convolutions, and its parts."""
    unet = tiny_unet()
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=["to_q", "to_v", "conv1", "proj_in"])
    )
    generator = torch.Generator().manual_seed(3)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    names = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_magnitude_vector": "magnitude"}
    for parameter in unet.parameters():
        if parameter.requires_grad:
            size = torch.rand(parameter.shape, generator=generator)
            parameter.data = parameter * (0.7 + size) if parameter.norm() else 0.1 * (size - 0.5)
            parameter.requires_grad_(False)
    for key, value in get_peft_model_state_dict(unet).items():
        name, _, part = key.removesuffix(".weight").rpartition(".")
        parts.setdefault(f"unet.{name}", {})[names[part]] = value
    shapes = wrapped_unet()[1].shapes
    return unet, CanonicalAdapter(
        {name: convert(name, of, shapes[name], max_rank=40, scale=0.5) for name, of in parts.items()}
    )


def test_dora_rows_equal_peft_at_weight_one_and_are_linear_in_the_weight() -> None:
    """PEFT scales B A inside of the norm: at weight 0 the magnitudes still act. Here the change is scaled."""
    reference, adapter = dora_through_peft()
    unet, bank = wrapped_unet()
    bank.load(1, adapter)
    inputs = Inputs()
    with bank.use(bank.gather([[(1, 1.0)], []] * 4)):
        mixed = inputs.run(unet)
    base = inputs.run(tiny_unet())
    assert (mixed[::2] - inputs.run(reference)[::2]).abs().max() <= 1e-5
    assert torch.equal(mixed[1::2], base[1::2])
    assert (mixed[::2] - base[::2]).abs().max() > 1e-2
    layer = unet.down_blocks[0].resnets[0].conv1
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = layer(x)
    with bank.use(bank.gather([[(1, 1.0)], [(1, 0.3)]])):
        changed = layer(torch.stack([x[0], x[0]]))
    assert torch.allclose(changed[1] - plain[0], 0.3 * (changed[0] - plain[0]), atol=1e-5)
    reference.set_adapters(["default"], [0.0])
    assert (inputs.run(reference) - base).abs().max() > 1e-2


def test_a_dora_that_diffusers_has_saved_is_imported_as_peft_computes_it(tmp_path: Path) -> None:
    """With square convolutions, whose magnitudes [1,o,1,1] look like those of inputs in LyCORIS' files."""
    reference, _ = dora_through_peft()
    reference.save_lora_adapter(tmp_path, adapter_name="default")
    unet, bank = wrapped_unet()
    base = Base.of("sd1", {"unet": unet}, max_rank=40, is_word=lambda _: False)
    adapter, report = import_file(tmp_path / "pytorch_lora_weights.safetensors", base)
    assert dict(report.kinds) == {"dora": len(report.matched)}
    square = [m for m in adapter.low_rank.values() if m.A.dim() == 4 and m.A.shape[1] == m.B.shape[0]]
    assert any(module.A.shape[-1] == 3 for module in square)
    bank.load(1, adapter)
    inputs = Inputs()
    with bank.use(bank.gather([[(1, 1.0)]] * 8)):
        ours = inputs.run(unet)
    assert (ours - inputs.run(reference)).abs().max() <= 1e-5
