"""Training through the bank: leaves, stacked leaves, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.leaves import Leaf, LeafSet
from tests.unit.adapters.tiny import ATTENTION, EVERYTHING, Inputs, adapter_for, tiny_unet, wrapped_unet


def leaves_for(bank: SlotBank, rank: int, seed: int, targets: Sequence[str] = ATTENTION) -> LeafSet:
    adapter = adapter_for(bank, rank=rank, alpha=3.0, seed=seed, targets=targets)
    return LeafSet(
        {n: Leaf(nn.Parameter(m.A), nn.Parameter(m.B), m.alpha / rank) for n, m in adapter.low_rank.items()}
    )


def losses(unet: UNet2DConditionModel, inputs: Inputs) -> Tensor:
    """One a row."""
    prediction = unet(inputs.latents, inputs.timesteps, inputs.prompts).sample
    return (prediction - 0.1).square().flatten(1).mean(1)


def gradients(leaves: LeafSet) -> list[Tensor]:
    grads = []
    for parameter in leaves.parameters():
        assert parameter.grad is not None
        grads.append(parameter.grad.clone())
        parameter.grad = None
    return grads


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_one_leaf_set_for_all_rows_equals_the_same_set_stacked() -> None:
    unet, bank = wrapped_unet()
    leaves, inputs = leaves_for(bank, 4, 1, EVERYTHING), Inputs(rows=2)
    results = []
    for arrangement in (leaves, [leaves, leaves]):
        with bank.train(arrangement):
            loss = losses(unet, inputs).mean()
            loss.backward()
        results.append((loss.detach(), gradients(leaves)))
    assert abs(results[0][0] - results[1][0]) <= 1e-6
    assert largest_difference(results[0][1], results[1][1]) <= 1e-6


def test_rows_with_leaf_sets_of_their_own_train_as_if_alone() -> None:
    unet, bank = wrapped_unet()
    sets = [leaves_for(bank, 4, 1), leaves_for(bank, 16, 2, EVERYTHING), leaves_for(bank, 1, 3, (".to_q",))]
    inputs = Inputs(rows=3)
    with bank.train(sets):
        losses(unet, inputs).sum().backward()
    together = [gradients(leaves) for leaves in sets]
    for row, leaves in enumerate(sets):
        with bank.train(leaves):
            losses(unet, inputs)[row].backward()
        alone = gradients(leaves)
        # Padded ranks: a gradient has the shape of its leaf, and nothing of the larger neighbour in it.
        assert largest_difference(together[row], alone) <= 1e-6
        assert max(float(g.abs().max()) for g in alone) > 1e-4


def test_nan_in_one_rows_leaves_does_not_reach_the_others_gradients() -> None:
    unet, bank = wrapped_unet()
    good, bad, inputs = leaves_for(bank, 4, 1), leaves_for(bank, 8, 2), Inputs(rows=2)
    with torch.no_grad():
        bad.parameters()[1].fill_(float("nan"))
    with bank.train([good, bad]):
        rows = losses(unet, inputs)
        rows.sum().backward()
    assert rows[0].isfinite()
    assert rows[1].isnan()
    assert all(gradient.isfinite().all() for gradient in gradients(good))


@pytest.mark.parametrize("stacked", [False, True])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(stacked: bool) -> None:
    unet, bank = wrapped_unet()
    leaves, inputs = leaves_for(bank, 4, 1), Inputs(rows=2)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    unet.mid_block.resnets[1].register_forward_pre_hook(count)
    results = []
    for checkpointing in (False, True):
        forwards = 0
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with bank.train([leaves, leaves] if stacked else leaves):
            loss = losses(unet, inputs).mean()
            loss.backward()
        assert forwards == 1 + checkpointing  # it really ran the block again
        results.append((loss.detach(), gradients(leaves)))
    assert torch.equal(results[0][0], results[1][0])
    assert largest_difference(results[0][1], results[1][1]) == 0.0


def test_a_checkpointed_backward_outside_is_an_error_and_not_a_wrong_gradient() -> None:
    unet, bank = wrapped_unet()
    unet.enable_gradient_checkpointing()
    leaves, inputs = leaves_for(bank, 4, 1), Inputs(rows=2)
    with bank.train(leaves):
        loss = losses(unet, inputs).mean()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_nothing_else_can_be_activated_inside_a_training_step() -> None:
    unet, bank = wrapped_unet()
    leaves = leaves_for(bank, 4, 1)
    bank.load(1, adapter_for(bank, rank=4, alpha=4, seed=1))
    rows = bank.gather([[(1, 1.0)]] * 2)
    with bank.train(leaves):
        for attempt in (bank.use(rows), bank.use(None), bank.train(leaves)):
            with pytest.raises(RuntimeError), attempt:
                pass
    with bank.use(rows), pytest.raises(RuntimeError), bank.train(leaves):
        pass
    with bank.use(rows):
        Inputs(rows=2).run(unet)  # free again


def test_a_failed_training_forward_leaves_nothing_active_and_the_base_as_it_was() -> None:
    unet, bank = wrapped_unet()
    with pytest.raises(RuntimeError, match="3 rows"), bank.train([leaves_for(bank, 4, 1)] * 2):
        losses(unet, Inputs(rows=3))
    assert torch.equal(Inputs().run(unet), Inputs().run(tiny_unet()))
    assert all(p.grad is None for p in unet.parameters())


def test_float32_leaves_train_on_a_bfloat16_base() -> None:
    unet = tiny_unet().to(torch.bfloat16)
    bank = SlotBank(slots=1, max_rank=8)
    bank.wrap(unet, "unet")
    leaves, inputs = leaves_for(bank, 4, 1, EVERYTHING), Inputs(rows=2)
    inputs.latents, inputs.prompts = inputs.latents.bfloat16(), inputs.prompts.bfloat16()
    for arrangement in (leaves, [leaves, leaves]):
        with bank.train(arrangement):
            losses(unet, inputs).mean().backward()
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(leaves))
