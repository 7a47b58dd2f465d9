"""A whole U-Net learned on a real server: told, painted, and served as a base of its own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from typer.testing import CliRunner

from atelier import Client
from atelier.cli import cli
from tests.bases import peer, save_base
from tests.process.server import Server

pytestmark = pytest.mark.process
PROMPT = "a sks blue plush octopus"


def lines(*arguments: str) -> list[dict[str, object]]:
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_full_model_is_served_and_is_what_was_trained(tmp_path: Path) -> None:
    base = save_base("sd1", tmp_path / "base")
    teacher = Server(tmp_path / "data", "--model", str(base)).start()
    options = ("--method", "dreambooth", "--max-train-steps", "4", "--checkpointing-steps", "2")
    events = lines(
        *("train", "examples/otto", "--name", "otto", "--instance-prompt", PROMPT, *options),
        *("--learning-rate", "1e-3", "--rank", "8", "--validation-prompts", PROMPT),
        *("--validation-steps", "2", "--server", teacher.address),
    )
    checkpoints = [event["checkpoint"] for event in events if "checkpoint" in event]
    assert [checkpoint["step"] for checkpoint in checkpoints] == [2, 4]  # type: ignore[index]
    assert all(0.1 < checkpoint["kept_share"] < 1 for checkpoint in checkpoints)  # type: ignore[index]
    assert sum("sample" in event for event in events) == 2
    [training] = lines("trainings", "show", "otto", "--server", teacher.address)
    [folder] = training["kept_bases"]  # type: ignore[misc]
    assert Path(folder).name == "4"
    server = Server(tmp_path / "served", "--model", folder).start()
    with Client(server.address) as client:
        picture = client.generate(PROMPT, num_inference_steps=4, seed=3, scheduler="ddim", guidance_scale=7.5)
    served = np.asarray(Image.open(io.BytesIO(picture.images[0].data))).astype(int)
    assert np.abs(served - painted_by_diffusers(Path(folder))).max() <= 1
    assert np.abs(served - painted_by_diffusers(base)).max() > 1
    server.stop()
    with Client(teacher.address) as client:
        client.delete_training("otto")
        assert client.get_adapter("otto").version == 1
    assert not Path(folder).exists()
    teacher.stop()


def painted_by_diffusers(folder: Path) -> np.ndarray:
    pipeline = peer("sd1", folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    [image] = pipeline(
        PROMPT, num_inference_steps=4, guidance_scale=7.5, generator=torch.Generator().manual_seed(3)
    ).images
    return np.asarray(image).astype(int)
