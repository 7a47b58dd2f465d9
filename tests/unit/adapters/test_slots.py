"""Slots of layers that are alike, on whatever device."""

from __future__ import annotations

import torch
from torch import nn

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
