"""Slots of layers that are alike: on whatever device, and after a write that failed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier_server.adapters.canonical import LoraModule
from atelier_server.adapters.layers import BankLinear, Current
from atelier_server.adapters.slots import SlotGroup


def test_pairs_from_the_host_and_from_the_device_go_into_one_slot() -> None:
    """As where some layers of a file are DoRA. `meta` mixes with the CPU as little as a GPU does."""
    names = ("unet.attn.0", "unet.attn.1")
    layers = [BankLinear(nn.Linear(8, 6, device="meta"), name, Current()) for name in names]
    group = SlotGroup(layers, slots=3, max_rank=4)
    pairs = [
        LoraModule(torch.ones(4, 8, device=device), torch.ones(6, 4, device=device), 4.0)
        for device in ("cpu", "meta")
    ]
    group.write(1, dict(zip(names, pairs, strict=True)), dict(zip(names, (1.0, 2.0), strict=True)))
    deltas = group.gather({1}, torch.arange(4, 8, device="meta"), torch.ones(4, 1, device="meta"), 1)
    assert deltas.keys() == set(names)


def test_a_write_that_failed_leaves_nothing_once_the_slot_is_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SlotGroup([BankLinear(nn.Linear(8, 6), "unet.attn.0", Current())], slots=3, max_rank=4)
    pair = LoraModule(torch.ones(4, 8), torch.ones(6, 4), 4.0)
    copy, calls = torch.Tensor.index_copy_, []

    def short_of_memory(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no more")
        return copy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "index_copy_", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            group.write(1, {"unet.attn.0": pair}, {"unet.attn.0": 1.0})
    assert group.A.any()
    group.erase(1)
    assert not group.A.any()
