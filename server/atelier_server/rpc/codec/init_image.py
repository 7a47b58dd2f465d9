"""The pictures of a GenerateRequest: what they are for, and whether they fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import ceil

from atelier.v1 import generation_pb2 as pb
from atelier_server.core import BaseInfo, InitImage, steps_walked
from atelier_server.rpc.codec.checks import Checks
from atelier_server.rpc.pictures import Verdict

_HALF_BRIGHT = 128


def pictures_of(request: pb.GenerateRequest) -> dict[str, bytes]:
    """Field and file of the pictures to begin with."""
    fields = {"image": request.image, "mask_image": request.mask_image}
    return {field: data for field, data in fields.items() if data}


def decode_init(
    checks: Checks,
    request: pb.GenerateRequest,
    *,
    verdicts: Mapping[str, Verdict],
    base: BaseInfo,
    size: tuple[int, int],
    num_inference_steps: int,
) -> InitImage | None:
    """The picture to begin with, of `size` (width, height); None if there is none."""
    masked = bool(request.mask_image)
    if base.inpainting and not (request.image and masked):
        checks.refuse("mask_image", "this base is an inpainting model: it needs image and mask_image")
    if not request.image:
        if masked:
            checks.refuse("mask_image", "needs an image, parts of which it lets be painted anew")
        if request.HasField("strength"):
            checks.refuse("strength", "goes only with an image")
        return None
    strength = request.strength if request.HasField("strength") else (1.0 if masked else 0.8)
    checks.number("strength", strength, 0.0, 1.0, open_low=True)
    if not 0 < strength <= 1:
        strength = 1.0  # refused already; what follows needs one that makes sense
    elif num_inference_steps > 0 and not steps_walked(num_inference_steps, strength):
        checks.refuse(
            "strength",
            f"{strength:g} of {num_inference_steps} steps is less than one; "
            f"{ceil(1e6 / num_inference_steps) / 1e6:g} or more would take one",
        )
    for field in ("image", "mask_image"):
        if field in verdicts:
            fits(checks, field, verdicts[field], size)
    mask = verdicts.get("mask_image")
    if mask is not None and not mask.problem and mask.brightest < _HALF_BRIGHT:
        checks.refuse("mask_image", "is empty: paint white what is to be painted anew")
    return InitImage(
        image=request.image,
        image_sha256=hashlib.sha256(request.image).hexdigest(),
        strength=strength,
        mask=request.mask_image,
        mask_sha256=hashlib.sha256(request.mask_image).hexdigest() if masked else "",
    )


def fits(checks: Checks, field: str, verdict: Verdict, size: tuple[int, int]) -> None:
    """Refuses a picture that is broken, or not of `size` (width, height)."""
    if verdict.problem:
        checks.refuse(field, verdict.problem)
    elif (verdict.width, verdict.height) != size:
        width, height = size
        checks.refuse(field, f"is {verdict.width} x {verdict.height}; {width} x {height} would be right")
