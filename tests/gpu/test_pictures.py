"""Pictures on a GPU against diffusers' own pipelines on it: texts, and pictures to begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier_server.diffusion.base import load_base
from tests.bases import peer, save_base
from tests.golden.test_pictures_equal_diffusers import Case, check
from tests.gpu.device import DEVICE

pytestmark = pytest.mark.gpu
CASES = {
    "sd1": [Case("ddim", 6.0), Case("dpmpp-2m", 6.0, mode="image"), Case("euler-a", 1.0, mode="inpaint")],
    "sd2": [Case("ddim", 6.0, negative="a blue fish"), Case("unipc", 6.0, mode="image")],
    "sdxl": [Case("euler", 6.0, width=96), Case("heun", 6.0, mode="image"), Case("ddim", 6.0, mode="image")],
}


@pytest.mark.parametrize("family", CASES)
def test_pictures_are_diffusers(family: str, tmp_path: Path) -> None:
    """To a level of 255, in float32."""
    folder = save_base(family, tmp_path)
    pairs = {family: (load_base(str(folder), DEVICE, "float32"), peer(family, folder).to(DEVICE))}
    for case in CASES[family]:
        check(pairs, family, case)
