"""kill -9 of the worker and of the front: a pause for the clients, and nothing else. See also test_kills."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from atelier import (
    CheckpointPublished,
    Client,
    Progress,
    TrainingCompleted,
    TrainingEvent,
    TrainingProgress,
    TrainingRestarted,
    TrainingState,
)
from tests.process.server import Server, wait_gone

pytestmark = pytest.mark.process

OTTO = Path(__file__).parents[2] / "examples" / "otto"
RECIPE: dict[str, Any] = {
    "folder": OTTO,
    "instance_prompt": "a sks blue plush octopus",
    "max_train_steps": 60,
    "checkpointing_steps": 10,
    "train_batch_size": 2,
    "learning_rate": 1e-3,
}


def picture(client: Client, seed: int, reached: SimpleQueue[int] | None = None) -> bytes:
    """A strict picture; tells when it is a few steps on."""
    events = client.generate_stream(
        "a red octopus on a beach", seed=seed, num_inference_steps=40, reproducibility="strict"
    )
    data = b""
    for event in events:
        if reached is not None and isinstance(event, Progress) and event.step >= 3:
            reached.put(seed)
            reached = None
        data = getattr(event, "data", data)
    return data


def watch(client: Client, name: str, reached: SimpleQueue[int], **recipe: Any) -> list[TrainingEvent]:
    """All events of a training; tells the step of every checkpoint."""
    events = []
    for event in client.train(name, **(RECIPE | recipe)):
        events.append(event)
        if isinstance(event, CheckpointPublished):
            reached.put(event.step)
    return events


def numbers(events: list[TrainingEvent]) -> list[int]:
    return [event.seq for event in events]


def test_the_worker_is_killed_under_eight_generations_and_a_training(server: Server) -> None:
    with Client(server.address) as client, ThreadPoolExecutor(9) as pool:
        undisturbed = [picture(client, seed) for seed in range(8)]
        checkpoints: SimpleQueue[int] = SimpleQueue()
        training = pool.submit(watch, client, "otto", checkpoints)
        first = checkpoints.get(timeout=120)
        reached: SimpleQueue[int] = SimpleQueue()
        pictures = [pool.submit(picture, client, seed, reached) for seed in range(8)]
        reached.get(timeout=120)
        old = server.kill_worker()

        assert wait_gone(old)
        assert server.health("") == HealthCheckResponse.SERVING
        assert [future.result(timeout=240) for future in pictures] == undisturbed
        events = training.result(timeout=240)

    (restarted,) = [event for event in events if isinstance(event, TrainingRestarted)]
    assert restarted.from_step >= first
    assert isinstance(events[-1], TrainingCompleted)
    assert events[-1].state is TrainingState.SUCCEEDED
    assert events[-1].step == 60
    assert numbers(events) == list(range(1, len(events) + 1))
    assert [e.step for e in events if isinstance(e, CheckpointPublished)] == [10, 20, 30, 40, 50, 60]
    assert server.metrics()['atelier_worker_restarts_total{reason="signal"}'] == 1


def test_the_front_is_killed_under_a_training(server: Server) -> None:
    with Client(server.address) as client, ThreadPoolExecutor(1) as pool:
        checkpoints: SimpleQueue[int] = SimpleQueue()
        training = pool.submit(watch, client, "otto", checkpoints)
        checkpoints.get(timeout=120)
        worker = int(server.state["worker_pid"])
        server.kill()
        assert wait_gone(worker)
        server.start()
        events = training.result(timeout=240)
    assert numbers(events) == list(range(1, len(events) + 1))
    assert isinstance(events[-1], TrainingCompleted)
    assert events[-1].state is TrainingState.SUCCEEDED


def test_cancelling_keeps_what_was_learned_and_resuming_goes_on(server: Server) -> None:
    with Client(server.address) as client:
        events = []
        for event in client.train(
            "otto", **(RECIPE | {"max_train_steps": 2000, "checkpointing_steps": 1000})
        ):
            events.append(event)
            if isinstance(event, TrainingProgress) and event.step >= 5:
                client.cancel_training("otto")
        assert isinstance(events[-1], TrainingCompleted)
        assert events[-1].state is TrainingState.CANCELLED
        (kept,) = client.get_adapter("otto").checkpoints
        assert kept.step == events[-1].step
        assert client.generate(
            "a sks blue plush octopus", adapters=f"otto@{kept.step}", num_inference_steps=2
        )
