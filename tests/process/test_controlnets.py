"""A real server with a base of its own and a ControlNet: asked by the command line, against diffusers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionXLControlNetPipeline
from PIL import Image

from tests.bases import PIXELS, peer, save_base, save_controlnet
from tests.pictures import soft_colours
from tests.process.server import Server

pytestmark = pytest.mark.process
COMMAND = [sys.executable, "-c", "from atelier.cli import main; main()"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    root = tmp_path_factory.mktemp("served")
    save_base("sdxl", root / "base")
    save_controlnet("sdxl", root / "canny", root / "base")
    options = ("--model", str(root / "base"), "--controlnet", f"canny={root / 'canny'}")
    server = Server(root / "data", *options).start()
    (root / "edges.png").write_bytes(soft_colours(PIXELS, PIXELS))
    yield server, root
    server.stop()


def atelier(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments, "--server", server.address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(float)


def test_the_server_tells_its_family_and_its_controlnets(served: tuple[Server, Path]) -> None:
    server, root = served
    told: dict[str, Any] = json.loads(atelier(server, "info", "--json").stdout)
    assert told["base_model"]["family"] == "sdxl"
    [net] = told["controlnets"]
    assert (net["name"], net["reference"], len(net["sha256"])) == ("canny", str(root / "canny"), 64)
    assert "controls canny" in atelier(server, "info").stdout


def test_a_guided_picture_is_diffusers(served: tuple[Server, Path]) -> None:
    server, root = served
    common = ("generate", "a red cat", "--scheduler", "ddim", "--num-inference-steps", "5", "--seed", "3")
    guided, plain = root / "guided.png", root / "plain.png"
    chosen = ("--controlnet", f"canny={root / 'edges.png'}:0.8:0-0.9")
    made = atelier(server, *common, *chosen, "-o", str(guided))
    assert made.returncode == 0, made.stderr
    assert atelier(server, *common, "-o", str(plain)).returncode == 0
    pipeline = StableDiffusionXLControlNetPipeline.from_pipe(
        peer("sdxl", root / "base"), controlnet=ControlNetModel.from_pretrained(root / "canny")
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with Image.open(root / "edges.png") as edges:
        theirs = pipeline(
            "a red cat",
            image=edges.convert("RGB"),
            controlnet_conditioning_scale=0.8,
            control_guidance_end=0.9,
            num_inference_steps=5,
            guidance_scale=7.5,
            generator=torch.Generator("cpu").manual_seed(3),
            output_type="np",
        ).images[0]
    assert np.abs(read(guided) - theirs * 255).max() <= 1.5  # files hold whole numbers
    assert np.abs(read(guided) - read(plain)).max() > 8
    with Image.open(guided) as image:
        [use] = json.loads(image.info["atelier"])["controlnets"]
    assert (use["name"], use["scale"], use["end"]) == ("canny", 0.8, 0.9)


def test_what_does_not_fit_is_told(served: tuple[Server, Path]) -> None:
    server, root = served
    (root / "wide.png").write_bytes(soft_colours(96, PIXELS))
    wrong = ("--width", "64", "--controlnet", f"canny={root / 'wide.png'}")
    failed = atelier(server, "generate", "a", *wrong, "--controlnet", f"dpth={root / 'edges.png'}")
    assert failed.returncode == 1
    assert "controlnets[0].image: is 96 x 64; 64 x 64 would be right" in failed.stderr
    assert "controlnets[1].name: 'dpth' is not loaded; loaded: canny" in failed.stderr
    assert atelier(server, "generate", "a", "--controlnet", "canny").returncode != 0


@pytest.mark.soak
def test_a_controlnet_of_another_family_stops_the_start(served: tuple[Server, Path], tmp_path: Path) -> None:
    _, root = served
    save_base("sd1", tmp_path / "sd1")
    save_controlnet("sd1", tmp_path / "lines", tmp_path / "sd1")
    command = [sys.executable, "-m", "atelier_server", "--model", str(root / "base"), "--device", "cpu"]
    command += ["--port", "0", "--metrics-port", "-1", "--data-dir", str(tmp_path / "data")]
    command += ["--controlnet", f"lines={tmp_path / 'lines'}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert f"controlnet lines={tmp_path / 'lines'}: does not fit the base (sdxl)" in ended.stderr
