"""Errors to gRPC statuses: the one seam where foreign errors become ours, and ours google.rpc.Status."""

from __future__ import annotations

import logging
import math

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from atelier_server.access.tenants import Scope
from atelier_server.errors import (
    AlreadyExists,
    AtelierError,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    ResourceExhausted,
    StorageFull,
    Violation,
)
from atelier_server.jobs.book import storage_full
from atelier_server.rpc import outward

DOMAIN = "atelier"
_log = logging.getLogger(__name__)
# gRPC breaks a call whose trailing metadata exceed 16 KiB; base64 and the other trailers need room too.
_MOST_BYTES = 5500
_MESSAGE_CHARACTERS = 400
_DESCRIPTION_CHARACTERS = 300


def known(error: BaseException, method: str) -> AtelierError:
    """Our own errors as they are, a full disk as StorageFull, anything else as a plain INTERNAL."""
    if isinstance(error, AtelierError):
        return error
    if storage_full(error):
        return StorageFull("no space left on the server's disk")
    _log.error("unexpected error in %s", method, exc_info=error)
    return AtelierError("internal error; the server's log tells more under this request's id")


def code_of(error: AtelierError) -> grpc.StatusCode:
    return grpc.StatusCode[error.status]


def trailers(error: AtelierError, scope: Scope) -> tuple[str, tuple[tuple[str, str | bytes], ...]]:
    """The message and the trailing metadata that carry the details, as that scope reads them."""
    message = _short(scope.leave(error.message), _MESSAGE_CHARACTERS)
    details = _details(error)
    for detail in details:
        outward.strip(detail, scope)
    status = status_pb2.Status(
        code=code_of(error).value[0], message=message, details=[_any(detail) for detail in details]
    )
    return message, tuple(rpc_status.to_status(status).trailing_metadata)


def _details(error: AtelierError) -> list[Message]:
    metadata = {key[:64]: _short(value, 200) for key, value in list(error.metadata.items())[:16]}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    ]
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration(seconds=math.ceil(error.retry_after_seconds))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, NotFound | AlreadyExists) and error.resource_type:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=error.resource_type,
                resource_name=_short(error.name, 200),
                description=_short(error.message, 200),
            )
        )
    if isinstance(error, ResourceExhausted):
        subject = f"tenant:{error.tenant}" if isinstance(error, QuotaExceeded) else "server"
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=subject, description=_short(error.message, 200)
        )
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    if isinstance(error, InvalidRequest) and error.violations:
        room = _MOST_BYTES - sum(detail.ByteSize() for detail in details)
        details.append(_bad_request(error.violations, room))
    return details


def _bad_request(violations: tuple[Violation, ...], room: int) -> error_details_pb2.BadRequest:
    """As many violations as fit; the last entry says how many did not."""
    result = error_details_pb2.BadRequest()
    for i, violation in enumerate(violations):
        entry = error_details_pb2.BadRequest.FieldViolation(
            field=_short(violation.field, 100),
            description=_short(violation.description, _DESCRIPTION_CHARACTERS),
        )
        room -= entry.ByteSize() + 8
        if room < 200 and i < len(violations) - 1:
            result.field_violations.add(field="...", description=f"and {len(violations) - i} more violations")
            break
        result.field_violations.append(entry)
    return result


def _any(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _short(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 3] + "..."
