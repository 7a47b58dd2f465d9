"""ControlNets in a GenerateRequest: what fits, and what is said about what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from atelier.v1.generation_pb2 import ControlNetSelection, GenerateRequest
from atelier_server.config import Limits
from atelier_server.core import GenerationJob
from atelier_server.errors import InvalidRequest
from atelier_server.guides import ControlNetInfo
from atelier_server.receipt import receipt
from atelier_server.rpc.codec.controlnet import control_pictures
from atelier_server.rpc.codec.generation import decode_generate
from atelier_server.rpc.codec.init_image import pictures_of
from atelier_server.rpc.pictures import examine
from tests.contract.fake_worker import BASE
from tests.pictures import soft_colours

SERVED = replace(
    BASE, controlnets=(ControlNetInfo("canny", "someone/canny", "c0ffee"), ControlNetInfo("depth", "d", "d0"))
)


def decoded(*controlnets: ControlNetSelection, base: Any = SERVED, **fields: Any) -> GenerationJob:
    request = GenerateRequest(controlnets=controlnets, **fields)
    pictures = pictures_of(request) | control_pictures(request)
    verdicts = {field: examine(data, 10**6) for field, data in pictures.items()}
    return decode_generate(request, Limits(), base, verdicts).job


def refused(*controlnets: ControlNetSelection, base: Any = SERVED, **fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        decoded(*controlnets, base=base, **fields)
    return {violation.field: violation.description for violation in caught.value.violations}


def control(name: str = "canny", width: int = 96, height: int = 48, **fields: Any) -> ControlNetSelection:
    return ControlNetSelection(name=name, image=soft_colours(width, height), **fields)


def test_defaults_and_the_size_of_the_first() -> None:
    job = decoded(control(), control("depth", scale=0.0, start=0.25, end=0.5))
    assert (job.width, job.height) == (96, 48)
    first, second = job.controlnets
    assert (first.name, first.sha256) == ("canny", "c0ffee")
    assert (first.scale, first.start, first.end) == (1.0, 0.0, 1.0)
    assert (second.scale, second.start, second.end) == (0.0, 0.25, 0.5)
    assert decoded().controlnets == ()


def test_a_receipt_names_what_guided_and_a_finished_job_keeps_no_picture() -> None:
    job = decoded(control(scale=0.5))
    [use] = receipt(job, SERVED, seed=1, num_images=1, buckets=[2]).controlnets
    assert (use.name, use.sha256, use.scale) == ("canny", "c0ffee", 0.5)
    assert use.image_sha256 == job.controlnets[0].image_sha256
    assert job.controlnets[0].forgotten() == replace(job.controlnets[0], image=b"")


def test_pictures_of_another_size_are_refused_with_the_right_one() -> None:
    told = refused(control(), control("depth", 64, 64))
    assert told == {"controlnets[1].image": "is 64 x 64; 96 x 48 would be right"}
    told = refused(control(), image=soft_colours(64, 64))
    assert told == {"controlnets[0].image": "is 96 x 48; 64 x 64 would be right"}
    told = refused(control(width=67))
    assert told["controlnets[0].image"].startswith("its width 67 is no multiple of 8")
    assert decoded(control(), image=soft_colours(96, 48)).init is not None


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    told = refused(control("cany"))
    assert told == {"controlnets[0].name": "'cany' is not loaded; loaded: canny, depth"}
    told = refused(control(), base=BASE)
    hint = "loaded: none; `atelier serve --controlnet NAME=REF` loads one"
    assert told["controlnets[0].name"].endswith(hint)
    told = refused(control(), control())
    assert told == {"controlnets[1].name": "'canny' is there already; each guides once"}


def test_everything_that_is_wrong_is_told_at_once() -> None:
    told = refused(
        ControlNetSelection(name="canny", scale=-1.0),
        ControlNetSelection(name="depth", image=b"hello", start=0.5, end=0.5),
        ControlNetSelection(name="x", image=soft_colours(64, 48), scale=float("nan"), end=1.5),
    )
    assert told["controlnets[0].image"] == "is missing: the picture that guides"
    assert told["controlnets[0].scale"].startswith("-1.0 is not a finite number")
    assert told["controlnets[1].image"] == "is not a PNG, JPEG or WebP picture"
    assert told["controlnets[1].end"] == "0.5 is not after start, 0.5"
    assert {"controlnets[2].name", "controlnets[2].scale", "controlnets[2].end"} <= told.keys()


def test_no_more_pictures_are_looked_at_than_a_request_may_have() -> None:
    nets = [ControlNetSelection(name=f"n{number}", image=b"x") for number in range(1000)]
    assert len(control_pictures(GenerateRequest(controlnets=nets))) == 16
    refusals = refused(*nets)
    assert refusals["controlnets"] == "1000 are more than 16"
    assert len(refusals) == 1 + 2 * 16
