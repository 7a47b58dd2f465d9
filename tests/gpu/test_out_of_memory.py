"""A GPU that is really full: the batch is split, everybody gets a picture, and the next batch runs whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.desk import Desk, job
from tests.gpu.device import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="a CPU's memory is not ours")]


@pytest.fixture
def whole_memory() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("whole_memory")
def test_a_batch_that_does_not_fit_is_split(tmp_path: Path) -> None:
    desk = Desk("pocket", tmp_path, slots=1, device=DEVICE)
    jobs = [job(f"r{i}", "a red octopus", steps=3, seed=i) for i in range(8)]
    desk.generate(jobs[:1])
    alone = _peak_of(lambda: desk.generate(jobs[:1]))
    together = _peak_of(lambda: desk.generate(jobs))
    assert together > alone
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((alone + together) / 2 / total)
    pictures = desk.generate(jobs)
    assert all(len(made) == 1 for made in pictures.values())
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(desk.generate(jobs)) == len(jobs)


def _peak_of(work: object) -> int:
    """Bytes that torch has reserved at most."""
    assert callable(work)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_reserved()
