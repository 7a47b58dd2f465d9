"""Priority of the contract, of a generation or a training."""

from __future__ import annotations

from atelier.v1 import generation_pb2 as pb
from atelier_server.core import Priority
from atelier_server.rpc.codec.checks import Checks

PRIORITIES: dict[int, Priority] = {
    pb.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    pb.PRIORITY_LOW: Priority.LOW,
    pb.PRIORITY_NORMAL: Priority.NORMAL,
    pb.PRIORITY_HIGH: Priority.HIGH,
}


def check_priority(checks: Checks, field: str, value: int) -> None:
    if value not in PRIORITIES:
        checks.refuse(field, f"{value} is no Priority")
