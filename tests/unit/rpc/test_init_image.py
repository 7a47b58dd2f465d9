"""Pictures in a GenerateRequest: what fits, and what is said about what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atelier.v1.generation_pb2 import GenerateRequest
from atelier_server.config import Limits
from atelier_server.core import GenerationJob
from atelier_server.errors import InvalidRequest
from atelier_server.rpc.codec.generation import decode_generate
from atelier_server.rpc.codec.init_image import pictures_of
from atelier_server.rpc.pictures import examine
from tests.contract.fake_worker import BASE
from tests.pictures import png, right_part, soft_colours


def decoded(base: Any = BASE, **fields: Any) -> GenerationJob:
    request = GenerateRequest(**fields)
    verdicts = {field: examine(data, 10**6) for field, data in pictures_of(request).items()}
    return decode_generate(request, Limits(), base, verdicts).job


def refused(**fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        decoded(**fields)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_a_picture_gives_its_size_and_diffusers_defaults() -> None:
    job = decoded(image=soft_colours(96, 48))
    assert job.init is not None
    assert (job.width, job.height, job.init.strength, job.init.mask) == (96, 48, 0.8, b"")
    masked = decoded(image=soft_colours(), mask_image=right_part())
    assert masked.init is not None
    assert (masked.init.strength, len(masked.init.mask_sha256)) == (1.0, 64)
    assert decoded().init is None


def test_other_sizes_are_refused_with_the_right_one() -> None:
    told = refused(image=soft_colours(96, 48), width=64, height=64, mask_image=right_part(64, 32))
    assert told == {
        "image": "is 96 x 48; 64 x 64 would be right",
        "mask_image": "is 64 x 32; 64 x 64 would be right",
    }
    told = refused(image=soft_colours(67, 48))
    assert told["image"] == "its width 67 is no multiple of 8 between 8 and 2048; 64 is"


def test_an_empty_mask_and_one_without_a_picture_are_refused() -> None:
    black = png(np.full((64, 64), 127))
    assert "is empty" in refused(image=soft_colours(), mask_image=black)["mask_image"]
    assert "needs an image" in refused(mask_image=right_part())["mask_image"]
    assert "goes only with an image" in refused(strength=0.5)["strength"]


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, float("nan")])
def test_strength_lies_between_nothing_and_one(strength: float) -> None:
    assert "is not a finite number above 0" in refused(image=soft_colours(), strength=strength)["strength"]


def test_a_strength_of_no_step_at_all_is_refused() -> None:
    told = refused(image=soft_colours(), strength=0.1, num_inference_steps=8)
    assert told["strength"] == "0.1 of 8 steps is less than one; 0.125 or more would take one"


def test_what_is_no_picture_is_told_by_its_field() -> None:
    assert refused(image=b"GIF89a", mask_image=b"x") == {
        "image": "is not a PNG, JPEG or WebP picture",
        "mask_image": "is not a PNG, JPEG or WebP picture",
    }


def test_an_inpainting_model_needs_both() -> None:
    base = replace(BASE, inpainting=True)
    for fields in ({}, {"image": soft_colours()}):
        with pytest.raises(InvalidRequest, match="inpainting model: it needs image and mask_image"):
            decoded(base, **fields)
    assert decoded(base, image=soft_colours(), mask_image=right_part()).init


@pytest.mark.parametrize("steps", [2, 3, 7, 50, 77, 173, 200])
def test_the_strength_that_is_proposed_is_enough(steps: int) -> None:
    told = refused(image=soft_colours(), strength=0.1 / steps, num_inference_steps=steps)["strength"]
    proposed = float(told.split("; ")[1].split()[0])
    job = decoded(image=soft_colours(), strength=proposed, num_inference_steps=steps)
    assert job.steps == 1
