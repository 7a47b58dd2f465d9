"""Files that LyCORIS itself has written, every kind in one, imported: the forward of LyCORIS' own layers.

Three tiny bases with their text encoders; in one batch with the base alone and with a plain LoRA on top.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule
from atelier_server.adapters.importer import import_file
from tests.bases import FAMILIES
from tests.foreign import save, split
from tests.golden.test_every_format_equals_merged import changes_for, forward, studio
from tests.unit.adapters.merged import merge

DORA = {"weight_decompose": True}
# Taken in turn, layer by layer.
KINDS: tuple[tuple[type[nn.Module], dict[str, Any]], ...] = (
    (LoConModule, {}),
    (LoConModule, DORA),
    (LohaModule, {}),
    (LokrModule, {"factor": 4}),
    (FullModule, {}),
    (LoConModule, {"use_tucker": True}),
    (LohaModule, {"use_tucker": True, **DORA}),
    (LokrModule, {"factor": 2, "use_tucker": True}),
    (LoConModule, {**DORA, "wd_on_out": False}),
    (LokrModule, {"factor": 4, "full_matrix": True}),
    (LohaModule, DORA),
)


@torch.no_grad()
def adapted(components: Mapping[str, nn.Module], path: Path) -> tuple[Path, dict[str, int]]:
    """LyCORIS' layers on the components, in place; the file that it writes of them; how many of a kind."""
    sdxl = "text_encoder_2" in components
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if sdxl else "lora_te_"}
    prefixes["text_encoder_2"] = "lora_te2_"
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    made: dict[str, int] = {}
    number = 0
    for component, root in components.items():
        for name, layer in list(root.named_modules()):
            if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
                cls, options = NormModule, {}
            elif isinstance(layer, nn.Linear | nn.Conv2d):
                cls, options = KINDS[number % len(KINDS)]
                number += 1
            else:
                continue
            options = {"lora_dim": 2, "alpha": 3.0, "bypass_mode": False, **options}
            module = cls(name.replace(".", "_"), layer, **options)
            for key, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if key == "dora_scale":
                    parameter.mul_(1 + 0.1 * noise.clamp(-3, 3))
                else:
                    parameter.copy_(noise * (0.02 if cls in (FullModule, NormModule) else 0.2))
            known, bare = split(f"{component}.{name}")
            prefix = prefixes[known] + bare.replace(".", "_")
            parts = dict(module.named_parameters())
            if cls is FullModule:
                parts = {"diff": module.weight, **({} if module.bias is None else {"diff_b": module.bias})}
            elif cls is not NormModule:
                parts = module.custom_state_dict()
            tensors |= {f"{prefix}.{part}": tensor.detach().clone() for part, tensor in parts.items()}
            layer.forward = module.forward  # as its apply_to does, but for full ones, which it folds in
            module.org_forward = type(layer).forward.__get__(layer)
            made[cls.__name__] = made.get(cls.__name__, 0) + 1
    return save(tensors, path, {"ss_network_module": "lycoris.kohya"}), made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_beside_others_is_as_lycoris_computes_it(family: str, tmp_path: Path) -> None:
    place = studio(family)
    theirs = copy.deepcopy(dict(place.plain))
    file, made = adapted(theirs, tmp_path / "every-kind.safetensors")
    assert set(made) == {"LoConModule", "LohaModule", "LokrModule", "FullModule", "NormModule"}
    adapter, report = import_file(file, place.base)
    assert report.coverage == 1.0
    assert len(report.matched) == sum(made.values())
    assert {type(module) for module in adapter.modules.values()} == {LoraModule, DenseModule}
    place.bank.check(adapter)
    place.bank.load(1, adapter)
    components = ("unet", "text_encoder", "text_encoder_2")
    mixed = place.bank.gather([[(1, 1.0)], []], components)
    for name in theirs:
        with torch.no_grad(), place.bank.use(mixed):
            ours = forward(place.wrapped, name)
        with torch.no_grad():
            expected, base = forward(theirs, name), forward(place.plain, name)
        assert (ours[0] - expected[0]).norm() < 1e-5 * expected[0].norm()
        assert torch.equal(ours[1], base[1])
        assert (expected[0] - base[0]).norm() > 1e-2 * base[0].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_composes_with_a_lora(family: str, tmp_path: Path) -> None:
    place = studio(family)
    file, _ = adapted(copy.deepcopy(dict(place.plain)), tmp_path / "every-kind.safetensors")
    adapter, _ = import_file(file, place.base)
    lora = changes_for({"unet": place.plain["unet"]}, mixed=True, seed=3, size=0.1)
    unet = copy.deepcopy(place.plain["unet"])
    for name in {*adapter.modules, *lora}:
        if name.startswith("unet."):
            parts = [(a[name], w) for a, w in ((adapter.modules, 0.6), (lora, -0.8)) if name in a]
            merge(unet.get_submodule(name.removeprefix("unet.")), parts)
    place.bank.load(1, adapter)
    place.bank.load(2, CanonicalAdapter(lora))
    with torch.no_grad(), place.bank.use(place.bank.gather([[(2, -0.8), (1, 0.6)], [(2, 1.0)]])):
        ours = forward({"unet": place.wrapped["unet"]}, "unet")
    with torch.no_grad():
        expected = forward({"unet": unet.requires_grad_(False)}, "unet")
    assert (ours[0] - expected[0]).norm() < 1e-5 * expected[0].norm()
    place.bank.clear(2)
