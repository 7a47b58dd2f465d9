"""Which bucket a training gets for life, by who is there when it begins."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pytest

from atelier_server.core import Recipe, TrainingJob
from atelier_server.workers.trainings import TrainerRun, TrainerRuns


@dataclass
class Rows:
    """Of a trainer only what decides about its bucket."""

    rows: int
    kind: Hashable | None = "square"
    bucket: int = 0

    @property
    def company(self) -> Hashable | None:
        return None if self.kind is None or self.bucket == self.rows else (self.kind, self.bucket)

    def settle(self, bucket: int) -> None:
        self.bucket = bucket

    def state_bytes(self) -> int:
        return 7


def opened(*trainers: Any) -> tuple[TrainerRuns, list[TrainerRun]]:
    queue = list(trainers)
    runs = TrainerRuns(lambda _: queue.pop(0))
    job = TrainingJob("otto-1", "otto", 1, Recipe("otto", 64), ())
    return runs, [runs.open(job) for _ in trainers]


@pytest.mark.parametrize(
    ("trainers", "bucket"),
    [
        ([Rows(3)], 3),  # alone
        ([Rows(1), Rows(1)], 2),
        ([Rows(1), Rows(1), Rows(1), Rows(1)], 4),
        ([Rows(4), Rows(4), Rows(4)], 16),
        ([Rows(1), Rows(4, kind="wide")], 1),  # nobody whose rows have its shapes
        ([Rows(1, kind=None), Rows(1)], 1),  # by itself whoever is there
        ([Rows(1), Rows(2, bucket=8), Rows(2, bucket=4)], 8),  # joins those that have one
        ([Rows(3), Rows(1, bucket=2)], 3),  # too small for it
        ([Rows(1), Rows(4, bucket=4)], 1),  # has no room for anybody
        ([Rows(20), Rows(20)], 20),
    ],
)
def test_a_bucket_follows_from_who_is_there(trainers: list[Rows], bucket: int) -> None:
    _, runs = opened(*trainers)
    place = runs[0].place
    assert (place.rows, place.bucket) == (trainers[0].rows, bucket)
    assert place.company == (None if bucket == trainers[0].rows else (trainers[0].kind, bucket))
    assert runs[0].place == place


def test_those_that_have_ended_do_not_count() -> None:
    every, runs = opened(Rows(1), Rows(1))
    del runs[1]
    assert runs[0].place.bucket == 1
    runs[0].stepped()
    assert every.state_bytes == 7
