"""Full float32: convolutions would be rounded to TF32, by more than these tests allow."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
