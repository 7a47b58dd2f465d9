"""Adapter references as users write them: NAME[@STEP|@TAG|@vN@STEP][:WEIGHT]. Torch-free."""

from __future__ import annotations

import math
import re

from atelier_server.core import ADAPTER_NAME, AdapterRef

_STEP = re.compile(r"0|[1-9][0-9]{0,8}")
_TAG = re.compile(r"[a-z][a-z0-9-]{0,31}")
_FULL = re.compile(rf"v[1-9][0-9]{{0,8}}@({_STEP.pattern})")
_WEIGHT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SHOWN = 80


def parse_reference(text: str) -> AdapterRef:
    """The parts of `text`. Raises ValueError that says which part is wrong.

    A step is a decimal number without leading zeros, a tag a lower-case word such as `v2`; a step of
    another version than the newest is `v2@750`. A weight is a finite decimal number of any sign. Whether they
    exist is the store's business.
    """
    named, colon, weight = text.partition(":")
    name, at, selector = named.partition("@")
    if not ADAPTER_NAME.fullmatch(name):
        raise ValueError(
            f"adapter name {_shown(name)} does not match {ADAPTER_NAME.pattern}; "
            "a reference is NAME[@STEP|@TAG|@vN@STEP][:WEIGHT]"
        )
    if at and not any(kind.fullmatch(selector) for kind in (_STEP, _TAG, _FULL)):
        raise ValueError(
            f"{_shown(selector)} after @ is neither a step such as 750 nor a tag such as v2, nor v2@750"
        )
    return AdapterRef(name, selector, _weight(weight) if colon else 1.0)


def _weight(text: str) -> float:
    if not _WEIGHT.fullmatch(text):
        raise ValueError(f"weight {_shown(text)} is not a number such as 0.8")
    weight = float(text)
    if not math.isfinite(weight):
        raise ValueError(f"weight {_shown(text)} is too large")
    return weight


def _shown(text: str) -> str:
    """Quoted, and short enough for a message whatever the user sent."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
