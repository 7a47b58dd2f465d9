"""What errors carry beside their message."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2, status_pb2

from atelier_server.access.tenants import Scope
from atelier_server.errors import AtelierError, OutOfMemory, QueueFull, QuotaExceeded
from atelier_server.rpc.status import trailers


@pytest.mark.parametrize(
    ("error", "subject"),
    [
        (QuotaExceeded("too many", tenant="red"), "tenant:red"),
        (QueueFull("full"), "server"),
        (OutOfMemory("no room"), "server"),
    ],
)
def test_a_quota_failure_says_whose_limit_it_is(error: AtelierError, subject: str) -> None:
    _, trailing = trailers(error, Scope("red"))
    (details,) = [value for key, value in trailing if key == "grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    (packed,) = [one for one in status.details if one.Is(error_details_pb2.QuotaFailure.DESCRIPTOR)]
    failure = error_details_pb2.QuotaFailure.FromString(packed.value)
    assert [violation.subject for violation in failure.violations] == [subject]
