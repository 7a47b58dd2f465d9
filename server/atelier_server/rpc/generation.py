"""GenerationService: decode, admit, iterate, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

from atelier.v1 import generation_pb2 as pb
from atelier.v1 import generation_pb2_grpc
from atelier_server.config import Limits
from atelier_server.errors import DeadlineTooShort
from atelier_server.jobs.dispatch import WorkerStatus
from atelier_server.jobs.generations import Generations
from atelier_server.jobs.wardrobe import Wardrobe
from atelier_server.rpc import caller
from atelier_server.rpc.codec.controlnet import control_pictures
from atelier_server.rpc.codec.generated import encode_event
from atelier_server.rpc.codec.generation import decode_generate
from atelier_server.rpc.codec.init_image import pictures_of
from atelier_server.rpc.interceptors import Context, on_end
from atelier_server.rpc.pictures import PictureCheck


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(
        self, generations: Generations, wardrobe: Wardrobe, status: WorkerStatus, limits: Limits
    ) -> None:
        self._generations = generations
        self._wardrobe = wardrobe
        self._status = status
        self._limits = limits
        self._pictures = PictureCheck(limits.max_image_pixels, limits.max_image_bytes)

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        base = self._status.known_base()
        pictures = await self._pictures.check_all(pictures_of(request) | control_pictures(request))
        draft = decode_generate(request, self._limits, base, pictures)
        # A known request is joined as it is, even where its adapter has been replaced since.
        reader = self._generations.join(draft.request_id, draft.body_hash)
        if reader is None:
            adapters = await self._wardrobe.use(draft.refs)
            job = replace(draft.job, adapters=adapters, client=_client(context))
            self._status.check_memory(job)
            _check_deadline(context.time_remaining(), self._status.least_seconds(job))
            reader = self._generations.admit(job, draft.request_id, draft.body_hash, caller.tenant())
        # Both: a stream that is dropped between two messages is noticed only by the callback.
        on_end(context, reader.close)
        try:
            async for event in reader.events():
                for message in encode_event(event, reader.generation, base):
                    yield message
        finally:
            reader.close()


def _client(context: Context) -> str:
    """Who shares the device fairly with others: a tenant, or the host of a connection where there are none.

    ipv4:192.0.2.1:50123 without the port: a host's connections are one client.
    """
    return caller.scope().tenant or context.peer().rpartition(":")[0]


def _check_deadline(remaining: float | None, least: float) -> None:
    """Raises DeadlineTooShort before anything is done for a call that cannot be in time."""
    if remaining is not None and remaining < least:
        raise DeadlineTooShort(
            f"the deadline is in {remaining:.2f} s, and this takes at least {least:.2f} s",
            {"least_seconds": f"{least:.2f}"},
        )
