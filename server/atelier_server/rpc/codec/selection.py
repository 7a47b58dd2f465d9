"""The adapters of a GenerateRequest."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from atelier.v1 import generation_pb2 as pb
from atelier_server.config import Limits
from atelier_server.core import AdapterRef
from atelier_server.rpc.codec.checks import Checks, shown


def decode_adapters(
    checks: Checks, request: pb.GenerateRequest, limits: Limits, steps: int
) -> tuple[AdapterRef, ...]:
    """Those that are right; `steps` are what a picture takes."""
    most = limits.max_adapters_per_image
    if len(request.adapters) > most:
        checks.refuse("adapters", f"{len(request.adapters)} adapters are more than {most}")
    refs = (
        _decode(checks, f"adapters[{i}]", selection, steps)
        for i, selection in enumerate(request.adapters[:most])
    )
    return tuple(ref for ref in refs if ref)


def _decode(checks: Checks, field: str, selection: pb.AdapterSelection, steps: int) -> AdapterRef | None:
    ref = checks.reference(f"{field}.adapter", selection.adapter, weight=True)
    weights = tuple(selection.weights)
    if weights and ":" in selection.adapter:
        checks.refuse(f"{field}.weights", f"{shown(selection.adapter)} has a weight already")
    if len(weights) > steps:
        checks.refuse(f"{field}.weights", f"{len(weights)} weights are more than the {steps} steps")
    if not all(math.isfinite(weight) for weight in weights):
        checks.refuse(f"{field}.weights", "has a weight that is not finite")
    if selection.sha256 and not re.fullmatch("[0-9a-f]{64}", selection.sha256):
        checks.refuse(f"{field}.sha256", f"{shown(selection.sha256)} is not a SHA-256 in 64 hex digits")
    if ref is None:
        return None
    if weights:
        ref = replace(ref, weight=weights[0], weights=weights)
    return replace(ref, sha256=selection.sha256)
