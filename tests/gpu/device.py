"""The device of these tests; `ATELIER_TEST_DEVICE=cpu` tries them where there is no GPU."""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("ATELIER_TEST_DEVICE", "cuda")


def wait() -> None:
    """Until the device has done everything."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
