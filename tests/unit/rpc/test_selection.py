"""Adapters in a GenerateRequest: weights over the steps, pinned contents."""

from __future__ import annotations

import pytest

from atelier.v1.generation_pb2 import AdapterSelection, GenerateRequest
from atelier_server.config import Limits
from atelier_server.core import AdapterRef
from atelier_server.errors import InvalidRequest
from atelier_server.rpc.codec.generation import decode_generate
from atelier_server.rpc.pictures import Verdict
from tests.contract.fake_worker import BASE


def decoded(selection: AdapterSelection, **fields: object) -> AdapterRef:
    request = GenerateRequest(adapters=[selection], **fields)
    verdicts = {"image": Verdict("png", "", 64, 64, 255)} if request.image else {}
    (ref,) = decode_generate(request, Limits(), BASE, verdicts).refs
    return ref


def test_the_first_weight_stands_for_the_text_encoders() -> None:
    ref = decoded(AdapterSelection(adapter="otto@7", weights=[0.5, 1.0, -1.0]), num_inference_steps=3)
    assert (ref.selector, ref.weight, ref.weights) == ("7", 0.5, (0.5, 1.0, -1.0))


@pytest.mark.parametrize(
    ("selection", "fields", "told"),
    [
        ({"weights": [1, 2, 3]}, {"num_inference_steps": 2}, "weights: 3 weights are more than the 2 steps"),
        (
            {"weights": [1, 2, 3]},
            {"num_inference_steps": 4, "strength": 0.5, "image": b"x"},
            "weights: 3 weights are more than the 2 steps",
        ),
        ({"weights": [1, float("nan")]}, {}, "weights: has a weight that is not finite"),
        ({"adapter": "otto:0.5", "weights": [1]}, {}, "weights: 'otto:0.5' has a weight already"),
        ({"sha256": "beef"}, {}, "sha256: 'beef' is not a SHA-256 in 64 hex digits"),
    ],
)
def test_what_is_wrong_is_told(selection: dict, fields: dict, told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decoded(AdapterSelection(**({"adapter": "otto"} | selection)), **fields)
    assert f"adapters[0].{told}" in caught.value.message
