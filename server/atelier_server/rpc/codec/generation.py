"""GenerateRequest to GenerationJob, events to GenerateResponse."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

from atelier.v1 import generation_pb2 as pb
from atelier_server.config import Limits
from atelier_server.core import (
    ROW_BUCKETS,
    SCHEDULERS,
    AdapterRef,
    BaseInfo,
    GenerationJob,
    ImageFormat,
    Mode,
)
from atelier_server.jobs.generation import Generation, StreamEvent
from atelier_server.messages import GenerationCompleted, ImageReady, Progress, Queued
from atelier_server.rpc.codec.checks import Checks
from atelier_server.rpc.codec.times import timestamp

CHUNK_BYTES = 2**20
_MAX_GUIDANCE = 100.0
_DEFAULT_BUCKET = 8
_MODES = {
    pb.REPRODUCIBILITY_UNSPECIFIED: Mode.FAST,
    pb.REPRODUCIBILITY_FAST: Mode.FAST,
    pb.REPRODUCIBILITY_STRICT: Mode.STRICT,
}
_FORMATS = {
    pb.IMAGE_FORMAT_UNSPECIFIED: ImageFormat.PNG,
    pb.IMAGE_FORMAT_PNG: ImageFormat.PNG,
    pb.IMAGE_FORMAT_JPEG: ImageFormat.JPEG,
    pb.IMAGE_FORMAT_WEBP: ImageFormat.WEBP,
}


@dataclass(frozen=True, slots=True)
class GenerationDraft:
    """A valid request whose adapters have not been looked up: `job.adapters` is empty, `refs` names them."""

    request_id: str
    body_hash: str
    job: GenerationJob
    refs: tuple[AdapterRef, ...]


def decode_generate(request: pb.GenerateRequest, limits: Limits, base: BaseInfo) -> GenerationDraft:
    """Fills in every default. Raises InvalidRequest with every violation."""
    checks = Checks()
    request_id = checks.request_id("request_id", request.request_id)
    num_images = request.num_images if request.HasField("num_images") else 1
    steps = request.num_inference_steps if request.HasField("num_inference_steps") else 50
    guidance = request.guidance_scale if request.HasField("guidance_scale") else 7.5
    mode, bucket = _reproducibility(checks, request)
    if request.image_format not in _FORMATS:
        checks.refuse("image_format", f"{request.image_format} is no ImageFormat")
    if len(request.adapters) > limits.max_adapters_per_image:
        checks.refuse(
            "adapters", f"{len(request.adapters)} adapters are more than {limits.max_adapters_per_image}"
        )
    refs = [
        checks.reference(f"adapters[{i}].adapter", selection.adapter, weight=True)
        for i, selection in enumerate(request.adapters[: limits.max_adapters_per_image])
    ]
    seed = request.seed if request.HasField("seed") else secrets.randbelow(2**32)
    if seed + max(num_images, 1) - 1 >= 2**64:
        checks.refuse("seed", f"{seed} + num_images - 1 does not fit into 64 bits")
    job = GenerationJob(
        id=uuid.uuid4().hex,
        prompt=checks.text("prompt", request.prompt, limits.max_prompt_characters),
        negative_prompt=checks.text("negative_prompt", request.negative_prompt, limits.max_prompt_characters),
        adapters=(),
        seed=seed,
        num_images=checks.integer("num_images", num_images, 1, limits.max_num_images),
        num_inference_steps=checks.integer("num_inference_steps", steps, 1, limits.max_inference_steps),
        guidance_scale=checks.number("guidance_scale", guidance, 0.0, _MAX_GUIDANCE),
        scheduler=checks.choice("scheduler", request.scheduler, SCHEDULERS)
        if request.HasField("scheduler")
        else base.default_scheduler,
        width=checks.size("width", request.width, limits.max_width)
        if request.HasField("width")
        else base.native_width,
        height=checks.size("height", request.height, limits.max_height)
        if request.HasField("height")
        else base.native_height,
        mode=mode,
        bucket=bucket,
        image_format=_FORMATS.get(request.image_format, ImageFormat.PNG),
    )
    checks.done()
    return GenerationDraft(request_id, _body_hash(request), job, tuple(ref for ref in refs if ref))


def _reproducibility(checks: Checks, request: pb.GenerateRequest) -> tuple[Mode, int]:
    if request.reproducibility not in _MODES:
        checks.refuse("reproducibility", f"{request.reproducibility} is no Reproducibility")
    mode = _MODES.get(request.reproducibility, Mode.FAST)
    if not request.HasField("batch_bucket"):
        return mode, _DEFAULT_BUCKET if mode is Mode.STRICT else 0
    if mode is Mode.FAST:
        checks.refuse("batch_bucket", "goes only with REPRODUCIBILITY_STRICT")
    if request.batch_bucket not in ROW_BUCKETS:
        checks.refuse("batch_bucket", f"{request.batch_bucket} is none of {', '.join(map(str, ROW_BUCKETS))}")
    return mode, request.batch_bucket


def _body_hash(request: pb.GenerateRequest) -> str:
    body = pb.GenerateRequest()
    body.CopyFrom(request)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()


# ----------------------------------------------------------------------------------------------- events
def encode_event(event: StreamEvent, generation: Generation, base: BaseInfo) -> Iterator[pb.GenerateResponse]:
    """One message, or the chunks of one picture in order."""
    match event:
        case Queued():
            yield pb.GenerateResponse(queued=pb.GenerateResponse.Queued(position=event.position))
        case Progress():
            yield pb.GenerateResponse(
                progress=pb.GenerateResponse.Progress(step=event.step, total=event.total)
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
    timings = event.timings
    return pb.GenerateResponse.Completed(
        seed=generation.job.seed,
        timings=pb.Timings(
            queue_seconds=timings.queue_seconds,
            encode_seconds=timings.encode_seconds,
            denoise_seconds=timings.denoise_seconds,
            decode_seconds=timings.decode_seconds,
            total_seconds=timings.total_seconds,
            restarts=generation.losses,
        ),
        batch_bucket=event.bucket,
        receipt=_receipt(event, generation, base),
    )


def _receipt(event: GenerationCompleted, generation: Generation, base: BaseInfo) -> pb.Receipt:
    job = generation.job
    strict = job.mode is Mode.STRICT
    return pb.Receipt(
        base_model=base.reference,
        base_sha256=base.sha256,
        adapters=[
            pb.Receipt.Adapter(
                name=use.checkpoint.name,
                version=use.checkpoint.version,
                step=use.checkpoint.step,
                weight=use.weight,
                sha256=use.sha256,
            )
            for use in job.adapters
        ],
        scheduler=job.scheduler,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        width=job.width,
        height=job.height,
        reproducibility=pb.REPRODUCIBILITY_STRICT if strict else pb.REPRODUCIBILITY_FAST,
        batch_bucket=job.bucket if strict else event.bucket,
        dtype=base.dtype,
        device=base.device,
        versions={"atelier": version("atelier"), **dict(base.versions)},
        create_time=timestamp(generation.end_time),
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        seed=job.seed,
        num_images=job.num_images,
    )
