"""Recipes that cannot be followed, and a loss that is no number."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atelier import (
    AlreadyExistsError,
    CheckpointPublished,
    Client,
    FailedPreconditionError,
    NotFoundError,
    TrainingCompleted,
    TrainingEvent,
    TrainingState,
)
from tests.process.bad_input.calls import (
    GOOD,
    PICTURES,
    free_name,
    learns,
    paints,
    refused,
    train,
    violations,
)

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("field", "value", "wants"),
    [
        ("rank", 0, "between 1 and 64"),
        ("rank", 10**6, "between 1 and 64"),
        ("max_train_steps", 0, "between 1 and 20000"),
        ("max_train_steps", 10**6, "between 1 and 20000"),
        ("train_batch_size", 0, "between 1 and 16"),
        ("resolution", 100, "multiple of 8"),
        ("resolution", 4096, "between 8 and 2048"),
        ("learning_rate", float("nan"), "finite number above 0"),
        ("learning_rate", 0.0, "finite number above 0"),
        ("lr_scheduler", "magic", "cosine"),
        ("checkpointing_steps", 0, "between 1 and"),
    ],
)
def test_a_wrong_recipe(client: Client, field: str, value: Any, wants: str) -> None:
    found = violations(lambda: train(client, "recipe", **{field: value}))
    # The alpha that is not given is the rank, also a wrong one.
    assert set(found) - {"recipe.lora_alpha"} == {f"recipe.{field}"}
    assert str(value) in found[f"recipe.{field}"]
    assert wants in found[f"recipe.{field}"]


@pytest.mark.parametrize("name", ["../x", "", "Otto", "a/b", "x" * 64, "x\0y", "-a"])
def test_a_name_that_is_no_name(client: Client, otto: str, name: str, tmp_path: Path) -> None:
    assert set(violations(lambda: train(client, name))) == {"recipe.name"}
    file = tmp_path / "otto.safetensors"
    client.export_adapter(otto, file)
    assert set(violations(lambda: client.import_adapter(file, name))) == {"metadata.name"}
    assert set(violations(lambda: client.get_adapter(name))) == {"adapter"}
    assert set(violations(lambda: client.delete_adapter(name))) == {"adapter"}


def test_everything_wrong_with_a_recipe_is_said_at_once(client: Client) -> None:
    wrong: dict[str, Any] = {
        "instance_prompt": "x" * 100_000,
        "max_train_steps": 10**6,
        "learning_rate": float("nan"),
        "lr_scheduler": "magic",
        "lr_warmup_steps": -1,
        "train_batch_size": 0,
        "rank": 10**6,
        "lora_alpha": float("inf"),
        "resolution": 100,
        "checkpointing_steps": 0,
        "validation_steps": 10**6,
        "adam_beta1": 1.0,
        "adam_beta2": float("nan"),
        "adam_weight_decay": -1.0,
        "adam_epsilon": 0.0,
        "max_grad_norm": 0.0,
        "snr_gamma": float("nan"),
        "caption_dropout": 2.0,
        "method": "magic",
    }
    found = violations(lambda: train(client, "../x", [], request_id="no uuid", **wrong))
    expected = {f"recipe.{field}" for field in wrong}
    assert set(found) == expected | {"start.request_id", "recipe.name", "recipe.num_images"}
    assert learns(client, free_name())


def test_a_trainings_request_id_with_another_body(client: Client) -> None:
    known = str(uuid.uuid4())
    first = train(client, "once", request_id=known)
    others: list[Callable[[], object]] = [
        lambda: train(client, "once", request_id=known, rank=4),
        lambda: train(client, "twice", request_id=known),
        lambda: train(client, "once", PICTURES[::-1], request_id=known),
    ]
    for call in others:
        error = refused(AlreadyExistsError, "REQUEST_ID_REUSED", call)
        assert error.resource is not None
        assert error.resource.name == known
    assert train(client, "once", request_id=known) == first
    error = refused(AlreadyExistsError, "ADAPTER_EXISTS", lambda: train(client, "once"))
    assert "new_version" in error.message


def explode(client: Client, name: str) -> tuple[list[TrainingEvent], FailedPreconditionError]:
    """A rate that is 0 at the first step, so that its checkpoint is good, and absurd from then on."""
    events: list[TrainingEvent] = []

    def call() -> None:
        recipe = GOOD | {"max_train_steps": 30, "checkpointing_steps": 1, "learning_rate": 1e20}
        recipe |= {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10}
        events.extend(client.train(name, PICTURES, **recipe))  # those before the error stay

    return events, refused(FailedPreconditionError, "NONFINITE_LOSS", call)


def test_a_rate_that_turns_the_loss_to_nan_stops_and_keeps_the_last_good_checkpoint(client: Client) -> None:
    events, error = explode(client, "wild")
    step = int(error.metadata["step"])
    assert 1 < step < 30
    assert f"step {step}" in error.message
    assert "lower the learning rate" in error.message
    last = events[-1]
    assert isinstance(last, TrainingCompleted)
    assert (last.state, last.reason) == (TrainingState.FAILED, "NONFINITE_LOSS")
    training = client.get_training("wild")
    assert (training.state, training.reason) == (TrainingState.FAILED, "NONFINITE_LOSS")
    # Whoever watches it later hears the same.
    late = refused(FailedPreconditionError, "NONFINITE_LOSS", lambda: list(client.watch_training("wild")))
    assert late.metadata == error.metadata
    assert any(isinstance(event, CheckpointPublished) and event.step == 1 for event in events)
    assert paints(client, "wild@1")
    assert learns(client, free_name())


def test_what_a_wild_training_recommends_can_be_painted(client: Client) -> None:
    events, _ = explode(client, "wilder")
    assert isinstance(events[-1], TrainingCompleted)
    assert paints(client, "wilder")
    assert paints(client, events[-1].adapter)


# ------------------------------------------------------------------------------------------ contradictions
TEXT = {"train_text_encoder": True}
TOKENS: dict[str, Any] = {"method": "textual_inversion", "placeholder_tokens": ["sks"]}


@pytest.mark.parametrize(
    ("recipe", "field", "wants"),
    [
        (
            {"train_text_encoder": True, "cache_text_embeddings": True},
            "cache_text_embeddings",
            "leave it out",
        ),
        (TOKENS | {"cache_text_embeddings": True}, "cache_text_embeddings", "leave it out"),
        (TOKENS | {"train_text_encoder": True}, "train_text_encoder", "use pivotal or lora"),
        ({"method": "pivotal"}, "placeholder_tokens", "name at least one"),
        (TOKENS | {"placeholder_tokens": ["octopus"]}, "placeholder_tokens[0]", "a word that the base has"),
        (TOKENS | {"placeholder_tokens": ["<zoe>"]}, "placeholder_tokens[0]", "in no caption"),
        (TOKENS | {"initializer_token": "qqq qqq"}, "initializer_token", "not a single word"),
        ({"num_vectors": 3}, "num_vectors", "there are none"),
        ({"keep_every": 7, "checkpointing_steps": 5}, "keep_every", "multiple of checkpointing_steps = 5"),
        ({"optimizer": "adamw8bit"}, "optimizer", "bitsandbytes"),
        ({"mixed_precision": "fp8"}, "mixed_precision", "no, fp16, bf16"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights", "gaussian"),
        ({"batch_bucket": 2, "train_batch_size": 3}, "batch_bucket", "train_batch_size = 3"),
    ],
)
def test_knobs_that_contradict_each_other_or_the_server(
    client: Client, recipe: dict[str, Any], field: str, wants: str
) -> None:
    name = free_name()
    found = violations(lambda: train(client, name, **recipe))
    assert set(found) == {f"recipe.{field}"}
    assert wants in found[f"recipe.{field}"]
    refused(NotFoundError, "TRAINING_NOT_FOUND", lambda: client.get_training(name))


def test_the_text_side_learns_after_all_that(client: Client) -> None:
    events = train(client, free_name(), **TOKENS)
    assert isinstance(events[-1], TrainingCompleted)
    assert events[-1].state is TrainingState.SUCCEEDED
    recipe = client.get_training(events[0].training).recipe
    assert recipe["cache_text_embeddings"] is False
