"""Adapters as a caller names them, with weights that may change over the steps.

NAME[@STEP|@TAG], then nothing, :WEIGHT, :FROM..TO (evenly over the steps of a picture), or :W0,W1,... (one a
step; the last one holds).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from atelier.v1 import generation_pb2

_RAMP = re.compile(r"([^:]*):([^.]*(?:\.[^.]+)?)\.\.(.+)")
# The contract's defaults, by which the steps of a ramp are counted.
_STEPS, _STRENGTH = 50, 0.8


def selection(reference: str, steps: int) -> generation_pb2.AdapterSelection:
    """The message for a reference; `steps` are a picture's. ValueError for a weight that is no number.

    A plain reference goes as it is: the server says what is wrong with it.
    """
    if ramp := _RAMP.fullmatch(reference):
        name, first, last = ramp[1], _number(reference, ramp[2]), _number(reference, ramp[3])
        spans = max(steps - 1, 1)
        weights = [first + (last - first) * step / spans for step in range(max(steps, 1))]
        return generation_pb2.AdapterSelection(adapter=name, weights=weights)
    name, _, listed = reference.partition(":")
    if "," in listed:
        weights = [_number(reference, weight) for weight in listed.split(",")]
        return generation_pb2.AdapterSelection(adapter=name, weights=weights)
    return generation_pb2.AdapterSelection(adapter=reference)


def steps_of(values: Mapping[str, object]) -> int:
    """How many steps a picture of a request takes, counted as the server does."""
    steps = values.get("num_inference_steps")
    count = steps if isinstance(steps, int) else _STEPS
    if not values.get("image"):
        return count
    strength = values.get("strength")
    default = 1.0 if values.get("mask_image") else _STRENGTH
    return min(int(count * (float(strength) if isinstance(strength, int | float) else default)), count)


def _number(reference: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"adapter {reference!r}: {text!r} is not a number; weights are :WEIGHT, :FROM..TO or :W0,W1,..."
        ) from None
