"""Every error a user can see, as one tree. Each class knows its gRPC status (by name) and its reason.

AtelierError                       INTERNAL             INTERNAL
+-- InvalidRequest                 INVALID_ARGUMENT     INVALID_REQUEST     all violations at once
|   +-- UploadIncomplete           INVALID_ARGUMENT     UPLOAD_INCOMPLETE
|   +-- UnsupportedFormat          INVALID_ARGUMENT     UNSUPPORTED_FORMAT
|   +-- AdapterMismatch            INVALID_ARGUMENT     ADAPTER_MISMATCH
+-- NotFound                       NOT_FOUND            (ADAPTER|TRAINING)_NOT_FOUND
|   +-- AdapterNotFound
|   +-- TrainingNotFound
+-- AlreadyExists                  ALREADY_EXISTS
|   +-- AdapterExists              ALREADY_EXISTS       ADAPTER_EXISTS
|   +-- RequestIdReused            ALREADY_EXISTS       REQUEST_ID_REUSED
+-- FailedPrecondition             FAILED_PRECONDITION
|   +-- AdapterInUse               FAILED_PRECONDITION  ADAPTER_IN_USE
|   +-- TrainingNotEnded           FAILED_PRECONDITION  TRAINING_NOT_ENDED
|   +-- TrainingEnded              FAILED_PRECONDITION  TRAINING_ENDED
|   +-- NonfiniteLoss              FAILED_PRECONDITION  NONFINITE_LOSS
|   +-- NonfiniteImage             FAILED_PRECONDITION  NONFINITE_IMAGE
+-- ResourceExhausted              RESOURCE_EXHAUSTED
|   +-- QueueFull                  RESOURCE_EXHAUSTED   QUEUE_FULL
|   +-- TooManyCalls               RESOURCE_EXHAUSTED   TOO_MANY_CALLS
|   +-- TooManyUploads             RESOURCE_EXHAUSTED   TOO_MANY_UPLOADS
|   +-- TooManyPins                RESOURCE_EXHAUSTED   TOO_MANY_PINS
|   +-- SlowConsumer               RESOURCE_EXHAUSTED   SLOW_CONSUMER
|   +-- OutOfMemory                RESOURCE_EXHAUSTED   OUT_OF_MEMORY
|   +-- StorageFull                RESOURCE_EXHAUSTED   STORAGE_FULL
|   +-- QuotaExceeded              RESOURCE_EXHAUSTED   QUOTA_EXCEEDED
+-- Unavailable                    UNAVAILABLE
|   +-- WorkerNotReady             UNAVAILABLE          WORKER_NOT_READY
|   +-- WorkerLost                 UNAVAILABLE          WORKER_LOST
|   +-- ServerDraining             UNAVAILABLE          SERVER_DRAINING
|   +-- StoreUnavailable           UNAVAILABLE          STORE_UNAVAILABLE
+-- Unauthenticated                UNAUTHENTICATED      UNAUTHENTICATED
|   +-- TokenExpired               UNAUTHENTICATED      TOKEN_EXPIRED
+-- DataLoss                       DATA_LOSS            ADAPTER_CORRUPT
+-- CrashLoop                      ABORTED              TRAINING_CRASH_LOOP
+-- TagMoved                       ABORTED              TAG_MOVED
+-- DeadlineTooShort               DEADLINE_EXCEEDED    DEADLINE_TOO_SHORT
+-- Cancelled                      CANCELLED            CANCELLED

Rooms raise these; only `rpc` turns them into a grpc.StatusCode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a request: the field, and what would be right."""

    field: str
    description: str


class StartError(Exception):
    """The server cannot start; each of `problems` is a line for people. No call ever sees it."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class AtelierError(Exception):
    """The root. `metadata` travels in google.rpc.ErrorInfo; keep it short and free of secrets."""

    status: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    retry_after_seconds: float | None = None

    def __init__(self, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})


class InvalidRequest(AtelierError):
    status = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"

    def __init__(
        self,
        message: str,
        metadata: Mapping[str, str] | None = None,
        *,
        violations: tuple[Violation, ...] = (),
    ) -> None:
        super().__init__(message, metadata)
        self.violations = violations

    @classmethod
    def of(cls, violations: list[Violation]) -> InvalidRequest:
        """One error that lists every violation."""
        text = "; ".join(f"{v.field}: {v.description}" for v in violations)
        return cls(text, violations=tuple(violations))


class UploadIncomplete(InvalidRequest):
    reason = "UPLOAD_INCOMPLETE"


class UnsupportedFormat(InvalidRequest):
    reason = "UNSUPPORTED_FORMAT"


class AdapterMismatch(InvalidRequest):
    reason = "ADAPTER_MISMATCH"


class NotFound(AtelierError):
    """`resource` is (type, name) for google.rpc.ResourceInfo."""

    status = "NOT_FOUND"
    reason = "NOT_FOUND"
    resource_type: ClassVar[str] = ""

    def __init__(self, message: str, metadata: Mapping[str, str] | None = None, *, name: str = "") -> None:
        super().__init__(message, metadata)
        self.name = name


class AdapterNotFound(NotFound):
    reason = "ADAPTER_NOT_FOUND"
    resource_type = "adapter"


class TrainingNotFound(NotFound):
    reason = "TRAINING_NOT_FOUND"
    resource_type = "training"


class AlreadyExists(AtelierError):
    status = "ALREADY_EXISTS"
    reason = "ALREADY_EXISTS"
    resource_type: ClassVar[str] = ""

    def __init__(self, message: str, metadata: Mapping[str, str] | None = None, *, name: str = "") -> None:
        super().__init__(message, metadata)
        self.name = name


class AdapterExists(AlreadyExists):
    reason = "ADAPTER_EXISTS"
    resource_type = "adapter"


class RequestIdReused(AlreadyExists):
    reason = "REQUEST_ID_REUSED"
    resource_type = "request"


class FailedPrecondition(AtelierError):
    status = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"


class AdapterInUse(FailedPrecondition):
    reason = "ADAPTER_IN_USE"


class TrainingNotEnded(FailedPrecondition):
    reason = "TRAINING_NOT_ENDED"


class TrainingEnded(FailedPrecondition):
    reason = "TRAINING_ENDED"


class NonfiniteLoss(FailedPrecondition):
    reason = "NONFINITE_LOSS"


class NonfiniteImage(FailedPrecondition):
    reason = "NONFINITE_IMAGE"


class ResourceExhausted(AtelierError):
    status = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"


class QueueFull(ResourceExhausted):
    reason = "QUEUE_FULL"
    retry_after_seconds = 5.0


class TooManyCalls(ResourceExhausted):
    reason = "TOO_MANY_CALLS"
    retry_after_seconds = 1.0


class TooManyUploads(ResourceExhausted):
    reason = "TOO_MANY_UPLOADS"
    retry_after_seconds = 5.0


class TooManyPins(ResourceExhausted):
    reason = "TOO_MANY_PINS"


class SlowConsumer(ResourceExhausted):
    """Nobody has read this stream for a while; what it showed goes on or is kept, as if it had been left."""

    reason = "SLOW_CONSUMER"


class OutOfMemory(ResourceExhausted):
    reason = "OUT_OF_MEMORY"


class StorageFull(ResourceExhausted):
    reason = "STORAGE_FULL"


class QuotaExceeded(ResourceExhausted):
    """`tenant` is the subject of google.rpc.QuotaFailure."""

    reason = "QUOTA_EXCEEDED"

    def __init__(
        self,
        message: str,
        metadata: Mapping[str, str] | None = None,
        *,
        tenant: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message, metadata)
        self.tenant = tenant
        self.retry_after_seconds = retry_after_seconds


class Unavailable(AtelierError):
    status = "UNAVAILABLE"
    reason = "UNAVAILABLE"
    retry_after_seconds = 5.0


class WorkerNotReady(Unavailable):
    reason = "WORKER_NOT_READY"


class WorkerLost(Unavailable):
    reason = "WORKER_LOST"


class ServerDraining(Unavailable):
    reason = "SERVER_DRAINING"


class Unauthenticated(AtelierError):
    """Nobody is told what was wrong with a token, but that it has expired: only its holder can know it."""

    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class TokenExpired(Unauthenticated):
    reason = "TOKEN_EXPIRED"


class StoreUnavailable(Unavailable):
    reason = "STORE_UNAVAILABLE"


class DataLoss(AtelierError):
    status = "DATA_LOSS"
    reason = "ADAPTER_CORRUPT"


class CrashLoop(AtelierError):
    status = "ABORTED"
    reason = "TRAINING_CRASH_LOOP"


class DeadlineTooShort(AtelierError):
    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_TOO_SHORT"


class TagMoved(AtelierError):
    status = "ABORTED"
    reason = "TAG_MOVED"


class Cancelled(AtelierError):
    status = "CANCELLED"
    reason = "CANCELLED"


def _tree(cls: type[AtelierError]) -> list[type[AtelierError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _tree(child))]


_BY_REASON = {cls.reason: cls for cls in _tree(AtelierError)}


def by_reason(
    reason: str,
    message: str,
    metadata: Mapping[str, str] | None = None,
    violations: tuple[Violation, ...] = (),
) -> AtelierError:
    """The error that a worker's event names; an unknown reason is INTERNAL."""
    cls = _BY_REASON.get(reason, AtelierError)
    if issubclass(cls, InvalidRequest):
        return cls(message, metadata, violations=violations)
    return cls(message, metadata)
