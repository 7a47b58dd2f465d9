"""Calls of one class are bounded, apart from those of another."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier_server.config import Limits
from atelier_server.errors import TooManyCalls
from atelier_server.rpc.admission import Admission

LIMITS = Limits(max_generate_calls=2, max_train_calls=1, max_control_calls=3)
GENERATE = "/atelier.v1.GenerationService/Generate"
WATCH = "/atelier.v1.TrainingService/WatchTraining"
TRAIN = "/atelier.v1.TrainingService/Train"
LIST = "/atelier.v1.AdapterService/ListAdapters"


def test_one_more_than_the_limit_is_refused_and_told_when_to_come_back() -> None:
    admission = Admission(LIMITS)
    with admission.enter(TRAIN, "red"):
        with (
            pytest.raises(TooManyCalls, match="1 train calls") as caught,
            admission.enter(WATCH, "red"),
        ):
            pass
        assert caught.value.retry_after_seconds
        with admission.enter(GENERATE, "red"), admission.enter(GENERATE, "red"), admission.enter(LIST, "red"):
            pass
    with admission.enter(WATCH, "red"):
        pass


def test_a_call_that_fails_gives_its_place_back() -> None:
    admission = Admission(LIMITS)
    for _ in range(5):
        with pytest.raises(KeyError), admission.enter(TRAIN, "red"):
            raise KeyError


def test_a_full_house_is_full_for_those_who_are_in_it() -> None:
    admission = Admission(LIMITS)
    with admission.enter(TRAIN, "red"), admission.enter(WATCH, "blue"):
        for tenant in ("red", "blue"):
            with pytest.raises(TooManyCalls), admission.enter(TRAIN, tenant):
                pass
    with admission.enter(TRAIN, "blue"):
        pass


@given(st.lists(st.sampled_from([GENERATE, WATCH, TRAIN, LIST]), max_size=30))
def test_never_more_than_the_limits(methods: list[str]) -> None:
    admission = Admission(LIMITS)
    inside = {"generate": 0, "train": 0, "control": 0}
    kinds = {GENERATE: "generate", WATCH: "train", TRAIN: "train", LIST: "control"}
    most = {"generate": 2, "train": 1, "control": 3}
    with ExitStack() as stack:
        for method in methods:
            kind = kinds[method]
            if inside[kind] < most[kind]:
                stack.enter_context(admission.enter(method, "red"))
                inside[kind] += 1
            else:
                with pytest.raises(TooManyCalls), admission.enter(method, "red"):
                    pass
