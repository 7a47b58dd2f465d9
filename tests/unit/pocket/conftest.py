"""A world small enough to be taught in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pocket.data import PictureSet, SetRecipe, picture_set


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="session")
def tiny_set(tiny_folder: Path) -> PictureSet:
    return picture_set(SetRecipe("small", 1, 48), tiny_folder)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
