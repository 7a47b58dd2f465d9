"""kill -9 at a step drawn by lot, of the worker or of the front: every kind of training ends with the weights
of one that nobody disturbed, to the bit.

Two of the cases run with every test and one kill each; all of them, with all their kills, in `make soak`.
"""

from __future__ import annotations

import random
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from atelier import (
    Client,
    TrainingCompleted,
    TrainingEvent,
    TrainingProgress,
    TrainingRestarted,
    TrainingState,
)
from tests.process.server import Server

pytestmark = pytest.mark.process

STEPS = 24
WORDS = {"placeholder_tokens": ["<otto>"], "initializer_token": "octopus", "num_vectors": 2}
PICTURES = Path(__file__).parents[2] / "examples" / "otto"
Recipe = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Trainings that run at the same time, killed `kills` times between two of the first one's steps."""

    recipes: Sequence[Recipe]
    kills: int
    between: tuple[int, int] = (2, STEPS - 2)


CASES = {
    "lora": Case([{}], 2),
    "every knob": Case(
        [
            {
                "target_modules": ["attention", "feed_forward", "convolutions"],
                "gradient_accumulation_steps": 3,
                "lr_scheduler": "cosine",
                "optimizer": "prodigy",
                "learning_rate": 1.0,
                "use_ema": True,
                "ema_decay": 0.9,
                "random_crop": True,
                "random_flip": True,
                "caption_dropout": 0.2,
                "noise_offset": 0.05,
                "snr_gamma": 5.0,
                "validation_split": 0.25,
                "cache_latents": False,
                "aspect_ratio_buckets": True,
                "keep_last": 1,
            }
        ],
        3,
    ),
    "text encoders": Case([{"train_text_encoder": True, "use_dora": True}], 2),
    "textual inversion": Case([{"method": "textual_inversion", **WORDS}], 2),
    "dreambooth": Case([{"method": "dreambooth", "checkpointing_steps": 8, "learning_rate": 1e-5}], 2),
    "pivotal, words": Case([{"method": "pivotal", **WORDS}], 2, (2, STEPS // 2 - 2)),
    "pivotal, weights": Case([{"method": "pivotal", **WORDS}], 2, (STEPS // 2 + 2, STEPS - 2)),
    "two in one forward": Case(
        [{"batch_bucket": 4}, {"batch_bucket": 4, "rank": 4, "learning_rate": 3e-3, "seed": 7}], 3
    ),
    "words and weights in one forward": Case(
        [{"batch_bucket": 4, "method": "pivotal", **WORDS}, {"batch_bucket": 4, "rank": 4}], 2
    ),
}
ALWAYS = ("pivotal, words", "two in one forward")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures that have no captions of their own: all are called by the instance prompt."""
    found = tmp_path / "pictures"
    found.mkdir()
    for path in sorted(PICTURES.glob("*.png"))[:4] or sorted(PICTURES.glob("*.jp*g"))[:4]:
        shutil.copy(path, found)
    return found


def recipe(folder: Path, fields: Recipe) -> Recipe:
    word = "<otto>" if "placeholder_tokens" in fields else "a sks"
    return {
        "folder": folder,
        "instance_prompt": f"{word} blue plush octopus",
        "max_train_steps": STEPS,
        "checkpointing_steps": 5,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        **fields,
    }


def watch(client: Client, name: str, fields: Recipe, steps: SimpleQueue[int]) -> list[TrainingEvent]:
    """All events of a training; tells every step that is told."""
    events = []
    for event in client.train(name, **fields):
        events.append(event)
        if isinstance(event, TrainingProgress):
            steps.put(event.step)
    return events


def train(
    server: Server, name: str, recipes: Sequence[Recipe], kills: Iterator[tuple[int, bool]]
) -> list[str]:
    """Trains them all at once, with kills after a step of the first: digests of what they have learned."""
    names = [f"{name}-{number}" for number in range(len(recipes))]
    with Client(server.address) as client, ThreadPoolExecutor(len(recipes)) as pool:
        steps: list[SimpleQueue[int]] = [SimpleQueue() for _ in recipes]
        jobs = [pool.submit(watch, client, *job) for job in zip(names, recipes, steps, strict=True)]
        count = 0
        for at, of_front in kills:
            while steps[0].get(timeout=120) < at:
                pass
            count += 1
            if of_front:
                server.kill()
                server.start()
            else:
                server.kill_worker()
        events = [job.result(timeout=240) for job in jobs]
        for told in events:
            assert [event.seq for event in told] == list(range(1, len(told) + 1))
            assert isinstance(told[-1], TrainingCompleted)
            assert (told[-1].state, told[-1].step) == (TrainingState.SUCCEEDED, STEPS)
        assert sum(isinstance(event, TrainingRestarted) for event in events[0]) == count
        return [client.get_adapter(found).checkpoints[-1].sha256 for found in names]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "kills"),
    [(name, 1) for name in ALWAYS]
    + [pytest.param(name, case.kills, marks=pytest.mark.soak) for name, case in CASES.items()],
)
def test_killed_at_a_step_drawn_by_lot_it_ends_with_the_same_weights(
    server: Server, folder: Path, name: str, kills: int
) -> None:
    case, chance = CASES[name], random.Random(zlib.crc32(name.encode()))
    recipes = [recipe(folder, fields) for fields in case.recipes]
    undisturbed = train(server, "calm", recipes, iter(()))
    before = server.metrics()
    at = sorted(chance.sample(range(*case.between), kills))
    killed = train(server, "storm", recipes, ((step, chance.random() < 0.5) for step in at))
    assert killed == undisturbed
    assert len(set(undisturbed)) == len(recipes)
    if len(recipes) > 1:
        micro_steps = before["atelier_train_step_seconds_count"]
        assert micro_steps < before["atelier_train_steps_total"], "they have shared forwards"


def test_there_are_twenty_kills() -> None:
    assert sum(case.kills for case in CASES.values()) == 20
