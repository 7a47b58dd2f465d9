"""A whole worker on an inpainting model: nine channels from the first measurement to the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from atelier_server.core import InitImage
from benchmarks.desk import Desk, job
from tests.bases import save_base
from tests.pictures import right_part, soft_colours


def test_an_inpainting_model_measures_itself_and_paints(tmp_path: Path) -> None:
    desk = Desk(str(save_base("sd1", tmp_path / "base", in_channels=9)), tmp_path / "data")
    assert desk.runner.info.inpainting
    assert desk.runner.measure().row_seconds > 0
    init = InitImage(soft_colours(), "soft", 1.0, right_part(), "right")
    painted = desk.generate([replace(job("r", "a red octopus", steps=2, seed=1), init=init)])["r"]
    assert painted[0].startswith(b"\x89PNG")
