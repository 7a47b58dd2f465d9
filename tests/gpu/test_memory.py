"""Memory on a GPU: what the allocator says, and the parts that it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atelier_server.messages import WorkerSettings
from atelier_server.workers.runner import TorchRunner

pytestmark = pytest.mark.gpu


def test_the_parts_add_up_to_what_is_allocated(tmp_path: Path) -> None:
    runner = TorchRunner(
        WorkerSettings(
            model="pocket",
            device="cuda",
            dtype="auto",
            data_dir=str(tmp_path),
            slots=4,
            threads=0,
            host_adapter_bytes=0,
            max_lora_rank=16,
        )
    )
    runner.measure()
    memory, parts = runner.memory(), dict(runner.memory().components)
    assert memory.allocated == torch.cuda.memory_allocated()
    assert memory.allocated <= memory.reserved
    assert memory.allocated <= memory.peak
    assert 0 < parts["base"] <= memory.allocated
    assert sum(parts.values()) == memory.allocated
