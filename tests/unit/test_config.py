"""Settings fail loudly, together, and say what would be right."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from atelier_server.config import Limits, Settings


def test_the_defaults_are_the_contracts() -> None:
    settings = Settings()
    assert (settings.model, settings.host, settings.port, settings.metrics_port) == (
        "pocket",
        "127.0.0.1",
        50051,
        9090,
    )


def test_every_field_is_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_PORT", "1234")
    monkeypatch.setenv("ATELIER_LIMIT_MAX_NUM_IMAGES", "3")
    settings = Settings()
    assert (settings.port, settings.limits.max_num_images) == (1234, 3)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"port": 70000, "device": "tpu", "colour": "red"})
    assert {error["loc"][0] for error in caught.value.errors()} == {"port", "device", "colour"}
    assert "'tpu' is none of auto, cpu, cuda, cuda:N" in str(caught.value)


def test_one_picture_must_fit_the_slots() -> None:
    with pytest.raises(ValidationError, match="slots: 2 are too few for one picture"):
        Settings(slots=2)
    assert Settings(slots=2, limits=Limits(max_adapters_per_image=2)).slots == 2
