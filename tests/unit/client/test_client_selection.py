"""Adapters with weights that change over the steps, as callers write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier import Selection, codec


def weights(reference: str, **fields: object) -> list[float]:
    (chosen,) = codec.generate_request("x", reference, None, fields).adapters
    assert chosen.adapter == reference.partition(":")[0]
    return [round(weight, 6) for weight in chosen.weights]


def test_a_ramp_has_a_weight_a_step() -> None:
    assert weights("otto:1.0..0.2", num_inference_steps=5) == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert weights("otto@v2:-1..1", num_inference_steps=3) == [-1.0, 0.0, 1.0]
    assert weights("otto:1..0", num_inference_steps=1) == [1.0]
    assert len(weights("otto:1..0")) == 50


def test_a_ramp_counts_the_steps_that_are_taken() -> None:
    assert len(weights("otto:1..0", image=b"x", strength=0.5, num_inference_steps=10)) == 5
    assert len(weights("otto:1..0", image=b"x", num_inference_steps=10)) == 8
    assert len(weights("otto:1..0", image=b"x", mask_image=b"y", num_inference_steps=10)) == 10


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_the_servers_to_refuse(strength: float) -> None:
    assert len(weights("otto:1..0", image=b"x", strength=strength, num_inference_steps=10)) == 10


def test_a_list_is_taken_as_it_is() -> None:
    assert weights("otto:1,.5,-2") == [1.0, 0.5, -2.0]


@pytest.mark.parametrize("reference", ["otto:1..x", "otto:1,,2", "otto:..1"])
def test_what_is_no_number_is_named(reference: str) -> None:
    with pytest.raises(ValueError, match="is not a number; weights are"):
        codec.generate_request("x", reference, None, {})


@given(st.text(max_size=20))
def test_anything_else_is_the_servers_to_judge(reference: str) -> None:
    try:
        chosen = Selection.of(reference, 4)
    except ValueError:
        return
    assert chosen.adapter == reference or chosen.weights
