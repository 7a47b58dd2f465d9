"""SIGTERM in the middle of everything: nothing that was begun is lost, and the next server goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from atelier import (
    CheckpointPublished,
    Client,
    Completed,
    Image,
    Progress,
    TrainingCompleted,
    TrainingEvent,
    TrainingState,
    UnavailableError,
)
from tests.process.server import FRONT, Server, wait_gone
from tests.process.weights import tensors

pytestmark = pytest.mark.process

RECIPE: dict[str, Any] = {
    "images": sorted((Path(__file__).parents[2] / "examples" / "otto").glob("0[1-3].png")),
    "instance_prompt": "a sks blue plush octopus",
    "max_train_steps": 24,
    "checkpointing_steps": 8,
    "train_batch_size": 1,
    "learning_rate": 1e-3,
}
REQUESTS = 12


def paint(address: str, seed: int, begun: SimpleQueue[int]) -> tuple[bool, int, UnavailableError | None]:
    """Whether it had begun when it ended, how many pictures came, and what it ended with."""
    started, images = False, 0
    with Client(address, reconnect_timeout=0) as client:
        try:
            for event in client.generate_stream(
                "a red octopus", seed=seed, num_images=4, num_inference_steps=12
            ):
                if isinstance(event, Progress) and not started:
                    started = True
                    begun.put(seed)
                images += isinstance(event, Image)
                if isinstance(event, Completed):
                    return started, images, None
        except UnavailableError as error:
            return started, images, error
    raise AssertionError("a stream ended without its last event")


def learn(address: str, name: str, reached: SimpleQueue[int]) -> list[TrainingEvent]:
    events = []
    with Client(address) as client:
        for event in client.train(name, **RECIPE):
            events.append(event)
            if isinstance(event, CheckpointPublished):
                reached.put(event.step)
    return events


def test_pictures_a_queue_and_a_training(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", "--drain-seconds", "120").start()
    with ThreadPoolExecutor(REQUESTS + 1) as pool:
        reached: SimpleQueue[int] = SimpleQueue()
        training = pool.submit(learn, server.address, "storm", reached)
        reached.get(timeout=120)
        begun: SimpleQueue[int] = SimpleQueue()
        pictures: list[Future[tuple[bool, int, UnavailableError | None]]] = [
            pool.submit(paint, server.address, seed, begun) for seed in range(REQUESTS)
        ]
        begun.get(timeout=120)
        worker = int(server.state["worker_pid"])
        assert server.stop(timeout=180) == 0
        assert wait_gone(worker)

        ends = [picture.result(timeout=60) for picture in pictures]
        finished = [end for end in ends if end[2] is None]
        refused = [end[2] for end in ends if end[2] is not None]
        # What had begun came whole, what waited was told when to come back; both were there.
        assert finished
        assert refused
        assert all(images == 4 for _, images, _ in finished)
        assert all(started == (error is None) for started, _, error in ends)
        assert {(error.reason, error.retry_after) for error in refused} == {("SERVER_DRAINING", 5.0)}

        server.start()
        events = training.result(timeout=240)
    assert isinstance(events[-1], TrainingCompleted)
    assert (events[-1].state, events[-1].step) == (TrainingState.SUCCEEDED, 24)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    with Client(server.address) as client:
        list(client.train("calm", **RECIPE))
        for name in ("storm", "calm"):
            client.export_adapter(name, tmp_path / f"{name}.safetensors")
    assert tensors(tmp_path / "storm.safetensors") == tensors(tmp_path / "calm.safetensors")
    assert server.stop() == 0


def test_a_second_sigterm_is_faster(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", "--drain-seconds", "3600", module=FRONT).start()
    with ThreadPoolExecutor(1) as pool, Client(server.address, reconnect_timeout=0) as client:
        begun: SimpleQueue[int] = SimpleQueue()
        picture = pool.submit(hold, server.address, begun)
        begun.get(timeout=60)
        server.terminate()
        # It has understood once it takes nothing new; what has begun it would finish for an hour.
        while refusal(client) != "SERVER_DRAINING":
            pass
        assert not picture.done()
        assert server.stop(timeout=60) == 0
        assert picture.result(timeout=60) == "SERVER_DRAINING"


def hold(address: str, begun: SimpleQueue[int]) -> str:
    """A picture that is never finished; what it ended with."""
    with Client(address, reconnect_timeout=0) as client:
        try:
            for event in client.generate_stream("hold"):
                if isinstance(event, Progress):
                    begun.put(1)
        except UnavailableError as error:
            return error.reason
    return ""


def refusal(client: Client) -> str:
    """What a new request is refused with; "" if it is not."""
    try:
        client.generate("x")
    except UnavailableError as error:
        return error.reason
    return ""
