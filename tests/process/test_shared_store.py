"""Two real servers on one bucket: what one learns, the other paints with, tags and deletes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

import atelier
from tests.process.server import Server
from tests.s3 import S3Server

pytestmark = pytest.mark.process
PICTURES = Path(__file__).parents[2] / "examples" / "otto"


def test_two_servers_share_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = S3Server().start()
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    first = Server(tmp_path / "first", "--store", "s3://atelier/shared")
    second = Server(tmp_path / "second", "--store", "s3://atelier/shared")
    try:
        with atelier.Client(first.start().address) as one, atelier.Client(second.start().address) as two:
            _learn(one)
            _share(one, two)
    finally:
        first.stop()
        second.stop()
        bucket.kill()


def _learn(client: atelier.Client) -> None:
    prompt = "a sks blue plush octopus"
    fields = {"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 1, "validation_steps": 2}
    events = client.train(
        "otto", folder=PICTURES, instance_prompt=prompt, validation_prompts=[prompt], **fields
    )
    assert [event.step for event in events if isinstance(event, atelier.CheckpointPublished)] == [2, 4]


def _share(one: atelier.Client, two: atelier.Client) -> None:
    (seen,) = two.list_adapters(view="thumbnails")
    assert (seen.name, seen.family, seen.tier, seen.checkpoints[0].tier) == (
        "otto",
        "sd1",
        "remote",
        "remote",
    )
    with Image.open(io.BytesIO(seen.thumbnail)) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (64, 64))
    two.tag_adapter("otto@2", "production", expected="")
    pictures = [
        client.generate(
            "x", adapters="otto@production", seed=7, num_inference_steps=2, reproducibility="strict"
        )
        for client in (one, two)
    ]
    assert pictures[0].images[0].data == pictures[1].images[0].data
    (seen,) = two.list_adapters(resident=True)
    assert [checkpoint.tier for checkpoint in seen.checkpoints] == ["device", "remote"]
    assert two.get_adapter("otto").recipe["max_train_steps"] == 4
    with pytest.raises(atelier.AbortedError):
        one.tag_adapter("otto@4", "production", expected="")
    two.delete_adapter("otto")
    assert list(one.list_adapters()) == []
    assert [back.name for back in one.undelete_adapter("otto")] == ["otto"]
    assert [adapter.tags for adapter in two.list_adapters()] == [("v1", "production")]
