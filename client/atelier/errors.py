"""Every error that a call can raise, as one tree; each class stands for gRPC status codes.

AtelierError                    UNKNOWN, OUT_OF_RANGE and whatever the future brings
+-- InvalidArgumentError        INVALID_ARGUMENT      every violation is in `violations`
+-- NotFoundError               NOT_FOUND             what is missing is in `resource`
+-- AlreadyExistsError          ALREADY_EXISTS        what is in the way is in `resource`
+-- FailedPreconditionError     FAILED_PRECONDITION   the state forbids it, e.g. NONFINITE_LOSS
+-- ResourceExhaustedError      RESOURCE_EXHAUSTED    e.g. QUEUE_FULL; see `retry_after`
+-- UnavailableError            UNAVAILABLE           the server or its worker is away
+-- DeadlineExceededError       DEADLINE_EXCEEDED     `timeout` has passed
+-- AbortedError                ABORTED               e.g. TRAINING_CRASH_LOOP
+-- CancelledError              CANCELLED
+-- DataLossError               DATA_LOSS             bytes that are not what was promised
+-- UnauthenticatedError        UNAUTHENTICATED
+-- PermissionDeniedError       PERMISSION_DENIED
+-- UnimplementedError          UNIMPLEMENTED         the server is older than this client
+-- InternalError               INTERNAL              a bug of the server

`from_rpc` is the one seam where grpc's errors become these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

_Detail = TypeVar("_Detail", bound=Message)


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a request: the field, and what would be right."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Resource:
    """The object that is missing or in the way, e.g. ("adapter", "otto")."""

    type: str
    name: str


class AtelierError(Exception):
    """The root of everything that a server refuses or a transport loses.

    `reason` is the stable UPPER_SNAKE word of google.rpc.ErrorInfo ("" if the error did not come from an
    Atelier server), `metadata` its details, `retry_after` seconds or None.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[Violation] = (),
        retry_after: float | None = None,
        resource: Resource | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.resource = resource

    def __str__(self) -> str:
        return " ".join(word for word in (self.code.name, self.reason) if word) + f": {self.message}"


class InvalidArgumentError(AtelierError):
    default_code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(AtelierError):
    default_code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(AtelierError):
    default_code = grpc.StatusCode.ALREADY_EXISTS


class FailedPreconditionError(AtelierError):
    default_code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhaustedError(AtelierError):
    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(AtelierError):
    default_code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(AtelierError):
    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class AbortedError(AtelierError):
    default_code = grpc.StatusCode.ABORTED


class CancelledError(AtelierError):
    default_code = grpc.StatusCode.CANCELLED


class DataLossError(AtelierError):
    default_code = grpc.StatusCode.DATA_LOSS


class UnauthenticatedError(AtelierError):
    default_code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(AtelierError):
    default_code = grpc.StatusCode.PERMISSION_DENIED


class UnimplementedError(AtelierError):
    default_code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(AtelierError):
    default_code = grpc.StatusCode.INTERNAL


# The one table of status codes; what is not in it is an AtelierError.
BY_CODE: Mapping[grpc.StatusCode, type[AtelierError]] = {
    kind.default_code: kind for kind in AtelierError.__subclasses__()
}


def from_rpc(error: grpc.RpcError) -> AtelierError:
    """The exception for what grpc raised, with all the details that the server sent along."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return AtelierError(str(error))
    code = error.code()
    status = _status(error.trailing_metadata() or ())
    info = _detail(status, error_details_pb2.ErrorInfo)
    delay = _detail(status, error_details_pb2.RetryInfo).retry_delay.ToTimedelta().total_seconds()
    resource = _detail(status, error_details_pb2.ResourceInfo)
    violations = _detail(status, error_details_pb2.BadRequest).field_violations
    return BY_CODE.get(code, AtelierError)(
        error.details() or code.name.lower().replace("_", " "),
        code=code,
        reason=info.reason,
        metadata=info.metadata,
        violations=[Violation(v.field, v.description) for v in violations],
        retry_after=delay or None,
        resource=Resource(resource.resource_type, resource.resource_name) if resource.resource_name else None,
    )


def _status(metadata: Iterable[tuple[str, str | bytes]]) -> status_pb2.Status:
    """The google.rpc.Status of a call's trailing metadata; empty if there is none that can be read."""
    try:
        for key, value in metadata:
            if key == "grpc-status-details-bin" and isinstance(value, bytes):
                return status_pb2.Status.FromString(value)
    except DecodeError:
        pass  # a proxy's garbage: the code and the message are still good
    return status_pb2.Status()


def _detail(status: status_pb2.Status, kind: type[_Detail]) -> _Detail:
    """The first detail of that kind; an empty one if there is none."""
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            return kind.FromString(packed.value)
    return kind()
