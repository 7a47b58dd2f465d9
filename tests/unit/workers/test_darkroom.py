"""Where pictures become files: a slow file holds up neither the next picture nor its file."""

from __future__ import annotations

from queue import SimpleQueue
from threading import Barrier
from typing import Any

import pytest
import torch

from atelier_server.core import GenerationJob, Mode
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.engine.runner import Decoded
from atelier_server.engine.scheduler import ImageTask
from atelier_server.errors import NonfiniteImage
from atelier_server.workers import darkroom, device

SECONDS = 60.0


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base("pocket", "cpu", "float32")


def task(seed: int) -> ImageTask:
    job = GenerationJob(
        id=f"job-{seed}",
        prompt="a beach",
        negative_prompt="",
        adapters=(),
        seed=seed,
        num_images=1,
        num_inference_steps=4,
        guidance_scale=1.0,
        scheduler="ddim",
        width=64,
        height=64,
        mode=Mode.FAST,
        bucket=0,
    )
    return ImageTask(job=job, index=0, arrival=seed)


def decoded(base: BaseModel, *latents: torch.Tensor) -> list[Decoded]:
    room = darkroom.Darkroom(base, device.describe(base, "v_prediction"))
    done: SimpleQueue[Decoded] = SimpleQueue()
    for number, latent in enumerate(latents):
        room.decode(task(number), latent, done.put, tiled=False)
    return [done.get(timeout=SECONDS) for _ in latents]


def test_two_files_are_made_at_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    both, encode = Barrier(2), darkroom.encode_picture

    def met(*arguments: Any) -> bytes:
        both.wait(SECONDS)  # for the other file: in one thread neither would come
        return encode(*arguments)

    monkeypatch.setattr(darkroom, "_ENCODERS", 2)
    monkeypatch.setattr(darkroom, "encode_picture", met)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = decoded(base, *noise)
    assert not any(picture.error for picture in pictures)
    assert len({picture.data for picture in pictures}) == 2
    assert all(
        0 < picture.decode.ended <= picture.encode.began < picture.encode.ended for picture in pictures
    )


def test_what_goes_wrong_is_told_in_the_pictures_place(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: Any) -> bytes:
        raise OSError("no codec")

    (broken,) = decoded(base, torch.full((4, 16, 16), torch.nan))
    assert isinstance(broken.error, NonfiniteImage)
    monkeypatch.setattr(darkroom, "encode_picture", fails)
    (unmade,) = decoded(base, torch.zeros(4, 16, 16))
    assert isinstance(unmade.error, OSError)
