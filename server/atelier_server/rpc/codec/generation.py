"""GenerateRequest to GenerationJob."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from atelier.v1 import generation_pb2 as pb
from atelier_server.config import Limits
from atelier_server.core import (
    ROW_BUCKETS,
    SIGMA_KINDS,
    TIMESTEP_SPACINGS,
    AdapterRef,
    BaseInfo,
    GenerationJob,
    ImageFormat,
    Mode,
    Priority,
    SchedulerOptions,
)
from atelier_server.rpc.codec.checks import Checks
from atelier_server.rpc.codec.controlnet import decode_controlnets
from atelier_server.rpc.codec.init_image import decode_init
from atelier_server.rpc.codec.priority import PRIORITIES, check_priority
from atelier_server.rpc.codec.selection import decode_adapters
from atelier_server.rpc.pictures import Verdict

_NO_PICTURES: Mapping[str, Verdict] = MappingProxyType({})
_MAX_GUIDANCE = 100.0
_DEFAULT_BUCKET = 8
_MAX_FORWARDS = 1000  # of a picture: more than any scheduler takes for any number of steps
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


def decode_generate(
    request: pb.GenerateRequest,
    limits: Limits,
    base: BaseInfo,
    pictures: Mapping[str, Verdict] = _NO_PICTURES,
) -> GenerationDraft:
    """Fills in every default. `pictures` tells of those in the request, by field.

    Raises InvalidRequest with every violation.
    """
    checks = Checks()
    request_id = checks.request_id("request_id", request.request_id)
    num_images = request.num_images if request.HasField("num_images") else 1
    steps = request.num_inference_steps if request.HasField("num_inference_steps") else 50
    guidance = request.guidance_scale if request.HasField("guidance_scale") else 7.5
    mode, bucket = _reproducibility(checks, request)
    if request.image_format not in _FORMATS:
        checks.refuse("image_format", f"{request.image_format} is no ImageFormat")
    check_priority(checks, "priority", request.priority)
    seed = request.seed if request.HasField("seed") else secrets.randbelow(2**32)
    if seed + max(num_images, 1) - 1 >= 2**64:
        checks.refuse("seed", f"{seed} + num_images - 1 does not fit into 64 bits")
    scheduler = request.scheduler if request.HasField("scheduler") else base.default_scheduler
    width, height = _size(checks, request, limits, base, pictures)
    job = GenerationJob(
        id=uuid.uuid4().hex,
        prompt=checks.text("prompt", request.prompt, limits.max_prompt_characters),
        negative_prompt=_negative(checks, request, limits),
        adapters=(),
        seed=seed,
        num_images=checks.integer("num_images", num_images, 1, limits.max_num_images),
        num_inference_steps=checks.integer("num_inference_steps", steps, 1, limits.max_inference_steps),
        guidance_scale=checks.number("guidance_scale", guidance, 0.0, _MAX_GUIDANCE),
        guidance_rescale=checks.number("guidance_rescale", request.guidance_rescale, 0.0, 1.0),
        scheduler=checks.choice("scheduler", scheduler, base.schedulers),
        scheduler_options=_scheduler_options(checks, request, scheduler, base),
        width=width,
        height=height,
        init=decode_init(
            checks,
            request,
            verdicts=pictures,
            base=base,
            size=(width, height),
            num_inference_steps=steps,
        ),
        controlnets=decode_controlnets(checks, request, verdicts=pictures, base=base, size=(width, height)),
        preview_steps=checks.integer("preview_steps", request.preview_steps, 0, limits.max_inference_steps),
        clip_skip=checks.integer("clip_skip", request.clip_skip, 0, base.max_clip_skip),
        mode=mode,
        bucket=bucket,
        buckets=tuple(request.batch_buckets),
        image_format=_FORMATS.get(request.image_format, ImageFormat.PNG),
        priority=PRIORITIES.get(request.priority, Priority.NORMAL),
    )
    refs = decode_adapters(checks, request, limits, job.steps)
    checks.done()
    return GenerationDraft(request_id, _body_hash(request), job, refs)


def _negative(checks: Checks, request: pb.GenerateRequest, limits: Limits) -> str | None:
    text = checks.text("negative_prompt", request.negative_prompt, limits.max_prompt_characters)
    return text if request.HasField("negative_prompt") else None


def _reproducibility(checks: Checks, request: pb.GenerateRequest) -> tuple[Mode, int]:
    if request.reproducibility not in _MODES:
        checks.refuse("reproducibility", f"{request.reproducibility} is no Reproducibility")
    mode = _MODES.get(request.reproducibility, Mode.FAST)
    if request.batch_buckets:
        _buckets(checks, request, mode)
        return mode, request.batch_buckets[0]
    if not request.HasField("batch_bucket"):
        return mode, _DEFAULT_BUCKET if mode is Mode.STRICT else 0
    if mode is Mode.FAST:
        checks.refuse("batch_bucket", "goes only with REPRODUCIBILITY_STRICT")
    if request.batch_bucket not in ROW_BUCKETS:
        checks.refuse("batch_bucket", f"{request.batch_bucket} is none of {', '.join(map(str, ROW_BUCKETS))}")
    return mode, request.batch_bucket


def _buckets(checks: Checks, request: pb.GenerateRequest, mode: Mode) -> None:
    if mode is Mode.FAST:
        checks.refuse("batch_buckets", "go only with REPRODUCIBILITY_STRICT")
    if request.HasField("batch_bucket"):
        checks.refuse("batch_buckets", "batch_bucket is set as well; give one of the two")
    if len(request.batch_buckets) > _MAX_FORWARDS:
        checks.refuse("batch_buckets", f"{len(request.batch_buckets)} are more than {_MAX_FORWARDS}")
    if odd := [bucket for bucket in request.batch_buckets if bucket not in ROW_BUCKETS]:
        checks.refuse("batch_buckets", f"{odd[0]} is none of {', '.join(map(str, ROW_BUCKETS))}")


def _size(
    checks: Checks,
    request: pb.GenerateRequest,
    limits: Limits,
    base: BaseInfo,
    pictures: Mapping[str, Verdict],
) -> tuple[int, int]:
    """Width and height: as asked for, else those of the picture to begin with or of the first that guides,
    else the base's own.
    """
    source = "image" if "image" in pictures else "controlnets[0].image"
    image = pictures.get(source)
    told = image is not None and not image.problem
    native = (image.width, image.height) if image and told else (base.native_width, base.native_height)
    asked = {field.name: value for field, value in request.ListFields() if field.name in ("width", "height")}
    size = []
    highest = {"width": limits.max_width, "height": limits.max_height}
    for field, value in zip(highest, native, strict=True):
        most = highest[field]
        if told and field not in asked and (value % 8 or not 8 <= value <= most):
            right = min(max(value - value % 8, 8), most)
            checks.refuse(source, f"its {field} {value} is no multiple of 8 between 8 and {most}; {right} is")
        size.append(checks.size(field, asked[field], most) if field in asked else value)
    return size[0], size[1]


def _scheduler_options(
    checks: Checks, request: pb.GenerateRequest, scheduler: str, base: BaseInfo
) -> SchedulerOptions:
    names = {field.name for field in fields(SchedulerOptions)}
    options = SchedulerOptions(**{f.name: value for f, value in request.ListFields() if f.name in names})
    known = dict(base.scheduler_options)
    for name in options.given:
        if scheduler in known and name not in known[scheduler]:
            others = ", ".join(other for other, has in known.items() if name in has)
            checks.refuse(name, f"scheduler {scheduler} has no {name}; those that have it: {others}")
    if len(chosen := [kind for kind in SIGMA_KINDS if options.given.get(kind)]) > 1:
        checks.refuse(chosen[1], f"only one kind of sigmas at a time; {chosen[0]} is set as well")
    if options.timestep_spacing is not None:
        checks.choice("timestep_spacing", options.timestep_spacing, TIMESTEP_SPACINGS)
    if options.eta is not None:
        checks.number("eta", options.eta, 0.0, 1.0)
    return options


def _body_hash(request: pb.GenerateRequest) -> str:
    body = pb.GenerateRequest()
    body.CopyFrom(request)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()
