"""The probe of an import: nothing, something, too much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.diffusion.base import load_base
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.errors import AdapterMismatch
from atelier_server.workers.probe import Probe
from tests.bases import save_base
from tests.unit.adapters.test_bank_kinds import KINDS, adapter_of
from tests.unit.adapters.tiny import adapter_for


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def studio(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SlotBank, Probe]:
    folder: Path = tmp_path_factory.mktemp("base") / request.param
    base = load_base(str(save_base(request.param, folder)), "cpu", "float32")
    bank = SlotBank(slots=1, max_rank=64)
    bank.wrap(base.unet, "unet")
    for name in base.family.text_encoders:
        bank.wrap(base.modules[name], name)
    return bank, Probe(base, Denoiser(base.unet, base.scheduler_config), bank)


def of(bank: SlotBank, component: str, size: float = 0.1) -> CanonicalAdapter:
    whole = adapter_for(bank, rank=4, alpha=4, seed=1, targets=("to_q", "q_proj", "fc1"), size=size)
    return CanonicalAdapter({n: m for n, m in whole.modules.items() if n.startswith(component)})


def test_an_adapter_that_does_nothing_measures_zero(studio: tuple[SlotBank, Probe]) -> None:
    bank, probe = studio
    adapter = of(bank, "")
    idle = {name: LoraModule(m.A, torch.zeros_like(m.B), m.alpha) for name, m in adapter.low_rank.items()}
    assert probe.measure(CanonicalAdapter(idle)) == 0.0
    assert probe.measure(CanonicalAdapter({})) == 0.0


def test_what_changes_the_output_is_measured_whichever_part_it_is_in(studio: tuple[SlotBank, Probe]) -> None:
    bank, probe = studio
    measured = [probe.measure(of(bank, part)) for part in ("unet", "text_encoder", "")]
    assert all(1e-6 < value < 10 for value in measured)
    assert probe.measure(of(bank, "unet")) == measured[0]
    assert probe.measure(of(bank, "unet", size=0.2)) > measured[0]
    width = bank.layers["text_encoder.encoder.layers.0.self_attn.q_proj"].in_features
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    assert probe.measure(CanonicalAdapter({}, {"<x>": {"text_encoder": vectors}})) > 1e-6


def test_what_the_slots_hold_stays_and_does_not_matter(studio: tuple[SlotBank, Probe]) -> None:
    bank, probe = studio
    before = probe.measure(of(bank, ""))
    bank.load(1, of(bank, "", size=0.5))
    key = bank.key([[(1, 1.0)]])
    assert probe.measure(of(bank, "")) == before
    assert bank.key([[(1, 1.0)]]) == key


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_measures_what_its_slot_would_do(studio: tuple[SlotBank, Probe], kind: str) -> None:
    """The lone row against the same adapter in a slot."""
    bank, probe = studio
    adapter = adapter_of(bank, kind)
    bank.load(1, adapter)
    lone, _ = bank.alone(adapter)
    slotted = bank.gather([[(1, 1.0)]], ("unet", "text_encoder", "text_encoder_2"))
    assert lone.deltas.keys() == slotted.deltas.keys()
    assert lone.norms.keys() == slotted.norms.keys()
    with_lone = probe._forward(lone, None, "a photo")
    with_slot = probe._forward(slotted, None, "a photo")
    assert torch.allclose(with_lone, with_slot, atol=1e-4 * float(with_slot.abs().max()))
    assert not torch.allclose(with_lone, probe._plain, atol=1e-2)


def test_an_output_that_is_not_finite_is_refused(studio: tuple[SlotBank, Probe]) -> None:
    bank, probe = studio
    adapter = of(bank, "unet")
    huge = {name: LoraModule(m.A * 1e30, m.B * 1e30, m.alpha) for name, m in adapter.low_rank.items()}
    with pytest.raises(AdapterMismatch, match="not finite in float32"):
        probe.measure(CanonicalAdapter(huge))
