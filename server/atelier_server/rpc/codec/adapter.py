"""Adapter requests and answers, and GetServerInfo's."""

from __future__ import annotations

import re
from importlib.metadata import version as package_version

from atelier.v1 import adapter_pb2 as pb
from atelier.v1 import server_pb2
from atelier_server.adapters.store import AdapterVersion
from atelier_server.config import Limits
from atelier_server.core import SCHEDULERS, AdapterRef, CheckpointId
from atelier_server.jobs.dispatch import WorkerStatus
from atelier_server.rpc import caller
from atelier_server.rpc.codec.checks import Checks, shown
from atelier_server.rpc.codec.times import timestamp

_LAYOUTS = {
    pb.ADAPTER_FORMAT_UNSPECIFIED: "diffusers",
    pb.ADAPTER_FORMAT_DIFFUSERS: "diffusers",
    pb.ADAPTER_FORMAT_KOHYA: "kohya",
    pb.ADAPTER_FORMAT_PEFT: "peft",
}


def decode_reference(text: str) -> AdapterRef:
    """NAME[@STEP|@TAG]. Raises InvalidRequest."""
    checks = Checks()
    ref = checks.reference("adapter", text)
    checks.done()
    return ref or AdapterRef("")


def decode_deletion(text: str) -> tuple[str, int | None]:
    """NAME or NAME@vN: the name, and the version if one is meant. Raises InvalidRequest."""
    checks = Checks()
    name, at, tag = text.partition("@")
    version = re.fullmatch(r"v([1-9][0-9]{0,8})", tag)
    inside = checks.name("adapter", name)
    if at and not version:
        checks.refuse("adapter", f"{shown(text)} is neither NAME nor NAME@vN; a checkpoint is never deleted")
    checks.done()
    return inside, int(version[1]) if version else None


def decode_export(request: pb.ExportAdapterRequest) -> tuple[AdapterRef, str]:
    """The checkpoint's reference and the layout. Raises InvalidRequest."""
    checks = Checks()
    ref = checks.reference("adapter", request.adapter)
    if request.format not in _LAYOUTS:
        checks.refuse("format", f"{request.format} is no AdapterFormat")
    checks.done()
    return ref or AdapterRef(""), _LAYOUTS[request.format]


def decode_import(metadata: pb.ImportAdapterRequest.Metadata, limits: Limits) -> str:
    """The adapter's name. Raises InvalidRequest with every violation."""
    checks = Checks()
    name = checks.name("metadata.name", metadata.name)
    checks.integer("metadata.size_bytes", metadata.size_bytes, 1, limits.max_adapter_bytes)
    if not re.fullmatch(r"[0-9a-f]{64}", metadata.sha256):
        checks.refuse("metadata.sha256", f"{shown(metadata.sha256)} is not 64 lower-case hex digits")
    checks.text("metadata.trigger", metadata.trigger, limits.max_prompt_characters)
    checks.done()
    return name


def encode_adapter(version: AdapterVersion, resident: frozenset[CheckpointId]) -> pb.Adapter:
    """A version that has a checkpoint."""
    meta, recommended = version.meta, version.recommended
    return pb.Adapter(
        name=meta.name,
        version=meta.version,
        tags=version.tags,
        checkpoints=[
            pb.Checkpoint(
                step=record.id.step,
                sha256=record.sha256,
                size_bytes=record.size_bytes,
                create_time=timestamp(record.create_time),
                loss=record.loss,
                resident=record.id in resident,
            )
            for record in version.checkpoints
        ],
        recommended_step=recommended.id.step if recommended else 0,
        trigger=meta.trigger,
        rank=recommended.rank if recommended else 0,
        lora_alpha=recommended.lora_alpha if recommended else 0.0,
        base_model=meta.base_model,
        base_sha256=meta.base_sha256,
        training=meta.training,
        create_time=timestamp(meta.create_time),
    )


def encode_info(status: WorkerStatus, limits: Limits) -> server_pb2.GetServerInfoResponse:
    """What is known now; a base that is not known yet is absent. Others' adapters are counted, not named."""
    scope = caller.scope()
    message = server_pb2.GetServerInfoResponse(
        ready=status.ready,
        message=status.message,
        limits=_encode_limits(limits),
        slots=server_pb2.AdapterSlots(
            total=status.slots,
            used=len(status.resident()),
            adapters=[
                str(checkpoint) for checkpoint in sorted(status.resident()) if scope.owns(checkpoint.name)
            ],
        ),
        versions={"atelier": package_version("atelier")},
        worker_restarts=status.restarts,
        schedulers=SCHEDULERS,
    )
    if (base := status.base) is not None:
        message.versions.update(dict(base.versions))
        message.base_model.CopyFrom(
            server_pb2.BaseModel(
                reference=base.reference,
                family=base.family,
                sha256=base.sha256,
                native_width=base.native_width,
                native_height=base.native_height,
                prediction_type=base.prediction_type,
                default_scheduler=base.default_scheduler,
                max_prompt_tokens=base.max_prompt_tokens,
                num_parameters=base.num_parameters,
                inpainting=base.inpainting,
            )
        )
        message.device.CopyFrom(
            server_pb2.Device(
                name=base.device,
                description=base.device_description,
                dtype=base.dtype,
                memory_total_bytes=base.memory_total_bytes,
                memory_allocated_bytes=status.heartbeat.memory_allocated_bytes if status.heartbeat else 0,
            )
        )
    return message


def _encode_limits(limits: Limits) -> server_pb2.Limits:
    names = [field.name for field in server_pb2.Limits.DESCRIPTOR.fields]
    return server_pb2.Limits(**{name: getattr(limits, name) for name in names})
