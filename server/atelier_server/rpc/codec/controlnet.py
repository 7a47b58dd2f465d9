"""The ControlNets of a GenerateRequest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from atelier.v1 import generation_pb2 as pb
from atelier_server.core import BaseInfo
from atelier_server.guides import ControlUse
from atelier_server.rpc.codec.checks import Checks, shown
from atelier_server.rpc.codec.init_image import fits
from atelier_server.rpc.pictures import Verdict

_MAX_SCALE = 10.0
_MOST = 16


def control_pictures(request: pb.GenerateRequest) -> dict[str, bytes]:
    """Field and file of the pictures that guide, of as many as a request may have."""
    return {_image(i): one.image for i, one in enumerate(request.controlnets[:_MOST]) if one.image}


def decode_controlnets(
    checks: Checks,
    request: pb.GenerateRequest,
    *,
    verdicts: Mapping[str, Verdict],
    base: BaseInfo,
    size: tuple[int, int],
) -> tuple[ControlUse, ...]:
    """Those of the request, their pictures of `size` (width, height)."""
    loaded = {net.name: net for net in base.controlnets}
    uses: list[ControlUse] = []
    if len(request.controlnets) > _MOST:
        checks.refuse("controlnets", f"{len(request.controlnets)} are more than {_MOST}")
    for number, one in enumerate(request.controlnets[:_MOST]):
        field = f"controlnets[{number}]"
        if one.name not in loaded:
            known = ", ".join(loaded) or "none; `atelier serve --controlnet NAME=REF` loads one"
            checks.refuse(f"{field}.name", f"{shown(one.name)} is not loaded; loaded: {known}")
        elif one.name in {use.name for use in uses}:
            checks.refuse(f"{field}.name", f"{shown(one.name)} is there already; each guides once")
        if not one.image:
            checks.refuse(f"{field}.image", "is missing: the picture that guides")
        elif verdict := verdicts.get(_image(number)):
            fits(checks, _image(number), verdict, size)
        start = checks.number(f"{field}.start", one.start if one.HasField("start") else 0.0, 0.0, 1.0)
        end = checks.number(f"{field}.end", one.end if one.HasField("end") else 1.0, 0.0, 1.0)
        if start >= end:
            checks.refuse(f"{field}.end", f"{end:g} is not after start, {start:g}")
        scale = one.scale if one.HasField("scale") else 1.0
        uses.append(
            ControlUse(
                name=one.name,
                image=one.image,
                image_sha256=hashlib.sha256(one.image).hexdigest(),
                sha256=loaded[one.name].sha256 if one.name in loaded else "",
                scale=checks.number(f"{field}.scale", scale, 0.0, _MAX_SCALE),
                start=start,
                end=end,
            )
        )
    return tuple(uses)


def _image(number: int) -> str:
    return f"controlnets[{number}].image"
