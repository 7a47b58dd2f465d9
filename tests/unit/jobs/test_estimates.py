"""How long a training takes, roughly: what makes a step longer is in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atelier_server.core import BaseInfo, Recipe
from atelier_server.jobs.trainings import estimated_seconds

BASE = BaseInfo(
    "p", "sd1", "0", 64, 64, "epsilon", "ddim", 77, 1, "cpu", "x", "float32", 9, (("torch", "2"),)
)
RECIPE = Recipe("x", 64, max_train_steps=10, train_batch_size=2)


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, 1.0),
        ({"gradient_accumulation_steps": 4}, 4.0),
        ({"gradient_checkpointing": True}, 4 / 3),
        ({"resolution": 128}, 4.0),
        ({"with_prior_preservation": True}, 2.0),
        ({"output_preservation_weight": 1.0}, 1.0 + 4 / 3),
    ],
)
def test_what_makes_a_step_longer(changes: dict[str, object], times: float) -> None:
    plain = estimated_seconds(RECIPE, BASE, 0.5)
    assert plain == 10 * 2 * 3 * 0.5
    assert estimated_seconds(replace(RECIPE, **changes), BASE, 0.5) == pytest.approx(plain * times)
