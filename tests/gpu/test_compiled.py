"""Compiled for a GPU: the same numbers, and a hundred swaps that compile nothing again."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
import torch
from torch._dynamo.utils import counters

from atelier_server.adapters.bank import SlotBank
from atelier_server.core import ROW_BUCKETS
from atelier_server.diffusion.base import load_base
from atelier_server.diffusion.compiling import compile_blocks, eager
from tests.adapters import random_adapter
from tests.gpu.device import DEVICE

# Inductor warns of itself, and of TF32 that is off.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
Rows = list[list[tuple[int, float]]]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_hundred_swaps_compile_nothing() -> None:
    unet = load_base("pocket", DEVICE, "float32").unet
    bank, random = SlotBank(slots=4, max_rank=16), Random(0)
    bank.wrap(unet, "unet")
    compile_blocks(unet)

    @torch.no_grad()
    def forward(rows: Rows, side: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(rows) * side)
        latents = torch.randn(len(rows), 4, side, side, generator=generator).to(DEVICE)
        prompts = torch.randn(len(rows), 32, 128, generator=generator).to(DEVICE)
        with bank.use(bank.gather(rows) if any(rows) else None):
            return unet(latents, torch.tensor(500.0), prompts, return_dict=False)[0]  # type: ignore[no-any-return]

    adapters = [random_adapter(rank, rank=rank, alpha=4.0) for rank in (1, 4, 8, 16)]
    for slot, adapter in enumerate(adapters, start=1):
        bank.load(slot, adapter)
    for bucket in ROW_BUCKETS:
        for row in ([], [(1, 1.0)], [(2, 0.5), (4, 1.0)]):
            rows: Rows = [list(row) for _ in range(bucket)]
            with eager():
                plain = forward(rows, 16)
            torch.testing.assert_close(forward(rows, 16), plain, atol=1e-3, rtol=1e-3)
            forward(rows, 8)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for _ in range(100):
        slot = random.randint(1, 4)
        bank.load(slot, random.choice(adapters))
        rows = [[(random.randint(1, 4), random.random())] for _ in range(random.choice(ROW_BUCKETS))]
        forward([*rows[1:], [(slot, 1.0), (slot % 4 + 1, 0.5)]], random.choice((8, 16)))
    assert counters["stats"]["unique_graphs"] == graphs
