"""Steps counted over a time, from when each was told."""

from __future__ import annotations

import pytest

from benchmarks import serve_and_train
from benchmarks.serve_and_train import Steps


def test_steps_within_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 2.0, 3.5, 9.0])
    monkeypatch.setattr(serve_and_train, "perf_counter", lambda: next(clock))
    steps = Steps()
    for done in (1, 2, 4, 6):
        steps.tell(done)
    steps.wait()
    assert steps.done(2.0, 8.0) == 2
    assert steps.done(0.0, 10.0) == 6
    assert steps.intervals(1.5, 8.0) == [1.5, 5.5]


def test_what_failed_is_raised() -> None:
    steps = Steps()
    steps.fail(RuntimeError("gone"))
    with pytest.raises(RuntimeError, match="gone"):
        steps.wait()
    with pytest.raises(RuntimeError, match="gone"):
        steps.done(0, 1)
