"""Quotas: what is refused, what it says, and when it helps to come back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from atelier_server.access.tenants import Tenant
from atelier_server.config import Quotas
from atelier_server.errors import QuotaExceeded
from atelier_server.jobs.quotas import (
    DAY_SECONDS,
    check_images,
    check_steps,
    check_stored,
    check_trainings,
)

RED = Tenant("red", Quotas(max_images=4, max_trainings=1, max_stored_bytes=100, max_train_steps_per_day=1000))
FREE = Tenant("free")


def test_nothing_set_means_no_bound() -> None:
    check_images(FREE, 10**9, 10**9)
    check_trainings(FREE, 10**9)
    check_stored(FREE, 10**12, 10**12)
    check_steps(FREE, [(0.0, 10**9)], 10**9, 0.0)


@pytest.mark.parametrize(
    ("check", "quota", "retry"),
    [
        (lambda: check_images(RED, 3, 2), "max_images", True),
        (lambda: check_images(RED, 0, 5), "max_images", False),
        (lambda: check_trainings(RED, 1), "max_trainings", True),
        (lambda: check_stored(RED, 50, 51), "max_stored_bytes", False),
    ],
)
def test_more_than_there_is_room_for_is_refused(check: Callable[[], None], quota: str, retry: bool) -> None:
    with pytest.raises(QuotaExceeded, match="tenant red may have") as caught:
        check()
    assert caught.value.metadata["quota"] == quota
    assert (caught.value.retry_after_seconds is not None) == retry


def test_up_to_the_bound_is_allowed() -> None:
    check_images(RED, 2, 2)
    check_trainings(RED, 0)
    check_stored(RED, 50, 50)
    check_steps(RED, [(0.0, 500)], 500, 10.0)


def test_steps_come_back_when_they_are_a_day_old() -> None:
    asked = [(100.0, 300), (200.0, 300), (300.0, 300)]
    with pytest.raises(QuotaExceeded) as caught:
        check_steps(RED, asked, 500, 1000.0)
    # 900 were asked for; 500 more fit once the first two are forgotten.
    assert caught.value.retry_after_seconds == 200.0 + DAY_SECONDS - 1000.0
    with pytest.raises(QuotaExceeded) as caught:
        check_steps(RED, asked, 1001, 1000.0)
    assert caught.value.retry_after_seconds is None
