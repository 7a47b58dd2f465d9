"""TrainingService: decode, receive, accept, watch, encode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from atelier.v1 import training_pb2 as pb
from atelier.v1 import training_pb2_grpc
from atelier_server.config import Limits
from atelier_server.errors import AtelierError, InvalidRequest, Violation
from atelier_server.jobs.dispatch import WorkerStatus
from atelier_server.jobs.records import Sampled, TrainingDraft, TrainingRecord
from atelier_server.jobs.trainings import Trainings
from atelier_server.jobs.uploads import Uploads
from atelier_server.rpc import caller
from atelier_server.rpc.codec import pages
from atelier_server.rpc.codec.checks import Checks
from atelier_server.rpc.codec.training import decode_start, decode_training, encode_event, encode_training
from atelier_server.rpc.interceptors import Context, on_end
from atelier_server.rpc.pictures import PictureCheck
from atelier_server.rpc.receive import PictureReader
from atelier_server.rpc.remarks import check_pictures, remarks

_log = logging.getLogger(__name__)
# A message may have 4 MiB in all; a sample beyond that is told without its picture.
_MOST_SAMPLE_BYTES = 4 * 2**20 - 64 * 2**10


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    def __init__(self, trainings: Trainings, uploads: Uploads, status: WorkerStatus, limits: Limits) -> None:
        self._trainings = trainings
        self._uploads = uploads
        self._status = status
        self._limits = limits
        self._pictures = PictureCheck(limits.max_image_pixels, limits.max_image_bytes)
        self._cancellations: set[asyncio.Task[None]] = set()

    async def Train(
        self, request_iterator: AsyncIterator[pb.TrainRequest], context: Context
    ) -> AsyncIterator[pb.TrainResponse]:
        start = await self._start(request_iterator)
        draft = decode_start(start, self._limits, self._status.known_base())
        with self._uploads.turn(caller.tenant().name):
            record = await self._receive(draft, request_iterator)
        if start.cancel_on_disconnect:
            on_end(context, lambda: self._cancel_unfinished(record.id))
        async with aclosing(self._events(record.id, 0)) as events:
            async for event in events:
                yield pb.TrainResponse(event=event)

    async def WatchTraining(
        self, request: pb.WatchTrainingRequest, context: Context
    ) -> AsyncIterator[pb.WatchTrainingResponse]:
        if request.after_seq < 0:
            raise InvalidRequest.of([Violation("after_seq", f"{request.after_seq} is negative")])
        record = await self._trainings.find(decode_training(request.training))
        async with aclosing(self._events(record.id, request.after_seq)) as events:
            async for event in events:
                yield pb.WatchTrainingResponse(event=event)

    async def GetTraining(self, request: pb.GetTrainingRequest, context: Context) -> pb.GetTrainingResponse:
        record = await self._trainings.find(decode_training(request.training))
        bases = await asyncio.to_thread(self._trainings.log.bases, record.id)
        return pb.GetTrainingResponse(training=encode_training(record, bases))

    async def ListTrainings(
        self, request: pb.ListTrainingsRequest, context: Context
    ) -> pb.ListTrainingsResponse:
        checks = Checks()
        size = pages.page_size(checks, request.page_size)
        key = pages.page_key(checks, "trainings", request.page_token, (int,))
        checks.done()
        records = await self._trainings.page(caller.scope(), key[0] if key else None, size + 1)
        more = len(records) > size
        return pb.ListTrainingsResponse(
            trainings=[encode_training(record) for record in records[:size]],
            next_page_token=pages.page_token("trainings", [records[size - 1].number]) if more else "",
        )

    async def CancelTraining(
        self, request: pb.CancelTrainingRequest, context: Context
    ) -> pb.CancelTrainingResponse:
        record = await self._trainings.cancel(decode_training(request.training))
        return pb.CancelTrainingResponse(training=encode_training(record))

    async def PauseTraining(
        self, request: pb.PauseTrainingRequest, context: Context
    ) -> pb.PauseTrainingResponse:
        record = await self._trainings.pause(decode_training(request.training))
        return pb.PauseTrainingResponse(training=encode_training(record))

    async def ResumeTraining(
        self, request: pb.ResumeTrainingRequest, context: Context
    ) -> pb.ResumeTrainingResponse:
        record = await self._trainings.resume(decode_training(request.training))
        return pb.ResumeTrainingResponse(training=encode_training(record))

    async def DeleteTraining(
        self, request: pb.DeleteTrainingRequest, context: Context
    ) -> pb.DeleteTrainingResponse:
        await self._trainings.delete(decode_training(request.training))
        return pb.DeleteTrainingResponse()

    async def _start(self, stream: AsyncIterator[pb.TrainRequest]) -> pb.TrainRequest.Start:
        first = await anext(aiter(stream), None)
        if first is None or first.WhichOneof("payload") != "start":
            raise InvalidRequest.of([Violation("start", "must be the first message")])
        return first.start

    async def _receive(self, draft: TrainingDraft, stream: AsyncIterator[pb.TrainRequest]) -> TrainingRecord:
        """The training that this request makes, or has made already."""
        known = await self._trainings.check(draft, caller.tenant())
        upload = self._uploads.pictures()
        reader = PictureReader(upload, draft.num_images, self._limits, self._pictures)
        try:
            await reader.read(stream, optional=known is not None)
            if known is not None:
                self._trainings.same_pictures(known, upload)
                return known
            check_pictures(draft.recipe, reader.received)
            draft = replace(draft, warnings=remarks(draft.recipe, reader.received))
            base = self._status.known_base()
            return await self._trainings.accept(draft, upload, base, caller.tenant())
        finally:
            await upload.discard()

    async def _events(self, training: str, after_seq: int) -> AsyncGenerator[pb.TrainingEvent, None]:
        async with aclosing(self._trainings.watch(training, after_seq)) as events:
            async for event in events:
                picture = b""
                if isinstance(event.payload, Sampled):
                    picture = await self._trainings.log.sample(training, event.payload)
                yield encode_event(event, picture if len(picture) <= _MOST_SAMPLE_BYTES else b"")

    def _cancel_unfinished(self, training: str) -> None:
        """The stream has ended, perhaps because the training has: then there is nothing to cancel."""
        if self._trainings.draining:
            return
        task = asyncio.create_task(self._cancel(training))
        self._cancellations.add(task)
        task.add_done_callback(self._cancellations.discard)

    async def _cancel(self, training: str) -> None:
        try:
            await self._trainings.cancel(training)
        except AtelierError as error:
            _log.info("training %s was not cancelled: %s", training, error.message)
