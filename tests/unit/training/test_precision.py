"""What a training computes in, and what is refused."""

from __future__ import annotations

import pytest
import torch

from atelier_server.core import Recipe
from atelier_server.errors import InvalidRequest
from atelier_server.training.precision import Precision, precisions_on

CPU = torch.device("cpu")


def precision(asked: str, dtype: torch.dtype) -> Precision:
    return Precision.of(Recipe("otto", 64, mixed_precision=asked), CPU, dtype)


@pytest.mark.parametrize(
    ("asked", "dtype", "autocast", "scaled"),
    [
        ("", torch.float32, None, False),
        ("no", torch.float32, None, False),
        ("bf16", torch.float32, torch.bfloat16, False),
        ("fp16", torch.float32, torch.float16, True),
        ("", torch.bfloat16, None, False),
        ("bf16", torch.bfloat16, None, False),
        ("", torch.float16, None, True),
        ("fp16", torch.float16, None, True),
    ],
)
def test_autocast_is_what_the_base_is_not(
    asked: str, dtype: torch.dtype, autocast: torch.dtype | None, scaled: bool
) -> None:
    made = precision(asked, dtype)
    assert (made.autocast, made.scaled) == (autocast, scaled)
    layer = torch.nn.Linear(3, 3)
    with made.context():
        assert layer(torch.ones(1, 3)).dtype == (autocast or torch.float32)


@pytest.mark.parametrize(
    ("asked", "dtype"), [("no", torch.bfloat16), ("fp16", torch.bfloat16), ("bf16", torch.float16)]
)
def test_what_a_base_cannot_is_named(asked: str, dtype: torch.dtype) -> None:
    assert asked not in precisions_on(CPU, dtype)
    with pytest.raises(InvalidRequest, match=f"a base in {str(dtype)[6:]} trains in") as caught:
        precision(asked, dtype)
    assert caught.value.violations[0].field == "recipe.mixed_precision"
