"""Adapters as a caller names them, with weights that may change over the steps.

NAME[@STEP|@TAG|@vN@STEP], then nothing, :WEIGHT, :FROM..TO (evenly over the steps of a picture), or
:W0,W1,... (one a step; the last one holds).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TypeAlias

from atelier.v1 import generation_pb2

_RAMP = re.compile(r"([^:]*):([^.]*(?:\.[^.]+)?)\.\.(.+)")
# The contract's defaults, by which the steps of a ramp are counted.
_STEPS, _STRENGTH = 50, 0.8


@dataclass(frozen=True, slots=True)
class Selection:
    """An adapter: NAME[@STEP|@TAG|@vN@STEP][:WEIGHT], or without :WEIGHT and with `weights`, one a step.

    `sha256` pins the checkpoint, whatever version and step it is of.
    """

    adapter: str
    weights: Sequence[float] = ()
    sha256: str = ""

    @classmethod
    def of(cls, reference: str, steps: int) -> Selection:
        """As text; `steps` are a picture's. ValueError for a weight that is no number.

        A plain reference stays as it is: the server says what is wrong with it.
        """
        if ramp := _RAMP.fullmatch(reference):
            name, first, last = ramp[1], _number(reference, ramp[2]), _number(reference, ramp[3])
            spans = max(steps - 1, 1)
            return cls(name, [first + (last - first) * step / spans for step in range(max(steps, 1))])
        name, _, listed = reference.partition(":")
        if "," in listed:
            return cls(name, [_number(reference, weight) for weight in listed.split(",")])
        return cls(reference)

    def message(self) -> generation_pb2.AdapterSelection:
        return generation_pb2.AdapterSelection(adapter=self.adapter, weights=self.weights, sha256=self.sha256)


Adapters: TypeAlias = str | Selection | Sequence[str | Selection]


def steps_of(values: Mapping[str, object]) -> int:
    """How many steps a picture of a request takes, counted as the server does."""
    steps = values.get("num_inference_steps")
    count = steps if isinstance(steps, int) else _STEPS
    if not values.get("image"):
        return count
    strength = values.get("strength")
    default = 1.0 if values.get("mask_image") else _STRENGTH
    share = float(strength) if isinstance(strength, int | float) else default
    return min(int(count * share), count) if isfinite(share) else count  # the server tells what is wrong


def _number(reference: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"adapter {reference!r}: {text!r} is not a number; weights are :WEIGHT, :FROM..TO or :W0,W1,..."
        ) from None
