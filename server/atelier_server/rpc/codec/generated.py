"""Events of a generation to GenerateResponse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from atelier.v1 import generation_pb2 as pb
from atelier_server.core import BaseInfo, Mode
from atelier_server.jobs.generation import Generation, StreamEvent
from atelier_server.messages import GenerationCompleted, ImageReady, PreviewReady, Progress, Queued
from atelier_server.receipt import Receipt, receipt
from atelier_server.rpc.codec.times import timestamp

CHUNK_BYTES = 2**20
# Fields of a receipt that are not plain scalars.
_WRITTEN = {"adapters", "batch_buckets", "controlnets", "reproducibility", "versions"}


def encode_event(event: StreamEvent, generation: Generation, base: BaseInfo) -> Iterator[pb.GenerateResponse]:
    """One message, or the chunks of one picture in order."""
    match event:
        case Queued():
            yield pb.GenerateResponse(queued=pb.GenerateResponse.Queued(position=event.position))
        case Progress():
            yield pb.GenerateResponse(
                progress=pb.GenerateResponse.Progress(step=event.step, total=event.total)
            )
        case PreviewReady():
            yield pb.GenerateResponse(
                preview=pb.GenerateResponse.Preview(
                    index=event.index, step=event.step, mime_type=event.mime_type, data=event.data
                )
            )
        case ImageReady():
            yield from _chunks(event)
        case GenerationCompleted():
            yield pb.GenerateResponse(completed=_completed(event, generation, base))


def _chunks(image: ImageReady) -> Iterator[pb.GenerateResponse]:
    size = len(image.data)
    for offset in range(0, max(size, 1), CHUNK_BYTES):
        end = min(offset + CHUNK_BYTES, size)
        yield pb.GenerateResponse(
            image=pb.GenerateResponse.Image(
                index=image.index,
                mime_type=image.mime_type,
                data=image.data[offset:end],
                offset=offset,
                size=size,
                last=end == size,
                seed=image.seed,
            )
        )


def _completed(
    event: GenerationCompleted, generation: Generation, base: BaseInfo
) -> pb.GenerateResponse.Completed:
    timings, job = event.timings, generation.job
    made = receipt(job, base, seed=job.seed, num_images=job.num_images, buckets=(event.bucket,))
    return pb.GenerateResponse.Completed(
        seed=job.seed,
        timings=pb.Timings(
            queue_seconds=timings.queue_seconds,
            encode_seconds=timings.encode_seconds,
            denoise_seconds=timings.denoise_seconds,
            decode_seconds=timings.decode_seconds + timings.image_encode_seconds,
            total_seconds=timings.total_seconds,
            restarts=generation.losses,
        ),
        batch_bucket=event.bucket,
        receipt=_receipt(made, generation.end_time),
    )


def _receipt(made: Receipt, end_time: float) -> pb.Receipt:
    """Field by field by name."""
    strict = made.reproducibility is Mode.STRICT
    message = pb.Receipt(
        adapters=[
            pb.Receipt.Adapter(**{field.name: getattr(adapter, field.name) for field in fields(adapter)})
            for adapter in made.adapters
        ],
        controlnets=[
            pb.Receipt.ControlNet(**{field.name: getattr(use, field.name) for field in fields(use)})
            for use in made.controlnets
        ],
        reproducibility=pb.REPRODUCIBILITY_STRICT if strict else pb.REPRODUCIBILITY_FAST,
        versions=made.versions,
        batch_buckets=made.batch_buckets,
        create_time=timestamp(end_time),
    )
    for field in fields(made):
        value = getattr(made, field.name)
        if field.name not in _WRITTEN and value is not None:
            setattr(message, field.name, value)
    return message
