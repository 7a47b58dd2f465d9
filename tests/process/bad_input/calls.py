"""Calls that have to be refused, and those after them that have to work."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from atelier import (
    AtelierError,
    Client,
    InvalidArgumentError,
    TrainingCompleted,
    TrainingEvent,
    TrainingState,
)

OTTO = Path(__file__).parents[3] / "examples" / "otto"
PICTURES = sorted(OTTO.glob("*.png"))[:2]
PNG = b"\x89PNG\r\n\x1a\n"
GOOD: dict[str, Any] = {
    "instance_prompt": "a sks blue plush octopus",
    "max_train_steps": 1,
    "rank": 2,
    "train_batch_size": 1,
}
ErrorKind = TypeVar("ErrorKind", bound=AtelierError)


def paints(client: Client, adapter: str | tuple[str, ...] = ()) -> bool:
    result = client.generate("a red octopus", adapters=adapter, seed=7, num_inference_steps=2)
    return result.images[0].data.startswith(PNG)


def learns(client: Client, name: str) -> bool:
    last = list(client.train(name, PICTURES, **GOOD))[-1]
    return isinstance(last, TrainingCompleted) and last.state is TrainingState.SUCCEEDED


def free_name() -> str:
    return f"next-{uuid.uuid4().hex[:8]}"


def train(client: Client, name: str, images: Any = PICTURES, **recipe: Any) -> list[TrainingEvent]:
    return list(client.train(name, images, **(GOOD | recipe)))


def refused(kind: type[ErrorKind], reason: str, call: Callable[[], object]) -> ErrorKind:
    """The error of a call that has to be refused so."""
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.reason == reason, str(caught.value)
    return caught.value


def violations(call: Callable[[], object], reason: str = "INVALID_REQUEST") -> dict[str, str]:
    """Field to description of everything that a call is refused for."""
    error = refused(InvalidArgumentError, reason, call)
    found = {violation.field: violation.description for violation in error.violations}
    assert len(found) == len(error.violations)
    return found


# --------------------------------------------------------------------------------------------- generations
