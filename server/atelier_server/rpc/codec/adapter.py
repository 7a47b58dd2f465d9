"""Adapter requests and answers, and GetServerInfo's."""

from __future__ import annotations

import re
from importlib.metadata import version

from atelier.v1 import adapter_pb2 as pb
from atelier.v1 import server_pb2
from atelier_server.config import Limits
from atelier_server.core import SCHEDULERS, AdapterRef
from atelier_server.jobs.dispatch import WorkerStatus
from atelier_server.report import AdapterReport, ImportTerms
from atelier_server.rpc import caller
from atelier_server.rpc.codec.checks import Checks, shown

_VERSION = version("atelier")  # reads files: once
_LAYOUTS = {
    pb.ADAPTER_FORMAT_UNSPECIFIED: "diffusers",
    pb.ADAPTER_FORMAT_DIFFUSERS: "diffusers",
    pb.ADAPTER_FORMAT_KOHYA: "kohya",
    pb.ADAPTER_FORMAT_PEFT: "peft",
    pb.ADAPTER_FORMAT_TEXTUAL_INVERSION: "textual-inversion",
}

_MOST_FILES = 16
_FILE = re.compile(
    r"(?:(?:unet|text_encoder|text_encoder_2)/)?[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,200}\.(?:safetensors|json)"
)
_HUB_ID = re.compile(
    r"(?!.*\.\.)\w[\w.-]{0,95}/\w[\w.-]{0,95}(?:(?:/[^@/\x00-\x1f]{1,100}){1,8})?(?:@\w[\w./-]{0,100})?"
)
_PLACEHOLDER = re.compile(r"\S{1,100}")


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


def decode_import(metadata: pb.ImportAdapterRequest.Metadata, limits: Limits) -> tuple[str, ImportTerms]:
    """The adapter's name, and on what terms the file is taken. Raises InvalidRequest with every violation."""
    checks = Checks()
    name = checks.name("metadata.name", metadata.name)
    if metadata.hub_id:
        if not _HUB_ID.fullmatch(metadata.hub_id):
            checks.refuse("metadata.hub_id", f"{shown(metadata.hub_id)} is not OWNER/NAME[/PATH][@REVISION]")
        if metadata.size_bytes or metadata.sha256 or metadata.files or metadata.offset:
            checks.refuse("metadata.hub_id", "goes without size_bytes, sha256, files and offset")
    else:
        checks.integer("metadata.size_bytes", metadata.size_bytes, 1, limits.max_adapter_bytes)
        if not re.fullmatch(r"[0-9a-f]{64}", metadata.sha256):
            checks.refuse("metadata.sha256", f"{shown(metadata.sha256)} is not 64 lower-case hex digits")
        if metadata.offset > metadata.size_bytes:
            checks.refuse("metadata.offset", f"{metadata.offset} is beyond size_bytes {metadata.size_bytes}")
        _check_files(checks, metadata)
    checks.text("metadata.trigger", metadata.trigger, limits.max_prompt_characters)
    if metadata.placeholder and not _PLACEHOLDER.fullmatch(metadata.placeholder):
        checks.refuse("metadata.placeholder", f"{shown(metadata.placeholder)} is not one word of at most 100")
    checks.done()
    return name, ImportTerms(
        metadata.trigger, metadata.placeholder, metadata.allow_partial, limits.min_adapter_coverage
    )


def decode_upload(request: pb.QueryUploadRequest, limits: Limits) -> tuple[str, int]:
    """Digest and size of the whole. Raises InvalidRequest."""
    checks = Checks()
    checks.integer("size_bytes", request.size_bytes, 1, limits.max_adapter_bytes)
    if not re.fullmatch(r"[0-9a-f]{64}", request.sha256):
        checks.refuse("sha256", f"{shown(request.sha256)} is not 64 lower-case hex digits")
    checks.done()
    return request.sha256, request.size_bytes


def _check_files(checks: Checks, metadata: pb.ImportAdapterRequest.Metadata) -> None:
    files = metadata.files
    if len(files) > _MOST_FILES:
        checks.refuse("metadata.files", f"{len(files)} files are more than {_MOST_FILES}")
    for number, file in enumerate(files[:_MOST_FILES]):
        if not _FILE.fullmatch(file.name):
            checks.refuse(f"metadata.files[{number}].name", f"{shown(file.name)} is no file of an adapter")
    if len({file.name for file in files}) < len(files):
        checks.refuse("metadata.files", "names a file twice")
    total = sum(file.size_bytes for file in files)
    if files and total != metadata.size_bytes:
        checks.refuse("metadata.files", f"are {total} bytes in all; size_bytes says {metadata.size_bytes}")


def encode_report(report: AdapterReport) -> pb.AdapterReport:
    message = pb.AdapterReport
    return pb.AdapterReport(
        format=report.format,
        confidence=report.confidence,
        software=report.software,
        family=report.family,
        evidence=report.evidence,
        base_family=report.base_family,
        matched=report.matched,
        unmatched=[message.Unmatched(name=part.name, reason=part.reason) for part in report.unmatched],
        coverage=report.coverage,
        kinds=[message.Kind(kind=kind, modules=count) for kind, count in report.kinds],
        ranks=[message.Rank(rank=rank, modules=count) for rank, count in report.ranks],
        alphas=[message.Alpha(alpha=alpha, modules=count) for alpha, count in report.alphas],
        tokens=[
            message.Token(placeholder=token.placeholder, vectors=token.vectors, encoders=token.encoders)
            for token in report.tokens
        ],
        triggers=report.triggers,
        metadata=dict(report.metadata),
        norms=[message.BlockNorm(block=block, norm=norm) for block, norm in report.norms],
        probe=report.probe,
        difference_bytes=report.difference_bytes,
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
        versions={"atelier": _VERSION},
        worker_restarts=status.restarts,
        schedulers=status.base.schedulers if status.base else SCHEDULERS,
        tenant=caller.tenant().name,
        quotas=server_pb2.Quotas(**caller.tenant().quotas.model_dump(exclude_none=True)),
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
                quantization=base.quantization,
                training_methods=base.training.methods,
                training_optimizers=base.training.optimizers,
                training_precisions=base.training.precisions,
            )
        )
        message.controlnets.extend(
            server_pb2.ControlNet(name=net.name, reference=net.reference, sha256=net.sha256)
            for net in base.controlnets
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
