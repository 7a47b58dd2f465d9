"""Where pictures become files, beside the steps: finished ones, and glances at those in the making."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from time import monotonic

import torch
from torch import Tensor

from atelier_server.core import BaseInfo, ImageFormat
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.images import encode_picture
from atelier_server.diffusion.outlook import LatentColours
from atelier_server.diffusion.trajectory import Trajectory
from atelier_server.engine.runner import Decoded, Took
from atelier_server.engine.scheduler import ImageTask
from atelier_server.errors import NonfiniteImage
from atelier_server.receipt import receipt

# Of large pictures a file takes longer than its decoding on a GPU, and the libraries let go of Python's lock.
_ENCODERS = min(4, os.cpu_count() or 1)


class Darkroom:
    """One thread decodes finished pictures, in the order in which they come; a few make files of them, in any
    order. One makes previews: one that comes while another is being made is dropped, they must not pile up.
    """

    def __init__(self, base: BaseModel, info: BaseInfo) -> None:
        self._base = base
        self._info = info
        self._colours = LatentColours.fit(base)
        cuda = base.device.type == "cuda"
        self._stream = torch.cuda.Stream(base.device) if cuda else None  # type: ignore[no-untyped-call]
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoder")
        self._encoder = ThreadPoolExecutor(max_workers=_ENCODERS, thread_name_prefix="encoder")
        self._previewer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="previewer")
        self._previewing: set[int] = set()  # by arrival

    def decode(
        self, task: ImageTask, latents: Tensor, done: Callable[[Decoded], None], *, tiled: bool
    ) -> Future[None]:
        """`done` is called from one of the threads, also with an error; the future ends with the decoding."""
        return self._decoder.submit(self._decode, task, latents, done, tiled)

    def preview(self, task: ImageTask, trajectory: Trajectory, done: Callable[[bytes], None]) -> None:
        """A small PNG of what the picture is going to be; `done` is called from the thread, if at all."""
        if task.arrival not in self._previewing and (outlook := trajectory.outlook) is not None:
            self._previewing.add(task.arrival)
            alphas, predicts = trajectory.scheduler.alphas_cumprod, trajectory.prediction_type

            def glance() -> None:
                try:
                    colours = self._colours.of(outlook.clean(alphas, predicts))
                    if bool(colours.isfinite().all()):
                        done(encode_picture(colours, ImageFormat.PNG, {}))
                finally:
                    self._previewing.discard(task.arrival)

            self._previewer.submit(glance)

    def _decode(self, task: ImageTask, latents: Tensor, done: Callable[[Decoded], None], tiled: bool) -> None:
        began = monotonic()
        try:
            with self._beside(latents):
                pixels = self._base.decode_latents(latents, tiled=tiled)
            if not bool(pixels.isfinite().all()):
                raise NonfiniteImage(
                    "the picture has values that are not finite: lower the guidance or weights"
                )
        except Exception as error:
            done(Decoded(b"", error=error))
        else:
            self._encoder.submit(self._encode, task, pixels, done, Took(began, monotonic()))

    def _encode(self, task: ImageTask, pixels: Tensor, done: Callable[[Decoded], None], decode: Took) -> None:
        began = monotonic()
        try:
            made = receipt(task.job, self._info, seed=task.seed, num_images=1, buckets=task.buckets)
            data = encode_picture(pixels, task.job.image_format, made.embedded())
        except Exception as error:
            done(Decoded(b"", error=error))
        else:
            done(Decoded(data, decode, Took(began, monotonic())))

    def _beside(self, latents: Tensor) -> AbstractContextManager[object]:
        """On a GPU a stream of its own: decoding does not hold up the next step, nor wait for it."""
        if self._stream is None:
            return nullcontext()
        latents.record_stream(self._stream)
        return torch.cuda.stream(self._stream)
