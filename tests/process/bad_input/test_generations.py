"""Bad input to Generate and to what takes an adapter by its name."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atelier import (
    AlreadyExistsError,
    Client,
    NotFoundError,
)
from tests.pictures import png, soft_colours
from tests.process.bad_input.calls import (
    paints,
    refused,
    violations,
)

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("field", "value", "wants"),
    [
        ("width", 100, "multiple of 8"),
        ("width", 0, "between 8 and 2048"),
        ("height", -8, "between 8 and 2048"),
        ("height", 2056, "between 8 and 2048"),
        ("num_inference_steps", 0, "between 1 and 200"),
        ("num_inference_steps", 10**6, "between 1 and 200"),
        ("num_images", 0, "between 1 and 16"),
        ("num_images", 10**6, "between 1 and 16"),
        ("guidance_scale", float("nan"), "finite number at least 0 and at most 100"),
        ("guidance_scale", float("inf"), "finite number at least 0 and at most 100"),
        ("scheduler", "magic", "euler-a"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(
    client: Client, field: str, value: Any, wants: str
) -> None:
    fields: Any = {field: value}
    found = violations(lambda: client.generate("x", **fields))
    assert list(found) == [field]
    assert str(value) in found[field]
    assert wants in found[field]


def test_pictures_that_do_not_fit_are_named_with_what_would(client: Client) -> None:
    """The noise is larger than gRPC's own limit for a message."""
    noise = png(np.random.default_rng(0).integers(0, 256, (1400, 1200, 3)))
    assert len(noise) > 4 * 2**20
    found = violations(lambda: client.generate("x", image=noise, width=64, height=64))
    assert found == {"image": "is 1200 x 1400; 64 x 64 would be right"}
    speck = np.zeros((64, 64))
    speck[1, 1] = 255
    found = violations(
        lambda: client.generate("x", image=soft_colours(), mask_image=png(speck), num_inference_steps=2)
    )
    assert found.keys() == {"mask_image"}
    assert "nothing of it is left at the latents' size" in found["mask_image"]
    assert violations(lambda: client.generate("x", eta=0.5, scheduler="euler")) == {
        "eta": "scheduler euler has no eta; those that have it: ddim, tcd"
    }


def test_what_only_the_worker_sees_is_told_by_field_too(client: Client, tmp_path: Path) -> None:
    assert violations(lambda: client.generate("x", scheduler="pndm", num_inference_steps=1)) == {
        "num_inference_steps": "1 do not suit pndm; 4 would"
    }
    found = violations(lambda: client.extract_adapter(str(tmp_path), "two", 2))
    assert found.keys() == {"tuned"}


def test_a_prompt_of_100_kb(client: Client) -> None:
    found = violations(lambda: client.generate("x" * 100_000, negative_prompt="y" * 100_000))
    assert found == {
        "prompt": "100000 characters are more than 10000",
        "negative_prompt": "100000 characters are more than 10000",
    }


def test_everything_wrong_with_a_generation_is_said_at_once(client: Client) -> None:
    found = violations(
        lambda: client.generate(
            "x" * 100_000,
            adapters=["../x", "otto:nan", "otto@-1"],
            request_id="not-a-uuid",
            width=100,
            height=10**6,
            num_images=0,
            num_inference_steps=10**6,
            guidance_scale=float("nan"),
            scheduler="magic",
            reproducibility="strict",
            batch_bucket=3,
        )
    )
    assert set(found) == {
        *("prompt", "adapters[0].adapter", "adapters[1].adapter", "adapters[2].adapter", "request_id"),
        *("width", "height", "num_images", "num_inference_steps", "guidance_scale", "scheduler"),
        "batch_bucket",
    }
    assert "'../x'" in found["adapters[0].adapter"]


def test_more_adapters_than_a_picture_may_have(client: Client, otto: str) -> None:
    assert violations(lambda: client.generate("x", adapters=[otto] * 5)) == {
        "adapters": "5 adapters are more than 4"
    }


@pytest.mark.parametrize("reference", ["nobody", "otto@999", "otto@v7"])
def test_an_unknown_adapter_or_checkpoint(client: Client, otto: str, reference: str, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    calls: list[Callable[[], object]] = [
        lambda: client.generate("x", adapters=reference),
        lambda: client.generate("x", adapters=[otto, reference]),
        lambda: client.load_adapter(reference),
        lambda: client.export_adapter(reference, target),
    ]
    for call in calls:
        error = refused(NotFoundError, "ADAPTER_NOT_FOUND", call)
        assert reference.partition("@")[0] in error.message
        assert error.resource is not None
    assert list(tmp_path.iterdir()) == []
    assert paints(client, otto)


def test_an_unknown_training(client: Client) -> None:
    calls: list[Callable[[], object]] = [
        lambda: list(client.watch_training("nobody")),
        lambda: client.get_training("nobody"),
        lambda: client.cancel_training("nobody"),
        lambda: client.resume_training("nobody"),
        lambda: client.delete_training("../../x"),
    ]
    for call in calls:
        refused(NotFoundError, "TRAINING_NOT_FOUND", call)


def test_a_generations_request_id_with_another_body(client: Client) -> None:
    known = str(uuid.uuid4())
    first = client.generate("a red octopus", request_id=known, seed=7, num_inference_steps=2)
    error = refused(
        AlreadyExistsError,
        "REQUEST_ID_REUSED",
        lambda: client.generate("a blue octopus", request_id=known, seed=7, num_inference_steps=2),
    )
    assert error.resource is not None
    assert error.resource.name == known
    again = client.generate("a red octopus", request_id=known, seed=7, num_inference_steps=2)
    assert again.images[0].data == first.images[0].data
