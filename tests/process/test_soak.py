"""The long version of test_crashes: many kills of either process, and the same weights in the end."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest

from atelier import Client, TrainingCompleted, TrainingState
from tests.process.server import Server
from tests.process.test_crashes import RECIPE, numbers, watch
from tests.process.weights import tensors

pytestmark = [pytest.mark.process, pytest.mark.soak]

KILLS = 20
LONG = RECIPE | {"max_train_steps": 400, "checkpointing_steps": 10}


@pytest.mark.timeout(1800)
def test_twenty_kills_change_nothing(server: Server, tmp_path: Path) -> None:
    chance = random.Random(0)
    with Client(server.address) as client, ThreadPoolExecutor(1) as pool:
        checkpoints: SimpleQueue[int] = SimpleQueue()
        watch(client, "calm", checkpoints, **LONG)
        while not checkpoints.empty():
            checkpoints.get()
        training = pool.submit(watch, client, "storm", checkpoints, **LONG)
        for _ in range(KILLS):
            checkpoints.get(timeout=120)
            if chance.random() < 0.5:
                server.kill_worker()
                server.wait_ready()
            else:
                server.kill()
                server.start()
        events = training.result(timeout=600)
        client.export_adapter("calm", tmp_path / "calm.safetensors")
        client.export_adapter("storm", tmp_path / "storm.safetensors")
    assert numbers(events) == list(range(1, len(events) + 1))
    assert isinstance(events[-1], TrainingCompleted)
    assert events[-1].state is TrainingState.SUCCEEDED
    assert tensors(tmp_path / "calm.safetensors") == tensors(tmp_path / "storm.safetensors")
