"""Compiled blocks: the same numbers, and nothing compiled again whatever the rows carry."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
import torch
import torch._dynamo
from diffusers import UNet2DConditionModel
from torch._dynamo.testing import CompileCounterWithBackend

from atelier_server import pocket
from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import blank
from atelier_server.diffusion.compiling import compile_blocks, eager
from tests.adapters import random_adapter

Rows = list[list[tuple[int, float]]]


class Compiled:
    """Pocket's U-Net with compiled blocks in a bank: really traced, and the graphs run eagerly."""

    def __init__(self) -> None:
        self.counter = CompileCounterWithBackend("eager")
        self.unet = UNet2DConditionModel.from_pretrained(pocket.path(), subfolder="unet", dtype=torch.float32)
        self.bank = SlotBank(slots=4, max_rank=16)
        self.bank.wrap(self.unet, "unet")
        compile_blocks(self.unet, backend=self.counter)

    def forward(self, rows: Rows, side: int = 16) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(rows) * side)
        latents = torch.randn(len(rows), 4, side, side, generator=generator)
        prompts = torch.randn(len(rows), 32, 128, generator=generator)
        active = self.bank.gather(rows) if any(rows) else None
        with torch.no_grad(), self.bank.use(active):
            return self.unet(latents, torch.tensor(500.0), prompts, return_dict=False)[0]  # type: ignore[no-any-return]


@pytest.fixture
def compiled() -> Iterator[Compiled]:
    torch._dynamo.reset()
    yield Compiled()
    torch._dynamo.reset()


def test_swaps_buckets_and_sizes_compile_nothing_again(compiled: Compiled) -> None:
    for slot, rank in enumerate((4, 8, 16, 16), start=1):
        compiled.bank.load(slot, random_adapter(slot, rank=rank, alpha=4.0))
    seen: list[tuple[Rows, int]] = [
        ([[]] * 2, 16),
        ([[(1, 1.0)]] * 4, 16),
        ([[(2, 0.5), (3, 1.0)]] * 8, 8),
    ]
    for rows, side in seen:
        with eager():
            plain = compiled.forward(rows, side)
        torch.testing.assert_close(compiled.forward(rows, side), plain, atol=1e-5, rtol=0)
    graphs = compiled.counter.frame_count
    assert graphs < 3 * len(seen)
    random = Random(0)
    for _ in range(20):
        slot = random.randint(1, 4)
        compiled.bank.load(
            slot, random_adapter(random.randint(0, 5), rank=random.choice((1, 4, 16)), alpha=1.0)
        )
        rows = [[(random.randint(1, 4), random.random())] for _ in range(random.choice((2, 4, 8)))]
        compiled.forward([*rows[1:], []], random.choice((8, 16)))
    assert compiled.counter.frame_count == graphs


def test_what_is_compiled_ahead_is_what_the_first_adapter_needs(compiled: Compiled) -> None:
    compiled.bank.load(1, blank(compiled.bank.shapes))
    compiled.forward([[]] * 2)
    compiled.forward([[(1, 1.0)]] * 2)
    compiled.bank.clear(1)
    compiled.bank.load(1, random_adapter(1, rank=16, alpha=16.0))
    graphs = compiled.counter.frame_count
    compiled.forward([[(1, 1.0)]] * 2)
    assert compiled.counter.frame_count == graphs
