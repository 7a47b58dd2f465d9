"""What is added to one layer: against the merged weights, and the same bits whatever pads the ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atelier_server.adapters.layers import RowDelta

ROWS, RANK = 4, 8


@pytest.mark.parametrize("width", [24, 40, 320])
@pytest.mark.parametrize("tokens", [(), (1,), (2,), (3,), (77,), (2, 5)])
def test_a_rows_change_is_b_a_x_whatever_pads_its_ranks(width: int, tokens: tuple[int, ...]) -> None:
    noise = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, base = noise(ROWS, *tokens, width), noise(ROWS, *tokens, width)
    a, bt = noise(ROWS, RANK, width), noise(ROWS, RANK, width)
    found = [_padded(a, bt, packed).linear(x, base.clone()) for packed in (16, 32, 64, 128)]
    expected = torch.stack([base[row] + F.linear(F.linear(x[row], a[row]), bt[row].T) for row in range(ROWS)])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(found[0], other) for other in found[1:])


def _padded(a: Tensor, bt: Tensor, packed: int) -> RowDelta:
    room = packed - RANK
    return RowDelta(F.pad(a, (0, 0, 0, room)), F.pad(bt, (0, 0, 0, room)))
