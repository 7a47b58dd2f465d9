"""A wheel installed elsewhere paints, scores and serves, with no network and none of this folder's files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.process

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PAINTS = """
import atelier_server.pocket, pathlib
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPProcessor
folder = atelier_server.pocket.path()
assert pathlib.Path.cwd() in folder.parents, folder
image = StableDiffusionPipeline.from_pretrained(folder)("a red octopus", num_inference_steps=2).images[0]
assert image.size == (64, 64)
ready = CLIPProcessor.from_pretrained(folder / "scorer")(
    text=["a red octopus"], images=[image], return_tensors="pt", padding=True, truncation=True
)
assert CLIPModel.from_pretrained(folder / "scorer")(**ready).logits_per_image.shape == (1, 1)
"""
SERVES = """
import io, sys
from atelier import Client
from PIL import Image
with Client(sys.argv[1]) as client:
    result = client.generate("a red octopus", num_inference_steps=2, seed=1)
assert Image.open(io.BytesIO(result.images[0].data)).size == (64, 64)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel; what it needs is lent by this one."""
    home = tmp_path_factory.mktemp("elsewhere")
    quiet = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    pip = (sys.executable, "-m", "pip")
    _done(*pip, "wheel", str(ROOT), "--no-build-isolation", *quiet, "--wheel-dir", str(home), cwd=ROOT)
    venv.create(home / "env", symlinks=True, with_pip=False)
    [wheel] = home.glob("*.whl")
    found = home / "env" / "bin" / "python"
    [site] = (home / "env" / "lib").glob("python*/site-packages")
    _done(*pip, f"--python={found}", "install", *quiet, str(wheel), cwd=home)
    # Lent after the wheel's own packages, and without reading this environment's .pth files, which would put
    # this folder's sources into reach.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return found


def _done(*command: str, cwd: Path) -> str:
    # PYTHONPATH would put this folder's sources in front of the wheel's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_paints_and_scores(python: Path) -> None:
    _done(str(python), "-c", PAINTS, cwd=python.parents[1])


def test_it_serves_the_embedded_model(python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE
    command = [
        str(python.with_name("atelier")),
        "serve",
        "--model",
        "pocket",
        "--device",
        "cpu",
        "--port",
        "0",
    ]
    command += ["--metrics-port", "0", "--threads", "1", "--data-dir", str(tmp_path / "data")]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=python.parents[1], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        listening = re.match(r"atelier listening on (\S+:\d+)", line)
        assert listening, line + (tmp_path / "log").read_text()
        _done(str(python), "-c", SERVES, listening[1], cwd=python.parents[1])
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0
