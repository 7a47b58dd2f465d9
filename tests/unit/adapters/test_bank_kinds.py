"""DoRA, differences and norms in the bank: rows of any kinds beside each other, against merged weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule, Module
from atelier_server.adapters.kinds import convert
from atelier_server.adapters.layers import BankGroupNorm, BankLayerNorm, RowDelta
from atelier_server.errors import AdapterMismatch
from tests.unit.adapters.merged import merge, merged_weight
from tests.unit.adapters.tiny import BATCH, EVERYTHING, Inputs, adapter_for, tiny_unet, wrapped_unet

KINDS = ("lora", "dora", "dora-inputs", "loha", "lokr", "full", "dense-dora", "norms", "everything")
SLOTS = {kind: slot for slot, kind in enumerate(KINDS, start=1)}


def module_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Module:
    """A random change of a linear or convolution layer whose weight has `shape`."""

    def random(*size: int, scale: float = 0.1) -> Tensor:
        return torch.randn(*size, generator=generator) * scale

    out, features = shape[0], torch.Size(shape[1:]).numel()
    a, b = random(4, *shape[1:]), random(out, 4)
    near = 0.5 + torch.rand(out, generator=generator)
    if kind == "lora":
        return LoraModule(a, b, 2.0)
    if kind == "dora":
        return LoraModule(a, b, 2.0, magnitude=near)
    if kind == "dora-inputs":
        magnitude = (0.5 + torch.rand(1, shape[1], generator=generator)) * (out / shape[1]) ** 0.5
        return LoraModule(a, b, 2.0, magnitude=magnitude, bias=random(out))
    if kind == "loha":
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        sizes = ((out, 3), (3, features)) * 2
        parts = {n: random(*size, scale=0.3) for n, size in zip(names, sizes, strict=True)}
        return convert("x", parts, shape, max_rank=40)
    if kind == "lokr" and out % 4 == 0 and shape[1] % 4 == 0:
        whole = random(out // 4, shape[1] // 4, *shape[2:])
        return convert("x", {"lokr_w1": random(4, 4), "lokr_w2": whole}, shape, max_rank=40)
    return DenseModule(random(*shape, scale=0.03), random(out), near if kind == "dense-dora" else None)


def adapter_of(bank: SlotBank, kind: str, seed: int = 0) -> CanonicalAdapter:
    generator = torch.Generator().manual_seed(seed * 100 + SLOTS[kind])
    modules: dict[str, Module] = {}
    for number, (name, shape) in enumerate(bank.shapes.items()):
        if len(shape) == 1:
            if kind in ("norms", "everything"):
                parts = [torch.randn(shape, generator=generator) * 0.1 for _ in range(2)]
                modules[name] = DenseModule(*parts) if number % 3 else DenseModule(bias=parts[0])
        elif kind != "norms" and name.endswith(EVERYTHING):
            chosen = KINDS[number % 7] if kind == "everything" else kind
            modules[name] = module_of(chosen, shape, generator)
    return CanonicalAdapter(modules)


@pytest.fixture(scope="module")
def loaded() -> tuple[UNet2DConditionModel, SlotBank, dict[int, CanonicalAdapter]]:
    unet, bank = wrapped_unet(slots=len(KINDS))
    adapters = {slot: adapter_of(bank, kind) for kind, slot in SLOTS.items()}
    for slot, adapter in adapters.items():
        bank.check(adapter)
        bank.load(slot, adapter)
    return unet, bank, adapters


Loaded = tuple[UNet2DConditionModel, SlotBank, dict[int, CanonicalAdapter]]


def merged_with(parts: Sequence[tuple[CanonicalAdapter, float]]) -> UNet2DConditionModel:
    """A plain U-Net with every layer's changes merged, each at its weight."""
    unet = tiny_unet()
    for name in {name for adapter, _ in parts for name in adapter.modules}:
        layer = unet.get_submodule(name.removeprefix("unet."))
        merge(layer, [(a.modules[name], weight) for a, weight in parts if name in a.modules])
    return unet.requires_grad_(False)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


MIXES = {
    "one kind a row": [[(slot, 1.0)] for slot in range(1, 9)],
    "other weights": [
        [(slot, weight)] for slot, weight in zip(range(2, 10), [0.6, -0.5, 1.3, 0.2] * 2, strict=True)
    ],
    "compositions": [
        [],
        [(1, 0.5), (2, 0.7)],
        [(2, 0.5), (3, 0.5), (6, 0.4)],
        [(9, 1.0)],
        [(8, 1.0), (1, 1.0)],
        [(9, -0.4), (4, 1.0), (5, 0.3), (2, 0.2)],
        [(1, 1.0)],
        [(7, 0.3), (2, 0.6)],
    ],
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_rows_equal_merged_weights(loaded: Loaded, mix: str) -> None:
    unet, bank, adapters = loaded
    inputs, rows = Inputs(), MIXES[mix]
    with bank.use(bank.gather(rows)):
        mixed = inputs.run(unet)
    base = inputs.run(tiny_unet())
    for number, row in enumerate(rows):
        expected = inputs.run(merged_with([(adapters[slot], weight) for slot, weight in row]), number)[0]
        assert relative(mixed[number], expected) < 1e-5
        assert not row or relative(base[number], expected) > 1e-2


ROW = st.lists(
    st.tuples(st.sampled_from(sorted(SLOTS.values())), st.sampled_from([1.0, 0.5, -0.3])),
    max_size=3,
    unique_by=lambda pair: pair[0],
)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    row=ROW,
    batches=st.lists(st.lists(ROW, min_size=BATCH, max_size=BATCH), min_size=2, max_size=2),
    place=st.integers(0, BATCH - 1),
)
def test_a_row_keeps_its_bits_whatever_its_neighbours_are(
    loaded: Loaded,
    row: list[tuple[int, float]],
    batches: list[list[list[tuple[int, float]]]],
    place: int,
) -> None:
    unet, bank, _ = loaded
    inputs, outputs = Inputs(), []
    for others in ([[]] * BATCH, *batches):
        with bank.use(bank.gather([*others[:place], row, *others[place + 1 :]])):
            outputs.append(inputs.run(unet)[place])
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_a_row_keeps_its_bits_whichever_slots_hold_its_adapters() -> None:
    inputs, outputs = Inputs(), []
    for first, second in ((1, 2), (5, 3)):
        unet, bank = wrapped_unet()
        bank.load(first, adapter_of(bank, "everything"))
        bank.load(second, adapter_of(bank, "dora"))
        with bank.use(bank.gather([[(first, 0.7), (second, 0.4)], [(second, 1.0)]] * 4)):
            outputs.append(inputs.run(unet))
    assert torch.equal(outputs[0], outputs[1])


def test_weight_zero_is_the_base_and_the_base_is_never_written(loaded: Loaded) -> None:
    unet, bank, _ = loaded
    plain = tiny_unet()
    inputs = Inputs()
    with bank.use(bank.gather([[(slot, 0.0)] for slot in range(1, 9)])):
        assert torch.equal(inputs.run(unet), inputs.run(plain))
    assert torch.equal(inputs.run(unet), inputs.run(plain))
    before, after = plain.state_dict(), unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [n for n, _ in unet.named_modules()] == [n for n, _ in plain.named_modules()]


def test_nan_reaches_only_the_rows_that_use_it(loaded: Loaded) -> None:
    unet, bank = wrapped_unet()
    good = adapter_of(bank, "everything")
    bank.load(1, good)
    inputs, rows = Inputs(), [[(1, 1.0)], [], [(1, 0.3)], []] * 2
    with bank.use(bank.gather(rows)):
        before = inputs.run(unet)
    for slot, part in ((2, "magnitude"), (3, "weight"), (4, "bias")):
        bad = adapter_of(bank, "everything", seed=slot)
        for module in bad.modules.values():
            if getattr(module, part, None) is not None:
                getattr(module, part).fill_(float("nan"))
        with pytest.raises(AdapterMismatch, match="not finite"):
            bank.check(bad)
        bank.load(slot, bad)
        with bank.use(bank.gather([*rows[:7], [(slot, 1.0), (1, 1.0)]])):
            output = inputs.run(unet)
        assert output[7].isnan().all()
        assert torch.equal(output[:7], before[:7])
        bank.clear(slot)


def test_gathered_rows_keep_what_a_slot_held(loaded: Loaded) -> None:
    unet, bank = wrapped_unet()
    inputs, rows = Inputs(), [[(1, 1.0)]] * BATCH
    bank.load(1, adapter_of(bank, "everything"))
    active = bank.gather(rows)
    with bank.use(active):
        before = inputs.run(unet)
    for change in (lambda: bank.load(1, adapter_of(bank, "full", seed=5)), lambda: bank.clear(1)):
        change()
        assert active.key != bank.key(rows)
        with bank.use(active):
            assert torch.equal(inputs.run(unet), before)
    with bank.use(bank.gather(rows)):
        assert torch.equal(inputs.run(unet), inputs.run(tiny_unet()))


def test_a_slot_is_replaced_whole() -> None:
    inputs, outputs = Inputs(), []
    for before in (None, "everything", "norms", "full"):
        unet, bank = wrapped_unet()
        if before:
            bank.load(1, adapter_of(bank, before))
        bank.load(1, adapter_of(bank, "dora", seed=3))
        with bank.use(bank.gather([[(1, 1.0)]] * BATCH)):
            outputs.append(inputs.run(unet))
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_only_layers_that_an_adapter_of_the_batch_changes_so_pay(loaded: Loaded) -> None:
    _, bank, adapters = loaded
    plain = bank.gather([[(SLOTS["lora"], 1.0)], []])
    assert {type(delta) for delta in plain.deltas.values()} == {RowDelta}
    assert not plain.norms
    assert not bank.gather([[(SLOTS["norms"], 1.0)], []]).deltas
    full = bank.gather([[(SLOTS["full"], 1.0)], [(SLOTS["lora"], 1.0)]])
    assert full.deltas.keys() == adapters[SLOTS["full"]].modules.keys()


def test_norms_are_wrapped_when_first_needed() -> None:
    unet, bank = wrapped_unet()
    norms = [name for name, module in unet.named_modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)]
    assert {f"unet.{name}" for name in norms} == {
        name for name, shape in bank.shapes.items() if len(shape) == 1
    }
    bank.load(1, adapter_of(bank, "full"))
    assert not any(isinstance(m, BankGroupNorm | BankLayerNorm) for m in unet.modules())
    adapter = CanonicalAdapter(
        {f"unet.{norms[0]}": DenseModule(torch.ones(unet.get_submodule(norms[0]).weight.shape))}
    )
    weight = unet.get_submodule(norms[0]).weight
    bank.load(2, adapter)
    assert [m.layer_name for m in unet.modules() if isinstance(m, BankGroupNorm | BankLayerNorm)] == [
        f"unet.{norms[0]}"
    ]
    assert unet.get_submodule(norms[0]).weight is weight


def test_the_cost_of_differences_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    _, bank = wrapped_unet()
    layer = bank.layers["unet.conv_in"]
    with caplog.at_level(logging.INFO, logger="atelier_server.adapters.bank"):
        bank.load(1, CanonicalAdapter({"unet.conv_in": DenseModule(torch.ones_like(layer.weight))}))
    assert bank.size_bytes == layer.weight.nbytes
    assert f"take {layer.weight.nbytes} bytes" in caplog.text
    bank.load(1, adapter_for(bank, rank=4, alpha=4, seed=1, targets=(".to_q",)))
    plain = bank.size_bytes
    module = LoraModule(torch.ones(1, *layer.weight.shape[1:]), torch.ones(len(layer.weight), 1), 1.0)
    bank.load(2, CanonicalAdapter({"unet.conv_in": module}))
    pairs = bank.size_bytes
    dora = LoraModule(module.A, module.B, 1.0, magnitude=torch.ones(len(layer.weight)))
    bank.load(2, CanonicalAdapter({"unet.conv_in": dora}))
    assert plain < pairs < bank.size_bytes
    assert bank.size_bytes - pairs < 2 * 4 * sum(shape[0] for shape in bank.shapes.values()) + 1


def test_bfloat16_rows_equal_the_merged_float32_weights_roughly() -> None:
    unet, bank = tiny_unet(), SlotBank(slots=1, max_rank=40)
    unet.to(torch.bfloat16)
    bank.wrap(unet, "unet")
    inputs = Inputs()
    plain = inputs.run(tiny_unet())
    halved = Inputs()
    halved.latents, halved.prompts = inputs.latents.bfloat16(), inputs.prompts.bfloat16()
    for kind in ("dora", "dora-inputs", "full", "everything"):
        adapter = adapter_of(bank, kind)
        bank.load(1, adapter)
        reference = inputs.run(merged_with([(adapter, 1.0)]))
        effect = (reference - plain).square().mean().sqrt()
        with bank.use(bank.gather([[(1, 1.0)]] * BATCH)):
            output = halved.run(unet).float()
        assert (output - reference).square().mean().sqrt() < 0.05 * effect + 0.01


def test_a_weight_row_of_zeros_stays_zero() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data[0] = 0
    module = LoraModule(
        torch.ones(1, 3), torch.tensor([[0.0], [1.0]]), 1.0, magnitude=torch.tensor([5.0, 1.0])
    )
    root = nn.Sequential(layer)
    bank = SlotBank(slots=1, max_rank=4)
    bank.wrap(root, "m")
    bank.load(1, CanonicalAdapter({"m.0": module}))
    with bank.use(bank.gather([[(1, 1.0)]])):
        output = root(torch.ones(1, 3))
    assert output[0, 0] == layer.bias[0]


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("unet.conv_in", DenseModule(torch.ones(3, 3)), r"difference of shape \(3, 3\)"),
        (
            "unet.conv_in",
            DenseModule(torch.ones(32, 4, 3, 3), torch.ones(3)),
            r"bias of shape \(3,\); \(32,\)",
        ),
        (
            "unet.conv_in",
            DenseModule(torch.ones(32, 4, 3, 3), None, torch.ones(31)),
            r"magnitudes of shape \(31,\)",
        ),
        ("unet.conv_in", DenseModule(), "changes nothing"),
        ("unet.conv_in", DenseModule(None, torch.ones(32), torch.ones(32)), "changes nothing"),
        ("unet.conv_norm_out", DenseModule(torch.ones(31)), r"difference of shape \(31,\)"),
        ("unet.conv_norm_out", LoraModule(torch.ones(1, 1), torch.ones(32, 1), 1.0), "a norm by more than"),
        ("unet.conv_norm_out", DenseModule(torch.ones(32), None, torch.ones(32)), "a norm by more than"),
        ("unet.nothing", DenseModule(torch.ones(32)), "no layer unet.nothing"),
    ],
)
def test_what_does_not_fit_is_named(loaded: Loaded, name: str, module: Module, message: str) -> None:
    _, bank, _ = loaded
    for attempt in (bank.check, lambda adapter: bank.load(1, adapter)):
        with pytest.raises(AdapterMismatch, match=message):
            attempt(CanonicalAdapter({name: module}))


def test_the_reference_is_right_about_dora() -> None:
    """The merged weight of a DoRA has its magnitudes for norms."""
    module = LoraModule(torch.randn(2, 6), torch.randn(5, 2), 1.0, magnitude=torch.rand(5) + 1)
    weight = merged_weight(torch.randn(5, 6), module)
    assert torch.allclose(weight.norm(dim=1), module.magnitude.double())  # type: ignore[union-attr]
    inputs = LoraModule(module.A, module.B, 1.0, magnitude=torch.rand(1, 6) + 1)
    weight = merged_weight(torch.randn(5, 6), inputs)
    assert torch.allclose(weight.norm(dim=0), inputs.magnitude[0].double())  # type: ignore[index]
