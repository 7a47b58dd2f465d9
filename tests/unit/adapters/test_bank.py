"""Every promise of the slot bank, against the slow obvious path: merged weights, one row at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.slots import group_key
from atelier_server.errors import AdapterMismatch
from tests.unit.adapters.tiny import (
    ATTENTION,
    BATCH,
    EVERYTHING,
    Inputs,
    adapter_for,
    merged_unet,
    tiny_unet,
    wrapped_unet,
)

Adapters = dict[int, CanonicalAdapter]


@pytest.fixture
def loaded() -> tuple[UNet2DConditionModel, SlotBank, Adapters]:
    unet, bank = wrapped_unet()
    adapters = {
        1: adapter_for(bank, rank=4, alpha=4, seed=1),
        2: adapter_for(bank, rank=16, alpha=8, seed=2, targets=EVERYTHING),
        3: adapter_for(bank, rank=32, alpha=16, seed=3, targets=(".to_q", ".ff.net.2")),
        4: adapter_for(bank, rank=8, alpha=1, seed=4, targets=(".to_v", ".conv_in")),
    }
    adapters[4] = _with_alpha(adapters[4], "unet.conv_in", 12.0)
    for slot, adapter in adapters.items():
        bank.load(slot, adapter)
    return unet, bank, adapters


ROWS = [
    [],
    [(1, 1.0)],
    [(2, 1.0)],
    [(3, 0.8)],
    [(4, 1.0)],
    [(1, 0.7), (2, 0.4)],
    [(2, 0.5), (4, 1.0)],
    [(1, -1.0)],
]


def test_mixed_rows_equal_merged_weights_one_row_at_a_time(
    loaded: tuple[UNet2DConditionModel, SlotBank, Adapters],
) -> None:
    unet, bank, adapters = loaded
    inputs = Inputs()
    with bank.use(bank.gather(ROWS)):
        mixed = inputs.run(unet)
    base = inputs.run(tiny_unet())
    for number, row in enumerate(ROWS):
        reference = merged_unet([(adapters[slot], weight) for slot, weight in row])
        assert (mixed[number] - inputs.run(reference, number)[0]).abs().max() <= 1e-5
        assert not row or (mixed[number] - base[number]).abs().max() > 1e-3


def test_idle_bank_is_the_unwrapped_base_bit_for_bit(
    loaded: tuple[UNet2DConditionModel, SlotBank, Adapters],
) -> None:
    unet, bank, _ = loaded
    inputs, plain = Inputs(), Inputs().run(tiny_unet())
    assert torch.equal(inputs.run(unet), plain)
    for rows in (None, bank.gather([[]] * BATCH), bank.gather([[(6, 1.0)]] * BATCH)):
        with bank.use(rows):
            assert torch.equal(inputs.run(unet), plain)


def test_the_base_is_never_written(loaded: tuple[UNet2DConditionModel, SlotBank, Adapters]) -> None:
    unet, bank, _ = loaded
    with bank.use(bank.gather(ROWS)):
        Inputs().run(unet)
    bank.clear(2)
    before, after = tiny_unet().state_dict(), unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_names_and_parameters_stay_those_of_the_model() -> None:
    unet, plain = tiny_unet(), tiny_unet()
    weight = unet.conv_in.weight
    SlotBank(slots=1, max_rank=4).wrap(unet, "unet")
    assert unet.conv_in.weight is weight
    assert [n for n, _ in unet.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in unet.named_parameters()] == [n for n, _ in plain.named_parameters()]
    unet.load_state_dict(plain.state_dict())
    assert not any(p.requires_grad for p in unet.parameters())


def test_a_row_keeps_its_bits_whatever_its_neighbours_are(
    loaded: tuple[UNet2DConditionModel, SlotBank, Adapters],
) -> None:
    unet, bank, _ = loaded
    inputs = Inputs()
    for row in ([], [(1, 1.0)], [(4, 1.0)], [(1, 0.7), (2, 0.4)]):
        outputs = []
        for others in ([], [(1, 1.0)], [(3, 1.0)], [(2, 1.0), (3, 0.5), (4, -2.0)]):
            with bank.use(bank.gather([others] * 3 + [row] + [others] * 4)):
                outputs.append(inputs.run(unet)[3])
        assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_a_row_keeps_its_bits_whichever_slots_hold_its_adapters() -> None:
    inputs, outputs = Inputs(), []
    for first, second in ((1, 2), (2, 1), (5, 3)):
        unet, bank = wrapped_unet()
        bank.load(first, adapter_for(bank, rank=4, alpha=4, seed=1))
        bank.load(second, adapter_for(bank, rank=7, alpha=3, seed=2, targets=EVERYTHING))
        with bank.use(bank.gather([[(first, 0.7), (second, 0.4)]] * BATCH)):
            outputs.append(inputs.run(unet))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_the_order_in_which_a_row_names_its_slots_does_not_matter(
    loaded: tuple[UNet2DConditionModel, SlotBank, Adapters],
) -> None:
    unet, bank, _ = loaded
    inputs, outputs = Inputs(), []
    composition = [(1, 0.7), (2, 0.4), (4, 0.3)]
    for order in itertools.permutations(composition):
        with bank.use(bank.gather([order] * BATCH)):
            outputs.append(inputs.run(unet))
        assert bank.key([order]) == bank.key([composition])
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_one_content_in_two_slots_adds_up_in_one_order() -> None:
    """Two names may stand for the same file."""
    unet, bank = wrapped_unet()
    inputs, outputs = Inputs(), []
    for slot in (1, 2):
        bank.load(slot, adapter_for(bank, rank=4, alpha=4, seed=1, targets=EVERYTHING))
    for first, second in ((0.3, 0.6), (0.6, 0.3)):
        with bank.use(bank.gather([[(1, first), (2, second)]] * BATCH)):
            outputs.append(inputs.run(unet))
    assert torch.equal(*outputs)


def test_the_same_slot_twice_adds_up(loaded: tuple[UNet2DConditionModel, SlotBank, Adapters]) -> None:
    _, bank, _ = loaded
    assert bank.key([[(1, 0.5), (1, 0.25)]]) == bank.key([[(1, 0.75)]])
    assert bank.key([[(1, 0.5), (1, -0.5)]]) == bank.key([[]])


def test_nan_in_a_slot_reaches_only_the_rows_that_use_it(
    loaded: tuple[UNet2DConditionModel, SlotBank, Adapters],
) -> None:
    unet, bank, _ = loaded
    inputs = Inputs()
    with bank.use(bank.gather(ROWS)):
        before = inputs.run(unet)
    nan = adapter_for(bank, rank=40, alpha=1, seed=9, targets=EVERYTHING)
    for module in nan.low_rank.values():
        module.A.fill_(float("nan"))
    for slot in (5, 6):  # every slot beside the used ones, and one in between
        bank.load(slot, nan)
    with bank.use(bank.gather(ROWS)):
        assert torch.equal(inputs.run(unet), before)
    poisoned = [*ROWS[:6], [(5, 1.0)], [(1, -1.0), (6, 0.0)]]
    with bank.use(bank.gather(poisoned)):
        output = inputs.run(unet)
    assert output[6].isnan().all()
    keep = [0, 1, 2, 3, 4, 5, 7]
    assert torch.equal(output[keep], before[keep])


def test_clearing_a_slot_with_nan_leaves_zeros() -> None:
    unet, bank = wrapped_unet()
    nan = adapter_for(bank, rank=40, alpha=1, seed=9)
    for module in nan.low_rank.values():
        module.B.fill_(float("nan"))
    bank.load(1, nan)
    bank.clear(1)
    with bank.use(bank.gather([[(1, 1.0)]] * BATCH)):
        assert torch.equal(Inputs().run(unet), Inputs().run(tiny_unet()))
    assert all((group.A == 0).all() and (group.Bt == 0).all() for group in bank._groups.values())


def test_a_smaller_adapter_leaves_nothing_of_a_larger_one() -> None:
    inputs, outputs = Inputs(), []
    for before in (None, 40):
        unet, bank = wrapped_unet()
        if before:
            bank.load(1, adapter_for(bank, rank=before, alpha=1, seed=5, targets=EVERYTHING))
        bank.load(1, adapter_for(bank, rank=2, alpha=4, seed=6))
        with bank.use(bank.gather([[(1, 1.0)]] * BATCH)):
            outputs.append(inputs.run(unet))
        assert all((g.A[:, 42:] == 0).all() and (g.A[:, :40] == 0).all() for g in bank._groups.values())
    assert torch.equal(outputs[0], outputs[1])


def test_gathered_rows_are_a_copy_and_their_key_tells_when_they_are_stale(
    loaded: tuple[UNet2DConditionModel, SlotBank, Adapters],
) -> None:
    unet, bank, _ = loaded
    inputs, rows = Inputs(), [[(1, 1.0)]] * BATCH
    active = bank.gather(rows)
    assert active.key == bank.key(rows)
    with bank.use(active):
        before = inputs.run(unet)
    bank.load(1, adapter_for(bank, rank=4, alpha=4, seed=77))
    assert active.key != bank.key(rows)
    with bank.use(active):
        assert torch.equal(inputs.run(unet), before)
    with pytest.raises(TypeError):
        active.deltas["unet.conv_in"] = None  # type: ignore[index]


def test_layers_that_no_adapter_of_the_batch_touches_do_only_their_base_forward(
    loaded: tuple[UNet2DConditionModel, SlotBank, Adapters],
) -> None:
    _, bank, _ = loaded
    assert {name.rsplit(".to_", 1)[-1] for name in bank.gather([[(1, 1.0)]]).deltas} == {
        "q",
        "k",
        "v",
        "out.0",
    }
    assert not bank.gather([[(6, 1.0)], []]).deltas


@pytest.mark.parametrize(("rank", "packed"), [(1, 16), (16, 16), (17, 32), (33, 64), (65, 128), (129, 192)])
def test_packed_ranks_come_in_few_sizes(rank: int, packed: int) -> None:
    _, bank = wrapped_unet(slots=4)
    adapters = []
    while rank:
        size = min(rank, 40)
        adapters.append(len(adapters) + 1)
        bank.load(adapters[-1], adapter_for(bank, rank=size, alpha=1, seed=rank))
        rank -= size
    active = bank.gather([[(slot, 1.0) for slot in adapters], []])
    assert all(delta.bt.shape[1] == packed for delta in active.deltas.values())


def test_bfloat16_rows_equal_the_merged_float32_weights_roughly() -> None:
    unet, bank = tiny_unet(), SlotBank(slots=2, max_rank=16)
    unet.to(torch.bfloat16)
    bank.wrap(unet, "unet")
    adapter = adapter_for(bank, rank=8, alpha=4, seed=1, targets=EVERYTHING)
    bank.load(2, adapter)
    inputs = Inputs()
    reference = inputs.run(merged_unet([(adapter, 1.0)]))
    effect = (reference - inputs.run(tiny_unet())).square().mean().sqrt()
    inputs.latents, inputs.prompts = inputs.latents.bfloat16(), inputs.prompts.bfloat16()
    with bank.use(bank.gather([[(2, 1.0)]] * BATCH)):
        output = inputs.run(unet).float()
    assert (output - reference).square().mean().sqrt() < 0.05 * effect + 0.01


def test_what_does_not_fit_is_named_and_changes_nothing(
    loaded: tuple[UNet2DConditionModel, SlotBank, Adapters],
) -> None:
    unet, bank, adapters = loaded
    inputs = Inputs()
    rows = [[(1, 1.0)]] * BATCH
    with bank.use(bank.gather(rows)):
        before = inputs.run(unet)
    name, module = next(iter(adapters[1].low_rank.items()))
    cases = {
        "unet.nothing": (module, "no layer unet.nothing"),
        name: (LoraModule(module.A[:, :-1], module.B, 1.0), name),
        f"{name} ": (LoraModule(module.A, module.B[:-1], 1.0), "no layer"),
    }
    for key, (wrong, message) in cases.items():
        for attempt in (bank.check, lambda adapter: bank.load(1, adapter)):
            with pytest.raises(AdapterMismatch, match=message):
                attempt(CanonicalAdapter({key: wrong}))
    with pytest.raises(AdapterMismatch, match="rank 41"):
        bank.load(1, adapter_for(bank, rank=41, alpha=1, seed=1))
    infinite = adapter_for(bank, rank=4, alpha=1, seed=1)
    infinite.low_rank[name].B[0, 0] = float("inf")
    with pytest.raises(AdapterMismatch, match=f"{name} that are not finite"):
        bank.check(infinite)
    with bank.use(bank.gather(rows)):
        assert torch.equal(inputs.run(unet), before)


def test_slots_weights_and_row_counts_are_checked(
    loaded: tuple[UNet2DConditionModel, SlotBank, Adapters],
) -> None:
    unet, bank, adapters = loaded
    for slot in (0, -1, 7):
        with pytest.raises(IndexError):
            bank.load(slot, adapters[1])
        with pytest.raises(IndexError):
            bank.gather([[(slot, 1.0)]])
    with pytest.raises(ValueError, match="not finite"):
        bank.gather([[(1, float("nan"))]])
    with bank.use(bank.gather([[(1, 1.0)]] * 3)), pytest.raises(RuntimeError, match="8 rows"):
        Inputs().run(unet)
    assert torch.equal(
        Inputs().run(unet), Inputs().run(tiny_unet())
    )  # the failed forward left nothing active


def test_linear_layers_take_weights_in_the_shape_of_a_1x1_convolution() -> None:
    _, bank = wrapped_unet()
    plain = adapter_for(bank, rank=4, alpha=4, seed=1, targets=(*ATTENTION, ".proj_in"))
    other = {}
    for name, m in plain.low_rank.items():
        to_linear = m.A.dim() == 4
        shape = (
            (m.A.flatten(1), m.B.flatten(1)) if to_linear else (m.A[..., None, None], m.B[..., None, None])
        )
        other[name] = LoraModule(*shape, m.alpha)
    bank.check(CanonicalAdapter(other))
    bank.load(1, plain)
    bank.load(2, CanonicalAdapter(other))
    one, two = bank.gather([[(1, 1.0)]]), bank.gather([[(2, 1.0)]])
    for name in one.deltas:
        assert torch.equal(one.deltas[name].a, two.deltas[name].a)
        assert torch.equal(one.deltas[name].bt, two.deltas[name].bt)


def test_memory_is_taken_only_for_layers_of_the_shapes_that_were_needed() -> None:
    _, bank = wrapped_unet()
    assert bank.size_bytes == 0
    bank.load(1, adapter_for(bank, rank=4, alpha=4, seed=1, targets=("mid_block.attentions.0.proj_in",)))
    layer = bank.layers["unet.mid_block.attentions.0.proj_in"]
    alike = sum(group_key(other) == group_key(layer) for other in bank.layers.values())
    assert bank.size_bytes == alike * 7 * 40 * (layer.in_channels + layer.out_channels) * 4


def _with_alpha(adapter: CanonicalAdapter, name: str, alpha: float) -> CanonicalAdapter:
    module = adapter.low_rank[name]
    return CanonicalAdapter({**adapter.low_rank, name: LoraModule(module.A, module.B, alpha)})
